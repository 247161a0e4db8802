"""What a paper on credit assignment should report, filled in from the tables of a bench.

The fourteen items are those of the survey of Zhang 2026 (arXiv 2604.09459, table 11). What a bench
cannot know is said to be unknown.
"""

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

import numpy as np

from tokenenv.bench.summary import ends
from tokenenv.report.reading import Found, Line
from tokenenv.safety.values import typed

SMALLEST = {  # what a design's rewards tell apart
    "terminal": "text",
    "turn": "turn",
    "process": "step",
    "segment": "segment",
    "shapley": "segment",
}
"""The granularity of the designs whose credit is coarser than a token's."""
ALGORITHMS = {
    "grpo": "comparison within groups",
    "rloo": "comparison within groups",
    "reinforce++": "Monte Carlo",
    "best-of-n": "best of n",
    "vineppo": "Monte Carlo",
}
"""The family of the algorithms that have no critic; the others learn by temporal differences."""
UNKNOWN = "unknown"
LONGEST = 500
"""Letters of a mixture of designs that is read."""
BETWEEN = " · "
"""Between labels of rows, which may hold commas."""
FAMILIES = {
    "attention": "attribution",
    "gradient": "attribution",
    "occlusion": "game-theoretic",
    "shapley": "game-theoretic",
    "delta": "temporal difference",
    "segment": "temporal difference",
    "oracle": "temporal difference",
    "progressive": "temporal difference",
    "implicit": "information-theoretic",
    "distill": "information-theoretic",
    "prime": "information-theoretic",
    "token": "learned reward",
    "process": "learned reward",
}
"""The family of a dense design. What pays the score alone, or in equal shares, has none of its own:
its algorithm's counts."""


def checklist(found: Found) -> list[Line]:
    """Return a line for each item: `category`, `item`, and what there is to say, `reported`."""
    rows = {
        (line["task"], line["row"]): line for line in found.lines if line["status"] == "finished"
    }
    items = [
        ("model", "base model, size and version", _models(rows.values())),
        ("model", "training data, its size and filtering", _data(rows.values())),
        ("method", "granularity of the credit", _by_answer(rows, _granularity)),
        ("method", "family of the method", _by_answer(rows, _family)),
        ("baselines", "a baseline of whole texts, on the same model", _baselines(rows)),
        ("baselines", "the same budget for all", _budgets(found, rows)),
        ("baselines", "ablations of one component", _ablations(rows)),
        ("evaluation", "benchmarks and splits", _benchmarks(rows)),
        ("evaluation", "metric, defined", _metrics(found)),
        ("evaluation", "variance", _variance(found)),
        ("compute", "computing time", _compute(found)),
        ("compute", "what the credit costs in addition", _overhead(found)),
        ("texts", "mean length", _lengths(found)),
        ("texts", "distribution of lengths", _spread(found)),
    ]
    names = ("category", "item", "reported")
    # Before any run has finished there is nothing to say.
    return [dict(zip(names, (*item[:-1], item[-1] or UNKNOWN), strict=True)) for item in items]


def _models(lines: Iterable[Line]) -> str:
    return _each(
        f"{_env(line)}: {_count(line.get('policy_weights'))} weights, of which "
        f"{_count(line.get('trained_weights'))} are trained"
        for line in lines
    )


def _env(line: Line) -> str:
    return str(line.get("env") or "an unknown environment")


def _data(lines: Iterable[Line]) -> str:
    envs = _each(_env(line) for line in lines)
    return envs and f"prompts of {envs}; every text is the policy's own"


def _granularity(line: Line) -> str:
    """Say what the credit of a row tells apart."""
    names = _designs(line)
    if _is_custom(line):
        return "its own"
    if line.get("algo") == "vineppo":
        return "segment"
    if names <= {"terminal"} and line.get("algo") in ALGORITHMS:
        return "text"
    finest = {SMALLEST.get(name, "token") for name in names}
    # A critic and GAE turn the reward of a whole text into credit of its tokens.
    return "token" if "token" in finest or names <= {"terminal"} else "/".join(sorted(finest))


def _family(line: Line) -> str:
    """Say by what means a row gives credit."""
    if _is_custom(line):
        return "its own"
    dense = {FAMILIES[name] for name in _designs(line) if name in FAMILIES}
    learns = "Monte Carlo" if line.get("agent.lambda_actor") == "1.0" else "temporal difference"
    algorithm = ALGORITHMS.get(str(line.get("algo")), learns)
    return " and ".join(sorted(dense | {algorithm}))


def _baselines(rows: Mapping[tuple[str, str], Line]) -> str:
    labels = dict.fromkeys(
        row
        for (_, row), line in rows.items()
        if _designs(line) == {"terminal"} and not _is_custom(line)
    )
    return BETWEEN.join(labels) or "none"


