"""Runs in which a reward model learns beside the policy: it learns, keeps to its lag, and resumes."""

from typing import Any

import fakes
import numpy as np
import pytest
import tasks
import torch
from runs import SETTINGS, Recorder

from tokenenv.agents import GRPO, PPO, VinePPO
from tokenenv.agents.rollout import text_collector
from tokenenv.agents.run.evaluate import evaluate
from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.rewards import Prime, Rule
from tokenenv.types import Task

EVEN = Rule(lambda prompt, response: response[0] % 2, on="tokens")


def make(num_envs: int = 6, *, group_size: int = 1, array: str = "numpy", **options: Any) -> Any:
    """Tiny random models; the outcome is whether the first token is odd."""
    task = Task(
        tokenizer=fakes.tokenizer(),
        reference=fakes.causal_lm(num_hidden_layers=1),
        prompts=tasks.prompts(),
        max_prompt_tokens=tasks.P,
        max_new_tokens=4,
        stop_token_ids=(fakes.EOS,),
        gold=EVEN,
    )
    settings = {"outcome": "gold", "coef": 0.5, "mix": 0.0, "every": 8, "lr": 1e-2} | options
    return TokenVectorEnv(
        num_envs,
        task=task,
        reward=Prime(**settings),
        kl_coef=0.01,
        autoreset_mode="SameStep",
        group_size=group_size,
        array=array,
    )


def learned_from(agent: Any, total_tokens: int) -> tuple[list[Any], list[dict[str, float]]]:
    """The episodes and the metrics of each update."""
    batches, metrics = [], []

    def on_update(found: Any, episodes: Any) -> None:
        batches.append(episodes)
        metrics.append(dict(found))

    agent.learn(total_tokens, on_update=on_update)
    return batches, metrics


def accuracy(episodes: list[Any]) -> float:
    """How often a text's total says its outcome; it was priced before it was learned from."""
    return float(np.mean([(e.terms["prime"].sum() > 0) == (e.gold > 0) for e in episodes]))


def test_it_learns_which_sums_are_right_while_the_policy_learns():
    """Its accuracy on texts that it has not seen ends above that of always saying right."""
    reward = Prime(outcome="gold", mix=0.0, coef=0.5, lr=5e-4)
    envs = tasks.make_vec(32, "SameStep", "tokenenv/Arithmetic-v0", reward=reward, kl_coef=0.01)
    batches, metrics = learned_from(PPO(envs, batch_tokens=384, seed=0), 384 * 6)
    late = [e for batch in batches[-3:] for e in batch]
    assert accuracy(late) > np.mean([e.gold for e in late]) + 0.1
    assert accuracy(late) > accuracy(batches[0]) + 0.3
    assert metrics[-1]["rollout/reward_version"] == len(batches) - 1


@pytest.mark.parametrize("max_lag", [0, 2])
def test_the_lag_is_counted_and_bounded(max_lag):
    agent = PPO(make(max_lag=max_lag, every=3), batch_tokens=80, lr=1e-3)
    batches, metrics = learned_from(agent, 80 * 6)
    before = 0
    for batch, found in zip(batches, metrics, strict=True):
        now = int(found["rollout/reward_version"])
        versions = [e.reward_version for e in batch]
        assert max(versions) == now
        assert found["rollout/reward_lag"] == pytest.approx(np.mean(now - np.array(versions)))
        assert found["rollout/reward_lag_max"] == now - min(versions) <= max_lag
        assert now - before <= max_lag + 1
        before = now
    assert before == (len(batches) - 1) * (max_lag + 1) + max_lag


def test_an_env_that_trains_none_has_no_lag():
    envs = tasks.make_vec(4, "SameStep", reward="token")
    batches, metrics = learned_from(PPO(envs, batch_tokens=30, lr=1e-3), 60)
    assert not any("reward_lag" in name for found in metrics for name in found)
    assert {e.reward_version for batch in batches for e in batch} == {-1}


def test_texts_of_groups_that_wait_keep_their_version():
    agent = GRPO(make(8, group_size=4, max_lag=None, every=2), batch_tokens=60, lr=1e-3)
    batches, _ = learned_from(agent, 60 * 5)
    assert len({e.reward_version for batch in batches for e in batch}) > 5
    for batch in batches:
        prices: dict[int, Any] = {}
        for e in batch:  # the same text by one version has one price
            key = (e.reward_version, e.prompt.tobytes(), e.response.tobytes())
            np.testing.assert_allclose(
                prices.setdefault(key, e.terms["prime"]), e.terms["prime"], atol=1e-6
            )


def run_until(agent: Any, updates: int, save_to: Any = None) -> Recorder:
    recorder = Recorder(agent, save_to)

    def on_update(metrics: Any, episodes: Any) -> None:
        recorder(metrics, episodes)
        if agent.updates == updates:
            agent.stop()

    agent.learn(10_000, on_update=on_update)
    return recorder


