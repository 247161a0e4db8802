"""The commands and the code of docs/fit.md and of the README, from pairs to a policy, with smaller
numbers."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from tokenenv.cli import main

ROOT = Path(__file__).parents[2]
SMALLER = {"--num-examples": "48", "--epochs": "1", "--num-texts": "32", "--total-tokens": "200"}
MORE = {
    "fit": ["--epochs", "1", "--hidden-size", "32", "--num-layers", "1"],
    "audit": ["--num-texts", "64"],
    "train": ["--total-tokens", "200", "--num-envs", "8"],
}
"""What makes each command quick."""


def commands(page: str) -> list[list[str]]:
    """The tokenenv commands of the first block of a page that has `tokenenv fit`, as words."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    block = next(block for block in blocks if "tokenenv fit" in block)
    return [shlex.split(line, comments=True)[1:] for line in block.splitlines() if line]


@pytest.mark.parametrize("page", ["README.md", "docs/fit.md"])
def test_the_commands_go_from_pairs_to_a_policy(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = commands(page)
    assert [words[0] for words in given] == ["sample", "fit", "audit", "train"]
    for words in given:
        words = [
            SMALLER.get(before, word) for before, word in zip(["", *words], words, strict=False)
        ]
        main([*words, *MORE.get(words[0], [])])
    assert (tmp_path / "runs" / "reward" / "model.safetensors").exists()
    assert list((tmp_path / "runs").glob("reviews-v0-ppo-*/checkpoint*"))
    if page == "docs/fit.md":
        code = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
        for block in code:
            exec(compile(block, page, "exec"), {})


def test_the_example_goes_from_pairs_to_a_policy(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = runpy.run_path(str(ROOT / "examples" / "fit_token_reward.py"))["main"]
    run(pairs=48, total_tokens=200, texts=8)
    printed = capsys.readouterr().out
    assert re.search(r"of held-out pairs it tells \d+% apart", printed)
    assert re.search(r"positive reviews: \d+% before, \d+% after", printed)
