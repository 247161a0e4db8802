"""Advantages of one's own making: `reshape` in every policy gradient, what it may read, and the
examples that use it."""

import dataclasses
import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from by_text import assert_same, emitted, first_step, gradient, text_logprobs
from by_text import token_logprobs_by_text as logprobs_by_text
from example_files import load_example
from runs import Recorder, same
from toy_env import ToyEnv, tiny_lm

import tokenenv  # noqa: F401
from tokenenv.agents import ALGORITHMS, GRPO, KLQ, PPO, LMPolicy, ReinforcePlusPlus
from tokenenv.agents.algorithms.policy_gradient import PolicyGradient
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning import learner
from tokenenv.agents.learning.advantages import RunningStd
from tokenenv.agents.rollout import text_collector
from tokenenv.errors import InvalidArgument

reshaping = load_example("reshaping")
GTPO, PositionMask = reshaping.GTPO, reshaping.PositionMask
GRADIENTS = {n: a for n, a in ALGORITHMS.items() if issubclass(a, PolicyGradient)}
ONE_STEP = {"epochs": 1, "minibatches": 1, "max_grad_norm": 1e9}
SMALL = {"vineppo": {"rollouts": 2, "segments": 2}}


def negation(algorithm, **options):
    group = {"group_size": 4} if algorithm.grouped else {}
    return gym.make_vec(
        "tokenenv/Negation-v0", num_envs=8, max_new_tokens=8, autoreset_mode="SameStep", **group
    )


def toy(algorithm, **options):
    envs = ToyEnv(8, group_size=4 if algorithm.grouped else 1)
    return algorithm(envs, policy=LMPolicy(tiny_lm(seed=3)), **options)


def batch_of(agent, tokens=80):
    return EpisodeBatch.stack(agent.collector.collect(tokens))


def move(agent):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in agent.policy.model.parameters():
            weight.add_(3.0 * weight.std() * torch.randn(weight.shape, generator=generator))


def weighted(algorithm):
    """The algorithm with advantages times the entropy, and what `reshape` was given and gave."""

    class Weighted(algorithm):
        def running_statistics(self):
            return {**super().running_statistics(), "entropies": RunningStd()}

        def reshape(self, advantages_BT, batch):
            entropy_BT = self.token_outputs(batch).entropy_BT
            self.statistics["entropies"].update(entropy_BT[batch.mask_BT])
            reshaped_BT = advantages_BT * entropy_BT / self.statistics["entropies"].std
            self.__dict__.setdefault("seen", []).append((advantages_BT, reshaped_BT, batch))
            return reshaped_BT

    return Weighted


HARDER = {"importance_cap": 2.0, "target_kl": 10.0, "max_staleness": 1, "max_batch_tokens": 60}


@pytest.mark.parametrize("settings", [{}, HARDER], ids=["plain", "importance, KL, staleness"])
@pytest.mark.parametrize("name", GRADIENTS)
def test_every_policy_gradient_learns_from_what_reshape_returns(name, settings):
    """Once an update, after whitening; the episodes show what was learned from."""
    algorithm = weighted(GRADIENTS[name])
    agent = algorithm(
        negation(algorithm), batch_tokens=60, minibatches=2, **SMALL.get(name, {}), **settings
    )
    updates = []
    agent.learn(150, on_update=lambda metrics, episodes: updates.append(episodes))
    assert len(agent.seen) == len(updates) == agent.updates
    for (given_BT, made_BT, batch), episodes in zip(agent.seen, updates, strict=True):
        mask_BT = batch.mask_BT
        assert (given_BT[~mask_BT] == 0).all()
        if agent.config.whiten:
            assert float(given_BT[mask_BT].mean()) == pytest.approx(0.0, abs=1e-5)
            assert float(given_BT[mask_BT].std(correction=0)) == pytest.approx(1.0, abs=1e-4)
        assert (made_BT != given_BT)[mask_BT].any()
        for row, episode in enumerate(episodes):
            np.testing.assert_array_equal(
                episode.advantage, made_BT[row, : len(episode.response)].numpy()
            )


def test_the_run_folder_shows_the_advantage_that_was_learned_from(tmp_path):
    algorithm = weighted(PPO)
    agent = algorithm(negation(algorithm), batch_tokens=60, run_dir=tmp_path / "run")
    agent.learn(60)
    lines = (tmp_path / "run" / "episodes.jsonl").read_text(encoding="utf-8").splitlines()
    [(_, made_BT, batch)] = agent.seen
    assert len(lines) == len(batch)
    for row, line in enumerate(lines):
        wanted = made_BT[row, : int(batch.response_length_B[row])].tolist()
        assert json.loads(line)["token_advantages"] == pytest.approx(
            wanted, rel=1e-3
        )  # four digits


