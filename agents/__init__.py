"""Batched agents for token environments."""

if __name__ != "tokenenv.agents":
    raise ImportError(
        "import tokenenv.agents; the repository root is on sys.path and hides the installed package"
    )

from tokenenv.agents.agent import Agent
from tokenenv.agents.algorithms.a2c import A2C, A2CConfig
from tokenenv.agents.algorithms.best_of_n import BestOfN
from tokenenv.agents.algorithms.groups import GroupConfig, GroupMethod
from tokenenv.agents.algorithms.grpo import GRPO, GRPOConfig
from tokenenv.agents.algorithms.klq import KLQ, KLQConfig
from tokenenv.agents.algorithms.policy_gradient import PolicyGradient, PolicyGradientConfig
from tokenenv.agents.algorithms.ppo import PPO, PPOConfig
from tokenenv.agents.algorithms.reference import Reference
from tokenenv.agents.algorithms.reinforce_plus_plus import ReinforcePlusPlus
from tokenenv.agents.algorithms.rloo import RLOO
from tokenenv.agents.algorithms.vine_ppo import VinePPO, VinePPOConfig
from tokenenv.agents.config import AgentConfig
from tokenenv.agents.learning.policy import LMPolicy
from tokenenv.agents.run.load_policy import load_policy
from tokenenv.errors import InvalidArgument
from tokenenv.plugins import Names

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
for _name, _kind in ALGORITHMS.items():
    _kind.algo = _name

ALGORITHM_NAMES = Names("algo", "tokenenv.agents", ALGORITHMS)
"""The bundled names and those of installed plugins."""


def algorithm(name: str) -> type[Agent]:
    """Return the agent's class of a bundled name or of an installed plugin's, which is imported.

    Raises:
        InvalidArgument: the name is unknown, or the plugin cannot be used.
    """
    plugin = ALGORITHM_NAMES.find(name)
    return ALGORITHMS[name] if plugin is None else agent_class(plugin.load(), plugin.label)


def agent_class(found: object, label: str) -> type[Agent]:
    """Return `found` if it is a subclass of `Agent`, else raise `InvalidArgument`; `label` begins
    the error's sentence."""
    if isinstance(found, type) and issubclass(found, Agent):
        return found
    what = found.__name__ if isinstance(found, type) else f"of type {type(found).__name__}"
    raise InvalidArgument(
        f"{label} is {what}; an algorithm is a subclass of tokenenv.agents.Agent."
    )


__all__ = [
    "A2C",
    "ALGORITHMS",
    "ALGORITHM_NAMES",
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
    "GroupMethod",
    "KLQConfig",
    "LMPolicy",
    "PPOConfig",
    "PolicyGradient",
    "PolicyGradientConfig",
    "Reference",
    "ReinforcePlusPlus",
    "VinePPO",
    "VinePPOConfig",
    "agent_class",
    "algorithm",
    "load_policy",
]
