"""A live line while an agent learns: tokens seen, tokens per second, score, KL, time left."""

import time
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tokenenv.agents.episodes import Episode


class ProgressLine:
    """Redraws one line after each update on a terminal, and elsewhere prints one every few
    seconds."""

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
        columns = (
            BarColumn(bar_width=20),
            TextColumn("{task.description}", markup=False),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("", total=total_tokens, completed=tokens_seen)
        self._bar.start()

    def __call__(self, metrics: dict[str, float], episodes: Sequence[Episode]) -> None:
        """Show one update."""
        tokens, now = int(metrics["time/tokens"]), time.monotonic()
        line = describe(metrics, self._total)
        self._bar.update(self._task, completed=tokens, description=line, refresh=True)
        done = tokens >= self._total
        if not self._console.is_terminal and (done or now - self._printed >= self._seconds):
            left = (now - self._began) * max(self._total - tokens, 0) / max(tokens - self._start, 1)
            self._console.print(
                f"{line} | {left:.0f} s left", highlight=False, markup=False, soft_wrap=True
            )
            self._printed = now

    def close(self) -> None:
        """Leave the last line on the screen."""
        self._bar.stop()


def describe(metrics: dict[str, float], total_tokens: int) -> str:
    """Return the figures of one update in words."""
    parts = [
        f"{metrics['time/tokens']:,.0f}/{total_tokens:,} tokens",
        f"{metrics['time/tokens_per_second']:,.0f} tokens/s",
    ]
    names = {"score": "objective/score", "gold": "objective/gold", "KL/text": "objective/kl"}
    known = {label: metrics.get(name, np.nan) for label, name in names.items()}
    parts += [f"{label} {value:z.2f}" for label, value in known.items() if np.isfinite(value)]
    if metrics.get("rollout/staleness_max"):
        parts.append(
            f"updates old {metrics['rollout/staleness']:.1f}, at most "
            f"{metrics['rollout/staleness_max']:.0f}"
        )
    return " | ".join(parts)
