"""Watched numbers: from the env's infos into episodes and batches, and to whatever keeps those."""

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from toy_env import ToyEnv, tiny_lm

from tokenenv.agents import LMPolicy
from tokenenv.agents.episodes import EpisodeBatch, check_finite, summary
from tokenenv.agents.rollout.actor import Actor
from tokenenv.agents.rollout.collector import Collector
from tokenenv.agents.rollout.pairing import Pairing
from tokenenv.agents.rollout.replay import Replay


class Watching(ToyEnv):
    """Watches each token's place in the response and its id, and a number that no row knows."""

    with_prefix = False

    def _begin(self, rows):
        super()._begin(rows)
        for row in np.flatnonzero(rows) if self.with_prefix else ():
            self.state["tokens"][row, self.state["length"][row]] = 9
            self.state["length"][row] += 1

    def step(self, actions):
        obs, *rest, infos = super().step(actions)
        last, ended = infos.get("final_obs", obs), infos["_score"]
        place = np.arange(8)
        spots = np.minimum(last["prompt_length"][:, None] + place, last["tokens"].shape[1] - 1)
        ids = np.take_along_axis(last["tokens"], spots, 1)
        watched = {
            "coded": (100 * place + ids).astype(np.float32),
            "_coded": ended,
            "unknown": np.ones((self.num_envs, 8), np.float32),
            "_unknown": np.zeros(self.num_envs, bool),
        }
        for where in (infos, infos.get("final_info", {})):
            where.update(token_watched=watched, _token_watched=ended)
        return obs, *rest, infos


def collector_of(envs, **options):
    return Collector(envs, Actor(LMPolicy(tiny_lm(seed=3)), seed=1), seed=5, **options)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("mode", AutoresetMode)
def test_episodes_have_the_numbers_of_their_own_tokens(mode, prefix):
    """The numbers of a prefix are dropped: it belongs to the prompt of an episode."""
    envs = Watching(3, mode, kl_coef=0.1)
    envs.with_prefix = prefix
    episodes = collector_of(envs).collect(100)
    assert {len(e.response) for e in episodes} > {8 - prefix}
    for e in episodes:
        place = np.arange(len(e.response)) + prefix
        np.testing.assert_array_equal(e.watched["coded"], 100 * place + e.response)
        assert e.watched["coded"].dtype == np.float32
        assert np.isnan(e.watched["unknown"]).all()
        assert len(e.watched["unknown"]) == len(e.response)


def test_what_is_watched_is_not_earned():
    plain, watching = (
        collector_of(make(3, kl_coef=0.1)).collect(60) for make in (ToyEnv, Watching)
    )
    for one, other in zip(plain, watching, strict=True):
        np.testing.assert_array_equal(one.reward, other.reward)
        assert one.terms == other.terms == {}
    check_finite(watching, 0)  # "unknown" is NaN, and stops nothing


def test_batches_replay_and_waiting_groups_keep_them():
    episodes = collector_of(Watching(4)).collect(60)
    batch = EpisodeBatch.stack(episodes)
    coded = batch.watched["coded"]
    assert coded.shape == batch.reward_BT.shape
    assert coded[~batch.mask_BT].abs().sum() == 0
    replay, again = Replay(1000), Replay(1000)
    replay.add(episodes)
    again.load_state_dict(replay.state_dict())
    pairing, restored = Pairing(4, 2), Pairing(4, 2)
    pairing.waiting = {2 * n: e for n, e in enumerate(episodes)}
    restored.load_state_dict(pairing.state_dict())
    for kept in (batch.unstack(), list(again.episodes), list(restored.waiting.values())):
        for before, after in zip(episodes, kept, strict=True):
            assert list(after.watched) == ["coded", "unknown"]
            np.testing.assert_array_equal(before.watched["coded"], after.watched["coded"])
            assert np.isnan(after.watched["unknown"]).all()


def test_episodes_that_watch_other_numbers_stack():
    """A replay may hold texts from before a number was watched."""
    old, new = collector_of(ToyEnv(2)).collect(20), collector_of(Watching(2)).collect(20)
    for before, after in zip([*old, *new], EpisodeBatch.stack([*old, *new]).unstack(), strict=True):
        known = before.watched.get("coded", np.full(len(before.response), np.nan))
        np.testing.assert_array_equal(after.watched["coded"], known)


def test_the_mean_is_over_tokens_that_have_a_finite_number():
    episodes = collector_of(Watching(3)).collect(60)
    rows = [e.watched["coded"] for e in episodes]
    rows[0][0] = np.inf
    rows[1][0] = np.nan
    known = [value for row in rows for value in row.tolist() if np.isfinite(value)]
    assert len(known) == sum(map(len, rows)) - 2
    figures = summary(episodes)
    assert figures["watch/coded"] == pytest.approx(np.mean(known))
    assert np.isnan(figures["watch/unknown"])


def test_torch_arrays_do_too():
    class Torch(Watching):
        def _torch(self, value):
            if isinstance(value, dict):
                return {key: self._torch(item) for key, item in value.items()}
            return torch.as_tensor(value) if isinstance(value, np.ndarray) else value

        def reset(self, **options):
            return self._torch(super().reset(**options)[0]), {}

        def step(self, actions):
            return tuple(self._torch(value) for value in super().step(actions.numpy()))

    for e in collector_of(Torch(3)).collect(40):
        coded = 100 * np.arange(len(e.response)) + e.response
        np.testing.assert_array_equal(e.watched["coded"], coded)
