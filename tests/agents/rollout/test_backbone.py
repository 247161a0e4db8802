"""A policy that shares the env's backbone: the same texts and numbers as with a forward of its own,
from one forward a token."""

import copy

import fakes
import numpy as np
import pytest
import tasks
import torch
from gymnasium.vector import AutoresetMode
from toy_env import ToyEnv, tiny_lm

from tokenenv.agents import GRPO, KLQ, PPO, BestOfN, LMPolicy, Reference, VinePPO
from tokenenv.agents.rollout.actor import Actor
from tokenenv.agents.rollout.collector import Collector
from tokenenv.agents.run.checkpoint import agent_state, flat
from tokenenv.agents.run.evaluate import evaluate
from tokenenv.errors import InvalidArgument
from tokenenv.models.adapters import adapter_layers, with_lora
from tokenenv.models.cached_lm import CachedLM, trunk_of
from tokenenv.models.stacked import ReadAlong, Stack
from tokenenv.wrappers import ActionMask

pytest.importorskip("peft")

SAME, NEXT, DISABLED = (
    AutoresetMode.SAME_STEP,
    AutoresetMode.NEXT_STEP,
    AutoresetMode.DISABLED,
)
OPTIONS = {"lora_rank": 2, "lr": 1e-2, "batch_tokens": 30, "minibatches": 2}


def on_base(model, seed=3):
    """A reward model that is an adapter and a head on the weights of a language model."""
    reward = fakes.reward_model("token", seed=seed)
    adapted = with_lora(model, 2, seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter_layers(adapted):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.3, generator=generator)
    reward.model = trunk_of(adapted)
    return reward


def textgen(mode=SAME, **options):
    model = fakes.causal_lm()
    given = tasks.textgen_options() | {"model": model, "reward_model": on_base(model)}
    options = {"reward": "token", "max_new_tokens": 6, "kl_coef": 0.1, **given, **options}
    return tasks.make_vec(4, mode, "tokenenv/TextGen-v0", **options)


def toy(name, mode=SAME, **options):
    return tasks.make_vec(4, mode, **(tasks.TOYS[name] | options))


def masked(mode=SAME):
    return ActionMask(toy("token", mode), regex="[a-z ]*")


CASES = {
    "ppo": (PPO, textgen, {}),
    "next step": (PPO, lambda: textgen(NEXT), {}),
    "disabled": (PPO, lambda: textgen(DISABLED), {}),
    "tensors": (PPO, lambda: textgen(array="torch"), {}),
    "one label a text": (PPO, lambda: toy("delta"), {}),
    "the policy's log-probs": (PPO, lambda: toy("k1", NEXT), {}),
    "unscored cuts": (PPO, lambda: toy("unscored"), {}),
    "memories": (PPO, lambda: toy("memories", DISABLED), {}),
    "replies": (PPO, lambda: toy("turns"), {}),
    "random replies": (PPO, lambda: toy("random turns", NEXT), {}),
    "masks": (PPO, masked, {}),
    "a critic with a trunk of its own": (KLQ, textgen, {"separate_value": True}),
    "a KL over the whole vocabulary": (PPO, textgen, {"full_kl_coef": 0.1}),
    "groups": (GRPO, lambda: textgen(group_size=2), {}),
    "waiting groups": (GRPO, lambda: textgen(group_size=2), {"max_staleness": 1}),
    "young texts": (PPO, textgen, {"max_staleness": 0}),
    "continuations": (VinePPO, textgen, {"segments": 2, "rollouts": 2}),
    "best of n": (BestOfN, lambda: textgen(group_size=2), {"lora_rank": 0}),
    "the reference": (Reference, textgen, {"lora_rank": 0}),
}


def learnt(algorithm, envs, tokens=90, **options):
    """An agent after some updates, and all its episodes."""
    found = []
    agent = algorithm(envs, **(OPTIONS | options))
    agent.learn(tokens, on_update=lambda metrics, episodes: found.extend(episodes))
    return agent, found


@pytest.fixture
def own_forwards(monkeypatch):
    """The trunks that a token was given to in a forward of their own."""
    trunks, append = [], CachedLM.append

    def counted(self, *args):
        trunks.append(self.trunk)
        return append(self, *args)

    monkeypatch.setattr(CachedLM, "append", counted)
    return trunks


@pytest.mark.parametrize("name", CASES)
def test_shared_and_separate_write_the_same(name, own_forwards):
    algorithm, make, options = CASES[name]
    _, expected = learnt(algorithm, make(), backbone="separate", **options)
    assert own_forwards
    own_forwards.clear()
    agent, found = learnt(algorithm, make(), **options)
    policy = trunk_of(agent.policy.model)
    assert policy not in own_forwards
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one.response, other.response)
        for column in ("logprob", "ref_logprob", "reward"):
            np.testing.assert_allclose(
                getattr(one, column), getattr(other, column), rtol=0, atol=1e-5
            )


def test_the_reward_model_is_in_the_same_forward(own_forwards):
    agent, _ = learnt(PPO, textgen())
    stacks = agent.envs.unwrapped._engine.trunks._stacks
    assert [len(stack.models) for stack in stacks] == [2]
    assert isinstance(agent.actor._slots, ReadAlong)
    assert own_forwards == []


