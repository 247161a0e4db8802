"""Tianshou's DQN learns the true value of a fresh text: it must not bootstrap where a scored text
is cut.

The same as `tests/test_learned_values.py`, in an environment of its own.
"""

import runpy
from pathlib import Path

import pytest

from tokenenv.rewards.rule import Rule

EXAMPLE = Path(__file__).parents[2] / "examples" / "tianshou_dqn.py"
ONE = {"max_new_tokens": 4, "reward": {"one": Rule(lambda prompt, response: 1.0, on="tokens")}}


def value(**options):
    return runpy.run_path(str(EXAMPLE))["train"](
        "tokenenv/Negation-v0", 10_000, 8, **ONE, **options
    )


def test_a_fresh_text_is_worth_what_texts_earn():
    assert value() == pytest.approx(1.0, abs=0.25)


def test_values_run_away_where_a_scored_cut_is_a_truncation():
    assert value(cut="truncated") > 1.5
