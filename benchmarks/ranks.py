"""How much faster several processes learn one policy than one does.

    OMP_NUM_THREADS=1 python benchmarks/ranks.py [--ranks 1 2] [--num-envs 64] [--tokens 40000]

Each number of ranks trains a policy of Reviews-v0 by PPO, with the same slots and batch in all, and
the seconds after the first two updates count: those of the whole loop, of the updates, and of what
the ranks tell each other (texts and gradients, waiting for the slowest included), which is in both.
A process has one thread, so that as many ranks as cores are not more than the cores.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

import gymnasium as gym
import torch
from rich.console import Console
from rich.table import Table

from tokenenv import ranks
from tokenenv.agents import PPO

WARM = 2
"""Updates that are not counted."""


def measured(num_envs: int, tokens: int) -> dict[str, Any]:
    """Train as one of the ranks; return tokens, updates, and seconds by what they went to."""
    torch.set_num_threads(1)
    seconds, began = {"updates": 0.0, "exchange": 0.0}, [0.0, 0]
    share = num_envs // ranks.count()
    envs = gym.make_vec("tokenenv/Reviews-v0", num_envs=share, autoreset_mode="SameStep")
    agent = PPO(envs, rollout="step")

    def timed(owner: Any, name: str, part: str) -> None:
        inner = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **options)
            finally:
                seconds[part] += time.perf_counter() - start

        setattr(owner, name, call)

    timed(agent, "update", "updates")
    for name in ("gathered", "add_up"):
        timed(ranks, name, "exchange")

    def warm(*_: Any) -> None:
        if agent.updates == WARM:
            began[:] = time.perf_counter(), agent.tokens_seen
            seconds.update(updates=0.0, exchange=0.0)

    agent.learn(tokens, on_update=warm)
    written = agent.tokens_seen - began[1]
    return {"tokens": written, "all": time.perf_counter() - began[0], **seconds}


def run(count: int, num_envs: int, tokens: int) -> dict[str, Any]:
    """Return what the first of `count` ranks measures."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}"]
    command += [__file__, "--one", "--num-envs", str(num_envs), "--tokens", str(tokens)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--num-envs", type=int, default=64, help="of all ranks")
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--one", action="store_true", help="be one of the ranks")
    args = parser.parse_args()
    if args.one:
        with ranks.joined():
            found = measured(args.num_envs, args.tokens)
            if ranks.number() == 0:
                print(json.dumps(found), flush=True)
        return
    columns = "ranks", "tokens/s", "speed-up", "writing", "updates", "exchange"
    table, console, first = Table(*columns), Console(), 0.0
    for count in args.ranks:
        with console.status(f"{count} ranks"):
            found = run(count, args.num_envs, args.tokens)
        speed = found["tokens"] / found["all"]
        first = first or speed
        writing = found["all"] - found["updates"]
        parts = [f"{found[name]:.1f} s" for name in ("updates", "exchange")]
        row = [str(count), f"{speed:,.0f}", f"{speed / first:.2f}", f"{writing:.1f} s", *parts]
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
