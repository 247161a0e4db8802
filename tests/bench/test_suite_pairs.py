"""The published methods of benchmarks/suite where the environment writes into texts, under action
masks, on texts of an earlier policy, and where texts are cut without a score."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from by_text import assert_same, first_step, gradient
from runs import same
from suite_methods import (
    METHODS,
    G,
    GroupCredit,
    V,
    algorithms,
    all_of_them,
    by_text,
    few,
    learned_from,
    make,
    move,
    texts,
)

from tokenenv.agents import GRPO
from tokenenv.agents.algorithms.grpo import paid, total
from tokenenv.agents.episodes import EpisodeBatch

each_method = pytest.mark.parametrize("name", METHODS)
pytestmark = pytest.mark.filterwarnings("ignore:reward-to-go on", "ignore:update . moved")
ENDS = {"score_truncated": False, "reward": {"end": "terminal", "task": "turn"}}
PAIRS = {
    "turns": {},
    "masks": {"allowed": few, "turns": None},
    "all": {"allowed": few, **ENDS},
    "unmasked": ENDS,
    "all allowed": {"allowed": all_of_them, **ENDS},
}
each_pair = pytest.mark.parametrize("pair", ["turns", "masks", "all"])


@cache
def drawn(pair):
    """Texts, and the weights of the policy that has drawn them."""
    agent = move(GroupCredit(make(**PAIRS[pair])))
    return agent.collector.collect(80), agent.policy.state_dict()


def stale(algorithm, pair, **settings):
    """An agent, and a batch of texts that an earlier policy has drawn in such an env."""
    agent = algorithm(make(**PAIRS[pair]), **settings)
    episodes, weights = drawn(pair)
    agent.policy.load_state_dict(weights)
    agent.collector.reset()
    agent.updates = 2
    return move(agent, 0.3, seed=1), EpisodeBatch.stack(episodes)


def method(name, pair, **settings):
    """As `stale`, of a method of the suite."""
    algorithm, own = METHODS[name]
    return stale(algorithm, pair, **own | settings)


def credited(agent, batch):
    """What each of the policy's tokens is learned from with, (B, T)."""
    found_BT = agent.advantages(batch).masked_fill(~batch.mask_BT, 0.0)
    return agent.reshape(found_BT, batch) * batch.mask_BT


def earned(agent, batch):
    return total(paid(agent.returns(batch)))


def added(agent, batch):
    """What a method adds to GRPO's advantages, (B, T)."""
    returns_BT = earned(agent, batch)
    return agent.credit(returns_BT, batch) - GroupCredit.credit(agent, returns_BT, batch)


def padded(rows, batch):
    """(B, T) of one row of numbers a text."""
    found = torch.zeros_like(batch.reward_BT)
    for row, values in zip(found, rows, strict=True):
        row[: len(values)] = torch.as_tensor(values).detach()
    return found


def plain(batch):
    """The same tokens of the policy's, with all that is paid for them and known of them, in texts
    that nobody else writes into."""
    nobody = {"position": None, "written": np.zeros(0, np.int64), "action_mask": None}
    found = EpisodeBatch.stack([replace(e, **nobody) for e in batch.unstack()])
    found.learned.update(batch.learned)
    return found


# ---------------------------------------------------------------- each formula


@each_pair
@pytest.mark.parametrize("name", ["gtpo", "ktae", "hicra", "carl", "spro", "place-scaled"])
def test_the_formula_is_that_of_the_policys_own_tokens_under_its_mask(name, pair):
    """What is written counts nowhere: not as a place, not as a token, not in a mean. Entropies are
    of the present policy over the allowed tokens."""
    agent, batch = method(name, pair)
    gaps = batch.position_BT1.diff(dim=1)[:, :-1][batch.mask_BT[:, 1:]]
    assert (gaps > 1).any() == (pair != "masks")
    read = zip(*by_text(agent.policy, batch), strict=True)
    for found_BT, rows in zip(agent.token_outputs(batch), read, strict=True):
        torch.testing.assert_close(found_BT, padded(rows, batch), rtol=1e-4, atol=1e-4)
    found_BT = credited(agent, batch)
    assert torch.equal(found_BT, credited(agent, plain(batch)))
    grpo_BT = GRPO(agent.envs).advantages(batch) * batch.mask_BT
    assert name == "place-scaled" or (found_BT - grpo_BT).abs().max() > 0.05


def test_process_rewards_go_by_what_tokens_were_drawn_with():
    """Not by the present policy, which a stale text was not drawn from."""
    agent, batch = method("spro", "all")
    log_ratio_BT = (batch.logprob_BT - batch.ref_logprob_BT) * batch.mask_BT
    step_BT = algorithms.masked_step_advantages(log_ratio_BT, batch.mask_BT, G)
    assert (agent.token_outputs(batch).logprob_BT - batch.logprob_BT).abs().max() > 0.1
    torch.testing.assert_close(added(agent, batch), 0.5 * step_BT, rtol=1e-4, atol=1e-4)


