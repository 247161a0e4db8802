"""The score of each token, from a token-classification reward model."""

from torch import Tensor

from tokenenv.rewards.base import Parts, RewardTerm, Transitions


class Token(RewardTerm):
    """r_t = f(x, y_<=t), the reward model's score at token t; the sequence score is their sum.

    Causal; preserves the return (the sum is the score) and the policy gradient. A model trained so that the sum of its
    scores is unbounded rewards length; see the model cards for how the bundled ones avoid it.
    """

    name = "token"
    needs = frozenset({"token scorer"})

    def bind(self, parts: Parts) -> None:
        """Takes the scorer's trunk and head."""
        super().bind(parts)
        assert parts.scorer is not None
        self.models = (parts.scorer.model,)
        self._head = parts.scorer.head

    def reward(self, batch: Transitions) -> Tensor:
        """(K,): the head's score of the state after the token."""
        return self._head(batch.after.of(self.models[0]))
