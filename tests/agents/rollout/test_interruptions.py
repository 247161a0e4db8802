"""Whatever interrupts a collector, wherever it is: nothing is gone on from half-way, and what comes
next is right."""

import copy

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from line_env import LineActor, LineEnv, check_episodes, interrupted_at
from tasks import make_vec
from toy_env import ToyEnv, tiny_lm

from tokenenv.agents import PPO, LMPolicy, VinePPO
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning.learner import token_logprobs
from tokenenv.agents.rollout.actor import Actor
from tokenenv.agents.rollout.collector import Collector
from tokenenv.agents.run.evaluate import evaluate

N = 4
FILES = (
    "/rollout/collector.py",
    "/rollout/recorder.py",
    "/rollout/pairing.py",
    "/rollout/env_rows.py",
    "/helpers/line_env.py",
)


@pytest.mark.parametrize(("group_size", "max_staleness"), [(1, None), (2, 1), (2, 0)])
@pytest.mark.parametrize("mode", AutoresetMode)
def test_at_any_line_of_stepping(mode, group_size, max_staleness):
    """Of the collector and of the env: every seventh, others in each case."""
    env = LineEnv(N, mode, group_size, T=5)
    collector = Collector(env, LineActor(0.4), group_size=group_size, max_staleness=max_staleness)
    seen, places, count, line = (
        set(),
        set(),
        0,
        2 + 3 * list(AutoresetMode).index(mode) + group_size,
    )
    while True:
        found = []
        with interrupted_at(line, *FILES) as raised:
            found = collector.collect(10)
        found += collector.collect(10)
        check_episodes(found, group_size)
        for e in found:
            assert (e.slot, e.index) not in seen
            seen.add((e.slot, e.index))
            assert max_staleness is None or collector.version - e.version <= max_staleness
        # What was emitted in a step that was interrupted after it is not counted, and nothing is
        # counted twice.
        count += len(raised)
        assert 0 <= env.emitted - collector.tokens_seen <= count * N
        if not raised:
            break
        places.add(raised[0])
        collector.refresh()
        line += 7
    functions = {name for name, _ in places}
    assert functions >= {
        "Collector._step",
        "Recorder.record",
        "Recorder._episode",
        "LineEnv.step",
    }
    assert len(places) > 20


@pytest.mark.parametrize("mode", AutoresetMode)
def test_at_any_call_of_an_agent_that_learns(mode, monkeypatch):
    """The real env, the real actor: what is paid afterwards is what `score_episodes` says, and
    log-probs are the policy's."""
    envs = make_vec(4, mode, reward="token", kl_coef=0.1)
    agent = PPO(envs, batch_tokens=12, epochs=1, minibatches=1)
    agent.learn(12)
    core, seen = envs.unwrapped, set()
    slots = agent.actor._slots
    calls = [
        (core._engine, "step"),
        (core._engine.trunks, "append"),
        (core._engine, "start"),
        (core._texts, "append"),
    ]
    calls += [
        (core._texts, "restart"),
        (envs, "reset"),
        (envs, "step"),
        (slots, "append"),
        (slots, "prefill"),
    ]
    for owner, name in calls:
        for after in (False, True):
            with monkeypatch.context() as patch:
                interrupt(patch, owner, name, 3, after)
                resets = name == "reset" and mode != AutoresetMode.DISABLED  # there steps reset
                if name == "start":  # in a step too, not in a reset alone
                    agent.collector.reset()
                with pytest.raises(KeyboardInterrupt):
                    many(agent.collector.reset if resets else agent.collector.step)
            metrics, episodes = agent._iterate(10**6)
            assert np.isfinite(metrics["objective/reward"])
            check_paid(core, episodes)
            assert seen.isdisjoint((e.slot, e.index) for e in episodes)
            seen |= {(e.slot, e.index) for e in episodes}


def many(call):
    for _ in range(20):
        call()