@pytest.mark.parametrize("name", GRADIENTS)
def test_resuming_is_exact_with_a_reshape_that_keeps_statistics(name, tmp_path):
    class Enough(Exception):
        pass

    def run(agent, save_to=None):
        recorder = Recorder(agent, save_to)

        def on_update(metrics, episodes):
            recorder(metrics, episodes)
            if agent.updates == 4:
                raise Enough

        with pytest.raises(Enough):
            agent.learn(100_000, on_update=on_update)
        return recorder

    algorithm = weighted(GRADIENTS[name])
    settings = {"batch_tokens": 60, **SMALL.get(name, {})}
    straight = algorithm(negation(algorithm), **settings)
    whole = run(straight, tmp_path / "c")
    resumed = algorithm.load(tmp_path / "c", negation(algorithm))
    rest = run(resumed)
    np.testing.assert_equal(whole.metrics[2:], rest.metrics)
    assert same(straight.policy.state_dict(), resumed.policy.state_dict())
    assert vars(straight.statistics["entropies"]) == vars(resumed.statistics["entropies"])


# ---------------------------------------------------------------- what it may read


@pytest.mark.parametrize("settings", [{}, {"importance_cap": 2.0}, {"target_kl": 1.0}])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropies_and_log_probs_are_those_of_each_text_alone(temperature, settings):
    agent = toy(ReinforcePlusPlus, temperature=temperature, max_batch_tokens=40, **settings)
    batch = batch_of(agent)
    move(agent)
    agent.updates = 1  # so that the texts are stale
    agent._policy_before(batch)
    found = agent.token_outputs(batch)
    for row, logprobs_TV in enumerate(text_logprobs(agent.policy, batch, temperature)):
        n = len(logprobs_TV)
        chosen_T = logprobs_TV.gather(1, emitted(batch, row)[:, None])[:, 0]
        entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(1)
        torch.testing.assert_close(found.logprob_BT[row, :n], chosen_T, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.entropy_BT[row, :n], entropy_T, rtol=1e-4, atol=1e-5)
        assert (found.entropy_BT[row, n:] == 0).all()
        assert (found.logprob_BT[row, n:] == 0).all()
    assert not found.entropy_BT.requires_grad


@pytest.mark.parametrize("settings", [{}, {"importance_cap": 2.0}, {"target_kl": 1.0}])
def test_log_probs_are_the_policys_where_an_engine_has_rounded_its_own(settings):
    agent = toy(ReinforcePlusPlus, **settings)
    batch = batch_of(agent)
    expected_BT = learner.token_outputs(agent.policy, batch, agent.config.max_batch_tokens, 1.0)[0]
    batch = dataclasses.replace(batch, logprob_BT=batch.logprob_BT - 0.25 * batch.mask_BT)
    agent._policy_before(batch)
    assert torch.equal(agent.token_outputs(batch).logprob_BT, expected_BT)
    assert torch.equal(agent.token_outputs(batch).logprob_BT, expected_BT)  # as found before


def forwards(monkeypatch, agent, batch):
    """How often an update runs over the texts without a gradient."""
    counted, forward = [], learner.outputs

    def counting(*args, **options):
        counted.append(torch.is_grad_enabled())
        return forward(*args, **options)

    monkeypatch.setattr(learner, "outputs", counting)
    agent.update(batch)
    return counted.count(False)


def test_they_cost_one_forward_where_they_are_asked_for(monkeypatch):
    class Twice(ReinforcePlusPlus):
        def reshape(self, advantages_BT, batch):
            one, other = self.token_outputs(batch), self.token_outputs(batch)
            assert one.entropy_BT is other.entropy_BT
            return advantages_BT

    # An update reads some texts once more, to see how far it has moved the policy.
    for algorithm, expected in ((ReinforcePlusPlus, 1), (Twice, 2)):
        agent = toy(algorithm)
        assert forwards(monkeypatch, agent, batch_of(agent)) == expected


def test_asking_for_them_changes_nothing_that_is_learned():
    weights = []
    for asks in (False, True):

        class Own(ReinforcePlusPlus):
            def reshape(self, advantages_BT, batch, asks=asks):
                if asks:
                    self.token_outputs(batch)
                return advantages_BT

        agent = toy(Own, batch_tokens=60).learn(200)
        assert agent.updates > 1
        weights.append(agent.policy.state_dict())
    assert same(*weights)


