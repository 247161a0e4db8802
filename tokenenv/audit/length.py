"""The price of length: what a text earns by going on, and what that is worth."""

from dataclasses import dataclass, replace

import numpy as np

from tokenenv.agents.rollout.text import Text
from tokenenv.audit.statistics import bootstrapped, ratio, slope, spearman, within
from tokenenv.audit.texts import Estimate, OnText, Paid, pay
from tokenenv.audit.writing import Reference, written
from tokenenv.env.vector_env import TokenVectorEnv

MOST = 512
"""Texts that are gone on with."""


@dataclass(frozen=True, slots=True)
class Price:
    """What length costs and earns, per own token. A number is None where it is not known: without
    gold, or where all texts have one length."""

    length: Estimate
    """Mean own tokens of the reference's texts."""
    per_token: Estimate
    """Mean reward of a token."""
    slope: Estimate | None
    """Least squares of the proxy on the length, within prompts."""
    gold_slope: Estimate | None
    going_on: Estimate | None
    """The change of the proxy, per further token, when the reference goes on with a text where it
    has stopped: what length causes."""
    gold_going_on: Estimate | None
    excess: Estimate | None
    """`going_on` less `gold_going_on`, each in deviations of its own among the reference's texts;
    without gold the first alone. What is above zero is paid for length and not for gold."""
    spearman: Estimate | None
    """Spearman's correlation of proxy and length, within prompts."""
    continued: int
    """Texts that were gone on with."""


def price_of_length(envs: TokenVectorEnv, paid: Paid, seed: int, on_text: OnText) -> Price:
    """Return the price of length from texts of the reference."""
    group_B, length_B = paid.group_B, paid.length_B.astype(float)
    varies = bool(np.ptp(length_B) > 0)
    gold = paid.gold_B
    length = ratio(length_B, np.ones(len(length_B)), group_B)
    per_token = ratio(paid.proxy_B, length_B, group_B)
    ranked = within(paid.proxy_B, group_B), within(length_B, group_B)
    price = Price(
        length,
        per_token,
        slope(paid.proxy_B, length_B, group_B) if varies else None,
        slope(gold, length_B, group_B) if varies and gold is not None else None,
        None,
        None,
        None,
        bootstrapped(lambda rows: spearman(*(x[rows] for x in ranked)), group_B, seed)
        if varies
        else None,
        0,
    )
    short, long = gone_on(envs, paid, seed, on_text)
    if short is None or long is None:
        return price
    return _caused(price, paid, *with_known_gold(short, long))


def gone_on(
    envs: TokenVectorEnv, paid: Paid, seed: int, on_text: OnText
) -> tuple[Paid, Paid] | tuple[None, None]:
    """Return texts that stopped by themselves, and what becomes of them when the reference writes
    another token in the place of the stop and goes on. None where no text stopped."""
    stops = envs.token_spec.stop_token_ids
    stopped = [
        row
        for row, text in enumerate(paid.texts)
        if text.terminated
        and text.own[-1]
        and text.tokens[-1] in stops
        and sum(text.own) < envs.token_spec.max_new_tokens
    ]
    if not stopped or len(stops) == envs.token_spec.vocab_size:
        return None, None
    rng = np.random.default_rng([seed, 4])
    rows = np.sort(rng.permutation(stopped)[:MOST])
    reference = Reference(envs, seed=seed + 1, may_stop="later")
    longer = written(envs, [_reopened(paid.texts[row]) for row in rows], reference)
    return paid.at(rows), pay(envs, longer, on_text)


def with_known_gold(short: Paid, long: Paid) -> tuple[Paid, Paid]:
    """Return the pairs whose longer text has a number as its gold; where none has, all, without
    gold."""
    if long.gold_B is None:
        return short, long
    rows = np.flatnonzero(np.isfinite(long.gold_B))
    return (short.at(rows), long.at(rows)) if len(rows) else (short, replace(long, gold_B=None))


def _reopened(text: Text) -> Text:
    """Return the text without the stop token that ended it."""
    return replace(
        text,
        tokens=text.tokens[:-1],
        own=text.own[:-1],
        logprob=text.logprob[:-1],
        turn_reward=text.turn_reward[:-1],
        terminated=False,
    )


def _caused(price: Price, paid: Paid, short: Paid, long: Paid) -> Price:
    """Return the price with what going on caused."""
    gained, more = long.proxy_B - short.proxy_B, (long.length_B - short.length_B).astype(float)
    group_B = short.group_B
    excess = gained / max(float(paid.proxy_B.std()), 1e-9)
    gold = None
    if short.gold_B is not None and long.gold_B is not None and paid.gold_B is not None:
        true = long.gold_B - short.gold_B
        gold = ratio(true, more, group_B)
        excess = excess - true / max(float(paid.gold_B.std()), 1e-9)
    return replace(
        price,
        going_on=ratio(gained, more, group_B),
        gold_going_on=gold,
        excess=ratio(excess, more, group_B),
        continued=len(more),
    )
