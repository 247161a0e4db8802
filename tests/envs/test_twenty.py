"""Twenty-v0: answers are true of one number, nothing else tells it, and the value of a question is
that of all ways in which a text can go on."""

import math
from collections import Counter, defaultdict
from functools import cache
from itertools import product

import numpy as np
import pytest
import tasks
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenenv.check import check_vector_env
from tokenenv.envs.tasks import twenty
from tokenenv.envs.tasks.twenty import BELOW, IS, NO, RIGHT, WHAT, WORDS, WRONG, YES, Thinker
from tokenenv.errors import InvalidArgument
from tokenenv.turns import Segment, TextSoFar

ID = "tokenenv/Twenty-v0"
thinker = cache(lambda numbers=20: Thinker(numbers, "cpu"))
words = st.lists(st.integers(0, len(WORDS) + 19), max_size=8)


def number(n):
    """The word of a number."""
    return len(WORDS) + n - 1


def text(segments, seed=0):
    return TextSoFar([0], [Segment(*segment) for segment in segments], seed=seed)


def play(seed, turns, numbers=20, prefix=()):
    """What is written behind turns that end with a number, up to the end of the text."""
    segments, replies = [*prefix], []
    for turn in turns:
        segments.append((True, turn))
        replies.append(thinker(numbers).respond(text(segments, seed)))
        segments.append((False, list(replies[-1].tokens)))
        if replies[-1].ends:
            break
    return replies


def secret_of(seed, prefix=()):
    """The number that is right, by saying all of them."""
    right = [
        n for n in range(1, 21) if play(seed, [[IS, number(n)]], 20, prefix)[0].tokens == [RIGHT]
    ]
    (only,) = right
    return only


@given(st.integers(0, 2**63), st.lists(st.integers(1, 20), max_size=6), st.integers(1, 20))
@settings(max_examples=60)
def test_answers_are_true_of_the_number_that_is_right_at_the_end(seed, asked, guess):
    secret = secret_of(seed)
    *answers, verdict = play(seed, [*([BELOW, number(n)] for n in asked), [IS, number(guess)]])
    assert [reply.tokens for reply in answers] == [[YES] if secret < n else [NO] for n in asked]
    assert not any(reply.ends for reply in answers)
    assert (verdict.tokens, verdict.ends) == ([RIGHT] if guess == secret else [WRONG], True)
    left = [n for n in range(1, 21) if all((secret < a) == (n < a) for a in asked)]
    gained = math.log(20 / len(left)) / math.log(20)
    assert sum(reply.reward for reply in answers) == pytest.approx(gained)
    assert verdict.reward == (guess == secret)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 20)), max_size=5))
def test_the_state_knows_the_numbers_that_are_left(answers):
    """Answers that contradict those before them are not counted."""
    left, tokens = set(range(1, 21)), []
    for below, n in answers:
        tokens += [BELOW, number(n), YES if below else NO]
        left = {one for one in left if (one < n) == below} or left
    state = thinker().states[thinker()._read(0, tokens)]
    assert {n for n in range(1, 21) if state.possible(n)} == left
    assert state.size == len(left)


def test_every_number_is_as_likely_and_seeds_alone_decide():
    counts = Counter(secret_of(seed) for seed in range(400))
    assert set(counts) == set(range(1, 21))
    assert max(counts.values()) < 45


def test_another_seed_draws_from_the_numbers_that_are_left():
    """As after a fork: the answers before it stay true."""
    told = [(True, [BELOW, number(9)]), (False, [YES]), (True, [BELOW, number(5)]), (False, [NO])]
    counts = Counter(secret_of(seed, told) for seed in range(200))
    assert set(counts) == {5, 6, 7, 8}
    assert min(counts.values()) > 30


@given(st.lists(st.tuples(st.booleans(), words), max_size=5), words, st.integers(1, 20))
def test_any_text_can_be_answered(segments, turn, last):
    segments = [segment for segment in segments if segment[1]]
    asked = text([*segments, (True, [*turn, number(last)])], 3)
    reply = thinker().respond(asked)
    assert reply == thinker().respond(asked)
    assert next(iter(reply.tokens)) in (YES, NO, RIGHT, WRONG, WHAT)
    assert math.isfinite(reply.reward)


@pytest.mark.parametrize(
    "turn", [[number(3)], [BELOW, IS, YES, number(3)], [number(3), number(4)], [RIGHT, number(2)]]
)
def test_a_number_without_its_verb_puzzles(turn):
    (reply,) = play(1, [turn])
    assert (reply.tokens, reply.reward, reply.ends) == ([WHAT], 0.0, False)


