"""Tests on the installed wheel, which has an environment of its own: `make wheel`."""

import sys
from pathlib import Path

import tokenenv

if not Path(tokenenv.__file__).is_relative_to(sys.prefix):
    collect_ignore_glob = ["test_*.py"]
