"""The protocol of a reward term: what it may look at, and how it is paid.

A causal or policy-dependent term maps K transitions to K rewards. The K transitions are those of
the N slots in one step, or all tokens of many finished texts. One formula serves both, so stepping
equals scoring by construction. A hindsight term places its sum on the tokens of a finished text.

`docs/contract.md` defines the words slot, row, paid, placed, scored, own, watched, potential and
hindsight.
"""

import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from tokenenv.errors import InvalidArgument, check_choice
from tokenenv.rewards.seen import FinishedTexts, States, Transitions
from tokenenv.tables import require_columns
from tokenenv.types import Scorer, Task, TextScorer, TokenSpec

Kind = Literal["causal", "hindsight", "policy"]
KINDS: tuple[str, ...] = typing.get_args(Kind)
Weight = float | Callable[[int], float]
"""A number, or a schedule over the tokens the env has seen; read when an episode begins."""
Learned = Tensor | np.ndarray | Mapping[str, Any]
"""What a term has learned: an array, or nested mappings of names to arrays."""


def trainable(model: Any) -> Any:
    """Return the model if it has weights that can be trained, else None."""
    has_weights = isinstance(model, nn.Module) and next(model.parameters(), None) is not None
    return model if has_weights else None


@dataclass(frozen=True, slots=True)
class Context:
    """What an env offers to its reward terms."""

    spec: TokenSpec
    task: Task
    device: torch.device
    kl_coef: float
    """beta that the env was made with, reward per nat."""
    max_batch_tokens: int = 16384
    """The largest forward a term should run, in tokens with padding."""
    watched: bool = False
    """Whether the term is given to `watch=`: its numbers are never paid, so any float will do."""

    @property
    def reference(self) -> Any:
        """pi_ref."""
        return self.task.reference

    @property
    def scorer(self) -> Scorer | TextScorer | None:
        """Where the sequence score comes from."""
        return self.task.scorer

    @property
    def causal_scorer(self) -> Scorer | None:
        """The scorer where it scores every prefix, else None."""
        return self.task.scorer if isinstance(self.task.scorer, Scorer) else None

    @property
    def trainable_model(self) -> Any:
        """What a language model that is trained begins from: the task's `implicit_model`, or else
        the reference, or else the policy's initial model; None where none has weights to train."""
        models = (self.task.implicit_model, self.reference, self.task.model)
        return next((model for model in models if trainable(model) is not None), None)

    @property
    def step_scorer(self) -> Scorer | None:
        """The scorer of a text's steps: the task's own step scorer, or else its causal scorer."""
        return self.task.step_scorer or self.causal_scorer

    def has(self, need: str) -> bool:
        """Return whether the env has `need`, one of `NEEDS`."""
        scorer = self.scorer
        return {
            "scorer": scorer is not None,
            "token scorer": scorer is not None and scorer.per_token,
            "causal scorer": self.causal_scorer is not None,
            "transformer scorer": self.causal_scorer is not None
            and not hasattr(self.causal_scorer.model, "slots"),
            "reference": self.reference is not None,
            "tokenizer": self.spec.tokenizer is not None,
            "implicit model": self.task.implicit_model is not None,
            "teacher": self.task.teacher is not None,
            "trainable model": self.trainable_model is not None,
            "step scorer": self.step_scorer is not None,
            "step ends": bool(self.task.step_end_token_ids),
            "oracle": self.task.oracle is not None,
            "turns": self.spec.responds,
        }[need]


NEEDS = {
    "scorer": "a reward model (reward_model=)",
    "token scorer": "a token-classification reward model (reward_model=)",
    "causal scorer": "a reward model that scores prefixes: causal, with the policy's own tokens",
    "transformer scorer": (
        "a causal transformers reward model with the policy's own tokens (reward_model=)"
    ),
    "reference": "a reference model",
    "tokenizer": "a tokenizer",
    "implicit model": "a preference-tuned language model (implicit_model=)",
    "teacher": "a teacher, which is a language model (teacher=)",
    "trainable model": "a language model with weights to train",
    "step scorer": (
        "a causal reward model with the policy's own tokens, which scores steps (reward_model=)"
    ),
    "step ends": "tokens that end a step (step_end_token_ids=)",
    "oracle": "a task whose optimum is known, such as tokenenv/DelayedKey-v0",
    "turns": "a task that answers the policy's turns (Task.respond)",
}
"""What a term may need of an env, and the words in which an error names it."""


