"""Every bundled algorithm, and stable-baselines3's PPO, A2C and DQN, on the same ids with the same
budget of tokens.

The ids are Reviews-v0 and Negation-v0, with three seeds each. The table shows gold score, KL to the
reference (nats per text) and J = score - beta KL of 256 texts (held-out prompts on Reviews-v0), as
mean and standard deviation over seeds, and tokens per second of learning. The rollouts of VinePPO
and best of n count as tokens. The settings are those below. They are the same on both ids, and were
chosen on seed 0 of Reviews-v0.

SB3's PPO and A2C train the same language model on `kl="policy"`, which is the same objective. DQN
sees frozen features and chooses among the reference's 8 likeliest tokens on `kl="none"`. It does
not know the KL, and its greedy policy is deterministic, so its KL is -log pi_ref of its texts. Best
of n reports the bound log n - (n - 1)/n.

At the end the speed of the bundled PPO is compared with that of SB3's on the same model, in turns:
the same 2,048 tokens an update, two epochs in minibatches of about 512 tokens.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from stable_baselines3 import A2C, DQN, PPO

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents import ALGORITHMS
from tokenenv.agents.run.evaluate import evaluate
from tokenenv.integrations.sb3 import LMActorCriticPolicy, SB3VecEnv
from tokenenv.wrappers import TopKActions

N, TEXTS, TOP_K = 64, 256, 8
ENVS = ("Reviews-v0", "Negation-v0")
SETTINGS: dict[str, dict[str, Any]] = {
    "reference": {},
    "best-of-n": {},
    "ppo": {"lr": 1e-3},
    "a2c": {"lr": 5e-4},
    "reinforce++": {"lr": 1e-3},
    "rloo": {"lr": 1e-3},
    "grpo": {"lr": 1e-3},
    "vineppo": {"lr": 5e-4, "segments": 2, "rollouts": 2},
    "klq": {},
}
"""Settings of the bundled algorithms that are not the defaults."""
SLOTS = {"vineppo": 16}
"""Slots of the env where they are not N. VinePPO learns from few texts and plays on from them."""
PPO_SETTINGS: dict[str, Any] = {
    "n_steps": 32,
    "batch_size": 512,
    "n_epochs": 2,
    "gamma": 1.0,
    "learning_rate": lambda left: 1e-3 * left,
}
"""The settings of the bundled PPO: the same learning rate, falling to zero."""
A2C_SETTINGS: dict[str, Any] = {
    "n_steps": 8,
    "gamma": 1.0,
    "use_rms_prop": False,
    "learning_rate": 3e-4,
}
DQN_SETTINGS: dict[str, Any] = {
    "learning_starts": 2_000,
    "train_freq": 1,
    "gradient_steps": 2,
    "batch_size": 256,
    "buffer_size": 60_000,
    "gamma": 1.0,
    "learning_rate": 1e-3,
    "exploration_fraction": 0.3,
    "target_update_interval": 1_000,
}
console = Console(width=100)


@dataclass(frozen=True)
class Result:
    """What the final policy of one run scores, and how fast it learned."""

    gold: float
    score: float
    kl: float
    objective: float
    tokens_per_second: float


def make(env: str, *, test: bool = False, num_envs: int = N, **options: Any) -> Any:
    """Make the vector env; for tests with held-out prompts where there are any."""
    if test and env == "Reviews-v0":
        options["split"] = "test"
    return gym.make_vec(f"tokenenv/{env}", num_envs, autoreset_mode="SameStep", **options)


def result(env: str, gold: float, score: float, kl: float, speed: float) -> Result:
    """Make the result of a run, with J at the env's own beta."""
    return Result(gold, score, kl, score - beta(env) * kl, speed)


def timed(learn: Callable[[], Any], tokens: int) -> float:
    """Return the tokens per second of a call that learns from `tokens` tokens."""
    start = time.perf_counter()
    learn()
    return tokens / (time.perf_counter() - start)


def bundled(name: str, env: str, seed: int, tokens: int) -> Result:
    """Run one of `ALGORITHMS`."""
    algorithm = ALGORITHMS[name]
    group = {"group_size": 4} if algorithm.grouped else {}
    agent = algorithm(make(env, num_envs=SLOTS.get(name, N), **group), seed=seed, **SETTINGS[name])
    speed = timed(lambda: agent.learn(tokens), tokens)
    found = evaluate(agent, make(env, test=True), num_texts=TEXTS, seed=1_000 + seed)
    return result(env, found.gold, found.score, found.kl, speed)


def sb3_lm(algorithm: type, settings: dict[str, Any], env: str, seed: int, tokens: int) -> Result:
    """Run an algorithm of SB3's on the language model."""
    model = sb3_model(algorithm, settings, env, seed)
    speed = timed(lambda: model.learn(tokens), tokens)
    found = evaluate(model.policy.lm, make(env, test=True), num_texts=TEXTS, seed=1_000 + seed)
    return result(env, found.gold, found.score, found.kl, speed)


def sb3_model(algorithm: type, settings: dict[str, Any], env: str, seed: int) -> Any:
    """Make an agent of SB3's whose policy is the env's language model."""
    envs = SB3VecEnv(make(env, kl="policy"))
    policy = {"model": envs.unwrapped.model}
    return algorithm(LMActorCriticPolicy, envs, policy_kwargs=policy, seed=seed, **settings)


