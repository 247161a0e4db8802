"""docs/rewards.md has every design, in one form."""

import re
from pathlib import Path

import pytest

from tokenenv.rewards.designs import DESIGNS

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
FORM = ["Pays", "Needs", "Preserves", "Take it", "Trap:", "Cost:"]


def sections() -> dict[str, str]:
    """The designs' sections by title."""
    designs = PAGE.split("\n## Designs\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^### (\w+)\n(.*?)(?=^### |\Z)", designs, re.M | re.S))


def test_every_design_has_a_row_and_a_section() -> None:
    rows = re.findall(r"^\| \[`(\w+)[^|]*\]\(#(\w+)\)", PAGE, re.M)
    assert set(sections()) == {*DESIGNS, "Rule", "TokenRule"}
    assert {name for name, _ in rows} == set(sections())
    assert {link for _, link in rows} == {name.lower() for name in sections()}


@pytest.mark.parametrize("name", [*DESIGNS, "Rule", "TokenRule"])
def test_a_section_says_the_same_things_in_the_same_order(name: str) -> None:
    said = re.findall(r"\*\*(.+?)\*\*", sections()[name])
    assert [heading for heading in said if heading in FORM] == FORM
