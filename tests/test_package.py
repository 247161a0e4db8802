"""What is built and installed: a source distribution, and the wheel made from it."""

import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import tokenenv

ROOT = Path(__file__).parents[1]
NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
INSTALLED_AS = {"tokenenv": "tokenenv", "agents": "tokenenv/agents", "envs": "tokenenv/envs"}
DIST_INFO = f"tokenenv_rl-{tokenenv.__version__}.dist-info"


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """The wheel's path, and what its build printed.

    Built from a copy, because a build leaves its own folders, and stale ones end up in the next
    wheel.
    """
    folder = tmp_path_factory.mktemp("build")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCE)
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(folder / "source"),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    wheel = folder / f"tokenenv_rl-{tokenenv.__version__}-py3-none-any.whl"
    return wheel, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(build):
    return build[0]


@pytest.fixture(scope="module")
def names(wheel):
    with zipfile.ZipFile(wheel) as file:
        return file.namelist()


def sources(pattern):
    """The repository's files as they are to be installed."""
    return {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in INSTALLED_AS.items()
        for path in (ROOT / folder).glob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_build_has_nothing_to_warn_of(build):
    """setuptools frames its warnings with "!!"; of `assets/` it said that a package was missing."""
    assert "!!" not in build[1]


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
    assert files == sources("assets/**/*") | {"tokenenv/py.typed", "tokenenv/agents/run/show.html"}
    assert {".json", ".safetensors"} <= {Path(name).suffix for name in files}


def test_the_metadata(wheel, names):
    with zipfile.ZipFile(wheel) as file:
        metadata = message_from_bytes(file.read(f"{DIST_INFO}/METADATA"))
        scripts = file.read(f"{DIST_INFO}/entry_points.txt").decode()
    assert scripts.split() == ["[console_scripts]", "tokenenv", "=", "tokenenv.cli:main"]
    assert metadata["Name"] == "tokenenv-rl"
    assert metadata["Version"] == tokenenv.__version__
    assert f"{DIST_INFO}/licenses/LICENSE" in names


def test_the_unpacked_wheel_runs_on_its_own(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import gymnasium as gym, tokenenv, tokenenv.agents, tokenenv.cli
envs = gym.make_vec("tokenenv/Reviews-v0", num_envs=2)
envs.reset(seed=0)
print(tokenenv.__file__, tokenenv.agents.__file__, type(envs.unwrapped).__module__)
tokenenv.cli.main(["version"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    inside = tmp_path / "tokenenv"
    assert done.stdout.split() == [
        str(inside / "__init__.py"),
        str(inside / "agents" / "__init__.py"),
        "tokenenv.env.vector_env",
        tokenenv.__version__,
    ]
