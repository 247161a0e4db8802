"""What texts written by vLLM cost, and what a policy learns from them, on Reviews-v0.

    OMP_NUM_THREADS=1 .venv-vllm/bin/python benchmarks/vllm_rollout.py [--seeds 0]

1. The tokens per second of whole episodes with rewards, beside vLLM's `generate` alone in this
   process, and stepping; and the CPU time of a token in this process and in vLLM's own. Where they
   run at once, the longer of the two bounds what two free cores can do.
2. The gold score on held-out prompts after PPO with rollout="vllm" and with rollout="step", several
   seeds each; with `--seeds 0` none.
"""

import argparse
import time
from typing import Any

import gymnasium as gym
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents import PPO
from tokenenv.agents.run.evaluate import Evaluation, evaluate
from tokenenv.rollout.vllm import VLLMEngine

console = Console(width=120)
ENV = "tokenenv/Reviews-v0"
WHAT = {
    "generate": "vLLM's generate alone",
    "own": "whole episodes: vLLM in its own process",
    "vllm": "whole episodes: vLLM in this process",
    "step": "the same by stepping with the local cache",
}


def make(num_envs: int, **options: Any) -> Any:
    """Make the vector env."""
    return gym.make_vec(ENV, num_envs=num_envs, autoreset_mode="SameStep", **options)


def learn(rollout: str, seed: int, args: argparse.Namespace) -> tuple[Evaluation, dict[str, float]]:
    """Run PPO once. Return its evaluation on held-out prompts, and means over its updates of what
    the agent logs of its rollouts, with the seconds of the run."""
    agent, seen, started = PPO(make(64), rollout=rollout, seed=seed), [], time.perf_counter()
    agent.learn(args.total_tokens, on_update=lambda metrics, episodes: seen.append(metrics))
    seconds = time.perf_counter() - started
    names = ("rollout/staleness", "rollout/mismatch", "rollout/mismatch_max")
    means = {name: float(np.nanmean([m[name] for m in seen])) for name in names if name in seen[0]}
    found = evaluate(agent, make(64, split="test"), num_texts=args.texts)
    return found, means | {"seconds": seconds}


def compare_learning(args: argparse.Namespace) -> None:
    """Print a line for each run, and the difference of the means with its standard error over
    seeds."""
    results = ("gold", "score", "KL, nats", "staleness", "mismatch, nats: mean", "largest")
    table = Table("rollout", "seed", *results, "s")
    golds: dict[str, list[float]] = {"step": [], "vllm": []}
    for seed in range(args.seeds):
        for rollout in golds:
            found, seen = learn(rollout, seed, args)
            golds[rollout].append(found.gold)
            numbers = [f"{found.gold:.3f}", f"{found.score:.2f}", f"{found.kl:.2f}"]
            numbers.append(f"{seen['rollout/staleness']:.2f}")
            for name in ("rollout/mismatch", "rollout/mismatch_max"):
                numbers.append(f"{seen[name]:.1e}" if name in seen else "")
            table.add_row(rollout, str(seed), *numbers, f"{seen['seconds']:.0f}")
    console.print(table)
    step, vllm = np.array(golds["step"]), np.array(golds["vllm"])
    over_seeds = np.nan
    if args.seeds > 1:
        over_seeds = np.sqrt((step.var(ddof=1) + vllm.var(ddof=1)) / args.seeds)
    of_texts = np.sqrt(sum(gold * (1 - gold) for gold in [*step, *vllm]) / args.texts) / args.seeds
    console.print(
        f"{args.total_tokens:,} tokens, {args.seeds} seeds: "
        f"gold {step.mean():.3f} by step, {vllm.mean():.3f} by vllm;\n"
        f"difference {vllm.mean() - step.mean():+.3f}, its standard error "
        f"{over_seeds:.3f} from the spread of the seeds, and\n"
        f"{of_texts:.3f} from the number of texts alone ({args.texts:,} each)"
    )


def compare_speed(args: argparse.Namespace) -> None:
    """Print tokens per second, and CPU time, of `generate` alone, of whole episodes with rewards,
    and of stepping."""
    from vllm import SamplingParams

    envs = make(args.num_envs)
    options = {"own": {"own_process": True}, "vllm": {}}
    agents = {
        name: PPO(make(args.num_envs), rollout="vllm", rollout_options=given)
        for name, given in options.items()
    }
    agents["step"] = PPO(make(args.num_envs))
    children = psutil.Process().children()
    process = next(one for one in children if "tokenenv.rollout.own_process" in one.cmdline())
    spec, prompts = envs.unwrapped.token_spec, envs.unwrapped.prompts
    alone = VLLMEngine(envs.unwrapped.reference, spec, num_texts=args.num_envs).llm
    rng, tokens = np.random.default_rng(0), 0

    def generate() -> int:
        nonlocal tokens
        chosen = rng.integers(len(prompts), size=4 * args.num_envs)
        texts = [{"prompt_token_ids": list(prompts[i])} for i in chosen]
        params = SamplingParams(
            temperature=1.0,
            max_tokens=spec.max_new_tokens,
            stop_token_ids=list(spec.stop_token_ids),
            detokenize=False,
        )
        outputs = alone.generate(texts, params, use_tqdm=False)
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        return tokens

    def clocks() -> np.ndarray:
        there = process.cpu_times()
        now = time.perf_counter(), time.process_time(), there.user + there.system
        return np.array(now)

    seconds: dict[str, list[np.ndarray]] = {name: [] for name in WHAT}
    for repetition in range(args.repetitions + 1):
        for name in WHAT:
            started = clocks()
            if name == "generate":
                written = generate()
            else:
                written = sum(len(e.response) for e in agents[name].collector.collect(tokens))
            if repetition:
                seconds[name].append((clocks() - started) / written)
    print_speed(args, {name: np.median(values, 0) for name, values in seconds.items()})


def print_speed(args: argparse.Namespace, found: dict[str, np.ndarray]) -> None:
    """Print a line for each candidate; `found` holds its seconds a token by the clock, on the CPU
    here, and on the CPU in vLLM's own process."""
    console.print(
        f"{args.num_envs} texts side by side, medians of {args.repetitions} interleaved "
        "repetitions:\ntokens/s, their share of generate's, CPU us a token here and there"
    )
    for name, what in WHAT.items():
        wall, here, there = found[name]
        console.print(
            f"  {what:42} {1 / wall:7,.0f} {found['generate'][0] / wall:6.2f} "
            f"{1e6 * here:6.0f} {1e6 * there:6.0f}"
        )


def main() -> None:
    """Run both comparisons."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--total-tokens", type=int, default=60_000)
    parser.add_argument("--texts", type=int, default=2048, help="of each evaluation")
    parser.add_argument("--num-envs", type=int, default=64, help="of the speed comparison")
    parser.add_argument("--repetitions", type=int, default=7)
    args = parser.parse_args()
    compare_speed(args)
    if args.seeds:
        compare_learning(args)


if __name__ == "__main__":
    main()
