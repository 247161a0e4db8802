"""The audit's numbers beside the same numbers found another way: by brute force, by enumeration,
from the task's own oracle."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from tabular import STOP, World, relative_error, to_go, worlds

from tokenenv.audit import audit
from tokenenv.audit.chain import find_chain
from tokenenv.audit.enumeration import all_texts, count_texts
from tokenenv.audit.optimum import Weighted, best_of_n_weights, turn_down
from tokenenv.audit.preservation import gradient_errors, preservation
from tokenenv.audit.sampling import reference_texts
from tokenenv.audit.statistics import auc, mean, ranks, slope, spearman
from tokenenv.audit.texts import no_listener, pay
from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.envs.tasks import negation
from tokenenv.rewards.rule import Rule, TokenRule
from tokenenv.rewards.term import RewardTerm


class Each(RewardTerm):
    """Pays 1 for each token."""

    name = "each"

    def reward(self, batch):
        return torch.ones_like(batch.tokens, dtype=torch.float32)


def world_env(world: World, scorer: str = "sequence", gold="score", **options) -> TokenVectorEnv:
    """An env of the world with a gold metric."""
    made = world.env(scorer, **options)
    return TokenVectorEnv(1, task=dataclasses.replace(made._task, gold=gold), **options)


def small(**options) -> TokenVectorEnv:
    """Negation with 22 words and texts of 3: 10,648 of them."""
    task = negation.task(vocab_size=22, max_new_tokens=3, limit=2)
    return TokenVectorEnv(1, task=task, **options)


# ------------------------------------------------------------------ statistics


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    proxy = np.array([0.5, 2.0, 2.0, -1.0, 0.5, 0.5, 3.0])
    gold = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    found = []
    for rows in itertools.combinations(range(len(proxy)), n):
        best = [i for i in rows if proxy[i] == max(proxy[j] for j in rows)]
        found.append(np.mean(gold[best]))
    weights = best_of_n_weights(proxy, n)
    assert weights.sum() == pytest.approx(1.0)
    assert weights @ gold == pytest.approx(np.mean(found), rel=1e-12)


def test_ranks_correlations_and_auc_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    x, y = rng.integers(5, size=60).astype(float), rng.normal(size=60)
    assert np.allclose(ranks(np.array([3.0, 1.0, 3.0])), [2 / 3, 1 / 6, 2 / 3])
    counts = rng.integers(1, 4, size=60)
    repeated = spearman(np.repeat(x, counts), np.repeat(y, counts))
    assert spearman(x, y, counts.astype(float)) == pytest.approx(repeated, rel=1e-12)
    places = [np.array([(a > b) + (a == b) / 2 for b in v for a in v]) for v in (x, y)]
    assert spearman(x, y) == pytest.approx(np.corrcoef(*places_by_row(places))[0, 1], rel=1e-12)
    good = y > 0
    pairs = [(a > b) + (a == b) / 2 for a in x[good] for b in x[~good]]
    assert auc(x, good) == pytest.approx(np.mean(pairs), rel=1e-12)


def places_by_row(places):
    return [flat.reshape(60, 60).sum(0) for flat in places]


def test_means_and_slopes_have_the_usual_errors():
    rng = np.random.default_rng(1)
    x, y, one = rng.normal(size=50), rng.normal(size=50), np.zeros(50, dtype=int)
    value, error = mean(y, one)
    assert (value, error) == pytest.approx((y.mean(), y.std(ddof=1) / math.sqrt(50)))
    assert slope(y, x, one).value == pytest.approx(np.polyfit(x, y, 1)[0])
    prompts = np.repeat(np.arange(10), 5)
    by_prompt = y.reshape(10, 5).mean(1)
    assert mean(y, prompts).error == pytest.approx(by_prompt.std(ddof=1) / math.sqrt(10))


# --------------------------------------------------------------------- optimum


@pytest.mark.parametrize(
    "reward",
    [
        "terminal",
        "oracle",
        "delta",
        "uniform",
        TokenRule(lambda prompt, response: [0.1 * (t % 3) for t in response], on="tokens"),
        {"score": "terminal", "each": (Each(), 0.3), "shaped": ("delta", -0.4)},
    ],
    ids=["terminal", "oracle", "delta", "uniform", "rule", "mixed"],
)
def test_dynamic_programming_agrees_with_enumeration(reward):
    envs = small(reward=reward)
    chain, everything = find_chain(envs, 0, no_listener), all_texts(envs, no_listener)
    assert count_texts(envs) == len(everything.texts) == 22**3
    assert chain is not None
    for beta in (math.inf, 1.0, 0.2, 0.05):
        one, other = chain.at(beta), Weighted(everything, exact=True).at(beta)
        for name in ("kl", "proxy", "gold"):
            assert np.atleast_1d(getattr(one, name))[0] == pytest.approx(
                np.atleast_1d(getattr(other, name))[0], abs=2e-5
            ), (beta, name)
    by_proxy = everything.proxy_B[[t.tokens for t in everything.texts].index(chain.best("proxy"))]
    by_gold = everything.gold_B[[t.tokens for t in everything.texts].index(chain.best("gold"))]
    assert by_proxy == pytest.approx(everything.proxy_B.max(), abs=1e-5)
    assert by_gold == everything.gold_B.max()


def test_the_optimum_of_the_score_is_the_oracles():
    envs = small(reward="terminal")
    chain = find_chain(envs, 0, no_listener)
    assert chain.at(math.inf).gold.value == pytest.approx(envs.oracle.reference_objective())
    for beta in (0.5, 0.05):
        point = chain.at(beta)
        objective = point.gold.value - beta * point.kl
        assert objective == pytest.approx(envs.oracle.optimal_objective(beta), abs=1e-6)


def test_a_proxy_that_looks_at_the_whole_text_is_not_solved_by_states():
    def counts(prompt, response):
        return float(response.count(3) ** 2)

    assert find_chain(small(reward=Rule(counts, on="tokens")), 0, no_listener) is None
    assert find_chain(world_env(worlds()[0], reward="terminal"), 0, no_listener) is None


@pytest.mark.parametrize("world", worlds()[::2], ids=["one length", "several"])
def test_importance_weights_find_the_tilted_gold(world):
    # Gold is another number than the proxy: that of the text's first token.
    gold = Rule(lambda prompt, response: float(response[0] == 1), on="tokens")
    envs = world_env(world, gold=gold, reward="terminal")
    exact = Weighted(all_texts(envs, no_listener), exact=True)
    paid = pay(envs, reference_texts(envs, 4096, 0, no_listener))
    sampled = Weighted(paid, exact=False)
    for beta in (math.inf, 2.0, 1.0):
        one, other = exact.at(beta), sampled.at(beta)
        assert other.gold.error > 0
        assert abs(one.gold.value - other.gold.value) < 4 * other.gold.error
        assert abs(one.proxy.value - other.proxy.value) < 4 * other.proxy.error
        assert other.kl == pytest.approx(one.kl, abs=0.05)
        assert other.spearman == pytest.approx(one.spearman, abs=0.06)
    by_hand = torch.from_numpy(exact.proxy_B)
    known = all_texts(envs, no_listener).gold_B
    order = [world.texts.index(text.tokens) for text in all_texts(envs, no_listener).texts]
    base = world.probs(world.reference.logprobs)[order]
    weights = base * by_hand.exp() / (base * by_hand.exp()).sum()
    assert exact.at(1.0).gold.value == pytest.approx(float(weights.numpy() @ known), abs=1e-6)


def test_the_best_of_n_of_a_sample_is_that_of_all_texts():
    world = worlds()[0]
    envs = world_env(world, reward="terminal")
    everything = all_texts(envs, no_listener)
    base, order = np.exp(everything.log_ref_B), np.argsort(everything.proxy_B)
    at_most = base[order].cumsum()
    point = Weighted(pay(envs, reference_texts(envs, 4096, 1, no_listener)), exact=False).best_of(4)
    exact = np.diff(at_most**4, prepend=0) @ everything.proxy_B[order]
    assert abs(point.proxy.value - exact) < 4 * point.proxy.error
    assert point.kl == pytest.approx(math.log(4) - 3 / 4)


# ------------------------------------------------------------- length, promises


def test_a_constant_for_each_token_is_priced_exactly():
    found = []
    for c in (0.0, 0.25):
        reward = {"score": "terminal", "each": (Each(), c)}
        envs = world_env(worlds()[2], reward=reward)
        found.append(audit(envs, num_texts=256).price)
    without, with_c = found
    assert without.continued > 20
    for name in ("per_token", "slope", "going_on"):
        difference = getattr(with_c, name).value - getattr(without, name).value
        assert difference == pytest.approx(0.25, abs=1e-6), name
    assert with_c.gold_going_on == without.gold_going_on


def test_a_constant_for_each_token_is_found_and_the_score_alone_is_not():
    gold = Rule(lambda prompt, response: float(response[0] == 1), on="tokens")
    world = worlds()[2]
    hacked = audit(
        world_env(
            world, gold=gold, reward={"score": Rule(gold.function, on="tokens"), "each": Each()}
        ),
        num_texts=512,
    )
    plain = audit(
        world_env(world, gold=gold, reward=Rule(gold.function, on="tokens")), num_texts=512
    )
    verdicts = {v.about: v for v in hacked.verdicts}
    assert verdicts["length"].warns
    assert "length is paid: 1." in verdicts["length"].sentence
    price = hacked.price
    assert price.going_on.value - price.gold_going_on.value == pytest.approx(1.0)
    assert not {v.about: v for v in plain.verdicts}["length"].warns


@pytest.mark.parametrize("world", worlds()[1::2], ids=["one length", "several"])
def test_a_proxy_that_is_gold_has_no_warnings(world):
    for reward in ("terminal", "delta", "shaping"):
        assert audit(world_env(world, reward=reward), num_texts=512).warnings == ()


@pytest.mark.parametrize("reward", ["terminal", "delta", "shaping", "oracle"])
def test_shaping_keeps_return_and_gradient(reward):
    envs = world_env(worlds()[3], reward=reward)
    keeps = preservation(envs, *[all_texts(envs, no_listener)] * 2)
    assert (keeps.keeps_return, keeps.keeps_gradient) == (True, True)
    assert keeps.deviation < 1e-5
    assert keeps.score_gradient_error < 1e-5
    assert keeps.gold_cosine == pytest.approx(1.0)


def test_uniform_shares_keep_the_return_and_not_the_gradient():
    found = audit(world_env(worlds()[3], reward="uniform"), num_texts=64)
    keeps = found.preservation
    assert (keeps.keeps_return, keeps.keeps_gradient) == (True, False)
    assert keeps.gradient_error > 0.1
    assert any(sentence.startswith("gradient is not preserved") for sentence in found.warnings)


@pytest.mark.parametrize("reward", ["uniform", "delta", {"score": "terminal", "each": Each()}])
def test_the_gradient_is_that_of_the_enumerated_world(reward):
    world = World(5, (STOP,))
    world.policy = world.reference.logprobs  # gradients are taken at the reference
    envs = world_env(world, reward=reward, kl="none")
    own, score, _ = gradient_errors(envs, all_texts(envs, no_listener))
    rewards = torch.from_numpy(world.score(envs).token_rewards).double()
    followed = world.policy_gradient(to_go(rewards))
    total = rewards.sum(1)
    exact = world.gradient_of_mean(lambda logprob: total)
    scores = world.rewards(per_token=False).sum(1)
    assert own == pytest.approx(relative_error(followed, exact), abs=1e-5)
    of_score = world.gradient_of_mean(lambda logprob: scores)
    assert score == pytest.approx(relative_error(followed, of_score), abs=1e-5)


def test_a_factor_of_the_score_is_found():
    keeps = audit(
        world_env(worlds()[2], reward={"a": ("terminal", 0.3)}), num_texts=64
    ).preservation
    assert not keeps.keeps_return
    assert keeps.factor == pytest.approx(0.3, abs=1e-5)
    assert keeps.keeps_scaled_return


def test_gold_that_turns_down_is_said_with_the_kl_of_its_peak():
    # Two such words are best, and the proxy pays for each.
    counts = Rule(lambda prompt, response: float(response.count(1)), on="tokens")
    two = Rule(lambda prompt, response: -abs(response.count(1) - 2.0), on="tokens")
    envs = world_env(worlds()[0], gold=two, reward=counts)
    found = audit(envs, num_texts=64)
    exact = Weighted(all_texts(envs, no_listener), exact=True)
    betas = np.geomspace(0.05, 20, 400)
    peak = max((exact.at(beta) for beta in betas), key=lambda point: point.gold.value)
    turn = turn_down(found.optima)
    assert turn.peak.gold.value == pytest.approx(peak.gold.value, abs=0.05)
    assert turn.loss.value > 0.5
    (said,) = (v.sentence for v in found.verdicts if "of the optimum" in v.sentence)
    assert f"gold turns down at KL {turn.peak.kl:.1f} nats" in said
    assert turn_down(audit(world_env(worlds()[0], reward="terminal"), num_texts=64).optima) is None
