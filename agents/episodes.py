"""Finished episodes, one by one and as a padded batch.

Suffixes: B episodes, L tokens of the longest text, T response tokens of the longest response.

A text is a prompt and what follows it. The response holds the tokens that the policy emitted, and
every column over T has one entry for each of them. A prefix given at reset was not emitted, so it
belongs to the prompt here. Where the environment writes into texts (`Task.respond`), what it wrote
after the first emitted token is kept beside the response, with the places of both.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenenv.errors import NotFinite
from tokenenv.tables import Columns
from tokenenv.turns import Segment, segments_of, turn_numbers

# The fields of an `Episode` by what they have a number for. `stack` and `unstack` go through these
# lists, and so does everything that keeps episodes (checkpoints, replay, groups that wait): a field
# that is added here, and declared in `Episode` and `EpisodeBatch`, is carried everywhere.
PER_TOKEN = ("logprob", "ref_logprob", "reward", "drawn_value")
"""One number for each response token: `name` (T,) of an episode is `name_BT` of a batch."""
PER_TOKEN_BY_NAME = ("terms", "watched")
"""Mappings of names to one number for each response token; they are called the same in a batch."""
LEARNED = ("value", "advantage")
"""One number for each response token that a learner adds: `batch.learned[name]`."""
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
    "reward_version",
)
"""One number for each episode: `name` of an episode is `name_B` of a batch."""
REFERENCE = "the reference's log-prob"


def token_mask(lengths_B: Tensor, width: int) -> Tensor:
    """Return (B, width) bool: True on the first `lengths_B` columns of each row."""
    return torch.arange(width, device=lengths_B.device) < lengths_B[:, None]


@dataclass(frozen=True, slots=True)
class Episode:
    """One finished text with all that was seen of it.

    T is its own number of response tokens here.
    """

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
    """The slot of the vector env that it ran in."""
    potential: np.ndarray
    """(T + 1,) float32: the env's Phi before each response token and of the last state; zeros where
    it has none."""
    index: int
    """How many episodes that slot had finished before."""
    version: int = 0
    """How many updates the policy had had when the first token was drawn. Later tokens may be drawn
    from a later policy."""
    bootstraps: bool = False
    """Whether the value of the last state counts: the text was cut, and nothing was paid for it as
    a whole."""
    reward_version: int = -1
    """How many updates the reward model had had that priced it, where the env trains one; else
    -1."""
    terms: dict[str, np.ndarray] = field(default_factory=dict)
    """(T,) float32 of each reward term, weighted and placed: they add up to `reward`. Empty where
    the env names none."""
    watched: dict[str, np.ndarray] = field(default_factory=dict)
    """(T,) float32 of each number that the env watches (`watch=`): recorded, unweighted, and never
    part of `reward`. NaN where a number is not known."""
    value: np.ndarray | None = None
    """(T,) float32: the critic's value before each token, in reward; None before learning, or
    without a critic."""
    drawn_value: np.ndarray = None  # type: ignore[assignment]
    """(T,) float32: the critic's own number for the state before each token, when that was drawn;
    NaN, which is the default, where it was not read then."""
    advantage: np.ndarray | None = None
    """(T,) float32: the weight that the learner gave to each token; None before learning."""
    columns: Columns = field(default_factory=dict)
    """What belongs to the prompt, an answer say: the other columns of its row, by name."""
    action_mask: np.ndarray | None = None
    """(T, M) uint8: the tokens that were allowed, eight to a byte (`masks.pack`); None where all
    were."""
    position: np.ndarray | None = None
    """(T,) int64: the place of each response token in `text`; None where they follow the prompt,
    one after the other."""
    written: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """(W,) int64: the tokens that the environment wrote after the first response token, in
    order."""

    def __post_init__(self) -> None:
        if self.drawn_value is None:
            unknown = np.full(len(self.response), np.nan, np.float32)
            object.__setattr__(self, "drawn_value", unknown)

    @property
    def places(self) -> np.ndarray:
        """(T,) int64: the place of each response token in `text`."""
        if self.position is not None:
            return self.position
        return len(self.prompt) + np.arange(len(self.response))

    @property
    def own(self) -> np.ndarray:
        """(T + W,) bool: which of the tokens behind the prompt are the policy's."""
        own = np.zeros(len(self.response) + len(self.written), bool)
        own[self.places - len(self.prompt)] = True
        return own

    @property
    def after_prompt(self) -> np.ndarray:
        """(T + W,) int64: the tokens behind the prompt, whoever wrote them."""
        tokens, own = np.zeros(len(self.own), np.int64), self.own
        tokens[own], tokens[~own] = self.response, self.written
        return tokens

    @property
    def text(self) -> np.ndarray:
        """(P + T + W,) int64: the whole text."""
        return np.concatenate([self.prompt, self.after_prompt])

    @property
    def segments(self) -> list[Segment]:
        """What is behind the prompt: the policy's turns, and what the environment wrote between
        them."""
        return segments_of(self.after_prompt, self.own)

    @property
    def turns(self) -> int:
        """How many turns of the policy's there are."""
        return int(turn_numbers(self.places)[-1]) + 1

    @property
    def token_kl(self) -> np.ndarray | None:
        """log pi - log pi_ref of each token (T,), in nats; None where the env has no log pi_ref."""
        return self.logprob - self.ref_logprob if self.ref_logprob.any() else None

    @property
    def kl(self) -> float:
        """log pi - log pi_ref summed over the text: the one-sample estimate of its KL, in nats.

        NaN where the env gives no log pi_ref.
        """
        return float("nan") if self.token_kl is None else float(self.token_kl.sum())


