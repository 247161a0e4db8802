"""The tables of an audit, for a terminal and for a page."""

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tokenenv.audit.optimum import Point
from tokenenv.audit.wording import said

if TYPE_CHECKING:
    from tokenenv.audit.report import Audit

TableOf = tuple[str, list[str], list[list[str]]]
"""A title, the names of the columns, and the rows."""
SHOWN = 9
"""Points of a curve that a table shows at most."""


def tables(audit: "Audit") -> Iterator[TableOf]:
    """Yield the tables: the curve, single texts, and figures."""
    how = {
        "enumeration": "exact, from all texts",
        "dynamic programming": "exact, by dynamic programming",
        "sampling": f"estimated from {audit.num_texts:,} texts of the reference",
    }[audit.method]
    names = ["policy", "KL, nats", "proxy", "gold", "Spearman", "texts behind it"]
    yield (f"The optimum of proxy - beta KL ({how})", names, [*map(_optimum, few(audit))])
    if audit.best_of_n:
        title = f"The best of n by the proxy (from {audit.num_texts:,} texts of the reference)"
        rows = [
            [f"best of {p.n}", f"{p.kl:.2f}", said(p.proxy), said(p.gold)] for p in audit.best_of_n
        ]
        yield title, names[:4], rows
    yield _texts(audit)
    yield ("Figures", ["figure", "proxy", "gold"], [*_figures(audit)])


def few(audit: "Audit") -> list[Point]:
    """Return a few optima: the reference, the env's own, and others about evenly apart."""
    points = list(audit.optima)
    step = max(1, -(-len(points) // SHOWN))
    kept = [p for i, p in enumerate(reversed(points)) if i % step == 0 or p is audit.own_optimum]
    first = [] if points[0] in kept else [points[0]]
    return first + kept[::-1]


def _optimum(point: Point) -> list[str]:
    name = "reference" if point.kl == 0 and point.beta == float("inf") else f"beta {point.beta:.3g}"
    ess = "all" if point.ess is None else f"{point.ess:.0f}"
    known = said(point.spearman)
    return [name, f"{point.kl:.2f}", said(point.proxy), said(point.gold), known, ess]


def _texts(audit: "Audit") -> TableOf:
    names = ["text", "tokens", "proxy", "gold", "earns more than", "example"]
    of = "of all" if audit.method != "sampling" else "of the sample"
    rows = [
        [f"best by {b.by}, {of}", "", said(b.proxy), said(b.gold), "", b.example]
        for b in audit.best
    ]
    rows += [
        [
            f"null policy: {n.name}",
            f"{n.length:.1f}",
            said(n.proxy),
            said(n.gold),
            f"{n.beats:.1%} of samples",
            n.example,
        ]
        for n in audit.nulls
    ]
    return "Single texts and null policies", names, rows


def _figures(audit: "Audit") -> Iterator[list[str]]:
    price, agree, keeps = audit.price, audit.agreement, audit.preservation
    yield ["own tokens of a text", said(price.length), ""]
    yield ["reward of a token, mean", said(price.per_token), ""]
    yield ["slope on length, a token", said(price.slope), said(price.gold_slope)]
    yield ["going on, a token", said(price.going_on), said(price.gold_going_on)]
    yield ["Spearman with length", said(price.spearman), ""]
    yield ["Spearman with gold", said(agree.spearman), ""]
    yield ["Spearman with gold within prompts", said(agree.spearman_within), ""]
    for share, value in agree.by_position.items():
        yield [f"{agree.measure} of the running sum at {share}", said(value), ""]
    yield ["texts within 5% of the maximum", f"{agree.saturated:.1%}", ""]
    yield ["return less score, largest deviation", said(keeps.deviation), ""]
    yield ["gradient of reward-to-go, relative error", said(keeps.gradient_error), ""]
    yield ["cosine of its gradient with gold's", said(keeps.gold_cosine), ""]


def markdown(audit: "Audit") -> str:
    """Return the page."""
    lines = [f"# Audit of a reward{f' on {audit.env}' if audit.env else ''}", ""]
    terms = ", ".join(f"`{name}` ({weight:g})" for name, weight in audit.weights.items())
    lines += [f"The proxy is {terms or 'empty'}.", ""]
    for title, names, rows in tables(audit):
        lines += [f"## {title}", "", _row(names), _row(["---"] * len(names))]
        lines += [*map(_row, rows), ""]
    lines += ["## Verdicts", ""]
    for verdict in audit.verdicts:
        sentence = _safe(verdict.sentence)
        lines.append(f"- **{sentence}**" if verdict.warns else f"- {sentence}")
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_safe, cells))} |"


def _safe(text: str) -> str:
    """Return a text that Markdown shows as it is: it may be anybody's."""
    return re.sub(r"([\\|*_`\[\]<>])", r"\\\1", text)
