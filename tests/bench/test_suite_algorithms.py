"""The published methods of benchmarks/suite: each is GRPO where its formula says so, and what its
formula says elsewhere, by hand; each learns."""

import dataclasses
import itertools
import math
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from by_text import assert_same, first_step, gradient, token_logprobs_by_text
from example_files import load_example
from runs import same
from suite_methods import texts

import tokenenv  # noqa: F401
from tokenenv.agents import GRPO, GRPOConfig
from tokenenv.agents.algorithms.grpo import paid, total
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.bench.file import read_grid, suite_file
from tokenenv.errors import InvalidArgument

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.suite import algorithms, key_tokens
from benchmarks.suite.algorithms import (
    CARL,
    GTPO,
    HICRA,
    KTAE,
    SPRO,
    TEMPO,
    GiGPO,
    PlaceScaled,
    Resets,
)
from benchmarks.suite.credit import CreditConfig, GroupCredit
from benchmarks.suite.trees import prefix_values

sys.path.pop(0)

ROOT = Path(__file__).parents[2]


def make(env_id="Negation", num_envs=16, tokens=6, group_size=4, **options):
    return gym.make_vec(
        f"tokenenv/{env_id}-v0",
        num_envs=num_envs,
        max_new_tokens=tokens,
        group_size=group_size,
        autoreset_mode="SameStep",
        **options,
    )


def moved(algorithm, envs=None, **settings):
    """An agent whose policy is no longer the reference."""
    agent = algorithm(envs or make(), **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in agent.policy.parameters():
            weight += 0.5 * torch.randn(weight.shape, generator=generator)
    agent.actor.refresh()
    return agent


def batch_of(agent, tokens=96):
    return EpisodeBatch.stack(agent.collector.collect(tokens))


def terminal(batch, *wholes):
    """Returns-to-go (B, T) of texts with the reward at the end."""
    return torch.tensor(wholes, dtype=torch.float32)[:, None].expand(batch.mask_BT.shape)


def earned(agent, batch):
    """The returns-to-go (B, T) of the reward terms."""
    return total(paid(agent.returns(batch)))


def plain(agent, batch, returns_BT):
    """What GRPO makes of the same returns."""
    return GroupCredit.credit(agent, returns_BT, batch)


# ---------------------------------------------------------------- GRPO, where they are

STEEP = {"lr": 0.05, "batch_tokens": 96, "minibatches": 2}


def weights_after(algorithm, **settings):
    agent = algorithm(make(kl_coef=0.3), **STEEP, **settings)
    agent.learn(300)
    assert agent.updates >= 3
    return agent.policy.state_dict()


@pytest.fixture(scope="module")
def grpo():
    return weights_after(GRPO)


AS_GRPO = [
    (GroupCredit, {}),
    (GTPO, {"alpha": 0.0}),
    (HICRA, {"alpha": 0.0}),
    (CARL, {"share": 1.0}),
    (SPRO, {"process_coef": 0.0}),
    (PlaceScaled, {}),
]


@pytest.mark.parametrize(("algorithm", "settings"), AS_GRPO)
def test_without_its_formula_each_is_grpo_to_the_bit(grpo, algorithm, settings):
    """With the reward at the end, as `PlaceScaled` needs for it, and a KL penalty."""
    assert same(weights_after(algorithm, **settings), grpo)


def test_the_settings_that_they_share_with_grpo_have_its_defaults():
    own, grpo = CreditConfig(), GRPOConfig()
    for known in dataclasses.fields(own):
        assert getattr(own, known.name) == getattr(grpo, known.name)


def test_no_formula_reaches_the_kl_penalty():
    """The reward terms pay nothing here, so GRPO's advantages are those of the penalty alone. SPRO
    adds its own part even then, and CARL leaves tokens out of everything."""
    for algorithm in (GTPO, KTAE, HICRA, TEMPO, GiGPO, PlaceScaled):
        agent = moved(algorithm, make(kl_coef=0.3))
        batch = batch_of(agent)
        for name in batch.terms.keys() - {"kl"}:
            batch.terms[name].zero_()
        wanted_BT = GroupCredit.advantages(agent, batch)
        assert wanted_BT.abs().max() > 0.1
        assert torch.equal(agent.advantages(batch), wanted_BT), algorithm


# ---------------------------------------------------------------- by entropy


def test_gtpo_by_hand():
    """Two texts are good, the second of which is over after one token; two are bad, and one is
    neither."""
    entropy = torch.tensor([[1.0, 2.0], [3.0, 5.0], [0.5, 0.25], [0.125, 1.0], [7.0, 7.0]])
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1], [1, 1]]).bool()
    ahead = torch.tensor([3.0, 1.0, -2.0, -2.0, 0.0])
    found = algorithms.entropy_weights(entropy, mask, ahead, 5)
    wanted = [[2 * 1 / 4, 1], [2 * 3 / 4, 0], [2 * 2 / 10, 2 * 4 / 5], [2 * 8 / 10, 2 * 1 / 5]]
    wanted.append([1, 1])
    torch.testing.assert_close(found, torch.tensor(wanted))


