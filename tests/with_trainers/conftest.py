"""Tests on the published code of other trainers, below the folder that TOKENENV_TRAINERS names:
one folder a trainer, by its name in `tokenenv.conformance.trainers`. `make test-trainers` installs
those that are on PyPI."""

import os

if "TOKENENV_TRAINERS" not in os.environ:
    collect_ignore_glob = ["test_*.py"]
