"""The methods of a survey that are rows of the suite, with what was found.

    .venv/bin/python -m benchmarks.suite.survey

The survey is Zhang 2026 (arXiv 2604.09459), which lists 47 methods; survey.yaml says what stands
for each. A figure is the interquartile mean at the end of the runs, in the column of the
environment's goal; the second is its difference to the first row of the same folder, with a 95%
interval.
"""

import argparse
from typing import Any

import yaml

from benchmarks.suite.answers import MODULES, SUITE, markdown
from tokenenv.bench.file import read_grid
from tokenenv.bench.statistics import bootstrap, iqm_difference, iqm_of
from tokenenv.bench.summary import ends, measured
from tokenenv.report.reading import read


def lines() -> list[dict[str, str]]:
    """Return a line for each method."""
    survey = yaml.safe_load((SUITE / "survey.yaml").read_text(encoding="utf-8"))
    return [_line(one) for one in survey]


def _line(one: dict[str, Any]) -> dict[str, str]:
    return {
        "method": f"{one['method']} ({one['arxiv']})",
        "granularity": one["granularity"],
        "family": one["family"],
        "what stands for it": f"{one['as']} (`{one['folder']}`: {one['row']})",
        "found": _found(one["folder"], one["row"]),
    }


def _found(folder: str, row: str) -> str:
    """Say what a row reached, and how that stands to the first row of its folder."""
    if not (SUITE / folder / "results" / "results.csv").is_file():
        return "not run"
    grid = read_grid(SUITE / folder / "grid.yaml", MODULES)
    results, baseline = read(SUITE / folder / "results"), grid.row_labels()[0]
    said = []
    for task in grid.envs:
        column = measured(grid, task, results.runs)
        values, others = (
            [ends(results.runs.get((task, label), {}), column)] for label in (row, baseline)
        )
        if len(values[0]) and len(others[0]):
            value = float(iqm_of(values))
            text = f"{task}: {column} {value:.2f}"
            if row != baseline:
                gain, low, high = bootstrap(iqm_difference, values, others)
                text += f", {gain:+.2f} ({low:+.2f} to {high:+.2f}) against {baseline}"
            said.append(text)
    return "; ".join(said) or "not run"


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print("\n".join(markdown(lines())))


if __name__ == "__main__":
    main()
