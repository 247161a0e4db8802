"""What summaries and comparisons say of made-up runs."""

import io

import numpy as np
import pytest
from rich.console import Console

from tokenenv.bench import Grid
from tokenenv.bench.shown import tables, to_goal
from tokenenv.bench.summary import ALL, compare, summarise

KEY, NEGATION = "tokenenv/DelayedKey-v0", "tokenenv/Negation-v0"


def lines(task, row, seed, shares, **last):
    """A run that was evaluated every 100 tokens; `last` is said of its end."""
    made = []
    for point, share in enumerate(shares):
        line = {"task": task, "row": row, "seed": seed, "status": "finished", "point": point}
        line |= {"tokens": 100 * point, "reward_tokens": 300 * point, "total_tokens": 400}
        made.append(line | {"share": share, "gold": None if share is None else share / 2})
    made[-1] |= last
    return made


def one(table, **asked):
    found = [line for line in table if all(line[k] == v for k, v in asked.items())]
    assert len(found) == 1
    return found[0]


@pytest.fixture
def grid():
    envs = {"key": {"env": KEY, "goal": {"share": 0.5}}, "negation": {"env": NEGATION}}
    designs = {"slow": "terminal", "fast": "oracle", "none": "uniform"}
    return Grid(envs=envs, designs=designs, seeds=3, baseline="slow")


@pytest.fixture
def table():
    found = []
    for seed in range(3):
        found += lines("key", "slow", seed, [0.0, 0.1, 0.2, 0.5 * (seed == 2)])
        found += lines("key", "fast", seed, [0.0, 0.5 + 0.1 * seed, 0.4, 0.9])
        found += lines("negation", "slow", seed, [0.0, 0.1 * seed])
        found += lines("negation", "fast", seed, [0.0, 0.2])
    return found


def test_runs_that_did_not_get_there_are_counted(grid, table):
    summary = summarise(grid, table)
    slow, fast, none = (one(summary, task="key", row=row) for row in ("slow", "fast", "none"))
    assert (slow["reached"], slow["finished"], slow["cells"]) == (1, 3, 3)
    assert slow["tokens_to_goal"] is None  # two of three never arrived, so the median has not
    assert to_goal(slow) == "not reached in 400 (1 of 3)"
    # The first time counts, whatever comes later.
    assert (fast["reached"], fast["tokens_to_goal"], fast["reward_tokens_to_goal"]) == (3, 100, 300)
    assert to_goal(fast) == "100 (3 of 3)"
    assert (none["finished"], none["gold"], none["reached"]) == (0, None, None)


def test_the_median_is_of_all_runs_those_that_never_arrive_included(grid):
    shares = ([0.0, 0.6], [0.0, 0.0, 0.6], [0.0, 0.0])
    found = [one for seed, run in enumerate(shares) for one in lines("key", "slow", seed, run)]
    assert one(summarise(grid, found), task="key", row="slow")["tokens_to_goal"] == 200


def test_figures_are_of_the_last_evaluation_over_seeds(grid, table):
    slow = one(summarise(grid, table), task="key", row="slow")
    assert slow["share"] == pytest.approx(0.5 / 3)
    assert slow["gold"] == pytest.approx(0.25 / 3)
    assert slow["share_low"] == 0.0
    assert slow["share_high"] == pytest.approx(0.5, abs=0.17)
    assert slow["tokens"] == 300


def test_rows_of_all_environments_have_a_line_for_them_together(grid, table):
    summary = summarise(grid, table)
    assert [line["row"] for line in summary if line["task"] == ALL] == ["slow", "fast"]
    values = np.array([0.9, 0.9, 0.9, 0.2, 0.2, 0.2])
    fast = one(summary, task=ALL, row="fast")
    assert fast["share"] == pytest.approx(np.sort(values)[1:-1].mean())
    assert (fast["cells"], fast["finished"]) == (6, 6)
    assert (fast["share_low"], fast["share_high"]) == (fast["share"], fast["share"])


def test_a_failed_cell_is_no_run(grid, table):
    failed = {"task": "key", "row": "none", "seed": 0, "status": "failed", "error": "no"}
    assert one(summarise(grid, [failed, *table]), task="key", row="none")["finished"] == 0


def test_pairs_of_rows_are_compared_by_the_column_of_the_goal(grid, table):
    pairs = compare(grid, table)
    assert len(pairs) == 4  # two rows with runs in two environments
    pair = one(pairs, task="key", row="fast", other="slow")
    assert (pair["column"], pair["probability"]) == ("share", 1.0)
    assert pair["difference"] == pytest.approx(0.9 - 0.5 / 3)
    assert one(pairs, task="key", row="slow", other="fast")["probability"] == 0.0
    tied = one(pairs, task="negation", row="fast", other="slow")
    assert tied["probability"] == pytest.approx((1 + 1 + 0.5) / 3)


def test_without_an_optimum_gold_is_compared():
    grid = Grid(designs={"a": "terminal", "b": "token"}, seeds=2)
    task, found = "default", []
    for seed in range(2):
        for row, gold in (("a", 0.1), ("b", 0.6)):
            found += lines(task, row, seed, [None, None], gold=gold)
    assert {pair["column"] for pair in compare(grid, found)} == {"gold"}
    assert one(summarise(grid, found), row="b")["goal"] is None


def test_the_terminal_shows_every_row(grid, table):
    console = Console(width=200, file=io.StringIO())
    for made in tables(grid, summarise(grid, table), compare(grid, table)):
        console.print(made)
    said = console.file.getvalue()
    assert "not reached in 400 (1 of 3)" in said
    assert "0 of 3" in said
    assert "better than slow" in said
    assert "100% (100% to 100%)" in said