@dataclass(frozen=True, slots=True)
class EpisodeBatch:
    """B episodes as right-padded tensors on the CPU.

    In the (B, T) tensors the first response token of each text is in column 0.
    """

    tokens_BL: Tensor
    """int64 whole texts."""
    length_B: Tensor
    """int64: tokens of each text, whoever wrote them."""
    response_length_B: Tensor
    """int64: tokens of each response, at least 1: those that the policy emitted."""
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
    watched: dict[str, Tensor] = field(default_factory=dict)
    """(B, T) of each watched number by name, which no reward holds."""
    columns: Sequence[Columns] = ()
    """What belongs to the prompt of each of the B texts, by name; empty where nothing is known."""
    action_mask_BTM: Tensor | None = None
    """uint8: the allowed tokens, eight to a byte; None where all were."""
    learned: dict[str, Tensor] = field(default_factory=dict)
    """(B, T) of what a learner makes of each token; "advantage" and "value" go into the
    episodes."""
    position_BT1: Tensor = None  # type: ignore[assignment]
    """int64: the place of each response token in its text, then the text's length; 0 to the right.
    The state that a token is chosen in, and the last state, are at the place before. By default
    responses follow their prompts, one token after the other."""

    reward_version_B: Tensor = None  # type: ignore[assignment]
    """int64; by default -1."""
    drawn_value_BT: Tensor = None  # type: ignore[assignment]
    """The critic's values when tokens were drawn; NaN, which is the default, where not known."""

    def __post_init__(self) -> None:
        if self.drawn_value_BT is None:
            object.__setattr__(self, "drawn_value_BT", torch.full_like(self.reward_BT, torch.nan))
        if self.reward_version_B is None:
            object.__setattr__(self, "reward_version_B", torch.full_like(self.length_B, -1))
        if self.position_BT1 is None:
            lengths_B, width = self.response_length_B, self.reward_BT.shape[1] + 1
            place_BT1 = (self.length_B - lengths_B)[:, None] + torch.arange(width)
            place_BT1 = place_BT1.masked_fill(~token_mask(lengths_B + 1, width), 0)
            object.__setattr__(self, "position_BT1", place_BT1)

    @property
    def mask_BT(self) -> Tensor:
        """bool: where there is a response token."""
        return token_mask(self.response_length_B, self.reward_BT.shape[1])

    def __len__(self) -> int:
        return len(self.length_B)

    @classmethod
    def stack(cls, episodes: Sequence[Episode]) -> "EpisodeBatch":
        """Pad and stack at least one episode."""
        texts = [e.text for e in episodes]
        masks = [e.action_mask for e in episodes if e.action_mask is not None]
        numbers: dict[str, Any] = {
            f"{name}_BT": _pad([getattr(e, name) for e in episodes]) for name in PER_TOKEN
        }
        numbers |= {name: _stack_by_name(episodes, name) for name in PER_TOKEN_BY_NAME}
        numbers |= {
            f"{name}_B": torch.tensor([getattr(e, name) for e in episodes]) for name in PER_EPISODE
        }
        return cls(
            tokens_BL=_pad(texts),
            length_B=torch.tensor([len(text) for text in texts]),
            response_length_B=torch.tensor([len(e.response) for e in episodes]),
            position_BT1=_pad([np.append(e.places, len(e.text)) for e in episodes]),
            potential_BT1=_pad([e.potential for e in episodes]),
            columns=[dict(e.columns) for e in episodes],
            action_mask_BTM=_pad(masks) if masks else None,
            **numbers,
        )

    def unstack(self) -> list[Episode]:
        """Return the episodes that `stack` was given, with what has been learned of them."""
        return [self._episode(row) for row in range(len(self))]

    def _episode(self, row: int) -> Episode:
        end, length = int(self.length_B[row]), int(self.response_length_B[row])

        def tokens(values_BT: Tensor, extra: int = 0) -> np.ndarray:
            return values_BT[row, : length + extra].numpy()

        text, places = self.tokens_BL[row, :end].numpy(), tokens(self.position_BT1)
        numbers: dict[str, Any] = {name: tokens(getattr(self, f"{name}_BT")) for name in PER_TOKEN}
        for name in PER_TOKEN_BY_NAME:
            numbers[name] = {key: tokens(values) for key, values in getattr(self, name).items()}
        numbers |= {name: tokens(self.learned[name]) for name in LEARNED if name in self.learned}
        numbers |= {name: getattr(self, f"{name}_B")[row].item() for name in PER_EPISODE}
        return Episode(
            prompt=text[: places[0]],
            **told_apart(text, places),
            potential=tokens(self.potential_BT1, 1),
            columns=self.columns[row] if self.columns else {},
            action_mask=None if self.action_mask_BTM is None else tokens(self.action_mask_BTM),
            **numbers,
        )


