"""Wrapped reward terms and the mixture that fades: their statistics against NumPy, and what an env
pays with them."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tasks import T, assert_equal, copied, make_vec, play, random_actions

from tokenenv.errors import InvalidArgument
from tokenenv.rewards.designs import make_terms
from tokenenv.rewards.progressive import progressive
from tokenenv.rewards.reward_sum import weight_now
from tokenenv.rewards.rule import Rule
from tokenenv.rewards.scaling import Clipped, PositionScaled, Scaled, Wrapper, line, updated_moments
from tokenenv.rewards.seen import FinishedTexts, States, Transitions
from tokenenv.rewards.segment import Segment
from tokenenv.rewards.shaping import Delta
from tokenenv.rewards.term import Context, RewardTerm
from tokenenv.rewards.terminal import Terminal
from tokenenv.rewards.token import Token
from tokenenv.rewards.uniform import Uniform
from tokenenv.types import Task, TokenSpec

LONGEST = 6


class Score(RewardTerm):
    """Pays the state's score."""

    name = "score"

    def reward(self, batch):
        return batch.after.score


class Placed(RewardTerm):
    """Places given rewards."""

    name = "placed"
    kind = "hindsight"

    def __init__(self, rewards):
        self.rewards = rewards

    def place(self, texts, max_new_tokens):
        return self.rewards


class Doubling(RewardTerm):
    """Two statistics of its own: 1, and how often it was asked; pays the second."""

    name = "score"
    asked = 0

    def statistics(self):
        return torch.tensor([1.0, self.asked])

    def save_statistics(self):
        return np.array([[self.asked]], np.float64)

    def load_statistics(self, saved):
        assert saved.shape == (1, 1)
        self.asked = int(saved[0, 0])

    def reward(self, batch):
        self.asked += 1
        seen = batch.statistics[self.name]
        assert seen.shape[1:] == (2,)
        assert batch.after.statistics[self.name].shape[1:] == (2,)
        return seen[:, 1]


def bound(term):
    task = Task(
        tokenizer=None,
        reference=object(),
        prompts=[],
        max_prompt_tokens=1,
        max_new_tokens=LONGEST,
        stop_token_ids=(1,),
    )
    term.bind(Context(TokenSpec(None, 9, 0, (1,), 1, LONGEST), task, torch.device("cpu"), 0.1))
    return term


def every(term):
    """The term and all that it wraps, the innermost last."""
    return (term, *term.wrapped())


def known_now(term, count):
    """The present statistics (count, p) of the term and of what it wraps, by name."""
    present = {one.name: one.statistics() for one in every(term)}
    return {name: s.expand(count, -1) for name, s in present.items() if s is not None}


def batch_of(term, rewards, steps=None, learning=None, statistics=None):
    """Transitions that `Score` pays `rewards` for, in texts that began with the term's present
    statistics, or with those given for a wrapper of `Score`."""
    rewards = torch.as_tensor(rewards, dtype=torch.float32)
    count = len(rewards)
    steps = torch.zeros(count, dtype=torch.int64) if steps is None else torch.as_tensor(steps)
    given = {} if statistics is None else {term.name: statistics.expand(count, -1)}
    known = known_now(term, count) | given
    before, after = States({}, steps, rewards, {}, known), States({}, steps + 1, rewards, {}, known)
    learning = (
        torch.ones(count, dtype=torch.bool) if learning is None else torch.as_tensor(learning)
    )
    none = torch.zeros(count, dtype=torch.bool)
    return Transitions(steps, before, after, none, none, none, learning=learning)


def texts_of(term, lengths, prefix_length, learning=True):
    """Texts of a one-token prompt and so many response tokens."""
    ids = [np.zeros(1 + length, np.int64) for length in lengths]
    return FinishedTexts(
        tokens=torch.zeros(len(ids), 1 + LONGEST, dtype=torch.int64),
        length=np.array([1 + length for length in lengths]),
        prompt_length=np.ones(len(ids), np.int64),
        prefix_length=np.array(prefix_length),
        score=None,
        ids=ids,
        statistics=known_now(term, len(ids)),
        learning=learning,
    )


# ---------------------------------------------------------------- statistics

seen = st.lists(
    st.integers(1, 9).flatmap(
        lambda count: st.tuples(
            arrays(np.float32, count, elements=st.floats(-100, 100, width=32)),
            arrays(np.int64, count, elements=st.integers(0, LONGEST - 1)),
            arrays(np.bool_, count),
        )
    ),
    min_size=1,
    max_size=5,
)


