"""The exact credit of tokens, and how what is learnt from stands to it."""

import math

import gymnasium as gym
import numpy as np
import pytest

from tokenenv.agents import PPO
from tokenenv.bench.credit import agreement, by_position, exact_advantages
from tokenenv.bench.play import play

BETA = 0.05


def first_update(env_id, **settings):
    """An agent after one update, and the texts that it learnt from."""
    options = {"kl_coef": BETA, "reward": settings.pop("reward", "terminal")}
    options |= settings.pop("options", {})
    envs = gym.make_vec(env_id, num_envs=16, autoreset_mode="SameStep", **options)
    found = []
    agent = PPO(envs, batch_tokens=64, epochs=1, minibatches=1, **settings)
    agent.learn(64, on_update=lambda _, episodes: found.extend(episodes))
    return agent, found


@pytest.mark.parametrize("beta", [BETA, math.inf])
@pytest.mark.parametrize("env_id", ["tokenenv/DelayedKey-v0", "tokenenv/Negation-v0"])
def test_the_advantages_of_a_text_add_up(env_id, beta):
    """Each is V(s') - V(s), so that they telescope to the score less V at the start."""
    agent, episodes = first_update(env_id, options={"max_new_tokens": 5})
    exact = exact_advantages(agent.core.oracle, episodes, beta)
    start = agent.core.oracle.optimal_objective(beta)
    assert [len(row) for row in exact] == [5] * len(episodes)
    for row, episode in zip(exact, episodes, strict=True):
        assert row.sum() == pytest.approx(episode.score - start, abs=1e-6)


def test_where_somebody_answers_they_have_mean_zero():
    agent, episodes = first_update("tokenenv/Dialogue-v0")
    exact = exact_advantages(agent.core.oracle, episodes, math.inf)
    oracle, own = agent.core.oracle, [len(episode.response) for episode in episodes]
    assert [len(row) for row in exact] == own
    # Over the reference's next tokens, an exact advantage has the mean 0.
    obs = {key: np.asarray(value)[:1] for key, value in agent.envs.reset(seed=0)[0].items()}
    ahead = oracle.q(obs, math.inf) - oracle.value(obs, math.inf)[:, None]
    assert float(oracle.reference.probs[-1] @ ahead[0]) == pytest.approx(0.0, abs=1e-9)


def test_the_optimums_own_reward_is_the_exact_credit():
    """The reward of `oracle` is V*(s') - V*(s), and with lambda 0 and a critic of 0 the advantage
    is the reward, whitened."""
    agent, episodes = first_update(
        "tokenenv/Negation-v0", reward="oracle", lambda_actor=0.0, lambda_critic=0.0
    )
    assert agreement(agent, episodes, BETA) == pytest.approx(1.0, abs=1e-3)
    sparse, texts = first_update("tokenenv/Negation-v0", lambda_actor=0.0, lambda_critic=0.0)
    assert agreement(sparse, texts, BETA) < 0.9


def test_positions_say_where_credit_is():
    agent, episodes = first_update("tokenenv/DelayedKey-v0", options={"max_new_tokens": 4})
    found = by_position(agent, episodes)
    assert {len(row) for name, row in found.items() if name != "overall"} == {4}
    assert found["texts"] == [len(episodes)] * 4
    # The key comes first and the door last; what lies between does not matter.
    size = found["exact_size"]
    assert size[0] + size[-1] == pytest.approx(4.0, rel=1e-3)
    assert min(size[0], size[-1]) > 0.1
    assert max(size[1:-1]) < 1e-3


def test_a_cell_keeps_texts_of_its_first_update_and_of_its_last():
    settings = {"env": "tokenenv/Negation-v0", "num_envs": 8, "total_tokens": 200}
    settings |= {"agent": {"batch_tokens": 64}, "options": {"max_new_tokens": 6}}
    record = play(settings, 1, 8)
    texts = record["texts"]
    assert len(texts) == 6
    assert texts[0]["update"] == 1 < texts[-1]["update"] == record["points"][-1]["updates"]
    for text in texts:
        columns = ("tokens", "token_rewards", "token_advantages", "token_exact")
        assert {len(text[name]) for name in columns} == {6}
    assert set(record["credit"]) >= {"correlation", "overall"}
    assert record["points"][0]["train_credit"] is None
    assert -1.0 <= record["points"][-1]["train_credit"] <= 1.0


def test_elsewhere_no_exact_credit_is_known():
    settings = {"env": "tokenenv/Reviews-v0", "num_envs": 4, "total_tokens": 60}
    record = play(settings | {"agent": {"batch_tokens": 32}}, 1, 4)
    assert record["credit"] is None
    assert record["points"][-1]["train_credit"] is None
    assert "token_exact" not in record["texts"][0]
    assert record["texts"][0]["tokens"]
