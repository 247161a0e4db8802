"""`tokenenv fit`: it trains and saves, or one line says what is allowed and nothing is left."""

import json
import os
import shlex
import signal

import fakes
import fitting
import pytest
from transformers import AutoModelForTokenClassification, AutoTokenizer

from tokenenv.cli import fit as command
from tokenenv.cli import main
from tokenenv.fit.objectives import OBJECTIVES

SMALL = ["--hidden-size", "32", "--num-layers", "1", "--epochs", "2", "--batch-examples", "8"]


def rows(examples):
    """Pairs as lines of data."""
    return [
        {
            "prompt_ids": e.texts[0].prompt.tolist(),
            "chosen_ids": e.texts[0].response.tolist(),
            "rejected_ids": e.texts[1].response.tolist(),
        }
        for e in examples
    ]


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder as `tokenenv sample` writes it, and files that are wrong."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    (tmp_path / "pairs").mkdir()
    write(tmp_path / "pairs" / "data.jsonl", rows(fitting.pairs(30)))
    fakes.tokenizer().save_pretrained(tmp_path / "pairs" / "tokenizer")
    write(tmp_path / "held.jsonl", rows(fitting.pairs(6, seed=1)))
    write(tmp_path / "empty.jsonl", [])
    write(tmp_path / "columns.jsonl", [{"prompt_ids": [3], "chosen_ids": [4]}])
    same = {"prompt_ids": [3], "chosen_ids": [4, 5], "rejected_ids": [4, 5]}
    write(tmp_path / "same.jsonl", [same, same])
    flat = {"prompt_ids": [3], "response_ids": [4, 5], "score": 1.0}
    write(tmp_path / "flat.jsonl", [flat, flat | {"prompt_ids": [4]}])
    (tmp_path / "file").write_text("x")
    return tmp_path


def fit(*words, data="pairs", out="rm"):
    main(["fit", "--data", data, "--out", out, *SMALL, *map(str, words)])


def test_it_trains_saves_and_says_how_the_model_is_used(here, capsys):
    fit("--held-out", "0.2", "--seed", "3")
    out, err = capsys.readouterr()
    assert "epoch 2 | loss" in err
    assert "Loading weights" not in err + out
    assert "held-out" in out
    assert "accuracy" in out
    assert "tokenenv train --env ENV --reward token --options reward_model rm" in out
    model = AutoModelForTokenClassification.from_pretrained("rm")
    assert model.num_labels == 1
    assert AutoTokenizer.from_pretrained("rm").get_vocab() == fakes.tokenizer().get_vocab()
    card = (here / "rm" / "README.md").read_text()
    assert "24 training examples, 6 held-out examples" in card
    assert "seed: 3" in (here / "rm" / "config.yaml").read_text()


def test_held_out_data_may_be_a_file(here, capsys):
    fit("--held-out", "held.jsonl")
    assert "30 training examples, 6 held-out" in (here / "rm" / "README.md").read_text()


def test_held_out_examples_that_are_trained_on_are_said(here, capsys):
    fit("--held-out", "pairs")
    assert "note: 60 of 60 held-out texts are in the training data too" in capsys.readouterr().out