def test_scores_of_whole_texts_are_those_of_stepping():
    """Whatever the reward model reads along with."""
    agent, found = learnt(PPO, textgen())
    scores = agent.envs.unwrapped.score_episodes(
        [e.prompt for e in found],
        [e.response for e in found],
        truncated=[e.truncated for e in found],
    )
    for row, episode in enumerate(found):
        count = len(episode.response)
        np.testing.assert_allclose(
            scores.token_rewards[row, :count], episode.reward, rtol=0, atol=1e-5
        )
        np.testing.assert_allclose(
            scores.ref_logprobs[row, :count], episode.ref_logprob, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("mode", [SAME, NEXT])
def test_a_resumed_run_is_the_run(mode, tmp_path):
    agent, _ = learnt(PPO, textgen(mode))
    agent.save(tmp_path / "checkpoint")
    found = {"straight": [], "resumed": []}
    agent.learn(180, on_update=lambda m, episodes: found["straight"].extend(episodes))
    resumed = PPO.load(tmp_path / "checkpoint", textgen(mode))
    resumed.learn(180, on_update=lambda m, episodes: found["resumed"].extend(episodes))
    assert len(found["straight"]) == len(found["resumed"]) > 4
    for one, other in zip(*found.values(), strict=True):
        assert np.array_equal(one.response, other.response)
        assert np.array_equal(one.logprob, other.logprob)
    straight, again = (dict(flat(agent_state(a))) for a in (agent, resumed))
    tensors = [name for name, value in straight.items() if torch.is_tensor(value)]
    assert tensors
    assert all(torch.equal(straight[name], again[name]) for name in tensors)


def test_others_who_act_in_the_env_get_what_is_theirs():
    """In the middle of a run: an evaluation, another agent, another actor of the same policy."""

    def run(backbone):
        envs = textgen()
        agent, found = learnt(PPO, envs, backbone=backbone)
        numbers = [evaluate(agent, envs, num_texts=3).score]
        other = PPO(envs, **(OPTIONS | {"seed": 5, "backbone": backbone}))
        other.learn(60, on_update=lambda m, episodes: found.extend(episodes))
        collector = Collector(envs, Actor(agent.policy, seed=7))
        for _ in range(8):
            found += collector.step()
        agent.collector.reset()
        agent.learn(150, on_update=lambda m, episodes: found.extend(episodes))
        return numbers, found

    (numbers, found), (expected, others) = run("shared"), run("separate")
    np.testing.assert_allclose(numbers, expected, atol=1e-5)
    assert len(found) == len(others)
    for one, other in zip(found, others, strict=True):
        assert np.array_equal(one.response, other.response)
        np.testing.assert_allclose(one.logprob, other.logprob, rtol=0, atol=1e-5)
        np.testing.assert_allclose(one.reward, other.reward, rtol=0, atol=1e-5)


def test_a_copied_env_goes_on_without_the_agent():
    agent, _ = learnt(PPO, textgen())
    twin = copy.deepcopy(agent.envs)
    tokens = np.array([5, 6, 7, 8])
    one, other = (envs.step(tokens) for envs in (agent.envs, twin))
    np.testing.assert_allclose(one[1], other[1], rtol=0, atol=1e-5)
    assert all(stack.along is None for stack in twin.unwrapped._engine.trunks._stacks)


def test_where_nothing_can_be_shared_shared_is_refused_and_auto_is_separate():
    refused = {
        "weights in common": (textgen(), {"lora_rank": 0}),
        "compile=": (textgen(compile=True), {}),
        "bfloat16": (textgen(), {"precision": "bfloat16"}),
        "has no share_backbone": (ToyEnv(4), {"policy": LMPolicy(tiny_lm()), "lora_rank": 0}),
    }
    for words, (envs, options) in refused.items():
        options = {"lora_rank": 2} | options
        with pytest.raises(InvalidArgument, match=f"backbone='shared' is not possible.*{words}"):
            PPO(envs, backbone="shared", **options)
        assert PPO(envs, **options).actor.share is None
    with pytest.raises(InvalidArgument, match="backbone"):
        PPO(textgen(), backbone="one")


def test_one_stack_lives_however_many_agents_come():
    envs = textgen()
    for seed in range(3):
        learnt(PPO, envs, tokens=20, seed=seed)
    assert len(envs.unwrapped._engine.trunks._stacks) == 1
    assert isinstance(envs.unwrapped._engine.trunks._stacks[0], Stack)


@pytest.mark.parametrize("make", [textgen, lambda: toy("no reward")])
def test_nothing_of_a_trial_is_kept(make):
    envs = make()
    before = envs.unwrapped.cache_bytes
    PPO(envs, **OPTIONS, rollout="auto")
    trunks = envs.unwrapped._engine.trunks
    assert all(stack.along is None for stack in trunks._stacks)
    layers = [layer for slots in trunks._slots.values() for layer in slots._slots.cache.layers]
    memory = [x.untyped_storage() for layer in layers for x in (layer.keys, layer.values)]
    assert sum({m.data_ptr(): m.nbytes() for m in memory}.values()) == before
