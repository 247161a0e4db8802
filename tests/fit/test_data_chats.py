"""Conversations as data: the tokens are those that a policy would have read and written."""

import fakes
import numpy as np
import pytest
from chat_templates import (
    DROPS_THOUGHTS,
    ENDS,
    FAMILIES,
    LEAVES_OUT,
    SYSTEM_LAST,
    THINKS_LAST,
    tokenizer_of,
)

from tokenenv.errors import InvalidArgument
from tokenenv.fit.data import read_examples
from tokenenv.fit.examples import Skipped
from tokenenv.models.chats import Chats, end_of_turn, frame_of
from tokenenv.models.encoding import encode_prompt


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def read(rows, tokenizer, kind="ranking", chat_template=True, skipped=None):
    skipped = Skipped() if skipped is None else skipped
    return read_examples(
        rows,
        kind,
        tokenizer,
        vocab_size=len(tokenizer),
        chat_template=chat_template,
        skipped=skipped,
    )


def one(row, tokenizer, kind="texts"):
    [example] = read([row], tokenizer, kind)
    return example.texts[0]


def spelled(ids, tokenizer):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def rendered(messages, tokenizer):
    """The whole conversation, and its end with the token that closes the last answer."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    end = tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer))
    return text[: text.rindex(end) + len(end)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_is_the_rendered_conversation_up_to_the_end_of_the_turn(family):
    tokenizer = tokenizer_of(FAMILIES[family])
    text = one({"prompt": "the cat?", "response": "is good"}, tokenizer)
    assert text.prompt.tolist() == Chats(tokenizer).encode("the cat?", "")
    assert spelled(text.ids, tokenizer) == rendered([user("the cat?"), said("is good")], tokenizer)
    assert tokenizer.convert_ids_to_tokens(int(text.response[-1])) == ENDS.get(family, "<|im_end|>")
    assert text.own is None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_to_write_an_answer_down_gives_the_same_tokens(family):
    tokenizer = tokenizer_of(FAMILIES[family])
    end = tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer))
    same = [
        {"prompt": "the cat?", "completion": "is good"},
        {"prompt": "the cat?", "response": "is good" + end},
        {"prompt": [user("the cat?")], "response": "is good"},
        {"prompt": [user("the cat?")], "response": [said("is good")]},
        {"prompt": "the cat?", "completion": [said("is good")]},
        {"messages": [user("the cat?"), said("is good")]},
        {"prompt": "the cat?", "response": [user("the cat?"), said("is good")]},
    ]
    found = [one(row, tokenizer).ids.tolist() for row in same]
    assert all(ids == found[0] for ids in found)


def test_a_cut_answer_is_not_closed():
    tokenizer = tokenizer_of(FAMILIES["chatml"])
    row = {"prompt": "the cat?", "response": "is go", "truncated": True}
    assert spelled(one(row, tokenizer).response, tokenizer) == "is go"
    whole = one(row | {"truncated": False}, tokenizer).response
    assert spelled(whole, tokenizer) == "is go<|im_end|>"


def test_what_a_template_writes_before_the_answer_belongs_to_it():
    tokenizer = tokenizer_of(THINKS_LAST)
    text = one({"prompt": "the cat?", "response": "is good"}, tokenizer)
    assert spelled(text.response, tokenizer) == "<think>\n\n</think>\n\nis good<|im_end|>"
    mistral = tokenizer_of(FAMILIES["mistral"])
    text = one({"prompt": "the cat?", "response": "is good"}, mistral)
    assert spelled(text.response, mistral) == " is good</s>"
    assert spelled(text.prompt, mistral).endswith("[/INST]")


@pytest.mark.parametrize("template", [DROPS_THOUGHTS, LEAVES_OUT, SYSTEM_LAST, *FAMILIES.values()])
def test_an_answer_is_what_the_policy_wrote_whatever_a_template_does_to_old_ones(template):
    tokenizer = tokenizer_of(template)
    text = one({"prompt": "the?", "response": "<think>\na\n</think>\n\nb"}, tokenizer)
    assert "<think>\na\n</think>\n\nb" in spelled(text.response, tokenizer)


def test_pairs_of_conversations_share_their_prompt():
    """TRL's and UltraFeedback's: whole conversations, with a prompt as a text beside them or
    without one."""
    tokenizer = tokenizer_of(FAMILIES["chatml"])
    begun = [user("a"), said("b"), user("c")]
    pair = {"chosen": [*begun, said("good")], "rejected": [*begun, said("bad")]}
    [example] = read([pair], tokenizer)
    chosen, rejected = example.texts
    assert chosen.prompt.tolist() == Chats(tokenizer).encode(begun, "")
    assert chosen.prompt.tolist() == rejected.prompt.tolist()
    found = [spelled(text.response, tokenizer) for text in example.texts]
    assert found == ["good<|im_end|>", "bad<|im_end|>"]
    same = [
        pair | {"prompt": "a"},
        {"prompt": begun, "chosen": [said("good")], "rejected": [said("bad")]},
        {"prompt": begun, "chosen": "good", "rejected": [said("bad")]},
        {"prompt": begun, "responses": ["good", "bad"]},
        {"prompt": begun, "responses": [[said("bad")], "good"], "scores": [0, 1]},
        {"responses": [pair["chosen"], pair["rejected"]]},
    ]
    for row in same:
        [again] = read([row], tokenizer)
        assert [t.ids.tolist() for t in again.texts] == [t.ids.tolist() for t in example.texts]


def test_identical_conversations_are_left_out():
    tokenizer, skipped = tokenizer_of(FAMILIES["chatml"]), Skipped()
    same = [user("a"), said("b")]
    other = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert len(read([{"chosen": same, "rejected": same}, other], tokenizer, skipped=skipped)) == 1
    assert skipped.places == {"chosen and rejected are identical": ["data[0]"]}


@pytest.mark.parametrize("family", ["chatml", "no_newline", "smollm2", "llama3", "gemma"])
def test_several_answers_are_own_and_what_is_between_them_is_not(family):
    tokenizer = tokenizer_of(FAMILIES[family])
    messages = [user("a"), said("one"), user("b"), said("two"), user("c"), said("three")]
    text = one({"messages": messages}, tokenizer)
    assert spelled(text.ids, tokenizer) == rendered(messages, tokenizer)
    assert text.prompt.tolist() == Chats(tokenizer).encode([user("a")], "")
    end = ENDS.get(family, "<|im_end|>")
    assert spelled(text.response[text.own], tokenizer) == f"one{end}two{end}three{end}"
    # As a prompt they are not learnt from: the last answer alone is.
    last = one({"prompt": messages[:-1], "response": messages[-1:]}, tokenizer)
    assert last.ids.tolist() == text.ids.tolist()
    assert spelled(last.response, tokenizer) == f"three{end}"
    assert last.own is None


def test_a_pair_may_go_on_for_several_turns():
    tokenizer = tokenizer_of(FAMILIES["chatml"])
    pair = {
        "prompt": "a",
        "chosen": [said("one"), user("b"), said("two")],
        "rejected": "one",
    }
    [example] = read([pair], tokenizer)
    chosen, rejected = example.texts
    assert spelled(chosen.response[chosen.own], tokenizer) == "one<|im_end|>two<|im_end|>"
    assert rejected.own is None


def test_spans_count_characters_of_the_answer_as_the_data_has_it():
    for family in FAMILIES:
        tokenizer = tokenizer_of(FAMILIES[family])
        # Some templates strip the spaces.
        row = {
            "prompt": "the cat?",
            "response": "  is good",
            "spans": [{"start": 5, "end": 9, "label": 1}],
        }
        text = one(row, tokenizer, "labels")
        assert spelled(text.response[text.target == 1], tokenizer).strip() == "good", family


def test_steps_are_one_answer():
    tokenizer = tokenizer_of(FAMILIES["chatml"])
    row = {"prompt": "the cat?", "completions": ["one", "two"], "labels": [True, False]}
    text = one(row, tokenizer, "labels")
    assert spelled(text.response, tokenizer) == "one\ntwo<|im_end|>"
    assert spelled(text.response[text.target == 0], tokenizer) == "two<|im_end|>"
    assert not np.isnan(text.target).any()


def test_without_the_option_a_chat_tokenizer_reads_plain_texts():
    tokenizer = tokenizer_of(FAMILIES["chatml"])
    [example] = read([{"prompt": "a", "response": " b"}], tokenizer, "texts", chat_template=False)
    text = example.texts[0]
    assert text.prompt.tolist() == encode_prompt("a", tokenizer)
    assert spelled(text.response, tokenizer) == " b</s>"


CHAT = {"messages": [user("a"), said("b")]}


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (CHAT, {"chat_template": False}, r"data\[0\]: 'messages' holds messages, which need chat_"),
        (
            {"prompt": [user("a")], "response": "b"},
            {"chat_template": False},
            r"data\[0\]: 'prompt' is no text .* Chat messages need chat_template=True",
        ),
        ({"prompt": "a", "response": [said("b"), user("c")]}, {}, "begin and end with a message"),
        ({"messages": [user("a")]}, {}, r"'messages' holds no message of the assistant's"),
        ({"messages": [user("a"), said("b"), user("c")]}, {}, "begin and end with a message"),
        ({"messages": [said("b")]}, {}, r"data\[0\] has the columns messages; the prompt is mi"),
        ({"messages": [user("a"), {"role": "assistant"}]}, {}, "role or content is no text"),
        ({"messages": [user("a"), said(None)]}, {}, "role or content is no text"),
        ({"messages": [user("a"), said("")]}, {}, r"data\[0\]: 'messages' is empty"),
        ({"prompt": "a", "response": "<|im_end|>"}, {}, r"data\[0\]: 'response' is empty"),
        (
            {"prompt_ids": [5], "response": [said("b")]},
            {},
            "need chat_template=True and a prompt that is a text or messages",
        ),
        (
            {"chosen": [user("a"), said("b")], "rejected": [user("c"), said("b")]},
            {},
            "'chosen' holds no message of the assistant's",
        ),
        ({"chosen": "a b", "rejected": "a c"}, {}, "the prompt is missing"),
    ],
)
def test_what_is_no_conversation_is_named(row, options, message):
    kind = "ranking" if "chosen" in row else "texts"
    with pytest.raises(InvalidArgument, match=message):
        read([row], tokenizer_of(FAMILIES["chatml"]), kind, **options)


def test_a_template_that_does_not_take_it_is_named_with_the_place():
    rows = [CHAT, {"messages": [{"role": "system", "content": "x"}, *CHAT["messages"]]}]
    with pytest.raises(InvalidArgument, match=r"data\[1\].*no system here"):
        read(rows, tokenizer_of(FAMILIES["gemma"]), "texts")
    turns = [user("a"), said("<think>x</think>b"), user("c"), said("d")]
    with pytest.raises(InvalidArgument, match=r"data\[1\].*rewrites what was said before"):
        read([CHAT, {"messages": turns}], tokenizer_of(DROPS_THOUGHTS), "texts")
    with pytest.raises(InvalidArgument, match="needs a tokenizer with a chat template"):
        read([CHAT], fakes.tokenizer(), "texts")


def test_a_reward_model_is_given_the_same_text():
    """Rules and reward models with another tokenizer read `Frame.fill`."""
    tokenizer = tokenizer_of(FAMILIES["llama3"])
    frame = frame_of(tokenizer, [user("the cat?")])
    text = one({"prompt": "the cat?", "response": "is good"}, tokenizer)
    assert frame.fill("is good", complete=True) == spelled(text.ids, tokenizer)
