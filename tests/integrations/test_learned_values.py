"""Learners that know Gymnasium alone learn the true value of a fresh text: they must not bootstrap
where a scored text is cut.

Every text has four tokens and earns 1 at its end, so every state is worth 1. A learner that adds
the value of a cut text's last state to that 1 doubles what it believes again and again.
"""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.vec_env import DummyVecEnv

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.integrations.sb3 import SB3VecEnv
from tokenenv.rewards.rule import Rule

ID = "tokenenv/Negation-v0"
ONE = {"max_new_tokens": 4, "reward": {"one": Rule(lambda prompt, response: 1.0, on="tokens")}}
EXAMPLES = Path(__file__).parents[2] / "examples"


def by_sb3(make: Callable[..., Any], algorithm: Any, **settings: Any) -> Callable[..., float]:
    """The critic's value after a few thousand steps of an SB3 algorithm."""

    def value(**options: Any) -> float:
        envs = make(observation="features", kl="none", **options)
        model = algorithm(
            "MlpPolicy", envs, gamma=1.0, learning_rate=3e-3, seed=0, device="cpu", **settings
        ).learn(1200)
        with torch.no_grad():
            return float(
                model.policy.predict_values(model.policy.obs_to_tensor(envs.reset())[0]).mean()
            )

    return value


def one_by_one(**options: Any) -> DummyVecEnv:
    return DummyVecEnv([lambda: gym.make(ID, **options)] * 4)


def together(**options: Any) -> SB3VecEnv:
    return SB3VecEnv(gym.make_vec(ID, num_envs=16, autoreset_mode="SameStep", **options))


def by_the_single_file(**options: Any) -> float:
    """That of examples/cleanrl_ppo.py."""
    file = runpy.run_path(str(EXAMPLES / "cleanrl_ppo.py"))
    return float(
        file["train"](file["Args"](env_id=ID, env_options=options, gamma=1.0, total_steps=6144))[1]
    )


def by_torchrl(**options: Any) -> float:
    """That of examples/torchrl_ppo.py."""
    return float(
        runpy.run_path(str(EXAMPLES / "torchrl_ppo.py"))["train"](ID, 6144, 32, 1024, **options)
    )


LEARNERS = {
    "sb3's a2c": by_sb3(one_by_one, A2C, n_steps=4),
    "sb3's a2c on a vector env": by_sb3(together, A2C, n_steps=4),
    "sb3's ppo on a vector env": by_sb3(together, PPO, n_steps=16, batch_size=64),
    "a single file": by_the_single_file,
    "torchrl": by_torchrl,
}


@pytest.mark.parametrize("name", LEARNERS)
def test_a_fresh_text_is_worth_what_texts_earn(name: str) -> None:
    assert LEARNERS[name](**ONE) == pytest.approx(1.0, abs=0.25)


def test_the_stable_baselines3_adapter_knows_a_scored_cut_under_either_flag() -> None:
    assert LEARNERS["sb3's a2c on a vector env"](cut="truncated", **ONE) == pytest.approx(
        1.0, abs=0.25
    )


@pytest.mark.parametrize("name", ["sb3's a2c", "torchrl"])
def test_values_run_away_where_a_scored_cut_is_a_truncation(name: str) -> None:
    """So that the test above can fail; and why the default is what it is."""
    assert LEARNERS[name](cut="truncated", **ONE) > 3.0
