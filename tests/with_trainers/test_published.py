"""The kit finds the known errors in published code, and passes the functions that are right."""

import os
from pathlib import Path

import pytest

from tokenenv.conformance import KLReport, Report
from tokenenv.conformance.trainers import TRAINERS, subjects_of

ROOT = Path(os.environ["TOKENENV_TRAINERS"])
LENGTHS, GAP, KL = ["unequal lengths"], ["masked gap"], ["KL in the reward"]
OFF: dict[str, dict[str, list[str]]] = {
    "verl": {
        "opo": [*LENGTHS],
        "grpo": ["plain"],
        "clipped loss, seq-mean-token-mean": LENGTHS,
    },
    "openrlhf": {
        "gae": ["masked gap, lambda 0.9"],
        "gae, returns": ["masked gap, lambda 0.9"],
        "reinforce_baseline": KL,
        "dr_grpo": KL,
        "group_norm": ["plain"],
        "clipped loss, sequence mean": LENGTHS,
    },
    "skyrl": {
        "reinforce++, mask of own tokens": GAP,
        "grpo": ["plain"],
        "clipped loss, sequence_mean": LENGTHS,
    },
    "trl": {"loss, grpo": LENGTHS},
    "nemo_rl": {
        "reinforce++": KL,
        "reinforce++ minus baseline": KL,
        "grpo, leave one out": ["two prompts"],
    },
    "prime_rl": {},
    "rlhf_book": {"grpo": ["plain"], "reinforce loss": LENGTHS, "grpo loss": LENGTHS},
}
"""The first world in which a function is off; all others are exact wherever they can be."""
TURNED = {"rlhf_book": ["KL, kl1", "KL, kl3"]}
"""KL terms whose ratio is upside down."""


@pytest.mark.parametrize("trainer", TRAINERS)
def test_published_functions(trainer: str) -> None:
    if not (ROOT / trainer).is_dir():
        pytest.skip(f"no {ROOT / trainer}")
    reports = {one.name: one.check() for one in subjects_of(trainer, ROOT / trainer)}
    found = {name: one.off[:1] for name, one in reports.items() if isinstance(one, Report)}
    assert {name: off for name, off in found.items() if off} == OFF[trainer]
    turned = [n for n, one in reports.items() if isinstance(one, KLReport) and one.upside_down]
    assert turned == TURNED.get(trainer, [])


def test_skyrls_return_stops_at_a_tools_tokens() -> None:
    if not (ROOT / "skyrl").is_dir():
        pytest.skip("no SkyRL")
    subjects = {one.name: one for one in subjects_of("skyrl", ROOT / "skyrl")}
    report = subjects["reinforce++, mask of own tokens"].check()
    assert "own tokens 1 and 2 receive nothing, of 4" in report.verdict
