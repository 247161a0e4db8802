"""Losses: hand-computed numbers, and sums that do not depend on how a minibatch is cut."""

import math

import numpy as np
import pytest
import torch
from toy_env import T, ToyEnv

from tokenenv.agents import A2C, ReinforcePlusPlus
from tokenenv.agents.config import AGGREGATIONS
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning import losses
from tokenenv.agents.learning.learner import outputs
from tokenenv.agents.learning.token_stats import token_stats
from tokenenv.errors import InvalidArgument

HALF = torch.tensor([0.5, 0.5])


def test_policy_loss_by_hand():
    # Ratios 1.5 and 0.5, clipped to 1.2 and 0.8: gains are capped, losses are not.
    logprobs, old = torch.tensor([1.5, 0.5]).log(), torch.zeros(2)
    for advantages, expected in [
        ((2.0, -2.0), 0.5 * (2.4 - 1.6)),
        ((-2.0, 2.0), 0.5 * (-3.0 + 1.0)),
    ]:
        loss = losses.clipped_policy_loss(logprobs, old, torch.tensor(advantages), HALF, 0.2)
        assert loss.item() == pytest.approx(-expected)


def test_policy_gradient_vanishes_where_clipped():
    logprobs = torch.tensor([1.5, 0.5]).log().requires_grad_()
    losses.clipped_policy_loss(
        logprobs, torch.zeros(2), torch.tensor([2.0, 2.0]), HALF, 0.2
    ).backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, -0.5 * 2.0 * 0.5]))


def test_each_side_of_the_clip_has_its_own_range():
    # Ratios 1.5, 1.25 and 0.5 within 0.8 to 1.28, then to 1.2: gains are capped there, losses are
    # not.
    logprobs, old, weights = (
        torch.tensor([1.5, 1.25, 0.5]).log(),
        torch.zeros(3),
        torch.tensor([0.5, 0.25, 0.25]),
    )
    for high, gained, lost in [
        (0.28, (1.28, 1.25, 0.5), (1.5, 1.25, 0.8)),
        (None, (1.2, 1.2, 0.5), (1.5, 1.25, 0.8)),
    ]:
        for sign, ratios in ((1.0, gained), (-1.0, lost)):
            loss = losses.clipped_policy_loss(
                logprobs, old, torch.full((3,), sign), weights, 0.2, high
            )
            assert loss.item() == pytest.approx(-sign * float(weights @ torch.tensor(ratios)))
        outside = losses.clip_fraction(logprobs, old, weights, 0.2, high).item()
        assert outside == pytest.approx(0.75 if high else 1.0)
    assert (
        losses.clip_fraction(
            torch.tensor([0.75, 0.75]).log(), torch.zeros(2), HALF, 0.2, 0.28
        ).item()
        == 1.0
    )


def test_a_dual_clip_bounds_what_a_negative_advantage_costs():
    """Ratios 5, 2, 0.5 and 5; A = -1, -1, -1 and 1. Clipped to 0.8..1.2 and bounded by 3: -3, -2,
    -0.8, 1.2."""
    logprobs, weights = (
        torch.tensor([5.0, 2.0, 0.5, 5.0]).log().requires_grad_(),
        torch.full((4,), 0.25),
    )
    advantages = torch.tensor([-1.0, -1.0, -1.0, 1.0])
    plain = losses.clipped_policy_loss(logprobs, torch.zeros(4), advantages, weights, 0.2)
    assert plain.item() == pytest.approx(0.25 * (5.0 + 2.0 + 0.8 - 1.2))
    bounded = losses.clipped_policy_loss(
        logprobs, torch.zeros(4), advantages, weights, 0.2, dual_clip=3.0
    )
    assert bounded.item() == pytest.approx(0.25 * (3.0 + 2.0 + 0.8 - 1.2))
    bounded.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, 0.25 * 2.0, 0.0, 0.0]))


