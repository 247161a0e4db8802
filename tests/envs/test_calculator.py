"""Calculator-v0: the calculator computes what Python does, any call has a reply that fits, and what
is right is what Python says, read at once or token by token."""

import math

import numpy as np
import pytest
import tasks
import torch
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenenv.agents import PPO
from tokenenv.agents.run.evaluate import evaluate
from tokenenv.check import check_vector_env
from tokenenv.envs.language import calculator
from tokenenv.envs.language.calculator import (
    CLOSE,
    LARGEST,
    PLUS,
    TOKENS,
    Grader,
    called,
    questions,
    value_of,
    written_behind,
)
from tokenenv.envs.language.digits import EOS
from tokenenv.envs.tasks.calculator import CALL_REWARD, respond
from tokenenv.rewards.process import Process
from tokenenv.turns import Segment, TextSoFar

ID = "tokenenv/Calculator-v0"
GRADER = Grader()
expressions = st.lists(
    st.lists(st.integers(0, 999), min_size=1, max_size=3), min_size=1, max_size=3
)
tokens = st.lists(st.integers(0, len(TOKENS) - 1), max_size=12)


def ids(text):
    """The tokens of a text, in which "$" stands for <eos>."""
    return [EOS if character == "$" else TOKENS.index(character) for character in text]


def spelled(terms):
    return "+".join("*".join(map(str, factors)) for factors in terms)


def so_far(question, *parts):
    """A text whose parts the policy and the environment wrote in turns."""
    segments = [Segment(i % 2 == 0, ids(part)) for i, part in enumerate(parts)]
    return TextSoFar(ids(question), segments)


def read(tokens):
    """The states (L, 5) of one text."""
    return GRADER.states(torch.tensor([tokens]), [len(tokens)])[0]


# --------------------------------------------------------------- the calculator


@given(expressions)
def test_values_are_those_of_python(terms):
    assert value_of(spelled(terms)) == sum(math.prod(factors) for factors in terms)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("007", 7),
        ("2+3*4", 14),
        ("999999*999999", 999_998_000_001),
        (str(LARGEST), None),
        ("9" * 250, None),
        ("9" * 5000, None),  # Python itself refuses to read it
        *((text, None) for text in ("", "+", "1+", "*2", "1++2", "1=", "[1]", "1 2", "-1", "²")),
    ],
)
def test_what_is_no_small_sum_of_products_has_no_value(expression, value):
    assert value_of(expression) == value


@pytest.mark.parametrize(
    ("turn", "written"),
    [
        ("[37*46]", "{1702}"),
        ("12[3+4]", "{7}"),
        ("[9[3+4]", "{7}"),
        ("]", "?"),
        ("3+4]", "?"),
        ("[]", "?"),
        ("[37*]", "?"),
        ("[3=]", "?"),
        ("{7}[1=]", "?"),
    ],
)
def test_what_is_written_behind_a_turn(turn, written):
    assert written_behind(turn) == written


@given(tokens, st.lists(st.tuples(tokens, tokens), max_size=3), tokens, st.booleans())
@settings(max_examples=150)
def test_any_text_can_be_answered_and_a_reply_is_no_longer_than_its_turn(
    prompt, earlier, turn, ends
):
    parts = [part for pair in earlier for part in pair if part]
    turn = [*turn, EOS if ends else CLOSE]
    segments = [*(Segment(i % 2 == 0, part) for i, part in enumerate(parts)), Segment(True, turn)]
    text = TextSoFar(prompt or [0], segments)
    reply = respond(text)
    assert reply == respond(text)
    assert len(reply.tokens) <= len(turn)
    assert all(0 <= token < len(TOKENS) for token in reply.tokens)
    assert reply.ends == ends == (not reply.tokens)