@given(seen)
def test_moments_are_those_of_everything_seen(batches):
    moments = torch.zeros(3, LONGEST, dtype=torch.float64)
    for batch in batches:
        moments = updated_moments(moments, *map(torch.from_numpy, batch))
    values, bins, mask = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    for index in range(LONGEST):
        mine = values[(bins == index) & mask].astype(np.float64)
        expected = [len(mine), mine.mean(), len(mine) * mine.var()] if len(mine) else [0, 0, 0]
        np.testing.assert_allclose(moments[:, index], expected, rtol=1e-9, atol=1e-9)


@given(seen)
@example([(np.array([1e-45, 0.0], np.float32), np.array([0, 0]), np.array([True, True]))])
def test_the_scale_is_the_deviation_of_the_tokens_learned_from(batches):
    term = bound(Scaled(Score()))
    for rewards, steps, mask in batches:
        term.reward(batch_of(term, rewards, steps, mask))
    values = np.concatenate([rewards[mask] for rewards, _, mask in batches]).astype(np.float64)
    std = values.std() if len(values) else 0.0
    least = max(1e-6 * abs(values.mean()), np.finfo(np.float32).tiny) if len(values) else 0.0
    np.testing.assert_allclose(term.statistics(), [std if std > least else 1.0], rtol=1e-5)


def test_the_scale_is_1_until_two_different_rewards_were_seen():
    term = bound(Scaled(Score()))
    for rewards in ([], [0.1], [0.1] * 1000):
        term.reward(batch_of(term, rewards))
        assert term.statistics().tolist() == [1.0]
    term.reward(batch_of(term, [0.2]))
    assert 0 < float(term.statistics()) < 1


def test_rewards_that_are_not_finite_teach_nothing_and_are_paid():
    term = bound(Scaled(Score()))
    assert term.reward(batch_of(term, [1.0, -torch.inf, 3.0])).tolist() == [1.0, -torch.inf, 3.0]
    assert term.statistics().tolist() == [1.0]
    assert term.reward(batch_of(term, [1.0, 5.0])).tolist() == [1.0, 5.0]
    np.testing.assert_allclose(term.statistics(), [np.std([1, 3, 1, 5])], rtol=1e-6)


@pytest.mark.parametrize("wrapper", [Scaled, PositionScaled])
def test_a_text_keeps_the_statistics_it_began_with_and_scoring_teaches_nothing(wrapper):
    term, rewards, steps = bound(wrapper(Score())), [1.0, 2.0, 5.0, 6.0], [0, 0, 1, 1]
    began = term.statistics()
    first = term.reward(batch_of(term, rewards, steps))
    assert not torch.equal(term.statistics(), began)
    torch.testing.assert_close(
        term.reward(batch_of(term, rewards, steps, [False] * 4, began)), first, rtol=0, atol=0
    )
    now = term.statistics()
    batch = batch_of(term, rewards, steps)
    batch.learning = None
    assert not torch.equal(term.reward(batch), first)
    assert torch.equal(term.statistics(), now)


def test_it_is_divided_and_never_shifted():
    term = bound(Scaled(Score()))
    term.reward(batch_of(term, [10.0, 12.0, 20.0]))
    scale = np.std([10.0, 12.0, 20.0])
    np.testing.assert_allclose(
        term.reward(batch_of(term, [0.0, 8.0, -8.0])), np.array([0, 8, -8]) / scale, rtol=1e-6
    )


def test_hindsight_terms_are_learned_from_on_their_payable_tokens():
    placed = torch.arange(2.0 * LONGEST).view(2, LONGEST) ** 2
    term = bound(Scaled(Placed(placed)))
    torch.testing.assert_close(
        term.place(texts_of(term, [3, 6], [0, 2], learning=False), LONGEST), placed
    )
    torch.testing.assert_close(term.place(texts_of(term, [3, 6], [0, 2]), LONGEST), placed)
    scale = np.std(np.concatenate([placed[0, :3], placed[1, 2:]]))
    np.testing.assert_allclose(term.statistics(), [scale], rtol=1e-6)
    np.testing.assert_allclose(
        term.place(texts_of(term, [3, 6], [0, 2]), LONGEST), placed / scale, rtol=1e-6
    )


# ------------------------------------------------------------------ position


