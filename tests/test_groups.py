"""Group baselines: the published ones where the reward is at the end, unbiased wherever it is; groups stay whole."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from hypothesis import given
from hypothesis import strategies as st
from toy_env import ToyEnv

import tokenenv  # noqa: F401
from tokenenv.agents import GRPO, RLOO
from tokenenv.agents.advantages import returns_to_go
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.groups import group_mean, group_std, hold_last
from tokenenv.errors import InvalidArgument

LENGTHS = torch.tensor([3, 1, 2, 2])
RETURNS = torch.tensor([[6.0, 4, 1], [5, 0, 0], [2, 1, 0], [4, 3, 0]])


def test_an_ended_text_stands_with_its_last_return():
    assert hold_last(RETURNS, LENGTHS).tolist() == [[6, 4, 1], [5, 5, 5], [2, 1, 1], [4, 3, 3]]


def test_means_by_hand():
    with_own = group_mean(RETURNS, LENGTHS, 2, leave_one_out=False)
    assert with_own.tolist() == [[5.5, 4.5, 3], [5.5, 4.5, 3], [3, 2, 2], [3, 2, 2]]
    others = group_mean(RETURNS, LENGTHS, 2, leave_one_out=True)
    assert others.tolist() == [[5, 5, 5], [6, 4, 1], [4, 3, 3], [2, 1, 1]]
    of_four = group_mean(RETURNS, LENGTHS, 4, leave_one_out=True)
    torch.testing.assert_close(of_four[0], torch.tensor([11 / 3, 9 / 3, 9 / 3]))


def test_deviations_by_hand_and_flat_groups():
    assert group_std(torch.tensor([1.0, 3.0, 2.0, 2.0]), 2).tolist() == [[1.0], [1.0], [1.0], [1.0]]
    assert group_std(torch.tensor([0.0, 8.0]), 2).tolist() == [[4.0], [4.0]]


@given(st.data())
def test_neither_order_nor_padding_matters(data):
    size, width = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 5))
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, width), min_size=size, max_size=size)))
    values = torch.randn(size, width, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    order = torch.tensor(data.draw(st.permutations(range(size))))
    for leave_one_out in (False, True):
        mean = group_mean(values, lengths, size, leave_one_out=leave_one_out)
        torch.testing.assert_close(group_mean(values[order], lengths[order], size, leave_one_out=leave_one_out), mean[order])
        junk = torch.where(torch.arange(width) >= lengths[:, None], 99.0, values)
        torch.testing.assert_close(group_mean(junk, lengths, size, leave_one_out=leave_one_out), mean)


def reviews(num_envs=8, group_size=4, mode="SameStep", **options):
    options = {"max_new_tokens": 6, **options}
    return gym.make_vec("tokenenv/Reviews-v0", num_envs=num_envs, group_size=group_size, autoreset_mode=mode, **options)


def batch_of(agent, tokens=200):
    """The first episodes of a policy that has left the reference, and their advantages."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in agent.policy.model.parameters():
            weight.add_(0.1 * weight.std() * torch.randn(weight.shape, generator=generator))
    batch = EpisodeBatch.stack(agent.collector.collect(tokens))
    return batch, agent.advantages(batch), batch.mask_BT


def test_with_the_reward_at_the_end_they_are_the_published_ones():
    made = {"reward": "terminal", "kl": "none"}
    rloo, grpo, dr = RLOO(reviews(**made)), GRPO(reviews(**made)), GRPO(reviews(**made), scale="none")
    batch, advantages, mask = batch_of(rloo)
    scores = batch.score_B.unflatten(0, (-1, 4)).double()
    others = (scores.sum(1, keepdim=True) - scores) / 3
    expected = (scores - others).flatten()[:, None].expand_as(mask)
    torch.testing.assert_close(advantages[mask].double(), expected[mask], atol=1e-5, rtol=0)
    centred = scores - scores.mean(1, keepdim=True)
    for agent, wanted in ((grpo, centred / scores.std(1, correction=0, keepdim=True)), (dr, centred)):
        again, advantages, mask = batch_of(agent)
        torch.testing.assert_close(again.score_B, batch.score_B)
        torch.testing.assert_close(
            advantages[mask].double(), wanted.flatten()[:, None].expand_as(mask)[mask], atol=1e-4, rtol=0
        )


