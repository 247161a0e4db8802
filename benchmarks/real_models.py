"""What PPO and GRPO learn on a real model: examples/real_model.py with three seeds, a process each.

    make real-models
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/real_models.py build/real/smollm2

For each algorithm: VADER's sentiment of the answers to held-out questions before and after, the KL
that it cost, signs of collapse (distinct bigrams, length), as means and deviations over seeds; the
tokens of a run over the CPU-seconds of its learning (rollout, rewards and updates, without loading
and without evaluation); and the largest memory of the process.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

ROWS = {
    "score": "sentiment, -1 to 1",
    "kl": "KL, nats per text",
    "distinct_bigrams": "distinct bigrams",
    "length": "tokens per text",
}
"""What is compared before and after, and its words in the table."""


def measure(args: argparse.Namespace, algo: str, seed: int) -> dict[str, object]:
    """Return the figures of one run; its process should have done nothing else."""
    from real_model import HELD_OUT, make_agent, make_envs

    from tokenenv.agents.run.evaluate import evaluate

    agent = make_agent(algo, args.model, args.device, seed)
    held_out = make_envs(args.model, HELD_OUT, args.device)

    def look() -> dict[str, float]:
        found = evaluate(agent, held_out, num_texts=args.texts, seed=seed)
        return {name: getattr(found, name) for name in ROWS}

    before, started = look(), time.process_time()
    agent.learn(args.total_tokens, on_update=say)
    seconds = time.process_time() - started
    return {
        "before": before,
        "after": look(),
        "tokens": agent.tokens_seen,
        "speed": agent.tokens_seen / seconds,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def say(metrics: dict[str, float], episodes: list) -> None:
    """Tell on stderr how far a run is."""
    score, kl = (np.mean([getattr(e, name) for e in episodes]) for name in ("score", "kl"))
    line = f"  {metrics['time/tokens']:6,.0f} tokens: {score:.2f}, {kl:.1f} nats"
    print(line, file=sys.stderr, flush=True)


def in_a_process(args: argparse.Namespace, algo: str, seed: int) -> dict:
    """Return what `measure` finds in a new process, and tell it on stderr."""
    print(f"{algo}, seed {seed}", file=sys.stderr)
    command = [sys.executable, __file__, args.model, "--only", algo, str(seed)]
    for name in ("total_tokens", "texts", "device"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(json.dumps(found), file=sys.stderr)
    return found


def over_seeds(values: list[float], digits: int = 2) -> str:
    """Return mean and deviation in words."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def table_of(algo: str, runs: list[dict]) -> Table:
    """Return the table of one algorithm's runs."""
    tokens = np.mean([run["tokens"] for run in runs])
    table = Table(f"{algo}, {len(runs)} seeds, {tokens:,.0f} tokens", "before", "after")
    for name, words in ROWS.items():
        sides = ([run[side][name] for run in runs] for side in ("before", "after"))
        table.add_row(words, *map(over_seeds, sides))
    table.add_row("tokens per CPU-second", "", over_seeds([run["speed"] for run in runs], 1))
    table.add_row("peak memory, GiB", "", over_seeds([run["memory"] for run in runs]))
    return table


def main() -> None:
    """Run what is asked for, one process after the other, and print a table an algorithm."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a folder or a hub id")
    parser.add_argument("--algo", nargs="*", default=["ppo", "grpo"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--total-tokens", type=int, default=4096)
    parser.add_argument("--texts", type=int, default=32, help="of each evaluation")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs=2, metavar=("ALGO", "SEED"), help="one run, as JSON")
    args = parser.parse_args()
    if args.only:
        algo, seed = args.only
        print(json.dumps(measure(args, algo, int(seed))))
        return
    runs: dict[str, list[dict]] = {algo: [] for algo in args.algo}
    for seed in args.seeds:
        for algo, done in runs.items():
            done.append(in_a_process(args, algo, seed))
    for algo, done in runs.items():
        Console(width=100).print(table_of(algo, done))


if __name__ == "__main__":
    main()
