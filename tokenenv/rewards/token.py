"""The score of each token, from a token-classification reward model."""

from torch import Tensor

from tokenenv.rewards.seen import FinishedTexts, Transitions
from tokenenv.rewards.term import Context, RewardTerm


class Token(RewardTerm):
    """The reward model's score of each of the policy's own tokens: r_t = f(x, y_<=t). The sequence
    score is their sum. Tokens that the environment writes are read, and not scored.

    Preserves the return (the sum is the score) and the policy gradient. A model whose scores add up
    to something unbounded rewards length; the model cards say how the bundled ones avoid it.

    A reward model that reads finished texts only (another tokenizer, or attention that looks ahead)
    has its scores placed in hindsight, aligned to the policy's tokens. The sum is still the score,
    but a token's share may then depend on later tokens, and reward-to-go loses that part of the
    gradient. A model that is causal and reads the policy's tokens, but is run on whole texts only
    (by vLLM), places what it would have paid.
    """

    name = "token"
    needs = frozenset({"token scorer"})
    preserves_return = True
    preserves_gradient = True

    def bind(self, context: Context) -> None:
        """Takes the scorer's trunk and head, or waits for the finished text."""
        super().bind(context)
        scorer = context.causal_scorer
        if scorer is None:
            self.kind, self.preserves_gradient = (
                "hindsight",
                not getattr(context.scorer, "looks_ahead", True),
            )
        else:
            self.models, self._head = (scorer.model,), scorer.head

    def reward(self, batch: Transitions) -> Tensor:
        """(K,): the head's score of the state after the token."""
        return self._head(batch.after.of(self.models[0]))

    def place(self, texts: FinishedTexts, max_new_tokens: int) -> Tensor:
        """(B, T): the scores as they were aligned to the policy's tokens."""
        assert texts.token_scores is not None
        return texts.token_scores
