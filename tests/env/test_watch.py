"""Watched terms: their numbers are recorded, and nothing else changes."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from memories import Drift
from tasks import TEXT_RULE, T, assert_equal, copied, make_vec, play, random_actions

from tokenenv.errors import CheckpointError, InvalidArgument, NotFinite
from tokenenv.rewards import PositionScaled, RewardTerm, Rule, Scaled, Segment, TokenRule
from tokenenv.rewards.kl import PolicyKL

SAME_STEP = AutoresetMode.SAME_STEP
WATCH = {
    "phi": "delta",
    "scaled": Scaled(Segment(1.0)),
    "drift": Drift(),
    "spread": PositionScaled("uniform"),
}
CAUSAL = {"phi", "scaled", "drift"}
REWARD = {"dense": ("token", 0.3), "shares": ("uniform", 0.7), "shaped": "delta"}


def make(num_envs: int = 4, mode: Any = SAME_STEP, **options: Any) -> Any:
    return make_vec(num_envs, mode, **{"reward": REWARD, "watch": WATCH, **options})


def without_watched(info: dict[str, Any]) -> dict[str, Any]:
    return {
        key: without_watched(value) if key == "final_info" else value
        for key, value in info.items()
        if "watched" not in key
    }


@pytest.mark.parametrize("mode", tuple(AutoresetMode))
@pytest.mark.parametrize("array", ["numpy", "torch"])
@pytest.mark.parametrize("unscored", [False, True])
def test_watching_changes_nothing_else_to_the_bit(mode: Any, array: str, unscored: bool) -> None:
    options = {"array": array, "score_truncated": not unscored, "kl_coef": 0.2}
    watching, plain = make(mode=mode, **options), make(mode=mode, watch=None, **options)
    watching.reset(seed=0)
    plain.reset(seed=0)
    rng, ends = np.random.default_rng(0), 0
    for _ in range(9):
        actions = random_actions(rng, plain)
        *mine, info = watching.step(actions)
        *theirs, plain_info = plain.step(actions)
        assert_equal(copied(dict(enumerate(mine))), copied(dict(enumerate(theirs))))
        assert_equal(copied(without_watched(info)), copied(plain_info))
        assert not any("watched" in key for key in plain_info)
        ended = copied(theirs[2]) | copied(theirs[3])
        ends += int(ended.sum())
        assert ("token_watched" in info) == ended.any()
        if mode == AutoresetMode.DISABLED and ended.any():
            for envs in (watching, plain):
                envs.reset(options={"reset_mask": ended})
    assert ends > 4


def test_infos_have_what_a_term_paid_would_have() -> None:
    """A watched term's numbers are those of the same term in the reward with weight 1."""
    paid = make(reward={**WATCH}, watch=None, kl="none")
    watched = make(kl="none")
    for mine, theirs in zip(play(watched), play(paid), strict=True):
        for now, then in zip(mine.infos, theirs.infos, strict=True):
            assert set(now["watched"]) == CAUSAL
            for name in CAUSAL:
                assert now["watched"][name] == then["reward_terms"][name]
        last, whole = mine.infos[-1]["token_watched"], theirs.infos[-1]["token_reward_terms"]
        assert set(last) == set(WATCH)
        assert_equal(last, whole)
        assert not np.allclose(last["spread"], 0)


def test_next_steps_reset_rows_have_no_numbers() -> None:
    envs = make(mode=AutoresetMode.NEXT_STEP)
    envs.reset(seed=0)
    stop = envs.token_spec.stop_token_ids[0]
    envs.step(np.array([stop, 20, 20, 20]))
    info = envs.step(np.array([20, 21, 21, 21]))[4]
    assert info["_watched"].tolist() == [False, True, True, True]
    for name in CAUSAL:
        assert info["watched"][f"_{name}"].tolist() == [False, True, True, True]
        assert info["watched"][name][0] == 0
    assert "watched" not in envs.reset()[1]


