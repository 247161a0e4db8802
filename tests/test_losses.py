"""Losses: hand-computed numbers, and sums that do not depend on how a minibatch is cut."""

import math

import pytest
import torch

from tokenenv.agents import losses
from tokenenv.agents.token_stats import token_stats

HALF = torch.tensor([0.5, 0.5])


def test_policy_loss_by_hand():
    # Ratios 1.5 and 0.5, clipped to 1.2 and 0.8: gains are capped, losses are not.
    logprobs, old = torch.tensor([1.5, 0.5]).log(), torch.zeros(2)
    for advantages, expected in [((2.0, -2.0), 0.5 * (2.4 - 1.6)), ((-2.0, 2.0), 0.5 * (-3.0 + 1.0))]:
        loss = losses.clipped_policy_loss(logprobs, old, torch.tensor(advantages), HALF, 0.2)
        assert loss.item() == pytest.approx(-expected)


def test_policy_gradient_vanishes_where_clipped():
    logprobs = torch.tensor([1.5, 0.5]).log().requires_grad_()
    losses.clipped_policy_loss(logprobs, torch.zeros(2), torch.tensor([2.0, 2.0]), HALF, 0.2).backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, -0.5 * 2.0 * 0.5]))


def test_value_loss_by_hand():
    values, old, targets = torch.tensor([2.0, 0.1]), torch.tensor([0.0, 0.0]), torch.tensor([3.0, 1.0])
    # Clipped to 0.5: (0.5 - 3)^2 is the larger; 0.1 is inside.
    assert losses.clipped_value_loss(values, old, targets, HALF, 0.5).item() == pytest.approx(0.25 * (6.25 + 0.81))
    assert losses.clipped_value_loss(values, old, targets, HALF, None).item() == pytest.approx(0.25 * (1.0 + 0.81))


def test_aggregations_by_hand():
    lengths = torch.tensor([1, 3])
    torch.testing.assert_close(losses.token_weights(lengths, "token-mean"), torch.tensor([0.25, 0.25]))
    torch.testing.assert_close(losses.token_weights(lengths, "sequence-mean"), torch.tensor([0.5, 1 / 6]))
    for name in losses.AGGREGATIONS:
        assert (losses.token_weights(lengths, name) * lengths).sum().item() == pytest.approx(1.0)


def test_kl_and_clip_fraction_by_hand():
    new, old = torch.tensor([0.6, 0.2]).log(), torch.tensor([0.3, 0.2]).log()
    assert losses.approx_kl(new, old, HALF).item() == pytest.approx(0.5 * (2.0 - 1.0 - math.log(2.0)))
    assert losses.clip_fraction(new, old, HALF, 0.2).item() == 0.5


def test_explained_variance():
    targets = torch.tensor([1.0, 2.0, 3.0])
    assert losses.explained_variance(targets + 5.0, targets) == pytest.approx(1.0)
    assert losses.explained_variance(torch.zeros(3), targets) == pytest.approx(0.0)
    assert math.isnan(losses.explained_variance(targets, torch.ones(3)))


def test_token_stats_by_hand():
    # Two tokens of three: probabilities (1/2, 1/4, 1/4) at temperature 1; the reference is uniform over the first two.
    logits = torch.tensor([[math.log(2.0), 0.0, 0.0], [0.0, 0.0, -torch.inf]])
    ref_logits = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -torch.inf]])
    stats = token_stats(logits, torch.tensor([1, 0]), lambda x: x, 3, ref_states_KH=ref_logits, ref_head=lambda x: x)
    torch.testing.assert_close(stats.logprob, torch.tensor([math.log(0.25), math.log(0.5)]))
    torch.testing.assert_close(stats.entropy, torch.tensor([1.5 * math.log(2.0), math.log(2.0)]))
    torch.testing.assert_close(stats.kl, torch.tensor([math.log(3.0) - 1.5 * math.log(2.0), 0.0]))
    sharp = token_stats(logits, torch.tensor([0, 0]), lambda x: x, 3, temperature=0.5)
    torch.testing.assert_close(sharp.logprob[0], torch.tensor(math.log(4 / 6)))
    assert sharp.kl.abs().sum() == 0


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_token_stats_in_chunks(chunk):
    """Values and gradients do not depend on the chunk, and an impossible token sends no NaN back."""
    torch.manual_seed(0)
    states, weight = torch.randn(7, 4), torch.randn(5, 4)
    tokens = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    grads = []
    for elements in (10**6, chunk * 5):
        s, w = states.clone().requires_grad_(), weight.clone().requires_grad_()

        def head(x, w=w):
            return torch.cat([x @ w[:4].T, torch.full((len(x), 1), -torch.inf)], -1)

        ref = {"ref_states_KH": states, "ref_head": lambda x: x @ weight.T}
        stats = token_stats(s, tokens, head, 5, temperature=0.7, **ref, chunk_elements=elements)
        (stats.logprob + 2 * stats.entropy + 3 * stats.kl).sum().backward()
        grads.append((torch.stack([stats.logprob, stats.entropy, stats.kl]), s.grad, w.grad))
    for a, b in zip(*grads, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b)
