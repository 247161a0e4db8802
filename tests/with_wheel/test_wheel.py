"""What is built and installed: a source distribution, the wheel made from it, and what its users
do first."""

import subprocess
import sys
import zipfile
from dataclasses import fields
from email import message_from_bytes
from pathlib import Path

import pytest

import tokenenv
from tokenenv.agents import ALGORITHMS

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
WHEEL = ROOT / "dist" / f"tokenenv_rl-{tokenenv.__version__}-py3-none-any.whl"
INSTALLED_AS = {"tokenenv": "tokenenv", "agents": "tokenenv/agents", "envs": "tokenenv/envs"}
DIST_INFO = f"tokenenv_rl-{tokenenv.__version__}.dist-info"
CHECKED = """
import gymnasium as gym

import tokenenv
from tokenenv import agents

print(tokenenv.__version__)
envs = gym.make_vec("tokenenv/Reviews-v0", num_envs=8)
"""


@pytest.fixture(scope="module")
def names():
    with zipfile.ZipFile(WHEEL) as file:
        return file.namelist()


@pytest.fixture
def user(tmp_path):
    """Run a command of the environment in an empty folder; return what it prints."""

    def run(command, *arguments):
        done = subprocess.run(
            [BIN / command, *map(str, arguments)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def sources(pattern):
    """The repository's files as they are to be installed."""
    return {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in INSTALLED_AS.items()
        for path in (ROOT / folder).glob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_build_has_nothing_to_warn_of():
    """setuptools frames its warnings with "!!"; of `assets/` it said that a package was missing."""
    printed = (ROOT / "build" / "wheel.log").read_text(encoding="utf-8")
    assert WHEEL.name in printed
    assert "!!" not in printed


def test_the_wheel_holds_the_package_and_nothing_beside_it(names):
    assert {name.split("/")[0] for name in names} == {"tokenenv", DIST_INFO}


def test_the_wheel_holds_every_module_under_its_installed_name(names):
    modules = {name for name in names if name.endswith(".py")}
    assert modules == sources("**/*.py")
    assert {
        "tokenenv/env/vector_env.py",
        "tokenenv/agents/algorithms/ppo.py",
        "tokenenv/envs/textgen.py",
    } <= modules


def test_the_wheel_holds_the_bundled_models_and_the_type_marker(names):
    files = {name for name in names if name.startswith("tokenenv/") and not name.endswith(".py")}
    pages = {"tokenenv/agents/run/show.html", "tokenenv/report/report.html"}
    assert files == sources("assets/**/*") | {"tokenenv/py.typed"} | pages
    assert {".json", ".safetensors"} <= {Path(name).suffix for name in files}


def test_the_metadata(names):
    with zipfile.ZipFile(WHEEL) as file:
        metadata = message_from_bytes(file.read(f"{DIST_INFO}/METADATA"))
        scripts = file.read(f"{DIST_INFO}/entry_points.txt").decode()
    assert scripts.split() == ["[console_scripts]", "tokenenv", "=", "tokenenv.cli:main"]
    assert metadata["Name"] == "tokenenv-rl"
    assert metadata["Version"] == tokenenv.__version__
    assert f"{DIST_INFO}/licenses/LICENSE" in names


def test_the_quickstart_runs(user):
    assert user("python", ROOT / "examples" / "quickstart.py").split()[-1] == tokenenv.__version__


def test_the_command_line_trains_evaluates_and_shows(user, tmp_path):
    assert "train" in user("tokenenv", "--help")
    user(
        *["tokenenv", "train", "--env", "tokenenv/Reviews-v0", "--num-envs", 8],
        *["--total-tokens", 400, "--agent.batch-tokens", 200, "--run-dir", "run"],
    )
    assert "distinct bigrams" in user("tokenenv", "evaluate", "run", "--num-texts", 16)
    user("tokenenv", "show", "run")
    assert (tmp_path / "run" / "episodes.html").is_file()


def test_mypy_knows_every_keyword_of_every_agent_and_refuses_others(user, tmp_path):
    """A user's file, without settings: each field is taken, and an unknown one is an error."""
    lines = [CHECKED]
    for agent in ALGORITHMS.values():
        config = agent.config_class()
        taken = [f"{field.name}={getattr(config, field.name)!r}" for field in fields(config)]
        lines += [
            f"agents.{agent.__name__}(envs, policy=None, run_dir=None, {', '.join(taken)})",
            f"agents.{agent.__name__}(envs, config=agents.{type(config).__name__}(seed=1))",
            f"agents.{agent.__name__}(envs, learning_rate=1)  # type: ignore[call-arg]",
            f'agents.{agent.__name__}(envs, seed="1")  # type: ignore[arg-type]',
        ]
    (tmp_path / "typed.py").write_text("\n".join(lines))
    assert "no issues found in 1 source file" in user("mypy", "--warn-unused-ignores", "typed.py")
