"""Prefixes given at reset: what follows is paid as in the same text written from its start,
memories of terms included."""

from typing import Any

import numpy as np
import pytest
import tasks
from gymnasium.vector import AutoresetMode

from tokenenv.agents import VinePPO
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.rewards import Process, Scaled, Segment

REVIEWS, SUMS = "tokenenv/Reviews-v0", "tokenenv/Arithmetic-v0"
MODES = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED]
DESIGNS: dict[str, tuple[str, Any]] = {
    "terminal": (REVIEWS, "terminal"),
    "token": (REVIEWS, "token"),
    "delta": (REVIEWS, "delta"),
    "segment": (REVIEWS, "segment"),
    "rare cuts": (REVIEWS, {"s": Segment(threshold=3.0)}),
    "scaled": (REVIEWS, {"s": Scaled(Segment(threshold=1.0)), "end": ("terminal", 0.5)}),
    "process": (SUMS, "process"),
    "differences of steps": (SUMS, Process("delta")),
    "no score where cut": (REVIEWS, "segment"),
}


def make(
    name: str, mode: AutoresetMode = AutoresetMode.SAME_STEP, num_envs: int = 8, **options: Any
) -> Any:
    env_id, reward = DESIGNS[name]
    options |= {"max_new_tokens": 10, "score_truncated": name != "no score where cut"}
    return tasks.make_vec(num_envs, mode, env_id, reward=reward, **options)


def written(envs: Any) -> tuple[list[list[int]], list[list[int]], np.ndarray]:
    """Prompts and random responses, one a row, some ended by a stop token, and what stepping would
    pay for each, (N, T)."""
    spec, rng = envs.unwrapped.token_spec, np.random.default_rng(0)
    obs, _ = envs.reset(seed=0)
    prompts = [
        row[:length].tolist()
        for row, length in zip(obs["tokens"], obs["prompt_length"], strict=True)
    ]
    words = np.setdiff1d(np.arange(spec.vocab_size), spec.stop_token_ids)
    responses = [rng.choice(words, 10).tolist() for _ in prompts]
    for row in range(0, len(responses), 3):
        responses[row][6 + row % 4 :] = [spec.stop_token_ids[0]]
    return prompts, responses, envs.unwrapped.score_episodes(prompts, responses).step_rewards


@pytest.mark.parametrize(
    ("name", "mode"),
    [*[(name, MODES[1]) for name in DESIGNS], ("rare cuts", MODES[0]), ("rare cuts", MODES[2])],
)
def test_what_follows_a_prefix_is_paid_as_in_the_whole_text(name: str, mode: AutoresetMode) -> None:
    """The rows begin at different places of their texts, one of them at the start; an autoreset has
    no prefix."""
    envs = make(name, mode)
    prompts, responses, paid = written(envs)
    starts = np.arange(len(prompts)) % 5
    prefixes = [response[:start] for response, start in zip(responses, starts, strict=True)]
    envs.reset(options={"prompts": prompts, "prefixes": prefixes})
    for step in range(10):
        at = starts + step
        going = np.array([t < len(response) for t, response in zip(at, responses, strict=True)])
        if mode == AutoresetMode.DISABLED and not going.all():
            break
        rows = np.flatnonzero(going)
        actions = [
            response[t] if t < len(response) else 0
            for t, response in zip(at, responses, strict=True)
        ]
        rewards = envs.step(np.array(actions))[1]
        np.testing.assert_allclose(rewards[rows], paid[rows, at[rows]], atol=1e-5)
    assert step > 1


def test_memory_survives_a_saved_state_and_a_partial_reset_with_prefixes() -> None:
    envs, other = make("rare cuts"), make("rare cuts")
    prompts, responses, paid = written(envs)
    prefixes = [response[:4] for response in responses]
    envs.reset(options={"reset_mask": np.arange(8) < 3, "prompts": prompts, "prefixes": prefixes})
    envs.unwrapped.fork([0], [5])
    other.reset(seed=3)
    other.unwrapped.load_state(envs.unwrapped.save_state())
    rows = [0, 1, 2, 5]
    actions = np.array([responses[row][4] for row in (0, 1, 2, 3, 4, 0, 6, 7)])
    for env in (envs, other):
        np.testing.assert_allclose(env.step(actions)[1][rows], paid[[0, 1, 2, 0], 4], atol=1e-5)


@pytest.mark.filterwarnings("ignore:reward-to-go")
@pytest.mark.parametrize(
    ("name", "mode"),
    [*[("rare cuts", mode) for mode in MODES], ("segment", MODES[1]), ("process", MODES[1])],
)
def test_vineppos_values_are_what_the_rest_of_the_text_is_paid(
    name: str, mode: AutoresetMode
) -> None:
    """At a temperature near 0 a text goes on in one way only."""
    agent = VinePPO(make(name, mode, 12, kl="none"), rollouts=2, segments=2, seed=1)
    agent.actor.temperature = 1e-6
    batch = EpisodeBatch.stack(agent.collector.collect(40))
    states, rest = [], []
    for e in batch.unstack():
        for t in (0, 2, 4):
            if len(e.response) > t:
                states.append((e.prompt, e.response[:t]))
                rest.append(float(e.reward[t:].sum()))
    np.testing.assert_allclose(agent.values(states), rest, atol=1e-4)
    assert np.abs(rest).max() > 0.05
