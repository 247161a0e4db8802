"""Runs of several processes that are stopped, resumed, and resumed by another number of them."""

import numpy as np
import pytest
from ranked import agent_of, envs_of, weights_of
from runs import same

from tokenenv import ranks
from tokenenv.agents import ALGORITHMS
from tokenenv.agents.run.checkpoint import agent_state, flat
from tokenenv.errors import CheckpointError
from tokenenv.rewards import Prime, Scaled
from tokenenv.rewards.progressive import progressive

TOTAL = 900


def state_of(agent):
    return {name: value for name, value in flat(agent_state(agent)) if name != "config.seed"}


def resumed(name, path, **settings):
    """What this rank has at the end of a run, and of one that goes on from its checkpoint."""

    def save(_, __):
        if agent.updates == 1:
            agent.collector.step()  # so that caches hold what appending left in them
            agent.save(path)

    options = {"reward": Scaled("token")}
    agent = agent_of(name, options=options, **settings)
    agent.learn(TOTAL, on_update=save)
    assert agent.updates > 1
    again = ALGORITHMS[name].load(path, envs_of(name, **options))
    assert again.updates == 1
    again.learn(TOTAL)
    return state_of(agent), state_of(again)


@pytest.mark.parametrize("name", ["ppo", "grpo", "klq", "vineppo"])
def test_a_resumed_run_of_two_ranks_is_the_uninterrupted_one(on_ranks, tmp_path, name):
    settings = {"skip_flat_groups": True} if name == "grpo" else {}
    parts = on_ranks(2, lambda: resumed(name, tmp_path / "checkpoint", **settings))
    for straight, again in parts:
        assert same(straight, again)
    assert same(parts[0][0], parts[1][0])  # all ranks know all of it
    texts = [parts[0][0][f"ranks.{rank}.collector.recorder.version"] for rank in (0, 1)]
    assert len(texts[0]) == len(texts[1])


def stopped(path):
    """What this rank has at the end of a run that the second rank stopped in the midst of a batch,
    and of one that goes on from what was saved then."""
    agent = agent_of("ppo")

    def stop(seen):
        if ranks.number() == 1 and seen > TOTAL / 6:
            agent.stop()
            agent.collector.on_tokens = lambda _: None

    agent.collector.on_tokens = stop
    agent.learn(TOTAL)
    updates, waiting = agent.updates, len(agent.pending.episodes)
    agent.save(path)
    again = ALGORITHMS["ppo"].load(path, envs_of("ppo"))
    for one in (agent, again):
        one.learn(TOTAL)
    return updates, waiting, state_of(agent), state_of(again)


def test_one_rank_stops_all_and_no_text_is_lost(on_ranks, tmp_path):
    first, second = on_ranks(2, lambda: stopped(tmp_path / "checkpoint"))
    assert 0 < first[0] == second[0] < 6
    assert first[1] > 0  # the first rank had its part of the batch when the second one stopped
    assert second[1] == 0
    assert same(first[2], first[3])
    assert same(second[2], second[3])


FADING = progressive("token", "terminal", tokens=TOTAL)
REWARDS = {
    "scaled": Scaled("token"),
    "prime": Prime(outcome="score", threshold=0.0, every=8, lr=1e-2),
    "fading": FADING,
}


def saved(path, reward):
    agent = agent_of("ppo", options={"reward": reward})
    agent.learn(TOTAL / 2)
    agent.save(path)
    return weights_of(agent), agent.updates


def gone_on(path, num_envs, reward):
    agent = ALGORITHMS["ppo"].load(path, envs_of("ppo", num_envs, reward=reward))
    begun, texts = (weights_of(agent), agent.updates), []
    agent.learn(TOTAL, on_update=lambda _, found: texts.append(found))
    found = agent.core.save_statistics(), agent.core.weights
    return begun, weights_of(agent), agent.updates, texts, agent.collector.seed, found


@pytest.mark.parametrize(
    ("before", "after", "reward"),
    [(2, 1, "scaled"), (2, 3, "scaled"), (1, 2, "scaled"), (1, 2, "prime"), (2, 3, "fading")],
)
def test_a_run_goes_on_with_another_number_of_ranks(on_ranks, tmp_path, before, after, reward):
    path, reward = tmp_path / "checkpoint", REWARDS[reward]
    (weights, seen), updates = on_ranks(before, saved, path, reward)[0]
    parts = on_ranks(after, gone_on, path, 4, reward)
    for begun, ended, more, texts, _, (learned, paid) in parts:
        assert np.array_equal(begun[0][0], weights)
        assert (begun[0][1], begun[1]) == (seen, updates)
        assert np.array_equal(ended[0], parts[0][1][0])
        assert TOTAL <= ended[1] == parts[0][1][1] < TOTAL + 60
        assert more == updates + len(texts) > updates
        assert same(shared(learned), shared(parts[0][-1][0]))
        assert paid == parts[0][-1][1]
    assert len({part[4] for part in parts}) == after


def shared(learned):
    """What all ranks have of what terms learned: not the texts that wait on each."""
    names = ("weights", "mean", "square")
    return {
        term: {name: one[name] for name in names} if isinstance(one, dict) else one
        for term, one in learned.items()
    }


def scheduled():
    agent = agent_of("ppo", options={"reward": FADING})
    agent.learn(TOTAL / 2)
    return agent.core.weights, agent.tokens_seen


def test_schedules_go_by_the_tokens_of_all_ranks(on_ranks):
    for weights, seen in on_ranks(2, scheduled):
        assert weights["terminal"] == pytest.approx(seen / TOTAL, abs=0.02)
        assert weights["token"] == pytest.approx(1 - seen / TOTAL, abs=0.02)


def kept_and_left(path):
    agent = agent_of("grpo", skip_flat_groups=True)
    agent.statistics["kept"].add(agent.collector.collect(20))
    agent.save(path)
    again = ALGORITHMS["grpo"].load(path, envs_of("grpo"))
    return len(agent.statistics["kept"].episodes), len(again.statistics["kept"].episodes)


def left(path):
    return len(ALGORITHMS["grpo"].load(path, envs_of("grpo")).statistics["kept"].episodes)


def test_texts_that_one_rank_has_kept_are_not_learned_from_by_others(on_ranks, tmp_path):
    path = tmp_path / "checkpoint"
    for kept, again in on_ranks(2, kept_and_left, path):
        assert kept == again > 0
    assert on_ranks(3, left, path) == [0, 0, 0]


def test_a_checkpoint_of_another_env_is_refused_by_another_number_of_ranks(on_ranks, tmp_path):
    path = tmp_path / "checkpoint"
    on_ranks(2, saved, path, "token")
    with pytest.raises(CheckpointError, match="another env"):
        ALGORITHMS["ppo"].load(path, envs_of("ppo", max_new_tokens=9, reward="token"))
