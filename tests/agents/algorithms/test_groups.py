"""Group baselines: the published ones where the reward is at the end, unbiased wherever it is;
groups stay whole."""

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tabular import BETA, relative_error, worlds
from toy_env import GOOD, ToyEnv

import tokenenv  # noqa: F401
from tokenenv.agents import GRPO, RLOO
from tokenenv.agents.algorithms.groups import (
    compared,
    flat_groups,
    group_mean,
    group_std,
    hold_last,
)
from tokenenv.agents.algorithms.grpo import MAX_TRIES
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning.advantages import returns_to_go
from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.envs.tasks.reviews import task as reviews_task
from tokenenv.errors import InvalidArgument
from tokenenv.rewards import Rule

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
    ones = torch.ones(4, dtype=torch.int64)
    assert group_std(torch.tensor([[1.0], [3], [2], [2]]), ones, 2)[:, 0].tolist() == pytest.approx(
        [2**0.5, 2**0.5, 1, 1]
    )
    assert group_std(torch.tensor([[1.0], [2], [3], [6]]), ones, 4)[:, 0].tolist() == pytest.approx(
        [(14 / 3) ** 0.5] * 4
    )
    # What rounding leaves of equal returns is no spread, whatever their unit.
    for unit in (1e-6, 1.0, 1e6):
        returns = unit * torch.tensor([[100.0], [100.00001], [100.0], [101.0]])
        assert group_std(returns, ones, 2)[:, 0].tolist() == pytest.approx(
            [1, 1, unit * 0.5**0.5, unit * 0.5**0.5], rel=1e-3
        )
        assert flat_groups(returns, ones, 2).tolist() == [True, False]


@pytest.mark.parametrize("length", [4, 256, 4096])
@pytest.mark.parametrize("total", [0.0, 1.0])
def test_dense_rewards_with_one_sum_are_a_flat_group(length, total):
    """Sums of large rewards differ by rounding, which is no deviation: divided by it, advantages
    would be of the order 1e8."""
    scores = 3 * torch.randn(40, length + 1, generator=torch.Generator().manual_seed(0))
    scores[:, 0], scores[:, -1] = 0.0, total
    lengths = torch.full((40,), length)
    returns = returns_to_go(scores.diff(dim=1), lengths, 1.0)
    assert flat_groups(returns, lengths, 4).all()
    assert (group_std(returns, lengths, 4) == 1).all()


@pytest.mark.parametrize("algorithm", [RLOO, GRPO])
def test_a_first_batch_that_all_earns_the_same_teaches_nothing(algorithm):
    """Policy and reference are one, so all there is to learn from is what float32 leaves of rewards
    beside a KL of 0."""
    task = replace(reviews_task(max_new_tokens=6), scorer=None, gold=None)
    pays = {"always": Rule(lambda prompt, response: -1.0)}
    envs = TokenVectorEnv(
        8, task=task, autoreset_mode="SameStep", group_size=4, kl_coef=0.05, reward=pays
    )
    agent = algorithm(envs, batch_tokens=60, whiten=True)
    batch = EpisodeBatch.stack(agent.collect())
    agent.update(batch)
    assert batch.logprob_BT.abs().max() > 1
    assert (batch.learned["advantage"] == 0).all()


def test_an_env_without_terms_has_flat_groups_too():
    """What is left of its reward without the penalty is rounding where it pays nothing."""
    agent = GRPO(ToyEnv(8, kl_coef=0.05, group_size=4), batch_tokens=60)
    agent.policy.model.lm_head.weight.data.mul_(3.0)
    batch = EpisodeBatch.stack(agent.collect())
    batch.reward_BT.copy_(batch.kl_coef_B[:, None] * batch.ref_logprob_BT)
    sources = agent.sources(batch)
    assert (sources["reward"] == 0).all()
    assert sources["kl"].abs().max() > 1e-3


