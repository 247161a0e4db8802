"""Benches from end to end: what is kept, what is run again, and what the table says."""

import csv
import json
import multiprocessing
import sys

import pytest

from tokenenv.agents import PPO
from tokenenv.bench import Grid, bench, processes
from tokenenv.bench import run as running
from tokenenv.bench.cells import train_of
from tokenenv.bench.events import Event, played
from tokenenv.bench.play import play
from tokenenv.bench.processes import run_in_processes
from tokenenv.bench.versions import versions
from tokenenv.errors import InvalidArgument

SETTINGS = {
    "env": "tokenenv/DelayedKey-v0",
    "num_envs": 8,
    "total_tokens": 100,
    "options": {"max_new_tokens": 4, "vocab_size": 8, "num_keys": 2},
    "agent": {"batch_tokens": 32, "lr": 1e-3, "epochs": 1, "minibatches": 1},
}
"""A run of a tenth of a second."""


def grid(**values):
    given = {"settings": SETTINGS, "seeds": 2, "points": 2, "texts": 8}
    return Grid(**given | {"designs": {"end": "terminal", "good": "oracle"}} | values)


@pytest.fixture
def in_process(monkeypatch):
    """Plays cells in this process, and notes which."""
    played_cells = []

    def launch(cells, workers, on_event):
        for cell in cells:
            played_cells.append(cell.name)
            on_event(Event(cell, "began"))
            on_event(Event(cell, *played(cell)))

    monkeypatch.setitem(running.LAUNCHERS, "local", launch)
    return played_cells


@pytest.fixture
def in_no_time(in_process, monkeypatch):
    """The same, with a record that is made up."""

    def play(settings, points, texts, on_tokens):
        point = {"point": 0, "tokens": 0, "gold": 0.5, "share": None, "train_gap": 0.0}
        return {"settings": settings, "versions": versions(), "points": [point] * (points + 1)}

    monkeypatch.setattr("tokenenv.bench.play.play", play)
    return in_process


def test_the_table_has_a_line_for_each_evaluation(tmp_path, in_process):
    found = bench(grid(), tmp_path / "out")
    names = "results", "summary", "comparisons"
    assert [path.name for path in found.written] == [
        f"{name}.{kind}" for name in names for kind in ("csv", "parquet")
    ]
    lines = list(csv.DictReader(found.written[0].open()))
    assert len(lines) == len(found.lines) == 2 * 2 * 3
    for line, read in zip(found.lines, lines, strict=True):
        assert list(line) == list(read)
        assert {k: "" if v is None else str(v) for k, v in line.items()} == read
    first, last = found.lines[0], found.lines[2]
    assert (first["tokens"], first["train_texts"], first["train_proxy"]) == (0, 0, None)
    assert last["tokens"] >= 100
    assert last["reward"] == "terminal"
    assert last["agent.lr"] == 1e-3
    assert last["agent.clip_range"] == 0.2  # a default, written out
    assert last["options.kl_coef"] == train_of(SETTINGS).make_envs().kl_coef
    assert last["status"] == "finished"
    assert {"torch", "python", "tokenenv", "code"} <= set(last)


def test_parquet_and_csv_hold_the_same(tmp_path, in_process):
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = {"mixed": {"reward": {"a": ["oracle", 0.5]}}, "none": {"reward": None}}
    found = bench(grid(rows=rows, seeds=1), tmp_path / "out")
    assert parquet.read_table(found.written[1]).to_pylist() == found.lines


