"""Numbers that a real env watches, through every way in which agents get, keep and write texts."""

import dataclasses
import functools
import json

import gymnasium as gym
import numpy as np
import pytest
import tasks
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from runs import Recorder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tokenenv.agents import GRPO, KLQ, PPO, LMPolicy, VinePPO
from tokenenv.agents.rollout import text_collector
from tokenenv.agents.rollout.actor import Actor
from tokenenv.agents.rollout.collector import Collector
from tokenenv.agents.run.evaluate import evaluate
from tokenenv.cli.evaluate import comparison
from tokenenv.rewards.rule import TokenRule


def coded(prompt, response):
    """Each token's place in the response, a prefix included, and its id."""
    return [1000.0 * place + token for place, token in enumerate(response)]


WATCH = {"coded": TokenRule(coded, on="tokens"), "dense": "token", "shares": "uniform"}
make = functools.partial(tasks.make_vec, reward="terminal", watch=WATCH)


def sync(mode):
    options = {"reward": "terminal", "watch": WATCH}
    return SyncVectorEnv([lambda: gym.make(tasks.TOY, **options)] * 3, autoreset_mode=mode)


MAKERS = {
    **{mode.value: functools.partial(make, 3, mode) for mode in AutoresetMode},
    "torch": functools.partial(make, 3, AutoresetMode.SAME_STEP, array="torch"),
    "kl=policy": functools.partial(make, 3, AutoresetMode.SAME_STEP, kl="policy"),
    "unscored": functools.partial(make, 3, AutoresetMode.SAME_STEP, score_truncated=False),
    "one by one, same step": functools.partial(sync, AutoresetMode.SAME_STEP),
    "one by one, next step": functools.partial(sync, AutoresetMode.NEXT_STEP),
}


def check(episodes, prefix=0, scored=True):
    """Against the rule itself, which knows each token and its place.

    Where cut texts are not `scored`, hindsight terms say nothing of them.
    """
    assert episodes
    for e in episodes:
        assert set(e.watched) == set(WATCH)
        expected = coded(None, [0] * prefix + e.response.tolist())[prefix:]
        if scored or e.terminated:
            np.testing.assert_array_equal(e.watched["coded"], expected)
        for values in e.watched.values():
            assert values.dtype == np.float32
            assert values.shape == e.response.shape
        assert not set(WATCH) & set(e.terms)
        np.testing.assert_allclose(sum(e.terms.values()), e.reward, atol=1e-5)


@pytest.mark.parametrize("name", MAKERS)
def test_every_kind_of_env_gives_each_token_its_number(name):
    envs = MAKERS[name]()
    episodes = Collector(envs, Actor(LMPolicy(tasks.reference()), seed=1), seed=5).collect(60)
    check(episodes, scored=name != "unscored")
    assert any(e.terminated for e in episodes)
    core = tasks.make_vec(1, reward="token", kl="none").unwrapped
    texts = [[getattr(e, part).tolist() for e in episodes] for part in ("prompt", "response")]
    token_scores = core.score_episodes(*texts).token_rewards
    for e, row in zip(episodes, token_scores, strict=True):
        np.testing.assert_allclose(e.watched["dense"], row[: len(e.response)], atol=1e-4)


def test_the_numbers_of_a_prefix_belong_to_no_token_of_the_policy():
    envs = make(3, AutoresetMode.SAME_STEP)
    collector = Collector(envs, Actor(LMPolicy(tasks.reference()), seed=1), seed=5)
    collector.reset({"prefixes": [[20, 21]] * 3})
    episodes = {}
    while len(episodes) < 3:
        episodes = {e.slot: e for e in collector.step()} | episodes
    check(episodes.values(), prefix=2)


@pytest.mark.parametrize("max_staleness", [None, 0, 1])
def test_groups_and_limits_of_age_keep_them(max_staleness):
    envs = make(8, AutoresetMode.SAME_STEP, group_size=4)
    options = {"batch_tokens": 60, "epochs": 1, "minibatches": 1, "skip_flat_groups": True}
    agent = GRPO(envs, max_staleness=max_staleness, **options)
    agent.learn(150, on_update=lambda metrics, episodes: check(episodes))
    check([*agent.collect(), *agent.collector.waiting] or agent.collect())


def test_vine_ppos_continuations_have_those_of_their_own_tokens():
    envs = make(8, AutoresetMode.SAME_STEP)
    agent = VinePPO(envs, batch_tokens=30, segments=2, rollouts=2, minibatches=1, epochs=1)
    agent.learn(60, on_update=lambda metrics, episodes: check(episodes))
    prompt, prefix = np.array([20, 21]), np.array([22, 23, 24])
    check(agent.collector.play_on([(prompt, prefix)], 4), prefix=3)