def test_a_loss_that_asks_first_is_refused():
    """The policy has moved by then."""

    class Late(ReinforcePlusPlus):
        def policy_loss(self, out, batch, weights_K):
            self.token_outputs(batch)
            return super().policy_loss(out, batch, weights_K)

    agent = toy(Late)
    with pytest.raises(InvalidArgument, match=r"call it first in advantages\(\) or reshape\(\)"):
        agent.update(batch_of(agent))


@pytest.mark.parametrize("method", ["advantages", "reshape"])
@pytest.mark.parametrize("shape", ["(B,)", "(B, 1)"])
def test_another_shape_is_refused(method, shape):
    def wrong(self, *args):
        batch = args[-1]
        return batch.score_B if shape == "(B,)" else batch.score_B[:, None]

    agent = toy(type("Own", (ReinforcePlusPlus,), {method: wrong}))
    with pytest.raises(
        InvalidArgument, match=rf"Own\.{method} returned the shape \(\d+,.*\(B, T\)"
    ):
        agent.update(batch_of(agent))


def test_what_is_right_of_a_text_and_a_gradient_are_left_out():
    class Own(ReinforcePlusPlus):
        def reshape(self, advantages_BT, batch):
            weight = torch.ones((), requires_grad=True)
            return (advantages_BT * weight).masked_fill(~batch.mask_BT, torch.nan)

    agent, plain = toy(Own, **ONE_STEP), toy(ReinforcePlusPlus, **ONE_STEP)
    found, wanted = (first_step(one, batch_of(one))[0] for one in (agent, plain))
    assert_same(found, wanted)


def test_soft_q_learning_has_no_reshape():
    assert not hasattr(KLQ, "reshape")


# ---------------------------------------------------------------- the examples


def entropy_weights(advantages_BT, entropy_BT, lengths_B, group_size):
    """w (B, T) of GTPO, place by place and text by text."""
    weights_BT = torch.zeros_like(advantages_BT)
    for first in range(0, len(lengths_B), group_size):
        rows = range(first, first + group_size)
        for t in range(advantages_BT.shape[1]):
            live = [row for row in rows if t < lengths_B[row]]
            for sign in (1, -1):
                side = [row for row in live if sign * advantages_BT[row, t] > 0]
                values = [float(entropy_BT[row, t]) ** sign for row in side]
                for row, value in zip(side, values, strict=True):
                    weights_BT[row, t] = len(side) * value / sum(values)
    return weights_BT


def test_gtpo_text_by_text():
    agent = toy(GTPO, alpha=0.4, **ONE_STEP)
    batch = batch_of(agent)
    move(agent)
    with torch.no_grad():
        agent.policy.model.lm_head.weight.mul_(20.0)  # so that entropies differ
    found = first_step(agent, batch)[0]
    plain_BT = GRPO.advantages(agent, batch)
    entropy_BT = torch.zeros_like(plain_BT)
    for row, logprobs_TV in enumerate(text_logprobs(agent.policy, batch)):
        entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(1)
        entropy_BT[row, : len(entropy_T)] = entropy_T.detach()
    lengths_B = batch.response_length_B
    weights_BT = entropy_weights(plain_BT, entropy_BT, lengths_B, 4)
    wanted_BT = (plain_BT * (0.6 + 0.4 * weights_BT)).masked_fill(~batch.mask_BT, 0.0)
    torch.testing.assert_close(batch.learned["advantage"], wanted_BT, rtol=1e-4, atol=1e-5)
    assert weights_BT[batch.mask_BT].max() > 1.05
    assert (plain_BT < 0)[batch.mask_BT].any()
    # The paper's weights keep the sum of each place: successes and failures weigh as many as they
    # are.
    assert weights_BT.sum() == pytest.approx(int((plain_BT != 0)[batch.mask_BT].sum()), rel=1e-5)
    old = batch.learned["old_logprob"]
    loss = 0.0
    for row, logprob_T in enumerate(logprobs_by_text(agent.policy, batch)):
        n = len(logprob_T)
        ratio_T, A_T = torch.exp(logprob_T - old[row, :n]), wanted_BT[row, :n]
        gain_T = torch.minimum(ratio_T * A_T, ratio_T.clamp(0.8, 1.2) * A_T)
        loss = loss - gain_T.mean() / len(batch)
    assert_same(found, gradient(loss, agent.policy))


