"""Checkpoints: one safetensors file, written atomically, no pickle.

Tensors and NumPy arrays are the file's tensors; everything else is JSON in its header, beside a format version and a checksum.
"""

import json
import os
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tokenenv.errors import CheckpointError

from .files import previous_of, replace_file, reporting

FORMAT, VERSION = "tokenenv-checkpoint", "4"


def write_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Writes nested dicts, lists and tuples of plain values, NumPy arrays and tensors.

    The file appears whole or not at all: a crash at any moment leaves the previous checkpoint at `path`. The one that was
    there is kept as `path`.previous, which `read_newest` takes where the newer one is damaged.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encode(state, tensors, "state"))
    metadata = {"format": FORMAT, "version": VERSION, "state": text, "checksum": str(_checksum(text, tensors))}

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # its own error for a full disk
            raise OSError(str(error)) from error

    replace_file(Path(path), write, keep_previous=True)


def read_newest(path: str | os.PathLike[str], *, set_aside: bool = False) -> dict[str, Any]:
    """`read_checkpoint`; where that file is missing or damaged and the one before it is not, this one, with a warning.

    `set_aside` renames the damaged one to `path`.damaged, so that the next `write_checkpoint` does not keep it in place of
    the good one.
    """
    path = Path(path)
    try:
        return read_checkpoint(path)
    except CheckpointError as error:
        try:
            state = read_checkpoint(previous_of(path))
        except CheckpointError:
            raise error from None
        warnings.warn(f"{error} The one before it is taken: {previous_of(path)}.", stacklevel=3)
        if set_aside and path.exists():
            with reporting(path, "be renamed"):
                os.replace(path, path.with_name(path.name + ".damaged"))
        return state


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write_checkpoint` was given, tensors on the CPU; `CheckpointError` if it is missing, corrupt or foreign."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {error}.") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint of this package.")
    if metadata.get("version") != VERSION:
        raise CheckpointError(f"{path} has checkpoint version {metadata.get('version')}; this package reads {VERSION}.")
    text = metadata.get("state", "")
    if metadata.get("checksum") != str(_checksum(text, tensors)):
        raise CheckpointError(f"{path} is corrupt: its contents do not match its checksum.")
    try:
        return _decode(json.loads(text), tensors)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # somebody else wrote it
        raise CheckpointError(f"{path} is corrupt: its state cannot be read ({type(error).__name__}: {error}).") from error


def _checksum(text: str, tensors: dict[str, Tensor]) -> int:
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, value)
    return value


def _encode(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """JSON for `value`; what JSON lacks becomes {"kind": [...]}, so a dict becomes a list of pairs."""
    if isinstance(value, Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, Tensor) else "array"
        # A copy: tied weights share memory, which safetensors refuses.
        tensors[name] = torch.as_tensor(value).detach().cpu().clone(memory_format=torch.contiguous_format)
        return {kind: name}
    if isinstance(value, dict):
        return {"dict": [[_encode(k, {}, ""), _encode(v, tensors, f"{name}.{k}")] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        items = [_encode(item, tensors, f"{name}.{i}") for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(f"{name} is a {type(value).__name__}, which a checkpoint cannot hold.")


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "dict":
        return {_decode(k, tensors): _decode(v, tensors) for k, v in content}
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    return tensors[content] if kind == "tensor" else tensors[content].numpy()
