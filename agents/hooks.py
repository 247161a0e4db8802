"""What the methods and attributes of an algorithm's class must be, and the errors that say so.

Whoever writes an algorithm of their own forgets a `return` or a decorator sooner or later; without
these checks the error would be one of torch's, far from the method at fault.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from tokenenv.errors import InvalidArgument


def described(value: Any) -> str:
    """Return what a method returned, in words for an error."""
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"an object of type {type(value).__name__}"


def check_loss(loss: Any, logged: Mapping[str, Any], num_tokens: int, name: str) -> None:
    """Raise `InvalidArgument` unless a `policy_loss` returned one number, and left one number, or
    one for each token, under each name in `out.logged`."""
    if not isinstance(loss, Tensor) or loss.shape != ():
        raise InvalidArgument(
            f"{name}.policy_loss returned {described(loss)}; it must return a tensor with one "
            f"number, such as (weights_K * loss_K).sum()."
        )
    for metric, values in logged.items():
        if not isinstance(values, Tensor) or values.shape not in ((), (num_tokens,)):
            raise InvalidArgument(
                f"{name}.policy_loss left {described(values)} in out.logged[{metric!r}]; it must "
                f"be a tensor (K,) = ({num_tokens},), one number for each token."
            )


def check_statistics(statistics: Mapping[str, Any], name: str) -> None:
    """Raise `InvalidArgument` for a statistic that no checkpoint could hold."""
    for key, value in statistics.items():
        if not (hasattr(value, "state_dict") and hasattr(value, "load_state_dict")):
            raise InvalidArgument(
                f"{name}.running_statistics() has {described(value)} under {key!r}; it must be an "
                f"object with state_dict() and load_state_dict(state), which checkpoints use."
            )


def check_config_class(kind: type[Any], parents: Sequence[type[Any]]) -> None:
    """Raise `InvalidArgument` unless an algorithm's settings are a dataclass derived from those of
    its parents, which read theirs."""
    config, name = kind.config_class, f"{kind.__name__}.config_class={kind.config_class.__name__}"
    for parent in parents:
        if not issubclass(config, parent.config_class):
            raise InvalidArgument(
                f"{name} must be derived from {parent.config_class.__name__}, the settings that "
                f"{parent.__name__} reads."
            )
    known = {field.name for field in fields(config)}
    if missing := sorted(set(inspect.get_annotations(config)) - known):
        raise InvalidArgument(
            f"{name} has no setting {missing[0]!r}; write @dataclass(kw_only=True, slots=True) "
            f"above the class."
        )
