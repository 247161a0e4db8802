"""The exact credit of each token."""

import gymnasium as gym
import numpy as np
import pytest

from tokenenv.errors import InvalidArgument
from tokenenv.fit.advantages import exact_advantages
from tokenenv.fit.examples import Text
from tokenenv.fit.sample import sample

SMALL = {"vocab_size": 6, "max_new_tokens": 4, "num_keys": 3}


def made(name="tokenenv/DelayedKey-v0", **options):
    return gym.make_vec(name, num_envs=8, autoreset_mode="SameStep", **options)


def texts_of(rows):
    """The texts of rows of kind "scores"."""
    own = [np.array(row["own"], bool) if "own" in row else None for row in rows]
    return [
        Text(np.array(row["prompt_ids"]), np.array(row["response_ids"]), own=mask)
        for row, mask in zip(rows, own, strict=True)
    ]


@pytest.mark.parametrize("beta", [0.0, 0.1, 2.0])
def test_optimal_advantages_add_up_to_score_less_the_value_of_the_prompt(beta):
    envs = made(**SMALL)
    rows = sample(envs, "scores", 70)
    found = exact_advantages(envs, texts_of(rows), beta=beta)
    start = envs.unwrapped.oracle.optimal_objective(beta)
    for row, advantages in zip(rows, found, strict=True):
        assert len(advantages) == 4
        assert advantages.sum() == pytest.approx(row["score"] - start, abs=1e-9)


def test_the_beta_is_the_envs_own_and_0_without_a_kl_term():
    envs = made(**SMALL, kl_coef=0.3)
    texts = texts_of(sample(envs, "scores", 8))
    free = made(**SMALL, kl="none")
    np.testing.assert_array_equal(
        exact_advantages(envs, texts), exact_advantages(envs, texts, beta=0.3)
    )
    np.testing.assert_array_equal(
        exact_advantages(free, texts), exact_advantages(envs, texts, beta=0.0)
    )


def test_the_references_advantages_have_mean_0_under_the_reference():
    envs = made("tokenenv/PlantedPhrase-v0", vocab_size=5, max_new_tokens=4, num_decoys=3)
    pairs = [(first, then) for first in range(5) for then in range(5)]
    texts = [Text(np.array([0]), np.array(pair)) for pair in pairs]
    found = np.stack(exact_advantages(envs, texts, "reference"))[:, 1].reshape(5, 5)
    assert np.ptp(found) > 0.01
    means = (envs.unwrapped.oracle.reference.probs[:5] * found).sum(1)
    np.testing.assert_allclose(means, 0, atol=1e-12)


@pytest.mark.parametrize("name", ["tokenenv/Dialogue-v0", "tokenenv/Twenty-v0"])
def test_what_the_environment_wrote_has_no_advantage_and_its_luck_is_nobodys(name):
    envs = made(name)
    oracle = envs.unwrapped.oracle
    rows = sample(envs, "scores", 6)
    for row, text in zip(rows, texts_of(rows), strict=True):
        (advantages,) = exact_advantages(envs, [text])
        assert np.isnan(advantages).tolist() == [not own for own in row["own"]]
        for place in np.flatnonzero(row["own"]):
            tokens = np.zeros((1, envs.unwrapped.token_spec.max_length), np.int64)
            own = np.zeros(tokens.shape, np.int8)
            tokens[0, 1 : place + 1] = row["response_ids"][:place]
            own[0, 1 : place + 1] = row["own"][:place]
            one = np.ones(1, np.int64)
            obs = {"tokens": tokens, "own_mask": own, "length": one + place, "prompt_length": one}
            beta = envs.unwrapped.kl_coef
            wanted = oracle.q(obs, beta)[0, row["response_ids"][place]] - oracle.value(obs, beta)
            assert advantages[place] == pytest.approx(wanted[0], abs=1e-12)


def test_an_env_without_an_optimum_is_refused():
    envs = made("tokenenv/Arithmetic-v0")
    with pytest.raises(InvalidArgument, match=r"Arithmetic-v0 has no exact optimum"):
        exact_advantages(envs, [])
