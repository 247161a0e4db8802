"""Evaluations: exact where they can be, and the same by every method."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from tokenenv.agents import PPO, BestOfN
from tokenenv.agents.run.evaluate import next_token_probs
from tokenenv.bench.cells import train_of
from tokenenv.bench.measure import COLUMNS, enumerated, make_measure, sampled

BETA = 0.1
SMALL = {"vocab_size": 6, "num_keys": 2, "max_new_tokens": 4, "kl_coef": BETA}


def trained(**settings):
    """A training, and an agent whose policy is no longer the reference."""
    given = {"env": "tokenenv/DelayedKey-v0", "num_envs": 16, "options": SMALL} | settings
    train = train_of(given)
    agent = train.algorithm(train.make_envs(), train.agent)
    with torch.no_grad():
        for weight in agent.policy.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    return train, agent


def test_enumeration_is_exact():
    """For a policy that needs no more than the last word, the oracle's own sum over states is
    exact too."""
    envs = gym.make_vec("tokenenv/DelayedKey-v0", num_envs=1, **SMALL)
    oracle, rng = envs.unwrapped.oracle, np.random.default_rng(0)
    table = rng.dirichlet(np.ones(oracle.vocab_size), size=(5, oracle.vocab_size + 1))

    def probs(obs):
        at = obs["length"] - 1
        last = np.where(at == 0, oracle.vocab_size, obs["tokens"][np.arange(len(at)), at])
        return table[at, last]

    exact = oracle.evaluate(probs, BETA, markov=True)
    gold, kl = enumerated(oracle, probs)
    assert gold == pytest.approx(exact.score, abs=1e-12)
    assert kl == pytest.approx(exact.kl, abs=1e-12)
    assert gold - BETA * kl == pytest.approx(exact.objective, abs=1e-12)


def test_three_methods_agree(monkeypatch):
    train, agent = trained()
    exact = make_measure(train, agent, 8)()
    assert exact["method"] == "enumeration"
    assert exact["objective_error"] == exact["gold_error"] == 0.0
    assert exact["kl"] > 0.05  # the policy has moved
    monkeypatch.setattr("tokenenv.bench.measure.MOST_TEXTS", 0)
    states = make_measure(train, agent, 1000)()
    assert states["method"] == "states"
    error = states["objective_error"]
    assert states["regret"] == pytest.approx(exact["regret"], abs=4 * error)
    assert states["gold"] == pytest.approx(exact["gold"], abs=0.03)
    texts = sampled(agent, train.make_envs(), BETA, 500, 5)
    assert texts["gold"] == pytest.approx(exact["gold"], abs=4 * texts["gold_error"])
    assert texts["objective"] == pytest.approx(exact["objective"], abs=0.1)
    assert texts["length"] == exact["length"] == 4.0


def test_the_reference_is_at_share_0():
    train = train_of({"env": "tokenenv/DelayedKey-v0", "num_envs": 4, "options": SMALL})
    agent = PPO(train.make_envs(), train.agent)
    found = make_measure(train, agent, 8)()
    assert list(found) == list(COLUMNS)
    assert found["share"] == pytest.approx(0.0, abs=1e-6)
    assert found["kl"] == pytest.approx(0.0, abs=1e-6)
    oracle = agent.core.oracle
    best, floor = oracle.optimal_objective(BETA), oracle.reference_objective()
    assert found["regret"] == pytest.approx(best - floor, abs=1e-6)


def test_temperature_is_the_agents():
    train, agent = trained(agent={"temperature": 2.0})
    gold, _ = enumerated(agent.core.oracle, next_token_probs(agent.policy, 2.0))
    cold, _ = enumerated(agent.core.oracle, next_token_probs(agent.policy, 1.0))
    assert make_measure(train, agent, 8)()["gold"] == gold != cold


@pytest.mark.parametrize(
    ("options", "agent", "beta"),
    [
        ({"kl": "none", "kl_coef": None}, {}, 0.0),
        ({"kl": "none", "kl_coef": 0.2}, {}, 0.2),
        ({}, {"kl_coef": 0.3}, 0.3),
        ({}, {}, BETA),
    ],
)
def test_j_has_the_beta_that_the_run_begins_with(options, agent, beta):
    train, made = trained(options=SMALL | options, agent=agent)
    found = make_measure(train, made, 8)()
    assert found["objective"] == pytest.approx(found["gold"] - beta * found["kl"], abs=1e-9)


def test_the_best_of_n_is_sampled():
    train, agent = trained(algo="best-of-n")
    assert isinstance(agent, BestOfN)
    found = make_measure(train, agent, 64)()
    assert found["method"] == "sampling"
    assert found["regret"] is not None


def test_several_turns_have_a_regret_too():
    train = train_of({"env": "tokenenv/Dialogue-v0", "num_envs": 4})
    agent = PPO(train.make_envs(), train.agent)
    found = make_measure(train, agent, 64)()
    assert (found["method"], found["length"]) == ("states", None)
    assert found["share"] == pytest.approx(0.0, abs=0.1)


def test_evaluation_leaves_the_training_as_it_was():
    train, agent = trained(env="tokenenv/Reviews-v0", options={})
    measure = make_measure(train, agent, 8)
    found = measure()
    assert found == measure()  # the same prompts and samples each time
    assert (found["method"], found["regret"]) == ("sampling", None)
    assert found["proxy"] is not None
    assert agent.core.tokens_seen == 0


def test_held_out_prompts_are_asked_where_there_are_any(monkeypatch):
    asked = []
    train, agent = trained(env="tokenenv/Reviews-v0", options={})
    monkeypatch.setattr(
        type(train), "make_envs", lambda self, **changes: asked.append(changes) or agent.envs
    )
    make_measure(train, agent, 8)
    assert asked == [{"split": "test", "group_size": 1}]
