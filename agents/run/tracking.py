"""Writing a run: TensorBoard events and finished episodes as lines of JSON, and Weights & Biases
where it is asked for. docs/reading-a-run.md says what each number means.

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
from tokenenv.agents.run.files import EPISODES, locked, refuse_episodes, reporting
from tokenenv.errors import missing
from tokenenv.models.chats import Messages
from tokenenv.models.encoding import decode_pairs, special_ids
from tokenenv.models.pieces import TokenPieces
from tokenenv.safety.shown import visible, without_secrets
from tokenenv.safety.trust import refuse_link
from tokenenv.types import TokenSpec

DETAILED = 32
"""Episodes of each update whose tokens are written one by one; the others have a line without
them."""
EVERY = 10
"""Updates between sample texts and pictures."""
QUARTERS = 4


class RunFolder:
    """Writes `events.out.tfevents.*` and `episodes.jsonl` into a directory after each update, and
    keeps the directory locked.

    A directory holds one run. Where a run goes on, all that it wrote after `tokens_seen` tokens is
    taken out first, because it will be written again. `tokens_seen` is None for a new run, which is
    refused where there are episodes. `group_size` is the number of neighbouring episodes that share
    a prompt.
    """

    def __init__(
        self,
        directory: Path,
        spec: TokenSpec | None,
        tokens_seen: int | None,
        group_size: int = 1,
    ) -> None:
        self._path = path = directory / EPISODES
        # The lock first: only who has it may cut the files back.
        with ExitStack() as opened, reporting(path, "be written"):
            opened.enter_context(locked(directory))
            refuse_link(path)
            if tokens_seen is None:
                refuse_episodes(directory)
            else:
                cut_episodes(path, tokens_seen)
            self._episodes = opened.enter_context(path.open("a", encoding="utf-8"))
            self._opened = opened.pop_all()
        self._begin = (tokens_seen or 0) + 1
        self._writer: Any = None
        self._tokenizer = spec.tokenizer if spec else None
        self._chats = spec.chats if spec else None
        self._pieces = TokenPieces(self._tokenizer)
        self._special = special_ids(self._tokenizer) if self._tokenizer else set()
        self._group_size = group_size

    def __call__(self, metrics: dict[str, float], episodes: Sequence[Episode]) -> None:
        """Log one update at the tokens seen so far."""
        with reporting(self._path.parent, "take this update"):
            self._write_episodes(int(metrics["time/tokens"]), episodes)
            # Made with the first update: a run that has ended leaves no empty file of events.
            self._writer = self._writer or self._new_writer()
            self._write_events(metrics, episodes)
            self._writer.flush()

    def _new_writer(self) -> Any:
        # Imported here: the import takes a second, and most uses write nothing.
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(self._path.parent), purge_step=self._begin)
        self._opened.callback(writer.close)
        return writer

    def _write_episodes(self, step: int, episodes: Sequence[Episode]) -> None:
        """Write one line for each episode, on disk at once: a checkpoint that follows is never
        newer than the episodes."""
        lines, groups = [], group_numbers(episodes, self._group_size)
        for number, episode in enumerate(episodes):
            record = {"tokens_seen": step, **episode_record(episode, self._tokenizer)}
            if len(episode.written):
                record["segments"] = segments(episode, self._pieces)
            # A group is written token by token as a whole.
            if number - number % self._group_size < DETAILED:
                record |= groups[number] | self._for_the_page(episode)
            lines.append(json.dumps(record) + "\n")
        self._episodes.write("".join(lines))
        self._episodes.flush()
        os.fsync(self._episodes.fileno())

    def _for_the_page(self, episode: Episode) -> dict[str, Any]:
        """Return what only `tokenenv show` reads: the last message of the conversation, if there is
        one, which of the response's tokens are special, and the numbers of each token."""
        chat = self._chats.messages(episode.prompt.tolist()) if self._chats else None
        special = [t for t, i in enumerate(episode.response.tolist()) if i in self._special]
        return {
            **({"message": last_message(chat)} if chat else {}),
            **({"special": special} if special else {}),
            **token_columns(episode, self._pieces),
        }

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
        """Return the texts with the highest and the lowest scores, as Markdown."""
        ranked = sorted(episodes, key=lambda e: -e.score if np.isfinite(e.score) else 0.0)
        chosen = ranked if len(ranked) <= count else ranked[: count // 2] + ranked[-(count // 2) :]
        texts = [
            tuple(markdown("".join(self._pieces(ids))) for ids in (e.prompt, e.after_prompt))
            for e in chosen
        ]
        return "\n\n".join(
            f"score {e.score:.3g}, reward {e.reward.sum():.3g}: {prompt} **|** {response}"
            for e, (prompt, response) in zip(chosen, texts, strict=True)
        )

    def close(self) -> None:
        """Flush and close both files, and unlock the directory."""
        with reporting(self._path.parent, "take this update"):
            self._opened.close()


class WandbRun:
    """Sends the same figures to Weights & Biases: a listener for `learn(on_update=...)`, whose
    `close` ends the run."""

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
        """Log one update at the tokens seen so far."""
        drawn = {name: self._histogram(values_K) for name, values_K in histograms(episodes).items()}
        known = {name: value for name, value in metrics.items() if np.isfinite(value)}
        self._run.log(known | drawn, step=int(metrics["time/tokens"]))

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def markdown(text: str) -> str:
    """Return Markdown that shows a text as it is: no HTML, link, picture or heading comes of it."""
    return re.sub(r"([\\`*_{}\[\]()#+.!|~-])", r"\\\1", html.escape(visible(text)))


def import_wandb() -> Any:
    """Return the package, or raise `MissingDependency`."""
    try:
        import wandb
    except ImportError as error:
        raise missing("track='wandb'", "wandb") from error
    return wandb


def cut_episodes(path: Path, tokens_seen: int) -> None:
    """Cut an `episodes.jsonl`, if there is one, after the last line that was written at or before
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
            # A damaged line stays where a whole one follows, and goes at the end of the file.
            end = place if seen is not None else end
        file.truncate(end)
        os.fsync(file.fileno())


def _tokens_seen(line: bytes) -> int | None:
    """Return the tokens seen of a line; None where it is damaged or, after a kill, half written."""
    try:
        return int(json.loads(line)["tokens_seen"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None


def histograms(episodes: Sequence[Episode]) -> dict[str, np.ndarray]:
    """Return reward, advantage and watched numbers of single tokens (K,).

    Reward and advantage are given of all tokens and of each quarter of the texts, which shows where
    in a text they sit. They are left out where one of them is not finite; of watched numbers the
    finite ones are given.
    """
    columns = {
        "reward": [e.reward for e in episodes],
        "advantage": [e.advantage for e in episodes if e.advantage is not None],
    }
    out: dict[str, np.ndarray] = {}
    for name, rows in columns.items():
        if not rows:
            continue
        out[f"tokens/{name}"] = values_K = np.concatenate(rows)
        quarter_K = np.concatenate([_quarters(len(row)) for row in rows])
        for quarter in range(QUARTERS):
            part_K = values_K[quarter_K == quarter]
            if len(part_K):  # a text of one token has a first quarter only
                out[f"tokens/{name}_quarter_{quarter + 1}"] = part_K
    finite = {name: values_K for name, values_K in out.items() if np.isfinite(values_K).all()}
    watched = {name: watched_tokens(episodes, name) for name in watched_names(episodes)}
    return finite | {
        f"tokens/watch_{name}": values_K for name, values_K in watched.items() if len(values_K)
    }


def by_position(episodes: Sequence[Episode]) -> Any:
    """Return a matplotlib figure of mean reward and advantage by place in the text, with the middle
    half of the texts shaded."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    for axes, name in zip(figure.subplots(2, 1, sharex=True), ("reward", "advantage"), strict=True):
        known = [getattr(e, name) for e in episodes if getattr(e, name) is not None]
        rows = [row for row in known if np.isfinite(row).all()]
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
    """Return what a reader wants to know of an episode, as JSON values.

    Prompt and response are texts where there is a tokenizer, else token ids. The response is all
    that came after the prompt, whoever wrote it; its length is that of the policy's tokens. A
    number that is not known is None.
    """
    texts: tuple[Any, Any] = (episode.prompt.tolist(), episode.after_prompt.tolist())
    if tokenizer is not None:
        texts = decode_pairs([texts], tokenizer, skip_special_tokens=False)[0]
    numbers = {
        "score": episode.score,
        "gold": episode.gold,
        "reward": float(episode.reward.sum()),
        "kl": episode.kl,
    }
    terms = {name: float(values.sum()) for name, values in episode.terms.items()}
    return {
        "prompt_id": episode.prompt_id,
        "prompt": texts[0],
        "response": texts[1],
        "length": len(episode.response),
        "terminated": episode.terminated,
        **({"columns": dict(episode.columns)} if episode.columns else {}),
        **{name: value if np.isfinite(value) else None for name, value in numbers.items()},
        **({"terms": {name: _digits(value) for name, value in terms.items()}} if terms else {}),
    }


def segments(episode: Episode, pieces: TokenPieces) -> list[dict[str, Any]]:
    """Return the response in turns and what was written between them: whose each segment is, its
    number of tokens, and its text."""
    return [
        {"own": own, "length": len(tokens), "text": "".join(pieces(tokens))}
        for own, tokens in episode.segments
    ]


def group_numbers(episodes: Sequence[Episode], size: int) -> list[dict[str, int]]:
    """Return {"group": its number in the update} for each episode; {} for all of them where
    neighbours are not compared: they are no groups, or one was chosen of each group."""
    numbers = [i // size for i in range(len(episodes))]
    firsts = [episodes[number * size] for number in numbers]
    alike = [np.array_equal(e.prompt, f.prompt) for e, f in zip(episodes, firsts, strict=True)]
    return [{"group": n} if size > 1 and all(alike) else {} for n in numbers]


def last_message(chat: Messages) -> str:
    """Return the text of the last message of the user's, or of the last one where the user has
    none."""
    content = ([m for m in chat if m.get("role") == "user"] or list(chat))[-1].get("content", "")
    return content if isinstance(content, str) else json.dumps(content, default=str)


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
    return [_digits(value) for value in values]


def _digits(value: float) -> float | None:
    return float(f"{value:.4g}") if np.isfinite(value) else None


def _quarters(length: int) -> np.ndarray:
    """Return the quarter, 0 to 3, of each place (length,)."""
    return np.arange(length) * QUARTERS // length