def sb3_dqn(env: str, seed: int, tokens: int) -> Result:
    """Run SB3's DQN on frozen features and top-k actions, and measure its greedy texts."""
    options = {"observation": "features", "kl": "none"}
    learned = SB3VecEnv(TopKActions(make(env, **options), TOP_K))
    model = DQN("MlpPolicy", learned, seed=seed, **DQN_SETTINGS)
    speed = timed(lambda: model.learn(tokens), tokens)
    envs = TopKActions(make(env, test=True, **options), TOP_K)
    texts = greedy_texts(model, envs, 1_000 + seed)
    gold, score, kl = (statistics.mean(column) for column in zip(*texts, strict=True))
    return result(env, gold, score, kl, speed)


def greedy_texts(model: Any, envs: Any, seed: int) -> list[tuple[float, float, float]]:
    """Return (gold, score, -log pi_ref) of the first texts of each slot."""
    obs, _ = envs.reset(seed=seed)
    kl, seen, texts = np.zeros(N), np.zeros(N, int), []
    while len(texts) < TEXTS:
        actions = model.predict(obs, deterministic=True)[0]
        obs, _, terminations, truncations, infos = envs.step(actions)
        kl -= infos["ref_logprob"]
        for slot in np.flatnonzero(terminations | truncations):
            # The same number from each slot: the first texts to end would be the short ones.
            if seen[slot] < TEXTS // N:
                numbers = (infos["gold"][slot], infos["score"][slot], kl[slot])
                texts.append(tuple(map(float, numbers)))
            kl[slot], seen[slot] = 0.0, seen[slot] + 1
    return texts


LEARNERS: dict[str, Callable[[str, int, int], Result]] = {
    **{name: (lambda *args, name=name: bundled(name, *args)) for name in ALGORITHMS},
    "SB3 PPO": lambda *args: sb3_lm(PPO, PPO_SETTINGS, *args),
    "SB3 A2C": lambda *args: sb3_lm(A2C, A2C_SETTINGS, *args),
    "SB3 DQN": sb3_dqn,
}


def run(learner: str, env: str, seed: int, tokens: int) -> Result:
    """Run one learner once, on one core."""
    torch.set_num_threads(1)
    return LEARNERS[learner](env, seed, tokens)


def cell(values: list[float]) -> str:
    """Return the mean and standard deviation over seeds, as a table's cell."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def table(env: str, found: dict[str, list[Result]], tokens: int) -> Table:
    """Return the table of one env."""
    title = f"{env}, {tokens:,} tokens, beta {beta(env)}"
    made = Table("", "gold", "score", "KL", "J", "tokens/s", title=title)
    for learner, results in found.items():
        columns = [
            [getattr(r, name) for r in results] for name in ("gold", "score", "kl", "objective")
        ]
        speed = statistics.median(r.tokens_per_second for r in results)
        made.add_row(learner, *map(cell, columns), f"{speed:,.0f}")
    return made


def beta(env: str) -> float:
    """Return the id's own KL coefficient."""
    return make(env, num_envs=1).unwrapped.kl_coef


def speeds(env: str, repeats: int) -> str:
    """Return a line with the tokens/s of the bundled PPO and of SB3's, for the same model and
    updates on one core, in turns: medians and their ratio."""
    torch.set_num_threads(1)
    ours, theirs = [], []
    for seed in range(repeats):
        agent = ALGORITHMS["ppo"](make(env), seed=seed, **SETTINGS["ppo"])
        ours.append(timed(lambda agent=agent: agent.learn(4_096), 4_096))
        model = sb3_model(PPO, PPO_SETTINGS, env, seed)
        theirs.append(timed(lambda model=model: model.learn(4_096), 4_096))
    fast, slow = statistics.median(ours), statistics.median(theirs)
    return (
        f"{env}: PPO {fast:,.0f} tokens/s, SB3's PPO {slow:,.0f} on the same model: "
        f"{fast / slow:.1f} times"
    )


def main() -> None:
    """Run what is asked for, and print a table for each env."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--learners", nargs="*", metavar="NAME", default=list(LEARNERS), choices=list(LEARNERS)
    )
    parser.add_argument("--envs", nargs="*", default=list(ENVS), choices=list(ENVS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--total-tokens", type=int, default=60_000)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a core each")
    help = "of the speed comparison; 0 leaves it out"
    parser.add_argument("--repeats", type=int, default=3, help=help)
    args = parser.parse_args()
    plan = [
        (learner, env, seed)
        for env in args.envs
        for learner in args.learners
        for seed in args.seeds
    ]
    columns = [*zip(*plan, strict=True), [args.total_tokens] * len(plan)]
    with ProcessPoolExecutor(args.workers) as pool:
        runs = pool.map(run, *columns)
        found = list(track(runs, "runs", total=len(plan), console=console, transient=True))
    results = dict(zip(plan, found, strict=True))
    for env in args.envs if plan else ():
        rows = {
            learner: [results[learner, env, seed] for seed in args.seeds]
            for learner in args.learners
        }
        console.print(table(env, rows, args.total_tokens))
    for env in args.envs if args.repeats else ():
        console.print(speeds(env, args.repeats))


if __name__ == "__main__":
    main()
