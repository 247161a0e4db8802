"""How far an update moves the policy: the number, and the one warning."""

import warnings

import pytest
import torch
from runs import collected
from toy_env import ToyEnv

from tokenenv.agents import A2C, KLQ, PPO
from tokenenv.agents.learning import update_kl
from tokenenv.agents.learning.learner import token_logprobs
from tokenenv.agents.learning.losses import approx_kl


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_it_is_the_kl_of_the_whole_update(algorithm, monkeypatch):
    """The last step included, over the texts that are read again."""
    monkeypatch.setattr(update_kl, "PROBED", 2)
    agent = algorithm(ToyEnv(8), batch_tokens=60, lr=0.01)
    _, batch = collected(agent)
    before = token_logprobs(agent.policy, batch, 1000)
    found = agent.update(batch)["policy/update_kl"]
    now = token_logprobs(agent.policy, batch, 1000)
    mask = batch.mask_BT & (torch.arange(len(batch)) % max(2, len(batch) // 2) == 0)[:, None]
    weights = torch.full_like(now[mask], 1 / int(mask.sum()))
    assert found == pytest.approx(float(approx_kl(now[mask], before[mask], weights)), rel=1e-4)
    assert found > 1e-4


@pytest.mark.parametrize("algorithm", [PPO, KLQ])
def test_the_age_of_texts_does_not_count(algorithm):
    """Nor does who wrote those of a replay: with a rate of nearly zero nothing moves."""
    agent = algorithm(ToyEnv(8, kl_coef=0.1), batch_tokens=60, lr=1e-12, epochs=1)
    _, batch = collected(agent)
    with torch.no_grad():
        for weight in agent.policy.model.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=torch.manual_seed(0))
    agent.updates = 3
    assert update_kl.Before(agent.policy, batch, agent.config, 0).kl(agent.policy) > 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert agent.update(batch)["policy/update_kl"] < 1e-6


def test_a_step_that_is_far_too_large_warns_once():
    agent = PPO(ToyEnv(8), batch_tokens=60, lr=1.0)
    with pytest.warns(UserWarning, match="update 0 moved the policy by .* nats") as seen:
        agent.learn(300)
    [warning] = [one for one in seen if "moved the policy" in str(one.message)]
    assert "Lower lr (it is " in str(warning.message)
    assert "target_kl=0.1" in str(warning.message)


def test_healthy_updates_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PPO(ToyEnv(8), batch_tokens=60, lr=3e-3).learn(300)
