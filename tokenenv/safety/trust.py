"""Trust in files: what a config or a checkpoint may ask for. A run folder may come from a stranger,
so it is data, and nothing in it imports, runs or connects.

Registered names, numbers, words, hub ids and paths are taken from a file: a model is loaded from
safetensors, and prompts are read, which runs no code. The command line has to repeat what runs
code, opens a connection or writes elsewhere: a name with a module (`--env module:id`), a URL, code
that comes with a model.
"""

import os
import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenenv.errors import InvalidArgument, RunFolderError
from tokenenv.safety.shown import visible, without_user
from tokenenv.safety.values import typed

NAMED = ("env", "reward", "gold", "algo")
"""Entries that are names. Where the command line gives one, it may be "module:Name"."""
ROLLOUT_OPTIONS = {
    "num_texts",
    "own_process",
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
"""The engine's options that a file may set. Others hold names of classes and modules."""
_MODULE = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*(\.\w+)*")


def check_from_file(values: Mapping[str, Any], source: object, said: Collection[str] = ()) -> None:
    """Raise unless a file may say all of this.

    Args:
        values: the file's entries by dotted name: those of `NAMED`, "eval_prompts",
            "options.NAME", "agent.rollout", "agent.rollout_options.NAME".
        source: the file, for the error.
        said: the names that the command line gives too ("agent.rollout_options.*" for all of a
            kind). Its values are taken, so the file's do not matter.

    Raises:
        InvalidArgument: an entry is refused. The message names the file, every such entry, and the
            flags with which the command line may say them again.
    """
    values = {name: value for name, value in values.items() if not _given(name, said)}
    reasons = {name: _refused(name, value) for name, value in values.items()}
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    if refused:
        shown = [
            f"{visible(name)}={visible(without_user(str(values[name])))[:80]!r} {reason}"
            for name, reason in refused.items()
        ]
        several = len(shown) > 1
        listed = f"{', '.join(shown[:-1])} and {shown[-1]}" if several else shown[0]
        again = flags({name: values[name] for name in refused})
        raise InvalidArgument(
            f"{visible(str(source))}: {listed}, which no file can ask for; if you trust "
            f"{'them' if several else 'it'}, say {'them' if several else 'it'} again: {again}"
        )


def repeated(values: Mapping[str, Any]) -> str:
    """Return the flags that the command line has to say again when it goes on with a file that
    holds these entries; "" where it has to say nothing."""
    return flags({name: value for name, value in values.items() if _refused(name, value)})


def flags(values: Mapping[str, Any]) -> str:
    """Return how the command line gives entries: each by its dotted name, the options in one
    list."""
    lists: dict[str, list[str]] = {}
    for name, value in values.items():
        prefix, _, key = name.rpartition(".")
        option = {"options": "--options", "agent.rollout_options": "--agent.rollout-options"}
        words = [*([key] if prefix in option else []), without_user(_word(value))[:200]]
        lists.setdefault(option.get(prefix, f"--{name.replace('_', '-')}"), []).extend(words)
    return " ".join(visible(shlex.join([option, *words])) for option, words in lists.items())


def _word(value: Any) -> str:
    """Return a value as it is typed."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _given(name: str, said: Collection[str]) -> bool:
    return name in said or f"{name.rpartition('.')[0]}.*" in said


def _refused(name: str, value: Any) -> str | None:
    """Return what an entry would do that no file may ask for; None where a file may ask for it."""
    part, _, key = name.rpartition(".")
    if key == "task":
        return "imports code"
    if key == "trust_remote_code" and str(value).lower() != "false":
        return "runs code that comes with a model"
    if part == "agent.rollout_options" and key not in ROLLOUT_OPTIONS:
        return "is for the engine alone"
    if name in (*NAMED, "options.reward", "options.watch"):
        # No bundled or installed name holds a colon: what holds one names a module. A reward may
        # be typed as a mapping, of which every word is looked at.
        value = typed(value) if isinstance(value, str) else value
        return "imports code" if any(":" in text for text in _texts(value)) else None
    if key == "prompts" and isinstance(value, list):
        return None  # the prompts themselves, which are texts whatever they look like
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
    """Raise `RunFolderError` where `path` is a link. In a stranger's run folder a link could have
    any file of the user's overwritten."""
    if path.is_symlink():
        raise RunFolderError(
            f"{path} is a link to {os.readlink(path)!r}; what is written into a run folder stays "
            "in it."
        )
