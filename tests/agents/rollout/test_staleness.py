"""How old texts are, how far off their log-probs, and the correction: by hand, and by
enumeration."""

import numpy as np
import pytest
import torch
from fakes import EOS
from gymnasium.vector import AutoresetMode
from tabular import T, V, World, relative_error, to_go, worlds
from toy_env import ToyEnv, tiny_lm

from tokenenv.agents import A2C, PPO, LMPolicy
from tokenenv.agents.episodes import Episode, EpisodeBatch
from tokenenv.agents.learning.learner import outputs, token_logprobs
from tokenenv.agents.learning.losses import clipped_policy_loss, policy_gradient_loss
from tokenenv.agents.rollout.actor import Actor
from tokenenv.agents.rollout.collector import Collector
from tokenenv.agents.rollout.staleness import importance, mismatch, staleness
from tokenenv.errors import InvalidArgument


def batch_of(versions, lengths, logprobs):
    """A batch of which nothing else is looked at."""

    def episode(version, length, logprob):
        nothing = np.zeros(length, np.float32)
        text = np.full(length, EOS)
        values = np.asarray(logprob[:length], np.float32)
        return Episode(
            text,
            text,
            values,
            nothing,
            nothing,
            0.0,
            True,
            False,
            0.0,
            0.0,
            0,
            0,
            np.zeros(length + 1),
            0,
            version=version,
        )

    return EpisodeBatch.stack(
        [episode(*one) for one in zip(versions, lengths, logprobs, strict=True)]
    )


def test_by_hand():
    batch = batch_of([4, 3, 4, 1], [2, 1, 1, 2], [[-1.0, -2.0], [-1.0], [-3.0], [-1.0, -1.0]])
    found = staleness(batch, 4)
    assert found == {
        "rollout/staleness": 1.0,
        "rollout/staleness_max": 3.0,
        "rollout/stale_texts": 2.0,
    }
    batch.learned["learner_logprob"] = torch.tensor(
        [[-1.5, -2.0], [9.0, 9.0], [-2.0, 9.0], [9.0, 9.0]]
    )
    log_ratio = torch.tensor([-0.5, 0.0, 1.0])  # of the texts that are not stale
    found = mismatch(batch, 4)
    assert found["rollout/mismatch"] == pytest.approx(0.5)
    assert found["rollout/mismatch_max"] == pytest.approx(1.0)
    assert found["rollout/mismatch_kl"] == pytest.approx(
        float((log_ratio.exp() - 1 - log_ratio).mean())
    )
    weights = importance(batch, 2.0)
    torch.testing.assert_close(weights[0], torch.tensor([-0.5, 0.0]).exp())
    assert weights[2, 0] == 2.0  # e is more than the cap
    for value in mismatch(batch, 9).values():
        assert value != value  # NaN: all are stale


@pytest.mark.parametrize("mode", AutoresetMode)
def test_the_stepping_collector_notes_what_a_text_began_with(mode):
    """Against a count of updates at each text's first token, kept here."""
    collector = Collector(ToyEnv(5, mode), Actor(LMPolicy(tiny_lm(seed=3)), seed=1))
    begun, updates, seen = {}, 0, []
    for step in range(60):
        for row in range(5):
            if mode != AutoresetMode.NEXT_STEP or not collector._resetting[row]:
                begun.setdefault((row, int(collector.finished[row])), updates)
        for episode in collector.step():
            assert episode.version == begun[episode.slot, episode.index]
            seen.append(episode)
        if step % 7 == 3:
            updates += 1
            collector.refresh()
    assert {e.version for e in seen} > {0, 1, 2}
    assert any(e.version < updates - 1 for e in seen)