@pytest.mark.parametrize(
    "options", [{}, {"lora_rank": 2, "max_lag": 3, "every": 3}, {"array": "torch"}]
)
def test_resuming_is_exact(tmp_path, options):
    """Two updates, a checkpoint, a new agent and env, two updates: equal to four updates, bit for bit.
    Texts wait at the checkpoint, and the model has been updated before and is after it."""
    path = tmp_path / "c"
    straight = PPO(make(**options), **SETTINGS)
    whole = run_until(straight, 4, save_to=path)
    resumed = PPO.load(path, make(**options))
    counts = resumed.core.save_statistics()["prime"]["counts"]
    assert counts[0] > 0
    assert counts[1] > 0
    rest = run_until(resumed, 4)
    first = len(whole.episodes) - len(rest.episodes)
    assert first > 0
    for a, b in zip(whole.episodes[first:], rest.episodes, strict=True):
        for field in a.__dataclass_fields__:
            np.testing.assert_equal(getattr(a, field), getattr(b, field))
    np.testing.assert_equal(whole.metrics[2:], rest.metrics)
    assert straight.core.reward_version == resumed.core.reward_version > counts[0]
    tasks.assert_equal(straight.core.save_statistics(), resumed.core.save_statistics())
    pairs = zip(
        straight.policy.state_dict().items(), resumed.policy.state_dict().values(), strict=True
    )
    assert all(torch.equal(a, b) for (_, a), b in pairs)


def test_an_engines_texts_are_learned_from_and_resumed(tmp_path, monkeypatch):
    monkeypatch.setitem(text_collector.ENGINES, "vllm", "local_engine:LocalEngine")
    settings = {"rollout": "vllm", "batch_tokens": 40, "lr": 1e-3}
    agent = PPO(make(), **settings)
    batches, metrics = learned_from(agent, 160)
    assert [found["rollout/reward_lag_max"] for found in metrics] == [0.0] * len(metrics)
    for number, batch in enumerate(batches):
        assert {e.reward_version for e in batch} == {number}
    agent.save(tmp_path / "c")
    resumed = PPO.load(tmp_path / "c", make())
    tasks.assert_equal(resumed.core.save_statistics(), agent.core.save_statistics())
    assert resumed.core.reward_version == len(batches) - 1


@pytest.mark.parametrize("rollout", ["step", "vllm"])
def test_continuations_teach_nothing(monkeypatch, rollout):
    """VinePPO plays them between two updates, and the env is then as it was."""
    monkeypatch.setitem(text_collector.ENGINES, "vllm", "local_engine:LocalEngine")
    envs = make(every=4, max_lag=None)
    agent = VinePPO(envs, batch_tokens=30, lr=1e-3, rollouts=2, rollout=rollout)
    learned_from(agent, 30)
    played, before = [], envs.save_statistics()
    play_on = agent.collector.play_on

    def noted(*args: Any, **kwargs: Any) -> Any:
        first = {"learned": envs.save_statistics(), "tokens": envs.tokens_seen}
        found = play_on(*args, **kwargs)
        now = {"learned": envs.save_statistics(), "tokens": envs.tokens_seen}
        tasks.assert_equal(now, first)
        played.append(len(found))
        return found

    agent.collector.play_on = noted
    learned_from(agent, agent.tokens_seen + 30)
    assert sum(played) > 8
    assert envs.save_statistics()["prime"]["counts"][0] >= before["prime"]["counts"][0]


def test_a_run_that_was_interrupted_keeps_what_was_learned(tmp_path):
    """Ctrl-C inside a step leaves no texts to save, but what the env has learned before is saved."""
    envs = make(every=3, max_lag=None)
    agent = PPO(envs, **SETTINGS)
    run_until(agent, 2)
    before, tokens = envs.save_statistics(), envs.tokens_seen
    price = envs._engine.step

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        price(*args, **kwargs)
        raise KeyboardInterrupt

    envs._engine.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        run_until(agent, 3)
    assert before["prime"]["counts"][0] > 0
    agent.save(tmp_path / "c")
    resumed = PPO.load(tmp_path / "c", make(every=3, max_lag=None))
    tasks.assert_equal(resumed.core.save_statistics(), before)
    assert resumed.core.tokens_seen == tokens
    # Both go on from there.
    envs._engine.step = price
    for one in (agent, resumed):
        run_until(one, 3)
        assert one.core.reward_version > before["prime"]["counts"][0]


@pytest.mark.parametrize("first", ["step", "vllm"])
def test_what_was_learned_outlasts_a_change_of_the_rollout(tmp_path, monkeypatch, first):
    monkeypatch.setitem(text_collector.ENGINES, "vllm", "local_engine:LocalEngine")
    agent = PPO(make(every=3), batch_tokens=40, lr=1e-3, rollout=first)
    learned_from(agent, 100)
    agent.save(tmp_path / "c")
    other = {"step": "vllm", "vllm": "step"}[first]
    resumed = PPO.load(tmp_path / "c", make(every=3), rollout=other)
    tasks.assert_equal(resumed.core.save_statistics(), agent.core.save_statistics())
    assert resumed.core.tokens_seen == agent.core.tokens_seen > 0
    assert resumed.core.reward_version > 0


def test_evaluating_teaches_nothing():
    """The same seed gives the same figures again, and the env's schedules do not go on."""
    agent, envs = PPO(make(), **SETTINGS), make(every=2, max_lag=None)
    first = evaluate(agent, envs, num_texts=12)
    assert envs.reward_version == envs.tokens_seen == 0
    again = evaluate(agent, envs, num_texts=12)
    assert again.rewards == first.rewards
