"""Reward tokens' scores on policy tokens: by hand, and character by character."""

from functools import partial
from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tokenenv.models import alignment
from tokenenv.models.alignment import align, read_text, token_ends

CHARACTERS = "ab \n.éßİ\u0301語한😀\u200d👩🏽\u0000"
TEXTS = st.text(st.sampled_from(CHARACTERS), max_size=12) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=8
)


def shares(offsets, ends):
    """(R, T), dense."""
    out = np.zeros((len(offsets), len(ends) - 1))
    reward, policy, part = alignment.shares(offsets, np.asarray(ends))
    assert part.dtype == np.float64
    np.add.at(out, (reward, policy), part)
    return out


@st.composite
def cut(draw, length, start=0):
    """Ascending places from `start` to `length`, both of them included, some of them equal."""
    inner = draw(st.lists(st.integers(start, length), max_size=7))
    return [start, *sorted(inner), length]


# -------------------------------------------------------- where tokens end


@pytest.mark.parametrize(
    ("prefixes", "ends"),
    [
        (["one", "one two", "one two"], [3, 7, 7]),  # a token without characters
        (["", "a", "ab"], [0, 1, 2]),
        (["caf\ufffd", "café", "café!"], [3, 4, 5]),  # the prompt ends in the middle of a character
        (["a", "a\ufffd", "a\ufffd", "a\ufffd", "a😀"], [1, 1, 1, 1, 2]),
        (["a", "a\ufffd", "a\ufffd"], [1, 2, 2]),  # bytes that never make a character
        (["a", "a ", "a b"], [1, 2, 3]),
        (["a", "a", "a b"], [1, 1, 3]),  # a space that is decoded with the next word
        (
            ["do", "do n", "don't"],
            [2, 2, 5],
        ),  # cleaned up: what is taken back belongs to the token that does so
        (["x y", "x", "x z"], [1, 1, 3]),
        (["a b cdef", "a-b cdef"], [1, 8]),  # agrees again behind the place where it does not
        (["a b", "ab", "a bc"], [1, 1, 4]),  # agreed, taken back and agreed again
        (["whole"], [5]),
        ([""], [0]),
    ],
)
def test_where_tokens_end(prefixes, ends):
    assert token_ends(prefixes).tolist() == ends
    assert token_ends(prefixes).dtype == np.int64


@given(text=TEXTS, data=st.data())
def test_a_character_belongs_to_the_token_with_its_last_byte(text, data):
    raw = text.encode()
    cuts = data.draw(cut(len(raw), start=data.draw(st.integers(0, len(raw)))))
    ends = token_ends([raw[:place].decode(errors="replace") for place in cuts])
    assert ends.tolist() == [len(raw[:place].decode(errors="ignore")) for place in cuts]


# ------------------------------------------------ texts decoded by windows


