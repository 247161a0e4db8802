"""Episodes as files for another trainer, a line of JSON or an Arrow row each, and as padded
tensors.

The KL term is left out of the rewards, because every trainer has a KL penalty of its own; log
pi_ref and beta are in columns beside them. A response holds all that came after the prompt, whoever
wrote it, and `own` says which of it is the policy's.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenenv.agents.episodes import Episode, token_mask
from tokenenv.errors import InvalidArgument, missing
from tokenenv.models.encoding import decode_pairs

COLUMNS = {
    "prompt_ids": "list<int64>",
    "response_ids": "list<int64>",
    "own": "list<bool>",
    "token_rewards": "list<float32>",
    "logprobs": "list<float32>",
    "ref_logprobs": "list<float32>",
    "terms": "map<string, list<float32>>",
    "watched": "map<string, list<float32>>",
    "kl_coef": "float32",
    "score": "float32",
    "gold": "float32",
    "terminated": "bool",
    "prompt_id": "int64",
    "version": "int64",
    "prompt": "string",
    "response": "string",
}
"""The columns of a file and their Arrow types; docs/export.md explains each."""
MAPS = [name for name, kind in COLUMNS.items() if kind.startswith("map")]
NEWER = {"watched", "own"}
"""Columns that files of earlier versions do not have. They watched nothing, and wrote down what the
policy alone had written."""
SUFFIXES = (".jsonl", ".arrow")

Row = dict[str, Any]


def write_episodes(
    path: str | os.PathLike[str], episodes: Iterable[Episode], tokenizer: Any = None
) -> None:
    """Write `.jsonl` or `.arrow`, by the name; the file appears whole or not at all.

    With a `tokenizer` the texts are there too. Raises `InvalidArgument` for another suffix,
    `MissingDependency` for Arrow without pyarrow.
    """
    path = Path(path)
    _check_suffix(path)
    rows = [episode_row(episode, tokenizer) for episode in episodes]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    if path.suffix == ".jsonl":
        temporary.write_text(
            "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), encoding="utf-8"
        )
    else:
        _write_arrow(temporary, rows)
    os.replace(temporary, path)


def read_episodes(path: str | os.PathLike[str]) -> list[Row]:
    """Return the rows that `write_episodes` wrote, as dicts of `COLUMNS`."""
    path = Path(path)
    _check_suffix(path)
    if not path.is_file():
        raise InvalidArgument(f"path={str(path)!r} is not a file; write_episodes makes one.")
    try:
        rows = _read_arrow(path) if path.suffix == ".arrow" else _read_lines(path)
        return [_complete(row) for row in rows]
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise InvalidArgument(
            f"path={str(path)!r} does not hold what write_episodes writes: {str(error)[:200]}."
        ) from error


def _complete(row: Row) -> Row:
    row = {"watched": {}, "own": [True] * len(row["response_ids"])} | row
    return {name: row[name] for name in COLUMNS} | row


def _read_arrow(path: Path) -> list[Row]:
    with _pyarrow().memory_map(str(path)) as source:
        rows = _pyarrow().ipc.open_file(source).read_all().to_pylist()
    return [row | {name: dict(row[name]) for name in MAPS if name in row} for row in rows]


def _read_lines(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        rows += [json.loads(line)] if line else []
        if line and not (isinstance(rows[-1], dict) and set(COLUMNS) - NEWER <= set(rows[-1])):
            raise ValueError(f"line {number} is no episode")
    return rows


def episode_row(episode: Episode, tokenizer: Any = None) -> Row:
    """Return one episode as plain values; what is not known is None."""
    terms = {name: values for name, values in episode.terms.items() if name != "kl"}
    rewards = np.sum(list(terms.values()), axis=0) if terms else episode.reward
    texts: tuple[str | None, str | None] = (None, None)
    if tokenizer is not None:
        pair = episode.prompt.tolist(), episode.after_prompt.tolist()
        texts = decode_pairs([pair], tokenizer)[0]
    own = episode.own

    def spread(values: np.ndarray, fill: float = 0.0) -> list[float]:
        """The values of the policy's tokens, with `fill` at tokens that others wrote."""
        filled = np.full(len(own), fill, values.dtype)
        filled[own] = values
        return filled.tolist()

    return {
        "prompt_ids": episode.prompt.tolist(),
        "response_ids": episode.after_prompt.tolist(),
        "own": own.tolist(),
        "token_rewards": spread(rewards),
        "logprobs": spread(episode.logprob),
        "ref_logprobs": spread(episode.ref_logprob),
        "terms": {name: spread(values) for name, values in terms.items()},
        "watched": {
            name: [value if np.isfinite(value) else None for value in spread(values, np.nan)]
            for name, values in episode.watched.items()
        },
        "kl_coef": episode.kl_coef,
        "score": _known(episode.score),
        "gold": _known(episode.gold),
        "terminated": episode.terminated,
        "prompt_id": episode.prompt_id,
        "version": episode.version,
        "prompt": texts[0],
        "response": texts[1],
    }


