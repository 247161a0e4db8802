"""What the designs share that pay by the log-ratio of a language model to the reference."""

from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from tokenenv.errors import InvalidArgument
from tokenenv.models.trunks import log_ratio, logprob_reader
from tokenenv.rewards.seen import Transitions
from tokenenv.rewards.term import Context, RewardTerm


class LogRatio(RewardTerm):
    """A term that reads log pi_model - log pi_ref of each token of the policy's. Subclasses set
    `role` and define `reward`."""

    role: ClassVar[str]
    """Which model of the task is read where none is given, one of `NEEDS`: `Task` has it under this
    name, with "_" for " "."""
    preserves_return = False
    preserves_gradient = False

    def __init__(self, model: Any, coef: float | None) -> None:
        if isinstance(model, str | Path):
            option = self.role.replace(" ", "_")
            raise InvalidArgument(
                f"model={str(model)!r} must be a model that is loaded; a folder, an id or a URL is "
                f"given to the env: {option}={str(model)!r}."
            )
        self.model, self.coef = model, coef
        self.needs = frozenset({"reference"} if model is not None else {"reference", self.role})

    def bind(self, context: Context) -> None:
        """Take the task's model, and beta, where none was given."""
        super().bind(context)
        model = self.model
        if model is None:
            model = getattr(context.task, self.role.replace(" ", "_"))
        self.models = (model,)
        self._logprob = logprob_reader(model, context.spec.vocab_size)
        self._coef = context.kl_coef if self.coef is None else self.coef
        if self.coef is None and self._coef == 0:
            raise InvalidArgument(
                f"reward={self.name!r} takes this env's beta, which is 0; give "
                f"{type(self).__name__}(coef=...)."
            )

    def log_ratio(self, batch: Transitions) -> Tensor:
        """Return log pi_model - log pi_ref (K,) of the tokens, in nats."""
        assert batch.ref_logprob is not None
        model = self.models[0]
        states = batch.before.of(model)
        if hasattr(model, "at_step"):
            states = model.at_step(states, batch.before.step)
        logprob = self._logprob(states, batch.tokens)
        return log_ratio(logprob, batch.ref_logprob)
