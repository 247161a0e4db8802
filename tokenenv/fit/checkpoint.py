"""The folder of a run: what is in it before the model is, and with what a run may go on.

While a run lasts, the folder holds `config.yaml`, TensorBoard's events and a checkpoint. At the end
the model and its card come into it, and the checkpoint goes.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from tokenenv.agents.run.checkpoint import read_newest, reading
from tokenenv.agents.run.files import LOCK, previous_of, reporting
from tokenenv.agents.run.run_config import CONFIG
from tokenenv.errors import CheckpointError, InvalidArgument
from tokenenv.fit.config import FitConfig
from tokenenv.fit.examples import Example

CHECKPOINT = "checkpoint"
CARD = "README.md"
KIND = "fit"
"""What a checkpoint says that it is of."""
FREE = ("data", "held_out", "out", "resume", "device", "max_batch_tokens")
"""Settings in which a run that goes on may differ: where it is, and how much memory it has. Of the
data the examples themselves are compared."""


def check_folder(out: Path, *, resume: bool) -> None:
    """Raise `InvalidArgument` unless a run may begin in `out` or, with `resume`, go on
    there."""
    if out.exists() and not out.is_dir():
        raise InvalidArgument(f"out={str(out)!r} is a file; it must be a folder, a new one.")
    found = {path.name for path in out.iterdir()} - {LOCK} if out.exists() else set()
    if not resume and {CHECKPOINT, CONFIG} & found and CARD not in found:
        raise InvalidArgument(
            f"out={str(out)!r} holds a run that has not ended; go on with it by resume=True (on "
            "the command line --resume), or give a new folder."
        )
    if not resume and found:
        raise InvalidArgument(
            f"out={str(out)!r} is not empty, it holds {min(found)!r}; give a new folder."
        )
    if resume and CONFIG not in found:
        raise InvalidArgument(f"resume=True, but out={str(out)!r} holds no run to go on with.")
    if resume and CARD in found and CHECKPOINT not in found:
        raise InvalidArgument(
            f"resume=True, but the run in out={str(out)!r} has ended: its model is there."
        )


def read_state(config: FitConfig) -> dict[str, Any] | None:
    """Return the state that a run goes on from; None where it begins.

    Raises:
        InvalidArgument: it is of a run with other settings.
        CheckpointError: it is damaged, or of something else.
    """
    path = config.out / CHECKPOINT
    if not config.resume or not (path.exists() or previous_of(path).exists()):
        return None  # a new run, or one that was stopped before its first checkpoint
    state = read_newest(path, set_aside=True)
    with reading(path):
        _check_state(state, settings(config), path)
    return state


def _check_state(state: Any, here: Mapping[str, Any], path: Path) -> None:
    if not isinstance(state, dict) or state.get("kind") != KIND:
        raise CheckpointError(f"{path} is a checkpoint of something else than `tokenenv fit`.")
    there = state["settings"]
    differing = [
        f"{name} is {there.get(name)!r} there and {value!r} here"
        for name, value in here.items()
        if there.get(name) != value
    ]
    if differing:
        raise InvalidArgument(
            f"resume=True goes on with the settings of {path}: {'; '.join(differing)}."
        )


def check_data(state: Mapping[str, Any], data: str, path: Path) -> None:
    """Raise `InvalidArgument` unless the run of this state was of the data with this
    fingerprint."""
    if state["data"] != data:
        raise InvalidArgument(
            f"resume=True goes on with the data of {path}, and data= or held_out= has other "
            "examples now."
        )


def settings(config: FitConfig) -> dict[str, Any]:
    """Return what a run is decided by beside its data, as plain values: an object of Python is
    named by its type."""
    names = [field.name for field in fields(config) if field.name not in FREE]
    return {name: plain(getattr(config, name)) for name in names}


def plain(value: Any) -> Any:
    """Return a setting as a file holds it."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    size = f" of {len(value)} rows" if isinstance(value, Sequence) else ""
    return f"<{type(value).__name__}{size}>"


def fingerprint(parts: Sequence[Sequence[Example]]) -> str:
    """Return a hash of all that the data says, in its order: texts, targets, own tokens and
    scores."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"part {len(part)}".encode())
        for example in part:
            digest.update(f"example {len(example.texts)} {example.scores}".encode())
            for text in example.texts:
                for array in (text.prompt, text.response, text.target, text.own):
                    digest.update(b"-" if array is None else _bytes(array))
    return digest.hexdigest()


def _bytes(array: np.ndarray) -> bytes:
    return f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes()


@contextmanager
def added_to(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write to, whose files then move into `folder`, the card last: where
    there is a card, there is all else."""
    with (
        reporting(folder, "be written"),
        tempfile.TemporaryDirectory(prefix=".saving.", dir=folder) as scratch,
    ):
        new = Path(scratch)
        yield new
        for path in sorted(new.iterdir(), key=lambda path: path.name == CARD):
            os.replace(path, folder / path.name)
