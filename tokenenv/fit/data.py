"""Data of people's own as examples: files, folders, lists and datasets, read row by row.

docs/fit.md lists the columns. What cannot be used is an error that names the row's place; what is
of no use to its objective is left out, counted, and reported (`Skipped`).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np

from tokenenv.errors import InvalidArgument, check_choice
from tokenenv.fit.cells import Row
from tokenenv.fit.columns import KINDS, read_row
from tokenenv.fit.encode import Encoder
from tokenenv.fit.examples import Example, Kind, Skipped, Text
from tokenenv.fit.runs import EPISODES, NO_SCORE, episode_columns
from tokenenv.tables import read_values

DATA, TOKENIZER = "data.jsonl", "tokenizer"
"""What `tokenenv sample` writes into a folder."""
AS_TEXT = ("prompt", "chosen", "rejected", "response", "completion")
"""Columns of .csv and .tsv files that are texts; the others are read as JSON where they can be."""


def read_examples(
    source: Any,
    kind: Kind,
    tokenizer: Any = None,
    *,
    vocab_size: int,
    max_length: int | None = None,
    chat_template: bool = False,
    skipped: Skipped,
) -> list[Example]:
    """Return the examples of data. Of all rows only their token ids and numbers are kept.

    Args:
        source: the path of a .jsonl, .json, .csv, .tsv or .parquet file; a folder that `tokenenv
            sample` or `tokenenv train` wrote; a list of mappings; a `datasets` dataset, streamed or
            not.
        kind: what the data says of its texts. A "ranking" is one example, the best text first; in
            all other kinds an example is one text.
        tokenizer: for texts; None where the data holds token ids alone.
        vocab_size: ids are 0 to `vocab_size` - 1.
        max_length: the most tokens of a prompt and a response; longer texts are skipped.
        chat_template: whether prompts and messages are written by the tokenizer's chat template.
        skipped: takes what is left out.

    Raises:
        InvalidArgument: the source cannot be read, holds nothing to learn from, or a row cannot be
            used; names the file's line.
        MissingDependency: a .parquet file without pyarrow.
    """
    check_choice("kind", kind, KINDS)
    encoder = Encoder(tokenizer, vocab_size, chat_template)
    found: list[Example] = []
    alone: list[Example] = []
    for row in _rows(source, encoder):
        if kind in ("ranking", "scores") and row.values.get("score") is NO_SCORE:
            skipped.add("the episode has no score", row.where)
            continue
        example = read_row(row, kind, encoder)
        if kind != "ranking":
            found += _single(example, max_length, skipped)
        elif len(example.texts) == 1 and example.scores:
            alone.append(example)
        else:
            found += _ranked([example], max_length, skipped)
    for members in _by_prompt(alone):
        found += _ranked(members, max_length, skipped)
    if not found:
        reasons = "; ".join(skipped.lines()) or "it holds no rows"
        raise InvalidArgument(f"data={_name(source)} has nothing to learn from: {reasons}.")
    return found


def require_contrast(examples: Sequence[Example], kind: Kind) -> None:
    """Raise `InvalidArgument` where nothing can be learnt, because all scores, or all labels or
    values, are the same number."""
    if kind == "scores":
        known = np.array([score for example in examples for score in example.scores or ()])
    elif kind in ("labels", "values"):
        targets = [t.target for e in examples for t in e.texts if t.target is not None]
        every = np.concatenate([*targets, np.zeros(0)])
        known = every[~np.isnan(every)]
    else:
        return
    if len(known) == 0 or known.min() == known.max():
        what = f"are {known[0]:g}" if len(known) else "are missing"
        raise InvalidArgument(
            f"data= cannot teach anything: all {kind} of its {len(examples)} examples {what}; at "
            "least two different ones are needed."
        )


def saved_tokenizer(source: Any) -> Path | None:
    """Return the tokenizer's folder in a folder that `tokenenv sample` wrote; None where there is
    none."""
    folder = Path(source) / TOKENIZER if isinstance(source, str | Path) else None
    return folder if folder is not None and folder.is_dir() else None


# ---------------------------------------------------------------- rows


def _rows(source: Any, encoder: Encoder) -> Iterator[Row]:
    path = _file(Path(source)) if isinstance(source, str | Path) else None
    for where, value in read_values(path or source, "data"):
        if not isinstance(value, Mapping):
            raise InvalidArgument(
                f"{where} is {short(value)}; a row must map names of columns to values."
            )
        if path and path.suffix.lower() in (".csv", ".tsv"):
            value = {name: _cell(name, text) for name, text in value.items()}
        if path and path.name == EPISODES:
            value = episode_columns(value, encoder, where)
        yield Row(where, value)


def _file(path: Path) -> Path:
    """The file of data in a folder; `path` itself where it is no folder."""
    if not path.is_dir():
        return path
    for name in (DATA, EPISODES):
        if (path / name).is_file():
            return path / name
    raise InvalidArgument(
        f"data={str(path)!r} is a folder without {DATA} (which `tokenenv sample` writes) and "
        f"without {EPISODES} (which `tokenenv train` writes)."
    )


def _cell(name: str, text: str) -> Any:
    """A value of a .csv or .tsv file, where all values are texts."""
    if name in AS_TEXT:
        return text
    try:
        return json.loads(text.lower() if text in ("True", "False") else text) if text else None
    except (ValueError, RecursionError):
        return text


def _name(source: Any) -> str:
    return repr(str(source)) if isinstance(source, str | Path) else f"<{type(source).__name__}>"


# ---------------------------------------------------------------- examples


def _single(example: Example, max_length: int | None, skipped: Skipped) -> list[Example]:
    """An example of each text that is not too long."""
    scores = example.scores or (None,) * len(example.texts)
    return [
        Example((text,), None if score is None else (score,), example.where)
        for text, score in zip(example.texts, scores, strict=True)
        if not _is_long(text, max_length, skipped, example.where)
    ]


def _ranked(members: list[Example], max_length: int | None, skipped: Skipped) -> list[Example]:
    """The ranking that examples of one prompt make together, without texts that cannot be ranked;
    none where fewer than two remain."""
    ranking = _merged(members)
    pair = len(ranking.texts) == 2 and ranking.scores is None
    same = "chosen and rejected are identical" if pair else "a ranking holds the text twice"
    texts, scores, kept = set(), set(), []
    for i, text in enumerate(ranking.texts):
        ids, score = text.response.tobytes(), ranking.scores[i] if ranking.scores else i
        if ids in texts:
            skipped.add(same, ranking.where)
        elif score in scores:
            skipped.add("a text's score ties with another's in its ranking", ranking.where)
        elif not _is_long(text, max_length, skipped, ranking.where):
            texts.add(ids)
            scores.add(score)
            kept.append(i)
    if len(ranking.texts) == 1:
        skipped.add("a prompt has one text alone", ranking.where)
    if len(kept) < 2:
        return []
    best = None if ranking.scores is None else tuple(ranking.scores[i] for i in kept)
    return [Example(tuple(ranking.texts[i] for i in kept), best, ranking.where)]


def _is_long(text: Text, max_length: int | None, skipped: Skipped, where: str) -> bool:
    if max_length is None or len(text) <= max_length:
        return False
    skipped.add(f"the text has more than {max_length} tokens", where)
    return True


def _by_prompt(examples: Sequence[Example]) -> list[list[Example]]:
    found: dict[bytes, list[Example]] = {}
    for example in examples:
        found.setdefault(example.texts[0].prompt.tobytes(), []).append(example)
    return list(found.values())


def _merged(members: Sequence[Example]) -> Example:
    """One example of all texts; where they have scores, the highest first."""
    texts = [text for example in members for text in example.texts]
    if any(example.scores is None for example in members):
        return Example(tuple(texts), None, members[0].where)
    scores = [score for example in members for score in example.scores or ()]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    ranked = tuple(scores[i] for i in order)
    return Example(tuple(texts[i] for i in order), ranked, members[0].where)
