"""Where the time of act + step goes, and of an update, beside the least that they can cost.

    OMP_NUM_THREADS=1 python benchmarks/profile_step.py [--model tokenenv/PyDocs-v0] [--num-envs 64]
    [--tokens 32 128] [--even] [--device cpu] [--dtype float32]
    [--frozen-dtype bfloat16] [--lora-rank 0] [--no-learner]

MODEL is an id with bundled models, a folder or hub id (`make real-models` makes some), or a shape
with random weights (0.5b, 135m, 3m, 1m, tiny). A policy, a reference and a reward model of that
size write N texts of T tokens. The texts are begun apart from each other, so that some end and
others begin at each step, as in a long run; with `--even` they begin together, and none ends.

The first table has milliseconds of a step. "bare" are the cached forwards of the same trunks at the
same places. "x bare" is the whole step without its resets over that. The floors are the bytes of
the weights and of the keys and values that the texts have, over the speed of a large copy, and the
operations of the forwards and heads, over the speed of a large matrix product. The second table has
an update of PPO (one epoch, four minibatches, the critic's values before it) with its floor of
operations.

On the CPU the clock is that of the process. On a GPU the parts are measured with a wait for the
device after each, the whole step without; `--eager` launches kernels one by one there.
"""

import argparse
import warnings
from collections.abc import Sequence

import torch
from machine import Clock, Seam, Stopwatch, bandwidth, matmul_rate, name_of
from profiled import Subject, begin, episodes, step_bytes, step_flops, subject, update_flops
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from tokenenv.agents.learning import learner, optimise
from tokenenv.agents.rollout import actor as acting
from tokenenv.agents.rollout.actor import Actor
from tokenenv.models import slot_cache
from tokenenv.models.cached_lm import CachedLM

STEP_PARTS = ("policy", "reference", "reward", "heads", "sampling", "resets", "act", "step")
UPDATE_PARTS = ("forward", "head", "backward", "optimizer", "rest")
console = Console(width=150)


def step_seams(chosen: Subject, actor: Actor) -> list[Seam]:
    """Return what act + step are made of. What no part claims stays with "act" and "step"."""
    env, engine = chosen.env, chosen.env._engine
    seams: list[Seam] = [
        (actor, "act", "act"),
        (actor._slots, "append", "policy"),
        (actor._slots, "prefill", "resets"),
        (actor.policy, "head", "heads"),
        (acting, "sample", "sampling"),
        (env, "step", "step"),
        (env, "_begin_next", "resets"),
        (engine.dynamics, "ref_logprob", "heads"),
    ]
    for trunk, slots in engine.trunks._slots.items():
        part = "reward" if trunk is chosen.scorer_trunk else "reference"
        seams.append((slots, "append", part))
    return seams


def profile_step(chosen: Subject, steps: int, device: str, even: bool) -> dict[str, float]:
    """Return the seconds of a step by part, as a whole ("whole"), without its resets ("running"),
    of the bare forwards ("bare"), and what it has to read and compute ("bytes", "flops")."""
    clock, actor = Clock(device), chosen.agent.actor
    obs, at = begin(chosen, even), chosen.env._texts
    bare = [CachedLM(trunk, chosen.envs.num_envs, at.tokens.shape[1]) for trunk in chosen.trunks]
    for cached in bare:
        cached.prefill(range(len(at.length)), torch.from_numpy(at.tokens), at.length)
    fixed = torch.full((len(at.length),), 10, device=device)

    def step() -> None:
        nonlocal obs
        tokens = actor.act(obs)[0]
        obs = chosen.envs.step(tokens if device == "cuda" else tokens.numpy())[0]

    def forwards() -> None:
        for cached in bare:
            cached.positions[:] = places
            cached.append(fixed)

    # Graphs are recorded, and memory is allocated, for each size that comes up.
    places = at.length.copy()
    for _ in range(steps if device == "cuda" else 2):
        step()
        forwards()
    found = {"whole": 0.0, "bare": 0.0, "bytes": 0.0, "flops": 0.0}
    for _ in range(steps):
        places = at.length.copy()
        found["bytes"] += step_bytes(chosen, places) / steps
        found["flops"] += step_flops(chosen, places) / steps
        for name, run in (("whole", step), ("bare", forwards)):
            started = clock()
            run()
            found[name] += (clock() - started) / steps
    watch = Stopwatch(clock)
    with watch.watching(step_seams(chosen, actor)):
        for _ in range(steps):
            step()
    parts = {name: watch.seconds[name] / steps for name in STEP_PARTS}
    return parts | found | {"running": found["whole"] - parts["resets"]}