def sentence_piece():
    """Words begin with a mark that becomes a space, but at the beginning of a text; unknown
    characters are bytes."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "a", "b", "▁a", "▁ba", ".", "▁."]
    core = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True)
    )
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    core.decoder = decoders.Sequence(steps)
    return core, [
        *range(0xE0, 0xF8, 5),
        *range(0x80, 0xC0, 13),
        *range(0x20, 0x80, 31),
        *range(256, 263),
    ]


def byte_pieces():
    """Tokens hold whole characters, parts of one, and parts of two."""
    raw = ["é", "語", "😀", "a", " a", " ", "."]
    marks = dict(zip(sorted(pre_tokenizers.ByteLevel.alphabet()), range(256), strict=True))
    whole = {
        "".join(bytes_to_unicode()[byte] for byte in piece.encode()): 256 + i
        for i, piece in enumerate(raw)
    }
    core = Tokenizer(models.BPE(marks | whole, []))
    core.decoder = decoders.ByteLevel()
    return core, [
        *(marks[bytes_to_unicode()[byte]] for piece in raw for byte in piece.encode()),
        *range(256, 263),
    ]


def word_pieces():
    """Spaces are put between words, and taken back before full stops and in contractions."""
    pieces = ["[UNK]", "do", "n", "##n", "'", "t", "n't", ".", ",", "##s", "é", "##é"]
    core = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}))
    core.decoder = decoders.WordPiece(cleanup=True)
    return core, list(range(len(pieces)))


def word_ends():
    """Words end with a mark that becomes a space, but at the end of a text."""
    pieces = ["a", "a</w>", "b", "ba</w>", ".</w>"]
    core = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], end_of_word_suffix="</w>")
    )
    core.decoder = decoders.BPEDecoder()
    return core, list(range(len(pieces)))


FAMILIES = {make.__name__: make() for make in (sentence_piece, byte_pieces, word_pieces, word_ends)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("clean_up", [False, True])
@given(data=st.data())
def test_windows_decode_what_whole_prefixes_do(family, clean_up, data):
    core, ids = FAMILIES[family]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    decode = partial(
        tokenizer.batch_decode, skip_special_tokens=True, clean_up_tokenization_spaces=clean_up
    )
    tokens = data.draw(st.lists(st.sampled_from([*ids, tokenizer.eos_token_id]), max_size=60))
    prompt = tokens[: data.draw(st.integers(0, len(tokens)))]
    response = tokens[len(prompt) :]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alignment, "WINDOW", data.draw(st.sampled_from([8, 16])))
        text, ends = read_text(decode, prompt, response)
    prefixes = decode([prompt + response[:k] for k in range(len(response) + 1)])
    assert text == prefixes[-1]
    assert ends.tolist() == token_ends(prefixes).tolist()


def test_a_decoder_that_looks_back_further_than_a_window_costs_more_and_is_right():
    def decode(texts):
        return [("x" * len(ids)) + ("!" if len(ids) > 40 else "") for ids in texts]

    text, ends = read_text(decode, [0] * 20, [0] * 40)
    assert (text, ends.tolist()) == ("x" * 60 + "!", [*range(20, 60), 61])


def test_the_cost_of_decoding_is_linear_in_the_tokens():
    core, _ = FAMILIES["byte_pieces"]
    tokenizer, decoded = PreTrainedTokenizerFast(tokenizer_object=core), []

    def decode(texts):
        decoded.append(sum(map(len, texts)))
        return tokenizer.batch_decode(texts)

    text, ends = read_text(
        decode, [259] * 10, [258, 259, 260] * 400
    )  # of characters with four bytes, too
    assert (len(text), ends[0], len(ends)) == (10 + 4 * 400, 10, 1201)
    assert sum(decoded) < 1210 * 3 * alignment.WINDOW  # every prefix: 1210 * 605


# ----------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    ("offsets", "ends", "expected"),
    [
        pytest.param([(0, 4)], [0, 1, 4], [[0.25, 0.75]], id="one over two"),
        pytest.param([(0, 1), (1, 3), (3, 4)], [0, 4], [[1], [1], [1]], id="several in one"),
        pytest.param(
            [(0, 3), (3, 6)], [0, 2, 4, 6], [[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]], id="across"
        ),
        pytest.param([(0, 2), (2, 6)], [4, 5, 6], [[0, 0], [0.5, 0.5]], id="over the prompt's end"),
        pytest.param([(0, 6)], [5, 6], [[1]], id="mostly prompt"),
        pytest.param([(0, 4), (4, 6)], [4, 6], [[0], [1]], id="up to the prompt's end"),
        pytest.param(
            [(0, 2), (2, 4)],
            [0, 2, 2, 4],
            [[1, 0, 0], [0, 0, 1]],
            id="a policy token without characters",
        ),
        pytest.param(
            [(0, 1), (0, 1), (0, 1)], [0, 0, 1], [[0, 1]] * 3, id="three bytes of one character"
        ),
        pytest.param(
            [(0, 0), (0, 2), (2, 4), (0, 0)],
            [2, 3, 4],
            [[0, 0], [0, 0], [0.5, 0.5], [0, 1]],
            id="[CLS] and [SEP]",
        ),
        pytest.param(
            [(0, 2), (2, 4), (0, 0)],
            [2, 4, 4],
            [[0, 0], [1, 0], [0, 1]],
            id="[SEP] and a stop token",
        ),
        pytest.param(
            [(0, 2), (0, 0), (0, 0)],
            [2, 2, 2],
            [[0, 0], [0, 1], [0, 1]],
            id="two closing ones, no new characters",
        ),
        pytest.param(
            [(0, 2), (0, 0), (2, 4)],
            [0, 2, 4],
            [[1, 0], [1, 0], [0, 1]],
            id="a special token in the middle",
        ),
        pytest.param([(0, 2), (0, 0), (2, 4)], [2, 4], [[0], [0], [1]], id="and behind the prompt"),
        pytest.param(
            [(0, 2), (3, 3), (3, 4)],
            [0, 1, 4],
            [[0.5, 0.5], [0, 1], [0, 1]],
            id="a space cut from its offsets",
        ),
        pytest.param(
            [(0, 2), (3, 3)], [0, 2, 3, 3], [[1, 0, 0], [0, 1, 0]], id="a space at the end"
        ),
        pytest.param([(0, 0), (0, 0)], [0, 0], [[0], [0]], id="a text without characters"),
        pytest.param([(0, 2), (0, 0)], [2], [[], []], id="an empty response"),
        pytest.param([], [1, 3, 4], np.zeros((0, 2)), id="no reward tokens"),
    ],
)
def test_shares_by_hand(offsets, ends, expected):
    actual = shares(offsets, np.array(ends))
    assert actual.shape == (len(offsets), len(ends) - 1)
    np.testing.assert_array_equal(actual, expected)
    scores = np.arange(1, len(offsets) + 1)
    np.testing.assert_allclose(
        align(scores, offsets, np.array(ends)), scores @ np.asarray(expected), rtol=1e-6
    )


def test_a_whole_text_by_hand():
    """Policy: x | ' ca', 'fé ', stop. Reward: [CLS], 'x', ' c', 'afé', ' ', [SEP]."""
    ends = token_ends(["x", "x ca", "x café ", "x café "])
    scores = align([100, 10, 1, 3, 5, 7], [(0, 0), (0, 1), (1, 3), (3, 6), (6, 7), (0, 0)], ends)
    assert scores.tolist() == [1 + 1, 2 + 5, 7]
    assert scores.dtype == np.float32


# -------------------------------------------------- character by character


def places(offsets, prefixes):
    """For each reward token the policy tokens (-1: the prompt) that its characters belong to, one a
    character."""
    text, last = prefixes[-1], len(prefixes) - 2
    final = [
        min(
            t
            for t in range(len(prefixes))
            if all(p.startswith(text[: c + 1]) for p in prefixes[t:])
        )
        - 1
        for c in range(len(text))
    ]
    reached = 0
    for i, (begin, end) in enumerate(offsets):
        reached = max(reached, end)
        if begin < end:
            yield final[begin:end]
        elif end < reached and all(b == e for b, e in offsets[i:]):
            yield [last]
        else:
            yield final[reached - 1 : reached] if reached else []


@st.composite
def aligned(draw):
    """Two random cuts of one text, the policy's by bytes; special tokens and spaces without offsets
    among the reward's."""
    text = draw(TEXTS)
    raw = text.encode()
    cuts = draw(cut(len(raw), start=draw(st.integers(0, len(raw)))))
    cuts += [cuts[-1]] * draw(st.integers(0, 2))
    offsets = [(b, e) for b, e in pairwise(draw(cut(len(text)))) if b < e or draw(st.booleans())]
    for at in draw(st.lists(st.integers(0, len(offsets)), max_size=3)):
        offsets.insert(at, (0, 0))
    return offsets, [raw[:place].decode(errors="replace") for place in cuts]


