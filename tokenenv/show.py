"""`tokenenv show`: one self-contained page of a run's episodes, every token coloured by what it earned."""

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from tokenenv.errors import InvalidArgument

RUN_KEYS = ("env", "algo", "reward")


def write_page(run_dir: Path, output: Path | None = None, max_episodes: int = 200) -> Path:
    """Writes the page (default: `episodes.html` in the run folder) and returns where it is.

    It shows at most `max_episodes` episodes, evenly over the run, of those whose tokens were written one by one.
    Raises `InvalidArgument` where there is nothing to show.
    """
    if max_episodes < 1:
        raise InvalidArgument(f"max_episodes={max_episodes} must be at least 1.")
    episodes = read_episodes(run_dir)
    detailed = [episode for episode in episodes if "tokens" in episode]
    if not detailed:
        raise InvalidArgument(f"{run_dir / 'episodes.jsonl'} has no token columns; train again to see single tokens.")
    data = {
        "title": run_dir.resolve().name,
        "run": _run(run_dir),
        "total": len(episodes),
        "curve": score_curve(episodes),
        "episodes": evenly(detailed, max_episodes),
    }
    path = output or run_dir / "episodes.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(data), encoding="utf-8")
    return path


def page(data: dict[str, Any]) -> str:
    """The page's HTML; nothing in `data` can end the script that holds it."""
    template = files("tokenenv").joinpath("assets/show.html").read_text(encoding="utf-8")
    return template.replace("__DATA__", json.dumps(data, allow_nan=False).replace("<", "\\u003c"))


def read_episodes(run_dir: Path) -> list[dict[str, Any]]:
    """All whole lines of a run's `episodes.jsonl`: the last may be half written while the run goes on."""
    path = run_dir / "episodes.jsonl"
    if not path.is_file():
        raise InvalidArgument(f"run_dir={str(run_dir)!r} has no episodes.jsonl; `tokenenv train` makes run folders.")
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    episodes = []
    for number, line in enumerate(lines, 1):
        try:
            episodes.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise InvalidArgument(f"{path}, line {number}, is no JSON: {error}.") from error
            continue
        if not isinstance(episodes[-1], dict):
            raise InvalidArgument(f"{path}, line {number}, is no episode but {line[:40]}.")
    if not episodes:
        raise InvalidArgument(f"{path} holds no finished episode yet.")
    return episodes


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spread, the last one among them."""
    if len(items) <= count:
        return list(items)
    return [items[(i + 1) * len(items) // count - 1] for i in range(count)]


def score_curve(episodes: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    """(tokens seen, mean score) of each update whose scores are known."""
    scores: dict[int, list[float]] = {}
    for episode in episodes:
        if episode.get("score") is not None:
            scores.setdefault(episode["tokens_seen"], []).append(episode["score"])
    return [(tokens, sum(found) / len(found)) for tokens, found in sorted(scores.items())]


def _run(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {key: config[key] for key in RUN_KEYS if config.get(key) is not None}
