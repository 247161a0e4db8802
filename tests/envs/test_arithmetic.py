"""Arithmetic-v0: what is right is what Python says, whole and digit by digit, read at once or token
by token."""

import numpy as np
import pytest
import tasks
import torch
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenenv.envs.language.adder import TOKENS, Adder, sums
from tokenenv.envs.language.bundled import bundled_lm, bundled_tokenizer
from tokenenv.envs.language.digits import EOS, PAD
from tokenenv.errors import InvalidArgument
from tokenenv.rewards.process import FORMS, Process

ADDER = Adder()
ID = "tokenenv/Arithmetic-v0"
numbers = st.integers(0, 99)
characters = st.lists(st.integers(0, len(TOKENS) - 1), max_size=6)


def ids(text: str) -> list[int]:
    """The tokens of a text, in which "$" stands for <eos>."""
    return [EOS if character == "$" else TOKENS.index(character) for character in text]


def read(tokens: list[int]) -> torch.Tensor:
    """The states (L, 4) of one text."""
    return ADDER.states(torch.tensor([tokens]), [len(tokens)])[0]


def by_hand(question: str, answer: list[int]) -> tuple[float, list[float]]:
    """The score, and whether the answer is right up to each of its tokens, by Python's own sum."""
    a, b = question[:-1].split("+")
    expected = [*ids(str(int(a) + int(b))), EOS]
    return float(answer == expected), [
        float(answer[:n] == expected[:n]) for n in range(1, len(answer) + 1)
    ]


@given(numbers, numbers, st.none() | characters)
@settings(max_examples=300)
def test_right_is_what_python_says(a: int, b: int, tokens: list[int] | None) -> None:
    question = f"{a}+{b}="
    answer = [*ids(str(a + b)), EOS] if tokens is None else tokens
    states = read(ids(question) + answer)[len(question) - 1 :]
    score, steps = by_hand(question, answer)
    assert float(ADDER.score(states)[-1]) == score
    assert ADDER.step_score(states).tolist() == [1.0, *steps]


@pytest.mark.parametrize(
    ("text", "score", "steps"),
    [
        ("27+85=112$", 1, [1, 1, 1, 1]),
        ("27+85=112", 0, [1, 1, 1]),  # not ended
        ("27+85=122$", 0, [1, 0, 0, 0]),  # nothing behind a wrong digit is right
        ("27+85=11$", 0, [1, 1, 0]),
        ("27+85=1122$", 0, [1, 1, 1, 0, 0]),
        ("0+0=0$", 1, [1, 1]),
        ("0+9=09$", 0, [0, 0, 0]),
    ],
)
def test_examples(text: str, score: float, steps: list[int]) -> None:
    states = read(ids(text))
    assert float(ADDER.score(states)[-1]) == score
    assert ADDER.step_score(states)[text.index("=") + 1 :].tolist() == steps


@given(st.lists(st.integers(-5, 40), min_size=1, max_size=40))
def test_any_tokens_can_be_read(tokens: list[int]) -> None:
    states = read(tokens)
    assert ((ADDER.score(states) == 0) | (ADDER.score(states) == 1)).all()
    assert (ADDER.step_score(states).diff() <= 0).all()


@pytest.mark.parametrize(
    ("question", "answer"),
    [("7+=", "7"), ("+=", "0"), ("=", "0"), ("1+2+3=", "6"), ("123456789=", "123456789")],
)
def test_odd_questions_have_answers_too(question: str, answer: str) -> None:
    assert float(ADDER.score(read(ids(f"{question}{answer}$")))[-1]) == 1


def test_what_is_no_digit_within_a_question_is_nothing() -> None:
    tokens = [*ids("1"), PAD, 40, *ids("+"), EOS, *ids("2"), -3, *ids("=3$")]
    assert float(ADDER.score(read(tokens))[-1]) == 1


@given(st.data())
@settings(max_examples=50)
def test_rows_read_what_whole_texts_say(data: st.DataObject) -> None:
    texts = [ids(f"{data.draw(numbers)}+{data.draw(numbers)}=") for _ in range(3)]
    rows = ADDER.slots(3, 20)
    padded = torch.tensor([text + [0] * (6 - len(text)) for text in texts])
    rows.prefill([0, 1, 2], padded, [len(text) for text in texts])
    for _ in range(5):
        tokens, active = (
            [data.draw(what) for _ in range(3)] for what in (st.integers(0, 13), st.booleans())
        )
        if data.draw(st.booleans()):
            rows.fork([0], [2])
            texts[2] = texts[0]
        states = rows.append(torch.tensor(tokens), np.array(active))
        texts = [
            [*text, token] if on else text
            for text, token, on in zip(texts, tokens, active, strict=True)
        ]
        assert torch.equal(states, torch.stack([read(text)[-1] for text in texts]))


