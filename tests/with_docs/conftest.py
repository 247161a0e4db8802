"""Tests on the built site, for which mkdocs is installed: `make docs`."""

import importlib.util
from pathlib import Path

SITE = Path(__file__).parents[2] / "build" / "site"
if importlib.util.find_spec("mkdocs") is None or not (SITE / "index.html").is_file():
    collect_ignore_glob = ["test_*.py"]