MIXED = {"dense": ("token", 0.5), "end": "terminal"}


@pytest.mark.parametrize("kl", ["reference", "policy", "none"])
def test_sources_add_up_and_the_penalty_is_whole(kl):
    agent = RLOO(reviews(reward=MIXED, kl=kl, kl_coef=0.3))
    batch, _, mask = batch_of(agent)
    sources = agent.sources(batch)
    assert list(sources) == ["dense", "end", "kl"]
    torch.testing.assert_close(sum(sources.values()), agent.rewards(batch))
    penalty = 0.0 if kl == "none" else 0.3
    torch.testing.assert_close(
        sources["kl"][mask], (-penalty * (batch.logprob_BT - batch.ref_logprob_BT))[mask], atol=1e-5, rtol=0
    )
    torch.testing.assert_close(sources["end"].sum(1), batch.score_B, atol=1e-5, rtol=0)


def test_an_env_without_terms_has_one_source():
    env = ToyEnv(4, kl_coef=0.2)
    env.group_size = 2
    agent = RLOO(env)
    batch = EpisodeBatch.stack(agent.collector.collect(30))
    assert list(agent.sources(batch)) == ["reward"]


def test_sources_have_their_own_discounts_and_are_linear_without():
    plain, split = RLOO(reviews(reward=MIXED)), RLOO(reviews(reward=MIXED), gammas={"dense": 0.5})
    batch, advantages, mask = batch_of(plain)
    returns = returns_to_go(plain.rewards(batch), batch.response_length_B, 1.0)
    whole = returns - group_mean(returns, batch.response_length_B, 4, leave_one_out=True)
    torch.testing.assert_close(advantages[mask], whole[mask], atol=1e-5, rtol=1e-5)
    before, after = plain.returns(batch), split.returns(batch)
    torch.testing.assert_close(after["dense"], returns_to_go(batch.terms["dense"], batch.response_length_B, 0.5))
    for name in ("end", "kl"):
        torch.testing.assert_close(after[name], before[name])


