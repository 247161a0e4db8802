"""Tests on Tianshou, which lives in an environment of its own: `make test-tianshou`."""

import importlib.util

if importlib.util.find_spec("tianshou") is None:
    collect_ignore_glob = ["test_*.py"]
