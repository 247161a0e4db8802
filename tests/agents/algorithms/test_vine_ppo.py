"""VinePPO: values are what playing on earns, rollouts leave the running texts alone, advantages
telescope."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import tokenenv  # noqa: F401
from tokenenv.agents import VinePPO
from tokenenv.agents.algorithms.vine_ppo import cuts
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.errors import InvalidArgument

MODES = ["NextStep", "SameStep", "Disabled"]


def make(env_id="Reviews", num_envs=12, mode="SameStep", **options):
    return gym.make_vec(f"tokenenv/{env_id}-v0", num_envs=num_envs, autoreset_mode=mode, **options)


def collected(agent, tokens=100):
    return EpisodeBatch.stack(agent.collector.collect(tokens))


def shown(agent):
    return {
        key: torch.as_tensor(value).numpy().copy() for key, value in agent.collector._obs.items()
    }


def test_values_are_the_expected_return():
    """The policy is the reference, so the exact value is the oracle's where beta is so large that
    nothing but pi_ref counts."""
    rollouts = 200
    envs = make(
        "Negation", 3 * rollouts + 100, reward="terminal"
    )  # three states at a time, and slots left over
    agent = VinePPO(envs, rollouts=rollouts)
    episodes = agent.collector.collect(50)[:4]
    states = [(e.prompt, e.response[:t]) for e in episodes for t in (0, 6, 13)]
    width = envs.unwrapped.single_observation_space["tokens"].shape[0]
    obs = {
        "tokens": np.stack(
            [np.pad(np.concatenate(s), (0, width - len(s[0]) - len(s[1]))) for s in states]
        ),
        "length": np.array([len(p) + len(r) for p, r in states]),
        "prompt_length": np.array([len(p) for p, _ in states]),
    }
    exact = np.asarray(envs.unwrapped.oracle.value(obs, 1e5))
    assert np.ptp(exact) > 0.5
    drawn, play_on = [], agent.collector.play_on
    agent.collector.play_on = lambda *group: drawn.extend(found := play_on(*group)) or found
    values = np.array(agent.values(states))
    spread = np.array([e.score for e in drawn]).reshape(len(states), rollouts).std(1) + 1e-3
    errors = (values - exact) * np.sqrt(rollouts) / spread
    assert np.abs(errors).max() < 4
    assert np.mean(errors**2) < 2.5
    for i, e in enumerate(drawn):
        prompt, response = states[i // rollouts]
        np.testing.assert_array_equal(e.prompt, np.concatenate([prompt, response]))


@pytest.mark.parametrize(("gamma", "reward"), [(1.0, "token"), (0.8, "token"), (1, "terminal")])
def test_where_nothing_is_left_to_chance_values_and_advantages_are_exact(gamma, reward):
    """At a temperature near 0 a text goes on in one way only. The texts were drawn at 1, so
    advantages are not 0."""
    agent = VinePPO(
        make(reward=reward, kl="none", max_new_tokens=10), rollouts=3, segments=4, gamma=gamma
    )
    batch = collected(agent, 50)
    agent.actor.temperature = 1e-6
    advantages = agent.advantages(batch)
    assert advantages[batch.mask_BT].abs().max() > 0.5

    tiles = [
        (b, start, end)
        for b, e in enumerate(batch.unstack())
        for start, end in segments_of(len(e.response), 4, 10)
    ]
    before, after = (
        worth(agent, [(batch.unstack()[b], tile[i]) for b, *tile in tiles]) for i in (0, 1)
    )
    for (b, start, end), value, then in zip(tiles, before, after, strict=True):
        earned = sum(gamma**k * float(r) for k, r in enumerate(batch.reward_BT[b, start:end]))
        expected = earned + gamma ** (end - start) * then - value
        assert float(batch.learned["value"][b, start]) == pytest.approx(value, abs=1e-3)
        assert float(advantages[b, start]) == pytest.approx(expected, abs=1e-3)


def segments_of(length, count, longest):
    places = cuts(length, count, longest)
    return list(zip(places, [*places[1:], length], strict=True))


def worth(agent, states):
    """What the likeliest continuation earns after the first t tokens, of pairs (episode, t); 0
    after the last."""
    rest = agent.generate([[*e.prompt, *e.response[:t]] for e, t in states], greedy=True)
    texts = [
        [*e.response[:t].tolist(), *more][: agent.max_new_tokens]
        for (e, t), more in zip(states, rest, strict=True)
    ]
    texts = [
        e.response.tolist() if t == len(e.response) else text
        for (e, t), text in zip(states, texts, strict=True)
    ]
    paid = agent.core.score_episodes([e.prompt.tolist() for e, _ in states], texts).token_rewards
    gamma = agent.config.gamma
    return [
        float(sum(gamma**k * r for k, r in enumerate(row[t:])))
        for row, (_, t) in zip(paid, states, strict=True)
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("array", ["numpy", "torch"])
def test_the_running_texts_go_on_as_if_nothing_had_happened(mode, array, monkeypatch):
    """The same random numbers give the same texts and whatever is known of them as where no values
    were asked for."""
    agent, other = (
        VinePPO(make(mode=mode, array=array, reward="delta", kl_coef=0.1), rollouts=3)
        for _ in range(2)
    )
    envs, batch = agent.envs, collected(agent)
    collected(other)
    agent.kl_coef = other.kl_coef = 0.3  # of texts to come; running ones keep theirs
    other.collector.load_env(other.collector.save_env())  # caches filled anew, as values leave them
    before, seen, generator = (
        envs.unwrapped.save_state(),
        agent.tokens_seen,
        agent.actor.generator.get_state(),
    )
    observed, steps, step = shown(agent), [], envs.step
    monkeypatch.setattr(envs, "step", lambda actions: (steps.append(1), step(actions))[1])
    values = agent.values([(e.prompt, e.response[: len(e.response) // 2]) for e in batch.unstack()])
    np.testing.assert_equal(envs.unwrapped.save_state(), before)
    np.testing.assert_equal(shown(agent), observed)
    assert np.isfinite(values).all()
    resets = mode == "NextStep"  # steps in which some rows take no token
    assert len(values) * 3 < agent.tokens_seen - seen <= len(steps) * envs.num_envs
    assert (agent.tokens_seen - seen < len(steps) * envs.num_envs) == resets
    agent.actor.generator.set_state(generator)
    for one, two in zip(agent.collector.collect(150), other.collector.collect(150), strict=True):
        for field in one.__dataclass_fields__:
            np.testing.assert_equal(getattr(one, field), getattr(two, field))


@pytest.mark.parametrize(
    ("segments", "score_truncated"), [(1, True), (3, True), (3, False), (20, True)]
)
def test_advantages_are_shared_by_segments_and_telescope(segments, score_truncated):
    """Nothing counts after the last token, whether or not a text that was cut has been scored."""
    options = {
        "reward": "token" if score_truncated else "terminal",
        "kl_coef": 0.1,
        "max_new_tokens": 8,
    }
    agent = VinePPO(make(score_truncated=score_truncated, **options), rollouts=2, segments=segments)
    batch = collected(agent)
    assert batch.truncated_B.any()
    if not score_truncated:
        assert not batch.terms["terminal"][batch.truncated_B].any()
        assert batch.score_B[batch.truncated_B].all()
    advantages = agent.advantages(batch)
    values, total = batch.learned["value"], agent.rewards(batch).sum(1)
    for b, e in enumerate(batch.unstack()):
        places = cuts(len(e.response), segments, 8)
        assert len(places) == min(len(e.response), -(-len(e.response) * segments // 8))
        firsts = advantages[b, places]
        assert float(firsts.sum()) == pytest.approx(float(total[b] - values[b, 0]), abs=1e-3)
        for start, end in segments_of(len(e.response), segments, 8):
            assert (advantages[b, start:end] == advantages[b, start]).all()
            assert (values[b, start:end] == values[b, start]).all()


def test_a_segment_earns_its_rewards_and_what_the_values_say(monkeypatch):
    agent = VinePPO(make(), rollouts=2, segments=2, gamma=0.9)
    batch = collected(agent)
    numbers = [float(i) for i in range(1000)]
    monkeypatch.setattr(agent, "values", lambda states, columns=(): numbers[: len(states)])
    advantages, rewards, next_value = agent.advantages(batch), agent.rewards(batch), 0
    for b, length in enumerate(batch.response_length_B.tolist()):
        places = cuts(length, 2, agent.max_new_tokens)
        own = numbers[next_value : next_value + len(places)]
        next_value += len(places)
        for i, (start, end) in enumerate(segments_of(length, 2, agent.max_new_tokens)):
            after = own[i + 1] if i + 1 < len(own) else 0.0
            earned = sum(0.9 ** (t - start) * float(rewards[b, t]) for t in range(start, end))
            expected = earned + 0.9 ** (end - start) * after - own[i]
            assert float(advantages[b, start]) == pytest.approx(expected, abs=1e-3)


def test_segments_tile_a_text():
    assert cuts(8, 4, 8) == [0, 2, 4, 6]
    assert cuts(3, 4, 8) == [0, 2]
    assert cuts(1, 4, 8) == [0]
    assert cuts(7, 2, 7) == [0, 3]
    assert cuts(3, 9, 3) == [0, 1, 2]


@pytest.mark.parametrize("rollouts", [1, 2, 12])
def test_rollouts_are_counted_and_reported(rollouts):
    agent, seen = (
        VinePPO(make(max_new_tokens=6), rollouts=rollouts, segments=2, batch_tokens=60),
        [],
    )
    agent.learn(500, on_update=lambda metrics, episodes: seen.append(metrics))
    assert sum(m["time/rollout_tokens"] for m in seen) < agent.tokens_seen
    assert all(m["time/rollout_tokens"] > 60 for m in seen)


def test_what_it_cannot_use_is_refused():
    with pytest.raises(InvalidArgument, match="rollouts=13 do not fit into 12 slots"):
        VinePPO(make(), rollouts=13)
    with pytest.raises(InvalidArgument, match="segments=0 is not allowed"):
        VinePPO(make(), segments=0)
