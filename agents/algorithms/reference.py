"""The reference policy: what any learner must beat. It samples, logs what that earns, and learns nothing."""

from .agent import Agent
from .episodes import EpisodeBatch
from .learner import Metrics


class Reference(Agent):
    """The policy that training starts from, as it is."""

    def update(self, batch: EpisodeBatch) -> Metrics:
        """Nothing."""
        return {}
