"""Reward terms on hand-made transitions: each number can be checked by eye."""

import math
from dataclasses import replace

import numpy as np
import pytest
import tasks
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenenv.errors import InvalidArgument
from tokenenv.rewards.designs import DESIGNS, make_terms
from tokenenv.rewards.kl import PolicyKL, ReferenceKL, kl_estimate
from tokenenv.rewards.reward_sum import RewardSum, weight_now
from tokenenv.rewards.rule import Rule, TokenRule
from tokenenv.rewards.seen import FinishedTexts, States, Transitions
from tokenenv.rewards.shaping import Delta
from tokenenv.rewards.term import Context, RewardTerm
from tokenenv.rewards.terminal import MissingEOS, Terminal
from tokenenv.rewards.token import Token
from tokenenv.rewards.uniform import Uniform
from tokenenv.types import Scorer, Task, TokenSpec

T = 4
SPEC = TokenSpec(None, 9, 0, (1,), 3, T)


class Trunk:
    """A stand-in for a model: only its identity counts."""

    slots = None


TRUNK = Trunk()


def vowels(prompt, response):
    return sum(map(response.count, "aeiou"))


def parts(*, per_token=True, scorer=True, reference=True):
    head = Scorer(TRUNK, lambda states: states[:, 0] * 10, per_token) if scorer else None
    task = Task(
        tokenizer=None,
        reference=object() if reference else None,
        prompts=[],
        max_prompt_tokens=3,
        max_new_tokens=T,
        stop_token_ids=(1,),
        scorer=head,
    )
    return Context(SPEC, task, torch.device("cpu"), kl_coef=0.1)


def states(score, hidden=None):
    values = torch.tensor(score)
    return States(
        {TRUNK: torch.tensor(hidden) if hidden else values[:, None]},
        torch.tensor([1, 1, 3]),
        values,
    )


def three_rows(**changes):
    """Row 0 goes on, row 1 terminates, row 2 is cut."""
    fields = {
        "tokens": torch.tensor([5, 1, 6]),
        "before": states([0.5, 1.0, 2.0]),
        "after": states([0.75, 3.0, -1.0], [[0.1], [0.2], [0.3]]),
        "terminated": torch.tensor([False, True, False]),
        "truncated": torch.tensor([False, False, True]),
        "scored": torch.tensor([False, True, True]),
        "ref_logprob": torch.tensor([-1.0, -2.0, -3.0]),
        "logprob": torch.tensor([-0.5, -2.0, -1.0]),
        "finished": finished(),
        "finished_at": torch.tensor([1, 2]),
    }
    return Transitions(**{**fields, **changes})


def finished():
    """[7 | 5 1] and [7 7 | 5 6 5 6], the second with a prefix of one token."""
    ids = [np.array([7, 5, 1]), np.array([7, 7, 5, 6, 5, 6])]
    tokens = torch.tensor([[7, 5, 1, 0, 0, 0], [7, 7, 5, 6, 5, 6]])
    return FinishedTexts(
        tokens=tokens,
        length=np.array([3, 6]),
        prompt_length=np.array([1, 2]),
        prefix_length=np.array([0, 1]),
        score=torch.tensor([3.0, -1.0]),
        ids=ids,
    )


def test_terminal_pays_the_score_where_it_is_due():
    assert Terminal().reward(three_rows()).tolist() == [0.0, 3.0, -1.0]
    unscored = three_rows(scored=torch.tensor([False, True, False]))
    assert Terminal().reward(unscored).tolist() == [0.0, 3.0, 0.0]


def test_missing_eos_is_paid_for_scored_cuts_only():
    assert MissingEOS().reward(three_rows()).tolist() == [0.0, 0.0, -1.0]
    assert MissingEOS().reward(three_rows(scored=torch.tensor([False, True, False]))).tolist() == [
        0.0,
        0.0,
        0.0,
    ]


def test_token_reads_the_state_after_the_token():
    term = Token()
    term.bind(parts())
    torch.testing.assert_close(term.reward(three_rows()), torch.tensor([1.0, 2.0, 3.0]))


