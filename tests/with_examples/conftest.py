"""The examples, and the code of the pages, run from top to bottom: `make examples`."""

import os

if "EXAMPLES" not in os.environ:
    collect_ignore_glob = ["test_*.py"]
