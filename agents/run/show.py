"""The page of `tokenenv show`: a run's episodes in one file, every token coloured by what it
earned."""

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path, PurePath
from typing import Any

from tokenenv.agents.episodes import TOKEN_COLUMNS, TokenColumn
from tokenenv.errors import InvalidArgument
from tokenenv.safety.shown import javascript_class
from tokenenv.safety.trust import refuse_link
from tokenenv.safety.values import from_yaml

RUN_KEYS = ("env", "model", "algo", "reward")
MOST = 1e300
"""A run writes no number that is larger."""
_LAST_TURN = re.compile(
    r".*<(?:\|im_start\||start_of_turn|\|start_header_id\|)>user(?:<\|end_header_id\|>)?\n+(.*?)"
    r"<(?:\|im_end\||end_of_turn|\|eot_id\|)>\s*<[^\n]*(?:assistant|model)[^\n]*\n+",
    re.DOTALL,
)
"""The user's last message in a prompt that the templates of ChatML, Gemma or Llama wrote."""


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
        "curve": curve(episodes),
        "columns": {key: described(column) for key, column in TOKEN_COLUMNS.items()},
        "episodes": [_with_message(episode) for episode in choose(detailed, max_episodes)],
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
        all(map(_is_count, counts))
        and all(isinstance(found.get(name), str | list) for name in ("prompt", "response"))
        and isinstance(found.get("terminated"), bool)
        and _are_numbers(numbers)
        and all(is_one(found[name]) for name, is_one in OPTIONAL.items() if name in found)
        and ("tokens" not in found or _are_columns(found))
        and ("segments" not in found or _fit(found["segments"], found))
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value <= MOST


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


def _are_segments(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, dict)
        and isinstance(value.get("own"), bool)
        and isinstance(value.get("text"), str)
        and _is_count(value.get("length"))
        for value in values
    )


def _fit(segments: list[dict[str, Any]], found: dict[str, Any]) -> bool:
    """Return whether the policy's segments are cut out of just the tokens that there are."""
    own = sum(segment["length"] for segment in segments if segment["own"])
    return "tokens" not in found or own == len(found["tokens"])


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(
        value is None or (isinstance(value, int | float) and abs(value) <= MOST) for value in values
    )


OPTIONAL: dict[str, Callable[[Any], bool]] = {
    "message": lambda value: isinstance(value, str),
    "group": _is_count,
    "segments": _are_segments,
    "special": lambda value: isinstance(value, list) and all(map(_is_count, value)),
    "terms": lambda value: isinstance(value, dict) and _are_numbers(list(value.values())),
    "columns": lambda value: isinstance(value, dict),
}
"""What some lines have, and runs of earlier versions lack."""


def _with_message(episode: dict[str, Any]) -> dict[str, Any]:
    """Return an episode with the user's last message, if its prompt is a template's text."""
    prompt = episode["prompt"]
    turn = _LAST_TURN.fullmatch(prompt) if isinstance(prompt, str) else None
    return {"message": turn[1], **episode} if turn else episode


def choose(episodes: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return at most `count` episodes, evenly spread, the last one among them; groups stay
    whole, but for one that is larger than `count`."""

    def group(numbered: tuple[int, dict[str, Any]]) -> tuple[int, int, int]:
        number, episode = numbered
        known = "group" in episode
        return episode["tokens_seen"], episode.get("group", 0), -1 if known else number

    together = itertools.groupby(enumerate(episodes), group)
    groups = [[episode for _, episode in members] for _, members in together]
    largest = max(map(len, groups))
    chosen = evenly(groups, max(1, count // largest) if len(episodes) > count else len(groups))
    return [episode for members in chosen for episode in members][-count:]


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """Return at most `count` of the items, evenly spread, the last one among them."""
    if len(items) <= count:
        return list(items)
    return [items[(i + 1) * len(items) // count - 1] for i in range(count)]


def curve(episodes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what is drawn over the tokens seen: {"label": what, "points": one for each update}.

    It is the score or, where no text has one, what the reward's terms but the KL paid.
    """
    if any(episode["score"] is not None for episode in episodes):
        return {"label": "score", "points": means(episodes, lambda episode: episode["score"])}
    names = {name for episode in episodes for name in episode.get("terms", ())} - {"kl"}
    label = names.pop() if len(names) == 1 else "reward without KL"
    return {"label": label, "points": means(episodes, _earned)}


def means(
    episodes: Sequence[dict[str, Any]], number: Callable[[dict[str, Any]], float | None]
) -> list[tuple[int, float]]:
    """Return (tokens seen, mean number) of each update, over the episodes that have one."""
    found: dict[int, list[float]] = {}
    for episode in episodes:
        if (value := number(episode)) is not None:
            found.setdefault(episode["tokens_seen"], []).append(value)
    return [(tokens, sum(values) / len(values)) for tokens, values in sorted(found.items())]


def _earned(episode: Mapping[str, Any]) -> float | None:
    paid = [value for name, value in episode.get("terms", {}).items() if name != "kl"]
    return sum(paid) if paid and None not in paid else None


def described(column: TokenColumn) -> dict[str, Any]:
    """Return what the page says of a column, without its function."""
    return {name: value for name, value in column._asdict().items() if name != "of"}


def _run(run_dir: Path) -> dict[str, str]:
    path = run_dir / "config.yaml"
    if not path.is_file():
        return {}
    config = from_yaml(path.read_text(encoding="utf-8", errors="replace"), str(path))
    if not isinstance(config, dict):
        raise InvalidArgument(f"{path} holds no mapping of options.")
    options = config.get("options")
    model = options.get("model") if isinstance(options, dict) else None
    # The folder that a model is in is nobody's business who is sent the page.
    known = {**config, "model": PurePath(model).name if isinstance(model, str) else None}
    return {key: str(known[key]) for key in RUN_KEYS if known.get(key) is not None}