def test_scoring_gives_them_and_weighs_nothing() -> None:
    envs = make(kl="none")
    assert set(envs.unwrapped.weights) == set(REWARD)
    scores = envs.unwrapped.score_episodes([[11]], [[20, 21, 22]])
    assert set(scores.watched) == set(WATCH)
    assert set(scores.terms) == set(scores.token_reward_terms) == set(REWARD)
    np.testing.assert_allclose(sum(scores.terms.values()), scores.step_rewards, atol=1e-6)
    for name, values in scores.watched.items():
        assert (values.shape, values.dtype) == ((1, T), np.float32), name
        assert values[0, :3].any(), name
        assert not values[0, 3:].any(), name
    with pytest.raises(InvalidArgument, match="weights key='phi' is not known"):
        envs.unwrapped.score_episodes([[11]], [[20]], weights={"phi": 1.0})


def test_a_prefix_has_no_numbers_and_what_follows_has_its_own() -> None:
    envs = make(2, kl="none")
    whole = envs.unwrapped.score_episodes([[11], [12]], [[20, 21, 22, 7]] * 2).watched
    envs.reset(options={"prompts": [[11], [12]], "prefixes": [[20, 21], None]})
    envs.step(np.array([22, 20]))
    info = envs.step(np.array([7, 21]))[4]
    for name in CAUSAL:
        seen = info["token_watched"][name][0]
        np.testing.assert_allclose(seen[:4], [0, 0, *whole[name][0, 2:4]], atol=1e-5)


def test_an_unscored_cut_withholds_what_it_would_withhold_of_the_reward() -> None:
    watch = {"end": "terminal", "shares": "uniform", "phi": "delta"}
    envs = make(reward={}, watch=watch, score_truncated=False)
    cut = [e for e in play(envs) if e.truncated]
    assert cut
    for episode in cut:
        seen = episode.infos[-1]["token_watched"]
        assert not seen["end"].any()
        assert not seen["shares"].any()
        assert seen["phi"].any()


@pytest.mark.parametrize("mode", tuple(AutoresetMode))
def test_a_saved_state_and_a_fork_take_them_along(mode: Any) -> None:
    envs, other = make(mode=mode), make(mode=mode)
    envs.reset(seed=0)
    for tokens in ([20, 21, 22, 23], [24, 25, 26, 27]):
        envs.step(np.array(tokens))
    envs.unwrapped.fork([1], [3])
    other.unwrapped.load_state(envs.unwrapped.save_state())
    for tokens in ([30, 31, 32, 31], [7, 7, 33, 7]):
        mine, theirs = envs.step(np.array(tokens)), other.step(np.array(tokens))
        assert_equal(copied(dict(enumerate(mine))), copied(dict(enumerate(theirs))), 1e-5)
    info = mine[4]
    for name in WATCH:
        seen = info["token_watched"][name]
        np.testing.assert_allclose(seen[1], seen[3], atol=1e-5)
        assert seen[1].any()


def test_a_state_fits_the_same_watch_alone_and_the_identity_does_not_tell() -> None:
    envs, other = make(), make(watch={"phi": "delta"})
    envs.reset(seed=0)
    assert envs.unwrapped.identity == other.unwrapped.identity
    with pytest.raises(CheckpointError, match=r"another watch=\."):
        other.unwrapped.load_state(envs.unwrapped.save_state())


def test_what_they_learn_is_kept_and_belongs_to_the_env() -> None:
    envs = make()
    play(envs)
    learned = envs.unwrapped.save_statistics()
    assert {name.split("/")[0] for name in learned} == {"scaled", "spread"}
    assert all(values[0].sum() > 0 for values in learned.values())
    other = make()
    other.unwrapped.load_statistics(learned)
    texts = [[11]], [[20, 21]]
    mine, theirs = (env.unwrapped.score_episodes(*texts).watched for env in (envs, other))
    assert_equal(mine, theirs)
    assert (mine["scaled"] != make().unwrapped.score_episodes(*texts).watched["scaled"]).any()


class Broken(RewardTerm):
    """Numbers that are none."""

    name = "broken"

    def reward(self, batch: Any) -> torch.Tensor:
        return torch.full(batch.tokens.shape, math.nan)


def test_numbers_that_are_not_finite_stop_no_run() -> None:
    envs = make(reward="token", watch=Broken())
    episodes = play(envs)
    assert all(np.isnan(e.infos[-1]["watched"]["broken"]) for e in episodes)
    scores = envs.unwrapped.score_episodes([[11]], [[20, 21]])
    assert np.isnan(scores.watched["broken"][0, :2]).all()
    assert np.isfinite(scores.token_rewards).all()
    paying = make(reward=Broken(), watch=None)
    paying.reset(seed=0)
    with pytest.raises(NotFinite):
        paying.step(np.array([20] * 4))


