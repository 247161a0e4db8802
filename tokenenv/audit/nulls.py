"""Policies that read nothing: do they earn what texts earn?"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tokenenv.agents.rollout.text import Text
from tokenenv.audit.sampling import begun
from tokenenv.audit.texts import OnText, Paid, no_listener, pay
from tokenenv.audit.writing import Reference, Speak, repeating, written
from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.safety.shown import visible

PROMPTS = 32
"""Prompts that each policy is tried on."""
TOKENS = 1024
"""Tokens that are tried for the text of one token repeated."""
FINALISTS = 8
"""Of these, how many are tried on all prompts."""
NEAREST = 20
"""Texts of a prompt that a null policy's gold is compared with, at most an eighth of them: those
that earn most like it."""


@dataclass(frozen=True, slots=True)
class NullPolicy:
    """A policy that reads nothing, or hardly anything, and what it earns; means over prompts."""

    name: str
    """"empty", "repeated", "longest" or "likeliest"."""
    example: str
    """The beginning of one of its texts."""
    length: float
    """Own tokens."""
    proxy: float
    gold: float | None
    beats: float
    """The share of the reference's texts that earn less."""
    promised: float | None
    """The gold of the reference's texts that earn most like it; None: not known."""


def null_policies(
    envs: TokenVectorEnv, paid: Paid, seed: int, on_text: OnText = no_listener
) -> list[NullPolicy]:
    """Return what null policies earn on prompts of `paid`, texts of the reference.

    They are: the stop token alone (where there is one), the best token to repeat to the end, the
    reference without its stop tokens, and the reference's likeliest text.
    """
    numbers = np.unique([text.prompt_id for text in paid.texts])
    some = np.random.default_rng([seed, 5]).permutation(numbers)[:PROMPTS]
    stops = envs.token_spec.stop_token_ids
    tried: dict[str, tuple[list[Text], Speak]] = {
        "longest": (begun(envs, some, seed), Reference(envs, seed=seed + 2, may_stop="never")),
        "likeliest": (begun(envs, some, seed), Reference(envs, greedy=True)),
    }
    if stops:
        tried["empty"] = (_numbered(begun(envs, some), 0), repeating(envs, stops[:1]))
    else:
        del tried["longest"]  # every text of the reference is one
    found = {name: pay(envs, written(envs, *both)) for name, both in tried.items()}
    found["repeated"] = _repeated(envs, paid, some, on_text)
    order = [name for name in ("empty", "repeated", "longest", "likeliest") if name in found]
    return [_measured(envs, name, found[name], paid) for name in order]


def _numbered(texts: Sequence[Text], number: int) -> list[Text]:
    return [replace(text, number=number) for text in texts]


def _repeated(envs: TokenVectorEnv, paid: Paid, prompts: np.ndarray, on_text: OnText) -> Paid:
    """Return the texts of the token that earns most when it is repeated: all tokens are tried on
    one prompt, or where there are many those that pay most in the reference's texts, and the best
    few on all prompts."""
    tokens = [t for t in candidates(envs, paid) if t not in envs.token_spec.stop_token_ids]
    speak = repeating(envs, tokens)
    texts = begun(envs, np.full(len(tokens), prompts[0]))
    first = pay(envs, written(envs, texts, speak), on_text)
    finalists = np.argsort(-first.proxy_B, kind="stable")[:FINALISTS]
    all_paid = [
        pay(envs, written(envs, _numbered(begun(envs, prompts), int(i)), speak)) for i in finalists
    ]
    return max(all_paid, key=lambda one: float(one.proxy_B.mean()))


def candidates(envs: TokenVectorEnv, paid: Paid) -> list[int]:
    """Return the tokens to try: all, or those with the largest mean reward among the reference's
    texts."""
    vocab_size = envs.token_spec.vocab_size
    if vocab_size <= TOKENS:
        return list(range(vocab_size))
    rows = [np.array(text.tokens)[np.array(text.own)] for text in paid.texts]
    tokens = np.concatenate(rows)
    earned = np.concatenate([row[: len(ids)] for row, ids in zip(paid.token_BT, rows, strict=True)])
    count = np.bincount(tokens, minlength=vocab_size)
    average = np.bincount(tokens, earned, vocab_size) / np.maximum(count, 1)
    seen = np.flatnonzero(count)
    return seen[np.argsort(-average[seen], kind="stable")][:TOKENS].tolist()


def _measured(envs: TokenVectorEnv, name: str, null: Paid, paid: Paid) -> NullPolicy:
    """Return the figures of a null policy's texts beside those of the reference's."""
    of = np.array([text.prompt_id for text in paid.texts])
    # Gold that is no number says nothing.
    gold_B = np.zeros(0) if null.gold_B is None else null.gold_B[np.isfinite(null.gold_B)]
    beats, promised = [], []
    for text, earned in zip(null.texts, null.proxy_B, strict=True):
        rows = np.flatnonzero(of == text.prompt_id)
        beats.append(float((paid.proxy_B[rows] < earned - 1e-9).mean()))
        if paid.gold_B is not None:
            count = max(1, min(NEAREST, len(rows) // 8))
            near = rows[np.argsort(np.abs(paid.proxy_B[rows] - earned), kind="stable")[:count]]
            promised.append(float(paid.gold_B[near].mean()))
    return NullPolicy(
        name,
        shown(null.texts[0], envs.token_spec.tokenizer),
        float(null.length_B.mean()),
        float(null.proxy_B.mean()),
        float(gold_B.mean()) if len(gold_B) else None,
        float(np.mean(beats)),
        float(np.mean(promised)) if promised else None,
    )


def shown(text: Text, tokenizer: Any, most: int = 60) -> str:
    """Return the beginning of a text's response, as a terminal and a page may show it."""
    ids = text.tokens
    said = " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)
    said = visible(" ".join(said.split()))
    return said if len(said) <= most else said[: most - 1].rstrip() + "…"
