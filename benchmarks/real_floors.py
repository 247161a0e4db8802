"""One iteration of PPO on a real model beside what the hardware allows, and its memory beside what
`tokenenv plan` says.

    make real-models
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/real_floors.py build/real/smollm2
    [--num-envs 16] [--tokens 64] [--turns 3]

The settings are those of examples/real_model.py: LoRA of rank 8, VADER's sentiment for each token,
one epoch. 16 texts of at most 64 tokens are written by stepping, and learnt from.

The floor of writing is, for each step, the larger of two times: that of reading once the weights
and the keys and values that the texts have, at the speed of a large copy, and that of the
operations of the forwards and heads, at the speed of a large matrix product; and the operations of
reading the prompts. The floor of learning is its operations, a forward and a backward of the policy
and the forward that gives values. Seconds are of the process, so that other work changes less;
medians of the turns. The speeds are measured beside each turn. A product of as few rows as there
are texts is slower than a large one, so the floor of writing is given at that speed too.

Memory is the largest resident memory of the process, until the first turn ends; a process of its
own plans it, without loading the model.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import Clock, bandwidth, matmul_rate, seconds_of
from profiled import Subject, body_size, step_bytes, step_flops, update_flops
from rich.console import Console
from rich.table import Table

from tokenenv.models.trunks import trunk_of

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))


def make_envs(args: argparse.Namespace) -> Any:
    """Make the example's envs, with texts of `args.tokens`; a base model has no chat template."""
    import gymnasium as gym
    from real_model import TRAIN, sentiment
    from transformers import AutoTokenizer

    import tokenenv  # noqa: F401  (registers the ids)
    from tokenenv.rewards import Rule

    chat = AutoTokenizer.from_pretrained(args.model).chat_template is not None
    prompts = [f"Tell me about {thing}." for thing in TRAIN.split("|")]
    return gym.make_vec(
        "tokenenv/TextGen-v0", num_envs=args.num_envs, model=args.model, prompts=prompts,
        chat_template=chat, max_new_tokens=args.tokens, reward=Rule(sentiment, dense=True),
        kl_coef=0.02, autoreset_mode="SameStep",
    )  # fmt: skip


def config_of(args: argparse.Namespace) -> Any:
    """Return the example's settings, with a batch of as many texts as there are slots."""
    from tokenenv.agents import PPOConfig

    tokens = args.num_envs * args.tokens
    return PPOConfig(lora_rank=8, lr=1e-3, epochs=1, batch_tokens=tokens, precision="float32")


def peak() -> int:
    """Return the most bytes of memory that this process has had (Linux)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def planned(args: argparse.Namespace) -> dict[str, int]:
    """Return the bytes of each part, as `tokenenv plan` prints them."""
    from tokenenv.agents import PPO
    from tokenenv.agents.rollout.make import default_policy
    from tokenenv.cli.plan import LIBRARIES, parts
    from tokenenv.models.shapes import shapes_only

    config = config_of(args)
    with shapes_only():
        envs = make_envs(args)
        policy = default_policy(envs, config, learns=PPO.learns)
    libraries = peak()
    return parts(envs, policy, config, learns=True) | {LIBRARIES: libraries}


class Floor:
    """The least that writing texts takes: what its steps and resets had to read, by their
    lengths."""

    def __init__(self, chosen: Subject) -> None:
        self.chosen = chosen
        self.steps: list[np.ndarray] = []
        """(N,) the lengths of the texts before each step."""
        self.prompts = 0
        """Tokens of the prompts that were read."""

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Note the steps and resets of the env, until the block ends."""
        env = self.chosen.env
        step, begin_next = env.step, env._begin_next

        def noted_step(actions: Any) -> Any:
            self.steps.append(env._texts.length.copy())
            return step(actions)

        def noted_begin(mask: np.ndarray) -> Any:
            found = begin_next(mask)
            self.prompts += int(env._texts.length[mask].sum())
            return found

        env.step, env._begin_next = noted_step, noted_begin
        try:
            yield
        finally:
            del env.step, env._begin_next

    def seconds(self, speed: float, rate: float) -> tuple[float, float]:
        """Return the least seconds in all, and those of reading weights and caches alone."""
        chosen = self.chosen
        reading = [step_bytes(chosen, lengths) / speed for lengths in self.steps]
        computing = [step_flops(chosen, lengths) / rate for lengths in self.steps]
        prompts = sum(2.0 * body_size(trunk) * self.prompts / rate for trunk in chosen.trunks)
        return prompts + sum(map(max, reading, computing)), sum(reading)


