"""Which of the texts that slots write one after the other share a prompt, and the texts that wait
for the rest of theirs.

Of the texts that begin in a group of G consecutive slots, by time and then by slot, each G in a row
share a prompt: an env with `group_size=G` hands its prompts out so. A slot that becomes free writes
what is missing of the oldest prompt, and texts wait for each other no longer than it takes to write
one. Suffixes: N slots.
"""

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from tokenenv.agents.episodes import Episode, EpisodeBatch
from tokenenv.errors import ContractError


class Pairing:
    """Numbers the texts of N slots as they begin: `group_size` numbers in a row, from a multiple of
    it on, share a prompt."""

    def __init__(self, num_slots: int, group_size: int) -> None:
        self.group_size = group_size
        self.number = np.zeros(num_slots, np.int64)
        """(N,) of each slot's text."""
        self.waiting: dict[int, Episode] = {}
        """Ended texts of groups that are not complete, by number."""
        self.ready: list[Episode] = []
        """Whole groups, one after the other, for whoever takes them out."""
        self._begun = np.zeros(-(-num_slots // group_size), np.int64)
        """Texts that have begun in each group of slots since all began anew."""

    def restart(self) -> None:
        """All slots begin anew; what there was is forgotten."""
        self.waiting, self.ready = {}, []
        self._begun[:] = 0
        self.begin(np.arange(len(self.number)))

    def begin(self, slots: np.ndarray) -> None:
        """Numbers the texts that begin in `slots` (n,), which are in order."""
        group = slots // self.group_size
        count = self._begun[group] + np.arange(len(slots)) - np.searchsorted(group, group)
        self._begun += np.bincount(group, minlength=len(self._begun))
        prompt, member = np.divmod(count, self.group_size)
        self.number[slots] = (prompt * len(self._begun) + group) * self.group_size + member

    def take(self, ended: dict[int, Episode]) -> set[int]:
        """Takes in texts that ended, by number; returns the groups that they completed.

        Raises:
            ContractError: the texts of a group began with different prompts.
        """
        size, waiting = self.group_size, self.waiting | ended
        complete = whole_groups(waiting, size)
        ready = [waiting.pop(number) for number in complete]
        for first in range(0, len(ready), size):
            check_prompts(ready[first : first + size])
        self.waiting, self.ready = waiting, self.ready + ready
        return {number // size for number in complete}

    def state_dict(self) -> dict[str, Any]:
        """Everything a checkpoint needs."""
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
        """Continues from `state_dict()`."""
        state = copy.deepcopy(dict(state))
        waiting, self.ready = (
            EpisodeBatch(**state[k]).unstack() if state[k] else [] for k in ("waiting", "ready")
        )
        self.waiting = dict(zip(state["numbers"], waiting, strict=True))
        self.number, self._begun = state["number"], state["begun"]


def whole_groups(numbers: Iterable[int], size: int) -> list[int]:
    """Those of `numbers` whose group is complete, in order."""
    found = sorted(numbers)
    counts = Counter(number // size for number in found)
    return [number for number in found if counts[number // size] == size]


def check_prompts(group: Sequence[Episode]) -> None:
    """Raises `ContractError` unless the texts of a group have the same prompt."""
    first = group[0].prompt.tolist()
    for episode in group:
        if episode.prompt.tolist() != first:
            raise ContractError(
                f"group_size={len(group)} says that the texts of slots {[e.slot for e in group]} "
                f"share a prompt, but one began "
                f"with the tokens {first} and one with {episode.prompt.tolist()}: of the texts "
                f"that begin in a group of slots, "
                f"by time and then by slot, each {len(group)} in a row must have the same prompt."
            )
