"""`tokenenv audit`: what it prints and writes, and what it refuses."""

import json
import sys
from pathlib import Path

import pytest

from tokenenv.cli import main
from tokenenv.cli.console import console

SMALL = ["--env", "tokenenv/Negation-v0", "--options", "vocab_size", "22", "max_new_tokens", "2"]
MINE = """
import torch
from tokenenv.rewards import RewardTerm


class Talk(RewardTerm):
    name = "talk"

    def reward(self, batch):
        return torch.ones_like(batch.tokens, dtype=torch.float32)


def words(prompt, response):
    return float(len(response.split()))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    # A console that another test has made may have another width.
    monkeypatch.setattr(console, "_width", 160)
    Path("mine.py").write_text(MINE)
    yield tmp_path
    sys.modules.pop("mine", None)


def test_tables_sentences_and_a_folder(here, capsys):
    reward = "{end: terminal, talk: [mine:Talk, 0.5]}"
    more = ["group_size", "2", "kl", "policy"]
    main(["audit", *SMALL, *more, "--reward", reward, "--num-texts", "64", "--out", "new"])
    said = capsys.readouterr().out
    assert "exact, from all texts" in said
    assert "null policy: repeated" in said
    assert "- length has no price here" in said
    assert "- return is preserved" in said  # all texts have two tokens, so the constant is one
    assert "written: new" in said
    values = json.loads(Path("new/audit.json").read_text())
    assert values["weights"] == {"end": 1.0, "talk": 0.5}
    assert values["method"] == "enumeration"
    assert {path.name for path in Path("new").iterdir()} == {"audit.md", "audit.json", "audit.png"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num-texts", "3"], "num_texts=3"),
        (["--env", "tokenenv/Nothing-v0"], "tokenenv/Nothing-v0"),
        (["--reward", "nothing"], "reward='nothing'"),
        (["--gold", "mine:words"], "--gold is for envs with the option gold"),
        (["--options", "nothing", "1"], "option='nothing'"),
        (["--seed", "-1"], "seed=-1"),
        (["--out", "mine.py"], "out='mine.py' is a file"),
    ],
)
def test_what_cannot_be_is_one_line(here, capsys, argv, message):
    env = [] if "--env" in argv or "--options" in argv else SMALL
    env = ["--env", "tokenenv/Negation-v0"] if "--options" in argv else env
    with pytest.raises(SystemExit) as stop:
        main(["audit", *env, *argv])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
