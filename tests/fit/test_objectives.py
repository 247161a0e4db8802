"""The losses of `tokenenv fit`: hand-computed numbers, identities, and what a loss must not see."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tokenenv.envs.automata.oracle import AutomatonOracle
from tokenenv.errors import InvalidArgument
from tokenenv.fit import losses
from tokenenv.fit.examples import Batch
from tokenenv.fit.objectives import OBJECTIVES
from tokenenv.models.automaton import Automaton
from tokenenv.models.bigram import Bigram

LOSSES = {objective.loss.__name__: objective.loss for objective in OBJECTIVES.values()}
NAN = math.nan


def batch(
    rewards: list[list[float]],
    example: list[int],
    *,
    start: list[float] | None = None,
    **options: list,
) -> Batch:
    """A batch of texts of any lengths. Running sums begin at `start`."""
    width = max(map(len, rewards))
    reward = torch.tensor([row + [0.0] * (width - len(row)) for row in rewards])
    mask = torch.tensor([[t < len(row) for t in range(width)] for row in rewards])
    start_B = torch.tensor(start or [0.0] * len(rewards))
    tensors = {name: torch.tensor(values) for name, values in options.items()}
    return Batch(
        reward, start_B[:, None] + reward.cumsum(1), start_B, mask, torch.tensor(example), **tensors
    )


def random_batch(num_examples: int = 4, texts: int = 3, width: int = 5, seed: int = 0) -> Batch:
    """A batch with all that any loss reads. Some tokens are not own, some have no target, and one
    example has none at all."""
    rng = np.random.default_rng(seed)
    count = num_examples * texts
    mask = rng.random((count, width)) < 0.8
    mask[:, 0] = True
    reward = torch.from_numpy(rng.normal(size=(count, width)) * mask).float()
    start = torch.from_numpy(rng.normal(size=count)).float()
    target = np.where(rng.random((count, width)) < 0.3, NAN, rng.random((count, width)))
    target[:texts] = NAN
    return Batch(
        reward_BR=reward,
        running_BR=start[:, None] + reward.cumsum(1),
        start_B=start,
        mask_BR=torch.from_numpy(mask),
        example_B=torch.arange(num_examples).repeat_interleave(texts),
        score_B=torch.from_numpy(rng.random(count)).float(),
        target_BR=torch.from_numpy(target).float(),
    )


def of_example(whole: Batch, e: int) -> Batch:
    """One example of a batch, alone."""
    rows = whole.example_B == e
    assert whole.score_B is not None
    assert whole.target_BR is not None
    return Batch(
        whole.reward_BR[rows],
        whole.running_BR[rows],
        whole.start_B[rows],
        whole.mask_BR[rows],
        torch.zeros(int(rows.sum()), dtype=torch.int64),
        whole.score_B[rows],
        whole.target_BR[rows],
    )


def wider(whole: Batch, columns: int) -> Batch:
    """A batch with padding columns to the right, in which anything may stand but rewards."""

    def padded(values: Tensor, filling: float) -> Tensor:
        return torch.nn.functional.pad(values, (0, columns), value=filling)

    assert whole.target_BR is not None
    return replace(
        whole,
        reward_BR=padded(whole.reward_BR, 0.0),
        running_BR=padded(whole.running_BR, 7.0),
        mask_BR=padded(whole.mask_BR, False),
        target_BR=padded(whole.target_BR, 0.5),
    )


def check(actual: Tensor, *expected: float) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-6, atol=1e-6)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


# ------------------------------------------------------------------------- what every loss must keep


@pytest.mark.parametrize("name", LOSSES)
def test_an_example_is_worth_the_same_alone_and_among_others(name):
    whole = random_batch()
    alone = [LOSSES[name](of_example(whole, e)) for e in range(whole.num_examples)]
    torch.testing.assert_close(LOSSES[name](whole), torch.cat(alone), rtol=1e-5, atol=1e-6)
    assert LOSSES[name](whole).shape == (whole.num_examples,)


@pytest.mark.parametrize("name", LOSSES)
def test_padding_columns_are_not_seen(name):
    whole = random_batch()
    torch.testing.assert_close(LOSSES[name](wider(whole, 3)), LOSSES[name](whole))


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_is_learned_from_tokens_that_are_not_own(name):
    whole = random_batch()
    reward = whole.reward_BR.clone().requires_grad_()
    running = (whole.start_B[:, None] + whole.reward_BR.cumsum(1)).requires_grad_()
    seen = replace(whole, reward_BR=reward * whole.mask_BR, running_BR=running)
    LOSSES[name](seen).sum().backward()
    for leaf in (reward, running):
        if leaf.grad is not None:
            assert leaf.grad.isfinite().all()
            assert (leaf.grad[~whole.mask_BR] == 0).all()


@pytest.mark.parametrize("name", ["token_labels", "shares", "values", "value_labels"])
def test_an_example_without_targets_counts_nothing(name):
    whole = random_batch()
    assert whole.target_BR is not None
    assert whole.target_BR[:3].isnan().all()
    loss = LOSSES[name](whole)
    assert loss[0] == 0
    assert (loss[1:] > 0).all()


# ------------------------------------------------------------------------------------------ rankings


def test_bradley_terry_by_hand():
    two = batch([[1.0, 2.0], [0.5], [0.0], [-1.0, 0.25]], [0, 0, 1, 1])
    check(losses.bradley_terry(two), softplus(-2.5), softplus(-0.75))


def test_bradley_terry_of_a_ranking_is_the_mean_over_its_pairs():
    three = batch([[3.0], [1.0], [2.0]], [0, 0, 0])
    check(losses.bradley_terry(three), (softplus(-2) + softplus(-1) + softplus(1)) / 3)


def test_the_gradient_of_bradley_terry_is_how_wrong_it_is():
    reward = torch.tensor([[1.0, 2.0], [0.5, 0.0]], requires_grad=True)
    pair = batch([[0.0, 0.0], [0.0]], [0, 0])
    losses.bradley_terry(replace(pair, reward_BR=reward * pair.mask_BR)).sum().backward()
    wrong = 1 / (1 + math.exp(2.5))
    assert reward.grad is not None
    # Every own token of a text is pushed alike, the better text's up and the worse text's down.
    check(reward.grad[0], -wrong, -wrong)
    check(reward.grad[1], wrong, 0.0)


def test_the_mean_counts_own_tokens():
    pair = batch([[1.0, 2.0, 3.0], [0.5]], [0, 0])
    check(losses.bradley_terry_mean(pair), softplus(-1.5))


def test_the_mean_equals_the_sum_where_texts_have_one_token():
    pairs = batch([[1.0], [0.5], [-2.0], [3.0]], [0, 0, 1, 1])
    assert torch.equal(losses.bradley_terry_mean(pairs), losses.bradley_terry(pairs))


def test_list_mle_of_pairs_equals_bradley_terry():
    pairs = random_batch(texts=2)
    torch.testing.assert_close(losses.list_mle(pairs), losses.bradley_terry(pairs))


def test_list_mle_by_hand():
    three = batch([[1.0], [0.0], [2.0], [4.0]], [0, 0, 0, 1])
    first = math.log(math.e + 1 + math.exp(2)) - 1
    check(losses.list_mle(three), first + softplus(2), 0.0)


def test_list_mle_is_a_distribution_over_rankings():
    order = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
    totals = torch.tensor([0.3, -1.0, 2.0])[order].reshape(-1, 1)
    rankings = batch(totals.tolist(), torch.arange(6).repeat_interleave(3).tolist())
    check((-losses.list_mle(rankings)).exp().sum()[None], 1.0)


def test_large_sums_stay_finite():
    pair = batch([[-1e4], [1e4]], [0, 0])
    check(losses.bradley_terry(pair), 2e4)
    check(losses.list_mle(pair), 2e4)


# -------------------------------------------------------------------------------------------- scores


def test_score_losses_by_hand():
    two = batch([[1.0, 2.0], [0.5]], [0, 1], score_B=[2.0, 0.0])
    check(losses.score_at_end(two), 1.0, 0.25)
    check(losses.score_everywhere(two), (1.0 + 1.0) / 2, 0.25)
    check(losses.score_values(two), (4.0 + 1.0 + 1.0) / 3, (0.0 + 0.25) / 2)


def test_score_everywhere_reads_the_sum_of_rewards_wherever_values_begin():
    rewards, scores = [[1.0, 2.0], [0.5, -1.0]], [2.0, 0.0]
    begun = batch(rewards, [0, 1], start=[3.0, -1.0], score_B=scores)
    check(losses.score_everywhere(begun), 1.0, (0.25 + 0.25) / 2)


def test_score_values_is_score_everywhere_and_the_prompt():
    texts = random_batch(texts=1)
    assert texts.score_B is not None
    zero = replace(texts, running_BR=texts.reward_BR.cumsum(1), start_B=torch.zeros(4))
    length = texts.length_B
    expected = (texts.score_B**2 + length * losses.score_everywhere(zero)) / (1 + length)
    torch.testing.assert_close(losses.score_values(zero), expected)


@pytest.mark.parametrize("loss", [losses.score_everywhere, losses.score_values])
def test_the_best_running_sum_is_the_expected_score_of_the_text_so_far(loss):
    # Two texts with one first token and the scores 1 and 0: no value is right for both, and the
    # best is the mean.
    def at(first: float) -> Tensor:
        rewards = [[first, 1 - first], [first, -first]]
        return loss(batch(rewards, [0, 1], score_B=[1.0, 0.0])).sum()

    assert at(0.5) < min(at(0.45), at(0.55))


def test_a_score_of_several_texts_is_a_mean():
    three = batch([[1.0], [2.0], [3.0]], [0, 0, 1], score_B=[0.0, 0.0, 0.0])
    check(losses.score_at_end(three), 2.5, 9.0)


def test_outcome_by_hand():
    two = batch([[1.0, 1.0], [-1.0]], [0, 1], score_B=[1.0, 0.25])
    check(losses.outcome(two), softplus(-2), 0.25 * softplus(1) + 0.75 * softplus(-1))


# ---------------------------------------------------------------------------------- log-mean-exp, V*


def test_log_mean_exp_by_hand():
    assert losses.log_mean_exp([0.0, 1.0], 0.5) == pytest.approx(
        0.5 * math.log((1 + math.exp(2)) / 2), rel=1e-12
    )
    assert losses.log_mean_exp([3.0, 3.0], 0.1) == pytest.approx(3.0, rel=1e-12)


def test_log_mean_exp_goes_from_the_largest_score_to_the_mean():
    scores = [0.1, -3.0, 1.0, 0.4]
    assert losses.log_mean_exp(scores, 0.0) == 1.0
    assert losses.log_mean_exp(scores, 1e-6) == pytest.approx(1.0, abs=1e-5)
    assert losses.log_mean_exp(scores, 1e9) == pytest.approx(np.mean(scores), abs=1e-7)
    assert losses.log_mean_exp([1e300, 0.0], 1e-3) == 1e300


@pytest.mark.parametrize("beta", [-0.1, math.inf, NAN])
def test_log_mean_exp_refuses_other_temperatures(beta):
    with pytest.raises(InvalidArgument, match="beta="):
        losses.log_mean_exp([0.0], beta)


@pytest.mark.parametrize("beta", [0.05, 1.0])
def test_log_mean_exp_of_all_texts_is_the_optimal_value(beta):
    # A reference under which every text is as likely as any other: all of them, once each, are its
    # sample without error.
    vocab_size, length = 3, 4
    rng = np.random.default_rng(0)
    automaton = Automaton(rng.integers(0, 5, (5, vocab_size)), rng.normal(size=5))
    reference = Bigram(np.full((vocab_size + 1, vocab_size), 1 / vocab_size))
    texts = np.stack(np.meshgrid(*[range(vocab_size)] * length, indexing="ij"), -1)
    texts = texts.reshape(-1, length)
    tokens = np.concatenate([np.zeros((len(texts), 1), dtype=np.int64), texts], 1)
    scores = automaton.payoff[automaton.read(tokens, np.full(len(texts), length + 1))]
    oracle = AutomatonOracle(automaton, reference, length)
    assert losses.log_mean_exp(scores, beta) == pytest.approx(oracle.optimal_objective(beta))


# ------------------------------------------------------------------------------------ token targets


def test_labels_by_hand():
    two = batch(
        [[2.0, -1.0, 5.0], [0.0]],
        [0, 1],
        target_BR=[[1.0, 0.25, NAN], [0.5, NAN, NAN]],
    )
    first = (softplus(-2) + 0.25 * softplus(1) + 0.75 * softplus(-1)) / 2
    check(losses.token_labels(two), first, math.log(2))


def test_labels_of_an_example_are_one_mean_over_its_tokens():
    pair = batch([[1.0, 1.0, 1.0], [0.0]], [0, 0], target_BR=[[1.0] * 3, [1.0, NAN, NAN]])
    check(losses.token_labels(pair), (3 * softplus(-1) + math.log(2)) / 4)


def test_a_soft_label_is_learned_as_its_log_odds():
    reward = torch.tensor([[math.log(0.8 / 0.2)]], requires_grad=True)
    one = replace(batch([[0.0]], [0], target_BR=[[0.8]]), reward_BR=reward)
    losses.token_labels(one).sum().backward()
    assert reward.grad is not None
    check(reward.grad[0], 0.0)


def test_shares_by_hand():
    one = batch([[1.0, 2.0, 9.0]], [0], target_BR=[[0.5, 4.0, NAN]])
    check(losses.shares(one), (0.25 + 4.0) / 2)


def test_values_by_hand():
    one = batch([[1.0, 2.0, 0.0]], [0], target_BR=[[2.0, 2.0, 3.5]])
    running, share = (1 + 1 + 0.25) / 3, (1 + 4 + 2.25) / 3
    check(losses.values(one), running + 5 * share)


def test_a_share_needs_the_value_before_it():
    one = batch([[1.0, 2.0, 0.0]], [0], target_BR=[[2.0, NAN, 3.5]])
    check(losses.values(one), (1 + 0.25) / 2 + 5 * 1.0)


def test_value_labels_by_hand():
    two = batch(
        [[1.0, 2.0], [0.5, 0.5]],
        [0, 1],
        start=[1.0, 0.0],
        target_BR=[[0.0, 3.0], [NAN, 2.0]],
    )
    # The prompt is fitted to the first target that there is.
    check(losses.value_labels(two), (1 + 4 + 1) / 3, (4 + 1) / 2)


# ----------------------------------------------------------------------------------------- the table


def test_the_table_says_how_each_objective_is_used():
    designs = {"token": "token", "value": "delta", "log-ratio": "implicit"}
    assert all(each.design == designs[each.readout] for each in OBJECTIVES.values())
    assert {name for name, each in OBJECTIVES.items() if each.divides} == {"bt-mean"}
    assert OBJECTIVES["dpo"].loss is OBJECTIVES["bt-sum"].loss
    assert {name for name, each in OBJECTIVES.items() if each.standardizes} == {
        name for name in OBJECTIVES if name.startswith("score-")
    }
    assert all(len(each.summary) <= 90 for each in OBJECTIVES.values())
