"""The cost of a step by position, and beside recomputing every prefix.

It prints ratios, each from this one run. By position: 64 texts of three models of 1.1 million
parameters, and 48 texts of three of hidden size 192, 6 layers and 6 key/value heads. Beside every
prefix: 64 texts with the bundled models of PyDocs-v0, which have no positions for such long texts.
`profile_step.py` says where the time of a step goes, beside the bare cached forwards.
"""

from argparse import Namespace

import gymnasium as gym
import numpy as np
import torch
from machine import Clock, bandwidth
from profiled import begin, cache_bytes_per_token, subject
from rich.console import Console
from timing import medians

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents.agent import default_policy
from tokenenv.agents.config import AgentConfig
from tokenenv.agents.learning.policy import LMPolicy
from tokenenv.agents.rollout.actor import Actor
from tokenenv.models.batching import hidden_states
from tokenenv.models.trunks import logits_head, trunk_of

ENV, N = "tokenenv/PyDocs-v0", 64
console = Console(width=150)


def make_envs(max_new_tokens: int) -> gym.vector.VectorEnv:
    """Make an env of N texts on the id's own prompts (16 to 24 tokens), long enough for every
    measurement."""
    envs = gym.make_vec(ENV, num_envs=N, max_new_tokens=max_new_tokens, autoreset_mode="SameStep")
    start(envs)
    return envs


def start(envs: gym.vector.VectorEnv) -> dict:
    """Reset an env, always to the same prompts, and return the observation."""
    return envs.reset(seed=0)[0]


def make_policy(envs: gym.vector.VectorEnv) -> LMPolicy:
    """Make the bundled agents' default policy, kept from ending texts, so that no step also begins
    one."""
    policy = default_policy(envs, AgentConfig())
    head, stops = policy.head, list(envs.unwrapped.token_spec.stop_token_ids)
    policy.head = lambda states: head(states).index_fill(-1, torch.tensor(stops), -torch.inf)
    return policy


def by_position(model: str, number: int, rounds: int = 3, steps: int = 250) -> None:
    """Print the time of act + step around response tokens 16 and 240, of `rounds` times whole
    texts, and what reading the keys and values between them alone would cost."""
    options = {"even": True, "compile": False, "lora_rank": 0, "frozen_dtype": None}
    asked = Namespace(model=model, device="cpu", dtype="float32", steps=steps, **options)
    # An env for texts of T tokens that begin together has room for three times as many steps.
    chosen = subject(asked, number, steps // 3)
    clock, times = Clock("cpu"), np.zeros((rounds, steps))
    for spent in times:
        obs = begin(chosen, even=True)
        for step in range(steps):
            started = clock()
            obs = chosen.envs.step(chosen.agent.actor.act(obs)[0].numpy())[0]
            spent[step] = clock() - started
    early, late = (1e3 * float(np.median(times[:, p - 8 : p + 9])) for p in (16, 240))
    between = number * (240 - 16) * sum(map(cache_bytes_per_token, chosen.trunks))
    console.print(
        f"{model}, N={number}: act + step at token 16 {early:.2f} ms, at 240 {late:.2f} ms, ratio "
        f"{late / early:.2f}; the keys and values between at the speed of a large copy: "
        f"{1e3 * between / bandwidth('cpu'):.2f} ms"
    )


def against_full_prefix(repetitions: int = 2, steps: int = 128) -> None:
    """Print the tokens/s of act + step, and of a batched loop that recomputes the prefix in the
    same three models."""
    envs = make_envs(steps + 1)
    env, policy = envs.unwrapped, make_policy(envs)
    reference_head, scorer = logits_head(env.reference, policy.vocab_size), env._task.scorer

    def stepping() -> None:
        actor, obs = Actor(policy, seed=0), start(envs)
        for _ in range(steps):
            obs = envs.step(actor.act(obs)[0].numpy())[0]

    @torch.no_grad()
    def full_prefix() -> None:
        obs, rows = start(envs), np.arange(N)
        texts, lengths = torch.from_numpy(obs["tokens"]), obs["length"]

        def last_states(model: object) -> torch.Tensor:
            states = hidden_states(trunk_of(model), texts[:, : lengths.max()], lengths)
            return states[rows, lengths - 1]

        for _ in range(steps):
            token = torch.multinomial(policy.head(last_states(policy.model)).softmax(-1), 1)
            reference_head(last_states(env.reference)).log_softmax(-1).gather(1, token)
            texts[rows, lengths] = token[:, 0]
            lengths += 1
            scorer.head(last_states(scorer.model))

    found = medians({"stepping": stepping, "full prefix": full_prefix}, repetitions)
    speed = {name: N * steps / value for name, value in found.items()}
    ratio = speed["stepping"] / speed["full prefix"]
    console.print(
        f"T={steps}, N={N}: stepping {speed['stepping']:,.0f} tokens/s, "
        f"full-prefix loop {speed['full prefix']:,.0f}, ratio {ratio:.1f} (at least 20)"
    )


if __name__ == "__main__":
    by_position("1m", N)
    by_position("3m", 48)
    against_full_prefix()