def test_every_sum_is_in_one_split_with_its_mirror_image() -> None:
    train, test = set(sums("train")), set(sums("test"))
    assert not train & test
    assert train | test == {(a, b) for a in range(100) for b in range(100)}
    assert {(b, a) for a, b in test} == test
    assert 0.2 < len(test) / 10_000 < 0.3
    with pytest.raises(InvalidArgument, match="split='all'"):
        tasks.make_vec(1, env_id=ID, split="all")


def test_prompts_are_the_sums_and_decode_as_text() -> None:
    envs = tasks.make_vec(4, env_id=ID, split="test")
    obs, _ = envs.reset(seed=0)
    for text in envs.unwrapped.decode(obs):
        a, b = text.removesuffix("=").split("+")
        assert (int(a), int(b)) in set(sums("test"))


@pytest.mark.parametrize("design", ["terminal", *FORMS])
def test_stepping_pays_what_scoring_says(design: str) -> None:
    envs = tasks.make_vec(
        4,
        AutoresetMode.SAME_STEP,
        ID,
        reward={"it": "terminal" if design == "terminal" else Process(design)},
    )
    episodes = tasks.play(envs, steps=30, stop=0.3)
    paid = envs.unwrapped.score_episodes(
        [e.prompt for e in episodes], [e.response for e in episodes]
    )
    tasks.assert_equal(
        paid.step_rewards, np.stack([e.padded(e.rewards, 4) for e in episodes]), 1e-5
    )
    tasks.assert_equal(
        paid.token_rewards, np.stack([e.infos[-1]["token_rewards"] for e in episodes]), 1e-5
    )


@pytest.mark.parametrize(
    ("form", "returns"),
    [
        ("sum", [4, 1, 0, 0]),
        ("delta", [0, -1, -1, -1]),
        ("clip", [0, -1.5, -0.5, -2]),
        ("min", [1, 0, 0, 0]),
    ],
)
def test_every_form_of_process_prefers_the_right_answer(form: str, returns: list[float]) -> None:
    envs = tasks.make_vec(1, env_id=ID, reward=Process(form), kl="none")
    answers = [ids(answer) for answer in ("112$", "122$", "$", "9999")]
    paid = envs.unwrapped.score_episodes([ids("27+85=")] * 4, answers)
    np.testing.assert_allclose(paid.token_rewards.sum(1), returns, atol=1e-3)
    np.testing.assert_allclose(paid.score, [1, 0, 0, 0])
    np.testing.assert_allclose(paid.gold, paid.score)


def test_every_digit_ends_a_step() -> None:
    envs = tasks.make_vec(1, env_id=ID, reward="process", kl="none")
    paid = envs.unwrapped.score_episodes(
        [ids("45+54="), ids("9+69="), ids("1+1=")], [ids("99$"), ids("78$"), ids("2$")]
    )
    np.testing.assert_allclose(paid.token_rewards, [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0]])


def test_the_reference_is_often_right_and_often_wrong() -> None:
    """So there is something to sharpen, and something to start from."""
    envs = tasks.make_vec(128, AutoresetMode.DISABLED, ID, split="test")
    obs, _ = envs.reset(seed=0)
    model, generator, tokenizer = (
        envs.unwrapped.reference,
        torch.Generator().manual_seed(0),
        bundled_tokenizer("arithmetic-lm"),
    )
    assert model is bundled_lm("arithmetic-lm", "cpu", torch.float32)
    prompts = [
        row[:length].tolist() for row, length in zip(obs["tokens"], obs["length"], strict=True)
    ]
    responses = []
    for prompt in prompts:
        text = list(prompt)
        while len(text) < len(prompt) + 4 and text[-1] != EOS:
            logits = model(input_ids=torch.tensor([text])).logits[0, -1]
            text.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
        responses.append(text[len(prompt) :])
    assert tokenizer.decode(prompts[0]).endswith("=")
    assert 0.5 < envs.unwrapped.score_episodes(prompts, responses).score.mean() < 0.85


def test_a_text_ends_with_the_stop() -> None:
    envs = tasks.make_vec(2, env_id=ID)
    envs.reset(seed=0)
    _, _, terminated, truncated, _ = envs.step(np.array([EOS, TOKENS.index("1")]))
    assert terminated.tolist() == [True, False]
    assert not truncated.any()
