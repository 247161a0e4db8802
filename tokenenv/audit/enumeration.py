"""All texts that an env can have, where these are few."""

import itertools
from collections.abc import Iterator

import numpy as np

from tokenenv.agents.rollout.text import Text
from tokenenv.audit.sampling import begun
from tokenenv.audit.texts import OnText, Paid, pay
from tokenenv.env.vector_env import TokenVectorEnv

MOST = 500_000
"""Texts that are enumerated at most where the task's optimum is known."""


def count_texts(envs: TokenVectorEnv) -> int:
    """Return the number of all texts of all prompts."""
    spec = envs.token_spec
    stops = len(set(spec.stop_token_ids))
    others = spec.vocab_size - stops
    rooms = [spec.max_new_tokens] * len(envs.prompts)
    return sum(stops * sum(others**t for t in range(room)) + others**room for room in rooms)


def enumerable(envs: TokenVectorEnv, num_texts: int) -> bool:
    """Return whether all texts can be scored: few where an optimum is known, and elsewhere no more
    than would be sampled."""
    if envs.token_spec.responds or len(envs.prompts) > num_texts:
        return False
    if envs.token_spec.max_new_tokens > 64:  # a number of texts that need not be computed
        return False
    return count_texts(envs) <= (MOST if envs.oracle is not None else num_texts)


def all_texts(envs: TokenVectorEnv, on_text: OnText) -> Paid:
    """Return all texts of all prompts with what they earn."""
    spec = envs.token_spec
    responses = list(_responses(spec.vocab_size, spec.max_new_tokens, set(spec.stop_token_ids)))
    owns = [[True] * t for t in range(spec.max_new_tokens + 1)]
    texts = [
        Text(
            0,
            0,
            blank.prompt,
            blank.prompt_id,
            {},
            tokens=tokens,
            own=owns[len(tokens)],
            terminated=stopped,
            truncated=not stopped,
            columns=blank.columns,
        )
        for blank in begun(envs, np.arange(len(envs.prompts)))
        for tokens, stopped in responses
    ]
    return pay(envs, texts, on_text)


def _responses(vocab_size: int, length: int, stops: set[int]) -> Iterator[tuple[list[int], bool]]:
    """Yield every response, and whether it stops by itself."""
    others = [token for token in range(vocab_size) if token not in stops]
    for t in range(length):
        for begun_with in itertools.product(others, repeat=t):
            for stop in sorted(stops):
                yield [*begun_with, stop], True
    for tokens in itertools.product(others, repeat=length):
        yield list(tokens), False
