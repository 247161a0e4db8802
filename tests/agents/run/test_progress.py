"""The live line: tokens as they are written, the figures of the last update, what was too much."""

import io
import itertools

import gymnasium as gym
import pytest
from rich.console import Console

import tokenenv  # noqa: F401
from tokenenv.agents import PPO, VinePPO
from tokenenv.agents.run import listeners, progress
from tokenenv.agents.run.progress import ProgressLine, counted, figures

METRICS = {
    "time/tokens": 1500, "time/tokens_per_second": 321.0, "objective/score": 1.25,
    "objective/kl": 3.5, "objective/gold": float("nan"),
}  # fmt: skip


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def line_on(out, terminal, **options):
    console = Console(file=out, force_terminal=terminal, width=120)
    return ProgressLine(3000, console=console, **options)


@pytest.mark.parametrize("terminal", [False, True])
def test_it_shows_the_figures(terminal):
    out = io.StringIO()
    line = line_on(out, terminal, seconds=0.0)
    line(METRICS, [])
    line.close()
    for part in ("1,500/3,000 tokens", "321 tokens/s", "score 1.25", "KL/text 3.50"):
        assert part in out.getvalue()
    assert "gold" not in out.getvalue()


def test_a_line_comes_every_ten_seconds_before_the_first_update_too(monkeypatch):
    """Where nobody looks at a terminal."""
    clock, out = Clock(monkeypatch), io.StringIO()
    line = line_on(out, False)
    for tokens in range(10, 260, 10):
        clock.now += 1.0
        line.seen(tokens)
    assert out.getvalue().splitlines() == [
        "100/3,000 tokens | 10 tokens/s | writing | 290 s left",
        "200/3,000 tokens | 10 tokens/s | writing | 280 s left",
    ]
    line(METRICS, [])
    clock.now += 10.0
    line.seen(1600)
    last = out.getvalue().splitlines()[-1]
    assert last.startswith("1,600/3,000 tokens | 321 tokens/s | score 1.25 | KL/text 3.50 |")
    line.close()


def test_tokens_move_on_a_terminal_before_the_first_update():
    out = io.StringIO()
    line = line_on(out, True)
    line.seen(64)
    line.close()
    assert "64/3,000 tokens" in out.getvalue()


@pytest.mark.parametrize("algorithm", [PPO, VinePPO])
def test_it_is_told_of_each_step(monkeypatch, algorithm):
    """Before the first update, and of the continuations that values take; not after `learn`."""
    told, updates = [], []

    class Line(ProgressLine):
        def seen(self, tokens):
            told.append((tokens, len(updates)))

    monkeypatch.setattr(listeners, "ProgressLine", Line)
    envs = gym.make_vec("tokenenv/Negation-v0", num_envs=8, autoreset_mode="SameStep")
    agent = algorithm(envs, batch_tokens=40, epochs=1)
    agent.learn(200, progress=True, on_update=lambda metrics, episodes: updates.append(1))
    tokens = [one for one, _ in told]
    assert tokens[0] == 8
    assert tokens == sorted(set(tokens))
    assert all(later - one <= 8 for one, later in itertools.pairwise(tokens))
    assert tokens[-1] == agent.tokens_seen
    assert len([tokens for tokens, updated in told if not updated]) > 3
    count = len(told)
    agent.collector.collect(40)
    assert len(told) == count


def test_the_last_line_says_by_how_much_a_run_went_over():
    assert counted(3000, 3000) == "3,000/3,000 tokens"
    assert counted(3012, 3000) == "3,012/3,000 tokens (12 over)"
    out = io.StringIO()
    line = line_on(out, False)
    line(METRICS | {"time/tokens": 3012}, [])
    assert "3,012/3,000 tokens (12 over)" in out.getvalue()


def test_a_reward_without_a_score_is_never_invisible():
    """What each term pays stands in its place, the KL left out."""
    known = {"reward/quality": 0.5, "reward/st\x1byle": -0.25, "reward/kl": -9.0}
    found = figures(METRICS | known | {"objective/score": float("nan")})
    assert "quality 0.50" in found
    assert not any("\x1b" in part for part in found)
    assert any(part.startswith("st") and part.endswith("yle -0.25") for part in found)
    assert not any("-9" in part for part in found)
    assert figures(METRICS | known) == figures(METRICS)
