"""Prompts and continuations, to token ids and back, with tokenizers of every make."""

import fakes
import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from makes import MAKES, word_level, wrapped
from tokenizers import processors

from tokenenv.models.encoding import (
    decode_pairs,
    decode_segments,
    encode_continuation,
    encode_prompt,
    special_ids,
)
from tokenenv.prompts import load_prompts
from tokenenv.rewards.rule import Rule
from tokenenv.turns import Segment

LITERAL = [name for name in MAKES if name != "words"]
WORDS = st.sampled_from(["the", "cat", "walk", "ing", "good", "a", ",", "x9"])


def decoded(ids, tokenizer):
    return tokenizer.decode(ids, skip_special_tokens=True)


# -------------------------------------------------------------- continuations


@pytest.mark.parametrize("make", MAKES)
def test_a_continuation_gets_no_special_tokens_and_a_prompt_keeps_those_the_tokenizer_adds(make):
    tokenizer = MAKES[make]()
    for text in ("is good", " is good", "is"):
        assert not set(encode_continuation(text, tokenizer)) & {0, 1, 2}
        assert encode_prompt(text, tokenizer) == tokenizer(text)["input_ids"]
        assert 1 in encode_prompt(text, tokenizer)
    assert (
        encode_continuation(" good</s>", tokenizer)[-1] == 2
    )  # special tokens that are spelled out are what they are


@pytest.mark.parametrize("make", LITERAL)
@pytest.mark.parametrize("text", [" is good", "ing", ", not", "  two", "?"])
def test_prompt_and_continuation_are_the_text_as_it_stands(make, text):
    tokenizer = MAKES[make]()
    prompt = encode_prompt("the walk", tokenizer)
    whole = decoded(prompt + encode_continuation(text, tokenizer), tokenizer)
    assert whole == "the walk" + text


def test_line_breaks_are_no_word_of_the_text_they_are_encoded_behind():
    tokenizer = MAKES["bytes"]()
    for text in ("\n", "\n\n", "\nthe cat", " \n"):
        assert tokenizer.decode(encode_continuation(text, tokenizer)) == text


@pytest.mark.parametrize("make", LITERAL)
@settings(max_examples=40, deadline=None)
@given(
    prompt=st.lists(WORDS, min_size=1, max_size=3),
    words=st.lists(WORDS, min_size=1, max_size=4),
    glue=st.sampled_from(["", " "]),
)
def test_what_a_rule_reads_goes_back_as_it_came(make, prompt, words, glue):
    """decode_pairs and encode_continuation are each other's inverse, up to how the tokenizer cuts a
    word."""
    tokenizer = MAKES[make]()
    start, response = encode_prompt(" ".join(prompt), tokenizer), glue + " ".join(words)
    ids = encode_continuation(response, tokenizer)
    assert decode_pairs([(start, ids)], tokenizer) == [(" ".join(prompt), response)]


def make_env(tokenizer, **options):
    model = fakes.causal_lm(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2)
    options = {
        "prompts": ["the cat"],
        "max_prompt_tokens": 12,
        "max_new_tokens": 12,
        "reward": {},
        "kl": "none",
        **options,
    }
    return gym.make_vec(
        "tokenenv/TextGen-v0", num_envs=2, model=model, tokenizer=tokenizer, **options
    )


@pytest.mark.parametrize("make", MAKES)
def test_prefixes_and_responses_as_texts(make):
    tokenizer = MAKES[make]()
    seen = []
    envs = make_env(
        tokenizer, reward=Rule(lambda prompt, response: seen.append((prompt, response)) or 1.0)
    )
    prompt = tokenizer("the cat")["input_ids"]
    obs, _ = envs.reset(options={"prefixes": [" is", " is good"]})
    for row, text in enumerate((" is", " is good")):
        continued = encode_continuation(text, tokenizer)
        assert obs["tokens"][row, : obs["length"][row]].tolist() == prompt + continued
        assert obs["prompt_length"][row] == len(prompt)
    scored = envs.unwrapped.score_episodes(["the cat"], [" is good</s>"])
    assert scored.lengths.tolist() == [len(encode_continuation(" is good", tokenizer)) + 1]
    assert seen[-1] == ("the cat", " is good")


# -------------------------------------------------------------------- prompts


def test_a_beginning_that_is_spelled_out_is_not_added_again():
    for make in ("bytes", "legacy", "words"):
        tokenizer = MAKES[make]()
        once = tokenizer("the cat")["input_ids"]
        assert encode_prompt("<s>the cat", tokenizer)[:1] == [1]
        assert encode_prompt("<s>the cat", tokenizer).count(1) == 1 == once.count(1)
    silent = wrapped(word_level(), processors.TemplateProcessing(single="$A", special_tokens=[]))
    assert encode_prompt("<s> <s> cat", silent) == [1, 1, 4]  # what nobody added is the user's
    envs = make_env(MAKES["words"](), prompts=["<s> the cat"])
    obs, _ = envs.reset()
    assert obs["tokens"][0, : obs["length"][0]].tolist() == [1, 3, 4, 2]


