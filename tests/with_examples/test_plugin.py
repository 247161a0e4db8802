"""The plugin package of `examples/plugin`, installed as a user would install it. Its commands start a
dozen processes."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from shells import FLAGS, TOKENENV, flat, shell

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "examples" / "plugin"
NOT_SOURCE = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of an installation, to be put on PYTHONPATH. It is built from a copy, because a
    build leaves its own folders."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(PLUGIN, folder / "source", ignore=NOT_SOURCE)
    install(folder / "source", folder / "site")
    return folder / "site"


def install(source, target):
    command = [sys.executable, "-m", "pip", "install", *FLAGS, "--target", str(target), str(source)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_plugin_appears_trains_goes_on_and_is_evaluated(installed, tmp_path):
    small = "--num-envs 4 --total-tokens 60 --agent.batch-tokens 30"
    script = f"""
        {TOKENENV} envs
        {TOKENENV} rewards
        {TOKENENV} train --algo mean-baseline --help
        {TOKENENV} train --env my/Reverse-v0 --reward '{{right: token, new: [novelty, 0.1]}}' \\
            --algo mean-baseline {small} --agent.baseline 0.5 --run-dir x
        {TOKENENV} train --resume x --total-tokens 120
        {TOKENENV} evaluate x --num-texts 8 --examples 1
        {TOKENENV} show x
    """
    done = shell(script, tmp_path, installed)
    assert done.returncode == 0, done.stderr
    printed = flat(done.stdout)
    assert (
        "my/Reverse-v0 write the letters of the prompt backwards. (plugin tokenenv-reverse 1.0)"
        in printed
    )
    assert (
        "has not used before, 1 in all for a text without repetitions (plugin tokenenv-reverse 1.0)"
        in printed
    )
    assert "Installed plugins add my/Reverse-v0 (tokenenv-reverse 1.0)." in printed
    assert "Installed plugins add novelty (tokenenv-reverse 1.0)." in printed
    assert "Installed plugins add mean-baseline (tokenenv-reverse 1.0)." in printed
    assert "--agent.baseline FLOAT Share of the mean return that is subtracted" in printed
    assert "tokenenv evaluate x tensorboard" in printed  # plain names need not be said again
    assert "distinct bigrams" in printed
    config = (tmp_path / "x" / "config.yaml").read_text()
    for line in ("env: my/Reverse-v0", "algo: mean-baseline", "  baseline: 0.5"):
        assert f"{line}\n" in config
    assert (tmp_path / "x" / "episodes.html").stat().st_size


def test_without_the_plugin_its_run_folder_says_what_is_missing(installed, tmp_path):
    small = "--num-envs 4 --total-tokens 20 --agent.batch-tokens 20 --run-dir x"
    done = shell(f"{TOKENENV} train --env my/Reverse-v0 {small}", tmp_path, installed)
    assert done.returncode == 0, done.stderr
    done = shell(f"{TOKENENV} evaluate x", tmp_path)
    assert done.returncode == 2
    assert "x/config.yaml: env='my/Reverse-v0' is not known" in done.stderr


def test_importing_tokenenv_registers_the_plugins_id_and_imports_nothing_of_it(installed, tmp_path):
    code = """
import sys, gymnasium as gym, tokenenv
assert "my/Reverse-v0" in gym.registry
assert not [name for name in sys.modules if name.startswith("tokenenv_reverse")]
from tokenenv.check import check_vector_env
envs = gym.make_vec("my/Reverse-v0", num_envs=4, reward={"right": "token", "new": ("novelty", 0.1)})
check_vector_env(envs)
assert "tokenenv_reverse.algorithm" not in sys.modules
"""
    done = shell(f"{sys.executable} - <<'E'{code}E", tmp_path, installed)
    assert done.returncode == 0, done.stderr
