"""What it costs to begin a group: a reset of 32 texts with one prompt, in units of a step.

It prints the env's reset and the agent's first token, each with the prompt read once and copied,
and with the prompt read in every slot, in CPU time of one thread.

    python benchmarks/group_start.py [MODEL] [PROMPT_TOKENS]
"""

import sys
import time
from importlib.resources import files

import gymnasium as gym
import numpy as np
import torch
from rich.console import Console
from timing import medians

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents.learning.policy import LMPolicy
from tokenenv.agents.rollout import actor
from tokenenv.agents.rollout.actor import Actor
from tokenenv.env import engine

GROUP, STEPS = 32, 5
console = Console()


def read_in_every_slot(tokens: torch.Tensor, lengths: np.ndarray) -> np.ndarray:
    """Take all texts for different ones."""
    return np.arange(len(tokens))


def main(model: str, prompt_tokens: int, repetitions: int = 3) -> None:
    """Print the costs for one model and one length of the prompt."""
    envs = gym.make_vec(
        "tokenenv/TextGen-v0",
        num_envs=GROUP,
        group_size=GROUP,
        model=model,
        prompts=[list(range(10, 10 + prompt_tokens))],
        max_new_tokens=STEPS + 2,
        stop_token_ids=[0],
        reward=lambda prompt, response: 0.0,
    )
    obs, action = envs.reset(seed=0)[0], np.full(GROUP, 10)
    acting, policy = {}, LMPolicy(envs.unwrapped.reference)

    def begin(name: str) -> None:
        once = engine.first_equals, actor.first_equals
        if name == "every":
            engine.first_equals = actor.first_equals = read_in_every_slot
        envs.reset(seed=0)
        engine.first_equals, actor.first_equals = once

    def first_token(name: str) -> None:
        once = actor.first_equals
        if name == "every":
            actor.first_equals = read_in_every_slot
        acting.setdefault(name, Actor(policy)).refresh()
        acting[name].act(obs)
        actor.first_equals = once

    def steps() -> None:
        envs.reset(seed=0)
        for _ in range(STEPS):
            envs.step(action)

    def tokens() -> None:
        running, texts = acting["once"], {key: value.copy() for key, value in obs.items()}
        running.refresh()
        for _ in range(STEPS + 1):
            token = running.act(texts)[0].numpy()
            texts["tokens"][np.arange(GROUP), texts["length"]] = token
            texts["length"] += 1

    found = medians(
        {
            "reset, read once": lambda: begin("once"),
            "reset, read in every slot": lambda: begin("every"),
            "first token, read once": lambda: first_token("once"),
            "first token, read in every slot": lambda: first_token("every"),
            "reset and steps": steps,
            "first token and tokens": tokens,
        },
        repetitions,
        time.process_time,
    )
    step = (found["reset and steps"] - found["reset, read once"]) / STEPS
    token = (found["first token and tokens"] - found["first token, read once"]) / STEPS
    console.print(f"{model}: {GROUP} texts with one prompt of {prompt_tokens} tokens")
    for name, unit in (("reset", step), ("first token", token)):
        once, every = (found[f"{name}, read {how}"] for how in ("once", "in every slot"))
        console.print(
            f"  {name}: {1e3 * once:.1f} ms ({once / unit:.1f} steps of {1e3 * unit:.1f} ms); "
            f"read in every slot: {1e3 * every:.1f} ms ({every / unit:.1f} steps)"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    bundled = str(files("tokenenv.envs") / "assets" / "pydocs-lm")
    model, prompt_tokens = [*sys.argv[1:], *(bundled, "24")[len(sys.argv) - 1 :]]
    main(model, int(prompt_tokens))
