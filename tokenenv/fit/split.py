"""A split of examples by prompt, and the texts of its one side that are much like those of the
other."""

import hashlib
from collections.abc import Sequence

import numpy as np

from tokenenv.errors import InvalidArgument
from tokenenv.fit.examples import Example, Text

WIDTH = 5
"""Tokens of a shingle."""
NEAR = 0.8
"""The Jaccard similarity of two texts' shingles from which they count as near duplicates."""
COMMON = 0.1
"""A shingle that more than this share of held-out texts hold, and more than `FEW` of them, is left
out: it belongs to a prompt or a phrase that many texts share, and says nothing of any two."""
FEW = 50
SHOWN = 3
"""Places that a sentence names."""


def split_by_prompt(
    examples: Sequence[Example], share: float, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """Return the examples to train on and those to hold out. All examples of one prompt are on one
    side.

    The prompts are put in the order of a hash of their token ids and the seed, and the first
    `share` of them is held out: at least one, and never all. The same data in another order is
    split in the same way. Where all examples have one prompt, whole texts take its place.

    Args:
        share: of prompts, above 0 and below 1.
        seed: another one gives another split.

    Raises:
        InvalidArgument: the share is out of range, or there is one prompt with one text alone.
    """
    if not 0.0 < share < 1.0:
        raise InvalidArgument(f"held_out={share!r} must be a share above 0 and below 1, or data.")
    keys = [example.texts[0].prompt.tobytes() for example in examples]
    if len(set(keys)) == 1:
        keys = [b"|".join(text.response.tobytes() for text in e.texts) for e in examples]
    ordered = sorted(set(keys), key=lambda key: _hash(key, seed))
    if len(ordered) < 2:
        raise InvalidArgument(
            f"held_out={share:g} cannot split {len(examples)} examples of the same texts; give "
            "more data, or data of its own as held_out=."
        )
    count = min(max(round(share * len(ordered)), 1), len(ordered) - 1)
    held = set(ordered[:count])
    sides = [key in held for key in keys]
    return (
        [example for example, side in zip(examples, sides, strict=True) if not side],
        [example for example, side in zip(examples, sides, strict=True) if side],
    )


def _hash(key: bytes, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}|".encode() + key, digest_size=16).digest()


def duplicates(train: Sequence[Example], held_out: Sequence[Example]) -> list[str]:
    """Return a sentence on held-out texts that are in the training data too, and one on those that
    have a near duplicate there; none where there are none.

    Near duplicates have a Jaccard similarity of 0.8 or more of their runs of five tokens, prompt
    included. Runs that more than a tenth of the held-out texts hold are not compared.
    """
    ours = [(text, e.where) for e in train for text in e.texts]
    theirs = [(text, e.where) for e in held_out for text in e.texts]
    places: dict[bytes, str] = {}
    for text, where in ours:
        places.setdefault(_spelled(text), where)
    exact = [(where, places.get(_spelled(text))) for text, where in theirs]
    others = [(text, where) for text, where in theirs if _spelled(text) not in places]
    similar = _nearest([text for text, _ in ours], [text for text, _ in others])
    near = [
        (where, None if i is None else ours[i][1])
        for (_, where), i in zip(others, similar, strict=True)
    ]
    return [
        *_sentence(exact, len(theirs), "are in the training data too"),
        *_sentence(near, len(theirs), "have a near duplicate in the training data"),
    ]


def _sentence(pairs: Sequence[tuple[str, str | None]], count: int, what: str) -> list[str]:
    found = [f"{where} and {other}" for where, other in pairs if other is not None]
    if not found:
        return []
    more = ", and others" if len(found) > SHOWN else ""
    return [f"{len(found)} of {count} held-out texts {what}: {', '.join(found[:SHOWN])}{more}."]


def _spelled(text: Text) -> bytes:
    return len(text.prompt).to_bytes(8, "big") + text.ids.tobytes()


def _nearest(texts: Sequence[Text], others: Sequence[Text]) -> list[int | None]:
    """For each of `others` the number of the most similar of `texts`; None where it has no near
    duplicate among them."""
    index = _Index(others)
    best, found = np.full(len(others), np.nextafter(NEAR, 0.0)), np.full(len(others), -1)
    for number, text in enumerate(texts):
        similarity = index.similarity(text)
        better = similarity > best
        best[better], found[better] = similarity[better], number
    return [None if number < 0 else int(number) for number in found]


class _Index:
    """The texts that hold each shingle, for n texts."""

    def __init__(self, texts: Sequence[Text]) -> None:
        runs = [_shingles(text.ids) for text in texts]
        every = np.concatenate([np.zeros(0, np.uint64), *runs])
        owner = np.repeat(np.arange(len(texts)), [len(one) for one in runs])
        order = np.argsort(every, kind="stable")
        # The texts of shingle i are those from starts[i] to ends[i] of `owner`.
        self._owner = owner[order]
        self._shingles, starts = np.unique(every[order], return_index=True)
        self._starts, self._ends = starts, np.append(starts[1:], len(every))
        counts = self._ends - starts
        self._rare = counts <= max(FEW, COMMON * len(texts))
        compared = self._owner[np.repeat(self._rare, counts)]
        self._sizes = np.bincount(compared, minlength=len(texts))

    def similarity(self, text: Text) -> np.ndarray:
        """Return the Jaccard similarity of a text to each text of the index, (n,) float64."""
        own = _shingles(text.ids)
        places = np.searchsorted(self._shingles, own)
        places = places[places < len(self._shingles)]
        # Those below the end are of the first shingles of `own`, as both ascend.
        places = places[self._shingles[places] == own[: len(places)]]
        rare = places[self._rare[places]]
        size = len(own) - len(places) + len(rare)
        holders = [self._owner[self._starts[i] : self._ends[i]] for i in rare.tolist()]
        both = np.bincount(
            np.concatenate([np.zeros(0, np.int64), *holders]), minlength=len(self._sizes)
        )
        return both / np.maximum(size + self._sizes - both, 1)


def _shingles(ids: np.ndarray) -> np.ndarray:
    """The runs of `WIDTH` tokens of a text as numbers, each once, ascending, uint64; of a shorter
    text the whole of it."""
    runs = np.lib.stride_tricks.sliding_window_view(ids, min(WIDTH, len(ids))).astype(np.uint64)
    mixed = np.zeros(len(runs), np.uint64)
    for column in runs.T:
        mixed = (mixed ^ column + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return np.unique(mixed)
