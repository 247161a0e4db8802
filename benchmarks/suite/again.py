"""Run some cells of the committed results again, picked at random, and compare every number.

    .venv/bin/python -m benchmarks.suite.again [quick reshaped ...] [--cells 2] [--draw 0]

Times and versions aside, all columns have to be the same to the last digit, on the same kind of
machine with the same versions. The exit status is 1 where one is not.
"""

import argparse
import random
import sys

from benchmarks.suite.answers import MODULES, SUITE
from tokenenv.bench.entries import SETTINGS
from tokenenv.bench.file import read_grid
from tokenenv.bench.measure import COLUMNS
from tokenenv.bench.play import TRAINED, play
from tokenenv.report.reading import NUMBERS, number, read

COMPARED = ("tokens", "updates", "reward_tokens", "train_credit", *COLUMNS, *TRAINED)
"""The columns that do not depend on how fast a machine is."""


def differences(folder: str, cells: int, draw: int) -> list[str]:
    """Run cells of a folder again, and return what is not the same."""
    committed = read(SUITE / folder / "results")
    grid = read_grid(SUITE / folder / "results" / "grid.yaml", MODULES)
    known = {line["cell"] for line in committed.lines if line["status"] == "finished"}
    found = []
    for cell in random.Random(draw).sample([c for c in grid.cells() if c.key in known], cells):
        print(f"{folder}: {cell.name}", flush=True)
        settings = {name: cell.settings[name] for name in SETTINGS if name in cell.settings}
        points = play(settings, cell.points, cell.texts)["points"]
        before = [line for line in committed.lines if line["cell"] == cell.key]
        if len(points) != len(before):
            found.append(f"{cell.name}: {len(points)} evaluations, {len(before)} before")
        for line, point in zip(before, points, strict=False):
            for name in COMPARED:
                now = number(point.get(name)) if name in NUMBERS else point.get(name)
                if now != line.get(name):
                    place = f"{cell.name}, {point['tokens']} tokens"
                    found.append(f"{place}: {name} is {now}, and was {line.get(name)}")
    return found


def main() -> None:
    """Run the cells that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", help="by default all that have results")
    parser.add_argument("--cells", type=int, default=2, help="of each folder")
    parser.add_argument("--draw", type=int, default=0, help="seed of the choice")
    args = parser.parse_args()
    everything = sorted(path.parents[1].name for path in SUITE.glob("*/results/grid.yaml"))
    found = [
        one
        for folder in args.folders or everything
        for one in differences(folder, args.cells, args.draw)
    ]
    print("\n".join(found) or "every number is the same")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
