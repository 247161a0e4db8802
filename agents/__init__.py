"""Batched agents for token environments."""

if __name__ != "tokenenv.agents":
    raise ImportError("import tokenenv.agents; the repository root is on sys.path and hides the installed package")

from .config import AgentConfig
from .policy import LMPolicy
from .ppo import PPO, PPOConfig

__all__ = ["PPO", "AgentConfig", "LMPolicy", "PPOConfig"]