def drifting(rng, count=400):
    """Rewards whose mean and deviation change along the text."""
    steps = rng.integers(0, LONGEST, count)
    return (2 + 0.5 * steps + (0.3 + 0.2 * steps) * rng.normal(size=count)).astype(
        np.float32
    ), steps


def fitted(rewards, steps):
    """a, c and d by NumPy."""
    log_p = np.log((steps + 1) / LONGEST)
    at = np.unique(steps)
    std, count = (
        np.array([f(rewards[steps == t].astype(np.float64)) for t in at]) for f in (np.std, len)
    )
    c, d = np.polyfit(np.log((at + 1) / LONGEST), std, 1, w=np.sqrt(count))
    return np.polyfit(log_p, rewards.astype(np.float64), 1)[0], c, d


def test_both_lines_are_the_least_squares_fits():
    term, (rewards, steps) = bound(PositionScaled(Score())), drifting(np.random.default_rng(0))
    for part in np.array_split(np.arange(400), 7):
        term.reward(batch_of(term, rewards[part], steps[part]))
    a, m, c, d, least = term.statistics().double().numpy()
    np.testing.assert_allclose([a, c, d], fitted(rewards, steps), rtol=1e-5)
    within = np.sqrt(
        np.mean([(rewards[i] - rewards[steps == steps[i]].mean()) ** 2 for i in range(400)])
    )
    np.testing.assert_allclose(least, 0.1 * within, rtol=1e-5)
    log_p = np.log((steps + 1) / LONGEST)
    expected = (rewards - a * (log_p - m)) / np.maximum(c * log_p + d, least)
    np.testing.assert_allclose(
        term.reward(batch_of(term, rewards, steps)), expected, rtol=1e-4, atol=1e-5
    )


@given(st.integers(0, 200), st.integers(1, 60))
def test_what_is_subtracted_adds_up_to_nothing_over_the_longest_text(seed, count):
    term = bound(PositionScaled(Score()))
    term.reward(batch_of(term, *drifting(np.random.default_rng(seed), count)))
    zeros = term.reward(batch_of(term, np.zeros(LONGEST), np.arange(LONGEST)))
    np.testing.assert_allclose(zeros.sum(), 0.0, atol=1e-4 * max(1.0, float(zeros.abs().sum())))


@given(st.integers(0, 200), st.integers(0, 60))
def test_the_divisor_is_positive_so_a_larger_reward_is_always_paid_more(seed, count):
    rng = np.random.default_rng(seed)
    term = bound(PositionScaled(Score()))
    term.reward(
        batch_of(
            term,
            rng.normal(size=count) * rng.exponential(3, count),
            rng.integers(0, LONGEST, count),
        )
    )
    paid = [
        term.reward(batch_of(term, np.full(LONGEST, x), np.arange(LONGEST), [False] * LONGEST))
        for x in (0.0, 1.0)
    ]
    assert (paid[1] > paid[0]).all()
    assert paid[1].isfinite().all()


def test_without_drift_it_is_a_division():
    """Rewards of mean 3 and deviation 2 everywhere are halved and not shifted, early tokens too."""
    term, steps = bound(PositionScaled(Score())), np.tile(np.arange(LONGEST), 2)
    rewards = np.where(np.arange(2 * LONGEST) < LONGEST, 1.0, 5.0)
    assert term.reward(batch_of(term, rewards, steps)).tolist() == rewards.tolist()
    np.testing.assert_allclose(term.reward(batch_of(term, rewards, steps)), rewards / 2, rtol=1e-5)


def test_rewards_fixed_by_their_position_are_shifted_and_not_divided():
    term, steps = bound(PositionScaled(Score())), np.tile(np.arange(LONGEST), 3)
    rewards = 2 + 0.7 * np.log((steps + 1) / LONGEST)
    term.reward(batch_of(term, rewards, steps))
    np.testing.assert_allclose(
        term.reward(batch_of(term, rewards, steps)), np.full(len(steps), rewards.mean()), rtol=1e-4
    )


