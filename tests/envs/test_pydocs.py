"""PyDocs-v0: the readability formula, the prose, the prompts, and how its bundled models do."""

import sys

import numpy as np
import pytest
import torch
from sampling import sample, summed_scores

from tokenenv.envs.language import topics
from tokenenv.envs.language.bundled import bundled_tokenizer
from tokenenv.envs.language.readability import count_sentences, count_syllables, reading_ease, words
from tokenenv.envs.language.splits import split_of
from tokenenv.envs.tasks import pydocs
from tokenenv.errors import InvalidArgument, ModelError


@pytest.mark.parametrize(
    ("word", "syllables"),
    [
        *(
            ("the", 1),
            ("a", 1),
            ("cat", 1),
            ("make", 1),
            ("makes", 1),
            ("named", 1),
            ("called", 1),
            ("fly", 1),
        ),
        *(
            ("table", 2),
            ("values", 2),
            ("python", 2),
            ("method", 2),
            ("object", 2),
            ("added", 2),
            ("classes", 2),
        ),
        *(("example", 3), ("recursive", 3), ("dictionary", 4), ("x", 1), ("HTTP", 1)),
    ],
)
def test_syllables(word: str, syllables: int) -> None:
    assert count_syllables(word) == syllables


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("It runs. It stops.", 2),
        ("It runs! Does it stop? (Yes.)", 3),
        ("It runs. It has not", 1),
        ("no end at all", 1),
        ("In version 3.8 it runs.", 1),
        ("Use e.g. a list or str.join() here.", 1),
        ("a. b. c. d. e. f.", 1),
        ("", 1),
    ],
)
def test_sentences_must_end_to_count(text: str, count: int) -> None:
    assert count_sentences(text) == count


def test_words_are_runs_of_letters() -> None:
    assert words("Don't call obj.__len__() 3 times.") == ["Don't", "call", "obj", "len", "times"]


def test_reading_ease_by_hand() -> None:
    text = "The list is made once. It can hold any number of values in order."
    # 14 words, 2 sentences; syllables: 1 1 1 1 1 | 1 1 1 2 2 1 2 1 2 = 18
    assert reading_ease(text) == pytest.approx(206.835 - 1.015 * 14 / 2 - 84.6 * 18 / 14, abs=1e-9)
    assert reading_ease(text) == pytest.approx(90.9586, abs=1e-3)


def test_reading_ease_is_clamped_and_needs_twelve_words() -> None:
    assert reading_ease("the cat sat on the mat and saw a big red") == 0.0
    assert reading_ease("the cat sat on the mat and saw a big red. Dog.") == 100.0
    assert reading_ease("internationalization " * 12) == 0.0
    assert reading_ease("") == 0.0


def test_stopping_inside_a_sentence_gains_nothing() -> None:
    whole = "The value of the name is looked up in the module where it was first bound."
    assert reading_ease(f"{whole} The new") < reading_ease(whole)


PAGE = """The thing
*********

A "thing" is *the* object that **holds** other objects [1]; it\u2019s made once and then used by every non-
empty part of a program.

   thing ::= "thing" name ":" this is a production of the grammar and no prose at all

>>> for thing in things: print(thing) and then print it again and again and again

* A bullet may hold a whole sentence too, and then it is as good as any other prose there is.

Changed in version 3.8: This note says that something or other has changed since the last version.

too short.

-[ Footnotes ]-

[1] This footnote is a sentence of more than twelve words and so it counts as prose as well.
"""


def test_only_prose_is_kept_and_markup_is_dropped() -> None:
    assert list(topics.paragraphs(PAGE)) == [
        "A thing is the object that holds other objects; it's made once and then used by every "
        "non-empty part of a program.",
        "A bullet may hold a whole sentence too, and then it is as good as any other prose there "
        "is.",
        "This footnote is a sentence of more than twelve words and so it counts as prose as well.",
    ]


def test_passages_are_runs_of_whole_sentences() -> None:
    first, second, third = ("One two three four five six seven eight nine ten." for _ in range(3))
    assert list(topics.passages(f"{first} {second} {third}")) == [f"{first} {second} {third}"]
    assert list(topics.passages(f"{first} {second}")) == []
    assert list(topics.passages(" ".join([first] * 5))) == [
        " ".join([first] * n) for n in (4, 4, 3)
    ]


