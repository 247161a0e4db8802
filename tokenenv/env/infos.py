"""Gymnasium's vector info layout: every `key` beside a mask `_key` of the rows that have it, zeros
elsewhere."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenenv.env.engine import Paid, RewardEngine
from tokenenv.env.replies import Replies
from tokenenv.env.texts import TextBuffer
from tokenenv.env.transitions import Ends

Values = Tensor | np.ndarray | dict[str, Tensor]
"""Of all rows; an array is on the host, and not the env's own."""
Export = Callable[[Any], Any]
"""Makes the caller's kind of array of a tensor or of a host array."""


Entries = dict[str, tuple[Values, np.ndarray]]
"""Info values by key, each with the rows that have it, (N,) bool on the host. A dict of values
becomes a nested info with masks of its own."""


class Infos:
    """The info values of all slots."""

    def __init__(self, entries: Entries) -> None:
        self._entries = entries

    def overlay(self, other: "Infos") -> None:
        """Take `other`'s values in the rows that it has; they win over those already here."""
        for key, (values, rows) in other._entries.items():
            if key in self._entries:
                old, old_rows = self._entries[key]
                values, rows = _where(rows, values, old), rows | old_rows
            self._entries[key] = (values, rows)

    def only(self, rows: np.ndarray) -> "Infos":
        """Return copies of the values in `rows` alone."""
        return Infos(
            {
                key: (_copy(values), has & rows)
                for key, (values, has) in self._entries.items()
                if (has & rows).any()
            }
        )

    def to_dict(self, export: Export) -> dict[str, Any]:
        """Return the layout that Gymnasium's own vectorisation builds. As there, a key that no row
        has is absent."""
        out: dict[str, Any] = {}
        for key, (values, rows) in self._entries.items():
            everywhere = rows.all()
            if not everywhere and not rows.any():
                continue
            named = values if isinstance(values, dict) else {key: values}
            found: dict[str, Any] = {}
            for name, value in named.items():
                shown = value if everywhere else _where(rows, value, _zeros(value))
                found[name], found[f"_{name}"] = export(shown), export(rows.copy())
            if isinstance(values, dict):
                out[key], out[f"_{key}"] = found, export(rows.copy())
            else:
                out |= found
        return out


def step_infos(
    engine: RewardEngine,
    paid: Paid,
    ends: Ends,
    active: np.ndarray,
    prompt_id: np.ndarray,
    kl_coef: np.ndarray,
) -> Infos:
    """Return the infos of a step, which `docs/contract.md` lists; `prompt_id` and `kl_coef` (N,)
    are those of the texts, as copies."""
    entries: Entries = {
        "reward_terms": (paid.terms, active),
        "ref_logprob": (paid.ref_logprob, active),
        "kl_coef": (kl_coef, active),
        "prompt_id": (prompt_id, active),
    }
    if paid.watched:
        entries["watched"] = paid.watched, active
    if paid.potential is not None:
        entries["potential"] = paid.potential, active
    if paid.finished is None:
        return Infos(entries)
    ended, watched = ends.ended, engine.rewards.watched
    if paid.score is not None:
        entries["score"] = paid.score, ended
    gold = _gold(engine, paid, ended)
    if gold is not None:
        entries["gold"] = gold, ended
    # The engine gives copies: the slots that end may begin anew before these are read.
    rewards, numbers = engine.token_numbers()
    entries["token_rewards"] = rewards, ended
    terms = {name: values for name, values in numbers.items() if name not in watched}
    entries["token_reward_terms"] = terms, ended
    if watched:
        entries["token_watched"] = (
            {name: numbers[name] for name in numbers if name in watched},
            ended,
        )
    entries["cut"] = ends.truncated, ended
    version = engine.rewards.model_version
    if version is not None:
        entries["reward_version"] = np.full(len(ended), version, dtype=np.int64), ended
    return Infos(entries)


def reply_infos(
    replies: Replies, texts: TextBuffer, active: np.ndarray, ended: np.ndarray
) -> Infos:
    """Return what a step tells beside where the environment writes into texts: the task's rewards
    of turns, and whose tokens those of the texts that ended are."""
    entries: Entries = {"turn_reward": (replies.reward, active)}
    if ended.any():
        entries["own_mask"] = texts.own_mask, ended
    return Infos(entries)


def _gold(engine: RewardEngine, paid: Paid, ended: np.ndarray) -> Tensor | np.ndarray | None:
    """The task's true metric (N,) of the texts that ended, or None where it has none."""
    if engine.gold is None:
        is_score = engine.context.task.gold == "score"
        return paid.score.clone() if is_score and paid.score is not None else None
    assert paid.finished is not None
    gold = np.zeros(len(ended), dtype=np.float32)
    gold[ended] = engine.gold.numbers(paid.finished, torch.device("cpu")).numpy()
    return gold


def _copy(values: Values) -> Values:
    if isinstance(values, dict):
        return {name: value.clone() for name, value in values.items()}
    return values.clone() if isinstance(values, Tensor) else values.copy()


def _where(rows: np.ndarray, chosen: Any, other: Any) -> Any:
    """Return `chosen` in the slots of `rows` (N,) bool and `other` elsewhere."""
    rows = rows.reshape(-1, *[1] * (chosen.ndim - 1))
    if isinstance(chosen, Tensor):
        return torch.where(
            torch.from_numpy(rows).to(chosen.device, non_blocking=True), chosen, other
        )
    return np.where(rows, chosen, other)


def _zeros(values: Any) -> Any:
    return torch.zeros_like(values) if isinstance(values, Tensor) else np.zeros_like(values)