def test_gtpo_without_entropy_is_grpo():
    weights = [
        toy(algorithm, batch_tokens=60, **options).learn(200).policy.state_dict()
        for algorithm, options in ((GTPO, {"alpha": 0.0}), (GRPO, {}))
    ]
    assert same(*weights)


def test_a_certain_token_has_a_bounded_weight():
    """An entropy of 0 would be infinite blame in a failed text."""
    agent = toy(GTPO, alpha=1.0)
    batch = batch_of(agent)
    with torch.no_grad():
        agent.policy.model.lm_head.weight.mul_(1e4)
    agent.update(batch)
    advantages_BT = batch.learned["advantage"]
    assert agent.token_outputs(batch).entropy_BT[batch.mask_BT].min() < 1e-6
    assert torch.isfinite(advantages_BT).all()
    assert advantages_BT.abs().max() <= 4 * GRPO.advantages(agent, batch).abs().max() + 1e-4


def test_a_position_mask_follows_the_gradient_of_its_first_tokens_alone():
    settings = {**ONE_STEP, "clip_range": None, "vf_coef": 0.0, "whiten": False}
    agent = toy(PositionMask, first_tokens=3, **settings)
    batch = batch_of(agent)
    found = first_step(agent, batch)[0]
    whole = toy(PPO, **settings)
    first_step(whole, other := batch_of(whole))
    advantages_BT, count = other.learned["advantage"], int(batch.mask_BT.sum())
    loss = sum(
        -(advantages_BT[row, :3][: len(logprob_T)] * logprob_T[:3]).sum() / count
        for row, logprob_T in enumerate(logprobs_by_text(agent.policy, batch))
    )
    assert (advantages_BT[:, 3:] != 0).any()
    assert_same(found, gradient(loss, agent.policy))


def test_a_position_mask_as_long_as_the_texts_is_ppo():
    weights = [
        toy(algorithm, batch_tokens=60, **options).learn(200).policy.state_dict()
        for algorithm, options in ((PositionMask, {"first_tokens": 99}), (PPO, {}))
    ]
    assert same(*weights)


@pytest.mark.parametrize(
    ("algorithm", "settings", "message"),
    [
        (GTPO, {"alpha": 1.5}, "alpha=1.5 is not allowed; it must lie between 0 and 1"),
        (GTPO, {"min_entropy": 0.0}, "min_entropy=0.0 is not allowed; it must be above 0"),
        (PositionMask, {"first_tokens": 0}, "first_tokens=0 is not allowed; it must be at least 1"),
    ],
)
def test_their_settings_are_checked(algorithm, settings, message):
    with pytest.raises(InvalidArgument, match=message):
        toy(algorithm, **settings)
    assert dataclasses.is_dataclass(algorithm.config_class)


def test_reshape_and_a_sequence_ratio_where_an_engine_writes_the_texts(monkeypatch):
    """An engine's log-probs are not the learner's: `reshape` sees the learner's, and the ratio is
    taken to them where importance weights correct."""
    monkeypatch.setitem(text_collector.ENGINES, "vllm", "local_engine:LocalEngine")
    gspo = load_example("gspo").GSPO
    envs = gym.make_vec(
        "tokenenv/Reviews-v0", num_envs=8, max_new_tokens=6, autoreset_mode="SameStep", group_size=4
    )
    options = {"rollout": "vllm", "batch_tokens": 60, "importance_cap": 2.0, "minibatches": 2}
    agent = weighted(gspo)(envs, **options)
    collect = agent.collector.collect

    def shifted(tokens):
        episodes = collect(tokens)
        for episode in episodes:
            episode.logprob[:] -= 0.25  # what other kernels might make of them
        return episodes

    monkeypatch.setattr(agent.collector, "collect", shifted)
    seen = []
    agent.learn(60, on_update=lambda metrics, episodes: seen.append(metrics))
    for metrics, (_, _, batch) in zip(seen, agent.seen, strict=True):
        found, mask_BT = agent.token_outputs(batch), batch.mask_BT
        assert torch.equal(found.logprob_BT, batch.learned["learner_logprob"])
        assert batch.learned["old_logprob"] is batch.learned["learner_logprob"]
        difference_K = (found.logprob_BT - batch.logprob_BT)[mask_BT]
        torch.testing.assert_close(
            difference_K, torch.full_like(difference_K, 0.25), atol=1e-3, rtol=0
        )
        assert metrics["rollout/importance"] == pytest.approx(float(np.exp(0.25)), rel=1e-3)
        assert (batch.learned["advantage"] != 0)[mask_BT].any()