def test_without_pyarrow_there_is_the_csv(tmp_path, in_no_time, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    found = bench(grid(seeds=1), tmp_path / "out")
    names = [path.name for path in found.written]
    assert names == ["results.csv", "summary.csv", "comparisons.csv"]


def test_finished_cells_are_not_run_again(tmp_path, in_no_time):
    before = bench(grid(), tmp_path / "out").lines
    assert len(in_no_time) == 4
    in_no_time.clear()
    assert bench(grid(), tmp_path / "out").lines == before
    # Another label is no other cell; another seed and another setting are.
    labels = {"terminal": "terminal", "good": {"reward": "oracle", "agent": {"lr": 2e-3}}}
    bench(grid(designs=labels, seeds=[0, 2]), tmp_path / "out")
    assert sorted(in_no_time) == [
        "tokenenv/DelayedKey-v0 / good / seed 0",
        "tokenenv/DelayedKey-v0 / good / seed 2",
        "tokenenv/DelayedKey-v0 / terminal / seed 2",
    ]


def test_rows_with_the_same_settings_are_run_once(tmp_path, in_no_time):
    found = bench(grid(rows={"again": {"reward": "terminal"}}, seeds=1), tmp_path / "out")
    assert len(in_no_time) == 2
    assert len({line["row"] for line in found.lines}) == 3


def test_a_failed_cell_stops_no_other_and_is_tried_again_on_demand(tmp_path, in_process):
    wrong = grid(designs={"bad": "process", "end": "terminal"}, seeds=1)
    found = bench(wrong, tmp_path / "out")
    name = "tokenenv/DelayedKey-v0 / bad / seed 0"
    assert list(found.failed) == [name]
    assert "step_end_token_ids" in found.failed[name]
    assert [line["status"] for line in found.lines] == ["failed"] + 3 * ["finished"]
    in_process.clear()
    assert bench(wrong, tmp_path / "out").failed == found.failed
    assert in_process == []
    bench(wrong, tmp_path / "out", retry=True)
    assert in_process == [name]


def test_a_cell_that_raises_anything_is_recorded(tmp_path, in_process, monkeypatch):
    monkeypatch.setattr("tokenenv.bench.play.Curve", lambda *_: 1 // 0)
    failed = bench(grid(seeds=1), tmp_path / "out").failed
    assert {error.partition(" (")[0] for error in failed.values()} == {
        "ZeroDivisionError: integer division or modulo by zero"
    }


def test_a_cell_gives_the_same_numbers_again():
    def numbers():
        points = play({**SETTINGS, "reward": "oracle"}, 2, 8)["points"]
        return [{k: v for k, v in point.items() if "seconds" not in k} for point in points]

    assert numbers() == numbers()


def test_a_cell_learns_what_the_agent_alone_learns():
    """The evaluations on the way change nothing."""
    train = train_of(SETTINGS)
    agent = PPO(train.make_envs(), train.agent)
    agent.learn(100)
    last = play(SETTINGS, 4, 8)["points"][-1]
    assert (last["tokens"], last["updates"]) == (agent.tokens_seen, agent.updates)
    assert last["train_length"] == agent.metrics["episode/length"]
    one = play(SETTINGS, 1, 8)["points"][-1]
    assert [one[k] for k in ("gold", "kl", "regret")] == [last[k] for k in ("gold", "kl", "regret")]


def test_processes_play_what_this_process_plays_and_may_die(tmp_path, monkeypatch):
    """Forked ones, which need no imports; test_adding.py has one that is begun anew, as users do."""
    forking = multiprocessing.get_context("fork")
    monkeypatch.setattr(processes.multiprocessing, "get_context", lambda kind: forking)
    (tmp_path / "deadly.py").write_text(
        "import os, signal\ndef brief(prompt, response):\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    monkeypatch.syspath_prepend(tmp_path)
    reviews = {"env": "tokenenv/Reviews-v0", "options": {}}
    whole = {name: value for name, value in SETTINGS.items() if name != "options"}
    rows = {
        "end": {"options": SETTINGS["options"]},
        "bad": {"reward": "process"},
        "deadly": reviews | {"reward": "deadly:brief"},
        "after": {"options": SETTINGS["options"], "reward": "oracle"},
    }
    cells = grid(designs={}, rows=rows, settings=whole, seeds=1).cells()
    events = []
    run_in_processes(cells, 1, events.append)
    ended = {e.cell.row: (e.kind, e.value) for e in events if e.kind in ("finished", "failed")}
    # A process that dies fails its cell alone, and another one takes its place.
    assert ended["deadly"] == ("failed", "its process ended with SIGKILL; was there enough memory?")
    assert ended["after"][0] == "finished"
    assert ended["bad"][0] == "failed"
    assert "step_end_token_ids" in ended["bad"][1]
    here, there = played(cells[0])[1], ended["end"][1]
    for one, other in zip(here["points"], there["points"], strict=True):
        assert one["regret"] == pytest.approx(other["regret"], abs=1e-6)
    assert there["versions"] == here["versions"]
    assert any(e.kind == "learns" for e in events)


def test_a_listener_that_is_interrupted_leaves_whole_cells(tmp_path, in_no_time):
    def stop(event):
        if event.kind == "finished":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(grid(), tmp_path / "out", on_event=stop)
    assert len(in_no_time) == 1
    files = list((tmp_path / "out" / "cells").iterdir())
    assert [path.suffix for path in files] == [".json"]
    assert json.loads(files[0].read_text())["points"]
    assert len(list(csv.DictReader((tmp_path / "out" / "results.csv").open()))) == 3
    in_no_time.clear()
    bench(grid(), tmp_path / "out")
    assert len(in_no_time) == 3


def test_a_damaged_cell_is_named(tmp_path, in_no_time):
    bench(grid(seeds=1), tmp_path / "out")
    path = next((tmp_path / "out" / "cells").iterdir())
    path.write_text(path.read_text()[:100])
    with pytest.raises(InvalidArgument, match=f"{path.name} cannot be read .* remove it"):
        bench(grid(seeds=1), tmp_path / "out")


def test_arguments_are_checked(tmp_path, in_no_time):
    for wrong, message in (
        ({"workers": 0}, "workers=0 must be"),
        ({"launcher": "slurm"}, "launcher='slurm' is not known"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            bench(grid(), tmp_path / "out", **wrong)
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgument, match="is a file"):
        bench(grid(), tmp_path / "file")
