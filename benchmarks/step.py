"""The cost of a step by position, and beside recomputing every prefix.

It prints two ratios, both from this one run, with the bundled models of PyDocs-v0 and N = 64 texts.
`profile_step.py` says where the time of a step goes, beside the bare cached forwards.
"""

import time
from collections.abc import Callable

import gymnasium as gym
import numpy as np
import torch
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
console = Console()


def make_envs(max_new_tokens: int) -> gym.vector.VectorEnv:
    """Make an env of N texts on the id's own prompts (16 to 24 tokens), long enough for every
    measurement."""
    envs = gym.make_vec(ENV, num_envs=N, max_new_tokens=max_new_tokens, autoreset_mode="SameStep")
    start(envs)
    return envs


def start(envs: gym.vector.VectorEnv) -> dict:
    """Reset an env, always to the same prompts, and return the observation."""
    return envs.reset(seed=0)[0]


def running_tokens(envs: gym.vector.VectorEnv, steps: int) -> np.ndarray:
    """Return random actions (steps, N), none of which ends a text."""
    tokens = np.random.default_rng(0).integers(10, envs.single_action_space.n, (steps, N))
    assert not np.isin(tokens, envs.unwrapped.token_spec.stop_token_ids).any()
    return tokens


def make_policy(envs: gym.vector.VectorEnv) -> LMPolicy:
    """Make the bundled agents' default policy, kept from ending texts, so that no step also begins
    one."""
    policy = default_policy(envs, AgentConfig())
    head, stops = policy.head, list(envs.unwrapped.token_spec.stop_token_ids)
    policy.head = lambda states: head(states).index_fill(-1, torch.tensor(stops), -torch.inf)
    return policy


def seconds(run: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def by_position(rounds: int = 5, steps: int = 250) -> None:
    """Print the step time around positions 16 and 240, of `rounds` times whole texts."""
    envs = make_envs(steps + 6)
    tokens, times = running_tokens(envs, steps), np.zeros((rounds, steps))
    for round_times in times:
        start(envs)
        round_times[:] = [seconds(lambda action=action: envs.step(action)) for action in tokens]
    early, late = (1e3 * float(np.median(times[:, p - 8 : p + 9])) for p in (16, 240))
    console.print(
        f"step at position 16: {early:.2f} ms, at 240: {late:.2f} ms, "
        f"ratio {late / early:.2f} (at most 1.5)"
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
    by_position()
    against_full_prefix()
