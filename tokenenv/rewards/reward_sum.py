"""The terms of an env together: weighted and added, what they return checked.

Shapes: K transitions, B finished texts, T response tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenenv.errors import InvalidArgument
from tokenenv.rewards.rule import Rule
from tokenenv.rewards.seen import FinishedTexts, States, Transitions
from tokenenv.rewards.term import RewardTerm, Weight

RESERVED = {"kl": "kl= and kl_coef=", "missing_eos": "missing_eos_penalty="}
"""Names of terms that the env adds itself, and the options that do so."""
MEMORY_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.complex64,
)
"""What a memory may hold: the dtypes that NumPy, safetensors and torch's indexing all have, so that
it can be saved and forked."""


def check_rewards(name: str, method: str, rewards: Any, shape: torch.Size) -> Tensor:
    """Return what a term's method returned, if it is a tensor of the declared shape.

    Raises:
        InvalidArgument: it is not; names the term, what it returned and what is asked for.
    """
    if isinstance(rewards, Tensor) and rewards.shape == shape:
        return rewards
    given = f"shape {tuple(rewards.shape)}" if isinstance(rewards, Tensor) else repr(rewards)[:80]
    raise InvalidArgument(
        f"{method}() of the term {name!r} returned {given}; it must return a tensor of shape "
        f"{tuple(shape)}."
    )


def check_memory(term: RewardTerm, device: torch.device) -> None:
    """Raise `InvalidArgument` unless a memory as the term declares it can be kept and saved."""
    shape, dtype = term.memory_shape, term.memory_dtype
    if not isinstance(shape, tuple) or not all(isinstance(n, int) and n > 0 for n in shape):
        raise InvalidArgument(
            f"the term {term.name!r} has memory_shape={shape!r}; allowed: a tuple of whole "
            "numbers, 1 or more, such as () or (3,)."
        )
    if dtype not in MEMORY_DTYPES or (device.type == "mps" and dtype == torch.float64):
        allowed = ", ".join(str(one) for one in MEMORY_DTYPES)
        raise InvalidArgument(
            f"the term {term.name!r} has memory_dtype={dtype!r}, which cannot be kept on "
            f"{device.type!r} and saved; allowed: {allowed}."
        )


def read_memory(term: RewardTerm, memory: Tensor, tokens: Tensor) -> Tensor:
    """Return a copy of what `remember` gave for the texts of `tokens` (K,), if it is on their
    device and its shape and dtype are as the term declares them.

    One floating-point dtype is converted to another, since a score is in float64 where its sum
    would drift in float32. It is a copy, because a term may well return the scores or its old
    memory themselves, and the env writes into what it keeps.
    """
    shape, dtype = (len(tokens), *term.memory_shape), term.memory_dtype
    given = "no tensor"
    if isinstance(memory, Tensor):
        both_float = memory.is_floating_point() and dtype.is_floating_point
        if memory.device != tokens.device:
            raise InvalidArgument(
                f"remember() of the term {term.name!r} returned a tensor on '{memory.device}'; the "
                f"env's tensors are on '{tokens.device}': make new ones with device=tokens.device."
            )
        if memory.shape == shape and (memory.dtype == dtype or both_float):
            return memory.to(dtype, copy=True)
        given = f"shape {tuple(memory.shape)} and {memory.dtype}"
    raise InvalidArgument(
        f"remember() of the term {term.name!r} returned {given}; its memory_shape and memory_dtype "
        f"declare shape {shape} and {dtype}."
    )


@dataclass(slots=True)
class RewardSum:
    """The terms of an env: those that are weighted and added up, and those that are watched."""

    terms: dict[str, RewardTerm]
    """The terms of the reward, by name."""
    max_new_tokens: int
    watched: dict[str, RewardTerm] = field(default_factory=dict)
    """Terms whose numbers are recorded, unweighted, and never paid."""
    every: dict[str, RewardTerm] = field(init=False)
    """All of these and the terms that they wrap, by name: whatever has a memory or learns."""
    causal: list[str] = field(init=False)
    """Names of the causal and policy-dependent terms: the reward's, then watched ones."""
    hindsight: list[str] = field(init=False)
    """Names of the hindsight terms: the reward's, then watched ones."""
    shaped: list[str] = field(init=False)
    """Names of the reward's potential-based terms."""
    with_memory: dict[str, RewardTerm] = field(init=False)
    """The terms that carry a memory along each text, wrapped ones included."""
    columns: frozenset[str] = field(init=False)
    """The columns that any of the terms must find in the row of every prompt."""

    def __post_init__(self) -> None:
        both = self.terms | self.watched
        self.every = _with_wrapped(both)
        self.hindsight = [name for name, term in both.items() if term.kind == "hindsight"]
        self.causal = [name for name in both if name not in self.hindsight]
        self.shaped = [name for name, term in self.terms.items() if term.has_potential]
        self.with_memory = {name: term for name, term in self.every.items() if term.has_memory}
        self.columns = frozenset(name for term in self.every.values() for name in term.columns)
        online = [name for name, term in self.every.items() if term.model_version is not None]
        if len(online) > 1:
            raise InvalidArgument(
                f"reward= has {len(online)} terms that train a model ({', '.join(online)}); "
                "allowed: one, whose version is in infos['reward_version']."
            )

    @property
    def score_rule(self) -> Rule | None:
        """The rule whose number of a text is its sequence score where the task has no scorer: the
        only term beside kl and missing_eos, or what that term wraps. None where there are more
        terms, or another one."""
        asked_for = [term for name, term in self.terms.items() if name not in RESERVED]
        if len(asked_for) != 1:
            return None
        innermost = (asked_for[0], *asked_for[0].wrapped())[-1]
        return innermost if isinstance(innermost, Rule) else None

    @property
    def names(self) -> list[str]:
        """The S names of all terms, causal ones first: the order of `RewardEngine.token_terms`."""
        return [*self.causal, *self.hindsight]

    def paid(
        self,
        batch: Transitions,
        weights: Mapping[str, Tensor],
        nonzero: frozenset[str] = frozenset(),
    ) -> dict[str, Tensor]:
        """Return the numbers (K,) float32 of the causal and policy-dependent terms; `weights` (K,)
        are those of the reward's terms, `nonzero` the terms whose weights are known to be nowhere
        0, and a watched term's number is not weighted."""
        found = {}
        for name in self.causal:
            rewards = check_rewards(
                name, "reward", _reward(name, self.every[name], batch), batch.tokens.shape
            )
            unweighted = name in self.watched
            found[name] = (
                rewards.float() if unweighted else weighted(weights[name], rewards, name in nonzero)
            )
        return found

    def placed(self, texts: FinishedTexts, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the numbers (B, T) float32 of the hindsight terms; `weights` (B,) as in `paid`."""
        found = {}
        for name in self.hindsight:
            term = self.every[name]
            mask = texts.earning_mask(term, self.max_new_tokens)
            placed = term.place(texts, self.max_new_tokens)
            values = torch.where(mask, check_rewards(name, "place", placed, mask.shape), 0.0)
            unweighted = name in self.watched
            found[name] = values.float() if unweighted else weighted(weights[name][:, None], values)
        return found

    def statistics(self) -> dict[str, Tensor]:
        """Return the present statistics (p,) of the terms that have any, wrapped ones included."""
        every = ((name, term.statistics()) for name, term in self.every.items())
        return {name: statistics for name, statistics in every if statistics is not None}

    @property
    def model_version(self) -> int | None:
        """Updates that the model has had which a term trains; None where no term does."""
        versions = (term.model_version for term in self.every.values())
        return next((version for version in versions if version is not None), None)

    def update_models(self) -> None:
        """Take the updates that are due of models that terms train."""
        for term in self.every.values():
            term.update_model()

    def potential(
        self,
        states: States,
        weights: Mapping[str, Tensor],
        nonzero: frozenset[str] = frozenset(),
    ) -> Tensor | None:
        """Return the weighted sum (K,) of the potentials, or None where no term has one; `nonzero`
        as in `paid`."""
        parts = [
            weighted(weights[name], self.terms[name].potential(states), name in nonzero)
            for name in self.shaped
        ]
        return torch.stack(parts).sum(0) if parts else None


def _reward(name: str, term: RewardTerm, batch: Transitions) -> Tensor:
    """What `term` pays for a batch; raises where it reads a memory that it has not said it has."""
    try:
        return term.reward(batch)
    except KeyError as error:
        defined = type(term).remember is not RewardTerm.remember
        if error.args == (term.name,) and defined and not term.has_memory:
            raise InvalidArgument(
                f"the term {name!r} defines remember() and has_memory is False, so it has no "
                "memory; set has_memory = True."
            ) from error
        raise


def _with_wrapped(terms: Mapping[str, RewardTerm]) -> dict[str, RewardTerm]:
    """The terms and all that they wrap, by name; raises where two of them have one name."""
    every = dict(terms)
    for term in terms.values():
        for inner in term.wrapped():
            if inner.name in every:
                raise InvalidArgument(
                    f"reward= has a term called {inner.name!r}, which is the name of a wrapped "
                    "term; give one of them another name."
                )
            every[inner.name] = inner
    return every


def weighted(weight: Tensor, rewards: Tensor, nonzero: bool = False) -> Tensor:
    """Return their product, float32. A weight of 0 gives 0, also where the reward is -inf (a token
    that the reference lacks); where the weights are known to be `nonzero` nothing is looked for."""
    if nonzero:
        return (weight * rewards).float()
    return torch.where(weight == 0, 0.0, weight * rewards).float()


def weight_now(weight: Weight, tokens_seen: int) -> float:
    """Return a weight's present value; a schedule is asked with the tokens that the env has
    seen."""
    return float(weight(tokens_seen) if callable(weight) else weight)
