"""The opening of docs/conformance.md says what its own examples print."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "conformance.md").read_text(encoding="utf-8")


def test_the_opening_shows_what_its_examples_print(capsys) -> None:
    opening = PAGE.partition("## Which check is for what")[0]
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", opening, re.M | re.S):
        exec(block, names)
    printed, words = capsys.readouterr().out, " ".join(opening.split())
    said = re.findall(r"(?<!\*)\*([A-Z][^*]+\.)\*", words)
    assert len(said) == 2
    for sentence in said:
        assert sentence in " ".join(printed.split())
    (table,) = re.findall(r"^```text\n(.*?)^```", opening, re.M | re.S)
    rows = [line.replace("┃", "│") for line in printed.splitlines()]
    assert [line for line in table.splitlines() if line not in rows] == []