def test_delta_is_the_difference_of_scores_and_its_potential_the_score():
    assert Delta().reward(three_rows()).tolist() == [0.25, 2.0, -3.0]
    assert Delta().potential(states([0.75, 3.0, -1.0])).tolist() == [0.75, 3.0, -1.0]


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8))
def test_delta_telescopes(scores):
    """The sum over a text is its score less the prompt's."""
    values, steps = torch.tensor(scores, dtype=torch.float64), torch.arange(len(scores) - 1)
    batch = three_rows(
        before=States({}, steps, values[:-1]), after=States({}, steps + 1, values[1:])
    )
    torch.testing.assert_close(Delta().reward(batch).sum(), values[-1] - values[0])


def test_uniform_spreads_the_score_over_the_tokens_that_may_be_paid():
    expected = torch.tensor([[1.5, 1.5, 0, 0], [0, -1 / 3, -1 / 3, -1 / 3]])
    torch.testing.assert_close(Uniform().place(finished(), T), expected)


def test_kl_terms():
    assert ReferenceKL().reward(three_rows()).tolist() == [-1.0, -2.0, -3.0]
    assert PolicyKL().reward(three_rows()).tolist() == [-0.5, 0.0, -2.0]
    assert PolicyKL("k2").reward(three_rows()).tolist() == [-0.125, 0.0, -2.0]
    torch.testing.assert_close(
        PolicyKL("k3").reward(three_rows()), -torch.tensor([0.1065307, 0.0, 1.1353353])
    )
    assert PolicyKL("k1", clamp=0.75).reward(three_rows()).tolist() == [-0.5, 0.0, -0.75]


def test_reference_half_plus_learners_half_is_k1():
    batch, beta = three_rows(), 0.3
    whole = beta * PolicyKL("k1").reward(batch)
    torch.testing.assert_close(beta * ReferenceKL().reward(batch) - beta * batch.logprob, whole)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_estimate_the_kl_without_bias(estimator):
    """Their mean under pi, by enumeration, is KL(pi || pi_ref); k2's is not."""
    pi, ref = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.3, 0.6])
    true = (pi * (pi / ref).log()).sum()
    torch.testing.assert_close((pi * kl_estimate((pi / ref).log(), estimator)).sum(), true)
    assert abs((pi * kl_estimate((pi / ref).log(), "k2")).sum() - true) > 0.01


def test_rule_on_token_ids_is_paid_at_the_end():
    rule = Rule(lambda prompt, response: 10 * len(prompt) + len(response), on="tokens")
    assert rule.reward(three_rows()).tolist() == [0.0, 12.0, 24.0]
    assert rule.reward(three_rows(finished=None, finished_at=None)).tolist() == [0.0, 0.0, 0.0]
    assert rule.reward(three_rows(scored=torch.tensor([False, True, False]))).tolist() == [
        0.0,
        12.0,
        0.0,
    ]


def test_token_rule_places_one_number_on_each_token():
    rule = TokenRule(lambda prompt, response: [float(token) for token in response], on="tokens")
    assert rule.place(finished(), T).tolist() == [[5, 1, 0, 0], [5, 6, 5, 6]]


def test_placed_rewards_spare_the_prefix_and_the_unscored():
    class Everywhere(RewardTerm):
        kind = "hindsight"
        pays_score = True

        def place(self, texts, max_new_tokens):
            return torch.ones(2, max_new_tokens)

    rewards = RewardSum({"everywhere": Everywhere()}, T)
    weights = {"everywhere": torch.tensor([1.0, 2.0])}
    placed = rewards.placed(replace(finished(), scored=torch.tensor([True, True])), weights)
    assert placed["everywhere"].tolist() == [[1, 1, 0, 0], [0, 2, 2, 2]]
    placed = rewards.placed(replace(finished(), scored=torch.tensor([False, True])), weights)
    assert placed["everywhere"].tolist() == [[0, 0, 0, 0], [0, 2, 2, 2]]


def test_a_weight_of_zero_pays_nothing_even_where_the_reference_says_never():
    batch = three_rows(ref_logprob=torch.tensor([-torch.inf, -2.0, -3.0]))
    paid = RewardSum({"kl": ReferenceKL()}, T).paid(batch, {"kl": torch.tensor([0.0, 0.0, 0.5])})
    assert paid["kl"].tolist() == [0.0, 0.0, -1.5]


