"""Files of a run: each is written whole or not at all, and a folder holds one run, on which one
process works at a time."""

import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from tokenenv import ranks
from tokenenv.errors import InvalidArgument, RunFolderError
from tokenenv.safety.trust import refuse_link

LOCK = "lock"
EPISODES = "episodes.jsonl"
RUN_FILES = ("config.yaml", "checkpoint", "checkpoint.previous", EPISODES)
"""The files that say that a folder holds a run: one of them is enough."""
_held: set[tuple[Path, int]] = set()
"""Folders that this process has locked, and the threads that did."""


def replace_file(
    path: Path, write: Callable[[Path], object], *, keep_previous: bool = False
) -> None:
    """Have `write` make a file beside `path`, which then takes its name.

    A crash at any moment leaves the old file or the new one, whole. With `keep_previous` the old
    one stays, under `previous_of(path)`.

    Raises `RunFolderError` where the disk is full or the folder cannot be written; `path` is then
    as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    with reporting(path, "be written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # What is there may be a link to elsewhere: it must not be written through.
            temporary.unlink(missing_ok=True)
            write(temporary)
            _sync(temporary)
        except OSError:
            # On a full disk half a file takes the room that other files need.
            temporary.unlink(missing_ok=True)
            raise
        if keep_previous:
            _keep(path)
        os.replace(temporary, path)
        _sync(path.parent)


def previous_of(path: Path) -> Path:
    """Return where `replace_file` keeps the file that was at `path` before."""
    return path.with_name(path.name + ".previous")


@contextmanager
def reporting(path: Path, what: str) -> Iterator[None]:
    """Turn an `OSError` into a `RunFolderError`: `path` cannot `what`, and why."""
    try:
        yield
    except RunFolderError:
        raise
    except OSError as error:
        raise RunFolderError(f"{path} cannot {what}: {error.strerror or error}.") from error


def refuse_run(folder: Path) -> None:
    """Raise `InvalidArgument` where `folder` holds a run, or is no folder."""
    if folder.exists() and not folder.is_dir():
        raise InvalidArgument(
            f"run_dir={str(folder)!r} is a file; it must be a folder, and is made if there is none."
        )
    found = [name for name in RUN_FILES if (folder / name).exists()]
    if found:
        raise InvalidArgument(
            f"run_dir={str(folder)!r} holds a run ({', '.join(found)}). Go on with it by `tokenenv "
            f"train --resume {folder}` (or by the agent's `load`), or give another folder."
        )


def refuse_episodes(folder: Path) -> None:
    """Raise `InvalidArgument` where `folder` holds a run that has learnt from texts."""
    path = folder / EPISODES
    if path.exists() and path.stat().st_size:
        refuse_run(folder)


def new_folder(path: Path) -> Path:
    """Make a folder that did not exist, and return it: `path`, or the first of `path`-2, `path`-3,
    ... that is free."""
    with reporting(path, "be made"):
        path.parent.mkdir(parents=True, exist_ok=True)
        number, folder = 1, path
        while True:
            try:
                folder.mkdir()
            except FileExistsError:
                number += 1
                folder = path.with_name(f"{path.name}-{number}")
            else:
                return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes, and other threads, from training in `folder`.

    The system takes the lock away when this process ends, however it ends. The thread that holds
    the lock may take it again, and of processes that learn together the first has it for all.
    Raises `RunFolderError` where another one has it.
    """
    key = (folder.resolve(), threading.get_ident())
    if key in _held or ranks.number() > 0:
        yield
        return
    with reporting(folder, "be used"):
        folder.mkdir(parents=True, exist_ok=True)
        refuse_link(folder / LOCK)
        file = (folder / LOCK).open("a+", encoding="utf-8")
    with file:
        _lock(file, folder)
        _held.add(key)
        try:
            yield
        finally:
            _held.discard(key)


@contextmanager
def no_trace(folder: Path, nothing_learned: Callable[[], bool]) -> Iterator[None]:
    """Around the writing of a run in a folder that is `locked`: where an argument turns out to be
    wrong and `nothing_learned` returns True, take away what has appeared in the folder, and the
    folder if nothing else is there. After any other error a run can be gone on with."""
    before = set(folder.iterdir()) - {folder / LOCK} if ranks.number() == 0 else set()
    try:
        yield
    except InvalidArgument:
        if nothing_learned() and ranks.number() == 0:
            for path in set(folder.iterdir()) - before:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            if not before:
                folder.rmdir()
        raise


def _lock(file: TextIO, folder: Path) -> None:
    import fcntl  # imported here, because only Unix has it

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        process = file.read(20).strip()
        raise RunFolderError(
            f"{folder} is in use: process {process} trains there. Wait for it, or stop it."
        ) from error
    except OSError as error:
        warnings.warn(
            f"{folder} cannot be locked ({error.strerror}): see to it that only one process trains "
            f"there.",
            stacklevel=4,
        )
    with reporting(folder / LOCK, "be written"):
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()


def _keep(path: Path) -> None:
    """Give the file at `path` a second name, so that there is no moment without one at `path`."""
    spare = path.with_name(path.name + ".spare")
    spare.unlink(missing_ok=True)
    if not path.exists():
        return
    try:
        os.link(path, spare)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, spare)
    os.replace(spare, previous_of(path))
    # Where spare and previous are links to one file, `replace` does nothing and leaves spare.
    spare.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until the system has the file or directory on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
