"""Where the files of models and tokenizers are: a local directory, the hub, or the hub's cache on
this machine.

transformers asks the hub for every file, five times each where no answer comes, for minutes in all.
Here the hub is asked once, before transformers reads anything.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenenv.errors import InvalidArgument, ModelError
from tokenenv.safety.shown import visible

ANSWER = 5.0
"""The seconds that the hub has to answer: within them it can be reached, or it cannot."""
PATIENCE = 2.0
"""The seconds from which on a line says what is being loaded."""

logger = logging.getLogger("tokenenv")


def hub_options(source: str, argument: str, revision: str | None = None) -> dict[str, Any]:
    """Return the keywords with which `from_pretrained` finds the files of `source`.

    Where the hub cannot be reached, what its cache holds is read without asking the hub again.

    Args:
        source: a hub id or a local directory.
        argument: the name under which the user gave it, for errors.
        revision: a branch, a tag or a commit of a hub id; None: the default branch.

    Raises:
        InvalidArgument: a local directory is given with a revision.
        ModelError: the source is neither a directory nor an id that the hub has, or the hub cannot
            be reached and its cache does not hold the id.
    """
    if os.path.isdir(source):  # a Path("") would be one
        if revision is not None:
            raise InvalidArgument(
                f"revision={revision!r} is of a hub id, and {argument}={source!r} is a local "
                "directory; leave revision= out."
            )
        adapter = adapter_config(source)
        if adapter is None:
            return {}
        return hub_options(adapter["base_model_name_or_path"], f"the base model of {argument}")
    given = {} if revision is None else {"revision": revision}
    unreachable = _ask(source, argument, revision)
    if unreachable is None:
        return given
    if not _is_cached(source, revision):
        _answer.cache_clear()  # the next call asks again
        which = source if revision is None else f"revision {revision!r} of it"
        raise ModelError(
            failed(
                argument,
                source,
                f"there is no such directory, {unreachable}, and its cache on this machine does "
                f"not hold {which}",
            )
        )
    logger.info("%s=%r is read from the hub's cache: %s", argument, source, unreachable)
    return given | {"local_files_only": True}


def adapter_config(source: str) -> dict[str, Any] | None:
    """Return the config of the adapter in a directory, which names its base model; None where there
    is no adapter, or where the model is there too."""
    folder = Path(source)
    try:
        if (folder / "config.json").exists():
            return None
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = config["base_model_name_or_path"]
    # peft says what is wrong with the file.
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return config if isinstance(base, str) else None


def failed(argument: str, source: Any, reason: str) -> str:
    """Return the message of a source that cannot be loaded."""
    return (
        f"{argument}={visible(str(source))!r} cannot be loaded ({visible(reason)}); allowed: a hub "
        "id, or a local directory with safetensors, which needs no network"
    )


@contextmanager
def undisturbed(argument: str, source: str) -> Iterator[None]:
    """Load without the progress bars of other libraries; where it takes a while, one line says what
    is being loaded, and from where."""
    place = "a local directory" if os.path.isdir(source) else f"the hub or {_cache_folder()}"
    # A warning is what Python shows even where nobody has set up logging.
    message = ("loading %s=%r from %s ...", argument, visible(source), place)
    line = threading.Timer(PATIENCE, logger.warning, message)
    line.daemon = True
    line.start()
    try:
        with without_bars():
            yield
    finally:
        line.cancel()


@contextmanager
def offline() -> Iterator[None]:
    """Have nobody ask the hub: transformers passes `local_files_only` on to most of its lookups,
    but not to the one for an adapter's config."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def without_bars() -> Iterator[None]:
    """Switch the progress bars of transformers and of the hub off, and afterwards back to what they
    were. Bars that HF_HUB_DISABLE_PROGRESS_BARS=0 asks for stay."""
    from huggingface_hub import constants, utils
    from transformers.utils import logging as bars

    hub: Any = utils  # which does not list what it exports

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is False:
        yield
        return
    shown, downloads = bars.is_progress_bar_enabled(), not hub.are_progress_bars_disabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()  # the hub's too
        if downloads != (not hub.are_progress_bars_disabled()):
            (hub.enable_progress_bars if downloads else hub.disable_progress_bars)()


def _ask(source: str, argument: str, revision: str | None) -> str | None:
    """Return None where the hub has the source, or why it cannot be reached; raise `ModelError`
    where it is no id of the hub."""
    # What is loaded together, a model and its tokenizer, asks once.
    exists, why = _answer(source, revision, int(time.monotonic() // 60))
    if not exists:
        reason = ", and ".join(filter(None, ["there is no such directory", why]))
        raise ModelError(failed(argument, source, reason))
    return why or None


@lru_cache(maxsize=64)
def _answer(repo_id: str, revision: str | None, minute: int) -> tuple[bool, str]:
    """Ask the hub once for an id. Return whether the hub may have it, and what is wrong.

    (True, ""): it has it. (True, why): the hub cannot be reached. (False, why): there is no such id
    or revision. (False, ""): ids have another form, and nobody was asked.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = HfApi()
    try:
        hub.model_info(repo_id, revision=revision, timeout=ANSWER)
    except HFValidationError:
        return False, ""
    except RevisionNotFoundError:
        return False, f"the hub ({hub.endpoint}) has no revision {revision!r} of that id"
    except RepositoryNotFoundError:
        return False, f"the hub ({hub.endpoint}) has no such id, or it is private: see `hf auth`"
    # A network fails in many ways, and each HTTP client has errors of its own.
    except Exception as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            return True, ""  # what the hub says here, such as a login, it says to transformers too
        reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        return True, f"the hub ({hub.endpoint}) cannot be reached ({reason})"
    return True, ""


def _is_cached(repo_id: str, revision: str | None) -> bool:
    """Whether the hub's cache holds files of an id."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(repo_id, revision=revision, local_files_only=True)
    # A cache that cannot be read holds nothing.
    except Exception:
        return False
    return True


def _cache_folder() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)
