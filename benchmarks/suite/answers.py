"""What the results of the suite say to the questions of its folders.

    .venv/bin/python -m benchmarks.suite.answers [better_critic ...]

A folder's question.yaml names the published claim and the comparisons that answer it. A comparison
is of two rows in one environment, over seeds:

- by a column, at the end of the runs: the difference of the interquartile means;
- by `tokens`: how many times fewer tokens the row took to the environment's goal, as the ratio of
  the medians (of an even number, the upper of the two in the middle). Tokens are interpolated
  between two evaluations. A run that did not get there counts as one that takes forever.

Intervals are 95% percentiles of 2,000 resamples of the seeds. A claim held where its side of no
difference has the whole interval, and it did not where the other side has it; everything else is
not told apart. "equal" held where the whole interval is within `margin`. The verdict is of the
direction alone: whether a row is as many times faster as was published, the interval says.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tokenenv.bench.file import read_grid
from tokenenv.bench.grid import Grid
from tokenenv.bench.statistics import Interval, Strata, bootstrap, iqm_difference
from tokenenv.bench.summary import ends
from tokenenv.report.reading import Found, read

SUITE = Path(__file__).parent
MODULES = ("benchmarks.suite.rewards", "benchmarks.suite.algorithms")
MARGIN = {"share": 0.05, "gold": 0.05}
"""Differences that count as none where a claim is "equal"."""
NEVER = 1e12
"""The tokens of a run that did not get there: resamples can be sorted and interpolated with it."""
UNDECIDED = "not told apart"
ENDLESS = 1e6
"""A ratio beyond this has such a run on one side."""


def answers(folder: Path) -> list[dict[str, str]]:
    """Return a line for each comparison of a folder with results."""
    said = yaml.safe_load((folder / "question.yaml").read_text(encoding="utf-8"))
    found = read(folder / "results")
    grid = read_grid(folder / "grid.yaml", MODULES)
    return [_answer(found, grid, one) for one in said.get("answers", ())]


def _answer(found: Found, grid: Grid, asked: Mapping[str, Any]) -> dict[str, str]:
    task, row, than, by = (asked[name] for name in ("task", "row", "than", "by"))
    claimed = asked["claimed"]
    runs = [found.runs.get((task, label), {}) for label in (row, than)]
    line = {"environment": task, "comparison": f"{row} against {than}"}
    if not all(runs):
        return line | {"found": "not run", "claimed": claimed, "verdict": ""}
    if by == "tokens":
        column, goal = grid.goal(task)
        taken = [[tokens_to(lines, column, goal) for lines in one.values()] for one in runs]
        if all(np.sort(one)[len(one) // 2] == NEVER for one in taken):
            return line | {"found": "neither got there", "claimed": claimed, "verdict": UNDECIDED}
        groups = [[np.array(one)] for one in taken]
        interval, none = bootstrap(_times_fewer, *groups), 1.0
        text = f"{_number(interval.value)} times fewer tokens"
    else:
        groups = [[ends(one, by)] for one in runs]
        if not all(len(values) for (values,) in groups):
            return line | {"found": f"{by} is not known", "claimed": claimed, "verdict": UNDECIDED}
        interval, none = bootstrap(iqm_difference, *groups), 0.0
        text = f"{interval.value:+.3f} {by}"
    low, high = _number(interval.low), _number(interval.high)
    return line | {
        "found": f"{text} ({low} to {high}), {len(runs[0])} and {len(runs[1])} seeds",
        "claimed": claimed,
        "verdict": verdict(interval, none, claimed, MARGIN.get(by, 0.1)),
    }


def tokens_to(lines: Sequence[Mapping[str, Any]], column: str, goal: float) -> float:
    """Return the tokens at which a run first reached a value, interpolated; `NEVER` where it did
    not."""
    before = lines[0]
    for line in lines:
        if line[column] is not None and line[column] >= goal:
            start = line[column] if before[column] is None else before[column]
            rise = line[column] - start
            part = (goal - start) / rise if rise > 0 else 1.0
            return float(before["tokens"] + part * (line["tokens"] - before["tokens"]))
        before = line
    return NEVER


def _times_fewer(one: Strata, other: Strata) -> np.ndarray:
    """Return the ratio of the medians of the other's tokens and of one's own; 1 where neither got
    there.

    The median is one of the values: the mean of two, one of which is `NEVER`, would be a number of
    tokens that nothing took.
    """
    mine, theirs = (
        np.sort(values, axis=-1)[..., values.shape[-1] // 2]
        for values in (np.concatenate(strata, axis=-1) for strata in (one, other))
    )
    return theirs / mine


def verdict(interval: Interval, none: float, claimed: str, margin: float) -> str:
    """Say whether a claim held.

    Args:
        interval: of the difference, or of the ratio.
        none: its value where there is no difference.
        claimed: "more", "less" or "equal".
        margin: how far from `none` counts as equal.
    """
    low, high = interval.low - none, interval.high - none
    if claimed == "equal":
        if max(-low, high) <= margin:
            return "held"
        return "did not hold" if low > margin or high < -margin else UNDECIDED
    if claimed == "less":
        low, high = -high, -low
    if low > 0:
        return "held"
    return "did not hold" if high < 0 else UNDECIDED


def _number(value: float) -> str:
    return "∞" if value > ENDLESS else f"{value:.2f}"


def markdown(lines: Sequence[Mapping[str, str]]) -> Iterable[str]:
    """Yield the lines of a table."""
    if lines:
        names = list(lines[0])
        yield f"| {' | '.join(names)} |"
        yield f"|{'---|' * len(names)}"
        for line in lines:
            yield f"| {' | '.join(line[name] for name in names)} |"


def main() -> None:
    """Print the answers of the folders that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", help="by default all that have results")
    names = parser.parse_args().folders
    folders = [SUITE / name for name in names] or sorted(
        path.parent for path in SUITE.glob("*/question.yaml")
    )
    for folder in folders:
        said = yaml.safe_load((folder / "question.yaml").read_text(encoding="utf-8"))
        print(f"## {said['question']}\n\n{said['claim']}\n")
        if (folder / "results" / "results.csv").is_file() and said.get("answers"):
            print("\n".join(markdown(answers(folder))), end="\n\n")


if __name__ == "__main__":
    main()
