"""Finished episodes, one by one and as a padded batch.

Suffixes: B episodes, L tokens of the longest text, T response tokens of the longest response. A
text is a prompt and a response; the response is what the policy emitted, so a prefix given at reset
belongs to the prompt here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenenv.errors import NotFinite

LEARNED = ("value", "advantage")
PER_EPISODE = (
    "kl_coef",
    "terminated",
    "truncated",
    "score",
    "gold",
    "prompt_id",
    "slot",
    "index",
    "version",
    "bootstraps",
)


def token_mask(lengths_B: Tensor, width: int) -> Tensor:
    """(B, width) bool: True on the first `lengths_B` columns of each row."""
    return torch.arange(width, device=lengths_B.device) < lengths_B[:, None]


@dataclass(frozen=True, slots=True)
class Episode:
    """One finished text with all that was seen of it. T here is its own number of response
    tokens."""

    prompt: np.ndarray
    """(P,) int64: everything before the first emitted token."""
    response: np.ndarray
    """(T,) int64: the emitted tokens, the stop token included."""
    logprob: np.ndarray
    """(T,) float32: log pi of each token when it was sampled."""
    ref_logprob: np.ndarray
    """(T,) float32: log pi_ref of each token; zeros where the env gives none."""
    reward: np.ndarray
    """(T,) float32: what the env pays for each token, hindsight terms placed where they belong."""
    kl_coef: float
    """The env's beta during this episode; 0 where it pays no KL term."""
    terminated: bool
    """Ended by a stop token (or by the task)."""
    truncated: bool
    """Cut at the length limit."""
    score: float
    """The env's unweighted sequence score; NaN where it has none."""
    gold: float
    """The task's true metric; NaN where it has none."""
    prompt_id: int
    """The env's number for the prompt; -1 where it has none."""
    slot: int
    """The row of the vector env it ran in."""
    potential: np.ndarray
    """(T + 1,) float32: the env's Phi before each response token and of the last state; zeros where
    it has none."""
    index: int
    """How many episodes that row had finished before."""
    version: int = 0
    """How many updates the policy had had when the first token was drawn: the later ones may have
    had more."""
    bootstraps: bool = False
    """Whether the value of the last state counts: the text was cut, and nothing was paid for it as
    a whole."""
    terms: dict[str, np.ndarray] = field(default_factory=dict)
    """(T,) float32 of each reward term, weighted and placed: they add up to `reward`. Empty where
    the env names none."""
    value: np.ndarray | None = None
    """(T,) float32: the critic's value before each token, in reward; None before learning, or
    without a critic."""
    advantage: np.ndarray | None = None
    """(T,) float32: the weight that the learner gave to each token; None before learning."""
    action_mask: np.ndarray | None = None
    """(T, M) uint8: the tokens that were allowed, eight to a byte (`masks.pack`); None where all
    were."""

    @property
    def kl(self) -> float:
        """log pi - log pi_ref summed over the text: the one-sample estimate of its KL, in nats."""
        return (
            float((self.logprob - self.ref_logprob).sum())
            if self.ref_logprob.any()
            else float("nan")
        )