def moved(agent):
    """A batch, after which the policy has moved: what the sampler knew is old."""
    batch = EpisodeBatch.stack(agent.collector.collect(80))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in agent.policy.model.parameters():
            weight.add_(3.0 * weight.std() * torch.randn(weight.shape, generator=generator))
    return batch


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_the_corrected_loss_is_weighted_and_its_ratio_is_to_the_learners_policy(algorithm):
    options = {"importance_cap": 1.5, "value_clip": None, "vf_coef": 0.0, "entropy_coef": 0.1}
    agent = algorithm(ToyEnv(5), policy=LMPolicy(tiny_lm(seed=3)), **options)
    batch = moved(agent)
    learned = {
        "advantage": torch.randn(batch.mask_BT.shape),
        "old_value": batch.reward_BT,
        "target": batch.reward_BT,
    }
    batch.learned.update(learned)
    assert agent._policy_before(batch)["rollout/importance"] != pytest.approx(1.0, abs=1e-3)
    own = token_logprobs(agent.policy, batch, 10_000)
    capped = torch.exp(own - batch.logprob_BT).clamp(max=1.5)
    assert 0 < (capped == 1.5)[batch.mask_BT].float().mean() < 1
    weights_B = torch.full((len(batch),), 1.0 / int(batch.mask_BT.sum()))
    rows = torch.arange(len(batch)).numpy()
    out = outputs(agent.policy, batch, rows)
    loss, metrics = agent.loss(batch, weights_B)(out)
    advantage, weights = (
        out.pick(batch.learned["advantage"]),
        out.pick(weights_B) * out.pick(capped),
    )
    if algorithm is PPO:
        by_hand = clipped_policy_loss(out.logprob, out.pick(own), advantage, weights, 0.2)
    else:
        by_hand = policy_gradient_loss(out.logprob, advantage, weights)
    torch.testing.assert_close(metrics["loss/policy"], by_hand.detach(), rtol=1e-4, atol=1e-6)
    assert (
        metrics["policy/approx_kl"] < 1e-6
    )  # to the policy before the update, which is still this one
    entropy = (
        out.pick(weights_B) * out.entropy
    ).sum()  # which is no estimate from texts: it needs no correction
    torch.testing.assert_close(loss, by_hand - 0.1 * entropy, rtol=1e-4, atol=1e-6)
    # At ratio 1 nothing is clipped: the gradient is that of the weighted -A log pi.
    trained = [weight for weight in agent.policy.model.parameters() if weight.requires_grad]
    plain = -(weights * advantage * out.logprob).sum() - 0.1 * entropy
    found, wanted = (torch.autograd.grad(one, trained, retain_graph=True) for one in (loss, plain))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert max(one.abs().max() for one in found) > 1e-3


