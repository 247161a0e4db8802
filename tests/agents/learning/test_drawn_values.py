"""The critic's values that are kept from collection: where they count they are those of a forward
before the update, and an update from them is the one that computes them."""

import copy
from dataclasses import replace

import fakes
import numpy as np
import pytest
import tasks
import torch
from gymnasium.vector import AutoresetMode
from test_masked_agents import MaskedToy
from toy_env import ToyEnv

from tokenenv.agents import A2C, GRPO, KLQ, PPO, LMPolicy
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning.learner import (
    logprobs_and_values,
    outputs,
    state_values,
    token_logprobs,
    values_unknown,
)
from tokenenv.agents.rollout import text_collector
from tokenenv.models.trunks import trunk_of

SAME_STEP = AutoresetMode.SAME_STEP


def toy(mode=SAME_STEP, **options):
    return tasks.make_vec(4, mode, **options)


def prefixed():
    """Every text begins with a response of two tokens."""
    envs = toy()
    reset = envs.reset

    def given(*, seed=None, options=None):
        rows = {"prefixes": [np.array([20, 21])] * 4}
        return reset(seed=seed, options=rows if options is None else options)

    envs.reset = given
    return envs


CASES = {
    **{mode.value: (lambda mode=mode: toy(mode), {}) for mode in AutoresetMode},
    "torch": (lambda: toy(array="torch"), {}),
    "turns": (lambda: toy(turns="fixed"), {}),
    "random turns": (lambda: toy(turns="random"), {"rollout": "episode"}),
    "masks": (lambda: MaskedToy(4, kl_coef=0.1), {}),
    "prefixes": (prefixed, {}),
    "unscored": (lambda: toy(**tasks.TOYS["unscored"]), {}),
    "kl='policy'": (lambda: toy(**tasks.TOYS["k1"]), {}),
    "temperature": (toy, {"temperature": 0.7}),
    "adapters": (toy, {"lora_rank": 2}),
    "episode": (toy, {"rollout": "episode"}),
    "young": (toy, {"max_staleness": 0}),
    "n-grams": (lambda: tasks.make_vec(4, SAME_STEP, "tokenenv/DelayedKey-v0"), {}),
}
SETTINGS = {"batch_tokens": 60, "minibatches": 2, "lr": 1e-2, "lr_schedule": "constant"}


def agent_of(envs, algorithm=PPO, **options):
    agent = algorithm(envs, **{**SETTINGS, **options})
    torch.manual_seed(0)
    torch.nn.init.normal_(agent.policy.value_head.weight, std=0.1)
    return agent


def collected(agent):
    return EpisodeBatch.stack(agent.collector.collect(60))


def without(batch):
    """The batch as an engine without a critic would give it."""
    return EpisodeBatch.stack([replace(e, drawn_value=None) for e in batch.unstack()])


@pytest.mark.parametrize("case", CASES)
def test_they_are_those_of_a_forward_before_the_update(case):
    make, options = CASES[case]
    agent, known = agent_of(make(), **options), 0
    for _ in range(2):
        batch = collected(agent)
        unknown_B = values_unknown(batch, agent.updates)
        assert (unknown_B == (batch.version_B < agent.updates) | batch.bootstraps_B).all()
        whole = state_values(agent.policy, batch, 1000)
        found = state_values(agent.policy, batch, 1000, unknown_B)
        whole[~unknown_B, batch.response_length_B[~unknown_B]] = 0.0  # counts for nothing there
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)
        assert whole.abs().max() > 0.01
        known += int((~unknown_B).sum())
        agent.learn(agent.tokens_seen + 1)
    assert known


