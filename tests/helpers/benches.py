"""Small benches for tests of what is made of their folders."""

import csv
import json

import pytest

from tokenenv.bench import Grid, bench
from tokenenv.bench import run as running
from tokenenv.bench.events import Event, played

SETTINGS = {
    "env": "tokenenv/DelayedKey-v0",
    "num_envs": 8,
    "total_tokens": 128,
    "options": {"max_new_tokens": 4},
    "agent": {"batch_tokens": 64, "lr": 1e-5, "epochs": 1, "minibatches": 1},
}
DESIGNS = {"end": "terminal", "good": "oracle", "mixed": {"a": ["oracle", 0.5], "b": "terminal"}}
CREDIT = {
    "texts": [8, 8],
    "correlation": [0.5, None],
    "learnt_size": [1.5, 0.5],
    "exact_size": [2.0, 0.0],
    "overall": 0.25,
}
TEXT = {
    "update": 2,
    "tokens_seen": 128,
    "tokens": ["key1", " ", "a\n"],
    "token_rewards": [0.0, 0.5, -1.0],
    "token_terms": {"end": [0.0, 1.0, 0.0], "kl": [0.0, -0.5, -1.0]},
    "token_advantages": [1.0, None, -2.0],
    "token_exact": [0.25, 0.0, 0.0],
    "score": 0.0,
}
EVIL = "</script><img src=x onerror=alert(1)>\u202e\x00$\\frac{a}$ 'q\" __BODY__ \ufffe"


def in_process(cells, workers, on_event):
    for cell in cells:
        on_event(Event(cell, *played(cell)))


def made(folder, **values):
    """A bench, played in this process."""
    given = {"settings": SETTINGS, "seeds": 2, "points": 2, "texts": 8, "designs": DESIGNS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(running.LAUNCHERS, "local", in_process)
        bench(Grid(**given | values), folder)
    return folder


def with_credit(folder, text=TEXT, credit=CREDIT):
    """Write credit and a text into the files of the cells, as numbers that are known here."""
    for path in (folder / "cells").glob("*.json"):
        record = json.loads(path.read_text()) | {"credit": credit, "texts": [text]}
        path.write_text(json.dumps(record))
    lines = lines_of(folder / "results.csv")
    for line in lines:
        line["train_credit"] = "0.5" if line["point"] not in ("", "0") else ""
    rewrite(folder / "results.csv", lines)
    return folder


def lines_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def rewrite(path, lines):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
