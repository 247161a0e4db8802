"""The reference policy: what any learner must beat. It samples, logs what that earns, and learns
nothing."""

from tokenenv.agents.agent import Agent
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning.learner import Metrics


class Reference(Agent):
    """The policy that training starts from, as it is."""

    def update(self, batch: EpisodeBatch) -> Metrics:
        """Nothing."""
        return {}
