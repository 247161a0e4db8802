"""Tests on the built site, for which mkdocs is installed, and on a run's page: `make docs`."""

import os

# Not by whether there is a site: the default suite would then run these again after `make docs`.
if "DOCS" not in os.environ:
    collect_ignore_glob = ["test_*.py"]
