"""The documentation's pages run: all of a page's python blocks, in order and in one namespace."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [
    "your-model.md",
    "your-algorithm.md",
    "rewards.md",
    "your-reward.md",
    "your-task.md",
    "conformance.md",
]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = (DOCS / page).read_text(encoding="utf-8")
    # A module, so that classes which a page defines can be copied and pickled.
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    monkeypatch.chdir(tmp_path)
    blocks = list(BLOCK.finditer(text))
    assert blocks
    for block in blocks:
        # Line breaks in front of the block, so that a traceback names the page's own lines.
        before = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(before + block[1], str(DOCS / page), "exec"), vars(module))
