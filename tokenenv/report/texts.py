"""Texts as heat maps: under each token its reward, its advantage and the exact advantage."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tokenenv.report.figure import Line
from tokenenv.report.reading import Found, number
from tokenenv.report.words import html, plain, short
from tokenenv.safety.shown import visible

REWARD = "reward"
COLUMNS = {"token_advantages": "advantage", "token_exact": "exact"}
"""What is shown of a token beside its reward, and what it is called."""
MOST_TOKENS, MOST_OF_ALL = 128, 2400
"""Tokens of a text, and of all texts on the page: more would make it a long one."""


class Shown(NamedTuple):
    """A text on the page."""

    task: str
    row: str
    seed: int
    text: Mapping[str, Any]
    """As `credit.shown` of the bench keeps it."""


def chosen(found: Found) -> list[Shown]:
    """Return a text of the last update of the first seed of each row, in each environment; where
    there are too many for a page, those that come first."""
    texts: dict[tuple[str, str], Shown] = {}
    tokens = 0
    for line, record in found.cells():
        known = [text for text in _list(record, "texts") if _is_text(text)]
        last = max((number(text.get("update")) or 0 for text in known), default=0)
        ended = [text for text in known if (number(text.get("update")) or 0) == last]
        place = line["task"], line["row"]
        if ended and place not in texts and tokens < MOST_OF_ALL:
            texts[place] = Shown(*place, line["seed"], ended[0])
            tokens += min(MOST_TOKENS, len(ended[0]["tokens"]))
    return list(texts.values())


def _list(record: Mapping[str, Any] | None, name: str) -> list[Any]:
    found = (record or {}).get(name)
    return found if isinstance(found, list) else []


def _is_text(text: Any) -> bool:
    tokens = text.get("tokens") if isinstance(text, dict) else None
    return isinstance(tokens, list) and bool(tokens) and _columns(text) != {}


def _columns(text: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """Return the numbers of a text's tokens by what they are called, of those that are known."""
    found = {REWARD: _rewards(text)} | {name: text.get(key) for key, name in COLUMNS.items()}
    return {
        name: [number(value) for value in values]
        for name, values in found.items()
        if isinstance(values, list) and len(values) == len(text["tokens"])
    }


def _rewards(text: Mapping[str, Any]) -> Any:
    """Return what each token was paid: without the KL, where the terms are known."""
    terms = text.get("token_terms")
    paid = [row for name, row in terms.items() if name != "kl"] if isinstance(terms, dict) else []
    count = len(text["tokens"])
    if not paid or not all(isinstance(row, list) and len(row) == count for row in paid):
        return text.get("token_rewards")
    return [sum(number(value) or 0.0 for value in values) for values in zip(*paid, strict=True)]


def heat_maps(texts: Sequence[Shown]) -> str:
    """Return the texts as HTML, those of an environment together."""
    parts = []
    for task in dict.fromkeys(one.task for one in texts):
        parts.append(f"<h3>{html(task)}</h3>")
        parts += [_heat_map(one) for one in texts if one.task == task]
    return "\n".join(parts)


def _heat_map(shown: Shown) -> str:
    columns = _columns(shown.text)
    scales = {name: _scale(values) for name, values in columns.items()}
    tokens = shown.text["tokens"][:MOST_TOKENS]
    names = "".join(f"<i>{name}</i>" for name in columns)
    boxes = [f'<span class="names"><b>token</b>{names}</span>']
    for place, token in enumerate(tokens):
        numbers = {name: values[place] for name, values in columns.items()}
        cells = "".join(_cell(value, scales[name]) for name, value in numbers.items())
        boxes.append(f"<span><b>{_token(token)}</b>{cells}</span>")
    left = len(shown.text["tokens"]) - len(tokens)
    more = f", the first {MOST_TOKENS} of {len(shown.text['tokens'])} tokens" if left else ""
    facts = [
        f"{name} {value:.3g}"
        for name in ("score", "gold", "kl")
        if (value := _known(shown, name)) is not None
    ]
    about = html(f"seed {shown.seed}, after {_known(shown, 'tokens_seen') or 0:,} tokens{more}")
    prompt = shown.text.get("prompt")
    asked = f'<p class="prompt">{html(short(prompt, 200))}</p>' if _is_words(prompt) else ""
    said = f"<b>{html(shown.row)}</b> <span>{about}</span> <span>{html(', '.join(facts))}</span>"
    return (
        f'<figure class="text"><figcaption>{said}</figcaption>{asked}'
        f"<div>{''.join(boxes)}</div></figure>"
    )


def _is_words(prompt: Any) -> bool:
    """Return whether a prompt says something: it is a list of ids where there is no tokenizer, and
    may be a special token alone."""
    return isinstance(prompt, str) and not re.fullmatch(r"\s*(<[^<>\s]*>\s*)*", prompt)


def _known(shown: Shown, name: str) -> Any:
    value = number(shown.text.get(name))
    return int(value) if name == "tokens_seen" and value is not None else value


def _scale(values: Sequence[float | None]) -> float:
    """Return the number that has the full colour."""
    return max((abs(value) for value in values if value), default=1.0)


def _cell(value: float | None, scale: float) -> str:
    if value is None:
        return "<i>?</i>"
    side, strength = "up" if value > 0 else "down", 0.9 * min(1.0, abs(value) / scale)
    return f'<i style="background:rgba(var(--{side}),{strength:.2f})">{_brief(value)}</i>'


def _brief(value: float) -> str:
    """Return a number in at most five characters, with the sign."""
    if abs(value) < 0.005:
        return "0"
    text = f"{abs(value):.2f}" if abs(value) < 10 else f"{abs(value):.3g}"
    return ("+" if value > 0 else "-") + text


def _token(token: Any) -> str:
    """Return a token as HTML: spaces and line ends are seen."""
    text = visible(str(token)).replace("\n", "↵").replace("\t", "⇥").replace("\r", "↵")
    stripped = text.strip(" ")
    if not stripped:
        return html("␣" * max(1, len(text)))
    return html(stripped)


def lines(texts: Sequence[Shown]) -> list[Line]:
    """Return a line for each token."""
    return [
        {
            "task": one.task,
            "row": one.row,
            "seed": one.seed,
            "text": number_of,
            "position": place + 1,
            "token": plain(token),
            **{name: values[place] for name, values in _columns(one.text).items()},
        }
        for number_of, one in enumerate(texts)
        for place, token in enumerate(one.text["tokens"])
    ]