def test_placed_rewards_are_normalised_by_position_as_others_are():
    rng = np.random.default_rng(3)
    rows = torch.from_numpy(drifting(rng, 5 * LONGEST)[0]).view(5, LONGEST)
    placing, paying = bound(PositionScaled(Placed(rows))), bound(PositionScaled(Score()))
    texts = texts_of(placing, [LONGEST] * 5, [0] * 5)
    placing.place(texts, LONGEST)
    flat, steps = rows.flatten(), np.tile(np.arange(LONGEST), 5)
    paying.reward(batch_of(paying, flat, steps))
    torch.testing.assert_close(placing.statistics(), paying.statistics())
    texts = replace(texts, statistics={placing.name: placing.statistics().expand(5, -1)})
    torch.testing.assert_close(
        placing.place(texts, LONGEST).flatten(), paying.reward(batch_of(paying, flat, steps))
    )


def test_a_line_through_one_place_is_level():
    y = torch.tensor([1.0, 2.0, 9.0], dtype=torch.float64)
    slope, intercept = line(
        torch.log(torch.tensor([0.1, 0.7, 1.0]).double()), y, torch.tensor([0.0, 7.0, 0.0]).double()
    )
    assert (float(slope), float(intercept)) == (0.0, 2.0)


# ------------------------------------------------------------ clip, compose


def test_clipped_bounds_each_token():
    term = bound(Clipped(Score(), -0.5, 2.0))
    assert term.reward(batch_of(term, [-3.0, -0.5, 0.0, 1.0, 9.0])).tolist() == [
        -0.5,
        -0.5,
        0.0,
        1.0,
        2.0,
    ]
    placed = bound(Clipped(Placed(torch.tensor([[-3.0, 1.0]])), -1.0, 0.5))
    assert placed.place(texts_of(bound(Scaled(Score())), [2], [0]), 2).tolist() == [[-1.0, 0.5]]


def test_each_wrapper_sees_its_own_statistics_alone():
    term = bound(Clipped(Scaled(PositionScaled(Doubling())), -50, 50))
    clipped, scaled, position, doubling = every(term)
    names = ["score", "score/inner", "score/inner/inner", "score/inner/inner/inner"]
    assert [one.name for one in every(term)] == names
    assert clipped.statistics() is None
    assert [len(one.statistics()) for one in (scaled, position, doubling)] == [1, 5, 2]
    for _ in range(4):
        term.reward(batch_of(term, [0.0] * LONGEST, np.arange(LONGEST)))
    assert doubling.statistics().tolist() == [1.0, 4.0]
    scale = float(scaled.statistics())
    assert scale != 1
    plain = bound(PositionScaled(Doubling()))
    for one, other in zip(every(plain), (position, doubling), strict=True):
        one.load_statistics(other.save_statistics())
    expected = plain.reward(batch_of(plain, [0.0] * LONGEST, np.arange(LONGEST))) / scale
    torch.testing.assert_close(
        term.reward(batch_of(term, [0.0] * LONGEST, np.arange(LONGEST))), expected
    )


@pytest.mark.parametrize(
    "make", [lambda: Scaled(Score()), lambda: Clipped(Scaled(PositionScaled(Doubling())), -9, 9)]
)
def test_saved_statistics_go_on_where_they_were(make):
    term, other, rng = bound(make()), bound(make()), np.random.default_rng(1)
    term.reward(batch_of(term, *drifting(rng, 20)))
    saved = [one.save_statistics() for one in every(term)]
    kept = copy.deepcopy(saved)
    for one, values in zip(every(other), saved, strict=True):
        if values is not None:
            one.load_statistics(values)
    more = drifting(rng, 20)
    torch.testing.assert_close(
        term.reward(batch_of(term, *more)), other.reward(batch_of(other, *more)), rtol=0, atol=0
    )
    assert_equal(known_now(term, 1), known_now(other, 1))
    for values, before in zip(saved, kept, strict=True):
        np.testing.assert_array_equal(values, before)


def test_one_wrapped_term_serves_several_envs():
    term = Scaled(Doubling())
    first, second = (bound(make_terms(term)["score"]) for _ in range(2))
    first.reward(batch_of(first, [1.0, 2.0]))
    assert (first.term.asked, second.term.asked, term.term.asked) == (1, 0, 0)
    assert not second.save_statistics().any()


def test_names_and_weights_are_the_wrapped_terms_unless_given():
    assert Scaled("delta").name == "delta"
    assert Clipped(Scaled(Uniform()), 0, 1).name == "uniform"
    token = Token()
    token.weight = 0.3
    assert Scaled(token).weight == 0.3
    named = make_terms({"mine": (Scaled(Segment()), 2.0)})["mine"]
    assert (named.name, named.weight) == ("mine", 2.0)