@given(expressions)
def test_a_call_that_fits_is_paid_once(terms):
    question, call = spelled(terms), f"[{spelled(terms)}]"
    first = respond(so_far(f"{question}=", call))
    result = "".join(TOKENS[token] for token in first.tokens)
    assert first.reward == CALL_REWARD
    assert called(call) == int(result[1:-1])
    assert respond(so_far(f"{question}=", call, result, call)).reward == 0
    assert respond(so_far(f"{question}=", "]", "?", call)).reward == CALL_REWARD


@pytest.mark.parametrize(
    ("question", "parts", "reward"),
    [
        ("37*46=", ["[46*37]"], CALL_REWARD),  # the value counts
        ("37*46=", ["[1700+2]"], CALL_REWARD),
        ("37*46=", ["[36*46]"], 0),
        ("37*46=", ["[37*]"], 0),
        ("37*=", ["[37*]"], 0),  # no question, so that no call fits it
        ("37*46=", ["1702$"], 1),
        ("37*46=", ["1703$"], 0),
        ("37*46=", ["[37*46]", "{1702}", "1702$"], 1),
        ("37*46=", ["[36*46]", "{1656}", "1702$"], 1),
        ("37*46=", ["[37*]", "?", "1702$"], 1),
        ("37*46=", ["17[37*46]", "{1702}", "02$"], 0),
        ("37*46=", ["[37*46]", "{1702}", "$"], 0),
        ("37*=", ["$"], 0),
    ],
)
def test_turns_are_paid_by_hand(question, parts, reward):
    assert respond(so_far(question, *parts)).reward == reward


# ------------------------------------------------------------------- the grader


def by_hand(question, response):
    """The share of the right answer that stands behind the last result or error."""
    total = sum(math.prod(map(int, term.split("*"))) for term in question[:-1].split("+"))
    whole = f"{total}$"
    answer = response.replace("?", "}").rpartition("}")[2]
    return len(answer) / len(whole) if whole.startswith(answer) else 0.0


responses = st.text("0123456789+*=[]{}?", max_size=4)


@given(expressions, responses, st.integers(0, 9), st.booleans())
@settings(max_examples=60)
def test_the_grader_knows_what_python_knows(terms, before, cut, broken):
    question = f"{spelled(terms)}="
    right = f"{value_of(question[:-1])}$"
    response = before + ("}" if broken else "") + right[: cut + 1]
    states = read(ids(question) + ids(response))[len(question) - 1 :]
    expected = [by_hand(question, response[:n]) for n in range(len(response) + 1)]
    np.testing.assert_allclose(GRADER.progress(states), expected, rtol=1e-6)
    assert GRADER.score(states).tolist() == [float(share == 1) for share in expected]
    if response.endswith("$"):
        paid = respond(so_far(question, response)).reward
        assert float(GRADER.score(states)[-1]) == paid


@given(st.lists(st.integers(-5, 40), min_size=1, max_size=40))
def test_the_grader_reads_any_tokens(tokens):
    shares = GRADER.progress(read(tokens))
    assert ((shares >= 0) & (shares <= 1)).all()


@given(st.data())
@settings(max_examples=15)
def test_rows_read_what_whole_texts_say(data):
    texts = [ids(data.draw(st.sampled_from(questions("test")))) for _ in range(3)]
    slots = GRADER.slots(3, 60)
    padded = torch.tensor([text + [0] * (9 - len(text)) for text in texts])
    slots.prefill([0, 1, 2], padded, [len(text) for text in texts])
    for _ in range(5):
        new = [data.draw(st.integers(0, len(TOKENS) - 1)) for _ in range(3)]
        states = slots.append(torch.tensor(new))
        texts = [[*text, token] for text, token in zip(texts, new, strict=True)]
        assert torch.equal(states, torch.stack([read(text)[-1] for text in texts]))


# ---------------------------------------------------------------- the questions


