"""The reporting checklist of a bench: what each item says, and what is unknown."""

import pytest
from benches import lines_of, made, rewrite

from tokenenv.report.checklist import checklist
from tokenenv.report.reading import read

ROWS = {
    "text": {"algo": "grpo", "reward": "terminal", "options": {"group_size": 4}},
    "critic": {"reward": "terminal"},
    "batch": {"algo": "reinforce++", "reward": "terminal"},
    "lambda 1": {"reward": "terminal", "agent": {"lambda_actor": 1.0}},
    "oracle": {"reward": "oracle"},
    "vine": {"algo": "vineppo", "reward": "terminal", "agent": {"rollouts": 2}},
    "mixed": {"reward": {"good": ["oracle", 0.5], "end": "uniform"}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return made(tmp_path_factory.mktemp("bench") / "rows", designs={}, rows=ROWS, seeds=2, points=1)


def said(folder):
    return {line["item"]: line["reported"] for line in checklist(read(folder))}


def test_every_item_is_filled_in(folder):
    found = checklist(read(folder))
    assert len(found) == 14
    assert all(line["reported"] and "unknown" not in line["reported"] for line in found)


def test_rows_are_told_apart_by_granularity_and_family(folder):
    items = said(folder)
    assert items["granularity of the credit"] == (
        "text: text · batch; token: critic · lambda 1 · oracle · mixed; segment: vine"
    )
    assert items["family of the method"] == (
        "comparison within groups: text; temporal difference: critic · oracle · mixed; "
        "Monte Carlo: batch · lambda 1 · vine"
    )
    assert (
        items["a baseline of whole texts, on the same model"]
        == "text · critic · batch · lambda 1 · vine"
    )
    # critic / lambda 1, critic / oracle, critic / mixed, oracle / mixed
    assert items["ablations of one component"].endswith(": 4")


def test_counts_come_from_the_table(folder):
    lines, items = lines_of(folder / "results.csv"), said(folder)
    assert int(lines[0]["trained_weights"]) <= int(lines[0]["policy_weights"])
    assert f"{int(lines[0]['policy_weights']):,} weights" in items["base model, size and version"]
    assert items["the same budget for all"] == "tokenenv/DelayedKey-v0: 128 tokens"
    assert items["variance"].startswith("2 seeds a row")
    last = {(line["row"], line["seed"]): float(line["cpu_seconds"]) for line in lines}
    assert items["computing time"].startswith(f"{sum(last.values()) / 60:.1f} minutes")
    assert items["mean length"].endswith(": 4.0 tokens")
    assert items["distribution of lengths"].endswith(": 4.0, 4.0, 4.0")
    assert "vine: " in items["what the credit costs in addition"]


def test_a_table_without_some_columns_says_that_it_does_not_know(folder, tmp_path):
    (tmp_path / "old").mkdir()
    lines = lines_of(folder / "results.csv")
    for line in lines:
        line |= dict.fromkeys(("policy_weights", "trained_weights", "reward_tokens", "method"), "")
    rewrite(tmp_path / "old" / "results.csv", lines)
    items = said(tmp_path / "old")
    assert "an unknown number of weights" in items["base model, size and version"]
    assert items["what the credit costs in addition"] == "unknown"
    assert "an unknown method" in items["benchmarks and splits"]


def test_of_somebody_elses_design_nothing_is_claimed(folder, tmp_path):
    (tmp_path / "own").mkdir()
    lines = lines_of(folder / "results.csv")
    for line in lines:
        line["reward"] = "my_designs:Even" if line["row"] == "oracle" else line["reward"]
    rewrite(tmp_path / "own" / "results.csv", lines)
    items = said(tmp_path / "own")
    assert "its own: oracle" in items["granularity of the credit"]
    assert "its own: oracle" in items["family of the method"]


def test_nothing_has_finished(folder, tmp_path):
    (tmp_path / "failed").mkdir()
    lines = [line | {"status": "failed"} for line in lines_of(folder / "results.csv")[:1]]
    rewrite(tmp_path / "failed" / "results.csv", lines)
    items = said(tmp_path / "failed")
    assert items["variance"] == "no run has finished"
    assert all(items.values())
    assert items["the same budget for all"] == "unknown"


def test_one_seed_has_no_variance(folder, tmp_path):
    (tmp_path / "one").mkdir()
    lines = lines_of(folder / "results.csv")
    rewrite(tmp_path / "one" / "results.csv", [one for one in lines if one["seed"] == "0"])
    assert said(tmp_path / "one")["variance"].startswith("1 seed a row")


def test_a_strangers_tables_may_lack_columns_and_hold_nonsense(folder, tmp_path):
    (tmp_path / "odd").mkdir()
    lines = [
        line | {"reward": "[" * 50_000, "env": ""} for line in lines_of(folder / "results.csv")
    ]
    rewrite(tmp_path / "odd" / "results.csv", lines)
    (tmp_path / "odd" / "comparisons.csv").write_text("who\nnobody\n")
    assert "an unknown environment" in said(tmp_path / "odd")["benchmarks and splits"]
