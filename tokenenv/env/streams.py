"""The prompt that a text begins with. It is a function of a seed and of how many texts began
before, so there is no generator that could fall out of step."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenenv.env.texts import mix
from tokenenv.prompts import draw, stream_start
from tokenenv.types import Slots


class PromptStreams:
    """The prompts of N slots, in groups of `group_size` consecutive ones that share each prompt.

    A group hands its texts out in the order in which they begin, by time and then by slot: the m-th
    text (from 0) has the group's prompt number m // group_size. So a slot that becomes free takes
    what is missing of the oldest prompt.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], num_slots: int, group_size: int) -> None:
        self.prompts, self.group_size = prompts, group_size
        self.seeds = [0] * (num_slots // group_size)
        """The seed of each group."""
        self.begun = np.zeros(num_slots // group_size, dtype=np.int64)
        """The number of texts that have begun in each group."""
        self._starts = np.zeros(num_slots // group_size, dtype=np.uint64)
        """Where the stream of each group's seed starts; nobody reads it of a single prompt."""

    def reseed(self, seeds: Sequence[int | None], mask: np.ndarray) -> None:
        """Start each group of `mask` (N,) anew with the seed of its first slot, unless that seed is
        None. The mask must split no group (see `split_groups`)."""
        for slot in range(0, len(mask), self.group_size):
            seed = seeds[slot]
            if mask[slot] and seed is not None:
                self._set(slot // self.group_size, seed, 0)

    def _set(self, group: int, seed: int, begun: int) -> None:
        self.seeds[group], self.begun[group] = seed, begun
        if len(self.prompts) > 1:
            self._starts[group] = stream_start(seed)

    def split_groups(self, mask: np.ndarray) -> bool:
        """Return whether `mask` (N,) holds a part of a group."""
        groups = mask.reshape(-1, self.group_size)
        return bool((groups.any(1) & ~groups.all(1)).any())

    def round_up(self) -> None:
        """Go on with a new prompt in every group, also where some of its slots have not had the
        last one."""
        self.begun = -(-self.begun // self.group_size) * self.group_size

    def draw(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices (n,) of the prompts of the texts that begin in `slots` (n,), in
        ascending order, and how many texts (n,) have begun in its group before each."""
        groups, size = slots // self.group_size, self.group_size
        # Slots of one group are neighbours: those that begin now are counted from its first one.
        number = self.begun[groups] + np.arange(len(slots)) - np.searchsorted(groups, groups)
        self.begun += np.bincount(groups, minlength=len(self.begun))
        return draw(len(self.prompts), self._starts[groups], number // size), number

    def text_seeds(self, slots: np.ndarray, numbers: np.ndarray) -> list[int]:
        """Return a number of its own for each of the texts that begin in `slots` (n,), which have
        the `numbers` (n,) that `draw` gave them, from which all that the environment writes into it
        is drawn."""
        groups = (slots // self.group_size).tolist()
        both = zip(groups, numbers.tolist(), strict=True)
        return [mix(self.seeds[group], number) for group, number in both]

    def save(self, slots: Slots) -> dict[str, Any]:
        """Return what `load` needs of the groups of `slots`."""
        groups = [int(slot) // self.group_size for slot in slots]
        numbers = {
            "seeds": [self.seeds[group] for group in groups],
            "begun": self.begun[groups].tolist(),
        }
        return {"group_size": self.group_size, **numbers}

    def load(self, slots: np.ndarray, saved: dict[str, Any]) -> None:
        """Take up the streams of the groups that are whole in `slots`. A group that is not whole
        keeps its stream, since its other slots go on with it."""
        for slot, seed, begun in zip(slots, saved["seeds"], saved["begun"], strict=True):
            group = int(slot) // self.group_size
            if np.isin(
                np.arange(group * self.group_size, (group + 1) * self.group_size), slots
            ).all():
                self._set(group, int(seed), int(begun))