@pytest.mark.parametrize(
    ("algorithm", "case"),
    [(PPO, "SameStep"), (A2C, "unscored"), (PPO, "adapters"), (PPO, "episode"), (KLQ, "torch")],
)
def test_an_update_from_them_is_the_update_that_computes_them(algorithm, case):
    make, options = CASES[case]
    agents = [agent_of(make(), algorithm, **options) for _ in range(2)]
    for agent in agents:
        agent.learn(60)
    drawn, computed = (collected(agent) for agent in agents)
    assert not values_unknown(drawn, agent.updates).all()
    metrics = [
        agent.update(batch) for agent, batch in zip(agents, [drawn, without(computed)], strict=True)
    ]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4, abs=1e-5)
    for a, b in zip(*(agent.policy.parameters() for agent in agents), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def forwards(agent, monkeypatch):
    """The number of texts in each of the forwards that the policy's trunk runs from now on."""
    texts, policy = [], type(agent.policy)

    def counting(forward):
        def counted(self, tokens, lengths):
            texts.append(len(tokens))
            return forward(self, tokens, lengths)

        return counted

    for name in ("states", "value_states"):
        monkeypatch.setattr(policy, name, counting(getattr(policy, name)))
    return texts


@pytest.mark.parametrize("algorithm", [PPO, KLQ])
def test_new_texts_cost_no_forward_before_the_update(algorithm, monkeypatch):
    agent = agent_of(ToyEnv(4, kl_coef=0.1), algorithm, max_staleness=0)
    agent.learn(60)
    batch = collected(agent)
    monkeypatch.setattr(agent, "optimise", lambda batch, make_loss: {})
    if algorithm is KLQ:
        replay = agent.statistics["replay"]
        monkeypatch.setattr(replay, "sample", lambda *_: list(replay.episodes)[-len(batch) :])
    texts = forwards(agent, monkeypatch)
    agent.update(batch)
    assert texts == []
    agent.update(without(batch))
    assert sum(texts) == len(batch) * (2 if algorithm is KLQ else 1)


@pytest.mark.parametrize(
    "options", [{"separate_value": True}, {"precision": "bfloat16"}], ids=["own trunk", "bfloat16"]
)
@pytest.mark.parametrize("rollout", ["step", "episode"])
def test_they_are_not_read_where_learning_finds_others(options, rollout):
    batch = collected(agent_of(toy(), rollout=rollout, **options))
    assert batch.drawn_value_BT[batch.mask_BT].isnan().all()
    assert values_unknown(batch, 0).all()


def test_a_base_in_bfloat16_has_none():
    model = fakes.causal_lm(num_hidden_layers=1).to(torch.bfloat16)
    policy = LMPolicy(model, lora_rank=2, precision="float32")
    batch = collected(agent_of(toy(), policy=policy))
    assert values_unknown(batch, 0).all()


def test_agents_without_a_critic_read_none():
    batch = collected(agent_of(toy(group_size=2), GRPO))
    assert batch.drawn_value_BT[batch.mask_BT].isnan().all()


@pytest.mark.parametrize("rollout", ["step", "episode"])
def test_an_update_that_fails_half_way_leaves_none_of_earlier_weights(rollout, monkeypatch):
    agent = agent_of(toy(), rollout=rollout)
    batch = collected(agent)
    step = agent.optimizer.step

    def interrupted(*args, **kwargs):
        step(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(agent.optimizer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt), agent._whole_or_nothing():
        agent.update(batch)
    monkeypatch.undo()
    unknown = []
    for _ in range(4):
        batch = collected(agent)
        unknown_B = values_unknown(batch, agent.updates)
        unknown.append(unknown_B.float().mean())
        whole = state_values(agent.policy, batch, 1000)
        whole[~unknown_B, batch.response_length_B[~unknown_B]] = 0.0
        found = state_values(agent.policy, batch, 1000, unknown_B)
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)
    assert unknown[0] > 0
    assert unknown[-1] == 0


def test_the_critic_that_starts_at_the_mean_return_is_another_one():
    agent = agent_of(ToyEnv(4, kl_coef=0.1), KLQ)
    batch = collected(agent)
    before = copy.deepcopy(batch)
    agent.centre_critic(batch)
    agent.estimate(batch)
    torch.testing.assert_close(
        batch.learned["value"], state_values(agent.policy, before, 1000)[:, :-1]
    )


def read_by(trunk):
    """The number of texts in each forward of a trunk from now on."""
    texts = []
    trunk.register_forward_pre_hook(
        lambda module, args, kwargs: texts.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return texts


def test_a_trunk_is_read_for_what_is_asked_of_it_alone():
    agent = agent_of(toy(), separate_value=True)
    batch = collected(agent)
    of_policy, of_critic = read_by(trunk_of(agent.policy.model)), read_by(agent.policy.value_trunk)
    values = state_values(agent.policy, batch, 10_000)
    assert (of_policy, sum(of_critic)) == ([], len(batch))
    logprobs = token_logprobs(agent.policy, batch, 10_000)
    assert sum(of_policy) == sum(of_critic) == len(batch)
    both = logprobs_and_values(agent.policy, batch, 10_000)
    torch.testing.assert_close(both, (logprobs, values))


def test_an_engine_without_a_critic_costs_one_forward_before_the_update(monkeypatch):
    monkeypatch.setitem(text_collector.ENGINES, "vllm", "local_engine:LocalEngine")
    agent = agent_of(toy(), rollout="vllm")
    found, read = [], read_by(trunk_of(agent.policy.model))
    monkeypatch.setattr(agent.collector, "refresh", lambda: None)

    def optimise(batch, make_loss):
        found.append((batch, list(read)))
        return {}

    monkeypatch.setattr(agent, "optimise", optimise)
    read.clear()
    collect = agent.collector.collect

    def collected_alone(tokens):
        episodes = collect(tokens)
        read.clear()
        return episodes

    monkeypatch.setattr(agent.collector, "collect", collected_alone)
    agent.learn(60)
    batch, texts = found[0]
    assert sum(texts) == len(batch)
    whole = state_values(agent.policy, batch, 1000)
    torch.testing.assert_close(batch.learned["old_value"], whole[:, :-1])


def test_one_forward_gives_log_probs_and_values():
    agent = agent_of(toy(**tasks.TOYS["unscored"]), KLQ, kl_coef=0.1)
    batch = collected(agent)
    texts = np.arange(len(batch))
    for which_B in (None, torch.as_tensor(texts % 2 == 0)):
        found = logprobs_and_values(agent.policy, batch, 50, 1.0, which_B)
        torch.testing.assert_close(found[0], token_logprobs(agent.policy, batch, 50, 1.0, which_B))
        torch.testing.assert_close(found[1], state_values(agent.policy, batch, 50, which_B))
    assert outputs(agent.policy, batch, texts).last_value is None