def test_equal_texts_have_an_advantage_of_exactly_zero():
    """0.7 thrice over 3 is not 0.7 in float32; whitened, the difference would be a deviation of
    1."""
    values = torch.tensor(
        [
            [0.7, 0.7],
            [0.7, 0.7],
            [0.7, 0.7],
            [0.7, 0.7],
            [0.7, 0.7],
            [0.7, 0.7],
            [0.7, 0.7],
            [0.8, 0.8],
        ]
    )
    for leave_one_out in (False, True):
        found = compared(values, torch.full((8,), 2), 4, leave_one_out=leave_one_out)
        assert (found[:4] == 0).all()
        assert (found[4:] != 0).all()
    noisy = values[:4] + 3e-8 * torch.arange(4)[:, None]
    assert (noisy - group_mean(noisy, torch.full((4,), 2), 4, leave_one_out=True)).abs().max() > 0
    assert (compared(noisy, torch.full((4,), 2), 4, leave_one_out=True) == 0).all()


@given(st.data())
def test_neither_order_nor_padding_matters(data):
    size, width = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 5))
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, width), min_size=size, max_size=size)))
    values = torch.randn(
        size, width, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    )
    order = torch.tensor(data.draw(st.permutations(range(size))))
    for leave_one_out in (False, True):
        mean = group_mean(values, lengths, size, leave_one_out=leave_one_out)
        torch.testing.assert_close(
            group_mean(values[order], lengths[order], size, leave_one_out=leave_one_out),
            mean[order],
        )
        junk = torch.where(torch.arange(width) >= lengths[:, None], 99.0, values)
        torch.testing.assert_close(
            group_mean(junk, lengths, size, leave_one_out=leave_one_out), mean
        )


def reviews(num_envs=8, group_size=4, mode="SameStep", **options):
    options = {"max_new_tokens": 6, **options}
    return gym.make_vec(
        "tokenenv/Reviews-v0",
        num_envs=num_envs,
        group_size=group_size,
        autoreset_mode=mode,
        **options,
    )


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
    rloo, grpo, dr = (
        RLOO(reviews(**made)),
        GRPO(reviews(**made)),
        GRPO(reviews(**made), scale="none"),
    )
    batch, advantages, mask = batch_of(rloo)
    scores = batch.score_B.unflatten(0, (-1, 4)).double()
    others = (scores.sum(1, keepdim=True) - scores) / 3
    expected = (scores - others).flatten()[:, None].expand_as(mask)
    torch.testing.assert_close(advantages[mask].double(), expected[mask], atol=1e-5, rtol=0)
    centred = scores - scores.mean(1, keepdim=True)
    for agent, wanted in ((grpo, centred / scores.std(1, keepdim=True)), (dr, centred)):
        again, advantages, mask = batch_of(agent)
        torch.testing.assert_close(again.score_B, batch.score_B)
        torch.testing.assert_close(
            advantages[mask].double(),
            wanted.flatten()[:, None].expand_as(mask)[mask],
            atol=1e-4,
            rtol=0,
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
        sources["kl"][mask],
        (-penalty * (batch.logprob_BT - batch.ref_logprob_BT))[mask],
        atol=1e-5,
        rtol=0,
    )
    torch.testing.assert_close(sources["end"].sum(1), batch.score_B, atol=1e-5, rtol=0)


def test_an_env_without_terms_has_two_sources():
    env = ToyEnv(4, kl_coef=0.2, group_size=2)
    agent = RLOO(env)
    batch = EpisodeBatch.stack(agent.collector.collect(30))
    sources = agent.sources(batch)
    assert list(sources) == ["reward", "kl"]
    torch.testing.assert_close(sources["kl"], -0.2 * (batch.logprob_BT - batch.ref_logprob_BT))
    good = torch.zeros_like(batch.reward_BT)
    for b, e in enumerate(batch.unstack()):
        good[b, : len(e.response)] = torch.as_tensor(e.response == GOOD)
    torch.testing.assert_close(sources["reward"], good, atol=1e-6, rtol=0)


