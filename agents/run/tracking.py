"""The run folder: TensorBoard events, finished episodes as lines of JSON; and Weights & Biases
where it is asked for.

Suffixes: K tokens of any texts.
"""

import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from tokenenv.agents.episodes import TOKEN_COLUMNS, Episode, watched_names, watched_tokens
from tokenenv.agents.run.files import locked, refuse_run, reporting
from tokenenv.errors import MissingDependency
from tokenenv.models.encoding import decode_pairs
from tokenenv.models.pieces import TokenPieces
from tokenenv.safety.shown import visible, without_secrets
from tokenenv.safety.trust import refuse_link
from tokenenv.types import TokenSpec

EPISODES = "episodes.jsonl"
DETAILED = 32
"""Episodes of each update whose tokens are written one by one: a line of each is enough of the
others."""
EVERY = 10
"""Updates between sample texts and pictures."""
QUARTERS = 4


class RunFolder:
    """Writes `events.out.tfevents.*` and `episodes.jsonl` into a directory, after each update, and
    keeps it locked.

    A directory holds one run. What was written of it after `tokens_seen` tokens is taken out first:
    a run that goes on from a checkpoint writes that again. `tokens_seen` is None for a new run,
    which is refused where there are episodes.
    """

    def __init__(self, directory: Path, spec: TokenSpec | None, tokens_seen: int | None) -> None:
        # Imported here: it takes a second, and most uses write nothing.
        from torch.utils.tensorboard import SummaryWriter

        self._path = path = directory / EPISODES
        with ExitStack() as opened, reporting(path, "be written"):
            opened.enter_context(locked(directory))
            refuse_link(path)
            if tokens_seen is None:
                if path.exists() and path.stat().st_size:
                    refuse_run(directory)
            else:
                cut_episodes(path, tokens_seen)
            self._episodes = opened.enter_context(path.open("a", encoding="utf-8"))
            self._writer = SummaryWriter(str(directory), purge_step=(tokens_seen or 0) + 1)
            opened.callback(self._writer.close)
            self._opened = opened.pop_all()
        self._tokenizer = spec.tokenizer if spec else None
        self._pieces = TokenPieces(self._tokenizer)

    def __call__(self, metrics: dict[str, float], episodes: Sequence[Episode]) -> None:
        """Logs one update at the tokens seen so far."""
        with reporting(self._path.parent, "take this update"):
            self._write_episodes(int(metrics["time/tokens"]), episodes)
            self._write_events(metrics, episodes)
            self._writer.flush()

    def _write_episodes(self, step: int, episodes: Sequence[Episode]) -> None:
        """On disk at once: a checkpoint that follows is never newer than they are."""
        lines = []
        for number, episode in enumerate(episodes):
            record = {"tokens_seen": step, **episode_record(episode, self._tokenizer)}
            record |= token_columns(episode, self._pieces) if number < DETAILED else {}
            lines.append(json.dumps(record) + "\n")
        self._episodes.write("".join(lines))
        self._episodes.flush()
        os.fsync(self._episodes.fileno())

    def _write_events(self, metrics: dict[str, float], episodes: Sequence[Episode]) -> None:
        step = int(metrics["time/tokens"])
        for name, value in metrics.items():
            if np.isfinite(value):
                self._writer.add_scalar(name, value, step)
        for name, values_K in histograms(episodes).items():
            self._writer.add_histogram(name, values_K, step)
        if int(metrics["time/updates"]) % EVERY == 1:
            self._writer.add_text("samples", self._samples(episodes), step)
            self._writer.add_figure("tokens/by_position", by_position(episodes), step)

    def _samples(self, episodes: Sequence[Episode], count: int = 4) -> str:
        """The texts with the highest and the lowest scores, as Markdown."""
        ranked = sorted(episodes, key=lambda e: -e.score if np.isfinite(e.score) else 0.0)
        chosen = ranked if len(ranked) <= count else ranked[: count // 2] + ranked[-(count // 2) :]
        texts = [
            tuple(markdown("".join(self._pieces(ids))) for ids in (e.prompt, e.response))
            for e in chosen
        ]
        return "\n\n".join(
            f"score {e.score:.3g}, reward {e.reward.sum():.3g}: {prompt} **|** {response}"
            for e, (prompt, response) in zip(chosen, texts, strict=True)
        )

    def close(self) -> None:
        """Flushes and closes both files, and lets go of the directory."""
        with reporting(self._path.parent, "take this update"):
            self._opened.close()


class WandbRun:
    """The same figures in Weights & Biases: a listener for `learn(on_update=...)`; `close` ends the
    run."""

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        wandb = import_wandb()
        directory.mkdir(parents=True, exist_ok=True)
        self._histogram = wandb.Histogram
        self._run = wandb.init(
            project="tokenenv",
            name=directory.name,
            dir=str(directory),
            config=without_secrets(config),
        )

    def __call__(self, metrics: dict[str, float], episodes: Sequence[Episode]) -> None:
        """Logs one update at the tokens seen so far."""
        drawn = {name: self._histogram(values_K) for name, values_K in histograms(episodes).items()}
        known = {name: value for name, value in metrics.items() if np.isfinite(value)}
        self._run.log(known | drawn, step=int(metrics["time/tokens"]))

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


def markdown(text: str) -> str:
    """Any text as Markdown that shows it: neither HTML nor links, pictures or headings."""
    return re.sub(r"([\\`*_{}\[\]()#+.!|~-])", r"\\\1", html.escape(visible(text)))


def import_wandb() -> Any:
    """The package, or `MissingDependency`."""
    try:
        import wandb
    except ImportError as error:
        raise MissingDependency(
            "track='wandb' needs wandb: pip install 'tokenenv-rl[wandb]'"
        ) from error
    return wandb


def cut_episodes(path: Path, tokens_seen: int) -> None:
    """Ends an `episodes.jsonl`, if there is one, after the last line that was written at or before
    so many tokens."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = place = 0
        for line in file:
            place += len(line)
            seen = _tokens_seen(line)
            if seen is not None and seen > tokens_seen:
                break
            end = place if seen is not None else end  # a damaged line counts to what follows it
        file.truncate(end)
        os.fsync(file.fileno())


def _tokens_seen(line: bytes) -> int | None:
    """Of a whole line; None where it is damaged or, after a kill, half written."""
    try:
        return int(json.loads(line)["tokens_seen"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None


def histograms(episodes: Sequence[Episode]) -> dict[str, np.ndarray]:
    """Reward and advantage of single tokens (K,): of all, and of each quarter of the texts, which
    shows where they sit."""
    columns = {
        "reward": [e.reward for e in episodes],
        "advantage": [e.advantage for e in episodes if e.advantage is not None],
    }
    out: dict[str, np.ndarray] = {}
    for name, rows in columns.items():
        if rows:
            values_K, quarter_K = (
                np.concatenate(rows),
                np.concatenate([_quarters(len(row)) for row in rows]),
            )
            parts = {
                f"tokens/{name}_quarter_{q + 1}": values_K[quarter_K == q] for q in range(QUARTERS)
            }
            out |= {f"tokens/{name}": values_K} | {
                key: part for key, part in parts.items() if len(part)
            }
    finite = {name: values_K for name, values_K in out.items() if np.isfinite(values_K).all()}
    watched = {name: watched_tokens(episodes, name) for name in watched_names(episodes)}
    return finite | {
        f"tokens/watch_{name}": values_K for name, values_K in watched.items() if len(values_K)
    }


def by_position(episodes: Sequence[Episode]) -> Any:
    """A matplotlib figure of mean reward and advantage by place in the text, with the middle half
    of the texts shaded."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    for axes, name in zip(figure.subplots(2, 1, sharex=True), ("reward", "advantage"), strict=True):
        rows = [
            row
            for e in episodes
            if (row := getattr(e, name)) is not None and np.isfinite(row).all()
        ]
        if rows:
            table = np.full((len(rows), max(map(len, rows))), np.nan)
            for line, row in zip(table, rows, strict=True):
                line[: len(row)] = row
            low, high = np.nanpercentile(table, [25, 75], axis=0)
            axes.fill_between(range(table.shape[1]), low, high, alpha=0.25)
            axes.plot(np.nanmean(table, axis=0))
        axes.set_ylabel(name)
        axes.axhline(0.0, linewidth=0.5, color="gray")
    axes.set_xlabel("response token")
    return figure


def episode_record(episode: Episode, tokenizer: Any) -> dict[str, Any]:
    """What a reader wants of an episode, as JSON: texts if there is a tokenizer, else token ids;
    None for unknown numbers."""
    texts: tuple[Any, Any] = (episode.prompt.tolist(), episode.response.tolist())
    if tokenizer is not None:
        texts = decode_pairs([texts], tokenizer, skip_special_tokens=False)[0]
    numbers = {
        "score": episode.score,
        "gold": episode.gold,
        "reward": float(episode.reward.sum()),
        "kl": episode.kl,
    }
    return {
        "prompt_id": episode.prompt_id,
        "prompt": texts[0],
        "response": texts[1],
        "length": len(episode.response),
        "terminated": episode.terminated,
        **{name: value if np.isfinite(value) else None for name, value in numbers.items()},
    }


def token_columns(episode: Episode, pieces: TokenPieces) -> dict[str, Any]:
    """Return one entry for each response token, numbers to four digits: its text under "tokens",
    and `TOKEN_COLUMNS`. A number that is not finite is None."""
    found = {key: column.of(episode) for key, column in TOKEN_COLUMNS.items()}
    return {
        "tokens": pieces(episode.response),
        **{key: _rounded(values) for key, values in found.items() if values is not None},
    }


def _rounded(values: np.ndarray | Mapping[str, np.ndarray]) -> Any:
    if isinstance(values, Mapping):
        return {name: _rounded(column) for name, column in values.items()}
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values]


def _quarters(length: int) -> np.ndarray:
    """(length,) the quarter, 0 to 3, of each place."""
    return np.arange(length) * QUARTERS // length