def test_texts_that_are_too_long_are_left_out_and_said(here, capsys):
    fit("--max-length", "9", "--held-out", "0.2")
    said = capsys.readouterr().out
    assert "left out" in said
    assert "pairs/data.jsonl:" in said.replace(os.sep, "/")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--objective", "bt-summ"], "objective='bt-summ' is not known. Did you mean 'bt-sum'"),
        (["--epochs", "0"], "epochs=0 is not allowed; it must be a whole number, 1 or more"),
        (["--lr", "nan"], "lr=nan is not allowed; it must be a number, above 0"),
        (["--lr", "0"], "lr=0.0 is not allowed"),
        (["--warmup", "2"], "warmup=2.0 is not allowed; it must be a number, 0 to 1"),
        (["--coef", "-1"], "coef=-1.0 is not allowed"),
        (
            ["--held-out", "1"],
            "held_out=1.0 is not allowed; it must be a number, 0 or more and below",
        ),
        (["--held-out", "nowhere"], "held_out='nowhere' is neither a file nor a folder"),
        (["--max-batch-tokens", "0"], "max_batch_tokens=0"),
        (["--batch-examples", "-1"], "batch_examples=-1"),
        (["--patience", "0"], "patience=0"),
        (["--seed", "-1"], "seed=-1"),
        (
            ["--max-length", "1"],
            "max_length=1 is not allowed; it must be a whole number, 2 or more",
        ),
        (["--dtype", "int8"], "dtype='int8' is not known"),
        (["--device", "tpu9"], "device='tpu9' cannot be used here"),
        (["--hidden-size", "40"], "hidden_size=40"),
        (["--freeze", "--lora-rank", "4"], "freeze=True trains the head alone, and lora_rank=4"),
        (["--freeze"], "freeze=True leaves the trunk's weights as they are"),
        (["--model", "nowhere"], "nowhere"),
        (["--objective", "share-delta"], "teacher"),
        (["--data", "None"], "--data is missing"),
        (["--data", "nowhere"], "data='nowhere' is neither a file nor a folder"),
        (["--data", "empty.jsonl", "--tokenizer", "pairs/tokenizer"], "nothing to learn from"),
        (["--data", "columns.jsonl", "--tokenizer", "pairs/tokenizer"], "columns.jsonl:1"),
        (["--data", "same.jsonl", "--tokenizer", "pairs/tokenizer"], "nothing to learn from"),
        (["--data", "held.jsonl"], "model='new' needs a tokenizer"),
        (["--out", "file"], "out='file' is a file"),
        (["--out", "pairs"], "out='pairs' is not empty"),
        (["--resume"], "holds no run to go on with"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(here, capsys, words, message):
    before = sorted(path for path in here.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        fit(*words)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert sorted(path for path in here.rglob("*")) == before


def test_one_class_only_is_refused(here, capsys):
    with pytest.raises(SystemExit):
        fit("--objective", "score-end", "--tokenizer", "pairs/tokenizer", data="flat.jsonl")
    assert "all scores" in capsys.readouterr().err


def test_the_help_names_every_objective_and_every_setting(here, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, objective in OBJECTIVES.items():
        assert f"{name} ({objective.kind}): {' '.join(objective.summary.split())}" in shown
    assert "tokenenv sample --env tokenenv/Negation-v0" in shown
    assert "--held-out SHARE|FILE" in shown


# ----------------------------------------------------------------------------------------- signals


def at_step(monkeypatch, number, action):
    """Has `action` called when a run asks for the `number`th time whether it is to stop."""
    calls = []

    def asked(self):
        answer = original(self)
        calls.append(1)
        if len(calls) == number:
            action()
            return original(self)
        return answer

    original = command.Stop.__call__
    monkeypatch.setattr(command.Stop, "__call__", asked)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_saves_and_the_command_that_is_printed_goes_on(here, capsys, monkeypatch, name):
    fit("--held-out", "0.2", out="whole")
    one = signal.Signals[name]
    with monkeypatch.context() as patched:
        at_step(patched, 2, lambda: signal.raise_signal(one))
        with pytest.raises(SystemExit) as stop:
            fit("--held-out", "0.2", out="my run")
    assert stop.value.code == 128 + one
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"stopped by {name}; saved; go on with: tokenenv fit --resume --out 'my run'"
    assert not (here / "my run" / "README.md").exists()
    main(shlex.split(said.partition("go on with: tokenenv ")[2]))
    whole, parts = ((here / run / "model.safetensors").read_bytes() for run in ("whole", "my run"))
    assert whole == parts


def test_a_run_that_goes_on_takes_its_settings_from_its_folder(here, capsys, monkeypatch):
    with monkeypatch.context() as patched:
        at_step(patched, 2, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(SystemExit):
            fit("--held-out", "0.2")
    for words, message in {
        ("--lr", "0.5"): "lr is None there and 0.5 here",
        ("--held-out", "0.4"): "has other examples now",
        ("--objective", "bt-mean"): "objective is 'bt-sum' there and 'bt-mean' here",
    }.items():
        with pytest.raises(SystemExit):
            main(["fit", "--resume", "--out", "rm", *words])
        assert message in capsys.readouterr().err
    config = here / "rm" / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("teacher: null", "teacher: http://evil.example"))
    with pytest.raises(SystemExit):
        main(["fit", "--resume", "--out", "rm"])
    assert "which no file can ask for" in capsys.readouterr().err
    config.write_text(text)
    main(["fit", "--resume", "--out", "rm"])
    assert (here / "rm" / "README.md").exists()


def test_a_signal_before_the_first_step_ends_at_once_and_leaves_nothing(here, capsys, monkeypatch):
    monkeypatch.setattr(command, "fit", lambda *args, **kwargs: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        fit()
    assert stop.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err.strip() == "stopped by SIGTERM"
    assert not (here / "rm").exists()
