"""The code of a translated page is that of the English one, which other tests run."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [("README.md", "docs/zh/readme.md"), ("docs/findings.md", "docs/zh/findings.md")]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def blocks(page: str) -> list[tuple[str, str]]:
    """The language and the text of each block of code."""
    return BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))


def program_of(text: str) -> str:
    """A program without what is for readers: comments, docstrings, and words that are printed."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        parts = [node.value] if isinstance(node, ast.Expr) else []
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            parts = node.args
        for part in parts:
            if isinstance(part, ast.Constant):
                part.value = ""
    return ast.dump(tree)


def commands_of(text: str) -> list[str]:
    """The lines of a shell, without their comments."""
    return [re.sub(r"\s+#.*", "", line) for line in text.splitlines()]


@pytest.mark.parametrize(("english", "translated"), PAGES)
def test_a_translated_page_has_the_code_of_the_english_one(english: str, translated: str) -> None:
    pairs = list(zip(blocks(english), blocks(translated), strict=True))
    for (language, text), (its_language, its_text) in pairs:
        assert language == its_language
        if language == "python":
            assert program_of(text) == program_of(its_text)
        else:
            assert commands_of(text) == commands_of(its_text)


def test_every_translated_page_is_compared() -> None:
    assert [language for language, _ in blocks("docs/zh/readme.md")].count("python") == 1
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "docs" / "zh").glob("*.md")} == {
        translated for _, translated in PAGES
    }
