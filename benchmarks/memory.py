"""Whether a long run keeps memory: PPO for 200 short iterations, read after every fifth.

    OMP_NUM_THREADS=1 python benchmarks/memory.py [--runs step lora episode folder]
    [--iterations 200] [--every 5] [--env tokenenv/Reviews-v0] [--num-envs 8] [--batch-tokens 96]
    [--trace]

"step" steps the env, "lora" does so with adapters, "episode" writes whole texts, and "folder" steps
and writes a run folder with TensorBoard events and checkpoints. Each run is a process of its own.

"resident" is what the system has given the process. An allocator keeps freed memory in pieces, so
it may rise for a while with nothing kept; "in use" is what the program has asked malloc for and has
not freed, which is where the data of tensors and arrays is (Linux with glibc; 0 elsewhere).
"tensors" and "objects" are counts of what Python's garbage collector knows. Slopes are per 100
iterations, of the means of ten blocks of the last three quarters, with 95% intervals. `--trace`
prints the lines of code whose Python memory grew the most as well; it makes a run a few times
slower, and takes memory itself.
"""

import argparse
import ctypes
import gc
import tempfile
import tracemalloc
import warnings
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents import PPO

RUNS: dict[str, dict[str, Any]] = {
    "step": {},
    "lora": {"lora_rank": 4},
    "episode": {"rollout": "episode"},
    "folder": {},
}
UNITS = {"resident": "MiB", "in use": "MiB", "tensors": "", "objects": ""}
BLOCKS, T_8 = 10, 2.306
"""Blocks of iterations, and the 97.5% quantile of Student's t with two degrees less."""
console = Console(width=110)


class MallocInfo(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost")]  # fmt: skip


def in_use() -> int:
    """Return the bytes that malloc has given and not got back; 0 where it cannot be asked."""
    libc: Any = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return 0
    libc.mallinfo2.restype = MallocInfo
    info = libc.mallinfo2()
    return info.uordblks + info.hblkhd


def resident() -> int:
    """Return the bytes of this process that are in memory (Linux)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in x)
    return int(line.split()[1]) * 1024


def look() -> dict[str, float]:
    """Return what there is now, after the garbage collector has run."""
    gc.collect()
    objects = gc.get_objects()
    return {
        "resident": resident() / 2**20,
        "in use": in_use() / 2**20,
        "tensors": sum(issubclass(type(one), torch.Tensor) for one in objects),
        "objects": len(objects),
    }


@dataclass
class Found:
    """What one run had after every so many iterations, by name, and the lines of code that grew."""

    rows: dict[str, list[float]]
    grown: list[str]


def measure(args: argparse.Namespace, run: str) -> Found:
    """Learn for so many iterations, and look after some."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="update .* moved the policy")
    envs = gym.make_vec(args.env, num_envs=args.num_envs, autoreset_mode="SameStep")
    rows: dict[str, list[float]] = {name: [] for name in UNITS}
    traced: list[Any] = []

    def note(metrics: dict[str, float], episodes: Any) -> None:
        if agent.updates % args.every == 0:
            for name, value in look().items():
                rows[name].append(value)
        if args.trace and agent.updates in (args.iterations // 4, args.iterations):
            traced.append(tracemalloc.take_snapshot())
        if agent.updates == args.iterations:
            agent.stop()

    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run" if run == "folder" else None
        fixed = {"batch_tokens": args.batch_tokens, "epochs": 1, "minibatches": 2, "lr": 1e-5}
        agent = PPO(envs, run_dir=run_dir, **(fixed | RUNS[run]))
        if args.trace:
            tracemalloc.start()
        # Far more tokens than there will be: `note` ends the run.
        agent.learn(10**9, on_update=note, checkpoint_every=20 if run_dir else None)
    return Found(rows, grown(*traced) if args.trace else [])


def grown(before: Any, after: Any) -> list[str]:
    """Return the ten lines whose memory grew the most between two snapshots, in words."""
    ours = [tracemalloc.Filter(False, tracemalloc.__file__), tracemalloc.Filter(False, __file__)]
    before, after = (one.filter_traces(ours) for one in (before, after))
    return [str(line) for line in after.compare_to(before, "lineno")[:10]]


def slope(values: list[float], every: int) -> tuple[float, float]:
    """Return how much the last three quarters rise in 100 iterations, and the half of its 95%
    interval, by least squares on the means of ten blocks."""
    late = np.asarray(values[len(values) // 4 :])
    blocks = np.array_split(late, BLOCKS)
    x = every * np.cumsum([len(block) for block in blocks]) / 100
    y = np.array([block.mean() for block in blocks])
    x = x - x.mean()
    rise = (x @ y) / (x @ x)
    rest = y - y.mean() - rise * x
    return rise, T_8 * np.sqrt(rest @ rest / (BLOCKS - 2) / (x @ x))


def table_of(run: str, found: Found, every: int) -> Table:
    """Return the table of one run."""
    number = len(found.rows["tensors"])
    at = [0, *(number * share // 4 - 1 for share in range(1, 5))]
    heads = (f"at {every * (place + 1)}" for place in at)
    table = Table(run, *heads, "per 100", "± 95%", box=None, padding=(0, 1))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, values in found.rows.items():
        unit, (rise, half) = UNITS[name], slope(values, every)
        shown = (f"{values[place]:,.{2 if unit else 0}f}" for place in at)
        table.add_row(f"{name}, {unit}" if unit else name, *shown, f"{rise:+.3f}", f"{half:.3f}")
    return table


def main() -> None:
    """Run what is asked for, one process after the other, and print a table a run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--env", default="tokenenv/Reviews-v0")
    parser.add_argument("--num-envs", type=int, default=8)
    parser.add_argument("--batch-tokens", type=int, default=96)
    parser.add_argument("--trace", action="store_true")
    args = parser.parse_args()
    for run in args.runs:
        with get_context("spawn").Pool(1) as pool:
            found = pool.apply(partial(measure, args, run))
        console.print(table_of(run, found, args.every))
        for line in found.grown:
            print(f"  {line}", flush=True)


if __name__ == "__main__":
    main()
