"""What an audit has found, in plain sentences, each with its number."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tokenenv.audit.nulls import NullPolicy
from tokenenv.audit.optimum import turn_down
from tokenenv.audit.texts import Estimate
from tokenenv.audit.wording import Verdict, said

if TYPE_CHECKING:
    from tokenenv.audit.report import Audit

SURE = 3.0
"""Standard errors from which on a difference is said."""
FELT = 0.005
"""Deviations a token from which on a price of length is felt: 0.2 of them in 40 tokens."""
FALLEN = 0.5
"""Deviations of gold that a null policy, or a best text, lies below what is promised."""


def verdicts(audit: "Audit") -> Iterator[Verdict]:
    """Yield all sentences: on length, on return and gradient, on null policies, on gold along the
    KL, and on what the numbers leave out."""
    yield _length(audit)
    yield from _return(audit)
    yield from _gradient(audit)
    yield from _nulls(audit)
    yield from _optimisation(audit)
    yield from _saturation(audit)
    for sentence in _notes(audit):
        yield Verdict("note", False, sentence)


def _length(audit: "Audit") -> Verdict:
    price = audit.price
    if price.going_on is None or price.excess is None:
        why = "no text of the reference ended by itself"
        return Verdict(
            "length",
            False,
            f"length has no price here: {why}, so none could be gone on with.",
        )
    gold = "gold is unknown"
    if price.gold_going_on is not None:
        gold = f"gold pays {said(price.gold_going_on)}"
    value, error = price.excess
    if abs(value) <= max(SURE * error, FELT):
        numbers = f"going on earns {said(price.going_on)} a token, {gold}"
        return Verdict("length", False, f"length is not paid beyond gold: {numbers}.")
    paid = "paid" if value > 0 else "punished"
    return Verdict(
        "length",
        True,
        f"length is {paid}: {said(price.going_on)} a token for going on where the reference "
        f"stopped, {gold}.",
    )


def _return(audit: "Audit") -> Iterator[Verdict]:
    keeps = audit.preservation
    if keeps.deviation is None:
        return
    if keeps.keeps_return:
        yield Verdict(
            "return",
            False,
            f"return is preserved: a text's rewards add up to its score and a constant of the "
            f"prompt (largest deviation {keeps.deviation:.1e}).",
        )
    elif keeps.keeps_scaled_return and keeps.factor is not None and keeps.factor > 0:
        yield Verdict(
            "return",
            False,
            f"return is preserved up to a factor: rewards add up to {keeps.factor:.3g} times the "
            "score and a constant of the prompt.",
        )
    else:
        yield Verdict(
            "return",
            True,
            f"return is not preserved: a text's rewards add up to its score and a constant of the "
            f"prompt only within {keeps.deviation:.3g}.",
        )


def _gradient(audit: "Audit") -> Iterator[Verdict]:
    keeps = audit.preservation
    if keeps.gradient_error is not None:
        error = f"relative error {keeps.gradient_error:.2g}, measured on all texts"
        if keeps.keeps_gradient:
            yield Verdict(
                "gradient",
                False,
                f"gradient is preserved: reward-to-go follows the gradient of the expected sum of "
                f"rewards ({error}).",
            )
        else:
            yield Verdict(
                "gradient",
                True,
                f"gradient is not preserved: reward-to-go does not follow the gradient of the "
                f"expected sum of rewards ({error}).",
            )
        return
    declared = {
        True: "gradient is preserved, as the terms declare",
        False: "gradient is not preserved, as the terms declare: reward-to-go is biased",
        None: "gradient: the terms do not state whether it is preserved",
    }[keeps.declared_gradient]
    yield Verdict(
        "gradient",
        keeps.declared_gradient is False,
        f"{declared}; it was not measured, because the texts cannot be enumerated.",
    )


def _nulls(audit: "Audit") -> Iterator[Verdict]:
    worst = [null for null in audit.nulls if _fools(audit, null)]
    for null in worst:
        gold = "gold unknown"
        if null.gold is not None and null.promised is not None:
            gold = (
                f"gold {null.gold:.2f}, where samples that earn most like it have "
                f"{null.promised:.2f}"
            )
        yield Verdict(
            "null policy",
            True,
            f"a null policy ({null.name}: {null.example!r}) earns {null.proxy:.2f}, more than "
            f"{null.beats:.1%} of samples; {gold}.",
        )
    if audit.nulls and not worst:
        best = max(audit.nulls, key=lambda null: null.proxy)
        gold = "" if best.gold is None else f", gold {best.gold:.2f}"
        yield Verdict(
            "null policy",
            False,
            f"no null policy earns what it is not worth: the best one ({best.name}) earns "
            f"{best.proxy:.2f}, more than {best.beats:.1%} of samples{gold}.",
        )


def _fools(audit: "Audit", null: NullPolicy) -> bool:
    """Whether a null policy earns more than half of the texts, and its gold is lower than that of
    texts that earn as much; without gold, whether it earns more than 99% of them."""
    if null.gold is None or null.promised is None or audit.gold_spread is None:
        return null.beats > 0.99
    return null.beats > 0.5 and null.promised - null.gold > FALLEN * audit.gold_spread


def _optimisation(audit: "Audit") -> Iterator[Verdict]:
    if audit.gold_spread is None:
        yield Verdict(
            "gold",
            False,
            "gold is unknown (gold= of the env), so what optimising the proxy does to it is too: "
            "the figures are of the proxy alone.",
        )
        return
    warned = False
    for points, of in ((audit.optima, "the optimum"), (audit.best_of_n, "the best of n")):
        turn = turn_down(points)
        if turn is None:
            continue
        warned = True
        yield Verdict(
            "overoptimisation",
            True,
            f"overoptimisation of {of}: gold turns down at KL {turn.peak.kl:.1f} nats, from "
            f"{said(turn.peak.gold)} to {said(turn.last.gold)} at {turn.last.kl:.1f}, while the "
            f"proxy goes from {said(turn.peak.proxy)} to {said(turn.last.proxy)}.",
        )
    first, last = audit.optima[0], audit.optima[-1]
    if last.kl == 0:
        yield Verdict("proxy", True, "the proxy pays all texts alike: there is nothing to learn.")
    elif not warned and _gains(first.gold, last.gold) < -SURE:
        yield Verdict(
            "overoptimisation",
            True,
            f"the proxy leads away from gold: {said(first.gold)} for the reference, "
            f"{said(last.gold)} at KL {last.kl:.1f}.",
        )
    elif not warned:
        yield Verdict(
            "overoptimisation",
            False,
            f"gold goes on with the proxy as far as the texts reach: {said(first.gold)} for the "
            f"reference, {said(last.gold)} at KL {last.kl:.1f} nats.",
        )
    own = audit.own_optimum
    if own is not None and own.beta and audit.optimal_objective is not None:
        reached = own.gold.value - own.beta * own.kl
        yield Verdict(
            "objective",
            False,
            f"at the env's beta of {own.beta:g} the proxy's optimum has gold - beta KL = "
            f"{reached:.3f} ({said(own.gold)} at KL {own.kl:.2f}); the largest possible is "
            f"{audit.optimal_objective:.3f}.",
        )


def _gains(before: Estimate, after: Estimate) -> float:
    """How many errors `after` lies above `before`."""
    error = math.hypot(before.error, after.error)
    return (after.value - before.value) / max(error, 1e-6)


def _saturation(audit: "Audit") -> Iterator[Verdict]:
    share = audit.agreement.saturated
    if share > 0.2:
        yield Verdict(
            "saturation",
            False,
            f"{share:.0%} of the reference's texts are within 5% of the largest proxy of the "
            "sample: there is little left to tell them apart by.",
        )


def _notes(audit: "Audit") -> Iterator[str]:
    if audit.kl_coef is not None:
        yield "the KL term is left out of the proxy: it is the price of moving, on the other axis."
        if audit.kl_coef > 0 and audit.own_optimum is None and audit.optima[-1].kl > 0:
            yield (
                f"the optimum at the env's beta of {audit.kl_coef:g} lies further away than the "
                f"texts reach (KL {audit.optima[-1].kl:.1f} nats): nothing is said of it."
            )
    if audit.responds and audit.method == "sampling":
        yield (
            "the environment writes into texts: where its replies are left to chance, the optimum "
            "and the best of n choose lucky replies too, so both are upper bounds."
        )
    if audit.cut and not audit.scores_cut:
        yield (
            f"{audit.cut:.0%} of the texts were cut and not scored (score_truncated=False): their "
            "proxy is what was paid before the cut, and learners go on from there."
        )
    if audit.hindsight:
        names = ", ".join(audit.hindsight)
        yield f"placed in hindsight: {names}; running sums are those of finished texts."
    if audit.reads_policy:
        names = ", ".join(audit.reads_policy)
        yield f"{names} reads log pi, and was given that of the reference."
    if not audit.has_score:
        yield "texts have no sequence score, so whether the return is the score's cannot be said."
    if audit.without_gold:
        yield f"{audit.without_gold} sampled texts were left out, because their gold is no number."