@pytest.mark.parametrize("settings", [{"dual_clip": 1.5}, {"k3_coef": 0.5}])
def test_the_dual_clip_and_k3_reach_the_loss(settings):
    agent = ReinforcePlusPlus(ToyEnv(4, kl_coef=0.2), **settings)
    batch = EpisodeBatch.stack(agent.collector.collect(60))
    batch.logprob_BT.sub_(2.0)  # a ratio of 7.4
    agent._policy_before(batch)
    batch.learned["advantage"] = torch.full_like(batch.reward_BT, -1.0)
    batch.ref_logprob_BT.add_(torch.where(torch.arange(T) % 2 == 0, 0.3, 100.0))
    weights_B = torch.full((len(batch),), 1.0 / int(batch.mask_BT.sum()))
    out = outputs(agent.policy, batch, np.arange(len(batch)))
    total, metrics = agent.loss(batch, weights_B)(out)
    if "dual_clip" in settings:
        assert total.item() == pytest.approx(1.5, rel=1e-5)
        return
    even = (out.steps % 2 == 0).float().mean().item()
    by_hand = even * (math.exp(0.3) - 1 - 0.3) + (1 - even) * 10.0
    assert metrics["loss/k3"].item() == pytest.approx(by_hand, rel=1e-4)
    assert total.item() == pytest.approx(metrics["loss/policy"].item() + 0.5 * by_hand, rel=1e-4)
    plain = ReinforcePlusPlus(ToyEnv(4, kl_coef=0.2)).loss(batch, weights_B)(out)[0]
    weight = agent.policy.model.lm_head.weight
    found = (
        torch.autograd.grad(total, weight, retain_graph=True)[0]
        - torch.autograd.grad(plain, weight, retain_graph=True)[0]
    )
    near = (
        out.steps % 2 == 0
    )  # beyond the bound there is no gradient; within it, it is (1 - pi_ref / pi) of log pi's
    wanted = torch.autograd.grad(
        (0.5 * (1 - math.exp(0.3)) * weights_B[0] * out.logprob[near]).sum(), weight
    )[0]
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("name", ["clip_high", "dual_clip"])
def test_a_bound_on_a_ratio_that_is_not_taken_is_refused(name):
    with pytest.raises(
        InvalidArgument, match=f"{name}=3.0 bounds a ratio that clip_range=None does not take"
    ):
        A2C(ToyEnv(4), **{name: 3.0})


def test_plain_policy_loss_by_hand():
    logprobs = torch.tensor([0.5, 0.25]).log().requires_grad_()
    loss = losses.policy_gradient_loss(
        logprobs, torch.tensor([2.0, -3.0]), torch.tensor([0.75, 0.25])
    )
    assert loss.item() == pytest.approx(0.75 * 2.0 * math.log(2.0) - 0.25 * 3.0 * math.log(4.0))
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([-1.5, 0.75]))
    # At ratio 1 it has the gradient of the clipped one.
    again = logprobs.detach().clone().requires_grad_()
    advantages, weights = torch.tensor([2.0, -3.0]), torch.tensor([0.75, 0.25])
    losses.clipped_policy_loss(again, again.detach(), advantages, weights, 0.2).backward()
    torch.testing.assert_close(again.grad, logprobs.grad)


def test_value_loss_by_hand():
    values, old, targets = (
        torch.tensor([2.0, 0.1]),
        torch.tensor([0.0, 0.0]),
        torch.tensor([3.0, 1.0]),
    )
    # Clipped to 0.5: (0.5 - 3)^2 is the larger; 0.1 is inside.
    assert losses.clipped_value_loss(values, old, targets, HALF, 0.5).item() == pytest.approx(
        0.25 * (6.25 + 0.81)
    )
    assert losses.clipped_value_loss(values, old, targets, HALF, None).item() == pytest.approx(
        0.25 * (1.0 + 0.81)
    )


def test_aggregations_by_hand():
    lengths = torch.tensor([1, 3])
    torch.testing.assert_close(
        losses.token_weights(lengths, "token-mean"), torch.tensor([0.25, 0.25])
    )
    torch.testing.assert_close(
        losses.token_weights(lengths, "sequence-mean"), torch.tensor([0.5, 1 / 6])
    )
    for name in AGGREGATIONS:
        assert (losses.token_weights(lengths, name) * lengths).sum().item() == pytest.approx(1.0)


def test_a_fixed_length_divides_the_sum_over_tokens_by_a_constant():
    lengths, each = torch.tensor([1, 3, 2]), torch.tensor([2.0, 3, 5, 7, 11, 13])
    weights = losses.token_weights(lengths, "fixed-length").repeat_interleave(lengths)
    scale = losses.loss_scale(lengths, "fixed-length", 8)
    assert scale * float(weights @ each) == pytest.approx(float(each.sum()) / (3 * 8))
    for name in ("token-mean", "sequence-mean"):
        assert losses.loss_scale(lengths, name, 8) == 1.0


