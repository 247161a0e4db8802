"""The exact optimum of the automaton tasks, against all texts of small ones."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from naive_scores import SMALL, TASKS, make_task, score_of

from tokenenv.envs.automata.oracle import AutomatonOracle
from tokenenv.errors import InvalidArgument
from tokenenv.models.automaton import Automaton
from tokenenv.models.bigram import Bigram

BETAS = (0.03, 0.2, 1.0)
EVERY = [pytest.param(name, beta, id=f"{name}-{beta}") for name in TASKS for beta in BETAS]


@dataclass
class Small:
    """A task with all its texts: (V, ..., V) arrays, one axis a token."""

    name: str
    task: Any
    score: np.ndarray
    ref_logprob: np.ndarray
    """log pi_ref(text)."""

    @property
    def V(self) -> int:
        return self.task.reference.vocab_size

    @property
    def T(self) -> int:
        return self.task.max_new_tokens

    @property
    def oracle(self) -> AutomatonOracle:
        return self.task.oracle

    def prefixes(self, length: int) -> np.ndarray:
        """(V^length, length) every beginning of so many tokens."""
        return (
            np.stack(np.unravel_index(np.arange(self.V**length), (self.V,) * length), axis=1)
            if length
            else np.zeros((1, 0), int)
        )

    def sums(self, texts: np.ndarray, length: int) -> np.ndarray:
        """(V^length,) sums over all texts with each beginning."""
        return texts.reshape(self.V**length, -1).sum(1)

    def value(self, length: int, beta: float) -> np.ndarray:
        """V* of every beginning: beta log E_ref[exp(score / beta) | beginning]."""
        ref = np.exp(self.ref_logprob)
        return beta * np.log(
            self.sums(ref * np.exp(self.score / beta), length) / self.sums(ref, length)
        )

    def reference_value(self, length: int) -> np.ndarray:
        """The mean score of what the reference writes after every beginning."""
        ref = np.exp(self.ref_logprob)
        return self.sums(ref * self.score, length) / self.sums(ref, length)

    def logprob(self, policy_fn: Any) -> np.ndarray:
        """log pi of every text, one conditional after the other."""
        total = np.zeros((1, 1))
        for length in range(self.T):
            with np.errstate(divide="ignore"):
                total = total.reshape(-1, 1) + np.log(
                    policy_fn(observation(self.prefixes(length), self.T))
                )
        return total.reshape((self.V,) * self.T)

    def objective(self, policy_fn: Any, beta: float) -> tuple[float, float, float]:
        """J, E[score] and KL of any policy, by all texts."""
        logprob = self.logprob(policy_fn)
        probs = np.exp(logprob)
        kl = float((probs * np.where(probs > 0, logprob - self.ref_logprob, 0.0)).sum())
        score = float((probs * self.score).sum())
        return score - beta * kl, score, kl


@cache
def small(name: str) -> Small:
    options = SMALL[name]
    task = make_task(name, **options)
    V, T = options["vocab_size"], options["max_new_tokens"]
    texts = np.stack(np.unravel_index(np.arange(V**T), (V,) * T), axis=1)
    score = np.array([score_of(name, task, text, **options) for text in texts.tolist()])
    last = np.column_stack([np.full(len(texts), V), texts[:, :-1]])
    ref_logprob = np.log(task.reference.probs[last, texts]).sum(1)
    return Small(name, task, score.reshape((V,) * T), ref_logprob.reshape((V,) * T))


def observation(
    responses: np.ndarray, max_new_tokens: int, array: Any = np.asarray
) -> dict[str, Any]:
    """As the env observes them: after the prompt <s>, padded."""
    count, length = responses.shape
    tokens = np.zeros((count, max_new_tokens + 1), np.int64)
    tokens[:, 1 : length + 1] = responses
    counts = {"length": np.full(count, length + 1), "prompt_length": np.ones(count, np.int64)}
    return {key: array(value) for key, value in ({"tokens": tokens} | counts).items()}


def beginnings(s: Small) -> Iterator[tuple[int, dict[str, Any]]]:
    for length in range(s.T):
        yield length, observation(s.prefixes(length), s.T)


def markov_policy(s: Small, seed: int, zeros: float = 0.0) -> Any:
    """A random function of step, automaton state and last token; a share of the tokens may be ruled
    out."""
    automaton = s.oracle.automaton
    rng = np.random.default_rng(seed)
    table = rng.dirichlet(np.ones(s.V), (s.T, automaton.num_states, s.V + 1))
    table *= rng.random(table.shape) >= zeros
    table[..., 0] += 1e-3
    table /= table.sum(-1, keepdims=True)

    def policy(obs: Any) -> np.ndarray:
        step = int(obs["length"][0]) - 1
        tokens = obs["tokens"][:, 1 : step + 1]
        state = np.zeros(len(tokens), int)
        for token in tokens.T:
            state = automaton.transitions[state, token]
        return table[step, state, tokens[:, -1] if step else s.V]

    return policy


def any_policy(s: Small, seed: int) -> Any:
    """A random function of the whole text."""

    def policy(obs: Any) -> np.ndarray:
        texts = [row[:length] for row, length in zip(obs["tokens"], obs["length"], strict=True)]
        return np.stack(
            [np.random.default_rng([seed, *text]).dirichlet(np.ones(s.V)) for text in texts]
        )

    return policy


def reference_policy(s: Small) -> Any:
    def policy(obs: Any) -> np.ndarray:
        rows = np.arange(len(obs["length"])), obs["length"] - 1
        return s.task.reference.probs[np.where(obs["length"] == 1, s.V, obs["tokens"][rows])]

    return policy


# --------------------------------------------------------- against all texts


@pytest.mark.parametrize(("name", "beta"), EVERY)
def test_values_and_policy_equal_sums_over_all_texts(name, beta):
    s = small(name)
    for length, obs in beginnings(s):
        after = s.value(length + 1, beta).reshape(-1, s.V)
        np.testing.assert_allclose(s.oracle.value(obs, beta), s.value(length, beta), atol=1e-10)
        np.testing.assert_allclose(s.oracle.q(obs, beta), after, atol=1e-10)
        weights = np.exp(s.ref_logprob + s.score / beta)
        share = s.sums(weights, length + 1).reshape(-1, s.V) / s.sums(weights, length)[:, None]
        np.testing.assert_allclose(s.oracle.policy(obs, beta), share, atol=1e-10)
    finished = s.oracle.value(observation(s.prefixes(s.T), s.T), beta)
    np.testing.assert_allclose(finished, s.score.ravel(), atol=1e-12)
    assert s.oracle.optimal_objective(beta) == pytest.approx(s.value(0, beta)[0], abs=1e-10)
    assert s.oracle.reference_objective() == pytest.approx(
        (np.exp(s.ref_logprob) * s.score).sum(), abs=1e-10
    )


@pytest.mark.parametrize("name", TASKS)
def test_without_a_penalty_the_best_score_counts(name):
    s = small(name)
    for length, obs in beginnings(s):
        best = s.score.reshape(s.V**length, -1).max(1)
        np.testing.assert_array_equal(s.oracle.value(obs, 0.0), best)
        after = s.score.reshape(s.V ** (length + 1), -1).max(1).reshape(-1, s.V)
        np.testing.assert_array_equal(s.oracle.q(obs, 0.0), after)
        policy = s.oracle.policy(obs, 0.0)
        assert ((policy > 0) == (after == best[:, None])).all()
        np.testing.assert_allclose(policy.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(
        s.oracle.optimal_objective(1e-4), s.oracle.optimal_objective(0.0), atol=2e-3
    )


@pytest.mark.parametrize("name", TASKS)
def test_at_beta_infinity_the_values_are_the_references_own(name):
    s = small(name)
    for length, obs in beginnings(s):
        after = s.reference_value(length + 1).reshape(-1, s.V)
        np.testing.assert_allclose(s.oracle.value(obs, np.inf), s.reference_value(length))
        np.testing.assert_allclose(s.oracle.q(obs, np.inf), after, atol=1e-12)
        np.testing.assert_allclose(s.oracle.policy(obs, np.inf), reference_policy(s)(obs))
    with pytest.raises(InvalidArgument, match="beta=inf must be finite"):
        s.oracle.evaluate(reference_policy(s), np.inf)


@pytest.mark.parametrize(("name", "beta"), EVERY)
def test_soft_bellman_consistency(name, beta):
    s = small(name)
    reference = reference_policy(s)
    for _, obs in beginnings(s):
        ratio = np.log(s.oracle.policy(obs, beta) / reference(obs))
        expected = s.oracle.q(obs, beta) - s.oracle.value(obs, beta)[:, None]
        np.testing.assert_allclose(beta * ratio, expected, atol=1e-10)


@pytest.mark.parametrize(("name", "beta"), EVERY)
def test_every_text_of_the_optimum_earns_the_optimum(name, beta):
    s = small(name)
    log_ratio = s.logprob(lambda obs: s.oracle.policy(obs, beta)) - s.ref_logprob
    np.testing.assert_allclose(
        s.score - beta * log_ratio, s.oracle.optimal_objective(beta), atol=1e-10
    )


@pytest.mark.parametrize("name", TASKS)
def test_texts_of_full_size_earn_the_optimum_too(name):
    task, beta, rng = make_task(name, max_new_tokens=64), 0.05, np.random.default_rng(0)
    oracle, earned, texts = task.oracle, np.zeros(50), np.zeros((50, 0), int)
    for step in range(64):
        probs = oracle.policy(observation(texts, 64), beta)
        tokens = np.array([rng.choice(64, p=row) for row in probs])
        ref = task.reference.probs[texts[:, -1] if step else np.full(50, 64)]
        earned -= beta * np.log(probs[range(50), tokens] / ref[range(50), tokens])
        texts = np.column_stack([texts, tokens])
    earned += [score_of(name, task, text) for text in texts.tolist()]
    np.testing.assert_allclose(earned, oracle.optimal_objective(beta), atol=1e-10)


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize("zeros", [0.0, 0.6])
@pytest.mark.parametrize(("name", "beta"), [*EVERY, *((name, 0.0) for name in TASKS)])
def test_a_markov_policy_is_evaluated_exactly(name, beta, zeros):
    s = small(name)
    policy = markov_policy(s, seed=1, zeros=zeros)
    result = s.oracle.evaluate(policy, beta, markov=True)
    expected = s.objective(policy, beta)
    np.testing.assert_allclose((result.objective, result.score, result.kl), expected, atol=1e-10)
    assert result.error == 0.0
    assert result.regret == pytest.approx(s.oracle.optimal_objective(beta) - expected[0], abs=1e-10)
    assert result.regret > 0.01


@pytest.mark.parametrize(("name", "beta"), EVERY)
def test_the_optimum_has_no_regret_and_the_reference_its_expected_score(name, beta):
    s = small(name)
    for markov in (True, False):
        best = s.oracle.evaluate(
            lambda obs: s.oracle.policy(obs, beta), beta, markov=markov, num_texts=50
        )
        assert best.regret == pytest.approx(0.0, abs=1e-12)
        assert best.objective == pytest.approx(s.oracle.optimal_objective(beta), abs=1e-12)
        assert best.error <= 1e-12
    reference = s.oracle.evaluate(reference_policy(s), beta, markov=True)
    assert reference.kl == pytest.approx(0.0, abs=1e-12)
    assert reference.objective == pytest.approx(s.oracle.reference_objective(), abs=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("name", TASKS)
def test_any_policy_is_evaluated_by_sampling(name, beta):
    s = small(name)
    policy = any_policy(s, seed=2)
    exact, score, kl = s.objective(policy, beta)
    result = s.oracle.evaluate(policy, beta, num_texts=500, seed=3)
    assert 0 < result.error < 0.2
    assert abs(result.objective - exact) < 4 * result.error
    assert result.objective + result.regret == pytest.approx(
        s.oracle.optimal_objective(beta), abs=1e-12
    )
    assert (
        abs(result.score - score)
        < 4 * s.score.std() / 500**0.5 + 4 * (score * (1 - score) / 500 if score < 1 else 0) ** 0.5
    )
    assert result.kl == pytest.approx(kl, abs=0.2)


def test_the_standard_error_is_the_spread_between_seeds():
    s = small("Brackets")
    policy = any_policy(s, seed=4)
    results = [s.oracle.evaluate(policy, 0.1, num_texts=60, seed=seed) for seed in range(40)]
    spread = np.std([r.objective for r in results], ddof=1)
    assert 0.6 < spread / np.mean([r.error for r in results]) < 1.5
    same = s.oracle.evaluate(policy, 0.1, num_texts=60, seed=0)
    assert same == results[0]


def test_policies_may_answer_in_float32_tensors_with_gradients():
    s = small("DelayedKey")
    policy = markov_policy(s, seed=5)
    rounded = s.oracle.evaluate(
        lambda obs: torch.tensor(policy(obs), dtype=torch.float32, requires_grad=True),
        0.1,
        markov=True,
    )
    assert rounded.objective == pytest.approx(
        s.oracle.evaluate(policy, 0.1, markov=True).objective, abs=1e-5
    )


# --------------------------------------------------------- the env's own view


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("name", TASKS)
def test_state_values_are_values(name, beta):
    s = small(name)
    oracle = s.oracle
    for length in range(s.T + 1):
        obs = observation(s.prefixes(length), s.T)
        tokens = torch.from_numpy(obs["tokens"][:, : length + 1])
        models = (oracle.automaton, oracle.reference)
        states = {model: model.states(tokens, obs["length"])[:, -1] for model in models}
        value = oracle.state_value(states, torch.full((len(tokens),), length), beta)
        assert value.dtype == torch.float32
        np.testing.assert_allclose(value, oracle.value(obs, beta), rtol=1e-6, atol=1e-7)
    beyond = oracle.state_value(states, torch.full((len(tokens),), s.T + 1), beta)
    assert torch.equal(beyond, value)


@pytest.mark.parametrize("name", TASKS)
def test_observations_may_be_tensors_and_hold_texts_of_any_length(name):
    s = small(name)
    rows = [observation(s.prefixes(length)[-1:], s.T) for length in range(s.T)]
    mixed = {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}
    mixed["tokens"][
        np.arange(s.T + 1) >= mixed["length"][:, None]
    ] = -7  # what is padded with does not matter
    for method in (s.oracle.value, s.oracle.q, s.oracle.policy):
        alone = np.concatenate([method(row, 0.1) for row in rows])
        np.testing.assert_array_equal(method(mixed, 0.1), alone)
        np.testing.assert_array_equal(
            method({key: torch.from_numpy(x) for key, x in mixed.items()}, 0.1), alone
        )


def test_a_single_envs_observation_is_one_text():
    obs, _ = gym.make("tokenenv/DelayedKey-v0").reset(seed=0)
    oracle = small("DelayedKey").oracle
    assert oracle.value(
        {**obs, "tokens": obs["tokens"][: small("DelayedKey").T + 1]}, 0.1
    ).shape == (1,)


def test_observations_that_make_no_sense_are_refused():
    s = small("DelayedKey")
    for wrong in (np.zeros((3, 4)), {"tokens": np.zeros((3, 4), int)}):
        with pytest.raises(InvalidArgument, match="obs must be a token observation"):
            s.oracle.value(wrong, 0.1)
    finished = observation(s.prefixes(s.T)[:3], s.T)
    for method in (s.oracle.q, s.oracle.policy):
        with pytest.raises(InvalidArgument, match=r"finished texts \(rows \[0, 1, 2\]\)"):
            method(finished, 0.1)
    for changes in (
        {"length": np.full(3, s.T + 2)},
        {"length": np.zeros(3, int)},
        {"prompt_length": np.full(3, 2)},
    ):
        with pytest.raises(InvalidArgument, match=r"allowed: 1, and 1 to 5"):
            s.oracle.value(finished | changes, 0.1)
    with pytest.raises(InvalidArgument, match=r"token ids out of range; allowed: 0 to 5"):
        s.oracle.value(finished | {"tokens": np.full((3, s.T + 1), 6)}, 0.1)
    for beta in (-0.1, np.nan):
        with pytest.raises(InvalidArgument, match=r"beta="):
            s.oracle.value(finished, beta)


@pytest.mark.parametrize(
    "policy_fn",
    [
        lambda obs: np.ones((len(obs["length"]), 3)) / 3,
        lambda obs: np.ones((len(obs["length"]), 6)),
    ],
)
def test_policies_that_give_no_probabilities_are_refused(policy_fn):
    with pytest.raises(InvalidArgument, match=r"policy_fn gave an array"):
        small("DelayedKey").oracle.evaluate(policy_fn, 0.1)


def test_sampling_needs_two_texts_and_the_parts_must_fit():
    s = small("DelayedKey")
    with pytest.raises(InvalidArgument, match="num_texts=1"):
        s.oracle.evaluate(reference_policy(s), 0.1, num_texts=1)
    with pytest.raises(InvalidArgument, match="automaton reads 3 tokens, reference has 2"):
        AutomatonOracle(Automaton(np.zeros((1, 3)), np.zeros(1)), Bigram(np.full((3, 2), 0.5)), 4)


def test_rare_tokens_and_tiny_betas_lose_nothing():
    """With one good token of probability 1e-12, V* = beta log(1 + 1e-12 (exp(1 / beta) - 1)) by
    hand."""
    probs = np.full((3, 2), [1 - 1e-12, 1e-12])
    oracle = AutomatonOracle(
        Automaton(np.array([[0, 1], [0, 1]]), np.array([0.0, 1.0])), Bigram(probs), 1
    )
    for beta in (0.01, 0.03, 0.1):
        assert oracle.optimal_objective(beta) == pytest.approx(
            beta * np.log1p(1e-12 * np.expm1(1 / beta)), rel=1e-12, abs=1e-15
        )
    assert oracle.optimal_objective(1e-5) == pytest.approx(1 + 1e-5 * np.log(1e-12), abs=1e-15)
