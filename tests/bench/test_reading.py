"""Counting what the models behind a reward read."""

import gymnasium as gym
import numpy as np
import pytest

from tokenenv.agents import PPO
from tokenenv.bench.reading import ReadTokens


def envs_of(env_id="tokenenv/Reviews-v0", **options):
    return gym.make_vec(env_id, num_envs=4, autoreset_mode="Disabled", **options)


def step(envs, times):
    spec = envs.unwrapped.token_spec
    word = next(i for i in range(spec.vocab_size) if i not in {*spec.stop_token_ids, 0})
    for _ in range(times):
        envs.step(np.full(4, word))


@pytest.mark.parametrize("env_id", ["tokenenv/Reviews-v0", "tokenenv/Negation-v0"])
def test_a_causal_reward_reads_each_token_once(env_id):
    envs = envs_of(env_id)
    read = ReadTokens(envs.unwrapped)
    envs.reset(seed=0)
    begun = read.count
    step(envs, 3)
    assert read.count - begun == 4 * 3


def test_credit_by_occlusion_reads_each_text_many_times():
    def read_by(reward):
        envs = envs_of("tokenenv/Reviews-v0", reward=reward)
        read = ReadTokens(envs.unwrapped)
        agent = PPO(envs, batch_tokens=64, epochs=1, minibatches=1)
        agent.learn(64)
        return read.count / agent.tokens_seen

    assert read_by("occlusion") > 3 * read_by("terminal")


def test_evaluations_do_not_count():
    envs = envs_of()
    read = ReadTokens(envs.unwrapped)
    with read.paused():
        envs.reset(seed=0)
        step(envs, 2)
    assert read.count == 0


def test_a_model_elsewhere_cannot_be_counted():
    class Elsewhere:
        frozen_models = {"reference": object(), "reward model": object()}  # noqa: RUF012

    assert ReadTokens(Elsewhere()).count is None
