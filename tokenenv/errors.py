"""Errors: one root, each child also the standard error a caller would expect."""

import difflib
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

from gymnasium.error import ClosedEnvironmentError, ResetNeeded

from tokenenv.safety.shown import visible


class TokenEnvError(Exception):
    """Root of every error this package raises on purpose. Its text may quote a stranger's file, and
    steers nothing."""

    def __str__(self) -> str:
        return visible(super().__str__())


class InvalidArgument(TokenEnvError, ValueError):
    """A constructor or method argument is not allowed."""


class InvalidAction(TokenEnvError, ValueError):
    """An action cannot be taken; nothing has changed in the env."""


class FinishedRow(InvalidAction, AssertionError):
    """A finished row was stepped under DISABLED autoreset (Gymnasium raises AssertionError
    there)."""


class NotReset(TokenEnvError, ResetNeeded):
    """`step` before the first `reset`."""


class Interrupted(NotReset):
    """A call after one that was interrupted half-way: `reset()` or `load_state()` comes next."""


class EnvClosed(TokenEnvError, ClosedEnvironmentError):
    """A call after `close`."""


class ModelError(TokenEnvError, ValueError):
    """A model or tokenizer cannot play the part it was given."""


class NotFinite(TokenEnvError, FloatingPointError):
    """A reward, log-prob or gradient is NaN or infinite; nothing has been learnt from it."""

    def __init__(self, message: str, rows: Sequence[int] = (), texts: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.rows = list(rows)
        """The env rows, or the texts that were scored, at fault."""
        self.texts = list(texts)
        """What was written in them, where a collector knows: objects with a `prompt` and a
        `response` of token ids."""


class CheckpointError(TokenEnvError, ValueError):
    """A checkpoint or saved state is corrupt, incomplete or belongs to something else."""


class RunFolderError(TokenEnvError, OSError):
    """A run folder, or a file in it, cannot be read or written, or another process trains there."""


class ServerError(TokenEnvError, ConnectionError):
    """A server did not answer, or not as it should, after as many tries as were allowed."""


class ContractError(TokenEnvError, AssertionError):
    """An env does not keep the contract of token envs; see `tokenenv.check`."""


class MissingDependency(TokenEnvError, ImportError):
    """An optional package is needed; the message holds the install line."""


def check_choice(argument: str, value: object, allowed: Iterable[str]) -> None:
    """Raises `InvalidArgument` naming the argument, the value and the allowed names, the nearest
    first."""
    names = sorted(allowed)
    if isinstance(value, str) and value in names:
        return
    near = difflib.get_close_matches(str(value), names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise InvalidArgument(f"{argument}={value!r} is not known; allowed: {', '.join(names)}.{hint}")


def check_number(name: str, value: Any) -> None:
    """Raises `InvalidArgument` unless `value` is one real number."""
    if not isinstance(value, Real):
        raise InvalidArgument(f"{name}={value!r} must be a number.")
