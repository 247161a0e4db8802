"""Run the suite, or some of its folders, and keep what was found beside the questions.

    .venv/bin/python -m benchmarks.suite.run [quick better_critic ...] [--workers 2] [--seeds 4]

A folder with a grid is run by `tokenenv bench` into build/suite, after its prepare.py where it has
one. Its tables and its report are then copied to its `results`. A folder with a run.py runs that.
What has finished is not run again, so the same command goes on with a suite that was stopped.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.suite.answers import MODULES, SUITE

BUILD = Path("build/suite")
KEPT = ("grid.yaml", "results.csv", "summary.csv", "comparisons.csv", "report.html")
"""What is copied of a bench."""


def run(name: str, more: list[str]) -> None:
    """Run a folder of the suite.

    Args:
        name: the folder's.
        more: further flags for `tokenenv bench`.
    """
    folder, out = SUITE / name, BUILD / name / "bench"
    python, tokenenv = [sys.executable, "-m"], str(Path(sys.executable).with_name("tokenenv"))
    if (folder / "prepare.py").is_file() and not (BUILD / name / "prepared").exists():
        _call([*python, f"benchmarks.suite.{name}.prepare"])
        (BUILD / name / "prepared").touch()
    if (folder / "grid.yaml").is_file():
        bench = [tokenenv, "bench", "--suite", name, "--out", str(out)]
        _call([*bench, "--modules", *MODULES, *more])
        _call([tokenenv, "report", str(out)])
        (folder / "results").mkdir(exist_ok=True)
        for kept in KEPT:
            shutil.copy(out / kept, folder / "results" / kept)
    if (folder / "run.py").is_file():
        _call([*python, f"benchmarks.suite.{name}.run"])


def _call(command: list[str]) -> None:
    print("$", *command, flush=True)
    subprocess.run(command, check=True)


def main() -> None:
    """Run the folders that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="folders; by default all")
    parser.add_argument("--workers", type=int, help="cells at a time")
    parser.add_argument("--seeds", type=int, help="fewer seeds than the grids ask for")
    args = parser.parse_args()
    more = [
        word
        for name in ("workers", "seeds")
        if (value := getattr(args, name)) is not None
        for word in (f"--{name}", str(value))
    ]
    everything = sorted(
        {path.parent.name for kind in ("grid.yaml", "run.py") for path in SUITE.glob(f"*/{kind}")}
    )
    try:
        for name in args.names or everything:
            run(name, more)
    except KeyboardInterrupt:
        sys.exit(130)  # bench has said how to go on


if __name__ == "__main__":
    main()
