"""Token reward models from N preference pairs, by objective: what each is worth, and what it costs.

Pairs are texts of the reference, ranked by the gold score (`tokenenv sample`). Objectives that take
scores get the gold scores of the same texts, and those that take texts alone get the better ones,
without saying so. "value-labels" gets N / 16 of the texts, with the value of every prefix from four
continuations each. An eighth of the pairs is held out for early stopping, as a user would. On the
automata a model is a new Llama of two layers; on Reviews-v0 training begins from the reference.
Log-ratios on automata are to a Llama that was trained on the reference's texts.

Results are lines of a file, which is added to. The table shows all that is in it, for each N or for
the largest, as means over seeds with the standard error of the mean:

- rho: Spearman's correlation of token rewards with the exact advantage of the reference, over the
  tokens of 512 texts (Monte-Carlo advantage of 48 texts on Reviews-v0, whose own reliability is
  printed), and "rho*" with that of the optimum;
- acc: the share of 512 other pairs in which the better text has the higher sum;
- tokens: that the training read, and seconds of it;
- gold: the mean gold score of 256 texts after PPO on `--ppo-tokens` tokens, with the model as the
  reward. Its weight is the slope of gold on the sum of rewards, over the training texts.

Controls: "uniform" (the gold score of a text in equal shares), "oracle" (the exact advantage of the
optimum), "position" (the number of the token) and "terminal".
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
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
from tokenenv.agents.run.evaluate import evaluate
from tokenenv.envs.language.bundled import ASSETS
from tokenenv.fit import FitConfig, fit
from tokenenv.fit.advantages import exact_advantages, monte_carlo_advantages
from tokenenv.fit.examples import Text
from tokenenv.fit.measure import spearman
from tokenenv.fit.objectives import OBJECTIVES
from tokenenv.fit.sample import sample

AUTOMATA = ("Negation-v0", "PlantedPhrase-v0", "DelayedKey-v0", "Brackets-v0")
ENVS = (*AUTOMATA, "Reviews-v0")
SIZES = (64, 256, 1024, 4096)
CONTROLS = ("terminal", "uniform", "oracle", "position")
STEPS = 320
"""Optimizer steps of the smaller runs; larger ones make five passes."""
console = Console(width=200)
Row = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What one fitted model is worth."""

    rho: float
    rho_optimal: float
    accuracy: float
    tokens: int
    seconds: float
    gold: float


@dataclass
class World:
    """An environment, and everything that its objectives share."""

    env: str
    seed: int
    ppo_tokens: int
    folder: Path
    results: Path
    """Where a line is added for each result."""
    pairs: list[Row] = field(default_factory=list)
    others: list[Row] = field(default_factory=list)
    """Pairs that no model learns from."""
    texts: list[Text] = field(default_factory=list)
    """Texts of the reference whose tokens have a known advantage."""
    advantages: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def make(self, num_envs: int = 64, **options: Any) -> Any:
        """Make the vector env."""
        return gym.make_vec(f"tokenenv/{self.env}", num_envs, autoreset_mode="SameStep", **options)


def world_of(env: str, seed: int, most: int, ppo_tokens: int, folder: Path, results: Path) -> World:
    """Sample the data of an environment."""
    world = World(env, seed, ppo_tokens, folder, results)
    reviews = env == "Reviews-v0"
    envs = world.make(128 if reviews else 512)
    rows = sample(envs, "ranking", most + 512, seed=seed)
    world.pairs, world.others = rows[:most], rows[most:]
    some = sample(envs, "scores", 48 if reviews else 512, seed=1000 + seed)
    world.texts = [text_of(row, "response") for row in some]
    if not reviews:
        for of in ("reference", "optimal"):
            world.advantages[of] = exact_advantages(world.make(1), world.texts, of)
        return world
    credit = monte_carlo_advantages(envs, world.texts, continuations=16, seed=seed)
    world.advantages["reference"] = credit.mean
    console.print(f"{env}: reliability of the Monte-Carlo advantage {credit.reliability:.2f}")
    return world


