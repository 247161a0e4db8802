"""Runs end near their budget, in the middle of a batch, whatever writes the texts."""

import numpy as np
import pytest
import tasks
from hypothesis import given
from hypothesis import strategies as st
from runs import same
from toy_env import ToyEnv

from tokenenv.agents import GRPO, KLQ, PPO, BestOfN, VinePPO
from tokenenv.agents.rollout import text_collector
from tokenenv.agents.rollout.ending import Ending
from tokenenv.env.vector_env import TokenVectorEnv


class Text:
    def __init__(self, length):
        self.response = [0] * length


def run_of(agent, total):
    """The tokens seen after each update, and the episodes that each learned from."""
    seen, batches = [], []
    agent.learn(
        total,
        on_update=lambda metrics, episodes: (
            seen.append(int(metrics["time/tokens"])),
            batches.append(episodes),
        ),
    )
    return seen, batches


@pytest.mark.parametrize(("algorithm", "total"), [(PPO, 500), (KLQ, 160), (GRPO, 460)])
def test_a_run_goes_beyond_its_end_by_less_than_a_token_in_each_slot(algorithm, total):
    """The last update learns from what has ended by then, in whole groups."""
    group_size = 4 if algorithm.grouped else 1
    agent = algorithm(
        ToyEnv(16, group_size=group_size, kl_coef=0.1), batch_tokens=200, epochs=1, minibatches=1
    )
    seen, batches = run_of(agent, total)
    assert total <= agent.tokens_seen == seen[-1] < total + 16
    learned = [sum(len(e.response) for e in episodes) for episodes in batches]
    assert all(tokens >= 200 for tokens in learned[:-1])
    for episodes in batches:
        for first in range(0, len(episodes), group_size):
            prompts = {tuple(e.prompt) for e in episodes[first : first + group_size]}
            assert len(prompts) == 1
    if len(seen) > 1:
        assert seen[-1] - seen[-2] >= 100 - 16


def test_a_run_too_short_for_a_text_waits_for_one():
    """Or for one group."""
    for algorithm, group_size in ((PPO, 1), (GRPO, 4), (BestOfN, 4)):
        agent = algorithm(ToyEnv(16, group_size=group_size))
        seen, [episodes] = run_of(agent, 3)
        assert len(episodes) >= 1
        assert seen[0] <= 16 * 8


def test_what_vine_ppo_goes_beyond_is_its_last_continuations():
    agent = VinePPO(tasks_env(4, reward="token"), batch_tokens=30, segments=1, rollouts=2)
    found = []
    agent.learn(100, on_update=lambda metrics, episodes: found.append(metrics))
    before = agent.tokens_seen - found[-1]["time/rollout_tokens"]
    assert before < 100 + 4


def tasks_env(num_envs, **options):
    return TokenVectorEnv(num_envs, task=tasks.toy(), autoreset_mode="SameStep", **options)


def test_no_more_groups_are_drawn_beyond_the_end(monkeypatch):
    """Though all that were drawn are flat."""
    agent = GRPO(ToyEnv(8, group_size=4), skip_flat_groups=True, batch_tokens=60)
    monkeypatch.setattr(agent, "without_flat_groups", lambda episodes: [])
    agent.learn(80)
    assert agent.tokens_seen < 80 + 8


@pytest.mark.parametrize("max_staleness", [None, 1])
def test_a_run_that_is_stopped_within_its_last_batch_ends_the_same(tmp_path, max_staleness):
    """Bit for bit: gone on with as it is, and after a checkpoint by whoever goes on from that."""
    options = {"batch_tokens": 80, "epochs": 1, "minibatches": 1, "max_staleness": max_staleness}
    whole, agent = (PPO(ToyEnv(8), **options) for _ in range(2))
    seen = run_of(whole, 200)[0]
    stop_after(agent, steps=(seen[-2] + 40) // 8)
    agent.learn(200)
    assert seen[-2] < agent.tokens_seen < 200
    assert is_equal(agent.learn(200), whole)

    agent = PPO(ToyEnv(8), **options)
    stop_after(agent, steps=(seen[-2] + 40) // 8)
    agent.learn(200).save(tmp_path / "c")
    loaded = PPO.load(tmp_path / "c", ToyEnv(8))
    assert is_equal(loaded.learn(200), agent.learn(200))
    assert (loaded.updates, loaded.tokens_seen) == (whole.updates, whole.tokens_seen)


def is_equal(agent, other):
    states = [dict(one.policy.state_dict()) for one in (agent, other)]
    return (agent.updates, agent.tokens_seen) == (other.updates, other.tokens_seen) and same(
        *states
    )


def stop_after(agent, steps):
    advance, taken = agent.collector._advance, []

    def counted(*args):
        found = advance(*args)
        taken.append(1)
        if len(taken) == steps:
            agent.stop()
        return found

    agent.collector._advance = counted


@pytest.mark.parametrize(("algorithm", "group_size"), [(PPO, 1), (GRPO, 2)])
@pytest.mark.parametrize("max_staleness", [0, 1])
def test_texts_of_an_engine_end_there_too(monkeypatch, algorithm, group_size, max_staleness):
    """Within the texts that run, which an engine counts as they end."""
    monkeypatch.setitem(text_collector.ENGINES, "vllm", "local_engine:LocalEngine")
    agent = algorithm(
        tasks_env(6, reward="token", group_size=group_size),
        rollout="vllm",
        batch_tokens=2000,
        max_staleness=max_staleness,
        epochs=1,
        minibatches=1,
    )
    _, [episodes] = run_of(agent, 150)
    longest = agent.max_new_tokens
    assert 150 <= agent.tokens_seen <= 150 + 2 * 6 * longest
    assert len(episodes) % group_size == 0
    assert np.isfinite([e.reward.sum() for e in episodes]).all()


@given(
    total=st.integers(1, 500),
    seen=st.integers(0, 499),
    size=st.integers(1, 200),
    steps=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), max_size=40),
)
def test_a_batch_that_is_full_stays_full(total, seen, size, steps):
    """Whatever ends and is seen after that."""
    ending, ended, was_open = Ending.of(total, seen, size), [], True
    for length, tokens in steps:
        ended += [Text(length)] if length else []
        seen += tokens
        is_open = ending.is_open(size, ended, seen)
        assert was_open or not is_open
        assert is_open or ended
        assert not (ended and seen >= total and is_open)
        was_open = is_open
