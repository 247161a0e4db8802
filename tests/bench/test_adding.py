"""Designs and environments of other people's code in a grid: the files of docs/bench.md."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from tokenenv import plugins
from tokenenv.bench import bench
from tokenenv.bench import run as running
from tokenenv.bench.events import Event, played
from tokenenv.bench.file import read_grid
from tokenenv.cli import main
from tokenenv.cli.console import console
from tokenenv.errors import InvalidArgument

PAGE = (Path(__file__).parents[2] / "docs" / "bench.md").read_text(encoding="utf-8")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the page's files, where imports begin."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    for name, text in re.findall(r'```\w+ title="([\w.-]+)"\n(.*?)```', PAGE, re.DOTALL):
        Path(name).write_text(text)
    yield tmp_path
    sys.modules.pop("my_designs", None)


def test_the_pages_first_grid_is_one(here):
    grid = read_grid(Path("my-grid.yaml"))
    assert "mixed, rloo" in grid.row_labels()
    assert len(grid.cells()) == (4 * 2 + 1) * 5 + (3 * 2 + 1) * 5


def test_the_pages_design_and_environment_enter_a_grid(here, capsys, monkeypatch):
    monkeypatch.setattr(console, "_width", 200)
    command = re.search(r"tokenenv (bench mine\.yaml --modules .*)", PAGE)[1]
    with pytest.raises(SystemExit):
        main(["bench", "mine.yaml"])
    assert "--modules my_designs" in capsys.readouterr().err
    main([*shlex.split(command), "--out", "out", "--workers", "1"])
    said = capsys.readouterr()
    assert "6 of 6 cells" in said.err
    assert "both" in said.out
    assert "better than terminal" in said.out
    lines = Path("out/results.csv").read_text().splitlines()
    assert len(lines) == 1 + 6 * 2
    # What the folder says of itself is the same grid again.
    again = read_grid(Path("out/grid.yaml"), ["my_designs"])
    assert again == read_grid(Path("mine.yaml"), ["my_designs"])
    with pytest.raises(InvalidArgument, match="imports the module 'my_designs'"):
        read_grid(Path("out/grid.yaml"))


def test_a_plugins_names_need_no_module(here, monkeypatch):
    site = here / "site"
    (site / "mine-1.0.dist-info").mkdir(parents=True)
    Path("my_designs.py").rename(site / "my_designs.py")
    (site / "mine-1.0.dist-info" / "METADATA").write_text("Name: mine\nVersion: 1.0\n")
    points = re.search(r"```toml\n(\[project\.entry-points.*?)```", PAGE, re.DOTALL)[1]
    points = re.sub(r'\[project\.entry-points\."(.*)"\]', r"[\1]", points).replace('"', "")
    (site / "mine-1.0.dist-info" / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(site)
    plugins._entry_points.cache_clear()
    Path("plugin.yaml").write_text("designs: {even: even, both: {a: even, end: terminal}}")
    monkeypatch.setitem(running.LAUNCHERS, "local", here_and_now)
    settings = {"env": "tokenenv/Negation-v0", "num_envs": 4, "total_tokens": 64}
    settings["options"] = {"max_new_tokens": 4}
    try:
        grid = read_grid(Path("plugin.yaml"), settings=settings, seeds=1, points=1, texts=4)
        found = bench(grid, here / "out")
    finally:
        plugins._entry_points.cache_clear()
    assert found.failed == {}
    mixture = str({"a": "even", "end": "terminal"})
    assert {line["reward"] for line in found.lines} == {"even", mixture}


def here_and_now(cells, workers, on_event):
    for cell in cells:
        on_event(Event(cell, *played(cell)))
