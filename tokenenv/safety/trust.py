"""What a file may say. A run folder may come from a stranger: it is data, and nothing in it
imports, runs or connects.

Registered names, numbers, words, hub ids and paths are taken from a file: a model is loaded from
safetensors, and prompts are read, which runs no code. What does run code, opens a connection or
writes elsewhere, the command line has to say again.
"""

import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenenv.errors import InvalidArgument, RunFolderError
from tokenenv.safety.shown import visible, without_user

ROLLOUT_OPTIONS = {
    "num_texts",
    "weight_sync",
    "timeout",
    "retries",
    "gpu_memory_utilization",
    "tensor_parallel_size",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "enforce_eager",
    "seed",
}
"""Of the engine's options, which hold names of classes and modules too, those that a file may
set."""
_MODULE = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*(\.\w+)*")


def check_from_file(values: Mapping[str, Any], source: object, said: Collection[str] = ()) -> None:
    """Raises unless a file may say all of this.

    Args:
        values: by dotted name: "options.NAME", "agent.rollout", "agent.rollout_options.NAME".
        source: the file, for the error.
        said: names that the command line gives too ("agent.rollout_options.*" for all of a kind);
            its values are taken, so that the file's do not matter.

    Raises:
        InvalidArgument: naming the file, the entry and the flag with which the command line may say
            it again.
    """
    for name, value in values.items():
        given = name in said or f"{name.rpartition('.')[0]}.*" in said
        reason = None if given else _refused(name, value)
        if reason is not None:
            shown = visible(without_user(str(value)))[:80]
            raise InvalidArgument(
                f"{visible(str(source))}: {visible(name)}={shown!r} {reason}, which no file can "
                f"ask for; if you trust it, say "
                f"it again: {flag(name)} {shown}"
            )


def flag(name: str) -> str:
    """How the command line gives the entry of this dotted name, up to its value."""
    for prefix, option in (
        ("options.", "--options"),
        ("agent.rollout_options.", "--agent.rollout-options"),
    ):
        if name.startswith(prefix):
            return f"{option} {visible(name.removeprefix(prefix))}"
    return f"--{visible(name)}"


def _refused(name: str, value: Any) -> str | None:
    """What the entry would do, if a file may not ask for it."""
    part, _, key = name.rpartition(".")
    if key == "task":
        return "imports code"
    if key == "trust_remote_code" and str(value).lower() != "false":
        return "runs code that comes with a model"
    if part == "agent.rollout_options" and key not in ROLLOUT_OPTIONS:
        return "is for the engine alone"
    for text in _texts(value):
        if "://" in text or text.startswith(("\\\\", "//")):
            return "opens a connection"
        if _MODULE.fullmatch(text):
            return "imports code"
        if key == "attn_implementation" and "/" in text:
            return "runs code from the hub"
    return None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _texts(key)
            yield from _texts(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _texts(entry)


def refuse_link(path: Path) -> None:
    """Raises `RunFolderError` where `path` is a link: in a stranger's run folder it could have any
    file written to."""
    if path.is_symlink():
        raise RunFolderError(
            f"{path} is a link to {os.readlink(path)!r}; what is written into a run folder stays "
            f"in it."
        )