def padded(rows: Sequence[Mapping[str, Any]], pad_token_id: int = 0) -> dict[str, Tensor]:
    """Return B rows as tensors, as trainers hold them: prompts (B, P) padded on the left, and
    responses (B, T) on the right.

    Returns:
        `prompt_ids`, `response_ids` int64; bool: `prompt_mask` and `text_mask` where there is a
        token of the prompt and of the response, and `response_mask` (B, T) where the policy wrote
        it, which alone is learned from; `token_rewards`, `logprobs`, `ref_logprobs` float32, zero
        everywhere else.
    """
    lengths = torch.tensor([len(row["response_ids"]) for row in rows])
    prompts = [torch.tensor(row["prompt_ids"][::-1]) for row in rows]
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
    out = {
        "prompt_ids": _pad(prompts, pad_token_id).flip(1),
        "prompt_mask": token_mask(prompt_lengths, int(prompt_lengths.max())).flip(1),
        "response_ids": _pad([torch.tensor(row["response_ids"]) for row in rows], pad_token_id),
        "text_mask": token_mask(lengths, int(lengths.max())),
        "response_mask": _pad([torch.tensor(row["own"]) for row in rows], False),
    }
    for name in ("token_rewards", "logprobs", "ref_logprobs"):
        out[name] = _pad([torch.tensor(row[name], dtype=torch.float32) for row in rows], 0.0)
    return out


def token_advantages(rows: Sequence[Mapping[str, Any]], with_kl: bool = True) -> list[list[float]]:
    """Return an advantage for each response token of B rows, T numbers a row: what is earned from
    the token on, minus the mean of that over all tokens of the policy's; 0 at others' tokens.

    `with_kl` adds the env's k1 penalty, for trainers that take advantages as they are and have no
    penalty of their own.
    """
    t = padded(rows)
    rewards_BT, own_BT = t["token_rewards"], t["response_mask"]
    if with_kl:
        coef_B1 = torch.tensor([[row["kl_coef"]] for row in rows])
        rewards_BT = rewards_BT - coef_B1 * (t["logprobs"] - t["ref_logprobs"]) * own_BT
    returns_BT = rewards_BT.flip(1).cumsum(1).flip(1)
    advantages_BT = (returns_BT - returns_BT[own_BT].mean()) * own_BT
    pairs = zip(advantages_BT.tolist(), rows, strict=True)
    return [values[: len(row["own"])] for values, row in pairs]


def _pad(rows: list[Tensor], value: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value


def _check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise InvalidArgument(
            f"path={str(path)!r} ends in {path.suffix!r}; allowed: {', '.join(SUFFIXES)}."
        )


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise missing("an .arrow file", "pyarrow") from error
    return pyarrow


def _write_arrow(path: Path, rows: list[Row]) -> None:
    pa = _pyarrow()
    types = {
        "list<int64>": pa.list_(pa.int64()),
        "list<float32>": pa.list_(pa.float32()),
        "list<bool>": pa.list_(pa.bool_()),
        "map<string, list<float32>>": pa.map_(pa.string(), pa.list_(pa.float32())),
        "float32": pa.float32(),
        "int64": pa.int64(),
        "bool": pa.bool_(),
        "string": pa.string(),
    }
    schema = pa.schema([(name, types[kind]) for name, kind in COLUMNS.items()])
    table = pa.Table.from_pylist(
        [row | {name: list(row[name].items()) for name in MAPS} for row in rows], schema
    )
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(table)
