"""The audit of an env's reward."""

from typing import Any, cast

import gymnasium as gym
import numpy as np

from tokenenv.audit.agreement import agreement
from tokenenv.audit.chain import Chain, find_chain, made
from tokenenv.audit.enumeration import all_texts, enumerable
from tokenenv.audit.length import price_of_length
from tokenenv.audit.nulls import null_policies, shown
from tokenenv.audit.optimum import Weighted, best_of_n_curve, curve
from tokenenv.audit.preservation import preservation
from tokenenv.audit.report import Audit, BestText, Method
from tokenenv.audit.sampling import reference_texts
from tokenenv.audit.texts import KL, OnText, Paid, no_listener, pay, with_gold
from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.errors import InvalidArgument

LEAST_TEXTS = 64
"""Texts that are sampled at least."""


def audit(
    envs: str | TokenVectorEnv,
    *,
    num_texts: int = 4096,
    seed: int = 0,
    on_text: OnText = no_listener,
    **options: Any,
) -> Audit:
    """Say what optimising an env's reward does, from texts of its reference.

    The *proxy* is what the env pays for a text: the sum of the reward's terms, the KL term left
    out, with their present weights (those of schedules at `tokens_seen`) and statistics. *Gold* is
    the task's true metric. Where the task is an automaton's, or has few texts, the optimum of the
    proxy is exact; elsewhere it is estimated from the sample (`Audit.method` says which).

    Args:
        envs: a registered id, or an env, whose running texts are left as they are.
        num_texts: texts of the reference that are sampled, 64 or more.
        seed: of the prompts and of the sampling.
        on_text: is called with the texts that are done and those that will be, in each part of the
            work anew.
        **options: of the env, where `envs` is an id.

    Raises:
        InvalidArgument: `num_texts` or `seed` is out of range, or options are given for an env.
    """
    if num_texts < LEAST_TEXTS:
        raise InvalidArgument(
            f"num_texts={num_texts} must be a whole number, {LEAST_TEXTS} or more."
        )
    if not isinstance(envs, str):
        if options:
            raise InvalidArgument(f"options {sorted(options)} are for an id; this env is made.")
        return _audit(envs.unwrapped, num_texts, seed, on_text)
    size = int(options.get("group_size", 1))
    made_envs = gym.make_vec(envs, num_envs=size, **options)
    try:
        return _audit(cast(TokenVectorEnv, made_envs.unwrapped), num_texts, seed, on_text)
    finally:
        made_envs.close()


def _audit(envs: TokenVectorEnv, num_texts: int, seed: int, on_text: OnText) -> Audit:
    sampled = pay(envs, reference_texts(envs, num_texts, seed, on_text))
    paid = with_gold(sampled)
    everything = all_texts(envs, on_text) if enumerable(envs, num_texts) else None
    chain = find_chain(envs, seed, on_text) if everything is None else None
    sample = Weighted(paid, exact=False, seed=seed)
    known = None if everything is None else with_gold(everything)
    whole = sample if known is None else Weighted(known, exact=True)
    terms = envs.reward_terms
    return Audit(
        env="" if envs.spec is None else envs.spec.id,
        weights={name: weight for name, weight in envs.weights.items() if name != KL},
        kl_coef=envs.kl_coef if KL in terms else None,
        num_texts=len(paid.texts),
        num_prompts=int(paid.group_B.max()) + 1,
        without_gold=len(sampled.texts) - len(paid.texts),
        method=_method(chain, everything),
        optima=tuple(curve(chain or whole, whole.spread, envs.kl_coef if KL in terms else 0.0)),
        best_of_n=tuple(best_of_n_curve(sample)),
        best=_best(envs, known or paid, chain),
        nulls=tuple(null_policies(envs, paid, seed, on_text)),
        price=price_of_length(envs, paid, seed, on_text),
        agreement=agreement(paid, seed),
        preservation=preservation(envs, paid, everything),
        gold_spread=None if paid.gold_B is None else float(paid.gold_B.std()),
        has_score=paid.score_B is not None,
        cut=float(paid.cut_B.mean()),
        scores_cut=envs.token_spec.score_truncated,
        responds=envs.token_spec.responds,
        hindsight=tuple(name for name, term in terms.items() if term.kind == "hindsight"),
        reads_policy=tuple(n for n, term in terms.items() if term.kind == "policy" and n != KL),
        optimal_objective=_optimal_objective(envs),
    )


def _method(chain: Chain | None, everything: Paid | None) -> Method:
    if everything is not None:
        return "enumeration"
    return "sampling" if chain is None else "dynamic programming"


def _best(envs: TokenVectorEnv, paid: Paid, chain: Chain | None) -> tuple[BestText, ...]:
    """Return the best text by the proxy and, where gold is known, by gold."""
    known = ("proxy", "gold") if paid.gold_B is not None else ("proxy",)
    if chain is not None:
        found = pay(envs, [made(envs, np.array([chain.best(by)]))[0] for by in known])
    else:
        found = paid.at(np.array([np.argmax(getattr(paid, f"{by}_B")) for by in known]))
    return tuple(
        BestText(
            by,
            shown(found.texts[i], envs.token_spec.tokenizer),
            float(found.proxy_B[i]),
            None if found.gold_B is None else float(found.gold_B[i]),
        )
        for i, by in enumerate(known)
    )


def _optimal_objective(envs: TokenVectorEnv) -> float | None:
    """Return J* at the env's beta, where the task knows it."""
    known = hasattr(envs.oracle, "optimal_objective") and KL in envs.reward_terms
    return float(envs.oracle.optimal_objective(envs.kl_coef)) if known else None