def test_designs_are_found_by_name_term_or_mapping():
    for name in DESIGNS:
        assert list(make_terms(name)) == (
            ["terminal", "delta"] if name == "progressive" else [name]
        )
    terms = make_terms({"dense": "token", "end": ("terminal", 0.5), "rule": Rule(vowels)})
    assert list(terms) == ["dense", "end", "rule"]
    assert [weight_now(term.weight, 0) for term in terms.values()] == [1.0, 0.5, 1.0]


def test_schedules_are_asked_with_the_tokens_seen():
    terms = make_terms({"token": ("token", lambda seen: 1.0 - seen / 100)})
    assert weight_now(terms["token"].weight, 25) == 0.75


def test_one_term_serves_several_envs():
    """Binding works on a copy, so the second env does not take the first one's term away."""
    term = Token()
    first, second = make_terms(term)["token"], make_terms(term)["token"]
    first.bind(parts())
    assert first.models == (TRUNK,)
    assert second.models == ()


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("tokn", "reward='tokn' is not known. Did you mean 'token'"),
        ({"kl": "token"}, "the term name 'kl' is taken; use kl= and kl_coef= instead"),
        ({"a": ("token", "much")}, "the weight of 'a' must be a finite number or a schedule"),
        ({"a": ("token", math.nan)}, "the weight of 'a' must be a finite number"),
        ({"mix": ({"a": ("terminal", "high")}, 0.5)}, "the weight of 'a' must be a finite number"),
        (
            {"a": ("terminal", 1, 2)},
            r"reward= has a tuple of 3 at 'a'; allowed: \(design, weight\)",
        ),
        (
            3,
            "reward=3 must be a design's name, a RewardTerm, a function of prompt and response, or",
        ),
        (Token, r"reward=Token is a class; give an object of it, Token\(...\)"),
    ],
)
def test_bad_rewards_are_named(reward, message):
    with pytest.raises(InvalidArgument, match=message):
        make_terms(reward)


@pytest.mark.parametrize(
    ("term", "lacking", "message"),
    [
        (Token(), {"per_token": False}, "reward='token' needs a token-classification reward model"),
        (Terminal(), {"scorer": False}, "reward='terminal' needs a reward model"),
        (ReferenceKL(), {"reference": False}, "reward='kl' needs a reference"),
        (Rule(vowels), {}, "reward='rule' needs a tokenizer"),
        (Rule(vowels, dense=True), {}, "reward='rule' needs a tokenizer"),
    ],
)
def test_what_a_term_needs_is_named(term, lacking, message):
    with pytest.raises(InvalidArgument, match=message):
        term.bind(parts(**lacking))


def test_numpy_numbers_are_weights():
    assert weight_now(make_terms({"a": ("terminal", np.float32(0.5))})["a"].weight, 0) == 0.5


class Endless(RewardTerm):
    """Worth -inf in every way."""

    name, has_potential = "endless", True

    def __init__(self, kind):
        self.kind = kind

    def reward(self, batch):
        return torch.full(batch.tokens.shape, -torch.inf)

    def place(self, texts, max_new_tokens):
        return torch.full((len(texts.ids), max_new_tokens), -torch.inf)

    def potential(self, states):
        return torch.full(states.step.shape, -torch.inf)


@pytest.mark.parametrize("kind", ["causal", "hindsight"])
def test_a_weight_of_0_is_off_whatever_the_term_is_worth(kind):
    envs = tasks.make_vec(4, "SameStep", reward={"off": (Endless(kind), 0.0)}, kl="none")
    for episode in tasks.play(envs, steps=12):
        assert all(reward == 0 for reward in episode.rewards)
        assert all(info["potential"] == 0 for info in episode.infos)


def test_terms_that_read_log_pi_need_actions_that_carry_it():
    with pytest.raises(
        InvalidArgument,
        match="reward term 'p' reads log pi, which actions carry only with kl='policy'",
    ):
        tasks.make_vec(2, reward={"p": PolicyKL("k1")})


@pytest.mark.parametrize(("estimator", "biased"), [("k1", False), ("k2", True), ("k3", True)])
def test_estimators_that_follow_another_gradient_are_known_to_agents(estimator, biased):
    envs = tasks.make_vec(2, reward="delta", kl="policy", kl_estimator=estimator)
    assert envs.unwrapped.biased_terms == (("kl",) if biased else ())
