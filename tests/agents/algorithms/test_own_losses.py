"""A policy loss of one's own: it sees whole texts however a minibatch is cut, and every other
feature of the policy gradients works whatever its ratio is."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from by_text import assert_same, first_step, gradient, token_logprobs_by_text
from example_files import load_example
from toy_env import ToyEnv, tiny_lm

from tokenenv.agents import GRPO, PPO, RLOO, LMPolicy, PolicyGradient
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning import losses
from tokenenv.agents.learning.advantages import returns_to_go
from tokenenv.agents.learning.learner import outputs

gspo = load_example("gspo")
GSPO, GSPOToken = gspo.GSPO, gspo.GSPOToken
ONE_STEP = {"epochs": 1, "minibatches": 1, "max_grad_norm": 1e9, "whiten": False}


class Zero(PolicyGradient):
    """A loss that follows nothing."""

    def advantages(self, batch):
        return returns_to_go(self.rewards(batch), batch.response_length_B, 1.0)

    def policy_loss(self, out, batch, weights_K):
        return 0.0 * (weights_K * out.logprob).sum()


def make(algorithm=GSPO, **options):
    envs = ToyEnv(8, group_size=4, kl_coef=options.pop("beta", 0.0))
    envs.teacher = tiny_lm(seed=4, initializer_range=0.3)
    return algorithm(envs, policy=LMPolicy(tiny_lm(seed=3)), **options)


def batch_of(agent, tokens=80):
    return EpisodeBatch.stack(agent.collector.collect(tokens))


def move(agent, scale=3.0):
    """Move the policy away from the one that wrote the texts."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in agent.policy.model.parameters():
            weight.add_(scale * weight.std() * torch.randn(weight.shape, generator=generator))


def spread_advantages(batch):
    """Random advantages (B, T), which GRPO's are made to be."""
    return torch.randn(batch.mask_BT.shape, generator=torch.Generator().manual_seed(1))


def test_the_mean_over_a_text_by_hand():
    agent = make()
    batch = batch_of(agent)
    rows = np.array([4, 1, 2])
    out = outputs(agent.policy, batch, rows)
    values_BT = spread_advantages(batch)
    means_K = out.text_means(out.pick(values_BT))
    for row in rows:
        own_K = out.rows == row
        length = int(batch.response_length_B[row])
        assert int(own_K.sum()) == length
        wanted = values_BT[row, :length].mean()
        torch.testing.assert_close(means_K[own_K], wanted.expand(length))


@pytest.mark.parametrize("algorithm", [GSPO, GSPOToken])
def test_a_sequence_ratio_does_not_depend_on_how_a_minibatch_is_cut(algorithm):
    found = []
    for max_batch_tokens in (10_000, 40, 1):
        agent = make(algorithm, **ONE_STEP, max_batch_tokens=max_batch_tokens)
        batch = batch_of(agent)
        move(agent)
        found.append(first_step(agent, batch))
    assert len({int(length) for length in batch.response_length_B}) > 2
    assert 0.0 < found[0][1]["policy/clip_fraction"] < 1.0
    for grads, metrics in found[1:]:
        assert_same(grads, found[0][0])
        for name, value in found[0][1].items():
            assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def by_hand(agent, batch, advantages_BT, weights_BT, token_level):
    """The loss of GSPO and its clip fraction, text by text, by the paper's formulas."""
    cfg, loss, outside = agent.config, 0.0, 0.0
    bound = float("inf") if cfg.dual_clip is None else cfg.dual_clip
    for row, logprob_T in enumerate(token_logprobs_by_text(agent.policy, batch)):
        n = len(logprob_T)
        old_T, advantage_T = batch.learned["old_logprob"][row, :n], advantages_BT[row, :n]
        ratio = torch.exp((logprob_T - old_T).sum() / n)
        if token_level:
            ratio = ratio.detach() * torch.exp(logprob_T - logprob_T.detach())
        low, high = 1 - cfg.clip_range, 1 + (cfg.clip_high or cfg.clip_range)
        for t, advantage in enumerate(advantage_T):
            own = ratio[t] if token_level else ratio
            gain = torch.minimum(own * advantage, own.clamp(low, high) * advantage)
            if advantage < 0:
                gain = torch.maximum(gain, bound * advantage)
            share = 1.0 / (len(batch) * n)
            loss = loss - share * weights_BT[row, t] * gain
            outside += share * float(not low <= float(ratio.detach().mean()) <= high)
    return loss, outside