def test_the_token_rewards_of_gtpo_add_up_to_the_texts_that_are_there():
    """At each place, over the successful texts of a group and over the failed ones: entropies move
    reward between texts and add none."""
    agent = GTPO(make("Reviews", tokens=16, reward="terminal"))
    batch = batch_of(agent, 200)
    assert batch.response_length_B.unique().numel() > 1
    entropy_BT = agent.token_outputs(batch).entropy_BT.clamp(min=algorithms.MIN_ENTROPY)
    ahead_B = agent.compared(earned(agent, batch), batch, leave_one_out=False)[:, 0]
    weights_BT = algorithms.entropy_weights(entropy_BT, batch.mask_BT, ahead_B, 4)
    for which_B in (ahead_B > 0, ahead_B < 0):
        there_NT = (batch.mask_BT & which_B[:, None]).unflatten(0, (-1, 4)).sum(1)
        sums_NT = (weights_BT * which_B[:, None]).unflatten(0, (-1, 4)).sum(1)
        torch.testing.assert_close(sums_NT, there_NT.float())


def test_gtpo_is_that_of_the_example_where_only_the_end_is_paid():
    example = load_example("reshaping").GTPO
    own, other = (moved(kind, make(kl="none"), alpha=0.7) for kind in (GTPO, example))
    batch, again = batch_of(own), batch_of(other)
    found_BT = own.advantages(batch)
    assert not torch.equal(found_BT, plain(own, batch, earned(own, batch)))
    torch.testing.assert_close(found_BT, other.reshape(other.advantages(again), again))


def most_uncertain(agent, batch, share):
    """Which tokens (B, T) have the largest entropies, by sorting them."""
    entropy_BT = agent.token_outputs(batch).entropy_BT.masked_fill(~batch.mask_BT, -1.0)
    order = entropy_BT.flatten().argsort(descending=True)
    chosen = torch.zeros_like(batch.mask_BT).flatten()
    chosen[order[: round(share * int(batch.mask_BT.sum()))]] = True
    return chosen.view_as(batch.mask_BT)


def test_hicra_raises_what_planning_tokens_get():
    agent = moved(HICRA, make("Reviews", tokens=8), alpha=0.5, share=0.25)
    batch = batch_of(agent, 200)
    returns_BT, planning_BT = earned(agent, batch), most_uncertain(agent, batch, 0.25)
    own_BT, mask_BT = plain(agent, batch, returns_BT), batch.mask_BT
    factors_BT = torch.where(own_BT > 0, 1.5, 0.5).where(planning_BT, torch.tensor(1.0))
    found_BT = agent.credit(returns_BT, batch)
    torch.testing.assert_close(found_BT[mask_BT], (factors_BT * own_BT)[mask_BT])
    assert set(factors_BT[mask_BT & (own_BT != 0)].tolist()) == {0.5, 1.0, 1.5}


def test_carl_learns_from_the_most_uncertain_tokens_alone():
    agent = moved(CARL, make("Reviews", tokens=8), share=0.25)
    batch = batch_of(agent, 200)
    before_BT, kept_BT = torch.ones_like(batch.reward_BT), most_uncertain(agent, batch, 0.25)
    assert 0 < kept_BT.sum() < batch.mask_BT.sum()
    assert torch.equal(agent.reshape(before_BT, batch), kept_BT.float())