@dataclass(frozen=True, slots=True)
class EpisodeBatch:
    """B episodes as right-padded tensors on the CPU; response tokens start at column 0 of the (B,
    T) ones."""

    tokens_BL: Tensor
    """int64 whole texts."""
    length_B: Tensor
    """int64: tokens of each text."""
    response_length_B: Tensor
    """int64: tokens of each response, at least 1."""
    logprob_BT: Tensor
    ref_logprob_BT: Tensor
    reward_BT: Tensor
    potential_BT1: Tensor
    """Phi before each token, then of the last state."""
    kl_coef_B: Tensor
    terminated_B: Tensor
    truncated_B: Tensor
    score_B: Tensor
    gold_B: Tensor
    prompt_id_B: Tensor
    slot_B: Tensor
    index_B: Tensor
    version_B: Tensor
    bootstraps_B: Tensor
    terms: dict[str, Tensor]
    """(B, T) of each reward term by name; they add up to `reward_BT`. Empty where the env names
    none."""
    action_mask_BTM: Tensor | None = None
    """uint8: the allowed tokens, eight to a byte; None where all were."""
    learned: dict[str, Tensor] = field(default_factory=dict)
    """(B, T) of what a learner makes of each token; "advantage" and "value" go into the
    episodes."""

    @property
    def mask_BT(self) -> Tensor:
        """bool: where there is a response token."""
        return token_mask(self.response_length_B, self.reward_BT.shape[1])

    def __len__(self) -> int:
        return len(self.length_B)

    @classmethod
    def stack(cls, episodes: Sequence[Episode]) -> "EpisodeBatch":
        """Pads and stacks at least one episode."""
        texts = [np.concatenate([e.prompt, e.response]) for e in episodes]
        masks = [e.action_mask for e in episodes if e.action_mask is not None]
        ends: dict[str, Any] = {
            f"{name}_B": torch.tensor([getattr(e, name) for e in episodes]) for name in PER_EPISODE
        }
        return cls(
            tokens_BL=_pad(texts),
            length_B=torch.tensor([len(text) for text in texts]),
            response_length_B=torch.tensor([len(e.response) for e in episodes]),
            logprob_BT=_pad([e.logprob for e in episodes]),
            ref_logprob_BT=_pad([e.ref_logprob for e in episodes]),
            reward_BT=_pad([e.reward for e in episodes]),
            potential_BT1=_pad([e.potential for e in episodes]),
            terms={name: _pad([e.terms[name] for e in episodes]) for name in episodes[0].terms},
            action_mask_BTM=_pad(masks) if masks else None,
            **ends,
        )

    def unstack(self) -> list[Episode]:
        """The episodes that `stack` was given, with what has been learned of them."""
        return [self._episode(row) for row in range(len(self))]

    def _episode(self, row: int) -> Episode:
        end, length = int(self.length_B[row]), int(self.response_length_B[row])

        def tokens(values_BT: Tensor, extra: int = 0) -> np.ndarray:
            return values_BT[row, : length + extra].numpy()

        text = self.tokens_BL[row, :end].numpy()
        ends: dict[str, Any] = {
            name: getattr(self, f"{name}_B")[row].item() for name in PER_EPISODE
        }
        learned: dict[str, Any] = {
            name: tokens(self.learned[name]) for name in LEARNED if name in self.learned
        }
        return Episode(
            prompt=text[: end - length],
            response=text[end - length :],
            logprob=tokens(self.logprob_BT),
            ref_logprob=tokens(self.ref_logprob_BT),
            reward=tokens(self.reward_BT),
            potential=tokens(self.potential_BT1, 1),
            terms={name: tokens(values) for name, values in self.terms.items()},
            action_mask=None if self.action_mask_BTM is None else tokens(self.action_mask_BTM),
            **ends,
            **learned,
        )


def _pad(rows: Sequence[np.ndarray]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True)


def check_finite(episodes: Sequence[Episode], update: int) -> None:
    """Raises `NotFinite`, naming the first reward or log-prob that is not finite; its `rows` are
    places in `episodes`.

    The reference's log-prob may be -inf where it is not paid: it may lack tokens that the policy
    has.
    """
    bad = [row for row, episode in enumerate(episodes) if not _finite(episode)]
    if not bad:
        return
    episode = episodes[bad[0]]
    columns = {f"the reward term {name!r}": values for name, values in episode.terms.items()}
    columns |= {
        "the reward": episode.reward,
        "log pi": episode.logprob,
        "the reference's log-prob": episode.ref_logprob,
    }
    name, values = next(
        (name, values) for name, values in columns.items() if not np.isfinite(values).all()
    )
    token = int(np.isfinite(values).argmin())
    raise NotFinite(
        f"{name} is {values[token]} at token {token} of text {episode.index} of slot "
        f"{episode.slot}, in the batch of update "
        f"{update}; nothing has been learnt from that batch, and it is dropped.",
        bad,
        [episodes[row] for row in bad],
    )


def _finite(episode: Episode) -> bool:
    known = [episode.reward, episode.logprob, *episode.terms.values()]
    return (
        all(np.isfinite(values).all() for values in known)
        and not np.isnan(episode.ref_logprob).any()
    )


def mean_of(values: Sequence[float]) -> float:
    """The mean of the values that are numbers; NaN where none is."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def summary(episodes: Sequence[Episode]) -> dict[str, float]:
    """The field's scalars about what was generated: means per text, KL in nats, length in
    tokens."""
    return {
        "objective/score": mean_of([e.score for e in episodes]),
        "objective/gold": mean_of([e.gold for e in episodes]),
        "objective/kl": mean_of([e.kl for e in episodes]),
        "objective/reward": mean_of([float(e.reward.sum()) for e in episodes]),
        "episode/length": mean_of([len(e.response) for e in episodes]),
        "episode/terminated": mean_of([float(e.terminated) for e in episodes]),
    }
