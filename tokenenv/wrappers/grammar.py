"""The tokens that may come next under a regular expression or a grammar, by llguidance.

Suffixes: V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenenv.errors import InvalidArgument, missing
from tokenenv.models.encoding import special_ids
from tokenenv.models.pieces import TokenPieces
from tokenenv.turns import Segment
from tokenenv.types import TokenSpec

SPECIAL = b"\xff"
"""The first byte of the name of a token that has no text. No text has this byte."""


def compile_matcher(
    spec: TokenSpec, *, regex: str | None = None, grammar: str | None = None
) -> Any:
    """Make a matcher that stands at the start of a response, or of a turn of it.

    It matches its text. A space before the first word is allowed under `regex`; a
    grammar has to allow it itself.

    Raises:
        InvalidArgument: the expression cannot be read, or the task's tokens have no text.
        MissingDependency: llguidance is not installed.
    """
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise missing("regex= or grammar=", "llguidance") from error
    if spec.tokenizer is None or not spec.stop_token_ids:
        raise InvalidArgument(
            "regex= and grammar= need a task whose tokens have text, and that has a stop token."
        )
    wanted = (
        LLMatcher.grammar_from_regex(f" ?(?:{regex})")
        if grammar is None
        else LLMatcher.grammar_from_lark(grammar)
    )
    matcher = LLMatcher(_tokenizer(spec), wanted, log_level=0)
    if matcher.is_error():
        name, given = ("regex", regex) if grammar is None else ("grammar", grammar)
        raise InvalidArgument(
            f"{name}={given!r} cannot be used: {matcher.get_error().splitlines()[0]}."
        )
    return matcher


class Follower:
    """The tokens that may follow the response of one running text, or its present turn.

    Tokens are matched by their text alone. Where every word is one token, a token whose text is the
    beginning of another's (" a" of " amazing") may fit and still lead nowhere. Such tokens are
    tried out: one that no token can follow is not allowed.
    """

    def __init__(self, start: Any, spec: TokenSpec) -> None:
        self._start, self._matcher = start, start.deep_copy()
        self._stops = sorted(end_ids(spec))
        self._vocab_size = spec.vocab_size
        self._read: list[int] | None = []

    def follow(self, response: Sequence[int]) -> None:
        """Read this response: only its last token if the rest is what was read before, else all of
        it."""
        response = list(response)
        if response == self._read:
            return
        goes_on = bool(response) and response[:-1] == self._read
        # Whatever interrupts the matcher, it starts anew next time.
        self._read = None
        if goes_on:
            self._matcher.consume_token(response[-1])
        else:
            self._matcher = self._start.deep_copy()
            self._matcher.consume_tokens(response)
        self._read = response

    def allowed(self, beginnings: np.ndarray) -> np.ndarray:
        """Return which tokens are allowed, (V,) bool, never all False; `beginnings` are the tokens
        whose text is the beginning of another's."""
        read, self._read = self._read, None
        allowed = self._fitting()
        for token in beginnings[allowed[beginnings]]:
            self._matcher.consume_token(int(token))
            allowed[token] = self._matcher.is_accepting() or self._fitting().any()
            self._matcher.rollback(1)
        allowed[self._stops] = self._matcher.is_accepting() or not allowed.any()
        self._read = read
        return allowed

    def _fitting(self) -> np.ndarray:
        """Return the tokens that fit by their text, (V,) bool; stop tokens never do."""
        if self._matcher.is_stopped() or self._matcher.is_error():
            return np.zeros(self._vocab_size, bool)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        fitting = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)
        fitting[self._stops] = False
        return fitting


def end_ids(spec: TokenSpec) -> set[int]:
    """Return the ids that end what is matched: stop tokens, and those without text that end a
    turn."""
    special = special_ids(spec.tokenizer) | set(spec.tokenizer.all_special_ids)
    return set(spec.stop_token_ids) | (special & set(spec.turn_end_token_ids or ()))


def current_turn(segments: Sequence[Segment], ends: set[int]) -> list[int]:
    """Return the policy's tokens since the environment wrote last, or since the last of `ends`."""
    if not segments or not segments[-1].own:
        return []
    tokens = segments[-1].tokens
    start = max((i + 1 for i, token in enumerate(tokens) if token in ends), default=0)
    return tokens[start:]


def beginnings(spec: TokenSpec) -> np.ndarray:
    """Return the ids of the tokens whose text is the beginning of another token's, in vocabularies
    of whole words; elsewhere a token may go on within a word, and there are none."""
    if not _whole_words(spec.tokenizer):
        return np.zeros(0, np.int64)
    pieces = _pieces(spec)
    return np.array(
        [i for i, a in enumerate(pieces) if any(b != a and b.startswith(a) for b in pieces)],
        np.int64,
    )


def _tokenizer(spec: TokenSpec) -> Any:
    import llguidance
    from llguidance.hf import from_tokenizer

    if not _whole_words(spec.tokenizer):
        return from_tokenizer(
            spec.tokenizer, n_vocab=spec.vocab_size, eos_token=list(spec.stop_token_ids)
        )
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Words(spec)))


class _Words:
    """A tokenizer whose tokens are words, as llguidance asks for one.

    llguidance must be able to write any text with it. So every byte is a token as well, with an id
    beyond V, where no policy can choose it.
    """

    bos_token_id = None

    def __init__(self, spec: TokenSpec) -> None:
        pieces = _pieces(spec)
        self.tokens = [*pieces, *(bytes([byte]) for byte in range(256))]
        self.special_token_ids = [i for i, piece in enumerate(pieces) if piece.startswith(SPECIAL)]
        self.eos_token_id = spec.stop_token_ids[0]

    def __call__(self, text: bytes) -> list[int]:
        """Return the ids of a text: from the left the longest word that fits, or a byte."""
        ids: list[int] = []
        while text:
            i = max(
                (i for i, piece in enumerate(self.tokens) if text.startswith(piece)),
                key=lambda i: len(self.tokens[i]),
            )
            ids.append(i)
            text = text[len(self.tokens[i]) :]
        return ids


def _whole_words(tokenizer: Any) -> bool:
    return type(tokenizer.backend_tokenizer.model).__name__ == "WordLevel"


def _pieces(spec: TokenSpec) -> list[bytes]:
    """Return what each token adds to a text, V of them; a special token has a name of its own."""
    special = (
        set(spec.tokenizer.all_special_ids)
        | set(spec.stop_token_ids)
        | set(range(len(spec.tokenizer), spec.vocab_size))
    )
    text = TokenPieces(spec.tokenizer)
    return [
        SPECIAL + b"%d" % i if i in special else text([i])[0].encode()
        for i in range(spec.vocab_size)
    ]
