"""The tables of docs/findings.md and of its translation are those of the committed results."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.suite.pages import PAGES, written


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_the_tables_are_those_of_the_results(page):
    assert page.read_text(encoding="utf-8") == written(page)


def test_a_table_that_is_not_of_the_results_is_written_anew(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Before.\n\n<!-- answers: kl -->\n\n| a |\n|---|\n| 1 |\n\nBehind.\n")
    text = written(page)
    assert text.startswith("Before.\n\n<!-- answers: kl -->\n\n| comparison | found |")
    assert text.endswith(" |\n\nBehind.\n")
    assert "| 1 |" not in text
