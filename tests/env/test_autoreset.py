"""Each autoreset mode against Gymnasium's own vectorisation of the single env, row by row."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tasks import (
    MODES,
    assert_equal,
    copied,
    id_cases,
    in_modes,
    in_turn,
    make_vec,
    random_actions,
    row_of,
    toy_cases,
)

N, STEPS, SEED = 3, 14, 11
TOLERANCE = 1e-5
NEXT_AND_SAME, DISABLED = MODES[:2], MODES[2]
IN_MODES = [
    *in_turn(id_cases(), *MODES),
    *in_modes(toy_cases(), *NEXT_AND_SAME),
    *in_modes(toy_cases("mixture", "k1", "features", "memories", "watched"), DISABLED),
]


def make_pair(
    mode: AutoresetMode, env_id: str, options: dict[str, Any]
) -> tuple[Any, SyncVectorEnv]:
    native = make_vec(N, mode, env_id, **options)
    sync = gym.make_vec(
        env_id,
        num_envs=N,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": mode},
        **options,
    )
    return native, sync


def assert_masked(info: dict[str, Any]) -> None:
    """Every key has its mask, and zeros where the mask is False."""
    for key in [key for key in info if not key.startswith("_")]:
        mask = info[f"_{key}"]
        assert mask.dtype == np.bool_
        assert mask.shape == (N,)
        assert mask.any()
        if key == "final_obs":
            continue
        if isinstance(info[key], dict):
            assert_masked(info[key])
        else:
            assert not info[key][~mask].any()


def assert_same_info(native: dict[str, Any], sync: dict[str, Any]) -> None:
    assert_masked(native)
    assert_equal(native, sync, TOLERANCE)


def assert_same_step_info(native: dict[str, Any], sync: dict[str, Any], ended: np.ndarray) -> None:
    """The two additions: the ended rows' numbers are also at top level, and final_obs is a batched
    observation."""
    assert_masked(native)
    assert ("final_obs" in native) == ended.any()
    if ended.any():
        for key in ("_final_obs", "_final_info"):
            np.testing.assert_array_equal(native[key], ended)
        assert_same_info(native["final_info"], sync["final_info"])
    for row in range(N):
        mine, theirs = row_of(native, row), row_of(sync, row)
        if ended[row]:
            assert_equal(obs_row(native["final_obs"], row), sync["final_obs"][row], TOLERANCE)
            theirs = row_of(sync["final_info"], row) | theirs
        assert_equal(mine, theirs, TOLERANCE)


def obs_row(obs: Any, row: int) -> Any:
    return {key: value[row] for key, value in obs.items()} if isinstance(obs, dict) else obs[row]


@pytest.mark.parametrize(("env_id", "options", "mode"), IN_MODES)
def test_equals_gymnasiums_sync_vectorisation(
    env_id: str, options: dict[str, Any], mode: AutoresetMode
) -> None:
    native, sync = make_pair(mode, env_id, options)
    rng, ends = np.random.default_rng(2), 0
    (obs, info), (sync_obs, sync_info) = native.reset(seed=SEED), sync.reset(seed=SEED)
    assert_equal(obs, sync_obs, TOLERANCE)
    assert_same_info(info, sync_info)
    for step in range(STEPS):
        actions = random_actions(rng, native, stop=1.0 if step == STEPS // 2 else 0.15)
        *a, info = native.step(actions)
        *b, sync_info = sync.step(copied(actions))
        assert a[1].dtype == np.float32
        assert_equal(a[0], b[0], TOLERANCE)
        np.testing.assert_allclose(a[1], b[1], atol=TOLERANCE, rtol=TOLERANCE)
        assert_equal(a[2:], b[2:])
        ended = a[2] | a[3]
        ends += ended.sum()
        if mode == AutoresetMode.SAME_STEP:
            assert_same_step_info(info, sync_info, ended)
        else:
            assert_same_info(info, sync_info)
        if mode == AutoresetMode.DISABLED and ended.any():
            seed = SEED + step if step % 2 else None
            (obs, info), (sync_obs, sync_info) = (
                env.reset(seed=seed, options={"reset_mask": ended}) for env in (native, sync)
            )
            assert_equal(obs, sync_obs, TOLERANCE)
            assert_same_info(info, sync_info)
    assert ends >= N
