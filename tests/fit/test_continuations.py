"""Values from the reference's continuations, against exact ones."""

import gymnasium as gym
import numpy as np
import pytest
from tasks import MODES, toy

from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.errors import InvalidArgument
from tokenenv.fit.advantages import exact_advantages, monte_carlo_advantages, states_of
from tokenenv.fit.continuations import estimate, prefix_values
from tokenenv.fit.sample import sample
from tokenenv.fit.sample_rows import text_of

SMALL = {"vocab_size": 5, "max_new_tokens": 3, "num_decoys": 3}


def sampled(envs, count, **options):
    rows = sample(envs, "scores", count, **options)
    return [text_of(row) for row in rows], [row["score"] for row in rows]


def exact(envs, texts, beta):
    """The exact values before each own token, as one row."""
    obs = states_of(texts, envs.unwrapped.token_spec.max_length)
    return envs.unwrapped.oracle.value(obs, np.inf if beta is None else beta)


def pooled(value, truth, error):
    """By how many standard errors the sum of all estimates differs from that of the truth."""
    return (value - truth).sum() / np.sqrt((error**2).sum())


@pytest.mark.parametrize(
    ("name", "options", "beta"),
    [
        ("PlantedPhrase", SMALL, None),
        ("PlantedPhrase", SMALL, 0.2),
        ("Dialogue", {"max_new_tokens": 5}, None),
    ],
)
def test_values_are_exact_ones_within_their_standard_errors(name, options, beta):
    envs = gym.make_vec(f"tokenenv/{name}-v0", 256, autoreset_mode="SameStep", **options)
    texts, scores = sampled(envs, 5)
    found = prefix_values(envs, texts, scores, continuations=256, beta=beta)
    value = np.concatenate([one.value[:-1] for one in found])
    error = np.concatenate([one.error[:-1] for one in found])
    truth, mean = exact(envs, texts, beta), exact(envs, texts, None)
    # Where hardly any continuation scores, one more or less is beyond the estimated error.
    assert (np.abs(value - truth) < 4 * np.hypot(error, 1 / 256)).all()
    assert abs(pooled(value, truth, error)) < 4
    if beta is not None:  # the mean is another number
        assert pooled(value, mean, error) > 6


def test_the_last_value_is_the_score_and_the_next_ones_are_where_they_were_asked_for():
    envs = gym.make_vec("tokenenv/Negation-v0", 8, autoreset_mode="SameStep", max_new_tokens=7)
    texts, scores = sampled(envs, 3)
    for (value, error), score in zip(
        prefix_values(envs, texts, scores, continuations=4, every=3), scores, strict=True
    ):
        assert value[-1] == score
        assert error[-1] == 0
        assert np.isnan(value).tolist() == [i not in (0, 3, 6, 7) for i in range(8)]
        assert np.isnan(error).tolist() == np.isnan(value).tolist()


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
@pytest.mark.parametrize("turns", [None, "random"])
def test_the_envs_own_texts_go_on_where_they_were(mode, turns):
    def made():
        return TokenVectorEnv(6, task=toy(turns=turns), autoreset_mode=mode, group_size=2)

    texts, scores = sampled(made(), 3)
    envs, twin = made(), made()
    for one in (envs, twin):
        one.reset(seed=7)
        one.step(np.full(6, 20))
    prefix_values(envs, texts, scores, continuations=3, by="gold")
    for step in range(3):
        actions = np.arange(20, 26) + step
        (obs, rewards, *_), (wanted, earned, *_) = envs.step(actions), twin.step(actions)
        np.testing.assert_allclose(rewards, earned, atol=1e-5)
        for key, array in wanted.items():
            np.testing.assert_array_equal(obs[key], array)


def test_the_same_seed_gives_the_same_values_and_another_one_others():
    envs = gym.make_vec("tokenenv/Arithmetic-v0", 16, autoreset_mode="SameStep")
    texts, scores = sampled(envs, 3)
    first, again, other = (
        prefix_values(envs, texts, scores, continuations=8, seed=seed) for seed in (1, 1, 2)
    )
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a.value != b.value).any() for a, b in zip(first, other, strict=True))


def test_log_mean_exp_survives_a_tiny_beta_and_nears_the_mean_at_a_large_one():
    scores = np.array([0.0, 1.0, 400.0, 2.0])
    assert estimate(scores, 0.01)[0] == pytest.approx(400 + 0.01 * np.log(1 / 4))
    assert estimate(scores, 1e7)[0] == pytest.approx(scores.mean(), rel=1e-4)
    assert estimate(scores, 1e7)[1] == pytest.approx(estimate(scores, None)[1], rel=1e-4)


def test_an_env_that_gives_no_such_score_says_so():
    envs = TokenVectorEnv(4, task=toy(gold=False), autoreset_mode="SameStep")
    texts, scores = sampled(envs, 2, by="score")
    with pytest.raises(InvalidArgument, match="by='gold': the env gives a text no gold"):
        prefix_values(envs, texts, scores, continuations=4)


def test_monte_carlo_advantages_are_the_references_within_their_errors():
    envs = gym.make_vec("tokenenv/PlantedPhrase-v0", 256, autoreset_mode="SameStep", **SMALL)
    texts, scores = sampled(envs, 8)
    found = monte_carlo_advantages(envs, texts, continuations=256)
    given = monte_carlo_advantages(envs, texts, scores=scores, continuations=256)
    np.testing.assert_array_equal(np.concatenate(found.mean), np.concatenate(given.mean))
    truth = np.concatenate(exact_advantages(envs, texts, "reference"))
    error = np.concatenate(found.error)
    assert (np.abs(np.concatenate(found.mean) - truth) < 4 * np.hypot(error, 1 / 256)).all()
    share = np.corrcoef(np.concatenate(found.mean), truth)[0, 1] ** 2
    assert found.reliability == pytest.approx(share, abs=0.1)
    assert found.reliability > 0.8


def test_what_the_environment_wrote_has_no_advantage():
    envs = gym.make_vec("tokenenv/Twenty-v0", 16, autoreset_mode="SameStep")
    texts, _ = sampled(envs, 3)
    found = monte_carlo_advantages(envs, texts, continuations=8)
    for text, mean, error in zip(texts, *found, strict=True):
        np.testing.assert_array_equal(np.isnan(mean), ~text.own_mask)
        np.testing.assert_array_equal(np.isnan(error), ~text.own_mask)
