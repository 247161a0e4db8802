"""Links the sources under their installed names: `agents/` as `tokenenv/agents`, `envs/` as
`tokenenv/envs`.

A tool that reads sources (mypy, mkdocstrings) finds the package there as an installation has it,
and never an older copy.
"""

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def link(folder: Path) -> Path:
    """Make `folder`/tokenenv anew, a folder of links into this repository, and return `folder`."""
    package = folder / "tokenenv"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for source in (*(ROOT / "tokenenv").iterdir(), ROOT / "agents", ROOT / "envs"):
        if source.name != "__pycache__":
            (package / source.name).symlink_to(source)
    return folder


if __name__ == "__main__":
    link(Path(sys.argv[1]))