def told_apart(text: np.ndarray, places: np.ndarray) -> dict[str, Any]:
    """Return the fields of an `Episode` that say who wrote what is behind its prompt, from the
    whole text and the places (T,) of the policy's tokens in it. Where nobody else wrote, that is
    the response alone."""
    if len(text) - places[0] == len(places):
        return {"response": text[places[0] :]}
    own = np.zeros(len(text), bool)
    own[: places[0]], own[places] = True, True
    return {"response": text[places], "position": places, "written": text[~own]}


def _pad(rows: Sequence[np.ndarray]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True)


def _stack_by_name(episodes: Sequence[Episode], field_name: str) -> dict[str, Tensor]:
    """Return the padded mapping of a field in `PER_TOKEN_BY_NAME`.

    Episodes of a replay may come from a run that watched other numbers. The names of all of them
    are kept, and a number that an episode does not have is NaN.
    """
    columns: list[Mapping[str, np.ndarray]] = [getattr(e, field_name) for e in episodes]
    unknown = [np.full(len(e.response), np.nan, np.float32) for e in episodes]
    return {
        name: _pad([own.get(name, nan) for own, nan in zip(columns, unknown, strict=True)])
        for name in dict.fromkeys(name for own in columns for name in own)
    }


# ---------------------------------------------------------------- for readers


class TokenColumn(NamedTuple):
    """What a reader of a run sees of each token: on disk, on the page of `tokenenv show`."""

    label: str
    """What it is called on the page."""
    of: Callable[[Episode], np.ndarray | Mapping[str, np.ndarray] | None]
    """Its numbers (T,), or a mapping of names to such numbers; None where an episode has none."""
    unit: str
    """The unit of its numbers; empty where they have none."""
    what: str
    """What a number says, in a few words for the page."""
    summed: bool = False
    """Whether the sum over a text says something."""
    named: bool = False
    """Whether it is a mapping."""


TOKEN_COLUMNS = {
    "token_terms": TokenColumn(
        "term", lambda e: e.terms, "reward", "paid for the token by this term", True, True
    ),
    "token_rewards": TokenColumn(
        "reward", lambda e: e.reward, "reward", "all that the env paid for the token", True
    ),
    "token_kl": TokenColumn(
        "KL",
        lambda e: e.token_kl,
        "nats",
        "log pi - log pi_ref of the token",
        True,
    ),
    "token_advantages": TokenColumn(
        "advantage", lambda e: e.advantage, "", "above 0 the token was made more likely"
    ),
    "token_values": TokenColumn(
        "value", lambda e: e.value, "reward", "what the critic expected before it"
    ),
    "token_watched": TokenColumn(
        "watch", lambda e: e.watched, "", "recorded and never paid", named=True
    ),
}
"""The columns of a line of `episodes.jsonl` that hold one entry for each response token."""


# ---------------------------------------------------------------- checks and means