def test_questions_are_of_three_kinds_and_in_one_split():
    train, test = (questions(split) for split in ("train", "test"))
    assert not set(train) & set(test)
    for asked in (train, test):
        assert max(map(len, asked)) == len("12+34+56=")
        known = sum(question.count("+") == 1 for question in asked) / len(asked)
        products = sum("*" in question for question in asked) / len(asked)
        assert known == pytest.approx(calculator.KINDS["sum"], abs=0.03)
        assert products == pytest.approx(calculator.KINDS["product"], abs=0.03)
    order = {"*".join(sorted(q[:-1].split("*"))) for q in train if "*" in q}
    assert not order & {"*".join(sorted(q[:-1].split("*"))) for q in test if "*" in q}


# ---------------------------------------------------------------------- the env


def test_a_text_is_written_and_paid_by_hand():
    envs = tasks.make_vec(1, AutoresetMode.DISABLED, ID, reward="turn", kl="none")
    envs.reset(seed=0, options={"prompts": ["37*46="]})
    paid, texts = [], []
    for token in ids("[37*46]1702$"):
        obs, reward, terminated, truncated, infos = envs.step(np.array([token]))
        paid.append(float(reward[0]))
        texts.extend(envs.unwrapped.decode(obs))
    assert texts[5:8] == ["37*46=[37*46", "37*46=[37*46]{1702}", "37*46=[37*46]{1702}1"]
    np.testing.assert_allclose(paid, [*[0] * 6, CALL_REWARD, *[0] * 4, 1], rtol=1e-6)
    assert (terminated[0], truncated[0], infos["score"][0]) == (True, False, 1)
    own = "37*46=[37*46]{1702}1702$"
    expected = [0] * 6 + [1] * 7 + [0] * 6 + [1] * 5
    assert obs["own_mask"][0, : len(own)].tolist() == expected


def test_by_the_token_each_right_digit_is_paid():
    """By hand: four digits and the end are a fifth each, and a call loses what stood before it."""
    envs = tasks.make_vec(1, AutoresetMode.DISABLED, ID, reward=Process("delta"), kl="none")
    envs.reset(seed=0, options={"prompts": ["37*46="]})
    paid = [float(envs.step(np.array([token]))[1][0]) for token in ids("17[37*46]1702$")]
    fifths = [1, 1, -2, *[0] * 6, 1, 1, 1, 1, 1]
    np.testing.assert_allclose(paid, np.array(fifths) / 5, atol=1e-6)


def test_the_env_keeps_the_contract_with_rewards_by_turn_and_by_token():
    reward = {"turn": "turn", "token": Process("delta")}
    check_vector_env(tasks.make_vec(3, AutoresetMode.SAME_STEP, ID, reward=reward), steps=24)


def test_the_longest_texts_fit():
    """A text of calls alone is cut by T, never by the context."""
    envs = tasks.make_vec(2, AutoresetMode.DISABLED, ID, max_new_tokens=20)
    envs.reset(seed=0, options={"prompts": ["12+34+56="] * 2})
    for calling, breaking in zip(ids("[999]" * 4), ids("]" * 20), strict=True):
        obs, _, terminated, truncated, _ = envs.step(np.array([calling, breaking]))
    assert obs["length"].tolist() == [9 + 20 + 4 * 5, 9 + 20 + 20]
    assert terminated.all()
    assert not truncated.any()


def test_the_reference_calls_seldom_and_is_right_where_it_does():
    envs = tasks.make_vec(64, AutoresetMode.SAME_STEP, ID, split="test")
    found = evaluate(PPO(envs), envs, num_texts=384)
    calls = [CLOSE in episode.response.tolist() for episode in found.episodes]
    known = [list(episode.prompt).count(PLUS) == 1 for episode in found.episodes]
    right = [episode.score for episode in found.episodes]
    rows = list(zip(calls, known, right, strict=True))
    assert 0.08 < np.mean(calls) < 0.18
    assert np.mean([r for call, easy, r in rows if not call and not easy]) < 0.05
    assert np.mean([r for call, easy, r in rows if call]) > 0.6
    assert np.mean([r for call, easy, r in rows if easy]) > 0.6
