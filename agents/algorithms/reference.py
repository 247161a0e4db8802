"""The reference policy: what any learner must beat.

What it does: it samples from the policy that training starts from, and logs what that earns.

What it leaves out: learning.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gymnasium.vector import VectorEnv

from tokenenv.agents.agent import Agent
from tokenenv.agents.config import AgentConfig
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.keywords import AgentKeywords, takes
from tokenenv.agents.learning.learner import Metrics


class Reference(Agent):
    """The policy that training starts from, as it is."""

    learns = False

    if TYPE_CHECKING:

        @dataclass(kw_only=True)
        class _Keywords(AgentConfig, AgentKeywords): ...

        @takes(_Keywords)
        def __init__(self, envs: VectorEnv, config: Any = None, **keywords: Any) -> None: ...

    def update(self, batch: EpisodeBatch) -> Metrics:
        """Learn nothing; return no metrics."""
        return {}
