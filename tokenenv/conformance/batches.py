"""What a trainer's function is given: a batch that holds every text of a world exactly as often as
the policy writes it, in groups where the world has groups.

Suffixes: B rows, L tokens of the longest text. Columns count the tokens after the prompt, whoever
wrote them; what lies right of a text is 0.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenenv.conformance.worlds import Texts, World, enumerated


@dataclass(frozen=True)
class Batch:
    """B texts with all that an estimator may read. Tensors are float64, masks bool."""

    rewards: Tensor
    """(B, L): what each token earned, without the KL penalty; 0 at tokens that others wrote."""
    values: Tensor
    """(B, L): the critic's value of the state before each token, others' tokens included."""
    mask: Tensor
    """(B, L) bool: the tokens that the policy wrote, which alone are learned from."""
    text_mask: Tensor
    """(B, L) bool: all tokens of the text."""
    logprobs: Tensor
    """(B, L): log pi of each token, others' included; gradients flow through it in `check_loss` and
    where `check_kl` looks at a loss."""
    old_logprobs: Tensor
    """(B, L): the log-probs that the tokens were drawn with."""
    ref_logprobs: Tensor
    """(B, L): log pi_ref of each token."""
    advantages: Tensor
    """(B, L): the exact advantage of each own token, for losses."""
    groups: Tensor
    """(B,) int64: the group of each row; rows of a group follow each other and share a prompt."""
    group_size: int
    cut: Tensor
    """(B,) bool: cut before its end and not scored, so that the last state is worth something."""
    last_values: Tensor
    """(B,): the critic's value of the last state; 0 where a text has ended."""
    kl_coef: float
    """beta, which what is optimised weighs KL(pi || pi_ref) with."""
    lambda_: float
    """What a function with a lambda is to take for it; gamma is 1 everywhere."""
    rows: Tensor
    """(B,) int64: the numbers of the texts in their world."""

    @property
    def penalised(self) -> Tensor:
        """(B, L): the rewards with `-beta (log pi - log pi_ref)` at each own token, as a trainer
        with its KL in the reward makes them."""
        log_ratio = (self.old_logprobs - self.ref_logprobs) * self.mask
        return self.rewards - self.kl_coef * log_ratio

    @property
    def scores(self) -> Tensor:
        """(B,): the sum of each text's rewards, without the KL penalty."""
        return self.rewards.sum(1)

    @property
    def last(self) -> Tensor:
        """(B,) int64: the column of each text's last token."""
        return self.text_mask.sum(1) - 1


def batch_of(texts: Texts) -> Batch:
    """Return the smallest batch that holds every text (every group of texts) by its chance."""
    world, rows, groups = texts.world, *grouped_rows(texts)
    values_S, advantage_YL = state_values(texts), exact_advantages(texts)
    critic_YL1 = (values_S + texts.error_S)[texts.state_YL1]
    masks = texts.own_YL[rows], texts.text_YL[rows]
    return Batch(
        rewards=texts.reward_YL[rows],
        values=torch.where(texts.text_YL, critic_YL1[:, :-1], 0.0)[rows],
        mask=masks[0],
        text_mask=masks[1],
        logprobs=texts.logprob(texts.policy_SV)[rows],
        old_logprobs=texts.logprob(texts.drawn_SV)[rows],
        ref_logprobs=texts.logprob(texts.reference_SV)[rows],
        advantages=advantage_YL[rows],
        groups=groups,
        group_size=world.group_size,
        cut=texts.cut_Y[rows],
        last_values=torch.where(texts.cut_Y, critic_YL1[:, -1], 0.0)[rows],
        kl_coef=world.beta,
        lambda_=world.lambda_,
        rows=rows,
    )


def grouped_rows(texts: Texts) -> tuple[Tensor, Tensor]:
    """Return the numbers of the texts (B,) and their groups (B,): with G texts a group, every
    G-tuple of texts of one prompt by its chance."""
    drawn, size = texts.count_Y, texts.world.group_size
    tuples = []
    for prompt in range(texts.world.prompts):
        rows = torch.arange(len(drawn)).repeat_interleave(drawn * (texts.prompt_Y == prompt))
        tuples.append(torch.cartesian_prod(*[rows] * size).reshape(-1, size))
    together = torch.cat(tuples)
    return together.flatten(), torch.arange(len(together)).repeat_interleave(size)


def earned(texts: Texts) -> Tensor:
    """Return (Y, L): what each token earns under the policy that drew it, its KL penalty
    included."""
    log_ratio_YL = texts.logprob(texts.drawn_SV) - texts.logprob(texts.reference_SV)
    return texts.reward_YL - texts.world.beta * log_ratio_YL * texts.own_YL


def to_go(values_YL: Tensor) -> Tensor:
    """Return (Y, L): each value and all to its right, added up."""
    return values_YL.flip(1).cumsum(1).flip(1)


def state_values(texts: Texts) -> Tensor:
    """Return (S,): what is still earned from each state on average."""
    come_YL1 = torch.nn.functional.pad(to_go(earned(texts)), (0, 1)) + texts.rest_Y[:, None]
    # The last state is repeated to the right of a text and must count once.
    seen_YL1 = torch.nn.functional.pad(texts.text_YL, (1, 0), value=True)
    weight_YL1 = texts.prob(texts.drawn_SV)[:, None] * seen_YL1
    total_S, chance_S = torch.zeros(2, len(texts.step_S), dtype=torch.float64)
    total_S.index_add_(0, texts.state_YL1.flatten(), (weight_YL1 * come_YL1).flatten())
    chance_S.index_add_(0, texts.state_YL1.flatten(), weight_YL1.flatten())
    return total_S / chance_S


def exact_advantages(texts: Texts) -> Tensor:
    """Return (Y, L): Q - V of each own token, 0 elsewhere."""
    values_YL1 = state_values(texts)[texts.state_YL1]
    return (earned(texts) + values_YL1[:, 1:] - values_YL1[:, :-1]) * texts.own_YL


def with_logprobs(batch: Batch, logprobs: Tensor) -> Batch:
    """Return the batch with other log-probs of the policy (B, L)."""
    return replace(batch, logprobs=logprobs)


def of_world(world: World) -> tuple[Texts, Batch]:
    """Return all texts of a world, and its batch."""
    texts = enumerated(world)
    return texts, batch_of(texts)
