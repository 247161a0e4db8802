"""VinePPO: values are what playing on earns, rollouts leave the running texts alone, advantages telescope."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import tokenenv  # noqa: F401
from tokenenv.agents import VinePPO
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learner import token_logprobs
from tokenenv.agents.vine_ppo import cuts
from tokenenv.errors import InvalidArgument

MODES = ["NextStep", "SameStep", "Disabled"]


def make(env_id="Reviews", num_envs=12, mode="SameStep", **options):
    return gym.make_vec(f"tokenenv/{env_id}-v0", num_envs=num_envs, autoreset_mode=mode, **options)


def collected(agent, tokens=100):
    return EpisodeBatch.stack(agent.collector.collect(tokens))


def shown(agent):
    return {key: torch.as_tensor(value).numpy().copy() for key, value in agent.collector._obs.items()}


def test_values_are_the_expected_return():
    """The policy is the reference, so the exact value is the oracle's where beta is so large that nothing but pi_ref counts."""
    envs = make("Negation", 1300, reward="terminal")  # three states at a time, and slots left over
    agent = VinePPO(envs, rollouts=400)
    episodes = agent.collector.collect(50)[:3]
    states = [(e.prompt, e.response[:t]) for e in episodes for t in (0, 6, 13)]
    width = envs.unwrapped.single_observation_space["tokens"].shape[0]
    obs = {
        "tokens": np.stack([np.pad(np.concatenate(s), (0, width - len(s[0]) - len(s[1]))) for s in states]),
        "length": np.array([len(p) + len(r) for p, r in states]),
        "prompt_length": np.array([len(p) for p, _ in states]),
    }
    exact = np.asarray(envs.unwrapped.oracle.value(obs, 1e5))
    assert np.ptp(exact) > 0.2
    np.testing.assert_allclose(agent.values(states), exact, atol=4 / np.sqrt(400))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("array", ["numpy", "torch"])
def test_the_running_texts_go_on_as_if_nothing_had_happened(mode, array):
    envs = make(mode=mode, array=array, reward="delta", kl_coef=0.1)
    agent = VinePPO(envs, rollouts=3)
    batch = collected(agent)
    envs.unwrapped.kl_coef = 0.3
    before, seen = envs.unwrapped.save_state(), agent.tokens_seen
    observed = shown(agent)
    values = agent.values([(e.prompt, e.response[: len(e.response) // 2]) for e in batch.unstack()])
    np.testing.assert_equal(envs.unwrapped.save_state(), before)
    np.testing.assert_equal(shown(agent), observed)
    assert np.isfinite(values).all()
    assert agent.tokens_seen > seen + len(values) * 3
    again = collected(agent)
    mask = again.mask_BT
    torch.testing.assert_close(token_logprobs(agent.policy, again, 10_000)[mask], again.logprob_BT[mask], atol=1e-4, rtol=0)
    for name in ("reward_BT", "potential_BT1"):
        assert getattr(again, name).isfinite().all()
    torch.testing.assert_close(sum(again.terms.values())[mask], again.reward_BT[mask], atol=1e-4, rtol=0)


@pytest.mark.parametrize("segments", [1, 3, 30])
def test_advantages_are_shared_by_segments_and_telescope(segments):
    agent = VinePPO(make(reward="token", kl_coef=0.1, max_new_tokens=12), rollouts=2, segments=segments)
    batch = collected(agent)
    advantages = agent.advantages(batch)
    values, total = batch.learned["value"], agent.rewards(batch).sum(1)
    for b, e in enumerate(batch.unstack()):
        places = cuts(len(e.response), segments)
        assert len(places) == min(segments, len(e.response))
        firsts = advantages[b, places]
        assert float(firsts.sum()) == pytest.approx(float(total[b] - values[b, 0]), abs=1e-3)
        for start, end in zip(places, [*places[1:], len(e.response)], strict=True):
            assert (advantages[b, start:end] == advantages[b, start]).all()
            assert (values[b, start:end] == values[b, start]).all()


def test_a_segment_earns_its_rewards_and_what_the_values_say(monkeypatch):
    agent = VinePPO(make(), rollouts=2, segments=2, gamma=0.9)
    batch = collected(agent)
    numbers = [float(i) for i in range(1000)]
    monkeypatch.setattr(agent, "values", lambda states: numbers[: len(states)])
    advantages, rewards, next_value = agent.advantages(batch), agent.rewards(batch), 0
    for b, length in enumerate(batch.response_length_B.tolist()):
        places = cuts(length, 2)
        own = numbers[next_value : next_value + len(places)]
        next_value += len(places)
        for i, (start, end) in enumerate(zip(places, [*places[1:], length], strict=True)):
            after = own[i + 1] if i + 1 < len(own) else 0.0
            earned = sum(0.9 ** (t - start) * float(rewards[b, t]) for t in range(start, end))
            expected = earned + 0.9 ** (end - start) * after - own[i]
            assert float(advantages[b, start]) == pytest.approx(expected, abs=1e-3)


def test_segments_tile_a_text():
    assert cuts(8, 4) == [0, 2, 4, 6]
    assert cuts(3, 4) == [0, 1, 2]
    assert cuts(1, 4) == [0]
    assert cuts(7, 2) == [0, 3]


def test_rollouts_are_counted_and_reported():
    agent, seen = VinePPO(make(max_new_tokens=6), rollouts=2, batch_tokens=60), []
    agent.learn(500, on_update=lambda metrics, episodes: seen.append(metrics))
    assert sum(m["time/rollout_tokens"] for m in seen) < agent.tokens_seen
    assert all(m["time/rollout_tokens"] > 60 for m in seen)


def test_what_it_cannot_use_is_refused():
    with pytest.raises(InvalidArgument, match="rollouts=13 do not fit into 12 slots"):
        VinePPO(make(), rollouts=13)
    with pytest.raises(InvalidArgument, match="segments=0 is not allowed"):
        VinePPO(make(), segments=0)