class RewardTerm:
    """One named part of the reward. Subclasses set the class attributes and define `reward` or
    `place`."""

    name: str = ""
    kind: Kind = "causal"
    weight: Weight = 1.0
    needs: frozenset[str] = frozenset()
    """Of `NEEDS`: what the env must have."""
    columns: Sequence[str] = ()
    """Columns that the row of every prompt must have; the term reads them as `texts.columns`."""
    preserves_return: bool | None = None
    """Whether the rewards of a scored text add up to its score, up to a constant of the prompt.
    None: not stated."""
    preserves_gradient: bool | None = None
    """Whether reward-to-go (and GAE) on these rewards estimates the gradient of the expected score
    without bias. None: not stated."""
    models: Sequence[Any] = ()
    """Causal models whose states the term reads. Each is run once a step, however many terms read
    it."""
    pays_score: bool = False
    """True for a term that pays or redistributes the sequence score: nothing is paid at an unscored
    truncation."""
    has_potential: bool = False
    """True where the term is potential-based and defines `potential`."""
    has_memory: bool = False
    """True where the term carries a memory along each text and defines `remember`."""
    memory_shape: tuple[int, ...] = ()
    """The shape of one text's memory; () is one number. `bind` may set it, where it depends on a
    model."""
    memory_dtype: torch.dtype = torch.float32
    """The memory's dtype, one of `MEMORY_DTYPES`."""

    @property
    def model_version(self) -> int | None:
        """Updates that the term's own model has had; None for a term that trains none. At most one
        term of an env trains a model."""
        return None

    def bind(self, context: Context) -> None:
        """Check `needs` and `columns`, and take what the term wants from `context`. The env calls
        it once."""
        if hasattr(self, "withheld"):
            raise InvalidArgument(
                f"{type(self).__name__} sets withheld, which is called pays_score now."
            )
        for need in sorted(self.needs):
            check_choice(f"the term {self.name!r}: needs", need, NEEDS)
            if not context.has(need):
                raise InvalidArgument(
                    f"reward={self.name!r} needs {NEEDS[need]}, which this env does not have; "
                    "reward= also takes a rule or a term of your own."
                )
        require_columns(context.task.columns, self.columns, f"reward={self.name!r}", "prompts")

    def wrapped(self) -> Sequence["RewardTerm"]:
        """Return the terms that this one wraps, and those that they wrap. Their memory and their
        statistics stand under their own names, so each name must be an own one once bound."""
        return ()

    def reward(self, batch: Transitions) -> Tensor:
        """Return the rewards (K,) of K transitions, unweighted. Causal and policy-dependent terms
        define it."""
        raise TypeError(f"{type(self).__name__} defines neither reward() nor place()")

    def potential(self, states: States) -> Tensor:
        """Return Phi (K,) of K running texts, unweighted. Potential-based terms define it."""
        raise TypeError(f"{type(self).__name__} sets has_potential but does not define potential()")

    def remember(self, memory: Tensor | None, tokens: Tensor, states: States) -> Tensor:
        """Return the memory (K, *memory_shape) of K texts in `states`. Terms with memory define it.

        `tokens` (K,) are the tokens that led to `states`, and `memory` is the memory before them,
        or None where the texts begin (`tokens` are then the last ones of the prompts). A term reads
        its memory as `states.memory[self.name]`.
        """
        raise TypeError(f"{type(self).__name__} sets has_memory but does not define remember()")

    def statistics(self) -> Tensor | None:
        """Return numbers (p,) on the env's device that change with training, such as a running
        scale, or None. An episode keeps those that it began with: read them from the batch, never
        from `self`."""
        return None

    def save_statistics(self) -> Learned | None:
        """Return what `statistics` are computed from, float64, as a tensor on the env's device or
        as an array; None where there is nothing to save. A term that learns more returns nested
        mappings of arrays, whose shapes and dtypes stay the same.

        The env asks at every step, so that an interrupted step teaches nothing. It must therefore
        not wait for the device. The env copies an array. It does not copy what a mapping holds, so
        a term may not change it afterwards: it learns by making new arrays.
        """
        return None

    def load_statistics(self, saved: Any) -> None:
        """Go on from what `save_statistics` returned, with tensors or with arrays. They are the
        term's to keep."""
        raise TypeError(
            f"{type(self).__name__} has statistics but does not define load_statistics()"
        )

    def join(self, before: Any, parts: Sequence[Any]) -> None:
        """Go on from what the terms of several processes have learned that train one policy
        together (`tokenenv.ranks`), so that all of them go on from the same.

        `before` is what all of them had when they last joined, and `parts` what each has now, as
        `save_statistics` returned it, as arrays. Without parts, nothing of one process's own is
        gone on with. A term that has statistics defines it, or it cannot be used there.
        """
        raise TypeError(f"{type(self).__name__} has statistics but does not define join()")

    def update_model(self) -> None:
        """Take the update of the term's own model that is due, if one is. The env asks before it
        prices the texts that end in a step, or all texts of one call of `score_episodes` that count
        as played."""

    def policy_updated(self, updates: int) -> None:
        """Take in how many updates the policy has had, where a learner says so."""

    def place(self, texts: FinishedTexts, max_new_tokens: int) -> Tensor:
        """Return the rewards (B, T) of the tokens of B finished texts, unweighted. Hindsight terms
        define it; the sum of a text's rewards is paid at its end."""
        raise TypeError(f"{type(self).__name__} is a hindsight term and does not define place()")
