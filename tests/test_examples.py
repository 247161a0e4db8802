"""The examples run as they stand, on fewer tokens."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_custom_reward(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "custom_reward.py"))["main"](total_tokens=200, num_texts=8)
    printed = capsys.readouterr().out
    assert "milestones: " in printed
    assert "terminal: " in printed
