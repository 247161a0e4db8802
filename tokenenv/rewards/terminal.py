"""The sequence score, paid once at the end."""

from torch import Tensor

from tokenenv.rewards.seen import Transitions
from tokenenv.rewards.term import RewardTerm


class Terminal(RewardTerm):
    """The score of the text at the policy's last token, else 0. With KL this is the reward of
    InstructGPT, OpenRLHF and TRL. What the environment wrote behind that token is scored too.

    Preserves the return and the policy gradient (it is the return). The signal that reaches token t
    through GAE decays as lambda^(T-t), so compare with lambda = 1 before you blame sparsity.
    """

    name = "terminal"
    needs = frozenset({"scorer"})
    preserves_return = True
    preserves_gradient = True
    pays_score = True

    def reward(self, batch: Transitions) -> Tensor:
        """(K,): the score where a text ends and is scored."""
        return batch.final_score()


class MissingEOS(RewardTerm):
    """The penalty for a text that is cut and scored: r_t = -1 at its last token, else 0. The weight
    is the size of the penalty. It changes the return on purpose."""

    name = "missing_eos"
    pays_score = True

    def reward(self, batch: Transitions) -> Tensor:
        """(K,): -1 where a text is cut by its length."""
        return -(batch.truncated & batch.scored).float()
