"""Shell scripts that use the command line as a user does."""

import os
import subprocess
import sys
from pathlib import Path

TOKENENV = str(Path(sys.executable).with_name("tokenenv"))
"""The script, on whose path of imports the current directory is not."""
FLAGS = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
"""An installation without a network."""


def shell(script, folder, *path):
    """What a script of shell commands prints, and its status."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        "PYTHONPATH": os.pathsep.join(map(str, path)),
    }
    return subprocess.run(
        ["bash", "-ec", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def flat(text):
    return " ".join(text.replace("│", " ").split())