def test_splits_share_no_topic_and_no_paragraph() -> None:
    train, test = topics.prose("train"), topics.prose("test")
    assert not set(train) & set(test)
    assert len(train) > 1.5 * len(test) > 200
    assert split_of("while") == "test"
    assert split_of("import") == "train"
    assert all(text.isascii() and "::=" not in text and ">>>" not in text for text in train + test)


def test_a_sentence_in_topics_of_both_splits_is_a_prompt_of_train_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared, own = (f"{start} " + "word " * 30 + "end." for start in ("The shared", "An own"))
    prose = {"train": (shared,), "test": (f"{shared} {own}",)}
    monkeypatch.setattr(pydocs, "prose", prose.__getitem__)
    tokenizer = bundled_tokenizer("pydocs-lm")
    prompts = {split: pydocs.make_prompts(split, tokenizer) for split in prose}
    assert [tokenizer.decode(ids).split()[:2] for ids in prompts["train"]] == [["The", "shared"]]
    assert [tokenizer.decode(ids).split()[:2] for ids in prompts["test"]] == [["An", "own"]]


def test_missing_topics_name_the_system_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    topics.prose.cache_clear()
    with pytest.raises(ModelError, match=r"pydoc_data\.topics.*libpython3\.\d+-stdlib"):
        topics.prose("train")


def test_unknown_split_names_the_argument() -> None:
    with pytest.raises(InvalidArgument, match="split='dev' is not known; allowed: test, train"):
        pydocs.task(split="dev")


def test_tokenizer_is_exact() -> None:
    tokenizer = bundled_tokenizer("pydocs-lm")
    assert len(tokenizer) == 1024
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    for text in (*topics.prose("test")[:50], " odd  spaces , and\nünïcödé ☃ {}"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_prompts_are_16_to_24_tokens_and_end_between_words() -> None:
    for split in ("train", "test"):
        task = pydocs.task(split=split)
        assert {len(prompt) for prompt in task.prompts} <= set(range(16, 25))
        assert len({len(prompt) for prompt in task.prompts}) > 4
        assert len(task.prompts) == len(set(map(tuple, task.prompts))) > 200
        joined = " ".join(topics.prose(split)) + " "
        texts = task.tokenizer.batch_decode(task.prompts)
        assert np.mean([f"{text} " in joined for text in texts]) > 0.97
    assert not set(map(tuple, pydocs.task(split="train").prompts)) & set(
        map(tuple, pydocs.task(split="test").prompts)
    )


def test_gold_is_the_reading_ease_of_the_continuation() -> None:
    response = " it is a list of all the names that you can use here."
    assert (
        pydocs.gold("Incomprehensibility notwithstanding,", response) == reading_ease(response) > 60
    )


@pytest.fixture(scope="module")
def samples() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of 8 fresh continuations of each of 40 prompts (40, 8): summed score, gold, finished."""
    task = pydocs.task(split="test")
    torch.manual_seed(12)
    prompts = [prompt for prompt in task.prompts[::5][:40] for _ in range(8)]
    responses = sample(task.reference, prompts, task.max_new_tokens, 0)
    scores = summed_scores(task.scorer, prompts, responses)
    gold = [
        pydocs.gold("", text)
        for text in task.tokenizer.batch_decode(responses, skip_special_tokens=True)
    ]
    return (
        scores.reshape(40, 8),
        np.array(gold).reshape(40, 8),
        np.array([r[-1] == 0 for r in responses]),
    )


def test_summed_token_scores_follow_gold(samples: tuple[np.ndarray, ...]) -> None:
    scores, gold, finished = samples
    assert np.corrcoef(scores.ravel(), gold.ravel())[0, 1] > 0.65
    assert scores.std() == pytest.approx(1.0, abs=0.3)
    assert finished.mean() > 0.7


def test_best_of_eight_by_score_is_easier_to_read(samples: tuple[np.ndarray, ...]) -> None:
    scores, gold, _ = samples
    best = gold[np.arange(len(gold)), scores.argmax(1)]
    assert best.mean() > gold.mean() + 0.7 * gold.std()