def profile_update(chosen: Subject, device: str) -> dict[str, float]:
    """Return the seconds of an update by part, as a whole, and what it has to compute."""
    agent, clock = chosen.agent, Clock(device)
    agent.update(episodes(chosen))
    batch, watch = episodes(chosen), Stopwatch(clock)
    seams: list[Seam] = [
        (agent, "update", "rest"),
        (agent.policy, "states", "forward"),
        (learner, "token_stats", "head"),
        (torch.Tensor, "backward", "backward"),
        (optimise, "clip_grad_norm_", "optimizer"),
        (agent.optimizer, "step", "optimizer"),
        (agent.optimizer, "zero_grad", "optimizer"),
    ]
    with watch.watching(seams):
        agent.update(batch)
    parts = {name: watch.seconds[name] for name in UPDATE_PARTS}
    return parts | {"whole": sum(parts.values()), "flops": update_flops(chosen, batch)}


def table(title: str, columns: Sequence[str]) -> Table:
    """Make a table of numbers."""
    made = Table(title=title, title_justify="left", box=None, padding=(0, 1))
    for column in columns:
        made.add_column(column, justify="right")
    return made


def step_row(found: dict[str, float], speed: float, rate: float) -> list[str]:
    """Return the numbers of one row: milliseconds, and what they are of the floors."""
    floors = found["bytes"] / speed, found["flops"] / rate
    times = [found[name] for name in ("whole", *STEP_PARTS, "bare")]
    return [
        *(f"{1e3 * seconds:.2f}" for seconds in times),
        f"{found['running'] / found['bare']:.2f}",
        *(f"{1e3 * seconds:.2f}" for seconds in floors),
        f"{found['running'] / max(floors):.1f}",
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tokenenv/PyDocs-v0", help="an id, a folder or a shape")
    parser.add_argument("--num-envs", type=int, nargs="+", default=[64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--steps", type=int, default=64, help="the most steps that are measured")
    parser.add_argument("--even", action="store_true", help="all texts are as long; none ends")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--frozen-dtype", help="of reference and reward model")
    parser.add_argument("--lora-rank", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile the env's forwards")
    parser.add_argument("--eager", action="store_true", help="on a GPU: no CUDA graphs")
    parser.add_argument("--no-learner", action="store_true", help="measure the step alone")
    args = parser.parse_args()
    if args.eager:
        slot_cache.StepGraphs = lambda trunk: None  # type: ignore[misc, assignment]
    # The texts of an update are no policy's own, so that it seems to have moved.
    warnings.filterwarnings("ignore", message="update .* moved the policy")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    speed, rate = bandwidth(args.device), matmul_rate(args.device, getattr(torch, args.dtype))
    console.print(
        f"{args.model} in {args.dtype}, torch {torch.__version__}, {name_of(args.device)}: a large "
        f"copy moves {speed / 1e9:,.1f} GB/s, a large product makes {rate / 1e9:,.0f} GFLOP/s"
    )
    steps = table("act + step, ms", ["N", "T", "whole", *STEP_PARTS, "bare", "x bare",
                  "bytes", "FLOPs", "x floor", "tokens/s"])  # fmt: skip
    updates = table("update, ms", ["N", "T", "whole", *UPDATE_PARTS, "FLOPs", "x floor",
                    "tokens/s"])  # fmt: skip
    for number in args.num_envs:
        for tokens in args.tokens:
            chosen = subject(args, number, tokens)
            found = profile_step(chosen, min(tokens, args.steps), args.device, args.even)
            row = step_row(found, speed, rate)
            steps.add_row(str(number), str(tokens), *row, f"{number / found['whole']:,.0f}")
            if args.no_learner:
                continue
            found = profile_update(chosen, args.device)
            times = [found["whole"], *(found[p] for p in UPDATE_PARTS), found["flops"] / rate]
            row = [*(f"{1e3 * s:,.1f}" for s in times), f"{times[0] / times[-1]:.1f}"]
            updates.add_row(
                str(number), str(tokens), *row, f"{number * tokens / found['whole']:,.0f}"
            )
    console.print(steps)
    if not args.no_learner:
        console.print(updates)
    if args.device == "cuda":
        console.print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