def test_a_source_is_scaled_on_its_own_and_the_penalty_never():
    agent = GRPO(reviews(reward=MIXED), scale="source")
    batch, advantages, mask = batch_of(agent)
    expected = 0.0
    for name, returns in agent.returns(batch).items():
        centred = returns - group_mean(returns, batch.response_length_B, 4, leave_one_out=False)
        std = returns[:, 0].unflatten(0, (-1, 4)).std(1, correction=0).repeat_interleave(4)[:, None]
        expected = expected + (centred if name == "kl" else centred / std)
    torch.testing.assert_close(advantages[mask], expected[mask], atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- unbiased, by enumeration


def texts(T=3, V=3):
    """All texts of a tiny world: 0 stops, others go on, up to T tokens."""
    open_texts, done = [()], []
    for _ in range(T):
        grown = [(*text, token) for text in open_texts for token in range(V)]
        done += [text for text in grown if text[-1] == 0 or len(text) == T]
        open_texts = [text for text in grown if text[-1] != 0 and len(text) < T]
    return done


@pytest.mark.parametrize("reward", ["dense", "terminal"])
def test_the_expected_gradient_of_a_group_is_the_policy_gradient(reward):
    """Over all pairs of texts, weighted by their probability: with dense rewards and texts of different lengths."""
    all_texts, generator = texts(), torch.Generator().manual_seed(0)
    prefixes = sorted({text[:t] for text in all_texts for t in range(len(text))})
    logits = torch.randn(len(prefixes), 3, generator=generator, dtype=torch.double).requires_grad_()
    pays = torch.randn(len(prefixes), 3, generator=generator, dtype=torch.double)
    if reward == "terminal":
        final = torch.tensor([[(*p, a) in all_texts for a in range(3)] for p in prefixes])
        pays = pays * final
    row = {prefix: i for i, prefix in enumerate(prefixes)}
    logpi = torch.log_softmax(logits, -1)
    lengths = torch.tensor([len(text) for text in all_texts])
    paid = torch.zeros(len(all_texts), 3, dtype=torch.double)
    rows = [[logpi[row[text[:t]], text[t]] if t < len(text) else logits.new_zeros(()) for t in range(3)] for text in all_texts]
    logprob = torch.stack([torch.stack(line) for line in rows])
    for i, text in enumerate(all_texts):
        for t, token in enumerate(text):
            paid[i, t] = pays[row[text[:t]], token]
    prob = logprob.sum(1).exp()
    torch.testing.assert_close(prob.sum().detach(), torch.ones((), dtype=torch.double))
    [exact] = torch.autograd.grad((prob * paid.sum(1)).sum(), logits, retain_graph=True)
    returns = returns_to_go(paid, lengths, 1.0)
    pairs = torch.cartesian_prod(torch.arange(len(all_texts)), torch.arange(len(all_texts)))
    flat, weight = pairs.flatten(), (prob.detach()[pairs[:, 0]] * prob.detach()[pairs[:, 1]]).repeat_interleave(2) / 2
    for leave_one_out, factor in ((True, 1.0), (False, 0.5)):
        advantages = returns[flat] - group_mean(returns[flat], lengths[flat], 2, leave_one_out=leave_one_out)
        inside = torch.arange(3) < lengths[flat][:, None]
        [found] = torch.autograd.grad((weight[:, None] * advantages * logprob[flat] * inside).sum(), logits, retain_graph=True)
        torch.testing.assert_close(found, factor * exact, atol=1e-12, rtol=1e-9)


# ---------------------------------------------------------------- groups stay whole


@pytest.mark.parametrize("mode", [mode.value for mode in AutoresetMode])
def test_batches_hold_whole_groups_of_one_prompt_and_lose_none(mode):
    agent = RLOO(reviews(12, 3, mode, max_new_tokens=30))
    seen = []
    for _ in range(6):
        episodes = agent.collector.collect(200)
        assert len(episodes) % 3 == 0
        for i in range(0, len(episodes), 3):
            group = episodes[i : i + 3]
            assert len({e.slot // 3 for e in group}) == len({e.index for e in group}) == len({e.prompt_id for e in group}) == 1
            assert len({e.slot for e in group}) == 3
            for e in group[1:]:
                np.testing.assert_array_equal(e.prompt, group[0].prompt)
        seen += [(e.slot, e.index) for e in episodes]
    assert len(set(seen)) == len(seen)
    waiting = [(e.slot, e.index) for e in agent.collector._waiting]
    assert waiting
    ended = {(slot, index) for slot in range(12) for index in range(int(agent.collector.finished[slot]))}
    assert set(seen) | set(waiting) == ended


def test_flat_groups_are_drawn_again():
    env = gym.make_vec("tokenenv/Arithmetic-v0", num_envs=16, group_size=4, autoreset_mode="SameStep")
    kept = GRPO(env, skip_flat_groups=True, batch_tokens=60).collect()
    assert sum(len(e.response) for e in kept) >= 60
    for i in range(0, len(kept), 4):
        assert len({e.score for e in kept[i : i + 4]}) > 1


def test_a_group_of_one_is_refused():
    with pytest.raises(InvalidArgument, match="group_size=1 leaves RLOO nothing to compare a text with"):
        RLOO(reviews(4, 1))
    with pytest.raises(InvalidArgument, match=r"gammas\['dense'\]=1.5 is not allowed"):
        RLOO(reviews(), gammas={"dense": 1.5})
    with pytest.raises(InvalidArgument, match="scale='std' is not known"):
        GRPO(reviews(), scale="std")
