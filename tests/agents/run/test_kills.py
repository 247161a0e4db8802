"""Runs that are killed at any moment and gone on with end as if nothing had happened; `make
kill-test` kills fifty times. A signal that asks is heard: the run saves and ends."""

import os
import random
import signal
import time
from collections import Counter

import pytest
from processes import is_alive, lines_of, send, start, wait, wait_until
from runs import same
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tokenenv.agents.run.checkpoint import read_checkpoint
from tokenenv.cli.signals import SIGNALS

KILLS = int(os.environ.get("KILLS", "2"))
SMALL = [
    "--num-envs",
    "8",
    "--options",
    "max_new_tokens",
    "6",
    "--agent.batch-tokens",
    "80",
    "--agent.epochs",
    "1",
]
RUNS = {
    "automaton": [
        "--env",
        "tokenenv/Negation-v0",
        *SMALL,
        "--total-tokens",
        "800",
        "--checkpoint-every",
        "3",
    ],
    "ppo": ["--algo", "ppo", *SMALL, "--total-tokens", "800", "--checkpoint-every", "2"],
    "grpo": ["--algo", "grpo", *SMALL, "--total-tokens", "800", "--checkpoint-every", "1"],
}

ENDLESS = [
    "--env",
    "tokenenv/Negation-v0",
    "--num-envs",
    "8",
    "--options",
    "max_new_tokens",
    "6",
    "--total-tokens",
    "100000000",
]


def steps_of(folder):
    """The tokens seen at which TensorBoard has a score."""
    return [
        event.step for event in EventAccumulator(str(folder)).Reload().Scalars("objective/score")
    ]


def what_was_left(folder):
    """How far the kill let the run come."""
    if not (folder / "config.yaml").exists():
        return "before the config"
    if not (folder / "checkpoint").exists():
        return "before the first checkpoint"
    episodes = folder / "episodes.jsonl"
    if (folder / "checkpoint.tmp").exists() or (folder / "checkpoint.spare").exists():
        return "while a checkpoint was written"
    if episodes.exists() and not episodes.read_bytes().endswith(b"\n") and episodes.stat().st_size:
        return "in the middle of a line"
    return "while texts were written or learnt from"


def test_killed_runs_end_as_if_nothing_had_happened(tmp_path, capsys):
    chance, kills, ended, found = random.Random(0), 0, Counter(), Counter()
    names = list(RUNS)[: max(1, min(len(RUNS), KILLS // 3))]
    lines, pace = {}, {}
    for name in names:
        started = time.monotonic()
        straight = start(["train", *RUNS[name], "--run-dir", tmp_path / name], tmp_path / "output")
        assert wait(straight) == 0, (tmp_path / "output").read_text()
        lines[name] = lines_of(tmp_path / name / "episodes.jsonl")
        pace[name] = (time.monotonic() - started) / 10
    while kills < KILLS:
        name = names[sum(ended.values()) % len(names)]
        folder = tmp_path / f"{name}-{ended[name]}"
        while True:
            begun = (folder / "config.yaml").exists()
            argv = ["--resume", folder] if begun else [*RUNS[name], "--run-dir", folder]
            pid = start(["train", *argv], tmp_path / "output")
            if kills < KILLS:
                episodes = folder / "episodes.jsonl"
                enough = min(
                    lines_of(episodes) + chance.randrange(lines[name] // 4), lines[name] - 1
                )
                while is_alive(pid) and lines_of(episodes) < enough:
                    time.sleep(0.002)
                time.sleep(chance.random() * pace[name])
                send(pid, signal.SIGKILL)
            code = wait(pid)
            assert code in (0, -signal.SIGKILL), (tmp_path / "output").read_text()
            if code == 0:
                break
            kills += 1
            found[what_was_left(folder)] += 1
        ended[name] += 1
        state, expected = (read_checkpoint(one / "checkpoint") for one in (folder, tmp_path / name))
        assert same(state, expected)
        assert (folder / "episodes.jsonl").read_bytes() == (
            tmp_path / name / "episodes.jsonl"
        ).read_bytes()
        assert steps_of(folder) == steps_of(tmp_path / name)
    with capsys.disabled():
        runs = ", ".join(f"{count} {name}" for name, count in ended.items())
        print(f"\n{kills} SIGKILLs in {sum(ended.values())} runs ({runs}); where they came:")
        for where, count in found.most_common():
            print(f"  {count:3d} {where}")
        print(
            "checkpoints equal to an uninterrupted run's, bit for bit; 0 episodes or events "
            "doubled, 0 missing"
        )


@pytest.mark.parametrize("signum", SIGNALS, ids=lambda signum: signum.name)
def test_a_signal_ends_the_step_saves_and_gives_the_usual_code(tmp_path, signum):
    """The batch is never full: the run stops between two steps, and keeps what the batch holds so
    far."""
    folder, output = tmp_path / "x", tmp_path / "output"
    argv = ["train", *ENDLESS, "--agent.batch-tokens", "100000000", "--run-dir", folder]
    pid = start(argv, output)
    wait_until((folder / "checkpoint").exists, pid)
    time.sleep(0.5)
    os.kill(pid, signum)
    assert wait(pid) == 128 + signum
    state = read_checkpoint(folder / "checkpoint")
    [said] = [line for line in output.read_text().splitlines() if "tokens/s" not in line]
    seen = state["ranks"][0]["collector"]["tokens_seen"]
    assert (
        said
        == f"stopped by {signum.name}; saved at {seen:,} tokens; go on with: tokenenv train --resume {folder}"
    )
    assert seen > 0
    assert state["updates"] == 0
