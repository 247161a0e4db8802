"""Reward tokens' scores on policy tokens: by hand, and character by character."""

from itertools import accumulate, pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tokenenv.models.alignment import align, shares, token_ends

CHARACTERS = "ab \n.éßİ\u0301語한😀\u200d👩🏽\u0000"
TEXTS = st.text(st.sampled_from(CHARACTERS), max_size=12) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=8
)


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
        (["do", "do n", "don't"], [2, 2, 5]),  # cleaned up: what is taken back belongs to the token that does so
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


# ----------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    ("offsets", "ends", "expected"),
    [
        pytest.param([(0, 4)], [0, 1, 4], [[0.25, 0.75]], id="one over two"),
        pytest.param([(0, 1), (1, 3), (3, 4)], [0, 4], [[1], [1], [1]], id="several in one"),
        pytest.param([(0, 3), (3, 6)], [0, 2, 4, 6], [[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]], id="across"),
        pytest.param([(0, 2), (2, 6)], [4, 5, 6], [[0, 0], [0.5, 0.5]], id="over the prompt's end"),
        pytest.param([(0, 6)], [5, 6], [[1]], id="mostly prompt"),
        pytest.param([(0, 4), (4, 6)], [4, 6], [[0], [1]], id="up to the prompt's end"),
        pytest.param([(0, 2), (2, 4)], [0, 2, 2, 4], [[1, 0, 0], [0, 0, 1]], id="a policy token without characters"),
        pytest.param([(0, 1), (0, 1), (0, 1)], [0, 0, 1], [[0, 1]] * 3, id="three bytes of one character"),
        pytest.param([(0, 0), (0, 2), (2, 4), (0, 0)], [2, 3, 4], [[0, 0], [0, 0], [0.5, 0.5], [0, 1]], id="[CLS] and [SEP]"),
        pytest.param([(0, 2), (2, 4), (0, 0)], [2, 4, 4], [[0, 0], [1, 0], [0, 1]], id="[SEP] and a stop token"),
        pytest.param([(0, 2), (0, 0), (0, 0)], [2, 2, 2], [[0, 0], [0, 1], [0, 1]], id="two closing ones, no new characters"),
        pytest.param([(0, 2), (0, 0), (2, 4)], [0, 2, 4], [[1, 0], [1, 0], [0, 1]], id="a special token in the middle"),
        pytest.param([(0, 2), (0, 0), (2, 4)], [2, 4], [[0], [0], [1]], id="and behind the prompt"),
        pytest.param([(0, 2), (3, 3), (3, 4)], [0, 1, 4], [[0.5, 0.5], [0, 1], [0, 1]], id="a space cut from its offsets"),
        pytest.param([(0, 2), (3, 3)], [0, 2, 3, 3], [[1, 0, 0], [0, 1, 0]], id="a space at the end"),
        pytest.param([(0, 0), (0, 0)], [0, 0], [[0], [0]], id="a text without characters"),
        pytest.param([(0, 2), (0, 0)], [2], [[], []], id="an empty response"),
        pytest.param([], [1, 3, 4], np.zeros((0, 2)), id="no reward tokens"),
    ],
)
def test_shares_by_hand(offsets, ends, expected):
    actual = shares(offsets, np.array(ends))
    assert actual.dtype == np.float64
    assert actual.shape == (len(offsets), len(ends) - 1)
    np.testing.assert_array_equal(actual, expected)
    scores = np.arange(1, len(offsets) + 1)
    np.testing.assert_allclose(align(scores, offsets, np.array(ends)), scores @ np.asarray(expected), rtol=1e-6)


def test_a_whole_text_by_hand():
    """Policy: x | ' ca', 'fé ', stop. Reward: [CLS], 'x', ' c', 'afé', ' ', [SEP]."""
    ends = token_ends(["x", "x ca", "x café ", "x café "])
    scores = align([100, 10, 1, 3, 5, 7], [(0, 0), (0, 1), (1, 3), (3, 6), (6, 7), (0, 0)], ends)
    assert scores.tolist() == [1 + 1, 2 + 5, 7]
    assert scores.dtype == np.float32


# -------------------------------------------------- character by character


def places(offsets, prefixes):
    """For each reward token the policy tokens (-1: the prompt) that its characters belong to, one a character."""
    text, last = prefixes[-1], len(prefixes) - 2
    final = [
        min(t for t in range(len(prefixes)) if all(p.startswith(text[: c + 1]) for p in prefixes[t:])) - 1
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
    """Two random cuts of one text, the policy's by bytes; special tokens and spaces without offsets among the reward's."""
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
    np.testing.assert_allclose(align(scores, offsets, ends).sum(), scores @ np.array(in_response, float), atol=1e-5)


@given(pieces=st.lists(st.text(st.sampled_from(CHARACTERS), min_size=1, max_size=4), min_size=1), data=st.data())
def test_the_same_tokens_keep_their_scores(pieces, data):
    prompt = data.draw(st.integers(0, len(pieces)))
    prefixes = list(accumulate(pieces, initial=""))
    offsets = list(pairwise(map(len, prefixes)))
    actual = shares(offsets, token_ends(prefixes[prompt:]))
    np.testing.assert_array_equal(actual, np.eye(len(pieces))[:, prompt:])