@pytest.mark.parametrize("max_batch_tokens", [12, 10_000])
def test_a_fixed_length_reaches_the_gradient(monkeypatch, max_batch_tokens):
    """The whole gradient, however a minibatch is cut, is that of the sum over tokens / (episodes *
    longest length)."""
    options = {
        "epochs": 1,
        "minibatches": 1,
        "max_grad_norm": 1e9,
        "whiten": False,
        "max_batch_tokens": max_batch_tokens,
    }
    agent = ReinforcePlusPlus(ToyEnv(4, kl_coef=0.2), aggregation="fixed-length", **options)
    batch = EpisodeBatch.stack(agent.collector.collect(80))
    grads = {}
    monkeypatch.setattr(
        agent.optimizer,
        "step",
        lambda: grads.update({n: p.grad.clone() for n, p in agent.policy.model.named_parameters()}),
    )
    agent.update(batch)
    agent.policy.zero_grad()
    total = torch.zeros(())
    for b, e in enumerate(batch.unstack()):
        text, start = torch.as_tensor(np.concatenate([e.prompt, e.response]))[None], len(e.prompt)
        logprobs = torch.log_softmax(
            agent.policy.model(input_ids=text).logits[0, start - 1 : -1], -1
        )
        chosen = logprobs.gather(1, text[0, start:, None])[:, 0]
        total = total - (batch.learned["advantage"][b, : len(e.response)] * chosen).sum()
    (total / (len(batch) * T)).backward()
    for name, parameter in agent.policy.model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=2e-6)


def test_kl_and_clip_fraction_by_hand():
    new, old = torch.tensor([0.6, 0.2]).log(), torch.tensor([0.3, 0.2]).log()
    assert losses.approx_kl(new, old, HALF).item() == pytest.approx(
        0.5 * (2.0 - 1.0 - math.log(2.0))
    )
    assert losses.clip_fraction(new, old, HALF, 0.2).item() == 0.5
    # One token of two far off, either way: 10 at most, and never infinite.
    for far in (1000.0, -1000.0, torch.inf):
        kl = losses.approx_kl(torch.tensor([far, 0.0]), torch.zeros(2), HALF).item()
        assert kl == pytest.approx(0.5 * 10.0)
    assert losses.approx_kl(
        torch.tensor([-8.0, 0.0]), torch.zeros(2), HALF
    ).item() == pytest.approx(0.5 * (math.exp(-8) + 7))


def test_explained_variance():
    targets = torch.tensor([1.0, 2.0, 3.0])
    assert losses.explained_variance(targets + 5.0, targets) == pytest.approx(1.0)
    assert losses.explained_variance(torch.zeros(3), targets) == pytest.approx(0.0)
    assert math.isnan(losses.explained_variance(targets, torch.ones(3)))


def test_token_stats_by_hand():
    # Two tokens of three: probabilities (1/2, 1/4, 1/4) at temperature 1; the reference is uniform
    # over the first two.
    logits = torch.tensor([[math.log(2.0), 0.0, 0.0], [0.0, 0.0, -torch.inf]])
    ref_logits = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -torch.inf]])
    stats = token_stats(
        logits, torch.tensor([1, 0]), lambda x: x, 3, ref_states_KH=ref_logits, ref_head=lambda x: x
    )
    torch.testing.assert_close(stats.logprob, torch.tensor([math.log(0.25), math.log(0.5)]))
    torch.testing.assert_close(stats.entropy, torch.tensor([1.5 * math.log(2.0), math.log(2.0)]))
    torch.testing.assert_close(stats.kl, torch.tensor([math.log(3.0) - 1.5 * math.log(2.0), 0.0]))
    sharp = token_stats(logits, torch.tensor([0, 0]), lambda x: x, 3, temperature=0.5)
    torch.testing.assert_close(sharp.logprob[0], torch.tensor(math.log(4 / 6)))
    assert sharp.kl.abs().sum() == 0


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_token_stats_in_chunks(chunk):
    """Values and gradients do not depend on the chunk, and an impossible token sends no NaN
    back."""
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