def text_of(row: Row, name: str) -> Text:
    """Make the text of a row's column."""
    ids = (np.asarray(row[key], dtype=np.int64) for key in ("prompt_ids", f"{name}_ids"))
    return Text(*ids)


def score_rows(pairs: Sequence[Row]) -> list[Row]:
    """Return both texts of each pair with their scores."""
    return [
        {
            "prompt_ids": row["prompt_ids"],
            "response_ids": row[f"{name}_ids"],
            "score": row[f"{name}_score"],
        }
        for row in pairs
        for name in ("chosen", "rejected")
    ]


def outcome_rows(pairs: Sequence[Row]) -> list[Row]:
    """Return both texts of each pair, and whether the score is above 0."""
    return [row | {"score": float(row["score"] > 0)} for row in score_rows(pairs)]


def text_rows(pairs: Sequence[Row]) -> list[Row]:
    """Return the better text of each pair, and nothing else."""
    return [{"prompt_ids": row["prompt_ids"], "response_ids": row["chosen_ids"]} for row in pairs]


def rows_for(name: str, world: World, size: int) -> tuple[list[Row], list[Row]]:
    """Return what an objective learns from, and what is held out for early stopping."""
    held_out = max(16, size // 8)
    pairs = world.pairs[:size]
    parts = (pairs[held_out:], pairs[:held_out])
    kind = OBJECTIVES[name].kind
    if kind == "values":
        count = max(8, size // 16)
        rows = sample(world.make(), "values", count, seed=world.seed, continuations=4)
        return rows[count // 8 or 1 :], rows[: count // 8 or 1]
    if name == "outcome":
        return outcome_rows(parts[0]), outcome_rows(parts[1])
    maker = {"ranking": list, "scores": score_rows, "texts": text_rows}[kind]
    return maker(parts[0]), maker(parts[1])


def fitted(name: str, world: World, size: int, lm: Path | None, teacher: Path | None) -> Any:
    """Train a reward model on `size` pairs."""
    rows, held_out = rows_for(name, world, size)
    objective = OBJECTIVES[name]
    reviews = world.env == "Reviews-v0"
    start: Any = "new"
    if reviews:
        start = str(ASSETS / "reviews-lm")
    elif objective.readout == "log-ratio":
        start = str(lm)
    core = world.make(1).unwrapped
    config = FitConfig(
        data=rows,
        held_out=held_out,
        out=world.folder / f"{name}-{size}",
        objective=name,
        model=start,
        tokenizer=core.token_spec.tokenizer,
        reference=(core.reference if name == "corrupted" else None),
        teacher=None if teacher is None else str(teacher),
        hidden_size=64,
        num_layers=2,
        lr=1e-3 if reviews or objective.readout == "log-ratio" else 3e-3,
        # "corrupted" makes eight texts of one.
        epochs=math.ceil(passes(len(rows)) / (4 if name == "corrupted" else 1)),
        patience=5 if size > 256 else 20,
        seed=world.seed,
    )
    return fit(config)


def passes(rows: int) -> int:
    """Return the passes over so many rows: `STEPS` steps where that is more than five passes."""
    return max(5, math.ceil(STEPS * 32 / rows))


def language_model(world: World) -> Path:
    """Train a small Llama on texts of the reference, for log-ratios on an automaton."""
    from torch.nn import functional as F
    from transformers import LlamaConfig, LlamaForCausalLM

    spec = world.make(1).unwrapped.token_spec
    rows = sample(world.make(), "texts", 8192, seed=2000 + world.seed)
    tokens = torch.tensor([row["prompt_ids"] + row["response_ids"] for row in rows])
    torch.manual_seed(world.seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=176,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=2,
        max_position_embeddings=256,
        vocab_size=spec.vocab_size,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=spec.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(4):
        for group in torch.randperm(len(tokens)).split(64):
            logits = model(input_ids=tokens[group], use_cache=False).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[group][:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.save_pretrained(world.folder / "lm")
    spec.tokenizer.save_pretrained(world.folder / "lm")
    return world.folder / "lm"


@torch.no_grad()
def rewards_of(reader: Any, texts: Sequence[Text]) -> list[np.ndarray]:
    """Return the reward of each token of some texts."""
    reward = reader.read(texts).reward_BR.cpu().numpy()
    return [row[: len(text.response)] for row, text in zip(reward, texts, strict=True)]


def accuracy(reader: Any, pairs: Sequence[Row]) -> float:
    """Return the share of pairs whose better text has the higher sum of rewards."""
    better, worse = (
        np.asarray([row.sum() for row in rewards_of(reader, [text_of(r, name) for r in pairs])])
        for name in ("chosen", "rejected")
    )
    return float(np.mean((better > worse) + 0.5 * (better == worse)))


def rho(world: World, rewards: list[np.ndarray], of: str) -> float:
    """Return Spearman's correlation of token rewards with an advantage; NaN where it is not
    known."""
    return spearman(rewards, world.advantages[of])[0] if of in world.advantages else math.nan


def slope(envs: Any, rows: Sequence[Row]) -> float:
    """Return the slope of the gold score on the sum of rewards, 0 or more."""
    prompts, responses = zip(
        *((row["prompt_ids"], row["response_ids"]) for row in rows), strict=True
    )
    scores = envs.unwrapped.score_episodes(prompts, responses)
    proxy = scores.terms["fitted"].sum(1)
    spread = float(proxy.var())
    return max(0.0, float(np.cov(proxy, scores.gold, bias=True)[0, 1]) / spread) if spread else 0.0


def trained(world: World, reward: Any, **models: Any) -> float:
    """Return the gold score after PPO."""
    options = {"split": "test"} if world.env == "Reviews-v0" else {}
    envs = world.make(reward=reward, **models)
    agent = PPO(envs, seed=world.seed, lr=1e-3)
    agent.learn(world.ppo_tokens)
    return evaluate(agent, world.make(**options), num_texts=256, seed=world.seed).gold


def result_of(name: str, world: World, size: int, lm: Path | None, teacher: Path | None) -> Result:
    """Train a reward model, measure it, and train a policy on it."""
    start = time.perf_counter()
    found = fitted(name, world, size, lm, teacher)
    seconds = time.perf_counter() - start
    rewards = rewards_of(found.reader, world.texts)
    design = OBJECTIVES[name].design
    option = "implicit_model" if design == "implicit" else "reward_model"
    models = {option: str(found.folder)}
    weight = slope(
        world.make(1, reward={"fitted": design}, kl="reference", **models),
        score_rows(world.pairs[: min(size, 256)]),
    )
    return Result(
        rho(world, rewards, "reference"),
        rho(world, rewards, "optimal"),
        accuracy(found.reader, world.others),
        int(found.measures["tokens"]),
        seconds,
        trained(world, {"fitted": (design, weight)}, **models),
    )


def control(name: str, world: World) -> Result:
    """Return what a control is worth; it is not trained."""
    lengths = [len(text.response) for text in world.texts]
    gold = math.nan
    if name == "position":
        rewards = [np.arange(length, dtype=float) for length in lengths]
    elif name == "oracle" and "optimal" in world.advantages:
        rewards = world.advantages["optimal"]
        gold = trained(world, "oracle")
    elif name == "uniform":
        pairs = [(t.prompt.tolist(), t.response.tolist()) for t in world.texts]
        golds = world.make(1).unwrapped.score_episodes(*zip(*pairs, strict=True)).gold
        rewards = [np.full(n, g / n) for n, g in zip(lengths, golds, strict=True)]
        gold = trained(world, "uniform")
    elif name == "terminal":
        rewards = [np.zeros(length) for length in lengths]
        gold = trained(world, "terminal")
    else:
        return Result(*[math.nan] * 3, 0, 0.0, math.nan)
    return Result(
        rho(world, rewards, "reference"), rho(world, rewards, "optimal"), math.nan, 0, 0.0, gold
    )


def run(
    env: str,
    seed: int,
    names: Sequence[str],
    sizes: Sequence[int],
    ppo_tokens: int,
    results: Path,
) -> None:
    """Measure all objectives in one environment with one seed."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        world = world_of(env, seed, max(sizes), ppo_tokens, Path(folder), results)
        for name in CONTROLS:
            told(world, name, 0, partial(control, name, world))
        measure(world, names, sizes)


def measure(world: World, names: Sequence[str], sizes: Sequence[int]) -> None:
    """Train a model by each objective from each number of pairs."""
    lm = None
    if world.env in AUTOMATA and any(OBJECTIVES[n].readout == "log-ratio" for n in names):
        lm = language_model(world)
    for size in sizes:
        teacher = None
        for name in sorted(names, key=lambda name: name.startswith("share-")):
            if name.startswith("share-") and teacher is None:
                teacher = world.folder / f"score-value-{size}"
                if not teacher.exists():
                    fitted("score-value", world, size, None, None)
            told(world, name, size, partial(result_of, name, world, size, lm, teacher))


def told(world: World, name: str, size: int, work: Callable[[], Result]) -> None:
    """Write down what `work` gives."""
    found = work()
    line = {"env": world.env, "seed": world.seed, "objective": name, "pairs": size}
    with world.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line | asdict(found)) + "\n")
    console.print(line, found, highlight=False, soft_wrap=True)


def mean(values: Sequence[float], digits: int) -> str:
    """Return the mean and its standard error."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "-"
    error = f" ± {np.std(known, ddof=1) / math.sqrt(len(known)):.{digits}f}" if known[1:] else ""
    return f"{np.mean(known):.{digits}f}{error}"


def table(env: str, rows: Sequence[Row]) -> Table:
    """Return the table of one environment, from lines of the results."""
    sizes = sorted({row["pairs"] for row in rows} - {0})
    seeds = len({row["seed"] for row in rows})
    titles = ["objective", *(f"rho {size}" for size in sizes), "rho*", "acc", "tokens", "seconds"]
    made = Table(*titles, *(f"gold {size}" for size in sizes), title=f"{env}, {seeds} seeds")
    for name in dict.fromkeys(row["objective"] for row in rows):

        def figure(key: str, size: int, digits: int = 2, name: str = name) -> str:
            known = [r[key] for r in rows if r["objective"] == name and r["pairs"] in (0, size)]
            return mean(known, digits)

        last = sizes[-1]
        made.add_row(
            name,
            *(figure("rho", size) for size in sizes),
            figure("rho_optimal", last),
            figure("accuracy", last),
            figure("tokens", last, 0),
            figure("seconds", last, 0),
            *(figure("gold", size) for size in sizes),
        )
    return made


def main() -> None:
    """Run what is asked for, and print a table for each environment."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--envs", nargs="*", default=list(ENVS), choices=ENVS)
    parser.add_argument("--objectives", nargs="*", default=None, choices=list(OBJECTIVES))
    parser.add_argument("--pairs", nargs="*", type=int, default=list(SIZES))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--ppo-tokens", type=int, default=16_000)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--results", type=Path, default=Path("runs/fit_reward.jsonl"))
    args = parser.parse_args()
    unlabelled = [name for name in OBJECTIVES if name not in ("labels", "values")]
    names = args.objectives or unlabelled
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(run, env, seed, names, args.pairs, args.ppo_tokens, args.results)
            for env in args.envs
            for seed in args.seeds
        ]
        for job in as_completed(jobs):
            job.result()
    lines = args.results.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for env in dict.fromkeys(row["env"] for row in rows):
        console.print(table(env, [row for row in rows if row["env"] == env]))


if __name__ == "__main__":
    main()