# ---------------------------------------------------------------- by association


def test_fishers_p_is_that_of_all_tables():
    for good, bad in itertools.product(range(1, 6), range(1, 6)):
        for a, b in itertools.product(range(good + 1), range(bad + 1)):
            held, texts_ = a + b, good + bad
            tables = [
                math.comb(good, k) * math.comb(bad, held - k) if held >= k else 0
                for k in range(good + 1)
            ]
            wanted = sum(t for t in tables if t <= tables[a]) / math.comb(texts_, held)
            given = (torch.tensor([[float(n)]], dtype=torch.float64) for n in (a, b, good, bad))
            assert float(key_tokens.fisher(*given)) == pytest.approx(wanted), (a, b, good, bad)


def keys_by_token(responses, good, group_size=4):
    batch = texts(responses)
    tokens_BT = batch.tokens_BL.gather(1, batch.position_BT1[:, :-1])
    found_BT = key_tokens.key_values(
        tokens_BT, batch.mask_BT, torch.tensor(good).bool(), group_size
    )
    assert (found_BT[~batch.mask_BT] == 0).all()
    pairs = zip(tokens_BT[batch.mask_BT].tolist(), found_BT[batch.mask_BT].tolist(), strict=True)
    return dict(pairs)


def test_a_token_of_exactly_the_good_texts_has_the_largest_value():
    """Token 1 is in both good texts alone, 2 in both failed ones, 3 everywhere alike, 4 in one text
    of each kind."""
    keys = keys_by_token([[1, 3, 4], [1, 3], [2, 3, 4], [2, 3]], [1, 1, 0, 0])
    assert keys == {1: pytest.approx(1), 2: pytest.approx(-1), 3: 0, 4: pytest.approx(0, abs=1e-6)}
    a, b, good, bad = (torch.tensor([[n]], dtype=torch.float64) for n in (2, 0, 2, 2))
    assert float(key_tokens.fisher(a, b, good, bad)) == pytest.approx(2 / math.comb(4, 2))
    assert float(key_tokens.information(a, b, good, bad)) == pytest.approx(1.0)


def test_ktae_by_hand():
    """Token 5 is in both good texts (twice in one) and in one of three failed ones."""
    responses = [[5, 5, 6], [5, 7], [5, 6], [6, 7, 7], [7]]
    key = keys_by_token(responses, [1, 1, 0, 0, 0], group_size=5)[5]
    p = (math.comb(2, 2) * math.comb(3, 1) + math.comb(2, 0) * math.comb(3, 3)) / math.comb(5, 3)

    def bits(share):
        return -sum(x * math.log2(x) for x in (share, 1 - share) if x)

    gained = bits(2 / 5) - 3 / 5 * bits(2 / 3) - 2 / 5 * bits(0)
    f, g = (
        3 * q / (q + 1 + length / 5.5) for q, length in ((3 / 5, 5), (1 / 6, 6))
    )  # 5 and 6 tokens
    direction = math.pi / 2 - math.asin(math.sqrt(1 / 3)) + f / (g + 1e-5) - g / (f + 1e-5)
    wanted = 2 / (1 + math.exp(-(math.exp(-2 * p) + gained) / 2 * direction)) - 1
    assert key == pytest.approx(wanted, rel=1e-5)
    assert 0.1 < key < 0.9


def test_ktae_adds_the_values_to_grpos_advantages_group_by_group():
    """In the second group all texts earn the same: nothing goes with success there."""
    agent = KTAE(make(group_size=2))
    batch = texts([[1, 3], [2, 3], [1, 2], [3, 3]])
    returns_BT = terminal(batch, 1.0, 0.0, 5.0, 5.0)
    found_BT = agent.credit(returns_BT, batch) - plain(agent, batch, returns_BT)
    torch.testing.assert_close(found_BT, torch.tensor([[1.0, 0], [-1, 0], [0, 0], [0, 0]]))


# ---------------------------------------------------------------- by the reference, by place


