"""The commands and the code of docs/scale.md, with two processes and smaller numbers."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from tokenenv.agents.run.checkpoint import read_checkpoint
from tokenenv.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL = ["--num-envs", "8", "--agent.batch-tokens", "200", "--agent.rollout", "step"]


def command(word: str) -> list[str]:
    """The page's torchrun command that has this word, for two processes."""
    line = next(line for line in PAGE.splitlines() if line.startswith("torchrun") and word in line)
    words = shlex.split(line, comments=True)[1:]
    words[words.index("--nproc-per-node") + 1] = "2"
    return [*TORCHRUN, *words]


def run(words: list[str], folder: Path) -> str:
    done = subprocess.run(words, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tokens_seen(path: Path) -> list[int]:
    parts = read_checkpoint(path)["ranks"]
    return [part["collector"]["tokens_seen"] for part in parts.values()]


def test_a_run_is_stopped_and_goes_on_with_another_number(tmp_path):
    main(["train", "--run-dir", str(tmp_path / "alone"), "--total-tokens", "400", *SMALL])
    begun = command("--config")
    begun[begun.index("run.yaml")] = str(tmp_path / "alone" / "config.yaml")
    folder = tmp_path / "runs" / "RUN"
    words = [*begun, "--run-dir", str(folder), "--total-tokens", "100000"]
    running = subprocess.Popen(words, cwd=tmp_path, env=ENVIRONMENT, start_new_session=True)
    deadline = time.monotonic() + 300
    while (
        not (folder / "episodes.jsonl").exists() or not (folder / "episodes.jsonl").stat().st_size
    ):
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    running.wait(120)
    first = tokens_seen(folder / "checkpoint")
    assert len(first) == 2
    assert min(first) > 0
    # Its end is far away, so one update more is waited for, and it is stopped again.
    alone = [sys.executable, "-m", "tokenenv.cli", *command("--resume")[7:]]
    running = subprocess.Popen(alone, cwd=tmp_path, env=ENVIRONMENT, start_new_session=True)
    size = (folder / "episodes.jsonl").stat().st_size
    while (folder / "episodes.jsonl").stat().st_size <= size:
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    running.send_signal(signal.SIGTERM)
    running.wait(120)
    [second] = tokens_seen(folder / "checkpoint")
    assert second > sum(first)


def test_the_script_is_one_run_of_all_processes(tmp_path):
    [block] = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    small = block.replace("200_000, progress=True", "400")
    (tmp_path / "script.py").write_text(small.replace("PPO(envs,", "PPO(envs, batch_tokens=200,"))
    run([*TORCHRUN, "--nproc-per-node", "2", "script.py"], tmp_path)
    seen = tokens_seen(tmp_path / "runs" / "eight" / "checkpoint")
    assert len(seen) == 2
    assert sum(seen) >= 400


def test_a_reward_model_is_fitted_by_all(tmp_path):
    sample = ["sample", "--env", "tokenenv/Reviews-v0", "--kind", "ranking", "--num-examples", "32"]
    main([*sample, "--out", str(tmp_path / "pairs.jsonl")])
    small = ["--epochs", "1", "--hidden-size", "32", "--num-layers", "1"]
    printed = run([*command("cli fit"), *small], tmp_path)
    assert printed.count("reward model: my-reward-model") == 1
    assert (tmp_path / "my-reward-model" / "model.safetensors").exists()
