"""Gymnasium's own vector wrappers above the env, with NumPy arrays and above `ArrayConversion` with
tensors."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import (
    ArrayConversion,
    ClipReward,
    DictInfoToList,
    NormalizeReward,
    RecordEpisodeStatistics,
    TransformReward,
)
from tasks import MODES, TOYS, T, assert_equal, make_vec, random_actions, row_of

from tokenenv.errors import InvalidArgument

N = 3
DISABLED, SAME_STEP = AutoresetMode.DISABLED, AutoresetMode.SAME_STEP
STOP = 1


def make(array: str, mode: Any, **options: Any) -> Any:
    envs = make_vec(N, mode, array=array, **options)
    return ArrayConversion(envs, env_xp=torch, target_xp=np) if array == "torch" else envs


@pytest.fixture(params=MODES, ids=lambda mode: mode.value)
def mode(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=["numpy", "torch"])
def array(request: pytest.FixtureRequest) -> Any:
    return request.param


def follow(envs: Any, steps: int = 12) -> list[Any]:
    """Random steps of `envs`; under DISABLED ended rows are reset at once (the statistics write to
    infos they gave out)."""
    rng, out = np.random.default_rng(0), []
    envs.reset(seed=3)
    for _ in range(steps):
        out.append(copy.deepcopy(envs.step(random_actions(rng, envs))))
        ended = out[-1][2] | out[-1][3]
        if envs.metadata["autoreset_mode"] == DISABLED and ended.any():
            envs.reset(options={"reset_mask": ended})
    return out


def test_rewards_are_clipped_transformed_and_normalised(mode: Any, array: str) -> None:
    plain = [step[1] for step in follow(make(array, mode, **TOYS["mixture"]))]
    clipped = [
        step[1] for step in follow(ClipReward(make(array, mode, **TOYS["mixture"]), -0.1, 0.2))
    ]
    np.testing.assert_allclose(clipped, np.clip(plain, -0.1, 0.2))
    doubled = [
        step[1]
        for step in follow(
            TransformReward(make(array, mode, **TOYS["mixture"]), lambda reward: 2 * reward)
        )
    ]
    np.testing.assert_allclose(doubled, 2 * np.array(plain))
    normal = [step[1] for step in follow(NormalizeReward(make(array, mode, **TOYS["mixture"])))]
    assert np.isfinite(normal).all()
    np.testing.assert_array_equal(np.sign(normal), np.sign(plain))


def test_episode_statistics_are_the_episodes(mode: Any, array: str) -> None:
    steps = follow(RecordEpisodeStatistics(make(array, mode, **TOYS["mixture"])))
    seen = 0
    for _, _, terminated, truncated, info in steps:
        for row in np.flatnonzero(terminated | truncated):
            ended = info["final_info"] if mode == SAME_STEP else info
            assert info["_episode"][row]
            np.testing.assert_allclose(
                info["episode"]["r"][row], ended["token_rewards"][row].sum(), atol=1e-5
            )
            assert info["episode"]["l"][row] == np.flatnonzero(ended["token_rewards"][row])[-1] + 1
            seen += 1
    assert seen >= N


def test_infos_as_lists(mode: Any, array: str) -> None:
    steps, lists = (
        follow(make(array, mode, **TOYS["mixture"])),
        follow(DictInfoToList(make(array, mode, **TOYS["mixture"]))),
    )
    for (*_, info), (*_, rows) in zip(steps, lists, strict=True):
        for row in range(N):
            mine = {key: value for key, value in rows[row].items() if not key.startswith("final_")}
            assert_equal(mine, row_of(info, row))
            assert ("final_info" in rows[row]) == bool(mode == SAME_STEP and "score" in rows[row])
            if "final_obs" in rows[row]:
                assert rows[row]["final_obs"]["length"] == info["final_obs"]["length"][row]


def test_a_partial_reset_restarts_the_statistics_of_its_rows_alone(array: str) -> None:
    envs = RecordEpisodeStatistics(make(array, DISABLED))
    envs.reset(seed=0)
    for _ in range(3):
        envs.step(np.full(N, 20))
    before, returns = envs.step(np.array([STOP, 20, 20]))[0], envs.episode_returns.copy()
    mask = np.array([True, False, True])
    obs, info = envs.reset(options={"reset_mask": mask})
    np.testing.assert_array_equal(envs.episode_lengths, [0, 4, 0])
    np.testing.assert_array_equal(envs.episode_returns, [0.0, returns[1], 0.0])
    np.testing.assert_array_equal(info["_prompt_id"], mask)
    np.testing.assert_array_equal(obs["tokens"][1], before["tokens"][1])
    np.testing.assert_array_equal((obs["length"] - obs["prompt_length"]), [0, 4, 0])


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_prompts_and_prefixes_go_through_array_conversion_as_ids(kind: Any) -> None:
    envs = make("torch", DISABLED)
    prompts = [kind([11, 12]), kind([13]), kind([14, 15, 16])]
    obs, _ = envs.reset(
        seed=0, options={"prompts": prompts, "prefixes": [kind([21]), None, kind([22, 23])]}
    )
    np.testing.assert_array_equal(obs["prompt_length"], [2, 1, 3])
    np.testing.assert_array_equal(obs["length"], [3, 1, 5])
    np.testing.assert_array_equal(obs["tokens"][2, :5], [14, 15, 16, 22, 23])
    assert isinstance(obs["tokens"], np.ndarray)


def test_prompts_go_through_array_conversion_as_one_array() -> None:
    envs = make("torch", DISABLED)
    obs, _ = envs.reset(seed=0, options={"prompts": np.full((N, 2), 17)})
    np.testing.assert_array_equal(obs["tokens"][:, :3], [[17, 17, 0]] * N)


def test_texts_do_not_go_through_array_conversion() -> None:
    envs = make("torch", DISABLED)
    message = (
        r"options\['prompts'\]\[0\]: a text cannot pass through ArrayConversion; give token ids"
    )
    with pytest.raises(InvalidArgument, match=message):
        envs.reset(seed=0, options={"prompts": ["the cat", "a dog", "rain"]})
    assert envs.reset(seed=0)[0]["length"].max() <= T


def test_conversion_of_policy_actions() -> None:
    envs = make("torch", SAME_STEP, kl="policy")
    plain = make_vec(N, SAME_STEP, kl="policy")
    for a, b in zip(follow(envs), follow(plain), strict=True):
        np.testing.assert_array_equal(a[1], b[1])