def check_finite(episodes: Sequence[Episode], update: int) -> None:
    """Raise `NotFinite`, naming the first reward or log-prob that is not finite.

    The error's `rows` are places in `episodes`. The reference's log-prob may be -inf where it is
    not paid, because the reference may lack tokens that the policy has. Watched numbers are not
    checked: nothing is learnt from them.
    """
    bad = [row for row, episode in enumerate(episodes) if not all(_finite(episode).values())]
    if not bad:
        return
    episode = episodes[bad[0]]
    name = next(name for name, finite in _finite(episode).items() if not finite)
    values = _learnt_from(episode)[name]
    token = int(_fine(name, values).argmin())
    raise NotFinite(
        f"{name} is {values[token]} at token {token} of text {episode.index} of slot "
        f"{episode.slot}, in the batch of update {update}; nothing has been learnt from that "
        f"batch, and it is dropped.",
        bad,
        [episodes[row] for row in bad],
    )


def _learnt_from(episode: Episode) -> dict[str, np.ndarray]:
    """Return all numbers per token that a learner reads, by their names in an error."""
    return {f"the reward term {name!r}": values for name, values in episode.terms.items()} | {
        "the reward": episode.reward,
        "log pi": episode.logprob,
        REFERENCE: episode.ref_logprob,
    }


def _finite(episode: Episode) -> dict[str, bool]:
    return {name: bool(_fine(name, row).all()) for name, row in _learnt_from(episode).items()}


def _fine(name: str, values: np.ndarray) -> np.ndarray:
    return ~np.isnan(values) if name == REFERENCE else np.isfinite(values)


def mean_of(values: Sequence[float] | np.ndarray) -> float:
    """Return the mean of the values that are numbers; NaN where none is."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def finite_tokens(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Return the finite ones (K,) of the numbers of all tokens of some texts."""
    values_K = np.concatenate(rows)
    return values_K[np.isfinite(values_K)]


def summary(episodes: Sequence[Episode]) -> dict[str, float]:
    """Return the field's scalars about what was generated.

    They are means per text, the KL in nats and the length in tokens. `reward/<name>` is the mean of
    what a term of the reward paid to a text, weighted; `objective/reward` is the sum of them, and
    `objective/reward_without_kl` the sum of all but `reward/kl`. `watch/<name>` is a mean per
    response token, over the tokens where the watched number is finite.
    """
    watched = {name: watched_tokens(episodes, name) for name in watched_names(episodes)}
    return {
        "objective/score": mean_of([e.score for e in episodes]),
        "objective/gold": mean_of([e.gold for e in episodes]),
        "objective/kl": mean_of([e.kl for e in episodes]),
        "objective/reward": mean_of([float(e.reward.sum()) for e in episodes]),
        "objective/reward_without_kl": mean_of([reward_without_kl(e) for e in episodes]),
        "episode/length": mean_of([len(e.response) for e in episodes]),
        "episode/terminated": mean_of([float(e.terminated) for e in episodes]),
        **{f"reward/{name}": mean_of(term_sums(episodes, name)) for name in term_names(episodes)},
        **{f"watch/{name}": mean_of(values_K) for name, values_K in watched.items()},
    }


def turn_summary(episodes: Sequence[Episode]) -> dict[str, float]:
    """Return the scalars of texts that an environment writes into: means per text of the policy's
    turns, and of the tokens that the environment wrote."""
    return {
        "episode/turns": mean_of([e.turns for e in episodes]),
        "episode/written": mean_of([len(e.written) for e in episodes]),
    }


def reward_without_kl(episode: Episode) -> float:
    """Return what all terms of the reward but the KL paid to a text; NaN where the env names no
    terms."""
    paid = [float(values.sum()) for name, values in episode.terms.items() if name != "kl"]
    return sum(paid) if episode.terms else float("nan")


def term_names(episodes: Sequence[Episode]) -> list[str]:
    """Return the names of all reward terms that some of the episodes have."""
    return list(dict.fromkeys(name for e in episodes for name in e.terms))


def term_sums(episodes: Sequence[Episode], name: str) -> list[float]:
    """Return what a reward term paid to each of the texts that have it, weighted."""
    return [float(e.terms[name].sum()) for e in episodes if name in e.terms]


def watched_names(episodes: Sequence[Episode]) -> list[str]:
    """Return the names of all numbers that some of the episodes watch."""
    return list(dict.fromkeys(name for e in episodes for name in e.watched))


def watched_tokens(episodes: Sequence[Episode], name: str) -> np.ndarray:
    """Return a watched number at all tokens (K,) where it is finite."""
    return finite_tokens([e.watched[name] for e in episodes if name in e.watched])
