"""Whether the formulas of published trainers are right: a table of what `tokenenv.conformance`
finds in their code, version by version.

    pip install --no-deps --target /tmp/verl verl==0.9.1
    git clone https://github.com/NovaSky-AI/SkyRL /tmp/skyrl
    python benchmarks/conformance.py "verl 0.9.1=/tmp/verl" "skyrl a956457=/tmp/skyrl"

Each argument is a trainer (`tokenenv.conformance.trainers.TRAINERS`), a label, and a folder: what
pip installed, a wheel that was unpacked, or a checkout. Only single functions are read from it, so
what the trainer depends on need not be installed. `--json FILE` writes every figure.
"""

import argparse
import json
from pathlib import Path

import torch

from tokenenv.conformance import KLReport, Report
from tokenenv.conformance.trainers import subjects_of

Checked = list[tuple[str, Report | KLReport]]
"""Each trainer with its label, and what was found of one of its functions."""


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("sources", nargs="+", metavar="'TRAINER LABEL=FOLDER'")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    checked: Checked = []
    for source in options.sources:
        label, _, folder = source.partition("=")
        for subject in subjects_of(label.split()[0], folder):
            checked.append((label, subject.check()))
    print(of_gradients(checked), of_terms(checked), of_verdicts(checked), sep="\n\n")
    if options.json:
        found = [{"trainer": label} | one.to_dict() for label, one in checked]
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def of_gradients(checked: Checked) -> str:
    """A row for each trainer: its advantages and losses that are exact, and where others are
    off."""
    lines = ["| trainer | exact | off in (cosine) |", "|---|---|---|"]
    for label in dict.fromkeys(label for label, _ in checked):
        reports = [one for name, one in checked if name == label and isinstance(one, Report)]
        exact = "; ".join(one.name for one in reports if one.exact)
        off = "; ".join(f"{one.name}: {where_off(one)}" for one in reports if not one.exact)
        lines.append(f"| {label} | {exact or '-'} | {off or '-'} |")
    return "\n".join(lines)


def where_off(report: Report) -> str:
    """The first world in which a function is off."""
    one = next(one for one, outcome in report.rows if outcome == "off")
    return f"{one.world} ({one.cosine:.4f})"


def of_terms(checked: Checked) -> str:
    """A row for each outcome of KL terms, and whose they are."""
    heading = "| mean / KL | in the reward (cosine) | as a loss it follows | whose |"
    rows: dict[str, list[str]] = {}
    for label, one in checked:
        if isinstance(one, KLReport):
            turned = ", upside down" if one.upside_down else ""
            figures = f"{one.value:.3f}{turned} | {one.in_reward.cosine:.4f}"
            follows = one.follows.replace("||", "\\|\\|")
            term = one.name.removeprefix("KL, ")
            rows.setdefault(f"| {figures} | {follows}", []).append(f"{label}: {term}")
    lines = [f"{outcome} | {'; '.join(whose)} |" for outcome, whose in rows.items()]
    return "\n".join([heading, "|---|---|---|---|", *lines])


def of_verdicts(checked: Checked) -> str:
    """What is said of functions that are off somewhere, and of whose."""
    said: dict[str, list[str]] = {}
    for label, one in checked:
        if not one.exact:
            said.setdefault(one.verdict, []).append(f"{label}, {one.name}")
    return "\n".join(f"- {'; '.join(whose)}: {verdict}" for verdict, whose in said.items())


if __name__ == "__main__":
    main()
