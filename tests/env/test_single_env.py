"""One text at a time: Gymnasium's and stable-baselines3's own checks, and nothing that the batched
env does not do."""

import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import NumpyToTorch
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from tasks import CASES, TOY, TOYS, T, assert_equal, make_vec, row_of, tokenizer

from tokenenv.errors import EnvClosed, FinishedRow, InvalidAction, InvalidArgument, NotReset


def make(env_id: str = TOY, **options: Any) -> Any:
    return gym.make(env_id, **options)


@pytest.mark.parametrize(("env_id", "options"), CASES)
def test_gymnasiums_own_check(env_id: str, options: dict[str, Any]) -> None:
    env = make(env_id, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*infinity")  # of Box spaces without bounds
        check_env(env.unwrapped)


@pytest.mark.parametrize(
    ("env_id", "options"), [case for case in CASES if case.values[1].get("kl") != "policy"]
)
def test_stable_baselines3s_own_check(env_id: str, options: dict[str, Any]) -> None:
    sb3_check_env(make(env_id, **options).unwrapped, warn=False)


@pytest.mark.parametrize("name", ["mixture", "k1", "features"])
def test_is_one_row_of_the_batched_env(name: str) -> None:
    env, envs = make(**TOYS[name]).unwrapped, make_vec(2, AutoresetMode.DISABLED, **TOYS[name])
    for one, (obs, info) in ((env.reset(seed=4), envs.reset(seed=[4, 9])),):
        assert_equal(
            one[0], {k: v[0] for k, v in obs.items()} if isinstance(obs, dict) else obs[0], 1e-5
        )
        assert_equal(one[1], row_of(info, 0), 1e-5)
    for token in (20, 30, 1):
        action: Any = {"token": token, "logprob": -0.5} if name == "k1" else token
        actions = {"token": [token, 12], "logprob": [-0.5, -1.0]} if name == "k1" else [token, 12]
        _, reward, terminated, truncated, info = env.step(action)
        _, rewards, _, _, infos = envs.step(actions)
        assert type(reward) is float
        assert (terminated, truncated) == (token == 1, False)
        assert type(terminated) is type(truncated) is bool
        np.testing.assert_allclose(reward, rewards[0], atol=1e-5)
        assert_equal(info, row_of(infos, 0), 1e-5)
    assert not any(key.startswith("_") for key in info)


@pytest.mark.parametrize("key", ["num_envs", "autoreset_mode", "group_size"])
def test_options_of_a_batch_are_refused(key: str) -> None:
    with pytest.raises(
        InvalidArgument, match=f"{key}=2 is for gym.make_vec; one text at a time has no {key}"
    ):
        make(**{key: 2})


def test_shows_what_the_batched_env_knows() -> None:
    env = make().unwrapped
    obs, _ = env.reset(seed=np.int64(0), options={"prompts": ["the cat"]})
    assert env.decode(obs) == ["the cat"]
    assert env.token_spec.max_new_tokens == T
    assert env.reference is env.vector.reference
    env.kl_coef = 0.5
    assert env.vector.kl_coef == env.kl_coef == 0.5
    with pytest.raises(InvalidArgument, match="kl_coef=-1"):
        env.kl_coef = -1
    with pytest.raises(AttributeError):
        env.no_such_thing  # noqa: B018
    state = env.save_state()
    first = env.step(30)
    env.load_state(state)
    assert_equal(first[0], env.step(30)[0])


def test_tensors_come_from_gymnasiums_wrapper() -> None:
    with pytest.raises(
        InvalidArgument, match=r"array='torch' is for gym.make_vec; .* gymnasium has NumpyToTorch"
    ):
        make(array="torch")
    env = NumpyToTorch(make())
    assert isinstance(env.reset(seed=0)[0]["tokens"], torch.Tensor)
    assert isinstance(env.step(torch.tensor(20))[0]["tokens"], torch.Tensor)


def test_attributes_are_set_where_they_are_read() -> None:
    """As Gymnasium's wrappers set them, which ask every layer in turn."""
    env = gym.make(TOY)
    core = env.unwrapped
    env.reset(seed=0)
    for name, value in (("kl_coef", 0.7), ("tokens_seen", 9)):
        assert env.set_wrapper_attr(name, value)
        assert getattr(core, name) == getattr(core.vector, name) == value
        assert name not in vars(core)
    with pytest.raises(InvalidArgument, match="kl_coef=-1"):
        env.set_wrapper_attr("kl_coef", -1)
    with pytest.raises(AttributeError, match="device"):
        core.device = "cuda"
    assert core.set_wrapper_attr("remark", 3)
    assert (core.remark, hasattr(core.vector, "remark")) == (3, False)
    assert core.set_wrapper_attr("other", 3, force=False) is False


def test_errors_come_through() -> None:
    env = make().unwrapped
    with pytest.raises(NotReset, match="call reset"):
        env.step(3)
    env.reset(seed=0)
    with pytest.raises(InvalidAction, match=r"actions\[0\]=61 is no token id; allowed: 0 to 60"):
        env.step(61)
    env.step(tokenizer().eos_token_id)
    with pytest.raises(FinishedRow, match="have finished"):
        env.step(3)
    env.reset()
    env.step(3)
    env.close()
    for call in (env.reset, lambda: env.step(3), env.save_state):
        with pytest.raises(EnvClosed, match="closed"):
            call()