def _budgets(found: Found, rows: Mapping[tuple[str, str], Line]) -> str:
    return _each(
        f"{task}: "
        + " or ".join(
            dict.fromkeys(
                f"{_count(line.get('total_tokens'))} tokens"
                for (place, _), line in rows.items()
                if place == task
            )
        )
        for task in found.tasks
        if any(place == task for place, _ in rows)
    )


def _ablations(rows: Mapping[tuple[str, str], Line]) -> str:
    pairs = sum(
        one[0] == other[0] and len(_apart(rows[one], rows[other])) == 1
        for one, other in combinations(rows, 2)
    )
    return f"pairs of rows that differ in one setting: {pairs}" if pairs else "none"


def _apart(one: Line, other: Line) -> list[str]:
    names = ("reward", "algo", "num_envs", "total_tokens")
    return [
        name
        for name in one
        if (name in names or name.startswith(("options.", "agent.")))
        and name not in ("agent.seed", "options.task_seed")
        and one.get(name) != other.get(name)
    ]


def _benchmarks(rows: Mapping[tuple[str, str], Line]) -> str:
    return _each(
        f"{task}: {_env(line)}, evaluated by {line.get('method') or 'an unknown method'}"
        for (task, _), line in rows.items()
    )


def _metrics(found: Found) -> str:
    meanings = {
        "share": "share is (J - J_ref) / (J* - J_ref) with J = gold - beta KL",
        "gold": "gold is the task's true metric, a mean over texts",
        "score": "score is what the environment's scorer gives a text",
        "objective": "objective is J = gold - beta KL",
    }
    names = dict.fromkeys(found.measured.values())
    return "; ".join(meanings.get(name, name) for name in names)


def _variance(found: Found) -> str:
    counts = sorted({len(seeds) for seeds in found.runs.values()})
    if not counts:
        return "no run has finished"
    if counts[-1] == 1:
        return "1 seed a row, so nothing is known of it"
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{seeds} seeds a row; interquartile means with 95% bootstrap intervals over seeds"


def _compute(found: Found) -> str:
    last = [line for line, _ in found.cells()]
    minutes = sum(line.get("cpu_seconds") or 0.0 for line in last) / 60
    machines = ", ".join(dict.fromkeys(str(one["machine"]) for one in last if one.get("machine")))
    return f"{minutes:.1f} minutes of one CPU core for all runs, evaluations aside; {machines}"


def _overhead(found: Found) -> str:
    shares = {
        row: float(np.median(values)) for row in found.rows if len(values := _shares(found, row))
    }
    if not shares:
        return UNKNOWN
    said = (f"{row}: {share:.1f}" for row, share in shares.items())
    return f"tokens read by the models behind the reward, for each of the policy's: {_each(said)}"


def _shares(found: Found, row: str) -> np.ndarray:
    lines = [line for line, _ in found.cells() if line["row"] == row]
    known = [line for line in lines if line.get("reward_tokens") is not None and line["tokens"]]
    return np.array([line["reward_tokens"] / line["tokens"] for line in known])


def _lengths(found: Found) -> str:
    return _each(
        f"{task}: {values.mean():.1f} tokens"
        for task in found.tasks
        if len(values := _at_the_end(found, task))
    )


def _spread(found: Found) -> str:
    said = _each(
        f"{task}: {values.min():.1f}, {np.median(values):.1f}, {values.max():.1f}"
        for task in found.tasks
        if len(values := _at_the_end(found, task))
    )
    return f"of the runs' mean lengths least, median and most: {said}" if said else UNKNOWN


def _at_the_end(found: Found, task: str) -> np.ndarray:
    runs = [ends(seeds, "length") for (place, _), seeds in found.runs.items() if place == task]
    return np.concatenate(runs) if runs else np.empty(0)


def _designs(line: Line) -> set[str]:
    """Return the names of the designs that a row pays."""
    reward = line.get("reward") or line.get("options.reward")
    # Thousands of nested brackets would take minutes to read, and are no design.
    value = typed(reward) if isinstance(reward, str) and len(reward) < LONGEST else reward
    parts = value.values() if isinstance(value, Mapping) else [value]
    firsts = (part[0] if isinstance(part, list | tuple) and part else part for part in parts)
    return {str(first) for first in firsts}


def _is_custom(line: Line) -> bool:
    """Say whether an algorithm or a design is somebody's own, of which nothing is known."""
    return any(":" in name for name in (*_designs(line), str(line.get("algo"))))


def _by_answer(rows: Mapping[tuple[str, str], Line], answer: Any) -> str:
    """Return each answer with the rows that have it."""
    found: dict[str, dict[str, None]] = {}
    for (_, row), line in rows.items():
        found.setdefault(answer(line), {})[row] = None
    return _each(f"{said}: {BETWEEN.join(labels)}" for said, labels in found.items())


def _each(parts: Iterable[str]) -> str:
    """Return different sentences in a row."""
    return "; ".join(dict.fromkeys(parts))


def _count(value: Any) -> str:
    return "an unknown number of" if value is None else f"{value:,.0f}"