def test_texts_of_the_present_policy_need_no_correction():
    losses = []
    for cap in (None, 2.0):
        agent = PPO(ToyEnv(5), policy=LMPolicy(tiny_lm(seed=3)), importance_cap=cap, vf_coef=0.0)
        batch = EpisodeBatch.stack(agent.collector.collect(80))
        agent.update(batch)
        losses.append([weight.detach().clone() for weight in agent.policy.parameters()])
        assert cap is None or batch.learned["importance"][batch.mask_BT].sub(1.0).abs().max() < 1e-5
    for one, other in zip(*losses, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_without_a_cap_the_ratio_is_to_the_sampler():
    agent = PPO(ToyEnv(5), policy=LMPolicy(tiny_lm(seed=3)), vf_coef=0.0)
    batch = moved(agent)
    learned = {
        "advantage": torch.randn(batch.mask_BT.shape),
        "old_value": batch.reward_BT,
        "target": batch.reward_BT,
    }
    batch.learned.update(learned)
    assert agent._policy_before(batch) == {}
    weights_B = torch.full((len(batch),), 1.0 / int(batch.mask_BT.sum()))
    out = outputs(agent.policy, batch, torch.arange(len(batch)).numpy())
    _, metrics = agent.loss(batch, weights_B)(out)
    by_hand = clipped_policy_loss(
        out.logprob,
        out.pick(batch.logprob_BT),
        out.pick(batch.learned["advantage"]),
        out.pick(weights_B),
        0.2,
    )
    torch.testing.assert_close(metrics["loss/policy"], by_hand.detach())
    assert metrics["policy/approx_kl"] > 1e-3


# ---------------------------------------------------------------- by enumeration

ONE_TOKEN = [World(seed, stops=tuple(range(V))) for seed in range(3)]
SEVERAL = [world for world in worlds() if world.stops]


def of_world(world):
    return f"seed{world.seed}-stops{len(world.stops)}"


def sampler(world, first=0):
    """Another policy: its logits differ from the first of so many histories on."""
    logits, generator = world.policy.clone(), torch.Generator().manual_seed(100 + world.seed)
    logits[first:] += torch.randn(logits[first:].shape, generator=generator, dtype=torch.float64)
    return logits


def expected_gradient(world, credit, mu, weigh):
    """What a learner follows on average over texts that `mu` draws: credit (B, T) of each token,
    weighed by `weigh(batch)`."""
    by_mu, by_own = world.logprob(mu), world.logprob(world.policy)
    batch = batch_of([0] * len(world.texts), world.length.tolist(), by_mu.tolist())
    batch.learned["learner_logprob"] = by_own[:, : batch.mask_BT.shape[1]].float()
    weights = torch.zeros_like(by_mu)
    weights[:, : batch.mask_BT.shape[1]] = weigh(batch).double()
    logits = world.policy.clone().requires_grad_()
    loss = policy_gradient_loss(
        world.logprob(logits), credit, by_mu.sum(1).exp()[:, None] * weights * world.mask
    )
    return -torch.autograd.grad(loss, logits)[0]


def uncorrected(batch):
    return torch.ones_like(batch.logprob_BT)


@pytest.mark.parametrize("world", ONE_TOKEN, ids=of_world)
def test_one_token_texts_of_another_sampler_give_the_on_policy_gradient(world):
    """With the weights pi / mu the expected gradient is the policy's own; without, or under a low
    cap, it is not."""
    credit, mu = to_go(world.rewards(per_token=True)), sampler(world)
    wanted = world.gradient_of_mean(lambda logprob: credit[:, 0])
    found = {
        cap: expected_gradient(world, credit, mu, lambda batch, cap=cap: importance(batch, cap))
        for cap in (1.2, 1e9)
    }
    plain = relative_error(expected_gradient(world, credit, mu, uncorrected), wanted)
    assert relative_error(found[1e9], wanted) < 1e-5
    assert plain > 0.05
    assert relative_error(found[1.2], wanted) > 1e-3


@pytest.mark.parametrize("world", SEVERAL, ids=of_world)
def test_in_longer_texts_a_tokens_own_ratio_corrects_its_own_draw(world):
    """What is left is the draw of what comes before and after: nothing where only last tokens
    differ and earn for themselves. The product of a whole text's weights would leave nothing
    anywhere."""
    last = (V ** (T - 1) - 1) // (V - 1)
    own, whole = world.rewards(per_token=True), to_go(world.rewards(per_token=True))
    mu = sampler(world, last)
    wanted = world.policy_gradient(own)
    assert (
        relative_error(
            expected_gradient(world, own, mu, lambda batch: importance(batch, 1e9)), wanted
        )
        < 1e-5
    )
    assert relative_error(expected_gradient(world, own, mu, uncorrected), wanted) > 0.02
    mu, wanted = sampler(world), world.policy_gradient(whole)

    def product(batch):
        return importance(batch, 1e9).masked_fill(~batch.mask_BT, 1.0).prod(1, keepdim=True)

    assert relative_error(expected_gradient(world, whole, mu, product), wanted) < 1e-5
    left = relative_error(
        expected_gradient(world, whole, mu, lambda batch: importance(batch, 1e9)), wanted
    )
    assert 0.05 < left < relative_error(expected_gradient(world, whole, mu, uncorrected), wanted)


def test_a_cap_must_be_positive():
    with pytest.raises(InvalidArgument, match="importance_cap=0"):
        PPO(ToyEnv(2), policy=LMPolicy(tiny_lm(seed=3)), importance_cap=0.0)
