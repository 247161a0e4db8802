"""Whole texts from an engine: what stepping would have paid, no older than allowed, none lost, none
twice."""

import itertools
import sys

import fakes
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from line_env import interrupted_at
from local_engine import LocalEngine
from toy_env import ToyEnv, tiny_lm

from tokenenv.agents import ALGORITHMS, GRPO, PPO, LMPolicy, VinePPO
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning.learner import token_logprobs
from tokenenv.agents.rollout import text_collector
from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.errors import InvalidArgument, MissingDependency
from tokenenv.models.heads import make_scorer
from tokenenv.rewards.rule import Rule
from tokenenv.rewards.scaling import PositionScaled, Scaled
from tokenenv.types import Task


def schedule(tokens_seen):
    return 0.5 + tokens_seen / 100


REWARDS = {
    "token": "token",
    "terminal": "terminal",
    "delta": "delta",
    "mixed": {"dense": ("token", schedule), "end": ("terminal", 0.5), "even": "uniform"},
    "scaled": {
        "dense": (PositionScaled("token"), schedule),
        "shaped": Scaled("delta"),
        "even": (Scaled("uniform"), 0.5),
    },
}


def length_of(prompt, response):
    return float(len(response))


def make(num_envs=6, mode=AutoresetMode.SAME_STEP, *, long=False, gold=length_of, **options):
    """Tiny random models with a stop token that is drawn now and then; in `long` texts, rarely."""
    task = Task(
        tokenizer=fakes.tokenizer(),
        reference=fakes.causal_lm(num_hidden_layers=1),
        prompts=[[5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [5, 15]],
        max_prompt_tokens=4,
        max_new_tokens=24 if long else 8,
        stop_token_ids=(fakes.EOS,) if long else (fakes.EOS, 7, 9, 11, 20),
        scorer=make_scorer(fakes.reward_model("token", num_hidden_layers=1)),
        gold=gold,
    )
    return TokenVectorEnv(num_envs, task=task, autoreset_mode=mode, **options)


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    monkeypatch.setitem(text_collector.ENGINES, "vllm", "local_engine:LocalEngine")


def agent_of(envs, algorithm=PPO, **options):
    return algorithm(
        envs, **{"rollout": "vllm", "batch_tokens": 60, "lr": 1e-2, "minibatches": 2, **options}
    )


def numbers(episodes, num_texts=6):
    return [e.index * num_texts + e.slot for e in episodes]


def replayed(envs, episode):
    """What stepping says of an episode's tokens: each step's reward, terms, log pi_ref and
    potential, and the last info."""
    _, info = envs.reset(options={"prompts": [episode.prompt.tolist()] * envs.num_envs})
    steps, potential = [], [info.get("potential", [0.0])[0]]
    for t, token in enumerate(episode.response):
        action = np.full(envs.num_envs, token)
        if isinstance(envs.single_action_space, gym.spaces.Dict):
            action = {"token": action, "logprob": np.full(envs.num_envs, episode.logprob[t])}
        _, rewards, *_, info = envs.step(action)
        steps.append((rewards[0], info["ref_logprob"][0]))
        potential.append(info.get("potential", [0.0])[0])
    return np.array(steps), np.array(potential), bool(info["cut"][0]), info


def begun_under(agent):
    """Tokens seen and beta when each text was begun, as they are noted from now on."""
    core, engine, noted = agent.core, agent.collector.engine, {}
    engine.note = lambda key: noted.update({key: (core.tokens_seen, core.kl_coef)})
    return noted


@pytest.mark.parametrize("kl", ["reference", "policy", "none"])
@pytest.mark.parametrize("reward", REWARDS)
def test_episodes_earn_what_stepping_pays(reward, kl):
    """Those of the first batch, and those that were begun before an update and ended after it."""
    options = {"reward": REWARDS[reward], "kl": kl, "kl_coef": 0.3}
    steered = {} if kl == "none" else {"kl_target": 0.1, "kl_horizon": 200}
    agent = agent_of(make(**options), **steered)
    noted, other, straddled = begun_under(agent), make(1, mode=AutoresetMode.DISABLED, **options), 0
    for _ in range(3):
        learned = agent.core.save_statistics()
        seen, episodes = agent.tokens_seen, agent.collector.collect(60)
        for e in episodes[:4]:
            other.load_statistics(learned)
            other.tokens_seen, other.kl_coef = noted[e.index * 6 + e.slot]
            straddled += other.tokens_seen < seen
            check_against_stepping(e, *replayed(other, e))
        agent.update(EpisodeBatch.stack(episodes))
        agent.collector.refresh()
        agent._adapt_kl_coef(EpisodeBatch.stack(episodes))
    assert straddled
    assert {e.terminated for e in episodes} == {True, False}
    assert any(e.potential.any() for e in episodes) == (reward in ("delta", "scaled"))


def check_against_stepping(e, steps, potential, cut, info):
    np.testing.assert_allclose(e.reward, info["token_rewards"][0][: len(e.response)], atol=1e-5)
    assert e.reward.sum() == pytest.approx(steps[:, 0].sum(), abs=1e-4)
    np.testing.assert_allclose(e.ref_logprob, steps[:, 1], atol=1e-5)
    np.testing.assert_allclose(e.potential, potential, atol=1e-5)
    assert (e.terminated, e.truncated) == (not cut, cut)
    assert e.score == pytest.approx(info["score"][0], abs=1e-5)
    assert e.gold == info["gold"][0]
    assert e.kl_coef == pytest.approx(info["kl_coef"][0])
    for name, values in info["token_reward_terms"].items():
        if not name.startswith("_"):
            np.testing.assert_allclose(e.terms[name], values[0][: len(e.response)], atol=1e-5)


@pytest.mark.parametrize("score_truncated", [True, False])
def test_whole_texts_show_what_stepping_shows(score_truncated):
    """Lengths, log pi_ref and potentials, that of the last state included; nothing right of a
    text."""
    options = {"reward": {"dense": "token", "shaped": "delta"}, "score_truncated": score_truncated}
    envs, stepped = make(**options), make(1, AutoresetMode.DISABLED, **options)
    episodes, kept = agent_of(envs).collector.collect(60), 0
    scores = envs.score_episodes(
        [e.prompt.tolist() for e in episodes], [e.response.tolist() for e in episodes]
    )
    for row, e in enumerate(episodes):
        steps, potential, cut, _ = replayed(stepped, e)
        end = len(e.response)
        assert scores.lengths[row] == end
        np.testing.assert_allclose(scores.ref_logprobs[row, :end], steps[:, 1], atol=1e-5)
        np.testing.assert_allclose(scores.potentials[row, : end + 1], potential, atol=1e-5)
        assert not scores.ref_logprobs[row, end:].any()
        assert not scores.potentials[row, end + 1 :].any()
        assert (potential[-1] == 0.0) == (score_truncated or not cut)
        kept += potential[-1] != 0.0
    assert bool(kept) == (not score_truncated)
    assert make().score_episodes([[5]], [[6]]).potentials is None


def test_log_probs_are_the_policys_at_the_temperature():
    agent, seen = agent_of(make(), temperature=0.7, importance_cap=9.0), []
    for _ in range(2):
        agent.learn(agent.tokens_seen + 1, on_update=lambda metrics, episodes: seen.append(metrics))
        assert seen[-1]["rollout/mismatch_max"] < 1e-5
        batch = EpisodeBatch.stack(agent.collector.collect(60))
        own = token_logprobs(agent.policy, batch, 1000, 0.7)
        fresh = batch.version_B == agent.updates
        assert fresh.any()
        torch.testing.assert_close(
            (own * batch.mask_BT)[fresh], batch.logprob_BT[fresh], atol=1e-5, rtol=0
        )
    assert seen[0]["rollout/importance"] == pytest.approx(1.0, abs=1e-5)


def test_played_texts_count_and_teach_as_stepping_does():
    """The same texts, stepped and scored: the same statistics; scoring alone changes nothing."""
    learning = {
        "scaled": Scaled("token"),
        "even": Scaled("uniform"),
        "placed": PositionScaled("token"),
    }
    options = {"reward": learning, "kl": "none"}
    stepped, scored, split = (
        make(1, AutoresetMode.DISABLED, **options),
        make(1, **options),
        make(1, max_batch_tokens=12, **options),
    )
    episodes = agent_of(make()).collector.collect(60)
    texts = [e.prompt.tolist() for e in episodes], [e.response.tolist() for e in episodes]
    for e in episodes:
        replayed(stepped, e)
    before = scored.save_statistics()
    plain = scored.score_episodes(*texts)
    assert scored.tokens_seen == 0
    np.testing.assert_equal(scored.save_statistics(), before)
    first, other = (
        scored.score_episodes(*texts, played=True),
        split.score_episodes(*texts, played=True),
    )
    np.testing.assert_allclose(first.token_rewards, plain.token_rewards, atol=1e-6)
    np.testing.assert_allclose(other.token_rewards, plain.token_rewards, atol=1e-5)
    assert scored.tokens_seen == stepped.tokens_seen == first.lengths.sum()
    for name, learned in stepped.save_statistics().items():
        np.testing.assert_allclose(scored.save_statistics()[name], learned, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(split.save_statistics()[name], learned, rtol=1e-6, atol=1e-6)
    assert not np.allclose(
        scored.score_episodes(*texts).token_rewards, plain.token_rewards, atol=1e-3
    )
    words = scored.token_spec.tokenizer.batch_decode(texts[1][:2])
    before, count = (
        scored.tokens_seen,
        sum(len(scored.token_spec.tokenizer(word)["input_ids"]) for word in words),
    )
    scored.score_episodes(texts[0][:2], words, played=True)
    assert scored.tokens_seen == before + count


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_no_text_is_older_than_allowed_and_none_is_lost(max_staleness, group_size):
    agent = agent_of(
        make(group_size=group_size), GRPO if group_size > 1 else PPO, max_staleness=max_staleness
    )
    found, metrics = [], []

    def on_update(logged, episodes):
        assert all(0 <= agent.updates - 1 - e.version <= max_staleness for e in episodes)
        assert (len(agent.collector._running) == 0) or max_staleness > 0
        found.extend(episodes)
        metrics.append(logged)
        ages = [agent.updates - 1 - e.version for e in episodes]
        assert logged["rollout/staleness"] == pytest.approx(np.mean(ages))
        assert logged["rollout/staleness_max"] == max(ages)
        assert logged["rollout/stale_texts"] == np.count_nonzero(ages)

    agent.learn(700, on_update=on_update)
    seen = numbers(found)
    assert len(set(seen)) == len(seen)
    collector = agent.collector
    unfinished = [
        *collector._running,
        *collector._waiting,
        *(text.number for text in collector._ready),
    ]
    assert sorted([*seen, *unfinished]) == list(range(collector._begun))
    assert max(m["rollout/staleness_max"] for m in metrics) == min(max_staleness, 1)
    assert collector.engine.most == 6
    assert collector.tokens_seen - sum(len(e.response) for e in found) == sum(
        len(t.response) for t in collector._waiting.values()
    )


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_the_limit_is_reached_and_never_passed(max_staleness, group_size, saved, tmp_path):
    """Long texts, an update whenever some are there; a checkpoint begins those that run again, not
    those that wait."""
    algorithm = GRPO if group_size > 1 else PPO
    agent = agent_of(
        make(long=True, group_size=group_size),
        algorithm,
        max_staleness=max_staleness,
        batch_tokens=1,
        epochs=1,
    )
    drawn, ages, seen = {}, [], []
    agent.collector.engine.note = lambda key: drawn.update({key: agent.updates})

    def on_update(metrics, episodes):
        assert [e.version for e in episodes] == [drawn[number] for number in numbers(episodes)]
        ages.extend(agent.updates - 1 - e.version for e in episodes)
        assert metrics["rollout/staleness_max"] == max(ages[-len(episodes) :])
        seen.extend(numbers(episodes))
        if saved:
            agent.save(tmp_path / "c")
        if agent.updates == 12:
            agent.stop()

    agent.learn(10**6, on_update=on_update)
    assert min(ages) == 0
    assert max(ages) <= max_staleness
    assert saved or max(ages) == max_staleness
    assert not saved or group_size == 1 or max(ages) > 0 or max_staleness == 0
    assert len(set(seen)) == len(seen)
    collector = agent.collector
    unfinished = [
        text.number
        for text in [*collector._unfinished(), *collector._waiting.values(), *collector._ready]
    ]
    assert sorted([*seen, *unfinished]) == list(range(collector._begun))


def test_a_text_that_waits_for_its_group_does_not_grow_too_old():
    """Though the one it waits for was begun again, under a later version."""
    agent = agent_of(make(long=True, group_size=2), GRPO)
    collector = agent.collector
    collector.engine.slow = {3}
    collector.collect(1)
    assert 2 in collector._waiting
    assert 3 in collector._running
    collector.refresh()
    collector.load_env(collector.save_env())
    episodes = collector.collect(1)
    versions = dict(zip(numbers(episodes), [e.version for e in episodes], strict=True))
    assert (versions[2], versions[3]) == (0, 1)
    assert len(versions) > 2


def test_texts_straddle_updates_with_the_log_probs_of_either_policy():
    agent = agent_of(make(), lr=0.05)
    old = {name: weight.clone() for name, weight in agent.policy.state_dict().items()}
    agent.learn(1)
    batch = EpisodeBatch.stack([e for e in agent.collector.collect(120) if e.version == 0])
    new_BT = token_logprobs(agent.policy, batch, 1000)
    agent.policy.load_state_dict(old)
    old_BT = token_logprobs(agent.policy, batch, 1000)
    by_new, by_old = (
        ((own - batch.logprob_BT).abs() < 1e-5) & batch.mask_BT for own in (new_BT, old_BT)
    )
    assert (by_new | by_old)[batch.mask_BT].all()
    assert (by_new.any(1) & by_old.any(1)).any()


def test_groups_are_whole_and_share_a_prompt():
    agent = agent_of(make(group_size=3), GRPO)
    for _ in range(3):
        episodes = agent.collector.collect(80)
        for start in range(0, len(episodes), 3):
            group = episodes[start : start + 3]
            assert len({(*e.prompt, e.prompt_id) for e in group}) == 1
            assert numbers(group) == list(range(numbers(group)[0], numbers(group)[0] + 3))
    drawn = [agent.collector._draw(group) for group in range(60)]
    assert set(drawn) == set(range(5))


def test_what_is_drawn_depends_on_the_seed_and_the_number_alone():
    """Whatever else runs: the first texts of another number of slots are the same."""
    by_number = []
    for agent, num_texts in (
        (agent_of(make(), seed=3), 6),
        (agent_of(make(2), seed=3, rollout_options={"num_texts": 3}), 3),
    ):
        episodes = agent.collector.collect(150)
        by_number.append(dict(zip(numbers(episodes, num_texts), episodes, strict=True)))
        assert agent.collector.engine.most == num_texts
    common = set(by_number[0]) & set(by_number[1])
    assert len(common) > 10
    for number in common:
        np.testing.assert_array_equal(by_number[0][number].prompt, by_number[1][number].prompt)
        np.testing.assert_array_equal(by_number[0][number].response, by_number[1][number].response)


@pytest.mark.parametrize("algo", sorted(ALGORITHMS))
def test_every_algorithm_learns(algo):
    agent = agent_of(make(group_size=3), ALGORITHMS[algo])
    seen = []
    while len(seen) < 2:
        agent.learn(agent.tokens_seen + 1, on_update=lambda metrics, episodes: seen.append(metrics))
    assert seen[0]["rollout/mismatch_max"] < 1e-5
    assert np.isfinite([m["objective/reward"] for m in seen]).all()


def test_continuations_begin_with_their_state_and_earn_what_comes_after_it():
    agent = agent_of(make(reward={"dense": "token", "even": "uniform"}), VinePPO)
    states = [
        (np.array([5, 6, 7]), np.array([], np.int64)),
        (np.array([8]), np.array([12, 13, 14])),
    ]
    running = {key: list(text.tokens) for key, text in agent.collector.engine.running.items()}
    episodes = agent.collector.play_on(states, 3)
    assert {
        key: text.tokens for key, text in agent.collector.engine.running.items() if key >= 0
    } == running
    assert len({tuple(e.response) for e in episodes}) > 3
    for i, e in enumerate(episodes):
        prompt, prefix = states[i // 3]
        np.testing.assert_array_equal(e.prompt, [*prompt, *prefix])
        assert len(prefix) + len(e.response) <= 8
        whole = agent.core.score_episodes([prompt], [[*prefix, *e.response]])
        np.testing.assert_allclose(
            e.reward, whole.token_rewards[0, len(prefix) :][: len(e.response)], atol=1e-5
        )
    assert agent.tokens_seen == sum(len(e.response) for e in episodes)
    agent.collector.collect(60)
    seeds = [seed for _, _, seed in agent.collector.engine.asked.values()]
    assert len(set(seeds)) == len(seeds)


def test_values_are_those_of_stepping():
    """The mean return from a state, by either way of playing on."""
    rollouts, states = (
        300,
        [(np.array([5, 6, 7]), np.array([], np.int64)), (np.array([8]), np.array([12, 13, 14]))],
    )
    found = []
    for rollout in ("step", "vllm"):
        agent = VinePPO(make(2 * rollouts, kl_coef=0.3), rollout=rollout, rollouts=rollouts)
        agent.collector.collect(1)
        found.append(EpisodeBatch.stack(agent.collector.play_on(states, rollouts)))
    returns = [agent.rewards(batch).sum(1).unflatten(0, (2, -1)) for batch in found]
    error = sum(r.var(1) / rollouts for r in returns).sqrt()
    assert ((returns[0].mean(1) - returns[1].mean(1)).abs() < 4 * error).all()


# ---------------------------------------------------------------- checkpoints and failures


def run(agent, updates, save_at=None, path=None):
    """Learns until so many updates; saves after some of them."""
    found = []

    def on_update(metrics, episodes):
        found.append((metrics, episodes))
        if agent.updates == save_at:
            agent.save(path)

    while agent.updates < updates:
        agent.learn(agent.tokens_seen + 1, on_update=on_update)
    return found


RESUMED = {
    "ppo": (PPO, {}, {}),
    "learned terms": (PPO, {"reward": Scaled("token")}, {"kl_target": 0.1}),
    "groups": (GRPO, {"group_size": 3}, {}),
    "adapters": (PPO, {}, {"lora_rank": 2}),
    "on-policy": (PPO, {}, {"max_staleness": 0}),
    "vine": (VinePPO, {}, {"rollouts": 2}),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_is_exact(name, tmp_path):
    algorithm, env_options, options = RESUMED[name]
    options = {"lr_schedule": "constant", "importance_cap": 2.0, **options}
    straight = agent_of(make(**env_options), algorithm, **options)
    whole = run(straight, 4, 2, tmp_path / "c")[2:]
    resumed = algorithm.load(tmp_path / "c", make(**env_options))
    if name != "vine":  # whose continuations take so long that the running texts end
        assert bool(resumed.collector._cut) == (options.get("max_staleness", 1) > 0)
    rest = run(resumed, 4)
    for (one, some), (other, others) in zip(whole, rest, strict=True):
        one, other = (
            {k: v for k, v in m.items() if k != "time/tokens_per_second"} for m in (one, other)
        )
        np.testing.assert_equal(one, other)
        assert numbers(some) == numbers(others)
        for a, b in zip(some, others, strict=True):
            np.testing.assert_array_equal(a.reward, b.reward)
    for a, b in zip(straight.policy.parameters(), resumed.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert straight.core.tokens_seen == resumed.core.tokens_seen
    np.testing.assert_equal(straight.core.save_statistics(), resumed.core.save_statistics())


@pytest.mark.parametrize("rollouts", [("vllm", "step"), ("step", "vllm")])
def test_a_run_may_go_on_by_the_other_rollout(rollouts, tmp_path):
    """Weights and counts are kept; the texts that were running are not."""
    agent = agent_of(make(), rollout=rollouts[0], lr=0.05)
    run(agent, 2)
    agent.save(tmp_path / "c")
    other = PPO.load(tmp_path / "c", make(), rollout=rollouts[1])
    assert (other.tokens_seen, other.updates, other.collector.version) == (agent.tokens_seen, 2, 2)
    batch = EpisodeBatch.stack(other.collector.collect(60))
    own = token_logprobs(agent.policy, batch, 1000) * batch.mask_BT
    torch.testing.assert_close(own, batch.logprob_BT, atol=1e-5, rtol=0)
    assert (batch.version_B == 2).all()
    run(other, 3)


def test_waiting_texts_of_a_group_survive_a_checkpoint(tmp_path):
    agent = agent_of(make(group_size=3), GRPO)
    while not agent.collector._waiting:
        agent.collector.collect(1)
    waiting = dict(agent.collector._waiting)
    agent.save(tmp_path / "c")
    resumed = GRPO.load(tmp_path / "c", make(group_size=3))
    assert resumed.collector._waiting == waiting
    for one, other in zip(
        agent.collector.collect(200), resumed.collector.collect(200), strict=True
    ):
        np.testing.assert_array_equal(one.response, other.response)


@pytest.mark.parametrize("call", ["begin", "ended"])
@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("max_staleness", [0, 1])
def test_an_engine_that_fails_costs_nothing_but_the_texts_it_was_writing(
    max_staleness, group_size, call
):
    """Wherever it fails in a batch: the next `collect` goes on, and every text is what it would
    have been."""
    algorithm = GRPO if group_size > 1 else PPO

    def collector():
        return agent_of(
            make(group_size=group_size), algorithm, max_staleness=max_staleness
        ).collector

    wanted, one = {}, collector()
    for _ in range(4):
        found = one.collect(60)
        wanted |= dict(zip(numbers(found), found, strict=True))
    for when in itertools.count(step=3):
        other = collector()
        other.engine.down = {call: when}
        try:
            found = other.collect(60)
        except ConnectionError:
            assert not other.engine.running
            found = other.collect(60)
        over = bool(other.engine.down)  # it was not asked so often
        other.engine.down.clear()
        found += other.collect(60)
        assert sum(len(e.response) for e in found) >= 120
        for number, e in zip(numbers(found), found, strict=True):
            np.testing.assert_array_equal(e.response, wanted[number].response)
            assert e.prompt_id == wanted[number].prompt_id
        for group in np.reshape(numbers(found), (-1, group_size)):
            np.testing.assert_array_equal(
                group, group[0] // group_size * group_size + np.arange(group_size)
            )
        unfinished = [text.number for text in [*other._unfinished(), *other._waiting.values()]]
        assert sorted([*numbers(found), *unfinished]) == list(range(other._begun))
        if over:
            break
    assert when > 10


@pytest.mark.parametrize(("group_size", "max_staleness"), [(1, 0), (3, 1)])
def test_interrupted_at_any_line_every_text_is_somewhere_once(group_size, max_staleness):
    """Ctrl-C, at every 61st line: the next `collect` goes on, and every text is what it would have
    been."""
    agent = agent_of(
        make(group_size=group_size), GRPO if group_size > 1 else PPO, max_staleness=max_staleness
    )
    collector, seen = agent.collector, []
    for line in itertools.count(2, 61):
        found = []
        with interrupted_at(
            line, "/rollout/text_collector.py", "/rollout/pairing.py", "/helpers/local_engine.py"
        ) as raised:
            found = collector.collect(20)
        held = [
            t.number
            for t in [*collector._unfinished(), *collector._waiting.values(), *collector._ready]
        ]
        assert sorted([*seen, *numbers(found), *held]) == list(range(collector._begun))
        found += collector.collect(20)
        paid = agent.core.score_episodes(
            [e.prompt.tolist() for e in found], [e.response.tolist() for e in found]
        )
        for row, e in enumerate(found):
            np.testing.assert_allclose(
                e.reward, paid.token_rewards[row, : len(e.response)], atol=1e-5
            )
            assert [int(t) for t in e.prompt] == collector.engine.asked[numbers([e])[0]][0]
        for group in np.reshape(numbers(found), (-1, group_size)):
            np.testing.assert_array_equal(
                group, group[0] // group_size * group_size + np.arange(group_size)
            )
        seen += numbers(found)
        if not raised:
            break
    assert len(set(seen)) == len(seen)
    assert line > 200


@pytest.mark.parametrize("call", ["begin", "ended"])
def test_an_engine_that_fails_in_continuations_leaves_none(call):
    agent = agent_of(make(), VinePPO)
    agent.learn(1)
    running = set(agent.collector._running)
    agent.collector.engine.down = {call: 5}
    with pytest.raises(ConnectionError):
        agent.collector.play_on([(np.array([5, 6, 7]), np.array([], np.int64))], 20)
    assert not agent.collector.engine.running
    assert not agent.collector._continuations
    episodes = agent.collector.collect(60)
    assert running <= {*numbers(episodes), *agent.collector._running}
    assert len(agent.collector.play_on([(np.array([8]), np.array([12]))], 4)) == 4
    assert not agent.collector._continuations


def test_weights_that_did_not_arrive_are_handed_over_before_the_next_text():
    agent = agent_of(make(), max_staleness=0)
    batch = EpisodeBatch.stack(agent.collector.collect(60))
    agent.update(batch)
    agent.collector.engine.down = {"sync": 0}
    with pytest.raises(ConnectionError):
        agent.collector.refresh()
    batch = EpisodeBatch.stack(agent.collector.collect(60))
    assert (batch.version_B == 1).all()
    own = token_logprobs(agent.policy, batch, 1000)
    torch.testing.assert_close(own * batch.mask_BT, batch.logprob_BT, atol=1e-5, rtol=0)


@pytest.mark.parametrize("saved", [False, True])
def test_texts_that_could_not_be_scored_are_scored_later(saved, tmp_path, monkeypatch):
    agent = agent_of(make())

    def down(*args, **kwargs):
        raise ConnectionError("down")

    with monkeypatch.context() as patch:
        patch.setattr(agent.core, "score_episodes", down)
        with pytest.raises(ConnectionError):
            agent.learn(100)
        ready = [text.number for text in agent.collector._ready]
        assert ready
        if saved:
            agent.save(tmp_path / "c")
    if saved:
        agent = PPO.load(tmp_path / "c", make())
    assert numbers(agent.collector.collect(1)) == ready


def test_texts_that_are_scored_again_teach_once():
    """The first of several forwards has taught terms something when the metric of the second
    fails."""
    asked = []

    def gold(prompt, response):
        asked.append(response)
        if len(asked) == 8:
            raise ConnectionError("down")
        return 0.0

    options = {
        "reward": {"scaled": Scaled("token"), "placed": PositionScaled("uniform")},
        "max_batch_tokens": 24,
    }
    agent, other = agent_of(make(gold=gold, **options)), agent_of(make(**options))
    before = agent.core.save_statistics()
    with pytest.raises(ConnectionError):
        agent.collector.collect(60)
    np.testing.assert_equal(agent.core.save_statistics(), before)
    assert agent.core.tokens_seen == 0
    for one, same in zip(agent.collector.collect(60), other.collector.collect(60), strict=True):
        np.testing.assert_array_equal(one.reward, same.reward)
    np.testing.assert_equal(agent.core.save_statistics(), other.core.save_statistics())
    assert agent.core.tokens_seen == other.core.tokens_seen


# ---------------------------------------------------------------- refusals


class Wrapped(gym.vector.VectorWrapper):
    pass


def test_what_cannot_be_had_is_refused(monkeypatch):
    with pytest.raises(InvalidArgument, match="Wrapped around it would see none of the texts"):
        agent_of(Wrapped(make()))
    with pytest.raises(InvalidArgument, match="scores whole texts"):
        agent_of(ToyEnv(2), policy=LMPolicy(tiny_lm()))
    with pytest.raises(InvalidArgument, match=r"rollout='vlm' is not known.*'vllm'"):
        agent_of(make(), rollout="vlm")
    negation = gym.make_vec("tokenenv/Negation-v0", num_envs=2)
    with pytest.raises(InvalidArgument, match="transformers policy"):
        agent_of(negation)
    with pytest.raises(InvalidArgument, match="max_staleness=-1"):
        agent_of(make(), max_staleness=-1)


def test_without_vllm_its_install_line_is_said(monkeypatch):
    monkeypatch.setitem(text_collector.ENGINES, "vllm", "tokenenv.rollout.vllm:VLLMEngine")
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingDependency, match=r"pip install vllm$"):
        agent_of(make())


def test_a_rule_scores_an_engines_texts_too():
    """No model but the reference."""
    agent = agent_of(make(reward=Rule(lambda prompt, response: float(len(response)))))
    agent.learn(100)
    assert agent.updates
    assert isinstance(agent.collector.engine, LocalEngine)
