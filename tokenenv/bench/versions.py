"""What the numbers of a cell were made with."""

import functools
import hashlib
import importlib.metadata
import platform
from pathlib import Path

import tokenenv

PACKAGES = ("gymnasium", "numpy", "torch", "transformers")


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of tokenenv, of Python and of the packages that compute, the kind of
    machine, and `code`, a hash of tokenenv's own sources."""
    return {
        "tokenenv": tokenenv.__version__,
        "code": code(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}",
    }


@functools.cache
def code() -> str:
    """Return a hash of every Python file of tokenenv, its agents and its envs."""
    import tokenenv.agents
    import tokenenv.envs

    found = hashlib.sha256()
    for package in (tokenenv, tokenenv.agents, tokenenv.envs):
        folder = Path(package.__path__[0])
        for path in sorted(folder.rglob("*.py")):
            found.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return found.hexdigest()[:12]