SETTINGS = {
    "clip": {},
    "higher": {"clip_range": 0.1, "clip_high": 0.4},
    "dual": {"dual_clip": 1.1},
    "importance": {"importance_cap": 1.5},
}


@pytest.mark.parametrize("token_level", [False, True])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_loss_of_gspo_text_by_text(settings, token_level, monkeypatch):
    agent = make(GSPOToken if token_level else GSPO, **ONE_STEP, **settings)
    batch = batch_of(agent)
    monkeypatch.setattr(type(agent), "advantages", lambda self, batch: spread_advantages(batch))
    move(agent)
    found, metrics = first_step(agent, batch)
    weights_BT = torch.ones_like(batch.logprob_BT)
    if "importance_cap" in settings:
        # Ratios are then to the policy before the update, which is still this one.
        own = torch.nn.utils.rnn.pad_sequence(
            [one.detach() for one in token_logprobs_by_text(agent.policy, batch)], batch_first=True
        )
        torch.testing.assert_close(batch.learned["old_logprob"], own, rtol=1e-4, atol=1e-5)
        weights_BT = torch.exp(own - batch.logprob_BT).clamp(max=1.5)
    loss, outside = by_hand(agent, batch, batch.learned["advantage"], weights_BT, token_level)
    assert metrics["loss/policy"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert metrics["policy/clip_fraction"] == pytest.approx(outside, abs=1e-5)
    assert (outside > 0) == ("importance_cap" not in settings)
    assert_same(found, gradient(loss, agent.policy))


def test_gspo_without_a_clip_is_reinforce_on_the_mean_log_prob_of_a_text():
    """One step, fresh texts, one reward a text: the gradient of -mean over texts of A (1/n) sum
    log pi, which GRPO's is as well."""
    grads = []
    for algorithm in (GSPO, GSPOToken, GRPO):
        agent = make(algorithm, **ONE_STEP, clip_range=None, gamma=1.0)
        batch = batch_of(agent)
        # The whole return at the last token: every token of a text has the same advantage.
        totals_B = batch.reward_BT.sum(1)
        batch.reward_BT.zero_()
        batch.reward_BT[torch.arange(len(batch)), batch.response_length_B - 1] = totals_B
        grads.append(first_step(agent, batch)[0])
        advantages_BT = batch.learned["advantage"]
        loss = sum(
            -advantages_BT[row, 0] * logprob_T.mean() / len(batch)
            for row, logprob_T in enumerate(token_logprobs_by_text(agent.policy, batch))
        )
        assert (advantages_BT[:, 0] != 0).any()
        assert_same(grads[-1], gradient(loss, agent.policy), rtol=1e-5, atol=1e-7)
    assert_same(grads[0], grads[2], rtol=1e-5, atol=1e-7)


def test_with_dense_rewards_the_tokens_of_a_text_share_its_mean_advantage():
    """Of GSPO's sequence ratio; `GSPOToken` keeps them apart, as GRPO does at ratio 1."""
    found = {}
    for algorithm in (GSPO, GSPOToken, GRPO):
        agent = make(algorithm, **ONE_STEP)
        batch = batch_of(agent)
        found[algorithm] = first_step(agent, batch)[0]
        means_B = (batch.learned["advantage"] * batch.mask_BT).sum(1) / batch.response_length_B
    assert_same(found[GSPOToken], found[GRPO], rtol=1e-3, atol=1e-6)
    loss = sum(
        -means_B[row] * logprob_T.mean() / len(batch)
        for row, logprob_T in enumerate(token_logprobs_by_text(agent.policy, batch))
    )
    assert_same(found[GSPO], gradient(loss, agent.policy))
    difference = [
        float((one - other).abs().max())
        for one, other in zip(found[GSPO], found[GRPO], strict=True)
    ]
    assert max(difference) > 1e-3


# ---------------------------------------------------------------- what does not depend on the ratio

EXTRAS = {
    "entropy": {"entropy_coef": 0.3},
    "full KL": {"full_kl_coef": 0.3},
    "k3": {"k3_coef": 0.3},
    "forward KL": {"distill_coef": 0.3},
}


class ZeroGroups(Zero):
    """The same, of texts in groups."""

    grouped = True


@functools.cache
def gradient_of(algorithm, extra=None):
    """The gradient of one step with one of EXTRAS, or with none."""
    options = {"vf_coef": 0.0} if algorithm is PPO else {}
    settings = ONE_STEP | options | EXTRAS.get(extra, {})
    agent = make(algorithm, beta=0.1, **settings, aggregation="token-mean")
    batch = batch_of(agent)
    move(agent)
    return first_step(agent, batch)[0]


@pytest.mark.parametrize("algorithm", [GSPO, PPO, RLOO])
@pytest.mark.parametrize("extra", EXTRAS)
def test_entropy_and_kl_losses_are_added_to_any_policy_loss(algorithm, extra):
    """What each adds to the gradient is the same whatever the policy loss is, and not nothing."""
    added = []
    for one in (algorithm, ZeroGroups if algorithm.grouped else Zero):
        pairs = zip(gradient_of(one, extra), gradient_of(one), strict=True)
        added.append([with_it - without for with_it, without in pairs])
    assert_same(*added, atol=1e-5)


@pytest.mark.parametrize("algorithm", [Zero, GSPO])
def test_an_update_ends_at_target_kl_whatever_the_ratio(algorithm):
    settings = {"epochs": 3, "minibatches": 2, "lr": 1e-2, "batch_tokens": 80}
    entropy = {"entropy_coef": 1.0} if algorithm is Zero else {"clip_range": None}
    for target, steps in ((None, 6), (1e-5, 2)):
        agent = make(algorithm, target_kl=target, **settings, **entropy)
        seen = []
        agent.learn(10, on_update=lambda metrics, episodes, seen=seen: seen.append(metrics))
        # The second minibatch is the first that sees a policy that has moved.
        assert seen[0]["policy/minibatches"] == steps
        assert seen[0]["policy/approx_kl"] > 0


def test_importance_weights_reach_a_loss_as_its_weights():
    seen = []

    class Own(Zero):
        def policy_loss(self, out, batch, weights_K):
            seen.append((out, weights_K))
            return losses.policy_gradient_loss(out.logprob, out.pick(batch.reward_BT), weights_K)

    agent = make(Own, **ONE_STEP, importance_cap=1.5)
    batch = batch_of(agent)
    move(agent)
    first_step(agent, batch)
    [(out, weights_K)] = seen
    wanted = out.pick(batch.learned["importance"]) / int(batch.mask_BT.sum())
    torch.testing.assert_close(weights_K, wanted)
    assert 0 < (out.pick(batch.learned["importance"]) == 1.5).float().mean() < 1


def test_a_loss_that_says_nothing_of_a_clip_has_no_clip_fraction():
    agent = make(Zero, **ONE_STEP)
    batch = batch_of(agent)
    move(agent)
    metrics = first_step(agent, batch)[1]
    assert agent.config.clip_range == 0.2
    assert "policy/clip_fraction" not in metrics


def test_what_a_loss_logs_is_a_mean_with_the_minibatchs_own_weights():
    """Not with the importance weights, which do not sum to 1."""

    class Own(Zero):
        def policy_loss(self, out, batch, weights_K):
            out.logged["policy/place"] = out.steps.float()
            return super().policy_loss(out, batch, weights_K)

    agent = make(Own, **ONE_STEP, importance_cap=1.5, max_batch_tokens=30)
    batch = batch_of(agent)
    move(agent)
    places = torch.arange(batch.mask_BT.shape[1]).expand_as(batch.mask_BT)[batch.mask_BT]
    wanted = float(places.float().mean())
    assert first_step(agent, batch)[1]["policy/place"] == pytest.approx(wanted, rel=1e-5)


def test_the_clip_fraction_is_of_the_ratio_that_is_taken():
    """A text whose tokens moved apart and whose mean did not: GRPO's tokens are clipped, GSPO's
    text is not."""
    shares = {}
    for algorithm in (GSPO, GRPO):
        agent = make(algorithm, **ONE_STEP, clip_range=0.1)
        batch = batch_of(agent)
        pairs_B = batch.response_length_B // 2 * 2
        places_T = torch.arange(batch.mask_BT.shape[1])
        shift_BT = torch.where(places_T % 2 == 0, 0.5, -0.5) * (places_T < pairs_B[:, None])
        batch.logprob_BT.add_(shift_BT)
        shares[algorithm] = first_step(agent, batch)[1]["policy/clip_fraction"]
        per_text_B = pairs_B / batch.response_length_B
    assert shares[GSPO] == 0.0
    assert shares[GRPO] == pytest.approx(float(per_text_B.mean()), rel=1e-5)


def test_gspos_settings_are_grpos_and_the_paper_is_named():
    names = {field.name for field in dataclasses.fields(gspo.GSPOConfig)}
    assert names == {field.name for field in dataclasses.fields(GRPO.config_class)}
    assert "2507.18071" in gspo.__doc__