def test_spro_by_hand():
    """Groups of three texts of 3, 2 and 1 tokens. The mean is over those that are there."""
    log_ratio = torch.tensor([[0.5, 1.0, 2.0], [-0.5, 1.0, 9.0], [3.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()
    found = algorithms.masked_step_advantages(log_ratio, mask, 3)
    wanted = [[0.5 - 1, 1.5 - 1, 3.5 - 3.5], [-0.5 - 1, 0.5 - 1, 0], [3 - 1, 0, 0]]
    assert found.tolist() == wanted


def test_spro_adds_beta_times_that():
    agent = moved(SPRO, process_coef=0.5)
    batch = batch_of(agent)
    returns_BT = earned(agent, batch)
    found_BT = agent.credit(returns_BT, batch) - plain(agent, batch, returns_BT)
    sums_BT = (batch.logprob_BT - batch.ref_logprob_BT).cumsum(1)  # all texts are as long
    means_BT = sums_BT.unflatten(0, (-1, 4)).mean(1).repeat_interleave(4, 0)
    torch.testing.assert_close(found_BT, 0.5 * (sums_BT - means_BT), atol=1e-5, rtol=1e-4)
    with pytest.raises(InvalidArgument, match="reports ref_logprob"):
        agent.credit(terminal(texts([[1]] * 4), 0, 0, 0, 1), texts([[1]] * 4))


def test_scaled_by_place_by_hand():
    agent = PlaceScaled(make(group_size=2))
    batch = texts([[1, 1, 1], [1], [1, 1, 1], [1, 1, 1]])
    returns_BT = torch.tensor([[6.0, 5, 1], [4, 0, 0], [2, 1, 3], [2, 5, 4]])
    root = 2**0.5  # the deviation of two values is their distance over it
    wanted = [[root / 2, root / 2, -root / 2], [-root / 2, 0, 0]]
    wanted += [[0, -root / 2, -root / 2], [0, root / 2, root / 2]]
    found_BT = agent.credit(returns_BT, batch) * batch.mask_BT
    torch.testing.assert_close(found_BT, torch.tensor(wanted))


def test_scaled_by_turn_by_hand():
    """Texts of turns of 2 and 1 tokens, and of 1 and 1. Returns are compared with those of the
    others at the start of the turn, and divided by the deviation there."""
    agent = PlaceScaled(make(group_size=2), baseline="turn")
    batch = texts([[1, 1, 1], [1, 1]], positions=[[1, 2, 4], [1, 3]])
    returns_BT = torch.tensor([[6.0, 5, 1], [2, 4, 0]])
    first, second = 4 / 2**0.5, 3 / 2**0.5
    wanted = [[2 / first, 1 / first, -1.5 / second], [-2 / first, 1.5 / second, 0]]
    found_BT = agent.credit(returns_BT, batch) * batch.mask_BT
    torch.testing.assert_close(found_BT, torch.tensor(wanted))


# ---------------------------------------------------------------- values from a group


def test_tempo_by_hand():
    """V is the mean of the texts that begin alike. The second text is over where the first one goes
    on, and is not among those that go on."""
    agent = TEMPO(make(group_size=4))
    batch = texts([[1, 2, 3], [1, 2], [1, 4, 3], [5, 2, 3]])
    returns_BT = terminal(batch, 8.0, 4.0, 3.0, 1.0)
    values = prefix_values(returns_BT[:, 0], batch, 4)
    assert values.tolist() == [[4, 4, 5, 6, 8], [4, 4, 5, 6, 0], [4, 4, 5, 3, 3], [4, 4, 1, 1, 1]]
    deviation = ((16 + 0 + 1 + 9) / 3) ** 0.5
    wanted = [[4 + 1, 4 + 1, 4 + 2], [0 + 1, 0 + 1, 0], [-1 + 1, -1 - 2, -1], [-3 - 3, -3, -3]]
    found_BT = agent.credit(returns_BT, batch) * batch.mask_BT
    torch.testing.assert_close(found_BT, torch.tensor(wanted) / deviation)


def test_tempo_without_shared_beginnings_is_grpo_behind_the_first_token():
    """The first token is the branch: there the value goes from the group's mean to the text's own
    return, which is GRPO's advantage once more."""
    agent = TEMPO(make())
    batch = texts([[n, 1, 1] for n in range(4)] + [[n, 2] for n in range(4)])
    returns_BT = terminal(batch, 8.0, 4.0, 3.0, 1.0, 0.0, 0.0, 0.0, 1.0)
    found_BT, own_BT = agent.credit(returns_BT, batch), plain(agent, batch, returns_BT)
    torch.testing.assert_close(found_BT[:, 0], 2 * own_BT[:, 0])
    assert torch.equal((found_BT * batch.mask_BT)[:, 1:], (own_BT * batch.mask_BT)[:, 1:])


def test_what_the_environment_wrote_is_part_of_a_beginning():
    """The policy's tokens are the same, and the second text was answered in another way."""
    batch = texts([[1, 2], [1, 2]], positions=[[1, 3], [1, 3]])
    batch.tokens_BL[1, 2] = 7
    values = prefix_values(torch.tensor([1.0, 3.0]), batch, 2)
    assert values.tolist() == [[2, 2, 2, 1, 1], [2, 2, 2, 3, 3]]


def test_gigpo_by_hand():
    """At place 1 the first three texts stand behind token 1, the last one stands alone."""
    agent = GiGPO(make(group_size=4))
    batch = texts([[1, 2], [1, 3], [1, 3], [5, 3]])
    returns_BT = torch.tensor([[4.0, 3], [2, 1], [2, 2], [0, 9]])
    step_BT = agent.credit(returns_BT, batch) - plain(agent, batch, returns_BT)
    first = (8 / 3) ** 0.5
    wanted = [[2 / first, 1], [0, -1], [0, 0], [-2 / first, 0]]
    torch.testing.assert_close(step_BT, torch.tensor(wanted))


def test_gigpo_compares_within_a_group_and_a_place_alone():
    """The same texts with other returns in a second group change nothing in the first one, and a
    flat anchor gives 0."""
    agent = GiGPO(make(group_size=2))
    batch = texts([[1, 1], [1, 1], [1, 1], [1, 1]], prompt=(1,))
    returns_BT = torch.tensor([[1.0, 5], [3, 5], [100, 7], [100, 9]])
    step_BT = agent.credit(returns_BT, batch) - plain(agent, batch, returns_BT)
    half = 0.5**0.5
    wanted = [[-half, 0], [half, 0], [0, -half], [0, half]]
    torch.testing.assert_close(step_BT, torch.tensor(wanted))


# ---------------------------------------------------------------- resets


def seen_by(agent, batch):
    """The batch that an update learns from, and its first gradient."""
    batches, optimise = [], agent.optimise
    agent.optimise = lambda whole, make_loss: (batches.append(whole), optimise(whole, make_loss))[1]
    grads = first_step(agent, batch)[0]
    return batches[0], grads


def test_the_worst_text_of_each_group_is_played_on_where_the_policy_was_least_certain():
    agent = Resets(make("Reviews", tokens=16, reward="terminal"))
    batch = batch_of(agent, 300)
    returns_NG = earned(agent, batch)[:, 0].unflatten(0, (-1, 4))
    entropy_BT = agent.token_outputs(batch).entropy_BT
    found, seen = agent.resets(batch), set()
    assert [row // 4 for row, _ in found] == list(range(len(returns_NG)))
    for (row, place), returns in zip(found, returns_NG, strict=True):
        assert earned(agent, batch)[row, 0] == returns.min()
        own = entropy_BT[row, : int(batch.response_length_B[row])]
        assert own[place] == own.max()
        seen.add(place)
    assert len(seen) > 1


def test_random_resets_come_everywhere():
    agent = Resets(make(num_envs=64), place="random")
    batch = batch_of(agent, 1000)
    places = [place for _ in range(4) for _, place in agent.resets(batch)]
    assert set(places) == set(range(6))
    assert max(np.bincount(places)) < 2.2 * len(places) / 6


def test_continuations_are_groups_that_are_learned_from_behind_their_prefix_alone():
    """A gradient by hand: of the finished texts, and of the continuations' own tokens, with GRPO's
    advantages of what they scored. The KL is off, so these are the same at every token."""
    envs = make("Reviews", tokens=8, reward="terminal", kl="none")
    once = {"epochs": 1, "minibatches": 1, "max_grad_norm": 1e9}
    agent = moved(Resets, envs, place="random", batch_tokens=100, **once)
    batch, resets = batch_of(agent, 100), []
    agent.resets = lambda given, choose=agent.resets: resets.extend(choose(given)) or resets
    agent.updates = 3
    whole, grads = seen_by(agent, batch)
    resets.sort(key=lambda reset: reset[1])
    assert len(whole) == len(batch) + 4 * len(resets)
    episodes, prefixed = batch.unstack(), 0
    for episode, (row, place) in zip(
        whole.unstack()[len(batch) :], [r for r in resets for _ in range(4)], strict=True
    ):
        source = episodes[row]
        prefix = np.concatenate([source.prompt, source.response[:place]])
        np.testing.assert_array_equal(episode.prompt, prefix)
        assert len(episode.response) + place <= 8
        prefixed += place > 0
    assert prefixed > 4
    scores_NG = whole.score_B.unflatten(0, (-1, 4))
    spread_N1 = scores_NG.std(1, keepdim=True)
    rest_NG = scores_NG - scores_NG.mean(1, keepdim=True)
    wanted_B = torch.where(spread_N1 > 1e-5, rest_NG / spread_N1, 0.0).flatten()
    assert wanted_B[len(batch) :].abs().max() > 0.1
    for row, length in enumerate(whole.response_length_B.tolist()):
        found = whole.learned["advantage"][row, :length]
        torch.testing.assert_close(found, wanted_B[row].expand(length), atol=1e-4, rtol=1e-4)
    own = token_logprobs_by_text(agent.policy, whole)
    loss = -torch.stack([a * row.mean() for a, row in zip(wanted_B, own, strict=True)]).mean()
    assert_same(grads, gradient(loss, agent.policy), rtol=1e-3, atol=1e-5)
    shown = batch.learned["advantage"]
    assert torch.equal(shown, whole.learned["advantage"][: len(batch), : shown.shape[1]])
    assert (whole.version_B[len(batch) :] == 3).all()


def test_tokens_of_continuations_count_as_seen():
    """Texts of 6 tokens, one group of 4 slots: from place t on 4 continuations of 6 - t tokens."""
    agent = Resets(make(num_envs=4), place="random", batch_tokens=200)
    batch, resets = batch_of(agent, 200), []
    agent.resets = lambda given, choose=agent.resets: resets.extend(choose(given)) or resets
    before = agent.tokens_seen
    metrics = agent.update(batch)
    wanted = sum(4 * (6 - place) for _, place in resets)
    assert agent.tokens_seen - before == metrics["time/rollout_tokens"] == wanted > 0


# ---------------------------------------------------------------- each as a row of a grid

SUITES = ("reshaped", "resets")
MODULE = "benchmarks.suite.algorithms"


def rows():
    """The settings of each row of the suites that names an algorithm of theirs."""
    cells = [
        cell
        for name in SUITES
        for cell in read_grid(
            suite_file(str(ROOT / "benchmarks" / "suite" / name)), [MODULE]
        ).cells()
    ]
    found = {cell.row: cell.settings for cell in cells if ":" in cell.settings["algo"]}
    return [pytest.param(settings, id=row) for row, settings in found.items()]


@pytest.mark.parametrize("settings", rows())
def test_every_row_learns(settings):
    module, name = settings["algo"].split(":")
    assert module == MODULE
    options, agent = settings["options"], settings["agent"]
    envs = make(group_size=options["group_size"], task_seed=options["task_seed"])
    learner = getattr(algorithms, name)(envs, **(agent | {"batch_tokens": 96}))
    before = {key: weight.clone() for key, weight in learner.policy.state_dict().items()}
    texts_, metrics = [], []
    learner.learn(
        300, on_update=lambda found, episodes: (texts_.extend(episodes), metrics.append(found))
    )
    assert learner.updates >= 2
    assert all(np.isfinite(text.advantage).all() for text in texts_)
    assert max(abs(text.advantage).max() for text in texts_) > 0.1
    assert not same(learner.policy.state_dict(), before)
