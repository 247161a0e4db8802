"""The errors of this package: one root, and each child is also the standard error that a caller
would expect."""

import difflib
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

from gymnasium.error import ClosedEnvironmentError, ResetNeeded

from tokenenv.safety.shown import visible

MANY = 16
"""The largest number of allowed names that an error lists beside the nearest ones."""


class TokenEnvError(Exception):
    """The root of every error that this package raises on purpose."""

    def __str__(self) -> str:
        # A message may quote a stranger's file, whose characters must not steer a terminal.
        return visible(super().__str__())


class InvalidArgument(TokenEnvError, ValueError):
    """Raised where an argument of a constructor or a method is not allowed."""


class InvalidAction(TokenEnvError, ValueError):
    """Raised by `step` where an action cannot be taken. Nothing has changed in the env."""


class FinishedRow(InvalidAction, AssertionError):
    """Raised by `step` under DISABLED autoreset where a slot's text has ended and the slot was not
    reset. Gymnasium raises AssertionError there."""


class NotReset(TokenEnvError, ResetNeeded):
    """Raised by `step` and others before the first `reset`."""


class Interrupted(NotReset):
    """Raised by every call after one that was interrupted half-way, until `reset()` or
    `load_state()` has made the env whole again."""


class EnvClosed(TokenEnvError, ClosedEnvironmentError):
    """Raised by every call after `close`."""


class RankFailed(TokenEnvError, RuntimeError):
    """Raised on the other ranks where one of the processes that learn together has failed."""


class ModelError(TokenEnvError, ValueError):
    """Raised while an env, an agent or a scorer is made, where a model or tokenizer cannot be
    loaded or cannot play the part that it was given."""


class NotFinite(TokenEnvError, FloatingPointError):
    """Raised by `step`, `score_episodes` and agents where a reward, a log-prob or a gradient is NaN
    or infinite. Nothing has been learnt from it."""

    def __init__(self, message: str, rows: Sequence[int] = (), texts: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.rows = list(rows)
        """The slots of the env that are at fault, or the texts that were scored, by number."""
        self.texts = list(texts)
        """What was written there, where a collector knows it: objects with a `prompt` and a
        `response` of token ids."""


class CheckpointError(TokenEnvError, ValueError):
    """Raised by `load` and `load_state` where a checkpoint or a saved state is corrupt, incomplete
    or belongs to something else."""


class RunFolderError(TokenEnvError, OSError):
    """Raised where a run folder, or a file in it, cannot be read or written, or where another
    process trains in it."""


class ServerError(TokenEnvError, ConnectionError):
    """Raised where a server did not answer as it should after as many tries as were allowed."""


class EngineError(TokenEnvError, RuntimeError):
    """Raised where the process of an engine that writes texts has ended, or has failed in something
    that it was asked for."""


class ContractError(TokenEnvError, AssertionError):
    """Raised by `tokenenv.check.check_vector_env` where an env does not keep the contract of token
    envs; the message says what to change."""


class MissingDependency(TokenEnvError, ImportError):
    """Raised where an optional package is needed and not installed; the message holds the line that
    installs it."""


def missing(what: str, *packages: str) -> MissingDependency:
    """Return the error of a thing that needs packages which are not installed. The line in it works
    however tokenenv itself was installed."""
    return MissingDependency(f"{what} needs {packages[0]}: pip install {' '.join(packages)}")


def check_choice(argument: str, value: object, allowed: Iterable[str]) -> None:
    """Raise `InvalidArgument` unless `value` is one of the `allowed` names. The message names the
    argument, the value and the nearest names, and all allowed ones where they are few or none is
    near."""
    names = sorted(allowed)
    if isinstance(value, str) and value in names:
        return
    near = difflib.get_close_matches(str(value), names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    if near and len(names) > MANY:
        raise InvalidArgument(f"{argument}={value!r} is not known.{hint}")
    raise InvalidArgument(f"{argument}={value!r} is not known; allowed: {', '.join(names)}.{hint}")


def check_given(missing: Sequence[str]) -> None:
    """Raise `InvalidArgument` where arguments of a task that have to be given are `missing`."""
    if missing:
        verb, them = ("is", "it") if len(missing) == 1 else ("are", "them")
        named = " and ".join(f"{name}=" for name in missing)
        raise InvalidArgument(f"{named} {verb} missing: this id cannot be made without {them}.")


def check_number(name: str, value: Any) -> None:
    """Raise `InvalidArgument` unless `value` is one real number."""
    if not isinstance(value, Real):
        raise InvalidArgument(f"{name}={value!r} must be a number.")