@pytest.mark.parametrize("algorithm", [PPO, GRPO, KLQ])
def test_a_resumed_run_has_the_same_numbers(algorithm, tmp_path):
    """Those of texts that were running or waiting, and of texts that a replay holds."""
    grouped = {"group_size": 4} if algorithm is GRPO else {}

    def envs():
        return make(8, AutoresetMode.SAME_STEP, kl_coef=0.1, **grouped)

    agent = algorithm(envs(), batch_tokens=60, minibatches=2)
    whole = Recorder(agent, tmp_path / "c")
    agent.learn(260, on_update=whole)
    resumed = algorithm.load(tmp_path / "c", envs())
    if algorithm is KLQ:
        assert resumed.statistics["replay"].tokens > 0
        check(resumed.statistics["replay"].episodes)
    rest = Recorder(resumed)
    resumed.learn(260, on_update=rest)
    assert 0 < len(rest.episodes) < len(whole.episodes)
    check(rest.episodes)
    for one, other in zip(whole.episodes[-len(rest.episodes) :], rest.episodes, strict=True):
        for name, values in one.watched.items():
            np.testing.assert_array_equal(values, other.watched[name])


def test_texts_of_an_engine_have_them(monkeypatch):
    monkeypatch.setitem(text_collector.ENGINES, "vllm", "local_engine:LocalEngine")
    agent = PPO(make(4, AutoresetMode.SAME_STEP), rollout="vllm", batch_tokens=40, minibatches=1)
    agent.learn(80, on_update=lambda metrics, episodes: check(episodes))
    prompt, prefix = np.array([20, 21]), np.array([22, 23, 24])
    check(agent.collector.play_on([(prompt, prefix)], 3), prefix=3)


def test_an_evaluation_has_their_means():
    found = evaluate(LMPolicy(tasks.reference()), make(3, AutoresetMode.SAME_STEP), num_texts=9)
    check(found.episodes)
    known = np.concatenate([e.watched["coded"] for e in found.episodes])
    assert found.watched["coded"] == pytest.approx(known.mean())
    table = comparison({"before": found, "after": found})
    assert "watch: coded, per token" in list(table.columns[0].cells)
    assert list(table.columns[2].cells)[-3:] == [f"{mean:.3f}" for mean in found.watched.values()]


def test_each_term_of_the_reward_has_its_mean_per_text(tmp_path):
    found = evaluate(LMPolicy(tasks.reference()), make(3, AutoresetMode.SAME_STEP), num_texts=9)
    assert "Episode(" not in repr(found)
    names = set(found.episodes[0].terms)
    assert names > {"kl"}
    assert set(found.rewards) == set(found.reward_errors) == names
    sums = {name: [e.terms[name].sum() for e in found.episodes] for name in names}
    assert found.rewards == pytest.approx({name: np.mean(sums[name]) for name in names})
    labels = list(comparison({"before": found}).columns[0].cells)
    assert {label for label in labels if label.startswith("reward: ")} == {
        f"reward: {name}, per text" for name in names - {"kl"}
    }
    seen = []
    agent = PPO(make(4, AutoresetMode.SAME_STEP), batch_tokens=40, run_dir=tmp_path)
    agent.learn(80, on_update=lambda metrics, episodes: seen.append((metrics, episodes)))
    metrics, episodes = seen[0]
    events = EventAccumulator(str(tmp_path)).Reload()
    for name in names:
        mean = np.mean([e.terms[name].sum() for e in episodes])
        assert metrics[f"reward/{name}"] == pytest.approx(mean, abs=1e-6)
        assert events.Scalars(f"reward/{name}")[0].value == pytest.approx(mean, abs=1e-6)


def test_a_figure_that_no_evaluation_has_is_no_row():
    found = evaluate(LMPolicy(tasks.reference()), make(3, AutoresetMode.SAME_STEP), num_texts=3)
    unknown = dataclasses.replace(found, score=float("nan"), gold=float("nan"))
    assert "score" in list(comparison({"a": found, "b": unknown}).columns[0].cells)
    assert not {"score", "gold"} & set(comparison({"a": unknown}).columns[0].cells)


def test_a_run_folder_has_them(tmp_path):
    seen = []
    agent = PPO(make(4, AutoresetMode.SAME_STEP), batch_tokens=40, run_dir=tmp_path)
    agent.learn(80, on_update=lambda metrics, episodes: seen.append((metrics, episodes)))
    metrics, episodes = seen[0]
    known = np.concatenate([e.watched["coded"] for e in episodes])
    assert metrics["watch/coded"] == pytest.approx(known.mean())
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    assert events.Scalars("watch/coded")[0].value == pytest.approx(known.mean())
    assert events.Histograms("tokens/watch_coded")[0].histogram_value.num == len(known)
    lines = [json.loads(line) for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    for line, e in zip(lines, episodes, strict=False):
        assert set(line["token_watched"]) == set(WATCH)
        np.testing.assert_allclose(line["token_watched"]["coded"], e.watched["coded"], rtol=1e-3)
