"""`tokenenv sample`: the folder that it writes, and what it prints."""

import json

import pytest

from tokenenv.cli import main
from tokenenv.cli.console import counting


def run(out, *more):
    env = ["--env", "tokenenv/Negation-v0", "--options", "max_new_tokens", "4"]
    main(["sample", "--out", str(out), "--num-envs", "8", "--num-examples", "4", *env, *more])


def rows_of(out):
    return [json.loads(line) for line in (out / "data.jsonl").open()]


def test_it_writes_a_folder_that_fit_takes_and_says_what_is_in_it(tmp_path, capsys):
    run(tmp_path / "pairs", "--seed", "3")
    printed = capsys.readouterr().out
    assert "Examples: 4" in printed
    assert "Ties:" in printed
    assert {path.name for path in (tmp_path / "pairs").iterdir()} >= {
        "data.jsonl",
        "tokenizer",
        "README.md",
    }
    assert all(row["chosen_score"] > row["rejected_score"] for row in rows_of(tmp_path / "pairs"))
    assert "seed: 3" in (tmp_path / "pairs" / "README.md").read_text()
    run(tmp_path / "again", "--seed", "3")
    assert rows_of(tmp_path / "again") == rows_of(tmp_path / "pairs")


def test_values_come_with_their_errors(tmp_path):
    run(tmp_path / "v", "--kind", "values", "--continuations", "4", "--every", "2", "--beta", "0.5")
    for row in rows_of(tmp_path / "v"):
        assert row["values"][3] == row["score"]
        assert [value is None for value in row["values"]] == [True, False, True, False]
        assert row["value_errors"][3] == 0
        assert row["prompt_value_error"] >= 0


def test_a_folder_of_something_else_is_refused_before_anything_is_sampled(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(SystemExit):
        run(tmp_path, "--env", "tokenenv/NoSuch-v0")
    assert "thesis.tex" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_progress_says_what_is_counted(capsys, monkeypatch):
    monkeypatch.setattr("tokenenv.cli.console.QUICK", 0.0)
    with counting("sampled", "examples") as on_text:
        on_text(3, 7)
    assert "sampled: 3 of 7 examples" in capsys.readouterr().err
