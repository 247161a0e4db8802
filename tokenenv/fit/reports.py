"""What a run shows while it lasts: TensorBoard's events in its folder, and a progress bar."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tokenenv.agents.run.files import reporting

LINE_EVERY = 10.0
"""Seconds between lines where there is no terminal to draw a bar on."""


class Reports:
    """Writes the figures of each step and epoch into `folder`, and shows them on stderr with
    `progress`. What was written there after `step` is taken out: it will be written again."""

    def __init__(self, folder: Path, step: int, total: int, *, progress: bool) -> None:
        self._folder, self._step, self._total, self._progress = folder, step, total, progress
        self._writer: Any = None
        self._console = Console(stderr=True)
        on_terminal = progress and self._console.is_terminal
        columns = BarColumn(bar_width=20), TextColumn("{task.description}"), TimeRemainingColumn()
        self._bar = Progress(*columns, console=self._console, disable=not on_terminal)
        self._task = self._bar.add_task("", total=total, completed=step)
        self._held_out = ""
        self._printed = time.monotonic()
        self._bar.start()

    def step(self, step: int, figures: Mapping[str, float]) -> None:
        """Report the step that is now the newest, and its figures."""
        self._write("train", step, figures)
        line = f"step {step:,}/{self._total:,} | loss {figures['loss']:.4f}{self._held_out}"
        self._bar.update(self._task, completed=step, description=line)
        if time.monotonic() - self._printed >= LINE_EVERY:
            self._print(line)

    def epoch(self, epoch: int, step: int, measures: Mapping[str, float]) -> None:
        """Report an epoch that is over."""
        self._write("held_out", step, measures)
        shown = {"loss": "held-out loss", "accuracy": "accuracy"}
        known = [
            f"{words} {measures[name]:.4f}" for name, words in shown.items() if name in measures
        ]
        self._held_out = "".join(f" | {one}" for one in known)
        self._print(f"epoch {epoch} | loss {measures['train_loss']:.4f}{self._held_out}")

    def _print(self, line: str) -> None:
        if self._progress:
            # Above the bar, where there is one.
            self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
            self._printed = time.monotonic()

    def _write(self, room: str, step: int, figures: Mapping[str, float]) -> None:
        with reporting(self._folder, "take this step"):
            self._writer = self._writer or self._new_writer()
            for name, value in figures.items():
                self._writer.add_scalar(f"{room}/{name}", value, step)

    def _new_writer(self) -> Any:
        # Imported here: the import takes a second, and whoever imports this may train nothing.
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._folder), purge_step=self._step + 1)

    def close(self) -> None:
        """Flush the events and leave the bar as it is."""
        self._bar.stop()
        if self._writer is not None:
            with reporting(self._folder, "take this step"):
                self._writer.close()