@given(case=aligned(), seed=st.integers(0, 99))
@example(case=([(0, 0), (0, 2), (0, 0)], ["a\ufffd", "a\ufffd", "aé", "aé"]), seed=0)
def test_shares_equal_those_counted_character_by_character(case, seed):
    offsets, prefixes = case
    ends = token_ends(prefixes)
    actual = shares(offsets, ends)
    owners = [[t for t in own if t >= 0] for own in places(offsets, prefixes)]
    assert (actual >= 0).all()
    for row, own in zip(actual, owners, strict=True):
        np.testing.assert_allclose(row, [own.count(t) / max(1, len(own)) for t in range(len(row))])
    in_response = [bool(own) for own in owners]
    np.testing.assert_allclose(actual.sum(1), in_response)
    scores = np.random.default_rng(seed).normal(size=len(offsets))
    np.testing.assert_allclose(
        align(scores, offsets, ends).sum(), scores @ np.array(in_response, float), atol=1e-5
    )


@given(
    pieces=st.lists(st.text(st.sampled_from(CHARACTERS), min_size=1, max_size=4), min_size=1),
    data=st.data(),
)
def test_the_same_tokens_keep_their_scores(pieces, data):
    prompt = data.draw(st.integers(0, len(pieces)))
    prefixes = list(accumulate(pieces, initial=""))
    offsets = list(pairwise(map(len, prefixes)))
    actual = shares(offsets, token_ends(prefixes[prompt:]))
    np.testing.assert_array_equal(actual, np.eye(len(pieces))[:, prompt:])
