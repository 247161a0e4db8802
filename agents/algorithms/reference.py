"""The reference policy: what any learner must beat.

What it does: it samples from the policy that training starts from, and logs what that earns.

What it leaves out: learning.
"""

from tokenenv.agents.agent import Agent
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning.learner import Metrics


class Reference(Agent):
    """The policy that training starts from, as it is."""

    def update(self, batch: EpisodeBatch) -> Metrics:
        """Learn nothing; return no metrics."""
        return {}
