"""The regret of PPO on Dialogue-v0 after so many tokens, by reward design and by lambda.

The other's mood is the score. What a turn is worth is known only when it is answered, and the best
mood takes several turns. Everything except the reward and lambda is the same: the default small
transformer policy, the seeds of environment, initialisation and sampling, and the tokens that the
policy has emitted; tokens that the environment writes are counted nowhere.

- "terminal" pays the score at the last token, "turn" what each turn has changed in it at the turn's
  last token, and "oracle" what each token, and its answer, have changed in the optimal value V*.
- "token GAE" has one lambda for all tokens. "turn GAE" makes a turn one action: lambda 1 within
  turns, and lambda from turn to turn.

All designs have the same J = E[score] - beta KL and the same optimum. Regret is J* - J, with J
exact in every state that sampled texts reach (`oracle.evaluate`), so its error is small. The table
shows the mean over the seeds and their standard deviation.
"""

import argparse
import statistics
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import gymnasium as gym
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents import PPO, LMPolicy
from tokenenv.agents.run.evaluate import next_token_probs
from tokenenv.models.residual_lm import ResidualLM

BETA, N = 0.05, 64
SMALL = {"vocab_size": 16, "num_moods": 3, "max_new_tokens": 12}
"""Options of the env: few words, so that a run takes half a minute."""
SETTINGS: dict[str, Any] = {
    "lr": 5e-3,
    "lr_schedule": "constant",
    "batch_tokens": 512,
    "vf_coef": 0.1,
}
"""Settings of PPO, the same for all designs."""
TOKEN_GAE = {"lambda_actor": 0.95, "lambda_critic": 0.95}
TURN_GAE = {"lambda_actor": 1.0, "lambda_turn": 0.8, "lambda_critic": 0.95}
"""0.95 over the five tokens of a usual turn is about 0.8 a turn."""
DESIGNS: dict[str, tuple[str, dict[str, Any]]] = {
    "terminal, token GAE": ("terminal", TOKEN_GAE),
    "terminal, turn GAE": ("terminal", TURN_GAE),
    "turn, token GAE": ("turn", TOKEN_GAE),
    "turn, turn GAE": ("turn", TURN_GAE),
    "oracle, token GAE": ("oracle", TOKEN_GAE),
    "oracle, turn GAE": ("oracle", TURN_GAE),
}
console = Console(width=None if sys.stdout.isatty() else 120)


def run(design: str, noise: float, seed: int, tokens: list[int]) -> list[float]:
    """Train one policy, and return its regret after so many tokens each."""
    torch.set_num_threads(1)
    # Here the turn rewards add up to the score, which the design cannot know.
    warnings.filterwarnings("ignore", "reward-to-go on 'turn'")
    reward, lambdas = DESIGNS[design]
    options = SMALL | {"noise": noise, "task_seed": seed, "kl_coef": BETA, "reward": reward}
    envs = gym.make_vec("tokenenv/Dialogue-v0", num_envs=N, autoreset_mode="SameStep", **options)
    policy = LMPolicy(ResidualLM(envs.unwrapped.reference, seed=seed))
    agent = PPO(envs, policy=policy, seed=seed, **lambdas, **SETTINGS)
    oracle, regrets = envs.unwrapped.oracle, []

    def measure(metrics: Any, episodes: Any) -> None:
        if agent.tokens_seen >= tokens[len(regrets)]:
            found = oracle.evaluate(next_token_probs(policy), BETA, num_texts=512, seed=seed)
            regrets.append(found.regret)

    agent.learn(tokens[-1], on_update=measure)
    return regrets


def main() -> None:
    """Run what is asked for, and print a table for each noise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--noises", type=float, nargs="*", default=[0.1])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, nargs="*", default=[5_000, 10_000, 20_000, 40_000])
    parser.add_argument("--designs", nargs="*", default=list(DESIGNS), choices=list(DESIGNS))
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, a core each")
    args = parser.parse_args()
    plan = [
        (design, noise, seed, args.tokens)
        for noise in args.noises
        for design in args.designs
        for seed in args.seeds
    ]
    with ProcessPoolExecutor(args.workers) as pool:
        runs = pool.map(run, *zip(*plan, strict=True))
        found = list(track(runs, "runs", total=len(plan), console=console, transient=True))
    regrets = {plan[i][:3]: found[i] for i in range(len(plan))}
    for noise in args.noises:
        title = f"Dialogue-v0, noise {noise}: regret after so many tokens, {len(args.seeds)} seeds"
        table = Table("design", *(f"{tokens:,}" for tokens in args.tokens), title=title)
        for design in args.designs:
            curves = [regrets[design, noise, seed] for seed in args.seeds]
            table.add_row(design, *(spread(values) for values in zip(*curves, strict=True)))
        console.print(table)


def spread(values: tuple[float, ...]) -> str:
    """Their mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


if __name__ == "__main__":
    main()
