"""Whole texts by the policy itself, many side by side, each in a slot of one cache.

Nothing is stepped here: no env, no reference and no reward model reads along. Suffixes: N slots, T
response tokens, H hidden size, V vocabulary.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tokenenv.agents.rollout.actor import Policy, device_of, invert, read_values, to_host
from tokenenv.errors import InvalidArgument, check_choice
from tokenenv.models.batching import upload
from tokenenv.models.same_texts import first_equals, prefill_once
from tokenenv.types import SlotModel, TokenSpec, Written

FREE_SHARE = 8
"""New texts are begun when one slot in so many is free. A prefill takes about as long as a step of
all slots, so one for each text that ends would double the work of short texts."""


class Asked(NamedTuple):
    """A text that was asked for."""

    key: int
    prompt: list[int]
    max_tokens: int
    seed: int


class EpisodeEngine:
    """Writes the policy's texts in this process, in slots that are filled again as texts end: a
    `RolloutEngine`.

    The log-probs are the policy's own. Each text is drawn with the random numbers of its own seed,
    so what it becomes does not depend on the texts beside it.

    Args:
        policy: draws with the weights that it has at each token.
        spec: the env's.
        temperature: of sampling; 0 takes the likeliest token.
        num_texts: N, how many texts run side by side. Others that are asked for wait.
        reads_values: whether the critic's values are read with the texts.

    Raises:
        InvalidArgument: `num_texts` is less than 1.
    """

    def __init__(
        self,
        policy: Policy,
        spec: TokenSpec,
        *,
        temperature: float = 1.0,
        num_texts: int = 64,
        reads_values: bool = False,
    ) -> None:
        if num_texts < 1:
            raise InvalidArgument(f"num_texts={num_texts} must be at least 1.")
        self.policy, self.spec = policy, spec
        self.temperature, self.num_texts = temperature, num_texts
        self.reads_values = reads_values
        self._waiting: deque[Asked] = deque()
        self._texts: list[Asked | None] = [None] * num_texts
        """The text in each slot; None: the slot is free."""
        self._written = np.zeros(num_texts, np.int64)
        """(N,) tokens that have been drawn of each text."""
        self._limit = np.zeros(num_texts, np.int64)
        """(N,) how many tokens each text may have."""
        self._unread = np.zeros(num_texts, bool)
        """(N,) the texts that the cache does not hold, or holds of earlier weights: they are read
        from their start before their next token."""
        self._slots: SlotModel | None = None

    def begin(self, key: int, prompt: Sequence[int], max_tokens: int, seed: int) -> None:
        """Begin a text; see `RolloutEngine`."""
        self._waiting.append(Asked(key, [int(token) for token in prompt], max_tokens, seed))

    def ended(self) -> list[Written]:
        """Draw tokens until at least one text has ended, and return those that have; see
        `RolloutEngine`."""
        found: list[Written] = []
        while not found:
            found = self.step()
        return found

    @torch.no_grad()
    def step(self) -> list[Written]:
        """Draw a token in every slot, and return the texts that this ended."""
        if self._slots is None:
            self._start()
        self._fill()
        ended = self._draw()
        return self._take(ended) if len(ended) else []

    def sync(self) -> None:
        """Have the running texts read again before their next token; see `RolloutEngine`."""
        self._unread[:] = True
        if self._slots is not None:
            self._values_NT.fill_(torch.nan)  # they were of other weights

    def abort(self) -> None:
        """Forget all texts; see `RolloutEngine`."""
        self._waiting.clear()
        self._texts = [None] * self.num_texts

    def _start(self) -> None:
        """Make the cache, and the columns of all slots."""
        device, shape = device_of(self.policy), (self.num_texts, self.spec.max_new_tokens)
        self._tokens_NT = torch.zeros(shape, dtype=torch.int64, device=device)
        self._logprobs_NT = torch.zeros(shape, device=device)
        self._values_NT = torch.full(shape, torch.nan, device=device)
        self._random_NT = torch.zeros(shape, device=device)
        self._last_N = torch.zeros(self.num_texts, dtype=torch.int64, device=device)
        self._rows_N = torch.arange(self.num_texts, device=device)
        self._stops = torch.tensor(self.spec.engine_stop_ids, device=device)
        self._slots = self.policy.slots(self.num_texts, self.spec.max_length)

    # ---------------------------------------------------------------- slots

    @property
    def _running(self) -> np.ndarray:
        return np.array([text is not None for text in self._texts])

    def _fill(self) -> None:
        """Put texts that wait into free slots, where so many are free that a prefill pays."""
        free = np.flatnonzero(~self._running)
        all_free = len(free) == self.num_texts
        if not self._waiting or (len(free) < self.num_texts // FREE_SHARE and not all_free):
            return
        slots = free[: len(self._waiting)]
        texts = [self._waiting.popleft() for _ in slots]
        random = np.zeros((len(slots), self._random_NT.shape[1]), np.float32)
        for row, (slot, text) in enumerate(zip(slots, texts, strict=True)):
            drawn = np.random.default_rng(text.seed).random(text.max_tokens, np.float32)
            random[row, : text.max_tokens] = drawn
            self._texts[slot], self._limit[slot] = text, text.max_tokens
        self._written[slots], self._unread[slots] = 0, True
        device = self._rows_N.device
        self._random_NT[upload(slots, device)] = upload(random, device)

    def _take(self, slots: np.ndarray) -> list[Written]:
        """Return the texts of some slots (n,), which are free now."""
        at, found = upload(slots, self._rows_N.device), []
        columns = self._tokens_NT, self._logprobs_NT, self._values_NT
        tokens, *numbers = (to_host(column[at]) for column in columns)
        for row, slot in enumerate(slots):
            text, end = self._texts[slot], self._written[slot]
            assert text is not None
            logprobs, values = (column[row, :end].tolist() for column in numbers)
            found.append(Written(text.key, tokens[row, :end].tolist(), logprobs, values))
            self._texts[slot] = None
        return found

    # ---------------------------------------------------------------- a token

    def _draw(self) -> np.ndarray:
        """Draw the next token of every running text, and return the slots (n,) whose text this
        ended."""
        running = self._running
        with self.policy.autocast():
            states_NH = self._read(running)
            logits_NV = self.policy.head(states_NH)
        place_N = upload(np.minimum(self._written, self._limit - 1), self._rows_N.device)
        random_N = self._random_NT[self._rows_N, place_N]
        tokens_N, logprobs_N = invert(logits_NV, self.temperature, random_N)
        self._tokens_NT[self._rows_N, place_N] = tokens_N
        self._logprobs_NT[self._rows_N, place_N] = logprobs_N
        values_N = read_values(self.policy, states_NH) if self.reads_values else None
        if values_N is not None:
            self._values_NT[self._rows_N, place_N] = values_N
        self._last_N = tokens_N
        self._written += running
        # The one copy from the device.
        stopped = to_host(torch.isin(tokens_N, self._stops))
        return np.flatnonzero(running & (stopped | (self._written == self._limit)))

    def _read(self, running: np.ndarray) -> Tensor:
        """Return the states (N, H) after all running texts: by their last token or, where the cache
        does not hold a text, from its start."""
        assert self._slots is not None
        begun, on = running & self._unread, running & ~self._unread
        slots = np.flatnonzero(begun)
        states_nH = self._begin(slots) if len(slots) else None
        self._unread &= ~begun
        if states_nH is None:
            return self._slots.append(self._last_N, None if on.all() else on)
        if on.any():
            states_NH = self._slots.append(self._last_N, on)
        else:
            states_NH = states_nH.new_zeros(self.num_texts, *states_nH.shape[1:])
        return states_NH.index_copy(0, upload(slots, states_NH.device), states_nH)

    def _begin(self, slots: np.ndarray) -> Tensor:
        """Read the texts of some slots (n,) from their start, equal ones once, and return the
        states (n, H) after them."""
        assert self._slots is not None
        tokens = to_host(self._tokens_NT[upload(slots, self._rows_N.device)])
        prompts = [text.prompt for slot in slots if (text := self._texts[slot]) is not None]
        written = self._written[slots]
        lengths = np.array([len(prompt) for prompt in prompts]) + written
        padded = np.zeros((len(slots), lengths.max()), np.int64)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = prompt
            padded[row, len(prompt) : lengths[row]] = tokens[row, : written[row]]
        texts = torch.from_numpy(padded)
        first = first_equals(texts, lengths)
        return prefill_once(self._slots, slots, texts.to(self._rows_N.device), lengths, first)


def check_options(names: Iterable[str]) -> None:
    """Raise `InvalidArgument` for an option of `rollout_options` that is none of this engine's."""
    for name in names:
        check_choice("rollout_options", name, ["num_texts"])