def groups(batch):
    """The numbers of the texts of each text's group."""
    return [range(row // G * G, row // G * G + G) for row in range(len(batch))]


@each_pair
def test_values_of_prefixes_hold_what_both_have_written(pair):
    """A token is credited with the change of the value over itself, before it is answered."""
    agent, batch = method("tempo", pair)
    episodes, whole_B = batch.unstack(), earned(agent, batch)[:, 0].tolist()
    found_BT, changed = added(agent, batch), 0
    for row, group in enumerate(groups(batch)):
        own, std = episodes[row], np.std([whole_B[j] for j in group], ddof=1)
        values = [
            np.mean(
                [
                    whole_B[j]
                    for j in group
                    if episodes[j].text[:end].tolist() == own.text[:end].tolist()
                ]
            )
            for end in range(len(own.text) + 1)
        ]
        wanted = [(values[place + 1] - values[place]) / (std or 1.0) for place in own.places]
        np.testing.assert_allclose(found_BT[row, : len(wanted)], wanted, rtol=1e-4, atol=1e-4)
        changed += sum(change != 0 for change in wanted[1:])
    assert pair == "turns" or changed > 5


@each_pair
def test_an_anchor_is_the_token_before_whoever_wrote_it(pair):
    agent, batch = method("gigpo", pair)
    returns_BT, found_BT, counted = earned(agent, batch), added(agent, batch), 0
    before = [e.text[e.places - 1].tolist() for e in batch.unstack()]
    for row, group in enumerate(groups(batch)):
        for t, token in enumerate(before[row]):
            alike = [j for j in group if before[j][t : t + 1] == [token]]
            values = [float(returns_BT[j, t]) for j in alike]
            std = np.std(values, ddof=1) if len(values) > 1 else 0.0
            wanted = (float(returns_BT[row, t]) - np.mean(values)) / std if std > 1e-4 else 0.0
            assert float(found_BT[row, t]) == pytest.approx(wanted, abs=1e-3)
            counted += wanted != 0
    assert counted > 5


AS_GRPO = {
    "plain": (GroupCredit, {}),
    "gtpo": (algorithms.GTPO, {"alpha": 0.0}),
    "hicra": (algorithms.HICRA, {"alpha": 0.0}),
    "carl": (algorithms.CARL, {"share": 1.0}),
    "spro": (algorithms.SPRO, {"process_coef": 0.0}),
}


@pytest.mark.parametrize("baseline", ["place", "turn"])
@pytest.mark.parametrize("name", AS_GRPO)
def test_without_its_formula_each_is_grpo_whatever_is_written(name, baseline):
    algorithm, settings = AS_GRPO[name]
    agent, batch = stale(algorithm, "all", baseline=baseline, **settings)
    wanted_BT = GRPO(agent.envs, baseline=baseline).advantages(batch) * batch.mask_BT
    assert wanted_BT.abs().max() > 0.5
    assert torch.equal(credited(agent, batch), wanted_BT)


@pytest.mark.parametrize("name", ["ktae", "tempo", "gigpo", "place-scaled", "turn-scaled"])
def test_a_text_of_few_tokens_of_the_policys_may_be_the_longest(name):
    """By what is written into it. A longer one in another group changes nothing for it."""
    agent, _ = method(name, "turns")
    positions = [[1, 9], [1, 2, 3], [1, 2], [1]]
    responses = [[2, 3], [2, 3, 3], [2, 4], [4]]
    longer = [[1, 2, 20]] * G
    returns_BT = torch.tensor([[3.0, 1, 0], [2, 2, 0], [0, 1, 0], [1, 0, 0]])
    found_BT = agent.credit(returns_BT, texts(responses, positions=positions))
    both = texts([*responses, *[[5, 5, 5]] * G], positions=[*positions, *longer])
    both_BT = agent.credit(torch.cat([returns_BT, returns_BT]), both)
    mask_BT = both.mask_BT[:G]
    assert torch.equal(found_BT[mask_BT], both_BT[:G][mask_BT])


def test_a_token_without_an_alternative_is_never_an_uncertain_one():
    """Most tokens are the only ones that are allowed. Of the others all have a larger entropy."""

    def mostly_forced(length):
        return few(length) if length % 4 == 0 else np.eye(V, dtype=bool)[12]

    agent = move(algorithms.HICRA(make(mostly_forced, turns=None)))
    batch = EpisodeBatch.stack(agent.collector.collect(60))
    free = [np.unpackbits(e.action_mask, axis=1).sum(1) > 1 for e in batch.unstack()]
    assert 0 < np.concatenate(free).mean() < 0.4
    assert torch.equal(agent.uncertain(batch, 0.5), padded(free, batch).bool())


# ---------------------------------------------------------------- the update


@each_method
def test_the_gradient_is_that_of_the_policys_own_tokens_under_its_mask(name):
    """Text by text, with turns, masks and ratios to an earlier policy, of which some are clipped."""
    agent, batch = method(name, "all", epochs=1, minibatches=1, max_grad_norm=1e9)
    batches = learned_from(agent)
    grads = first_step(agent, batch)[0]
    [batch] = batches
    old, advantages, losses, clipped = batch.logprob_BT, batch.learned["advantage"], [], 0
    assert advantages.shape == batch.mask_BT.shape
    for row, (logprob, _) in enumerate(by_text(agent.policy, batch)):
        ratio = (logprob - old[row, : len(logprob)]).exp()
        gains = advantages[row, : len(logprob)]
        bounded = torch.minimum(ratio * gains, ratio.clamp(0.8, 1.2) * gains)
        clipped += int((bounded != ratio * gains).sum())
        losses.append(-bounded.mean())
    assert clipped > 3
    wanted = gradient(torch.stack(losses).mean(), agent.policy)
    assert_same(grads, wanted, rtol=1e-3, atol=1e-5)


class Given(GroupCredit):
    """Learns from advantages that are given."""

    def advantages(self, batch):
        return self.given


@each_method
@pytest.mark.parametrize(
    "settings", [{}, {"importance_cap": 1.5, "target_kl": 0.5}], ids=["plain", "corrected"]
)
def test_advantages_are_of_the_policy_before_the_update(name, settings):
    """Over epochs of minibatches, on stale texts, an update is one with the advantages that its
    first step had, bit for bit."""
    steps = {"epochs": 2, "minibatches": 3, "lr": 0.01, **settings}
    agent, batch = method(name, "all", **steps)
    other, _ = stale(Given, "all", **steps)
    before = {key: weight.clone() for key, weight in agent.policy.state_dict().items()}
    assert same(before, other.policy.state_dict())
    batches, optimise = learned_from(agent), agent.optimise

    def begin(whole, loss):  # places of resets have been drawn by now
        other.rng.bit_generator.state = agent.rng.bit_generator.state
        return optimise(whole, loss)

    agent.optimise = begin
    agent.update(batch)
    other.given = batches[0].learned["advantage"]
    other.update(EpisodeBatch.stack(batches[0].unstack()))
    assert not same(agent.policy.state_dict(), before)
    assert same(agent.policy.state_dict(), other.policy.state_dict())


@each_method
def test_a_mask_that_allows_everything_changes_nothing(name):
    found = []
    for pair in ("unmasked", "all allowed"):
        agent, batch = method(name, pair, minibatches=2)
        assert (batch.action_mask_BTM is None) == (pair == "unmasked")
        agent.update(batch)
        found.append((batch.learned["advantage"], agent.policy.state_dict()))
    assert same(*found)


# ---------------------------------------------------------------- texts that are cut


@each_method
def test_a_text_that_was_cut_without_a_score_is_one_that_earned_nothing(name):
    """Whatever its score would have been, and whether or not more would have come."""
    found = []
    for told in (False, True):
        agent, batch = method(name, "all")
        cut = batch.truncated_B
        assert 0 < cut.sum() < len(batch)
        assert not batch.terms["end"][cut].any()
        if told:
            changes = {"truncated": False, "terminated": True, "bootstraps": False, "score": 7.0}
            texts_ = [replace(e, **changes) if e.truncated else e for e in batch.unstack()]
            batch = EpisodeBatch.stack(texts_)
        agent.update(batch)
        found.append((batch.learned["advantage"], agent.policy.state_dict()))
    assert same(*found)


@each_method
def test_groups_of_texts_that_were_all_cut_teach_nothing(name):
    """But by SPRO, which goes by the policy's distance from the reference."""
    envs = make(few, turns=None, stops=(), score_truncated=False, kl_coef=0.0)
    algorithm, own = METHODS[name]
    agent = move(algorithm(envs, **own))
    batch = EpisodeBatch.stack(agent.collector.collect(50))
    assert batch.truncated_B.all()
    before = {key: weight.clone() for key, weight in agent.policy.state_dict().items()}
    agent.update(batch)
    assert batch.learned["advantage"].isfinite().all()
    assert batch.learned["advantage"].any() == (name == "spro")
    assert same(agent.policy.state_dict(), before) == (name != "spro")