@pytest.mark.parametrize("term", [Delta(), Terminal(), Segment(), Uniform(), Score()])
def test_what_is_promised(term):
    """A scale keeps what the term does for the gradient, not the return; the others keep
    neither."""
    scaled = Scaled(term)
    assert scaled.preserves_gradient is term.preserves_gradient
    assert scaled.has_potential is term.has_potential
    assert scaled.preserves_return is False
    for broken in (Clipped(term, -1, 1), PositionScaled(term)):
        assert (broken.has_potential, broken.preserves_return, broken.preserves_gradient) == (
            False,
            False,
            False,
        )
    for wrapped in (scaled, broken):
        for attribute in ("kind", "needs", "pays_score", "models"):
            assert getattr(wrapped, attribute) == getattr(term, attribute)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Clipped(Score(), 1.0, 1.0),
            "low=1.0 and high=1.0 are not allowed; low must be less than high",
        ),
        (lambda: Clipped(Score(), np.nan, 1.0), "low=nan and high=1.0 are not allowed"),
        (lambda: Scaled(progressive()), "Scaled takes one term and .* has 2; wrap each of them"),
        (lambda: Scaled("tokn"), "reward='tokn' is not known"),
        (lambda: Scaled(3), "reward=3 must be a design's name"),
    ],
)
def test_what_cannot_be_wrapped_is_named(make, message):
    with pytest.raises(InvalidArgument, match=message):
        make()


# --------------------------------------------------------------- progressive


@pytest.mark.parametrize("start", [0, 50])
def test_one_design_fades_into_the_other(start):
    terms = make_terms(progressive("token", Uniform(), tokens=200, start=start))
    for seen, share in (
        (0, 0.0),
        (start, 0.0),
        (start + 50, 0.25),
        (start + 200, 1.0),
        (10_000, 1.0),
    ):
        assert weight_now(terms["token"].weight, seen) == 1 - share
        assert weight_now(terms["uniform"].weight, seen) == share


def test_its_schedules_can_be_copied_and_pickled():
    for mapping in (
        copy.deepcopy(progressive(tokens=10)),
        pickle.loads(pickle.dumps(progressive(tokens=10))),
    ):
        assert [weight(4) for _, weight in mapping.values()] == [0.6, 0.4]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((), {"tokens": 0}, "tokens=0 is not allowed; it must be 1 or more"),
        ((), {"start": -1}, "start=-1 is not allowed; it must be 0 or more"),
        (("delta", Delta()), {}, "first and second are both called 'delta'"),
    ],
)
def test_bad_passages_are_named(arguments, options, message):
    with pytest.raises(InvalidArgument, match=message):
        progressive(*arguments, **options)


def test_an_env_pays_one_mixture_for_a_whole_text():
    """Terminal and delta fade into one another; both add up to the score, so every mixture does."""
    envs = make_vec(
        4, "SameStep", reward=progressive(tokens=60, start=8), kl="none", scorer="sequence"
    )
    shares = []
    for episode in play(envs, steps=40):
        dense = np.array([info["reward_terms"]["delta"] for info in episode.infos])
        score, end = episode.infos[-1]["score"], episode.infos[-1]["reward_terms"]["terminal"]
        whole = envs.unwrapped.score_episodes(
            [episode.prompt], [episode.response], weights={"delta": 1.0}
        ).terms["delta"]
        np.testing.assert_allclose(dense * score, (score - end) * whole[0, : len(dense)], atol=1e-4)
        shares.append(1 - end / score)
    assert shares[0] == 0
    assert any(0.1 < share < 0.9 for share in shares)
    np.testing.assert_allclose(shares[-1], 1.0, atol=1e-4)


# ------------------------------------------------------------------ in an env

WRAPPED = {
    "scaled": lambda: Scaled("token"),
    "by position": lambda: PositionScaled("token"),
    "hindsight": lambda: Clipped(Scaled("uniform"), -0.8, 0.8),
    "memory": lambda: {"mine": Scaled(Segment(3.4)), "shares": PositionScaled("uniform")},
    "three": lambda: Clipped(Scaled(PositionScaled("delta")), -1.0, 1.0),
}


def make(reward, num_envs=4, **options):
    return make_vec(num_envs, "SameStep", reward=reward, kl="none", **options)


