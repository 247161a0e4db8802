"""Batched agents for token environments."""

if __name__ != "tokenenv.agents":
    raise ImportError("import tokenenv.agents; the repository root is on sys.path and hides the installed package")

from .a2c import A2C, A2CConfig
from .agent import Agent
from .best_of_n import BestOfN
from .config import AgentConfig
from .groups import GroupConfig
from .grpo import GRPO, GRPOConfig
from .klq import KLQ, KLQConfig
from .policy import LMPolicy
from .policy_gradient import PolicyGradient, PolicyGradientConfig
from .ppo import PPO, PPOConfig
from .reference import Reference
from .reinforce_plus_plus import ReinforcePlusPlus
from .rloo import RLOO
from .vine_ppo import VinePPO, VinePPOConfig

ALGORITHMS: dict[str, type[Agent]] = {
    "ppo": PPO,
    "a2c": A2C,
    "reinforce++": ReinforcePlusPlus,
    "rloo": RLOO,
    "grpo": GRPO,
    "vineppo": VinePPO,
    "klq": KLQ,
    "best-of-n": BestOfN,
    "reference": Reference,
}
"""The bundled algorithms by their names on the command line."""

__all__ = [
    "A2C",
    "ALGORITHMS",
    "GRPO",
    "KLQ",
    "PPO",
    "RLOO",
    "A2CConfig",
    "Agent",
    "AgentConfig",
    "BestOfN",
    "GRPOConfig",
    "GroupConfig",
    "KLQConfig",
    "LMPolicy",
    "PPOConfig",
    "PolicyGradient",
    "PolicyGradientConfig",
    "Reference",
    "ReinforcePlusPlus",
    "VinePPO",
    "VinePPOConfig",
]