def test_truncated_prompts_keep_the_special_tokens_at_their_beginning():
    tokenizer = MAKES["bytes"]()
    options = {"vocab_size": len(tokenizer), "max_prompt_tokens": 4, "long_prompts": "truncate"}
    whole = tokenizer("the cat is good, a dog")["input_ids"]
    assert load_prompts(["the cat is good, a dog"], tokenizer, **options) == [[1, *whole[-3:]]]
    assert load_prompts([whole[1:]], tokenizer, **options) == [whole[-4:]]
    assert load_prompts([[1, 1, 1, 1, 1, 9]], tokenizer, **options) == [[1, 1, 1, 9]]
    assert load_prompts([list(range(3, 9))], None, **options) == [[5, 6, 7, 8]]


def test_special_ids_are_marks_and_not_the_unknown_word():
    tokenizer = fakes.tokenizer()
    tokenizer.add_tokens(["more"])
    assert special_ids(tokenizer) == {fakes.PAD, fakes.EOS}


@pytest.mark.parametrize("pad", [-1, 7, 400])
def test_a_pad_id_that_the_model_has_not_counts_as_none(pad):
    """A [PAD] that was added to the tokenizer alone."""
    tokenizer = wrapped(word_level())
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 7
    made = type("Padded", (type(tokenizer),), {"pad_token_id": pad})
    tokenizer.__class__ = made
    model = fakes.causal_lm(vocab_size=7, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    options = {
        "prompts": ["the cat"],
        "max_prompt_tokens": 4,
        "max_new_tokens": 3,
        "reward": {},
        "tokenizer": tokenizer,
    }
    envs = gym.make_vec(
        "tokenenv/TextGen-v0", num_envs=2, model=model, autoreset_mode="NextStep", **options
    )
    assert envs.unwrapped.token_spec.pad_token_id == 2
    obs, _ = envs.reset(seed=0)
    assert envs.observation_space.contains(obs)
    for tokens in ([2, 4], [4, 4], [4, 4], [4, 4]):
        obs, *_ = envs.step(np.array(tokens))
        assert envs.observation_space.contains(obs)
    envs.unwrapped.load_state(envs.unwrapped.save_state())


# ------------------------------------------------------- prompts and responses


@pytest.mark.parametrize("make", MAKES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_prompt_and_response_are_cut_out_of_the_whole(make, data):
    tokenizer = MAKES[make]()
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=12))
    at = data.draw(st.integers(0, len(ids)))
    prompt, response = decode_pairs([(ids[:at], ids[at:])], tokenizer)[0]
    assert prompt + response == decoded(ids, tokenizer)
    assert decoded(ids[:at], tokenizer).startswith(prompt)


@pytest.mark.parametrize("make", MAKES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_segments_are_cut_out_of_the_whole(make, data):
    tokenizer = MAKES[make]()
    parts = data.draw(
        st.lists(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=4), max_size=4)
    )
    prompt, *others = parts or [[]]
    segments = [Segment(i % 2 == 0, ids) for i, ids in enumerate(others)]
    texts = decode_segments(prompt, segments, tokenizer)
    response = decode_pairs([(prompt, [token for ids in others for token in ids])], tokenizer)[0][1]
    assert len(texts) == len(segments)
    assert "".join(texts) == (response if segments else "")


def test_a_character_that_begins_in_the_prompt_belongs_to_the_response():
    tokenizer = MAKES["bytes"]()
    ids = tokenizer("the 🦊!", add_special_tokens=False)["input_ids"]
    cut = next(i for i in range(len(ids)) if "\ufffd" in tokenizer.decode(ids[:i]))
    assert decode_pairs([(ids[:cut], ids[cut:])], tokenizer) == [("the ", "🦊!")]


@pytest.mark.parametrize("make", MAKES)
def test_rules_and_gold_keep_the_joining_space(make):
    tokenizer, seen = MAKES[make](), []

    def note(prompt, response):
        seen.append((prompt, response))
        return 1.0

    envs = make_env(tokenizer, reward=Rule(note), gold=note, autoreset_mode="SameStep")
    envs.reset(seed=0, options={"prompts": ["the cat"] * 2})
    for token in [*encode_continuation(" is good", tokenizer), 2]:
        infos = envs.step(np.full(2, token))[4]
    assert infos["gold"].tolist() == [1.0, 1.0]
    envs.unwrapped.score_episodes(["the cat"], [" is good</s>"])
    assert len(seen) == 6
    assert set(seen) == {("the cat", " is good")}