@pytest.mark.parametrize("name", WRAPPED)
def test_stepping_pays_what_scoring_says_while_nothing_is_learned(name, monkeypatch):
    envs = make(WRAPPED[name]())
    play(envs, steps=25, seed=1)
    monkeypatch.setattr("tokenenv.rewards.scaling.updated_moments", lambda moments, *seen: moments)
    episodes = play(envs, steps=30)
    scores = envs.unwrapped.score_episodes(
        [e.prompt for e in episodes], [e.response for e in episodes]
    )
    for row, episode in enumerate(episodes):
        np.testing.assert_allclose(
            scores.step_rewards[row, : len(episode.rewards)], episode.rewards, atol=1e-4, rtol=1e-5
        )
        np.testing.assert_allclose(
            scores.token_rewards[row], episode.infos[-1]["token_rewards"], atol=1e-4, rtol=1e-5
        )


@pytest.mark.parametrize("design", ["token", "uniform"])
def test_each_text_is_divided_by_the_deviation_before_it(design):
    """What a text earns is what it earns unscaled, divided by one number; the number changes from
    text to text."""
    scaled, plain = (play(make(reward), steps=40) for reward in (Scaled(design), design))
    scales = []
    for one, other in zip(scaled, plain, strict=True):
        assert one.response == other.response
        raw, paid = (episode.infos[-1]["token_rewards"] for episode in (other, one))
        scales.append(np.abs(raw).sum() / np.abs(paid).sum())
        np.testing.assert_allclose(paid * scales[-1], raw, atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(scales[:2], 1.0, rtol=1e-6)
    assert len(np.unique(np.round(scales, 5))) > 5


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_an_env_teaches_every_token_once(mode):
    """Also in the rows that took no token: NEXT_STEP's resets."""
    kept, rewards = [], []
    envs, plain = (
        make_vec(3, mode, reward=reward, kl="none") for reward in (Scaled("token"), "token")
    )
    rng = np.random.default_rng(0)
    ended = np.zeros(3, bool)
    for each in (envs, plain):
        each.reset(seed=0)
    for _ in range(25):
        actions = random_actions(rng, envs)
        envs.step(actions)
        _, reward, terminated, truncated, _ = plain.step(actions)
        kept, rewards = [*kept, ~ended], [*rewards, reward]
        ended = (terminated | truncated) & (mode == "NextStep")
    expected = np.std(np.stack(rewards)[np.stack(kept)].astype(np.float64))
    learned = envs.unwrapped.save_state()["engine"]["learned"]["token"]
    np.testing.assert_allclose(np.sqrt(learned[2] / learned[0]), expected, rtol=1e-6)
    assert learned[0] == np.stack(kept).sum()


@pytest.mark.parametrize("name", WRAPPED)
def test_saved_texts_go_on_with_their_statistics_and_later_texts_with_what_was_learned(name):
    envs, other, rng = make(WRAPPED[name]()), make(WRAPPED[name]()), np.random.default_rng(1)
    envs.reset(seed=3)
    for _ in range(12):
        envs.step(random_actions(rng, envs))
    other.unwrapped.load_state(envs.unwrapped.save_state())
    for _ in range(20):
        actions = random_actions(rng, envs)
        assert_equal(
            *(copied(dict(enumerate(env.step(actions)))) for env in (envs, other)), tolerance=2e-5
        )


def test_the_potential_is_divided_as_the_rewards_are():
    """A text's rewards add up to (score - Phi(prompt)) / s, with the potential that the env
    reports."""
    envs = make(Scaled("delta"), scorer="sequence")
    for episode in play(envs, steps=40):
        potentials = [float(info["potential"]) for info in episode.infos[:-1]]
        np.testing.assert_allclose(np.diff(potentials), episode.rewards[1:-1], atol=1e-5)
    envs.reset(seed=0)
    scale = envs.unwrapped.save_state()["engine"]["statistics"]["delta"][:, 0]
    assert (scale != 1).all()
    _, info = envs.reset(seed=0)
    plain = make("delta", scorer="sequence")
    np.testing.assert_allclose(
        info["potential"] * scale, plain.reset(seed=0)[1]["potential"], rtol=1e-5
    )


def test_a_copied_row_goes_on_as_its_source():
    envs, rng = (
        make_vec(4, "Disabled", reward=Scaled(Segment(3.4)), kl="none"),
        np.random.default_rng(0),
    )
    envs.reset(seed=0)
    envs.step(random_actions(rng, envs, stop=0.0))
    envs.unwrapped.fork([0, 0], [1, 2])
    for _ in range(T - 1):
        action = np.full(4, random_actions(rng, envs, stop=0.0)[0])
        _, reward, *_ = envs.step(action)
        np.testing.assert_allclose(reward[1:3], reward[0], atol=1e-5)


def test_an_unscored_text_that_is_paid_nothing_teaches_nothing():
    envs = make_vec(
        4, "SameStep", reward=Scaled("uniform"), kl="none", score_truncated=False, stops=()
    )
    envs.reset(seed=0)
    for _ in range(20):
        envs.step(random_actions(np.random.default_rng(0), envs))
    assert envs.unwrapped.save_state()["engine"]["learned"]["uniform"][0] == 0


def test_what_a_wrapped_term_carries_and_learns_stands_under_its_own_name():
    envs = make({"mine": Scaled(PositionScaled(Segment(3.4))), "plain": Segment(3.4)})
    envs.reset(seed=0)
    for _ in range(3):
        envs.step(random_actions(np.random.default_rng(0), envs, stop=0.0))
    saved = envs.unwrapped.save_state()["engine"]
    assert set(saved["memory"]) == {"mine/inner/inner", "plain"}
    assert_equal(saved["memory"]["mine/inner/inner"], saved["memory"]["plain"])
    assert {name: array.shape for name, array in saved["statistics"].items()} == {
        "mine": (4, 1),
        "mine/inner": (4, 5),
    }
    learned = {name: array.shape for name, array in saved["learned"].items()}
    assert learned == {"mine": (3, 1), "mine/inner": (3, T)}


def test_a_wrapped_term_is_followed_and_not_copied():
    """Binding may change a term's kind, and what it promises."""
    term = Scaled("token")
    term.term.kind, term.term.preserves_gradient = "hindsight", False
    assert (term.kind, term.preserves_gradient) == ("hindsight", False)


def test_two_terms_of_one_name_are_named_where_one_is_wrapped():
    with pytest.raises(InvalidArgument, match="reward= has a term called 'a/inner', which is the"):
        make({"a": Scaled("token"), "a/inner": "delta"})


def test_what_a_wrapped_term_needs_is_asked_for_in_the_name_it_was_given():
    with pytest.raises(InvalidArgument, match="reward='mine' needs a token-classification"):
        make({"mine": Clipped(Scaled("token"), 0, 1)}, scorer="sequence")


def test_an_interrupted_step_teaches_no_wrapped_term():
    """The rule raises after the wrapped terms before it have learned from the step."""

    def angry(prompt, response):
        raise RuntimeError("no")

    reward = {"mine": Scaled(PositionScaled("token")), "rule": Rule(angry, on="tokens")}
    envs, rng = make(reward), np.random.default_rng(0)
    envs.reset(seed=0)
    envs.step(random_actions(rng, envs, stop=0.0))
    before = envs.unwrapped.save_statistics()
    assert set(before) == {"mine", "mine/inner"}
    with pytest.raises(RuntimeError, match="no"):
        envs.step(np.full(4, 1))
    envs.reset(seed=0)
    assert_equal(envs.unwrapped.save_statistics(), before)
    with pytest.raises(RuntimeError, match="no"):
        envs.unwrapped.score_episodes([[5]], [[6, 1]], played=True)
    assert_equal(envs.unwrapped.save_statistics(), before)


def test_a_wrapper_that_uses_the_old_name_is_told_the_new_one():
    class Old(Wrapper):
        def own_statistics(self):
            return None

    with pytest.raises(InvalidArgument, match="Old defines own_statistics, which is called stat"):
        make(Old("token"))


class Halved(Wrapper):
    """A wrapper of one's own."""

    def change(self, rewards, step, own):
        return rewards / 2


def test_a_wrapper_of_ones_own_keeps_nothing_unless_it_says_so():
    envs = make_vec(4, "SameStep", reward=Halved("delta"), kl="none", scorer="sequence")
    term = envs.unwrapped._engine.rewards.terms["delta"]
    assert not term.has_potential
    assert term.preserves_return is term.preserves_gradient is False
    plain = make_vec(4, "SameStep", reward="delta", kl="none", scorer="sequence")
    for one, other in zip(play(envs), play(plain), strict=True):
        np.testing.assert_allclose(one.rewards, np.array(other.rewards) / 2, atol=1e-6)