@pytest.mark.parametrize(
    ("value", "number"), [(math.nan, math.nan), (-(10**400), -math.inf)], ids=["nan", "large"]
)
@pytest.mark.parametrize("wrap", [lambda term: term, Scaled])
def test_functions_that_give_no_finite_number_stop_no_run(
    value: Any, number: float, wrap: Any
) -> None:
    rules = {
        "end": Rule(lambda prompt, response: value),
        "dense": Rule(lambda prompt, response: value if len(response) > 1 else 0.0, dense=True),
        "each": TokenRule(lambda prompt, response: [value] * len(response), on="tokens"),
    }
    watch = {name: wrap(rule) for name, rule in rules.items()}
    unscored = make(reward="token", watch=watch, score_truncated=False)
    episodes = play(unscored, stop=0.1)
    assert {episode.truncated for episode in episodes} == {True, False}
    for episode in episodes:
        last, seen = len(episode.response) - 1, episode.infos[-1]["token_watched"]
        for name in ("end", "each"):  # which pay nothing where a text is not scored
            np.testing.assert_array_equal(seen[name][last], 0.0 if episode.truncated else number)
        assert last == 0 or not np.isfinite(seen["dense"]).all()
    for name, rule in rules.items():
        paying = make(reward={name: wrap(rule)}, watch=None)
        paying.reset(seed=0)
        for _ in range(T - 1 if name != "dense" else 0):
            paying.step(np.array([20] * 4))
        with pytest.raises(InvalidArgument, match="must return a finite number"):
            paying.step(np.array([20] * 4))


def test_what_is_watched_must_be_a_number() -> None:
    envs = make(watch=Rule(lambda prompt, response: None, dense=True))
    with pytest.raises(InvalidArgument, match="returned None"):
        envs.reset(seed=0)


def test_a_policy_term_is_watched_under_kl_policy_alone() -> None:
    envs = make(reward="token", watch={"ratio": PolicyKL("k1")}, kl="policy", kl_coef=0.5)
    for episode in play(envs):
        for info, logprob in zip(episode.infos, episode.logprobs, strict=True):
            expected = -(logprob - info["ref_logprob"])
            assert info["watched"]["ratio"] == pytest.approx(expected, abs=1e-5)
            assert info["reward_terms"]["kl"] == pytest.approx(0.5 * expected, abs=1e-5)
    with pytest.raises(InvalidArgument, match=r"logprobs is missing; .*ratio"):
        envs.unwrapped.score_episodes([[11]], [[20]])
    with pytest.raises(InvalidArgument, match="watched term 'ratio' reads log pi"):
        make(watch={"ratio": PolicyKL("k1")})


@pytest.mark.parametrize(
    ("watch", "message"),
    [
        ({"dense": "delta"}, "watch= has a term called 'dense', as reward= has"),
        ("uniforn", "watch='uniforn' is not known"),
        ({"kl": "delta"}, "the term name 'kl' is taken"),
        ({"a": ("delta", 0.5)}, "watch= gives a weight at 'a'; what is watched has none"),
        (5, "watch=5 must be"),
        ({"best": "oracle"}, "^watch='best' needs a task whose .*; watch= also takes a rule"),
    ],
)
def test_what_cannot_be_watched(watch: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make(watch=watch)


def test_any_design_term_or_mapping_is_taken() -> None:
    for watch, names in (
        ("delta", {"delta"}),
        (Rule(lambda prompt, response: 1.0, on="tokens"), {"rule"}),
        ({"each": TEXT_RULE}, {"each"}),
        ("progressive", {"terminal", "delta"}),
    ):
        scores = make(reward={}, watch=watch).unwrapped.score_episodes([[11]], [[20, 21]])
        assert set(scores.watched) == names


def test_what_is_watched_is_frozen_and_says_nothing_of_the_reward() -> None:
    envs = make(
        reward="token", watch={"drift": Drift(), "biased": Rule(lambda p, r: 1.0)}
    ).unwrapped
    assert "model 0 of watched term 'drift'" in envs.frozen_models
    assert envs.biased_terms == ()
    assert "potential" not in envs.reset(seed=0)[1]
