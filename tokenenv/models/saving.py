"""Folders of models that transformers and peft load, each written whole or not at all."""

import copy
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from tokenenv.errors import InvalidArgument, RunFolderError

from .adapters import adapter_file, adapter_layers, merged, unwrapped
from .hub import without_bars

MARK = "tokenenv.json"
"""The file that says that `whole_folder` wrote a folder, and what else is in it."""


def save_model(model: Any, folder: Path, *, merge: bool = False) -> None:
    """Write a model's adapter in peft's format or, where it has none or with `merge`, its full
    weights and config in transformers' format; all of them as safetensors.

    Full weights have the dtype that the model has. Merged ones have the dtype of the base, to which
    the sums are rounded.

    Raises:
        InvalidArgument: this is no transformers model, or has several active adapters.
    """
    plain = unwrapped(model)
    if not hasattr(plain, "save_pretrained"):
        raise InvalidArgument(
            f"save_pretrained writes models of transformers, and this policy is a "
            f"{type(plain).__name__}; agent.save(path) writes a checkpoint that holds it."
        )
    if not adapter_layers(plain):
        _save_full(plain, folder)
    elif merge:
        _save_full(merged(plain), folder)
    else:
        _save_adapter(model, folder)
    if plain.can_generate():
        plain.generation_config.to_json_file(folder / "generation_config.json")


def _save_full(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    # transformers refuses to save some generation settings that published models have. A shallow
    # copy, which has the model's weights, shows it others.
    model = copy.copy(model)
    model.generation_config = GenerationConfig()
    with without_bars():
        model.save_pretrained(folder)


def _save_adapter(model: Any, folder: Path) -> None:
    config, weights = adapter_file(model)
    config.inference_mode = True
    config.task_type = config.task_type or "CAUSAL_LM"
    config.base_model_name_or_path, config.revision = source_of(model)
    config.save_pretrained(folder)
    # Copies, because safetensors refuses two names for the same memory.
    weights = {name: weight.to("cpu", copy=True).contiguous() for name, weight in weights.items()}
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})


def source_of(model: Any) -> tuple[str | None, str | None]:
    """Return where a model was loaded from, and the commit on the hub if that is known: a hub id or
    the absolute path of a folder; None for a model that was built in memory."""
    config = getattr(unwrapped(model), "config", None)
    source = getattr(config, "_name_or_path", None) or None
    if source is not None and Path(source).exists():
        return str(Path(source).resolve()), None
    return source, getattr(config, "_commit_hash", None)


def check_not_its_base(model: Any, directory: str | os.PathLike[str]) -> None:
    """Raise `InvalidArgument` where the model's adapter would replace the weights beneath it."""
    source, target = source_of(model)[0], Path(directory).resolve()
    if adapter_layers(model) and source == str(target):
        raise InvalidArgument(
            f"directory={str(target)!r} holds the base model of this adapter, which nobody could "
            "load without it; give another folder, or merge=True for full weights."
        )


@contextmanager
def whole_folder(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder to write to, which then takes the place of `directory`.

    It is written in a hidden folder of its own beside `directory`, which is gone afterwards. A
    folder that was written here before is replaced. Where something interrupts this, the earlier
    one stays; where the process is killed in between, both are in the hidden folder.

    Raises:
        InvalidArgument: `directory` is a file, or holds something that was not written here.
        RunFolderError: it cannot be written.
    """
    target = Path(directory).resolve()
    check_folder(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            new, old = Path(scratch) / "new", Path(scratch) / "old"
            new.mkdir()
            yield new
            _mark(new)
            _sync(new)
            try:
                if target.exists():
                    target.rename(old)
                new.rename(target)
            except BaseException:
                if old.exists() and not target.exists():
                    old.rename(target)
                raise
    except RunFolderError:
        raise
    except OSError as error:
        raise RunFolderError(f"{target} cannot be written: {error.strerror or error}.") from error


def check_folder(directory: str | os.PathLike[str]) -> None:
    """Raise `InvalidArgument` where `whole_folder` would not write."""
    target = Path(directory).resolve()
    if target.exists() and not target.is_dir():
        raise InvalidArgument(f"directory={str(target)!r} is a file; it must be a folder.")
    found = {path.name for path in target.iterdir()} if target.exists() else set()
    if others := sorted(found - _written(target)):
        raise InvalidArgument(
            f"directory={str(target)!r} holds {others[0]!r}, which save_pretrained has not written "
            "there; give a new folder, or one that an earlier save wrote."
        )


def _written(folder: Path) -> set[str]:
    """Return the names that a folder's mark says were written with it; none without a mark."""
    try:
        content = json.loads((folder / MARK).read_text(encoding="utf-8"))
        return {MARK, *map(str, content["files"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()


def _mark(folder: Path) -> None:
    files = sorted(path.name for path in folder.iterdir())
    (folder / MARK).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")


def _sync(folder: Path) -> None:
    """Wait until the system has the files on disk."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
