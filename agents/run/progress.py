"""A live line while an agent learns: tokens seen, tokens per second, score, KL, time left."""

import time
from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tokenenv.agents.episodes import Episode
from tokenenv.safety.shown import visible


class ProgressLine:
    """Redraws one line on a terminal, and elsewhere prints one every few seconds: tokens as they
    are written, the other figures after each update."""

    def __init__(
        self,
        total_tokens: int,
        tokens_seen: int = 0,
        *,
        console: Console | None = None,
        seconds: float = 10.0,
    ):
        self._console = console or Console(stderr=True)
        self._total, self._start, self._seconds = total_tokens, tokens_seen, seconds
        self._began = self._printed = time.monotonic()
        self._figures: list[str] = []
        """Those of the last update; none before the first one."""
        columns = (
            BarColumn(bar_width=20),
            TextColumn("{task.description}", markup=False),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("", total=total_tokens, completed=tokens_seen)
        self._bar.start()

    def seen(self, tokens: int) -> None:
        """Show how many tokens have been seen, between updates."""
        self._show(tokens)

    def __call__(self, metrics: dict[str, float], episodes: Sequence[Episode]) -> None:
        """Show one update."""
        tokens = int(metrics["time/tokens"])
        self._figures = figures(metrics)
        self._show(tokens, at_once=True, is_last=tokens >= self._total)

    def close(self) -> None:
        """Leave the last line on the screen."""
        self._bar.stop()

    def _show(self, tokens: int, at_once: bool = False, is_last: bool = False) -> None:
        now = time.monotonic()
        each = (now - self._began) / max(tokens - self._start, 1)
        shown = self._figures or [f"{1 / max(each, 1e-9):,.0f} tokens/s", "writing"]
        line = " | ".join([counted(tokens, self._total), *shown])
        self._bar.update(self._task, completed=tokens, description=line, refresh=at_once)
        if not self._console.is_terminal and (is_last or now - self._printed >= self._seconds):
            left = each * max(self._total - tokens, 0)
            self._console.print(
                f"{line} | {left:.0f} s left", highlight=False, markup=False, soft_wrap=True
            )
            self._printed = now


def counted(tokens: int, total_tokens: int) -> str:
    """Return the tokens of a run in words, and by how many they are more than was asked for."""
    over = f" ({tokens - total_tokens:,} over)" if tokens > total_tokens else ""
    return f"{tokens:,}/{total_tokens:,} tokens{over}"


def figures(metrics: Mapping[str, float]) -> list[str]:
    """Return the figures of one update in words.

    Where texts have no score, what each term of the reward but the KL pays stands in its place.
    """
    parts = [f"{metrics['time/tokens_per_second']:,.0f} tokens/s"]
    names = {"score": "objective/score", "gold": "objective/gold", "KL/text": "objective/kl"}
    known = {label: metrics.get(name, np.nan) for label, name in names.items()}
    if not np.isfinite(known["score"]):
        terms = {name.partition("/")[2]: name for name in metrics if name.startswith("reward/")}
        known |= {visible(term): metrics[name] for term, name in terms.items() if term != "kl"}
    parts += [f"{label} {value:z.2f}" for label, value in known.items() if np.isfinite(value)]
    if metrics.get("rollout/staleness_max"):
        parts.append(
            f"updates old {metrics['rollout/staleness']:.1f}, at most "
            f"{metrics['rollout/staleness_max']:.0f}"
        )
    return parts