def rate_of_rows(agent: Any, rows: int) -> float:
    """Return the operations per second of products of so many rows with the policy's frozen
    matrices, one after the other, as a step makes them."""
    frozen = (w for w in trunk_of(agent.policy.model).parameters() if not w.requires_grad)
    matrices = [weight for weight in frozen if weight.ndim == 2 and len(weight) < 20_000]
    inputs = {size: torch.ones(rows, size) for size in {w.shape[1] for w in matrices}}

    def multiply() -> None:
        for weight in matrices:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    operations = 2.0 * rows * sum(weight.numel() for weight in matrices)
    return operations / seconds_of(multiply, 3, Clock("cpu"))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of each turn, and the memory; the process should have done nothing
    else."""
    from tokenenv.agents import PPO
    from tokenenv.agents.episodes import EpisodeBatch

    torch.set_num_threads(1)
    envs = make_envs(args)
    agent, memory = PPO(envs, config_of(args)), 0
    turns: list[dict[str, float]] = []
    chosen = Subject(envs, agent, args.tokens)
    for _ in range(args.turns):
        agent.collector.reset()
        agent.collector.step()  # reads the prompts and makes the caches; it is not counted
        before, floor, started = agent.tokens_seen, Floor(chosen), time.process_time()
        with floor.counting():
            batch = EpisodeBatch.stack(agent.collect())
        written, wrote = agent.tokens_seen - before, time.process_time() - started
        started = time.process_time()
        agent.update(batch)
        learnt, learned = time.process_time() - started, int(batch.response_length_B.sum())
        agent.collector.refresh()
        memory = memory or peak()
        speed, rate = bandwidth("cpu"), matmul_rate("cpu", torch.float32)
        of_rows = rate_of_rows(agent, args.num_envs)
        least, reading = floor.seconds(speed, rate)
        least_of_rows, _ = floor.seconds(speed, of_rows)
        turns.append({
            "GB/s of a copy": speed / 1e9,
            "GFLOP/s of a product": rate / 1e9,
            f"GFLOP/s of products of {args.num_envs} rows": of_rows / 1e9,
            "write, tokens/s": written / wrote,
            "write, floor": written / least,
            "write, floor of reading weights and caches alone": written / reading,
            "write, times floor": wrote / least,
            "write, times floor at the speed of few rows": wrote / least_of_rows,
            "learn, tokens/s": learned / learnt,
            "learn, floor": learned * rate / update_flops(chosen, batch),
            "learn, times floor": learnt * rate / update_flops(chosen, batch),
        })  # fmt: skip
        print(json.dumps(turns[-1]), file=sys.stderr, flush=True)
    return {"turns": turns, "peak": memory}


def in_a_process(args: argparse.Namespace, part: str) -> Any:
    """Return what a function of this module finds in a process of its own."""
    command = [sys.executable, __file__, args.model, "--only", part]
    for name in ("num_envs", "tokens", "turns"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    """Plan, measure, and print both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder or a hub id")
    parser.add_argument("--num-envs", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", choices=["planned", "measure"], help="one part, as JSON")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(globals()[args.only](args)))
        return
    plan, found = in_a_process(args, "planned"), in_a_process(args, "measure")
    title = f"{args.model}, N = {args.num_envs}, T = {args.tokens}"
    table = Table(title, "", box=None)
    table.columns[1].justify = "right"
    for name in found["turns"][0]:
        table.add_row(name, f"{statistics.median(turn[name] for turn in found['turns']):,.2f}")
    for name, size in plan.items():
        table.add_row(f"planned, MiB: {name}", f"{size / 2**20:,.0f}")
    total, peak = sum(plan.values()), found["peak"]
    table.add_row("planned, MiB: together", f"{total / 2**20:,.0f}")
    table.add_row("largest resident memory, MiB", f"{peak / 2**20:,.0f}")
    table.add_row("over what was planned", f"{peak / total:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
