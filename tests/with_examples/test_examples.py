"""Every example runs, in a process of its own, for a few hundred steps; the documentation's
snippets run as they stand."""

import ast
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tokenenv
from tokenenv.cli import main

ROOT = Path(__file__).parents[2]
FEW = ["--total-steps", "512", "--num-steps", "16"]
EXAMPLES = {
    "chat": ("chat.py", ["--total-tokens", "300", "--num-envs", "4"]),
    "custom_algorithm": ("custom_algorithm.py", ["--total-tokens", "300", "--num-envs", "8"]),
    "gspo": ("gspo.py", ["--total-tokens", "300", "--num-envs", "8"]),
    "reshaping": ("reshaping.py", ["--total-tokens", "300", "--num-envs", "8"]),
    "cleanrl_ppo-cartpole": ("cleanrl_ppo.py", FEW),
    "cleanrl_ppo-negation": (
        "cleanrl_ppo.py",
        ["--env-id", "tokenenv/Negation-v0", *FEW],
    ),
    "cleanrl_ppo-options": (
        "cleanrl_ppo.py",
        ["--env-id", "tokenenv/Negation-v0", "--env-options", "max_new_tokens", "8", *FEW],
    ),
    "cleanrl_ppo-reviews": ("cleanrl_ppo.py", ["--env-id", "tokenenv/Reviews-v0", *FEW]),
    "torchrl_ppo": (
        "torchrl_ppo.py",
        ["--total-steps", "512", "--batch-steps", "256", "--num-envs", "8"],
    ),
}


def run(arguments, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, tmp_path):
    file, flags = EXAMPLES[name]
    done = run([str(ROOT / "examples" / file), *flags], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "nan" not in done.stdout.lower().replace("negation", "")


def test_answers_in_a_column(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "answers.py"))["main"](total_tokens=600)
    shares = re.search(r"right answers: ([\d.]+) before, ([\d.]+) after", capsys.readouterr().out)
    assert all(0.5 < float(share) < 1 for share in shares.groups())


def test_answers_from_the_command_line(tmp_path, monkeypatch, capsys):
    """The commands of the example's docstring, with fewer tokens."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    (tmp_path / "envs").symlink_to(ROOT / "envs")
    monkeypatch.chdir(tmp_path / "examples")
    monkeypatch.syspath_prepend(tmp_path / "examples")
    text = Path("answers.py").read_text(encoding="utf-8").replace("\\\n", "")
    train, evaluate = (line.split() for line in re.findall(r"^ +tokenenv (.*)", text, re.M))
    main([word.replace("20000", "300") for word in train])
    main([*evaluate, "--num-texts", "32"])
    row = re.search(r"score\D+([\d.]+)\D+[\d.]+\D+([\d.]+)", capsys.readouterr().out)
    assert all(0 < float(share) <= 1 for share in row.groups())
    first = Path("runs/answers/episodes.jsonl").read_text(encoding="utf-8").split("\n")[0]
    episode = json.loads(first)
    assert episode["columns"]["answer"] == str(sum(map(int, episode["prompt"][:-1].split("+"))))


def test_custom_reward(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "custom_reward.py"))["main"](
        total_tokens=200, num_texts=8
    )
    printed = capsys.readouterr().out
    assert "milestones: " in printed
    assert "terminal: " in printed


def test_the_demo_runs(tmp_path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(ROOT / "examples" / "demo.py"))["main"]
    main.__globals__.update(TOTAL_TOKENS=300, TEXTS=4)
    main()
    assert "run folder: runs/demo-" in capsys.readouterr().out.replace("\n", "")


def test_the_benchmark_of_learning_finds_its_parts():
    assert callable(runpy.run_path(str(ROOT / "benchmarks" / "learning.py"))["main"])


def test_the_single_file_solves_cartpole(tmp_path):
    flags = ["--total-steps", "40000", "--lr", "3e-3"]
    done = run([str(ROOT / "examples" / "cleanrl_ppo.py"), *flags], tmp_path)
    first, last = map(
        float, re.search(r"mean return ([\d.]+) first, ([\d.]+) last", done.stdout).groups()
    )
    assert first < 60
    assert last > 300


def test_the_single_file_knows_nothing_of_this_package_but_its_name():
    tree = ast.parse((ROOT / "examples" / "cleanrl_ppo.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    froms = {node.module.split(".")[0] for node in imports if isinstance(node, ast.ImportFrom)}
    assert "tokenenv" in names
    assert "tokenenv" not in froms
    attributes = {
        node.value.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    assert "tokenenv" not in attributes


def test_a_new_algorithm_is_short_and_touches_nothing():
    text = (ROOT / "examples" / "custom_algorithm.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150


def test_the_readme_shows_the_quickstart(tmp_path):
    """The block is the file, and the file runs (with fewer tokens)."""
    text = (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8")
    assert f"```python\n{text}```" in (ROOT / "README.md").read_text(encoding="utf-8")
    short = text.replace("total_tokens=20_000", "total_tokens=600")
    assert short != text
    done = run(["-c", short], tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"tokenenv {tokenenv.__version__}" in done.stdout


def test_the_notebook_runs_from_top_to_bottom(monkeypatch, capsys):
    """Its cells are plain Python, so they run here without a kernel; `make docs` runs it in one."""
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    cells = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))[
        "cells"
    ]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    names = {"__name__": "__main__"}
    for cell in code:
        exec("".join(cell["source"]), names)
    assert names["closed"] > 0.8  # of the way from the reference to the optimum
    assert names["optimal"].regret == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("page", ["quickstart.md", "stable-baselines3.md", "reading-a-run.md"])
def test_the_snippets_of_a_page_run(page, tmp_path):
    """One after the other, in one process, as a reader would paste them."""
    snippets = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.S
    )
    assert snippets
    done = run(["-c", "\n".join(snippets)], tmp_path)
    assert done.returncode == 0, done.stderr