def interrupt(patch, owner, name, call, after):
    """Raises at a call of `owner.name`, before it or when it is done."""
    original, left = getattr(owner, name), [call]

    def stands_in(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0 and not after:
            raise KeyboardInterrupt
        out = original(*args, **kwargs)
        if left[0] == 0:
            raise KeyboardInterrupt
        return out

    patch.setattr(owner, name, stands_in, raising=False)


def check_paid(core, episodes):
    paid = core.score_episodes(
        [e.prompt.tolist() for e in episodes],
        [e.response.tolist() for e in episodes],
        kl_coef=[e.kl_coef for e in episodes],
    )
    for row, e in enumerate(episodes):
        np.testing.assert_allclose(e.reward, paid.token_rewards[row, : len(e.response)], atol=1e-4)


def test_an_actor_that_was_interrupted_reads_all_texts_again():
    """Between the cache's token and the note of it, the next call sees the same texts."""
    policy = LMPolicy(tiny_lm(seed=3))
    actor, obs = Actor(policy), ToyEnv(3).reset(seed=0)[0]
    tokens, _ = actor.act(obs)
    obs["tokens"][np.arange(3), obs["length"]] = tokens.numpy()
    obs["length"] += 1
    actor._expect, expect = lambda *args: 1 / 0, actor._expect
    with pytest.raises(ZeroDivisionError):
        actor.act(obs)
    actor._expect = expect
    drawn, logprobs = actor.act(obs)
    for row, length in enumerate(obs["length"]):
        logits = (
            policy.model(torch.from_numpy(obs["tokens"][row, :length])[None]).logits[0, -1].detach()
        )
        assert float(logprobs[row]) == pytest.approx(
            float(torch.log_softmax(logits, -1)[drawn[row]]), abs=1e-4
        )


@pytest.mark.parametrize("mode", AutoresetMode)
def test_continuations_that_are_interrupted(mode, monkeypatch):
    """Wherever that is, the running texts are taken up again or all begin anew."""
    envs = make_vec(6, mode, reward="token", kl_coef=0.1)
    agent = VinePPO(envs, rollouts=3, segments=1)
    core = envs.unwrapped
    for owner, name, call in (
        (envs, "step", 2),
        (envs, "reset", 1),
        (core, "fork", 1),
        (core, "load_state", 1),
    ):
        for after in (False, True):
            episodes = agent.collector.collect(12)
            check_paid(core, episodes)
            states = [(e.prompt, e.response[:1]) for e in episodes if len(e.response) > 1][:3]
            with monkeypatch.context() as patch:
                interrupt(patch, owner, name, call, after)
                with pytest.raises(KeyboardInterrupt):
                    agent.collector.play_on(states, 3)
            assert not agent.collector.running
            check_paid(core, agent.collector.collect(12))


def test_an_env_that_saves_no_state_begins_anew_after_continuations():
    collector = Collector(LineEnv(N, AutoresetMode.SAME_STEP), LineActor(0.3))
    collector.collect(20)
    assert collector.play_on([], 2) == []
    assert not collector.running
    check_episodes(collector.collect(20))


@pytest.mark.parametrize("mode", AutoresetMode)
@pytest.mark.parametrize("stops", [(), (1, 7, 9)], ids=["of one length", "of any length"])
@pytest.mark.parametrize("who", ["an evaluation", "another agent", "a reset", "a state"])
def test_others_who_begin_texts_in_the_env(who, stops, mode):
    """The texts that ran are gone, and what the agent learns from next are texts of its own."""
    envs = make_vec(N, mode, reward="token", stops=stops)
    options = {"batch_tokens": 28, "lr": 1e-9}
    envs.reset(seed=3)
    agent, found, state = PPO(envs, **options), [], envs.save_state()
    other = PPO(envs, seed=5, **options)
    for tokens in (28, 56, 84):
        agent.learn(tokens, on_update=lambda metrics, episodes: found.extend(episodes))
        if who == "an evaluation":
            evaluate(agent, envs, num_texts=N)
        elif who == "a reset":
            envs.reset(seed=tokens)
        elif who == "a state":
            envs.load_state(state)
        else:
            other.learn(tokens)
    batch = EpisodeBatch.stack(found)
    expected = token_logprobs(agent.policy, batch, 1000)
    torch.testing.assert_close(batch.logprob_BT, expected, rtol=0, atol=1e-5)


def test_a_copied_collector_goes_on_with_the_texts_of_the_copied_env():
    collector = PPO(make_vec(N, AutoresetMode.SAME_STEP, reward="token")).collector
    collector.collect(20)
    twin = copy.deepcopy(collector)
    assert twin.running
    for one, other in zip(collector.collect(30), twin.collect(30), strict=True):
        assert np.array_equal(one.response, other.response)
