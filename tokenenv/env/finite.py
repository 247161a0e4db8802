"""Rewards that are not finite: they are found without waiting for a GPU, and the error names the
term, the slot and the token.

Suffixes: N envs, B texts, T response tokens.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from tokenenv.errors import InvalidArgument, NotFinite
from tokenenv.types import EpisodeScores

BAD_REWARD = -3
"""The code of a slot whose last reward was not finite, among the codes of
`tokenenv.env.actions`."""
REFERENCE = "the reference's log-prob"
IMPOSSIBLE = (
    "; the reference gives this token the probability 0: rule such tokens out (ActionMask, "
    "TopKActions), or take kl_coef=0"
)


class FiniteCheck:
    """Looks at what each step paid: on the CPU at once, elsewhere with the next step's one copy to
    the host.

    -inf as the reference's log-prob is allowed where it is not paid: it may lack tokens that the
    policy has.
    """

    def __init__(self, device: torch.device) -> None:
        self.waits = device.type == "cpu"
        """Whether a step's numbers are known when it returns."""
        self.suspects: Tensor | None = None
        """(N,) bool, on a device that is not waited for: rows whose last reward was not finite."""
        self._last: tuple[dict[str, Tensor], Tensor, Tensor, Tensor]
        """What the last step paid (N,) by term, the reference's log-prob, the tokens, and the
        response tokens before them."""

    def look(
        self,
        terms: Mapping[str, Tensor],
        reward: Tensor,
        ref_logprob: Tensor,
        tokens: Tensor,
        step: Tensor,
    ) -> None:
        """Takes in what a step paid, (N,) each; on the CPU raises `NotFinite` at once."""
        self._last = {**terms}, ref_logprob, tokens, step
        if self.waits:
            paid, reference = reward.numpy(), ref_logprob.numpy()
            # A sum is finite only where every number is; the numbers are looked at where it is not.
            with np.errstate(invalid="ignore", over="ignore"):
                finite = np.isfinite(paid.sum()) and np.isfinite(reference.sum())
            if not finite:
                self._require_none(~np.isfinite(paid) | np.isnan(reference))
        else:
            # x - x is 0 for finite numbers alone.
            suspects = (reward - reward != 0) | (ref_logprob != ref_logprob)
            self.suspects = suspects if self.suspects is None else self.suspects | suspects

    def mark(self, codes: Tensor) -> Tensor:
        """Return the codes (N,) of the next step's actions, with `BAD_REWARD` where `suspects`."""
        assert self.suspects is not None
        return torch.where(self.suspects, BAD_REWARD, codes)

    def check(self, codes: np.ndarray) -> None:
        """Raise `NotFinite` for what `mark` has marked."""
        self._require_none(codes == BAD_REWARD)

    def clear(self) -> None:
        """Forget what was seen, since all texts begin anew."""
        self.suspects = None

    def _require_none(self, bad: np.ndarray) -> None:
        if not bad.any():
            return
        rows = np.flatnonzero(bad)
        row = int(rows[0])
        terms, ref_logprob, tokens, step = self._last
        values = {f"the reward term {name!r}": float(term[row]) for name, term in terms.items()}
        what, value = first_bad(values, float(ref_logprob[row]))
        where = f"env row {row}, at response token {int(step[row])} (id {int(tokens[row])})"
        raise NotFinite(
            f"{what} is {value} in {where}{hint(what, value)}. Call reset().", rows.tolist()
        )


def first_bad(values: Mapping[str, float], ref_logprob: float) -> tuple[str, float]:
    """Return the name and the value to tell: the reference where it is at fault, else the first of
    the values that is not finite, else their sum."""
    if math.isnan(ref_logprob):
        return REFERENCE, ref_logprob
    bad = [(name, value) for name, value in values.items() if not math.isfinite(value)]
    return bad[0] if bad else ("the reward", math.nan)


def hint(what: str, value: float) -> str:
    """Return what to do about a KL term of -inf, or nothing for any other value."""
    return IMPOSSIBLE if what == "the reward term 'kl'" and value == -math.inf else ""


def require_finite_scores(scores: EpisodeScores) -> None:
    """Raises `NotFinite` for the first reward of whole texts that is not finite, or log-prob of the
    reference that is none."""
    bad_BT = (
        ~np.isfinite(scores.token_rewards)
        | ~np.isfinite(scores.step_rewards)
        | np.isnan(scores.ref_logprobs)
    )
    texts = np.flatnonzero(bad_BT.any(1))
    if not len(texts):
        return
    text, token = int(texts[0]), int(bad_BT[texts[0]].argmax())
    values = {
        f"the reward term {name!r}": float(term[text, token])
        for name, term in scores.token_reward_terms.items()
    }
    what, value = first_bad(values, float(scores.ref_logprobs[text, token]))
    raise NotFinite(
        f"{what} is {value} in text {text}, at response token {token}{hint(what, value)}.",
        texts.tolist(),
    )


def require_finite_weight(name: str, weight: float, tokens_seen: int) -> None:
    """Raises `InvalidArgument` where a schedule, asked for the weight of a term, gave none."""
    if not math.isfinite(weight):
        raise InvalidArgument(
            f"the weight of {name!r} is {weight} at tokens_seen={tokens_seen}; a schedule must be "
            f"finite."
        )
