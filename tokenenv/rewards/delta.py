"""The prefix difference of the score."""

from torch import Tensor

from tokenenv.rewards.base import RewardTerm, States, Transitions


class Delta(RewardTerm):
    """r_t = f(x, y_<=t) - f(x, y_<t), with f the score of the text so far; sums to score - f(prompt).

    Equals the terminal reward plus potential-based shaping with Phi = f (Ng, Harada and Russell 1999; zero where learners
    do not bootstrap), hence a critic shifted by f: it preserves the return up to a constant of the prompt, and the policy
    gradient. At an unscored truncation Phi is kept, so the same formula holds and nothing is withheld.
    """

    name = "delta"
    needs = frozenset({"scorer"})
    has_potential = True

    def reward(self, batch: Transitions) -> Tensor:
        """(K,): what the token added to the score."""
        assert batch.after.score is not None
        assert batch.before.score is not None
        return batch.after.score - batch.before.score

    def potential(self, states: States) -> Tensor:
        """(K,): the score of the text so far."""
        assert states.score is not None
        return states.score
