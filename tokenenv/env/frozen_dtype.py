"""The models that an env reads and nobody trains, in a dtype of their own."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tokenenv.errors import InvalidArgument
from tokenenv.models.aligned_scorer import AlignedScorer
from tokenenv.models.heads import ScoreHead
from tokenenv.models.loading import as_dtype
from tokenenv.models.precision import converted_copy
from tokenenv.types import Scorer, Task


def with_frozen_dtype(task: Task, dtype: str | torch.dtype | None) -> Task:
    """Return the task with reference, reward model, implicit model, teacher and step scorer in a
    dtype, as copies; the policy's initial model stays as it is.

    What is no model of transformers stays as it is, too, and so does a `Scorer` with a head of the
    user's own. The head of a reward model stays in its dtype: it costs little, and a score would
    be rounded.

    Raises:
        InvalidArgument: no model is of transformers, or the task has an oracle or features, which
            read the states of its own models.
    """
    wanted = as_dtype(dtype)
    if wanted is None:
        return task
    names = ("reference", "scorer", "implicit_model", "teacher", "step_scorer")
    known = {name: getattr(task, name) for name in names}
    if not any(_model_of(one) is not None for one in known.values()):
        raise InvalidArgument(
            f"frozen_dtype={dtype!r}: this environment has no model of transformers; leave it out."
        )
    if task.oracle is not None or task.features is not None:
        raise InvalidArgument(
            f"frozen_dtype={dtype!r}: this task's oracle or features read its own models' states; "
            "leave it out."
        )
    memo: dict[int, Any] = {}
    changes = {name: _converted(one, wanted, memo) for name, one in known.items()}
    policy = task.reference if task.model is None else task.model
    return replace(task, model=None if changes["reference"] is policy else policy, **changes)


def _converted(holder: Any, dtype: torch.dtype, memo: dict[int, Any]) -> Any:
    """Return a model, or a scorer with its model, in a dtype; any other thing as it is."""
    model = _model_of(holder)
    if model is None:
        return holder
    copied = converted_copy(model, dtype, memo)
    if holder is model:
        return copied
    if isinstance(holder, AlignedScorer) or copied is model:
        return replace(holder, model=copied)
    return replace(holder, model=copied, head=replace(holder.head, dtype=model.dtype))


def _model_of(holder: Any) -> Any:
    """Return the model of transformers that this is or that it reads; None where there is none."""
    own_head = isinstance(holder, Scorer) and not isinstance(holder.head, ScoreHead)
    scores = isinstance(holder, Scorer | AlignedScorer) and not own_head
    model = holder.model if scores else holder
    known = isinstance(model, nn.Module) and hasattr(model, "config")
    return model if known and not hasattr(model, "slots") else None
