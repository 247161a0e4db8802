"""The page of `tokenenv show`: a run's episodes in one file, every token coloured by what it
earned."""

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenenv.agents.episodes import TOKEN_COLUMNS
from tokenenv.errors import InvalidArgument
from tokenenv.safety.shown import javascript_class
from tokenenv.safety.trust import refuse_link
from tokenenv.safety.values import from_yaml

RUN_KEYS = ("env", "algo", "reward")
MOST = 1e300
"""A run writes no number that is larger."""


def write_page(run_dir: Path, output: Path | None = None, max_episodes: int = 200) -> Path:
    """Write the page (by default `episodes.html` in the run folder) and return where it is.

    It shows at most `max_episodes` episodes, evenly over the run, of those whose tokens were
    written one by one. The run folder is data, whoever made it: lines that hold no episode are left
    out, and the page says how many. Raises `InvalidArgument` where there is nothing to show.
    """
    if max_episodes < 1:
        raise InvalidArgument(f"max_episodes={max_episodes} must be at least 1.")
    episodes, skipped = read_episodes(run_dir)
    detailed = [episode for episode in episodes if "tokens" in episode]
    if not detailed:
        raise InvalidArgument(
            f"{run_dir / 'episodes.jsonl'} has no token columns; train again to see single tokens."
        )
    data = {
        "title": run_dir.resolve().name,
        "run": _run(run_dir),
        "total": len(episodes),
        "skipped": skipped,
        "curve": score_curve(episodes),
        "columns": {key: column.label for key, column in TOKEN_COLUMNS.items()},
        "episodes": evenly(detailed, max_episodes),
    }
    path = output or run_dir / "episodes.html"
    if output is None:
        refuse_link(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(data), encoding="utf-8")
    return path


def page(data: dict[str, Any]) -> str:
    """Return the page's HTML."""
    template = files("tokenenv.agents.run").joinpath("show.html").read_text(encoding="utf-8")
    template = template.replace("__HIDDEN__", javascript_class())
    # Without "<" no text of an episode can end the script element that holds the data.
    return template.replace("__DATA__", json.dumps(data, allow_nan=False).replace("<", "\\u003c"))


def read_episodes(run_dir: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the episodes of a run's `episodes.jsonl`, and how many lines hold none.

    The last line may be half written while the run goes on. It is then no episode, and is not
    counted.
    """
    path = run_dir / "episodes.jsonl"
    if not path.is_file():
        raise InvalidArgument(
            f"run_dir={str(run_dir)!r} has no episodes.jsonl; `tokenenv train` makes run folders."
        )
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    whole = [_episode(line) for line in lines[:-1] if line.strip()]
    last = [episode] if (episode := _episode(lines[-1])) else []
    episodes = [episode for episode in whole if episode is not None]
    if not episodes + last:
        bad = f", but {len(whole)} lines that are none" if whole else ""
        raise InvalidArgument(f"{path} holds no finished episode yet{bad}.")
    return episodes + last, len(whole) - len(episodes)


def _episode(line: str) -> dict[str, Any] | None:
    """Return the episode of a line, or None where the line holds none: a page shows what it is
    given, so numbers must be numbers and texts texts."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):  # also of a number with too many digits
        return None
    return found if isinstance(found, dict) and _is_episode(found) else None


def _is_episode(found: dict[str, Any]) -> bool:
    numbers = [found.get(name) for name in ("score", "gold", "reward", "kl")]
    counts = [found.get(name) for name in ("tokens_seen", "length")]
    return (
        all(isinstance(count, int) and 0 <= count <= MOST for count in counts)
        and all(isinstance(found.get(name), str | list) for name in ("prompt", "response"))
        and isinstance(found.get("terminated"), bool)
        and _are_numbers(numbers)
        and ("tokens" not in found or _are_columns(found))
    )


def _are_columns(found: dict[str, Any]) -> bool:
    tokens = found["tokens"]
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        return False
    known = [found[key] for key in TOKEN_COLUMNS if found.get(key) is not None]
    columns = [
        column
        for values in known
        for column in (values.values() if isinstance(values, dict) else [values])
    ]
    return all(
        isinstance(column, list) and len(column) == len(tokens) and _are_numbers(column)
        for column in columns
    )


def _are_numbers(values: list[Any]) -> bool:
    return all(
        value is None or (isinstance(value, int | float) and abs(value) <= MOST) for value in values
    )


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """Return at most `count` of the items, evenly spread, the last one among them."""
    if len(items) <= count:
        return list(items)
    return [items[(i + 1) * len(items) // count - 1] for i in range(count)]


def score_curve(episodes: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    """Return (tokens seen, mean score) of each update whose scores are known."""
    scores: dict[int, list[float]] = {}
    for episode in episodes:
        if episode["score"] is not None:
            scores.setdefault(episode["tokens_seen"], []).append(episode["score"])
    return [(tokens, sum(found) / len(found)) for tokens, found in sorted(scores.items())]


def _run(run_dir: Path) -> dict[str, str]:
    path = run_dir / "config.yaml"
    if not path.is_file():
        return {}
    config = from_yaml(path.read_text(encoding="utf-8", errors="replace"), str(path))
    if not isinstance(config, dict):
        raise InvalidArgument(f"{path} holds no mapping of options.")
    return {key: str(config[key]) for key in RUN_KEYS if config.get(key) is not None}
