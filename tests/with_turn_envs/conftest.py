"""Tests on the turn-level environments of skyrl_gym and verifiers, which live in an environment of
their own: `make test-turn-envs`."""

import importlib.util
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

if any(importlib.util.find_spec(name) is None for name in ("skyrl_gym", "verifiers")):
    collect_ignore_glob = ["test_*.py"]