@pytest.mark.parametrize("numbers", [2, 5, 20])
def test_answers_are_as_likely_as_the_source_says(numbers):
    """Over the numbers that may be thought of, in every state that a turn can lead to."""
    source = thinker(numbers)
    for state, probs in zip(source.states, source.probs, strict=True):
        possible = range(state.low, state.high + 1)
        if state.phase == "asked":
            share = np.mean([n < state.number for n in possible])
            np.testing.assert_allclose(probs, [share, 1 - share, 0, 0, 0])
        elif state.phase == "guessed":
            share = np.mean([n == state.number for n in possible])
            np.testing.assert_allclose(probs, [0, 0, share, 1 - share, 0])


# ------------------------------------------------------------------ the optimum


@cache
def seeds(numbers):
    """A seed of each number."""
    found = {}
    for seed in range(1000):
        found.setdefault(thinker(numbers).secret(seed, thinker(numbers).states[0]), seed)
    assert len(found) == numbers
    return [found[n] for n in sorted(found)]


class Everything:
    """V* and Q* from all ways in which a text can go on, and all numbers that can have been thought
    of. It asks `respond`, and knows neither states nor posteriors."""

    def __init__(self, task, beta):
        self.task, self.beta = task, beta
        self.probs = task.reference.probs

    def value(self, segments, alive, step):
        if step == self.task.max_new_tokens:
            return 0.0
        tokens = [token for _, part in segments for token in part]
        prior = self.probs[tokens[-1] if tokens else -1]
        q = np.array([self.q(segments, alive, step, a) for a in range(len(prior))])
        if self.beta == 0:
            return q.max()
        return self.beta * np.log((prior * np.exp((q - q.max()) / self.beta)).sum()) + q.max()

    def q(self, segments, alive, step, token):
        *before, (own, turn) = segments if segments and segments[-1][0] else [*segments, (True, [])]
        after = [*before, (own, [*turn, token])]
        if token not in self.task.turn_end_token_ids:
            return self.value(after, alive, step + 1)
        groups = defaultdict(list)
        for seed in alive:
            reply = self.task.respond(text(after, seed))
            groups[tuple(reply.tokens), reply.ends].append(seed)
        return sum(
            len(some)
            / len(alive)
            * (
                float(list(tokens) == [RIGHT])
                if ends
                else self.value([*after, (False, list(tokens))], some, step + 1)
            )
            for (tokens, ends), some in groups.items()
        )


def observation(tokens, own, L):
    row = np.zeros((1, L), dtype=np.int64)
    row[0, 1 : 1 + len(tokens)] = tokens
    mask = np.zeros((1, L), dtype=np.int8)
    mask[0, 1 : 1 + len(tokens)] = own
    return {
        "tokens": row,
        "own_mask": mask,
        "length": np.array([1 + len(tokens)]),
        "prompt_length": np.array([1]),
    }


@pytest.mark.parametrize(("numbers", "T"), [(2, 4), (3, 4), (2, 3)])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_the_optimum_is_that_of_all_texts(numbers, T, beta):
    task = twenty.task(numbers=numbers, max_new_tokens=T)
    best = Everything(task, beta).value([], seeds(numbers), 0)
    assert task.oracle.optimal_objective(beta) == pytest.approx(best, abs=1e-12)


def test_the_value_of_each_question_is_that_of_all_texts():
    task, beta = twenty.task(numbers=4, max_new_tokens=4), 0.05
    all_texts = Everything(task, beta)
    obs = observation([BELOW], [1], task.oracle.max_length)
    values = [
        all_texts.q([(True, [BELOW])], seeds(4), 1, token)
        for token in range(task.reference.vocab_size)
    ]
    np.testing.assert_allclose(task.oracle.q(obs, beta)[0], values, atol=1e-12)


def test_with_two_questions_the_first_should_halve_the_numbers():
    """By hand: of four numbers, "below 3" leaves two and two, and the others three and one."""
    oracle = twenty.task(numbers=4, max_new_tokens=6).oracle
    found = oracle.q(observation([BELOW], [1], oracle.max_length), 0.0)[0]
    np.testing.assert_allclose(found[[number(n) for n in (1, 2, 3, 4)]], [0.5, 0.75, 1, 0.75])


def test_after_an_answer_the_value_is_that_of_the_numbers_left():
    task, beta = twenty.task(numbers=4, max_new_tokens=4), 0.05
    told = [(True, [BELOW, number(2)]), (False, [NO])]
    obs = observation([BELOW, number(2), NO], [1, 1, 0], task.oracle.max_length)
    value = Everything(task, beta).value(told, seeds(4)[1:], 2)
    assert task.oracle.value(obs, beta)[0] == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize(("numbers", "T"), list(product((2, 5, 16), (2, 3, 4, 7, 10))))
def test_without_the_kl_the_best_player_halves(numbers, T):
    task = twenty.task(numbers=numbers, max_new_tokens=T)
    best = task.oracle.optimal_objective(0.0)
    assert best == pytest.approx(twenty.best_score(T, numbers), abs=1e-12)


