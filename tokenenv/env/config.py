"""The options that every env takes, whatever its task."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from tokenenv.errors import InvalidArgument, check_choice, check_number
from tokenenv.models.loading import DTYPES
from tokenenv.types import KL_ESTIMATORS


@dataclass(kw_only=True, slots=True)
class EnvConfig:
    """Options of `TokenVectorEnv` and `TokenEnv`; a task adds its own."""

    reward: Any = None
    """A design's name, a `RewardTerm`, or a mapping of names to terms or (term, weight) pairs; None
    is the task's own."""
    reward_model: Any = None
    """A reward model that scores the texts in place of the task's own: a folder, a hub id, a model
    of transformers, a `Scorer` or a `TextScorer`, or the URL of a vLLM server. What `tokenenv fit`
    writes is one. The gold metric and the oracle stay the task's."""
    implicit_model: Any = None
    """The preference-tuned language model of `reward="implicit"`, given as `reward_model` is."""
    teacher: Any = None
    """The language model of `reward="distill"`, given as `reward_model` is."""
    frozen_dtype: Any = None
    """The dtype of the models that are read and never trained (reference, reward model, implicit
    model, teacher), as copies: "bfloat16", "float16" or "float32". None: each has its own. With
    "bfloat16" they take half the memory and time; log pi_ref and the rewards are rounded."""
    watch: Any = None
    """Terms whose numbers per token are recorded and never paid: a design's name, a `RewardTerm`,
    or a mapping of names to them. None watches nothing."""
    kl: str = "reference"
    """"reference" pays kl_coef * log pi_ref (the learner adds -kl_coef * log pi); "policy" pays the
    whole penalty from the log-prob that the action carries; "none" pays nothing."""
    kl_coef: float | None = None
    """beta, reward per nat, 0 or more; read when an episode begins. None is the task's own."""
    kl_estimator: str = "k1"
    """"k1", "k2" or "k3"; other than k1 only with kl="policy"."""
    kl_clamp: float | None = None
    """A bound: each token's estimate is kept in [-kl_clamp, kl_clamp] nats; only with
    kl="policy"."""
    autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP
    """Gymnasium's "NextStep", "SameStep" or "Disabled"."""
    array: str = "numpy"
    """"numpy", or "torch": tensors on the models' device."""
    observation: str = "tokens"
    """"tokens", or "features": the reference's last hidden state."""
    group_size: int = 1
    """Each drawn prompt starts in this many consecutive slots; divides the number of envs."""
    max_new_tokens: int | None = None
    """T, 1 or more; None is the task's own."""
    score_truncated: bool = True
    """Whether a text that is cut at T is scored. If it is not, the cut is a truncation, and
    learners bootstrap from its last state."""
    cut: str = "terminated"
    """The flag that reports the cut of a scored text at T: "terminated", because nothing is paid
    after it and learners that know Gymnasium alone must not bootstrap there, or "truncated".
    `infos["cut"]` reports it in both cases."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the reward where a scored text is cut at T; 0 or more."""
    max_batch_tokens: int = 16384
    """The size of the largest whole-text forward, in tokens with padding; 1 or more."""
    compile: bool = False
    """Whether the cached forward is compiled with torch.compile."""

    def __post_init__(self) -> None:
        check_choice("kl", self.kl, ("reference", "policy", "none"))
        check_choice("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        check_choice("array", self.array, ("numpy", "torch"))
        check_choice("observation", self.observation, ("tokens", "features"))
        check_choice("cut", self.cut, ("terminated", "truncated"))
        if self.frozen_dtype is not None:
            check_choice("frozen_dtype", str(self.frozen_dtype).removeprefix("torch."), DTYPES)
        self.autoreset_mode = _autoreset_mode(self.autoreset_mode)
        for name in ("score_truncated", "compile"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise InvalidArgument(f"{name}={getattr(self, name)!r} must be True or False.")
        if self.kl_clamp is not None:
            check_number("kl_clamp", self.kl_clamp)
        check_number("missing_eos_penalty", self.missing_eos_penalty)
        if self.kl_coef is not None:
            check_kl_coef(self.kl_coef)
        self._check_kl_options()
        penalty = self.missing_eos_penalty
        if not 0 <= penalty < math.inf or (penalty and not self.score_truncated):
            raise InvalidArgument(
                f"missing_eos_penalty={penalty} must be finite and 0 or more, and needs "
                f"score_truncated=True."
            )
        for name in ("group_size", "max_batch_tokens", "max_new_tokens"):
            value = getattr(self, name)
            unset = value is None and name == "max_new_tokens"  # the task's own
            if not unset and (not isinstance(value, int) or value < 1):
                raise InvalidArgument(f"{name}={value!r} must be a whole number, 1 or more.")

    def _check_kl_options(self) -> None:
        if self.kl_clamp is not None and not self.kl_clamp > 0:
            raise InvalidArgument(
                f"kl_clamp={self.kl_clamp} must be above 0 (nats per token), or None."
            )
        if self.kl != "policy" and (self.kl_estimator != "k1" or self.kl_clamp is not None):
            raise InvalidArgument(
                f"kl_estimator={self.kl_estimator!r} and kl_clamp={self.kl_clamp} need "
                f"kl='policy', not kl={self.kl!r}."
            )


def check_kl_coef(value: float) -> float:
    """Return `value` if it is finite and 0 or more; raise `InvalidArgument` if not."""
    check_number("kl_coef", value)
    if not (math.isfinite(value) and value >= 0):
        raise InvalidArgument(f"kl_coef={value} must be finite and 0 or more (reward per nat).")
    return float(value)


def _autoreset_mode(mode: str | AutoresetMode) -> AutoresetMode:
    if not isinstance(mode, AutoresetMode):
        check_choice("autoreset_mode", mode, [one.value for one in AutoresetMode])
    return AutoresetMode(mode)
