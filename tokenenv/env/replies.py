"""What the environment writes into texts: whom it asks, and what it takes for an answer."""

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tokenenv.env.texts import TextBuffer
from tokenenv.errors import InvalidArgument
from tokenenv.prompts import read_continuation
from tokenenv.turns import Reply, TextSoFar
from tokenenv.types import Task, TokenSpec


@dataclass(frozen=True, slots=True)
class Replies:
    """What the environment did with N texts after a token of the policy's."""

    slots: np.ndarray
    """(n,) int64: the slots that it wrote into."""
    tokens: list[list[int]]
    """What it wrote there, 1 token or more each."""
    answered: np.ndarray
    """(N,) bool: the texts of which it said something, if only a reward: none of them ends by its
    stop token."""
    ends: np.ndarray
    """(N,) bool: the texts that it ended."""
    cut: np.ndarray
    """(N,) bool: the texts whose reply had no room."""
    reward: np.ndarray
    """(N,) float32: the task's own rewards of turns."""
    length: np.ndarray = field(repr=False)
    """(N,) int64: tokens of each text before it wrote."""

    @property
    def wrote(self) -> np.ndarray:
        """(N,) bool: the texts that it wrote into."""
        mask = np.zeros(len(self.ends), dtype=bool)
        mask[self.slots] = True
        return mask

    def padded(self) -> np.ndarray:
        """Return what was written, (n, K) int64, right-padded."""
        width = max(map(len, self.tokens))
        rows = [[*ids, *[0] * (width - len(ids))] for ids in self.tokens]
        return np.asarray(rows, dtype=np.int64)


def is_asked(spec: TokenSpec, token: int) -> bool:
    """Return whether the environment is asked after this token of the policy's."""
    return spec.responds and (
        spec.turn_end_token_ids is None or int(token) in spec.turn_end_token_ids
    )


def answer(task: Task, spec: TokenSpec, text: TextSoFar) -> Reply | None:
    """Ask the task what follows the text, and return it with its tokens as a list of ids.

    Raises:
        InvalidArgument: it is no `Reply`, its tokens are no ids of the vocabulary, its reward is
            not finite, or its end is neither True nor False.
    """
    assert task.respond is not None
    # A copy: what respond() does to a row must not change the env's table.
    reply = task.respond(replace(text, columns=copy.deepcopy(dict(text.columns))))
    if reply is None:
        return None
    if not isinstance(reply, Reply):
        raise InvalidArgument(
            f"respond() returned {reply!r}; it must return a tokenenv.Reply, or None."
        )
    try:
        reward = float(reply.reward)
    except (TypeError, ValueError, OverflowError):
        reward = float("nan")
    if not np.isfinite(reward):
        raise InvalidArgument(
            f"respond() returned a Reply with reward={reply.reward!r}; it must be a finite number."
        )
    if not isinstance(reply.ends, bool | np.bool_):
        raise InvalidArgument(
            f"respond() returned a Reply with ends={reply.ends!r}; it must be True or False."
        )
    ids = read_continuation(reply.tokens, spec, "respond()'s Reply")
    return Reply(ids, reward, bool(reply.ends))


def reply_all(
    task: Task, spec: TokenSpec, texts: TextBuffer, tokens: np.ndarray, active: np.ndarray
) -> Replies:
    """Ask for every active slot that has just been given one of `tokens` (N,), and append what the
    environment writes. A reply that has no room is not written."""
    count = len(tokens)
    answered, ends, cut = (np.zeros(count, dtype=bool) for _ in range(3))
    reward, before = np.zeros(count, dtype=np.float32), texts.length.copy()
    written: dict[int, list[int]] = {}
    for slot in map(int, np.flatnonzero(active)):
        if not is_asked(spec, tokens[slot]):
            continue
        reply = answer(task, spec, texts.so_far(slot, spec.tokenizer))
        if reply is None:
            continue
        ids: Any = reply.tokens
        answered[slot], ends[slot], reward[slot] = True, reply.ends, reply.reward
        cut[slot] = before[slot] + len(ids) > spec.max_length
        if len(ids) and not cut[slot]:
            written[slot] = ids
    slots = np.asarray(list(written), dtype=np.int64)
    if written:
        texts.write(slots, list(written.values()))
    return Replies(slots, list(written.values()), answered, ends, cut, reward, before)
