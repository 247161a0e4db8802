"""Several processes that learn together do what one does with the same texts."""

import json

import numpy as np
import pytest
import yaml
from ranked import agent_of, envs_of, weights_of

from tokenenv import ranks
from tokenenv.agents import ALGORITHMS
from tokenenv.agents.learning.policy import LMPolicy, copy_to_train
from tokenenv.agents.rollout.collector import Prefix

ALIKE = ("ppo", "grpo", "klq", "a2c", "rloo", "reinforce++")
"""Algorithms whose updates depend on their batch alone: VinePPO draws continuations."""
UPDATES = 3


def learned(name, **options):
    """What this rank has after some updates, and the batches that it learned from."""
    agent, batches = agent_of(name, **options), []
    agent.learn(10**6, on_update=lambda _, texts: stop_after(agent, batches, texts))
    return *weights_of(agent), batches


def stop_after(agent, batches, texts):
    batches.append(texts)
    if len(batches) == UPDATES:
        agent.stop()


def learned_alone(name, batches, **options):
    """What one process has after the same batches."""
    agent, given = agent_of(name, **options), iter(batches)
    agent.collect = lambda: next(given)
    for _ in range(UPDATES):
        agent._iterate(10**6)
    return weights_of(agent)[0]


SETTINGS = {
    "minibatches of fewer texts than ranks": {"epochs": 1, "minibatches": 40, "target_kl": 1e-4},
    "losses": {"full_kl_coef": 0.1, "entropy_coef": 0.01, "importance_cap": 2.0},
    "lora": {"lora_rank": 2, "separate_value": True, "max_batch_tokens": 24},
    "running statistics": {"kl_target": 0.05, "kl_horizon": 500, "scale_rewards": True},
    "whole texts": {"rollout": "episode"},
}


def check(found, name, **settings):
    """All ranks have the same weights, and one process with their batches has about the same."""
    (first, seen, batches), *others = found
    for weights, tokens, texts in others:
        assert np.array_equal(first, weights)  # bit for bit
        assert seen == tokens
        assert [len(batch) for batch in batches] == [len(batch) for batch in texts]
    assert len({len(text.response) for batch in batches for text in batch}) > 3
    texts = [[text.response.tolist() for text in batch] for batch in batches]
    assert all(one not in texts[1] + texts[2] for one in texts[0] if len(one) > 4)  # none twice
    alone, begun = learned_alone(name, batches, **settings), weights_of(agent_of(name, **settings))
    assert np.abs(alone - begun[0]).max() > 2e-4
    assert np.abs(alone - first).max() < 1e-5


@pytest.mark.parametrize("name", ALIKE)
def test_two_ranks_have_the_weights_of_one_with_the_same_batch(on_ranks, name):
    check(on_ranks(2, learned, name), name)


def test_three_ranks_have_the_weights_of_one_whatever_is_set(on_ranks):
    found = on_ranks(3, lambda: {k: learned("ppo", **some) for k, some in SETTINGS.items()})
    for key, settings in SETTINGS.items():
        check([part[key] for part in found], "ppo", **settings)


def learned_without_weights(folder):
    for name in ("best-of-n", "reference"):
        agent = agent_of(name, run_dir=folder / name)
        agent.learn(400)
    return agent.tokens_seen


def test_agents_that_train_nothing_make_one_run_too(on_ranks, tmp_path):
    first, second = on_ranks(2, learned_without_weights, tmp_path)
    assert first == second >= 400
    for name in ("best-of-n", "reference"):
        config = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
        assert config["num_envs"] == 16  # of both
        lines = (tmp_path / name / "episodes.jsonl").read_text().splitlines()
        assert int(json.loads(lines[-1])["tokens_seen"]) >= 400


def test_ranks_choose_alike_who_writes(on_ranks):
    first, second = on_ranks(2, lambda: agent_of("ppo", rollout="auto").config.rollout)
    assert first == second in ("step", "episode")


def begun_with(num_envs):
    agent = agent_of("ppo", num_envs=num_envs)
    agent.collector.reset()
    return [text[:length].tolist() for text, length in zip(*prompts_of(agent), strict=True)]


def prompts_of(agent):
    obs = agent.collector._obs
    return obs["tokens"], obs["prompt_length"]


def test_ranks_begin_with_the_prompts_of_the_slots_of_one_env(on_ranks):
    parts = on_ranks(3, begun_with, 4)
    assert [prompt for part in parts for prompt in part] == begun_with(12)


def test_continuations_are_shared_out_and_come_back_in_order(on_ranks):
    def played():
        agent = agent_of("vineppo", num_envs=4)
        texts = ranks.gathered(agent.collector.collect(20))[0][:3]
        before = agent.collector.tokens_seen
        states = [Prefix(text.prompt, text.response[:1]) for text in texts]
        found = agent.play_on(states, 2)
        own = agent.collector.tokens_seen - before
        return [[*state.prompt, *state.response] for state in states], found, own

    parts = on_ranks(2, played)
    for begun, found, own in parts:
        assert len(found) == 6
        assert [text.prompt.tolist() for text in found] == [one for one in begun for _ in range(2)]
        assert own > 0
    first, second = ([text.response.tolist() for text in part[1]] for part in parts)
    assert first == second


def test_policies_that_begin_apart_begin_as_the_first_ranks(on_ranks):
    def begun():
        model = envs_of("ppo").unwrapped.model
        policy = LMPolicy(copy_to_train(model), seed=ranks.number())
        policy.value_head.bias.data.fill_(ranks.number())
        own = policy.value_head.bias.item()
        agent = ALGORITHMS["ppo"](envs_of("ppo"), policy=policy, batch_tokens=50)
        return own, agent.policy.value_head.bias.item()

    assert on_ranks(2, begun) == [(0.0, 0.0), (1.0, 0.0)]
