"""Whatever is typed after a command: it works, or one line says what is allowed, and nothing is
left behind."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console
from runs import episode, write

from tokenenv.cli import console as printing
from tokenenv.cli import main
from tokenenv.cli.evaluate import show_examples
from tokenenv.cli.train import Train

ENV = ["--env", "tokenenv/Negation-v0"]
TRAIN = [
    "train",
    *ENV,
    "--num-envs",
    "2",
    "--total-tokens",
    "20",
    "--agent.batch-tokens",
    "10",
    "--run-dir",
    "new",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    write(tmp_path / "shown", [episode()])
    (tmp_path / "file").write_text("x")
    return tmp_path


def error_of(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def option(*words):
    return [*TRAIN, "--options", *words]


def textgen(*words):
    options = ["--options", *words] if words else []
    return ["train", "--env", "tokenenv/TextGen-v0", "--run-dir", "new", *options]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*TRAIN, "--total-tokens", "0"], "total_tokens=0"),
        ([*TRAIN, "--total-tokens", "-5"], "total_tokens=-5"),
        ([*TRAIN, "--num-envs", "0"], "num_envs=0"),
        ([*TRAIN, "--checkpoint-every", "0"], "checkpoint_every=0"),
        ([*TRAIN, "--agent.batch-tokens", "0"], "batch_tokens=0"),
        ([*TRAIN, "--agent.seed", "-1"], "seed=-1"),
        ([*TRAIN, "--agent.seed", "9" * 25], "seed=9"),
        ([*TRAIN, "--agent.lr", "nan"], "lr=nan"),
        ([*TRAIN, "--agent.lr", "inf"], "lr=inf"),
        ([*TRAIN, "--agent.epochs", "0"], "epochs=0"),
        ([*TRAIN, "--reward", "[red]"], "reward='[red]' is not known"),
        ([*TRAIN, "--run-dir", "file"], "run_dir='file' is a file"),
        ([*TRAIN, "--run-dir", "file/x"], "file/x"),
        ([*TRAIN, "--run-dir", "shown"], "holds a run"),
        (["train", "--config", "shown"], "config='shown' is not a file"),
        (["train", "--config", "file"], "config='file' holds no mapping"),
        (["train", "--resume", "nowhere"], "is not a file"),
        (option("max_new_tokens", "0"), "max_new_tokens=0"),
        (option("max_new_tokens", "-3"), "max_new_tokens=-3"),
        (option("max_new_tokens", "1.5"), "max_new_tokens='1.5'"),
        (option("max_new_tokens", "many"), "max_new_tokens='many'"),
        (option("kl_coef", "nan"), "kl_coef=nan"),
        (option("kl_coef", "-1"), "kl_coef=-1"),
        (option("kl_coef", "x"), "kl_coef='x'"),
        (option("vocab_size", "0"), "vocab_size=0"),
        (option("vocab_size", "9" * 30), "vocab_size=9"),
        (option("limit", "0"), "limit=0"),
        (option("task_seed", "-1"), "task_seed=-1"),
        (option("device", "nowhere"), "device='nowhere'"),
        (option("compile", "perhaps"), "compile='perhaps'"),
        (option("vectorization_mode", "sync"), "option='vectorization_mode'"),
        (option("num_envs", "3"), "option='num_envs'"),
        (option("task", "nowhere:task"), "task='nowhere:task'"),
        (option("task", "os"), "task='os'"),
        (option("reward", "{a: b}"), "reward='b'"),
        (textgen("model", "./nowhere", "prompts", "nowhere"), "model='./nowhere'"),
        (textgen("model", "nowhere", "prompts", "p", "dtype", "float99"), "dtype='float99'"),
        (textgen("prompts", "p"), "model= is missing"),
        (textgen(), "model= and prompts= are missing"),
        (textgen("model", "x", "prompts", "p", "max_prompt_tokens", "0"), "max_prompt_tokens=0"),
        (
            textgen("model", "x", "prompts", "p", "long_prompts", "truncate"),
            "long_prompts='truncate' needs max_prompt_tokens=",
        ),
        (["evaluate", "nowhere"], "is not a file"),
        (["evaluate", "nowhere", "--num-texts", "0"], "num_texts=0"),
        (["evaluate", "nowhere", "--num-texts", "-4"], "num_texts=-4"),
        (["evaluate", "nowhere", "--examples", "-1"], "examples=-1"),
        (["evaluate", "nowhere", "--seed", "-1"], "seed=-1"),
        (["show", "nowhere"], "has no episodes.jsonl"),
        (["show", "file"], "has no episodes.jsonl"),
        (["show", "shown", "--max-episodes", "0"], "max_episodes=0"),
        (["show", "shown", "--max-episodes", "-1"], "max_episodes=-1"),
        (["show", "shown", "--output", "."], "."),
        (["show", "shown", "--output", "file/x.html"], "file"),
    ],
    ids=lambda value: " ".join(value[-2:])[:40] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_line_and_leaves_nothing_behind(argv, message, here, capsys):
    before = {path.name: sorted(path.rglob("*")) for path in here.iterdir()}
    error = error_of(argv, capsys)
    lines = [line for line in error.splitlines() if "Loading weights" not in line]
    assert len(lines) == 1 or "Value error" in lines[0]  # which tyro puts into a box
    assert message in error
    assert {path.name: sorted(path.rglob("*")) for path in here.iterdir()} == before


@pytest.mark.parametrize(
    "flag", ["--total-tokens", "--num-envs", "--checkpoint-every", "--agent.batch-tokens"]
)
@pytest.mark.parametrize("value", ["1.5", "x", "1e-3", "nan", "inf", "", "9" * 5000])
def test_what_is_no_whole_number_is_said(flag, value, here, capsys):
    assert flag in error_of([*TRAIN, flag, value], capsys)
    assert not (here / "new").exists()


# ---------------------------------------------------------------- texts on a terminal


class Says:
    """A tokenizer for which every text is the same."""

    def __init__(self, text):
        self.text = text

    def decode(self, tokens, skip_special_tokens=True):
        return self.text


TEXTS = {
    "[INST] Hi [/INST]": "[INST] Hi [/INST]",
    "[red]blood[/red]": "[red]blood[/red]",
    "[/]": "[/]",
    ":smile: https://x.y": ":smile: https://x.y",
    "\x1b[2J\x1b]0;title\x07\r": "·[2J·]0;title··",
    "\u202ereversed\u061c\ufeff\xad\U000e0041": "·reversed····",
    "\ud800half": "·half",
}


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
@pytest.mark.parametrize("terminal", [False, True])
def test_texts_are_printed_as_they_are(text, terminal, monkeypatch, tmp_path):
    with (tmp_path / "out").open("w", encoding="utf-8") as out:
        monkeypatch.setattr(
            printing, "console", Console(file=out, force_terminal=terminal, width=200)
        )
        tokens = np.zeros(1, np.int64)
        said = SimpleNamespace(prompt=tokens, after_prompt=tokens, gold=0.0, score=np.nan)
        one = SimpleNamespace(episodes=[said])
        spec = SimpleNamespace(tokenizer=Says(text), chats=None)
        show_examples({"before": one, "after": one}, spec, 1)
    printed = (
        (tmp_path / "out").read_text(encoding="utf-8").replace("\x1b[1m", "").replace("\x1b[0m", "")
    )
    assert (
        printed
        == f"\n{TEXTS[text]} …\n  before (gold 0.0): {TEXTS[text]}\n  after (gold 0.0): {TEXTS[text]}\n"
    )


def test_an_error_that_quotes_a_file_is_one_plain_line(here, capsys):
    (here / "c.yaml").write_text('env: "[red]\\e[2J\\n\\u202E"\n')
    error = error_of(["train", "--config", "c.yaml"], capsys)
    assert error.count("\n") == 1
    assert "\x1b" not in error
    assert "\u202e" not in error


def test_a_terminal_may_lack_characters(here, monkeypatch):
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stderr", ascii_only)
    with pytest.raises(SystemExit):
        main(["show", "é"])
    ascii_only.flush()
    assert b"run_dir='?' has no episodes" in ascii_only.buffer.getvalue()


def test_the_flags_that_count_are_checked_in_python_too():
    with pytest.raises(ValueError, match="checkpoint_every=0"):
        Train(checkpoint_every=0)
