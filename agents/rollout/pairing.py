"""Groups of texts that share a prompt, and the texts that wait for the rest of their group.

An env with `group_size=G` hands its prompts out like this: of the texts that begin in a group of G
consecutive slots, ordered by time and then by slot, the first G share a prompt, then the next G,
and so on. A slot that becomes free therefore writes what is missing of the oldest prompt, and texts
wait for each other no longer than it takes to write one text. Suffixes: N slots.
"""

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from tokenenv.agents.episodes import Episode, EpisodeBatch
from tokenenv.errors import ContractError


class Pairing:
    """Numbers the texts of N slots as they begin, and holds those that have ended.

    Texts `G * k` to `G * k + G - 1` share a prompt and are group k, where G is `group_size`.
    """

    def __init__(self, num_slots: int, group_size: int) -> None:
        self.group_size = group_size
        self.number = np.zeros(num_slots, np.int64)
        """(N,) the number of each slot's text."""
        self.waiting: dict[int, Episode] = {}
        """Ended texts of groups that are not complete, by number."""
        self.ready: list[Episode] = []
        """Whole groups, one after the other, for whoever takes them out."""
        self._begun = np.zeros(-(-num_slots // group_size), np.int64)
        """Texts that have begun in each group of slots since all began anew."""

    def restart(self) -> None:
        """Forget all texts, and begin one in every slot."""
        self.waiting, self.ready = {}, []
        self._begun[:] = 0
        self.begin(np.arange(len(self.number)))

    def begin(self, slots: np.ndarray) -> None:
        """Number the texts that begin in `slots` (n,), which are in order."""
        group = slots // self.group_size
        # Of texts that begin in one group of slots at once, the first has the group's count, the
        # next one more: `searchsorted` finds where the group's own slots begin.
        count = self._begun[group] + np.arange(len(slots)) - np.searchsorted(group, group)
        self._begun += np.bincount(group, minlength=len(self._begun))
        prompt, member = np.divmod(count, self.group_size)
        self.number[slots] = (prompt * len(self._begun) + group) * self.group_size + member

    def take(self, ended: dict[int, Episode]) -> set[int]:
        """Take in texts that ended, by number; return the groups that they completed.

        Raises:
            ContractError: the texts of a group began with different prompts.
        """
        size, waiting = self.group_size, self.waiting | ended
        complete = whole_groups(waiting, size)
        ready = [waiting.pop(number) for number in complete]
        for first in range(0, len(ready), size):
            check_prompts(ready[first : first + size])
        # In one statement, after the checks: an interruption loses no text, and repeats none.
        self.waiting, self.ready = waiting, self.ready + ready
        return {number // size for number in complete}

    def forget_values(self) -> None:
        """Forget the critic's values in all texts that have ended."""
        self.waiting = {number: without_values(text) for number, text in self.waiting.items()}
        self.ready = [without_values(text) for text in self.ready]

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a checkpoint needs."""
        texts = {"waiting": list(self.waiting.values()), "ready": self.ready}
        stacked = {
            name: asdict(EpisodeBatch.stack(some)) if some else None for name, some in texts.items()
        }
        return {
            "number": self.number.copy(),
            "begun": self._begun.copy(),
            "numbers": list(self.waiting),
            **stacked,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        state = copy.deepcopy(dict(state))
        waiting, self.ready = (
            EpisodeBatch(**state[k]).unstack() if state[k] else [] for k in ("waiting", "ready")
        )
        self.waiting = dict(zip(state["numbers"], waiting, strict=True))
        self.number, self._begun = state["number"], state["begun"]


def without_values(text: Episode) -> Episode:
    """Return the text as it is, with values that are not known."""
    return replace(text, drawn_value=np.full_like(text.drawn_value, np.nan))


def whole_groups(numbers: Iterable[int], size: int) -> list[int]:
    """Return those of `numbers` whose group is complete, in order."""
    found = sorted(numbers)
    counts = Counter(number // size for number in found)
    return [number for number in found if counts[number // size] == size]


def check_prompts(group: Sequence[Episode]) -> None:
    """Raise `ContractError` unless the texts of a group have the same prompt."""
    first = group[0].prompt.tolist()
    for episode in group:
        if episode.prompt.tolist() != first:
            raise ContractError(
                f"group_size={len(group)} says that the texts of slots {[e.slot for e in group]} "
                f"share a prompt, but one began with the tokens {first} and one with "
                f"{episode.prompt.tolist()}: of the texts that begin in a group of slots, by time "
                f"and then by slot, each {len(group)} in a row must have the same prompt."
            )
