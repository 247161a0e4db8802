"""Steps per second of the automaton environments, observation included, and where the time goes.

A step is one token of one text. The actions are given, and texts of 64 tokens begin anew within the
step (SAME_STEP). Every figure is the median of interleaved repetitions over whole texts. On the CPU
one thread runs, and the rates are per CPU second of it, so that other work on the machine counts as
little as it can; `--processes` lets as many environments step side by side, and counts the seconds
of the clock. On a GPU (`--device cuda`) actions, observations and rewards are tensors there, and
the clock runs until the device has done its work.

    python benchmarks/automata.py
    python benchmarks/automata.py --processes 2 --num-envs 4096
    python benchmarks/automata.py --device cuda --num-envs 4096 65536 262144
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from timing import medians

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.env import engine, vector_env
from tokenenv.env.dynamics import Dynamics
from tokenenv.env.finite import FiniteCheck
from tokenenv.env.infos import Infos
from tokenenv.env.texts import TextBuffer
from tokenenv.models.trunks import Trunks

T = 64
IDS = ("PlantedPhrase", "DelayedKey", "Brackets", "Negation")
VARIANTS: dict[str, dict[str, str]] = {
    "default": {},
    "oracle": {"reward": "oracle"},
    "oracle, torch arrays": {"reward": "oracle", "array": "torch"},
    "features": {"observation": "features"},
}
PARTS: dict[str, list[tuple[Any, str]]] = {
    "actions read": [(vector_env.TokenVectorEnv, "_check_actions")],
    "texts appended": [(TextBuffer, "append")],
    "models' states": [(Trunks, "append"), (Dynamics, "advance")],
    "reference, ends": [(engine, "transitions")],
    "terms": [(engine.RewardEngine, "_pay"), (engine.RewardEngine, "potential")],
    "numbers finite": [(FiniteCheck, "look")],
    "infos": [(vector_env, "step_infos"), (Infos, "to_dict"), (Infos, "only")],
    "observation": [(vector_env.TokenVectorEnv, "_observation")],
    "texts begun": [(vector_env.TokenVectorEnv, "_begin")],
}
console = Console(width=120)


def runner(name: str, num_envs: int, device: str, **options: str) -> Callable[[], None]:
    """Return a call that steps N texts from beginning to end, and waits for the device."""
    envs = gym.make_vec(
        f"tokenenv/{name}-v0", num_envs=num_envs, max_new_tokens=T, autoreset_mode="SameStep",
        device=device, **options,
    )  # fmt: skip
    actions = np.random.default_rng(0).integers(0, envs.single_action_space.n, (T, num_envs))
    on_device = options.get("array") == "torch"
    given = torch.from_numpy(actions).to(device) if on_device else actions
    envs.reset(seed=0)

    def run() -> None:
        for action in given:
            envs.step(action)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def rates(num_envs: int, device: str, repetitions: int) -> Table:
    """Return the steps per second of every id, with a column for each variant."""
    where = "one core" if device == "cpu" else torch.cuda.get_device_name()
    variants = [v for v, o in VARIANTS.items() if device == "cpu" or o.get("array") == "torch"]
    table = Table("id", *variants, title=f"steps/s, N = {num_envs:,}, T = {T}, {where}")
    clock = time.process_time if device == "cpu" else time.perf_counter
    runs = {
        f"{name} {variant}": runner(name, num_envs, device, **VARIANTS[variant])
        for name in IDS
        for variant in variants
    }
    seconds = medians(runs, repetitions, clock)
    for name in IDS:
        found = (num_envs * T / seconds[f"{name} {variant}"] for variant in variants)
        table.add_row(name, *(f"{rate:,.0f}" for rate in found))
    return table


@contextmanager
def timed_parts(spent: dict[str, float]) -> Iterator[None]:
    """Add to `spent` the CPU seconds of each part; those of a part within another count for the
    inner one alone."""
    inner, originals = [0.0], []

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            inner.append(0.0)
            started = time.process_time()
            result = call(*args, **kwargs)
            seconds = time.process_time() - started
            spent[part] += seconds - inner.pop()
            inner[-1] += seconds
            return result

        return run

    for part, calls in PARTS.items():
        for owner, name in calls:
            originals.append((owner, name, getattr(owner, name)))
            setattr(owner, name, timed(part, getattr(owner, name)))
    yield
    for owner, name, call in originals:
        setattr(owner, name, call)


def parts(sizes: list[int], texts: int = 8) -> Table:
    """Return the microseconds of each part of a step, averaged over whole texts, by N."""
    table = Table("part", *(f"N = {n:,}" for n in sizes), title="µs of a step, oracle")
    columns = []
    for num_envs in sizes:
        run, spent = runner("PlantedPhrase", num_envs, "cpu", reward="oracle"), {}
        run()
        spent = dict.fromkeys(PARTS, 0.0)
        with timed_parts(spent):
            started = time.process_time()
            for _ in range(texts):
                run()
            whole = time.process_time() - started
        spent["the rest"] = whole - sum(spent.values())
        columns.append(spent | {"all": whole})
    for part in columns[0]:
        table.add_row(part, *(f"{1e6 * spent[part] / (T * texts):,.0f}" for spent in columns))
    return table


def _side_by_side(num_envs: int, ready: Any, repetitions: int) -> None:
    torch.set_num_threads(1)
    run = runner("PlantedPhrase", num_envs, "cpu", reward="oracle")
    run()
    ready.wait()
    for _ in range(repetitions):
        run()
    ready.wait()


def together(processes: int, num_envs: int, repetitions: int) -> float:
    """Return the steps per second of the clock of several processes with N texts each."""
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(processes + 1)
    args = (num_envs, ready, repetitions)
    workers = [context.Process(target=_side_by_side, args=args) for _ in range(processes)]
    for worker in workers:
        worker.start()
    ready.wait()
    started = time.perf_counter()
    ready.wait()  # before the workers end, which takes a while too
    seconds = time.perf_counter() - started
    for worker in workers:
        worker.join()
    return processes * repetitions * num_envs * T / seconds


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-envs", type=int, nargs="+", default=[256, 4096])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--processes", type=int, default=1, help="environments side by side")
    parser.add_argument("--repetitions", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.processes > 1:
        for num_envs in args.num_envs:
            rate = together(args.processes, num_envs, 4 * args.repetitions)
            console.print(f"{args.processes} processes, N = {num_envs:,} each: {rate:,.0f} steps/s")
        return
    for num_envs in args.num_envs:
        console.print(rates(num_envs, args.device, args.repetitions))
    if args.device == "cpu":
        console.print(parts(args.num_envs))


if __name__ == "__main__":
    main()
