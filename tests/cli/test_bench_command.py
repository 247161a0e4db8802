"""`tokenenv bench`: what it prints, and how it goes on."""

import io
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from processes import start, wait, wait_until
from rich.console import Console

from tokenenv.bench import Grid
from tokenenv.bench import run as running
from tokenenv.bench.events import Event, played
from tokenenv.bench.live import Progress
from tokenenv.cli import main
from tokenenv.cli.bench import Bench
from tokenenv.cli.console import console

SMALL = ["--env", "tokenenv/DelayedKey-v0", "--options", "max_new_tokens", "4"]
SMALL += ["--num-envs", "8", "--total-tokens", "100", "--agent", "batch_tokens", "64"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setattr(console, "_width", 200)  # wide enough for the tables

    def launch(cells, workers, on_event):
        for cell in cells:
            on_event(Event(cell, "began"))
            on_event(Event(cell, *played(cell)))

    monkeypatch.setitem(running.LAUNCHERS, "local", launch)
    return tmp_path


def error_of(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *argv])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_a_grid_of_flags(here, capsys):
    main(["bench", *SMALL, "--reward", "terminal", "oracle", "--seeds", "2"])
    said = capsys.readouterr()
    assert "4 of 4 cells | DelayedKey-v0 / oracle / seed 1: gold" in said.err
    assert "better than terminal" in said.out
    assert "results: runs/bench/grid" in said.out
    assert len(Path("runs/bench/grid/results.csv").read_text().splitlines()) > 4
    # The folder's own grid is the same bench, of which nothing is left to do.
    main(["bench", "runs/bench/grid/grid.yaml", "--out", "runs/bench/grid"])
    assert "of 4 cells" not in capsys.readouterr().err


def test_flags_go_before_the_file(here):
    Path("mine.yaml").write_text(
        "total_tokens: 999\nrows: {a: {agent: {lr: 1}, options: {kl_coef: 1}}}"
    )
    command = Bench(grid=Path("mine.yaml"), total_tokens=5, agent={"lr": "2e-3"}, seeds=1)
    (cell,) = command.read().cells()
    assert cell.settings["total_tokens"] == 5
    assert cell.settings["agent"] == {"lr": 2e-3, "seed": 0}
    assert cell.settings["options"] == {"kl_coef": 1}


def test_failed_cells_are_named_and_the_status_is_1(here, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *SMALL, "--reward", "process", "terminal", "--seeds", "1"])
    assert stopped.value.code == 1
    said = capsys.readouterr()
    assert "failed: DelayedKey-v0 / process / seed 0: reward='process' needs" in said.err
    assert "1 cells failed; --retry tries them again" in said.err
    assert "0 of 1" in said.out


def test_cells_of_other_code_are_said(here, capsys):
    argv = ["bench", *SMALL, "--seeds", "1"]
    main(argv)
    assert "another state" not in capsys.readouterr().err
    path = next(Path("runs/bench/grid/cells").iterdir())
    record = json.loads(path.read_text())
    record["versions"]["code"] = "other"
    path.write_text(json.dumps(record))
    main(argv)
    assert "1 of the cells were made by another state of tokenenv's code" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["none.yaml"], "'none.yaml' cannot be read: No such file or directory."),
        (["none.yaml", "--suite", "quick"], "give one of the three"),
        (["--suite", "none"], "suite='none' is neither"),
        (["--env", "tokenenv/None-v0"], "env='tokenenv/None-v0' is not known"),
        (["--agent", "lrr", "3"], "the agent's setting of PPOConfig='lrr' is not known"),
        (["--agent", "learning_rate", "3"], "it is called 'lr' here"),
        (["--workers", "0"], "workers=0 must be a whole number"),
    ],
)
def test_what_is_wrong_is_one_line(here, capsys, argv, message):
    said = error_of(argv, capsys)
    assert message in said
    assert said.count("\n") == 1


def test_a_terminal_shows_a_live_table(here):
    grid = Grid(designs={"end": "terminal", "good": "oracle"}, seeds=2)
    cells = grid.cells()
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    progress = Progress(cells, [cells[3].key], console)
    with progress.shown():
        progress(Event(cells[0], "began"))
        progress(Event(cells[0], "learns", 100_000))
        progress(Event(cells[1], "finished", {"points": [{"gold": 0.25}]}))
        progress(Event(cells[2], "failed", "no"))
    said = console.file.getvalue()
    for shown in ("2 of 4 cells, 1 failed", "50%", "✓", "✗", "0.250"):
        assert shown in said


def test_ctrl_c_is_one_sentence_and_keeps_what_has_finished(here, capsys, monkeypatch):
    launch = running.LAUNCHERS["local"]

    def interrupted(cells, workers, on_event):
        launch(cells[:1], workers, on_event)
        raise KeyboardInterrupt

    monkeypatch.setitem(running.LAUNCHERS, "local", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *SMALL, "--seeds", "2"])
    assert stopped.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert len(list(Path("runs/bench/grid/cells").iterdir())) == 1
    assert Path("runs/bench/grid/results.csv").read_text().count("finished") > 1


def test_a_bench_that_is_killed_goes_on(here, capsys):
    """SIGKILL costs no finished cell, and leaves no half of one."""
    argv, out = ["bench", *SMALL, "--seeds", "6", "--out", here / "out"], here / "out"
    pid = start(argv, here / "said")
    wait_until(lambda: list(out.glob("cells/*.json")), pid)
    os.kill(pid, signal.SIGKILL)
    wait(pid)
    before = {path: path.stat().st_mtime_ns for path in out.glob("cells/*.json")}
    assert 1 <= len(before) < 6
    main([str(word) for word in argv])
    assert "6 of 6 cells" in capsys.readouterr().err
    cells = list((out / "cells").iterdir())
    assert {path.suffix for path in cells} == {".json"}
    assert len(cells) == 6
    assert {path: path.stat().st_mtime_ns for path in before} == before