def test_sources_have_their_own_discounts_and_are_linear_without():
    plain, split = RLOO(reviews(reward=MIXED)), RLOO(reviews(reward=MIXED), gammas={"dense": 0.5})
    batch, advantages, mask = batch_of(plain)
    returns = returns_to_go(plain.rewards(batch), batch.response_length_B, 1.0)
    whole = returns - group_mean(returns, batch.response_length_B, 4, leave_one_out=True)
    torch.testing.assert_close(advantages[mask], whole[mask], atol=1e-5, rtol=1e-5)
    before, after = plain.returns(batch), split.returns(batch)
    torch.testing.assert_close(
        after["dense"], returns_to_go(batch.terms["dense"], batch.response_length_B, 0.5)
    )
    for name in ("end", "kl"):
        torch.testing.assert_close(after[name], before[name])
    lengths = batch.response_length_B
    expected = sum(
        values - group_mean(values, lengths, 4, leave_one_out=True) for values in after.values()
    )
    torch.testing.assert_close(split.advantages(batch)[mask], expected[mask], atol=1e-5, rtol=1e-5)


def test_a_source_is_scaled_on_its_own_and_the_penalty_never():
    agent = GRPO(reviews(reward=MIXED), scale="source")
    batch, advantages, mask = batch_of(agent)
    expected = 0.0
    for name, returns in agent.returns(batch).items():
        centred = returns - group_mean(returns, batch.response_length_B, 4, leave_one_out=False)
        std = returns[:, 0].unflatten(0, (-1, 4)).std(1).repeat_interleave(4)[:, None]
        expected = expected + (centred if name == "kl" else centred / std)
    torch.testing.assert_close(advantages[mask], expected[mask], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scale", ["group", "source", "none"])
def test_the_penalty_of_a_flat_group_is_not_blown_up(scale):
    """Of two groups, one is flat: there the penalty alone is left, as it is; in the other the score
    is in deviations."""
    agent = GRPO(reviews(reward="terminal", kl_coef=1e-3), scale=scale)
    batch = batch_of(agent)[0]
    rows = torch.arange(len(batch)) < 8
    batch = EpisodeBatch.stack([e for e, kept in zip(batch.unstack(), rows, strict=True) if kept])
    batch.terms["terminal"][:] = 0.0
    last = batch.response_length_B - 1
    batch.terms["terminal"][range(8), last] = torch.tensor([5.0] * 4 + [5, 5, 5, 7])
    batch.reward_BT[:] = sum(batch.terms.values())
    penalty = agent.returns(batch)["kl"]
    assert penalty[:4].std() > 1e-4
    alone = penalty - group_mean(penalty, batch.response_length_B, 4, leave_one_out=False)
    score = torch.tensor([0.0] * 4 + [-0.5, -0.5, -0.5, 1.5])[
        :, None
    ]  # centred; its deviation is 1
    torch.testing.assert_close(
        agent.advantages(batch)[batch.mask_BT], (alone + score)[batch.mask_BT], atol=1e-5, rtol=0
    )


# ---------------------------------------------------------------- unbiased, by enumeration


REWARDS = {
    "terminal": {"reward": "terminal"},
    "dense": {"reward": "token"},
    "shaped": {"reward": "delta"},
    "mixed": {"reward": {"dense": ("token", 0.5), "end": ("terminal", 0.5)}},
}


def every_group(world, paid, size):
    """All groups of `size` texts of a small world as one batch, and how likely each is."""
    rows = torch.cartesian_prod(*[torch.arange(len(world.texts))] * size)
    probs = world.logprob(world.policy).sum(1).exp()[rows].prod(1)
    flat, width = rows.flatten(), world.mask.shape[1]
    count = len(flat)
    nothing, never = (
        torch.zeros(count, width, dtype=torch.float64),
        torch.zeros(count, dtype=torch.bool),
    )
    batch = EpisodeBatch(
        tokens_BL=world.tokens[flat],
        length_B=world.length[flat] + 1,
        response_length_B=world.length[flat],
        logprob_BT=world.logprob(world.policy)[flat],
        ref_logprob_BT=world.logprob(world.reference.logprobs)[flat],
        reward_BT=torch.from_numpy(paid.token_rewards).double()[flat],
        potential_BT1=torch.zeros(count, width + 1),
        kl_coef_B=torch.full((count,), BETA, dtype=torch.float64),
        terminated_B=never,
        truncated_B=never,
        score_B=nothing[:, 0],
        gold_B=nothing[:, 0],
        prompt_id_B=never.long(),
        version_B=never.long(),
        bootstraps_B=never,
        slot_B=never.long(),
        index_B=never.long(),
        terms={
            name: torch.from_numpy(values).double()[flat]
            for name, values in paid.token_reward_terms.items()
        },
    )
    return batch, rows, probs


def toy_agent(algorithm, size, **options):
    return algorithm(ToyEnv(2 * size, group_size=size), **options)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("design", REWARDS)
@pytest.mark.parametrize(
    "world", [world for world in worlds() if world.stops], ids=lambda world: f"seed{world.seed}"
)
def test_the_expected_gradient_over_all_groups_is_the_policy_gradient(world, design, size):
    """Of E[score - BETA KL], with dense rewards and texts of different lengths; GRPO's is (G - 1) /
    G of it."""
    paid = world.score(world.env("token", kl_coef=BETA, **REWARDS[design]))
    score, ref_logprob = (
        world.rewards(per_token=True).sum(1),
        world.logprob(world.reference.logprobs).sum(1),
    )
    exact = world.gradient_of_mean(lambda logprob: score - BETA * (logprob.sum(1) - ref_logprob))
    batch, rows, probs = every_group(world, paid, size)
    for algorithm, options, factor in (
        (RLOO, {}, 1.0),
        (GRPO, {"scale": "none"}, (size - 1) / size),
    ):
        advantages = (
            toy_agent(algorithm, size, **options).advantages(batch).masked_fill(~batch.mask_BT, 0.0)
        )
        # The mean advantage of each token of each text, over all that may be beside it.
        weighted = (probs[:, None, None] * advantages.unflatten(0, (-1, size))).flatten(0, 1) / size
        credit = torch.zeros(world.mask.shape, dtype=torch.float64).index_add_(
            0, rows.flatten(), weighted
        )
        credit /= world.logprob(world.policy).sum(1, keepdim=True).exp()
        found = world.policy_gradient(credit)
        assert relative_error(found, factor * exact) < 1e-5
        assert advantages.abs().max() > 0.1


# ---------------------------------------------------------------- groups stay whole


def test_flat_groups_are_drawn_again(monkeypatch):
    """Until as many tokens are there as were asked for; where all are flat it is given up, and the
    last batch taken. What the terms pay is compared: not the score, which there may be none of, nor
    the KL penalty."""
    agent = GRPO(reviews(8, 4), skip_flat_groups=True, batch_tokens=60)
    one = agent.collector.collect(40)[:4]
    assert len({e.terms["kl"].sum() for e in one}) == 4

    def worth(e, score):
        rule = np.full(len(e.response), score / len(e.response), np.float32)
        return replace(
            e, score=np.nan, terms={"rule": rule, "kl": e.terms["kl"]}, reward=rule + e.terms["kl"]
        )

    flat, mixed = (
        [worth(e, float(score)) for e, score in zip(one, scores, strict=True)]
        for scores in ("1111", "1112")
    )
    size, asked = sum(len(e.response) for e in one), []
    assert size < 30

    def scripted(batches):
        asked.clear()
        draws = iter(batches)
        monkeypatch.setattr(
            agent.collector, "collect", lambda tokens: (asked.append(tokens), next(draws))[1]
        )
        return agent.collect()

    assert scripted([flat + mixed, flat, mixed + flat, mixed]) == mixed * 3
    assert asked == [60, 60 - size, 60 - size, 60 - 2 * size]
    assert scripted([mixed * 3, flat]) == mixed * 3
    assert scripted([*[flat] * MAX_TRIES, flat * 2]) == flat * 2
    assert len(asked) == 1 + MAX_TRIES
    agent.config.skip_flat_groups = False
    assert scripted([flat + mixed]) == flat + mixed


def once_groups_are_kept(agent, interrupt):
    """Has `interrupt` called before the third step after the first draw that left something."""
    advance, steps = agent.collector._advance, []

    def wrapped(*args):
        steps.extend([1] if agent.statistics["kept"].tokens else [])
        if len(steps) == 3:
            interrupt()
        return advance(*args)

    agent.collector._advance = wrapped


@pytest.mark.parametrize("reloaded", [False, True])
def test_groups_that_are_kept_outlast_a_stop_while_more_are_drawn(tmp_path, reloaded):
    """A run goes on as if it had not been stopped, and so does one that is loaded from what it then
    saved."""
    settings = {
        "skip_flat_groups": True,
        "batch_tokens": 200,
        "minibatches": 1,
        "lr_schedule": "constant",
    }
    whole, agent = (GRPO(ToyEnv(8, group_size=4), **settings) for _ in range(2))
    whole.learn(10_000, on_update=lambda metrics, episodes: whole.stop())
    once_groups_are_kept(agent, agent.stop)
    agent.learn(10_000)
    assert agent.updates == 0
    assert 0 < agent.statistics["kept"].tokens < 200
    if reloaded:
        agent.save(tmp_path / "agent")
        agent = GRPO.load(tmp_path / "agent", ToyEnv(8, group_size=4))
    agent.learn(10_000, on_update=lambda metrics, episodes: agent.stop())
    assert (agent.updates, agent.tokens_seen) == (1, whole.tokens_seen)
    assert agent.statistics["kept"].tokens == 0
    for one, other in zip(whole.policy.parameters(), agent.policy.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_groups_that_are_kept_outlast_what_interrupts_a_step():
    """What the interrupted draw had is begun anew."""

    def interrupt():
        raise KeyboardInterrupt

    agent = GRPO(ToyEnv(8, group_size=4), skip_flat_groups=True, batch_tokens=200)
    once_groups_are_kept(agent, interrupt)
    with pytest.raises(KeyboardInterrupt):
        agent.collect()
    kept = list(agent.statistics["kept"].episodes)
    assert kept
    assert agent.collect()[: len(kept)] == kept


def test_a_rule_without_a_score_still_tells_groups_apart():
    """DAPO's own case: half of the texts earn 1, none has a score."""
    task = replace(reviews_task(max_new_tokens=6), scorer=None, gold=None)
    rule = {"odd": Rule(lambda prompt, response: float(len(response) % 2))}
    envs = TokenVectorEnv(
        8, task=task, autoreset_mode="SameStep", group_size=4, kl="none", reward=rule
    )
    agent, seen = GRPO(envs, skip_flat_groups=True, batch_tokens=60), []
    agent.learn(400, on_update=lambda metrics, episodes: seen.append(episodes))
    assert len(seen) > 1
    for episodes in seen:
        paid = np.array([e.reward.sum() for e in episodes]).reshape(-1, 4)
        assert (np.ptp(paid, 1) > 0).all()


def test_what_they_cannot_use_is_refused():
    for algorithm in (RLOO, GRPO):
        with pytest.raises(
            InvalidArgument,
            match=f"group_size=1 leaves {algorithm.__name__} nothing to compare a text with",
        ):
            algorithm(reviews(4, 1))
    with pytest.raises(InvalidArgument, match=r"gammas\['dense'\]=1.5 is not allowed"):
        RLOO(reviews(), gammas={"dense": 1.5})
    with pytest.raises(
        InvalidArgument,
        match=r"gammas key='tokn' is not known; allowed: kl, token\. Did you mean 'token'",
    ):
        RLOO(reviews(), gammas={"tokn": 0.5}, batch_tokens=20).learn(20)
    with pytest.raises(InvalidArgument, match="scale='std' is not known"):
        GRPO(reviews(), scale="std")