def test_policies_are_evaluated_up_to_the_end_of_their_texts():
    """What a policy would write behind the end of a text costs it nothing."""
    oracle = twenty.task(numbers=4, max_new_tokens=6).oracle
    optimum = oracle.evaluate(lambda obs: oracle.policy(obs, 0.05), 0.05, markov=True)
    assert optimum.regret == pytest.approx(0, abs=1e-12)
    assert optimum.objective == pytest.approx(optimum.score - 0.05 * optimum.kl, abs=1e-12)
    base = oracle.evaluate(
        lambda obs: oracle.reference.probs[oracle._read(obs)[2]], 0.05, markov=True
    )
    assert base.kl == pytest.approx(0, abs=1e-12)
    assert base.objective == pytest.approx(oracle.reference_objective(), abs=1e-12)
    size = oracle.vocab_size

    def guesses(obs):
        """Says at once that it is 2, and then writes "<s>" for ever."""
        step = obs["own_mask"].sum(1)
        return np.eye(size)[np.choose(np.minimum(step, 2), [IS, number(2), 0])]

    found = oracle.evaluate(guesses, 0.05, markov=True)
    price = -np.log(oracle.reference.probs[-1, IS]) - np.log(oracle.reference.probs[IS, number(2)])
    assert found.score == pytest.approx(1 / 4)
    assert found.kl == pytest.approx(price)
    assert found.objective == pytest.approx(1 / 4 - 0.05 * price)


def test_options_out_of_range_are_refused():
    for wrong in ({"numbers": 1}, {"numbers": 41}, {"max_new_tokens": 1}, {"task_seed": -1}):
        with pytest.raises(InvalidArgument, match=next(iter(wrong))):
            twenty.task(**wrong)


# ---------------------------------------------------------------------- the env


def step(envs, tokens):
    for token in tokens:
        out = envs.step(np.full(envs.num_envs, token))
    return out


def test_a_game_is_played_and_paid_by_hand():
    envs = tasks.make_vec(8, AutoresetMode.DISABLED, ID, reward="turn", kl="none")
    envs.reset(seed=0)
    obs, first, *_ = step(envs, [BELOW, number(11)])
    np.testing.assert_allclose(first, math.log(2) / math.log(20), rtol=1e-6)
    below = obs["tokens"][:, 3] == YES
    obs, paid, terminated, truncated, infos = step(envs, [IS, number(3)])
    right = obs["tokens"][:, 6] == RIGHT
    assert set(below) == {True, False}
    assert not right[~below].any()
    np.testing.assert_array_equal(paid, right)
    np.testing.assert_array_equal(infos["score"], right)
    assert terminated.all()
    assert not truncated.any()
    assert (obs["own_mask"][:, :7] == [0, 1, 1, 0, 1, 1, 0]).all()


def test_the_policys_own_answers_win_nothing():
    envs = tasks.make_vec(2, AutoresetMode.DISABLED, ID, max_new_tokens=4)
    envs.reset(seed=0)
    *_, infos = step(envs, [RIGHT, IS, RIGHT, RIGHT])
    assert infos["score"].tolist() == [0, 0]


def test_forks_have_numbers_of_their_own_that_agree_with_the_answers():
    envs = tasks.make_vec(64, AutoresetMode.DISABLED, ID).unwrapped
    envs.reset(seed=0)
    obs, *_ = step(envs, [BELOW, number(11)])
    yes = obs["tokens"][0, 3] == YES
    envs.fork([0] * 63, range(1, 64))
    threshold = 6 if yes else 16
    obs, *_ = step(envs, [BELOW, number(threshold)])
    assert 12 < (obs["tokens"][:, 6] == YES).sum() < 52  # half of the ten numbers that are left


@pytest.mark.parametrize("reward", ["turn", "oracle"])
def test_the_env_keeps_the_contract(reward):
    check_vector_env(tasks.make_vec(3, AutoresetMode.SAME_STEP, ID, reward=reward), steps=24)


def test_the_optimal_policy_earns_the_optimum():
    """As stepping pays it; so the value that the oracle knows is the env's."""
    envs = tasks.make_vec(512, AutoresetMode.SAME_STEP, ID, kl="none").unwrapped
    oracle, beta, rng = envs.oracle, 0.01, np.random.default_rng(0)
    obs, ended = envs.reset(seed=0)[0], np.zeros(512, bool)
    score = np.zeros(512)
    while not ended.all():
        probs = oracle.policy(obs, beta)
        obs, rewards, terminated, truncated, _ = envs.step(
            np.array([rng.choice(len(p), p=p / p.sum()) for p in probs])
        )
        score += np.where(ended, 0, rewards)
        ended |= terminated | truncated
    best = oracle.evaluate(lambda seen: oracle.policy(seen, beta), beta, markov=True)
    assert score.mean() == pytest.approx(best.score, abs=3 * score.std() / math.sqrt(512))
