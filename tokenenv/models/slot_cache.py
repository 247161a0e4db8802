"""Keys and values of N rows, each at its own position, in transformers' own cache interface."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer

from .batching import upload

BUCKET = 16
"""Keys are read up to the longest row, rounded up to a multiple of this: few shapes, little
waste."""

MAX_GRAPHS = 64
"""Compiled graphs of one model class, all its models and buckets together; beyond, steps would not
be compiled."""


class Uncacheable(Exception):
    """This model cannot be cached per row; the text says why."""


class Write:
    """Where one forward's keys and values go. Shared by all layers, set before each forward."""

    slots: Tensor
    """(B, 1) int64: the row of each text."""
    positions: Tensor
    """(B or 1, Q) int64: the place of each new token in its row."""
    bucket: int | None
    """Attend to this many cached keys of each row, or (None) to the new tokens alone."""
    compiled: bool = False
    """Keys and values keep their addresses, as CUDA graphs need to be told."""


class SlotLayer(StaticLayer):
    """One layer's keys and values, (N, heads, max_length, size)."""

    def __init__(self, num_slots: int, max_length: int, write: Write):
        super().__init__(max_cache_len=max_length)
        self.num_slots = num_slots
        self.write = write

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates for all rows; the states say heads, sizes, dtype and device."""
        self.keys, self.values = (
            x.new_zeros(self.num_slots, x.shape[1], self.max_cache_len, x.shape[3])
            for x in (key_states, value_states)
        )
        if self.write.compiled:
            self.mark_static()
        self.is_initialized = True

    def mark_static(self) -> None:
        """Tells CUDA graphs that keys and values keep their addresses."""
        torch._dynamo.mark_static_address(self.keys)
        torch._dynamo.mark_static_address(self.values)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores new states (B, heads, Q, size); returns what to attend to, in the same layout."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._store(self.keys, key_states), self._store(self.values, value_states)

    def _store(self, cached: Tensor, new: Tensor) -> Tensor:
        new = new.to(cached.dtype)  # autocast computes in bfloat16 what a float32 cache holds
        cached.transpose(1, 2)[self.write.slots, self.write.positions] = new.transpose(1, 2)
        return new if self.write.bucket is None else cached[:, :, : self.write.bucket]

    def get_seq_length(self) -> int:
        """Unused: positions and masks are explicit."""
        return 0


class KVSlots:
    """The cached way of running N rows (see `CachedLM`, which keeps their positions)."""

    def __init__(self, trunk: Any, num_slots: int, max_length: int, compile: bool = False):
        self.trunk = trunk
        self.max_length = max_length
        config = trunk.config.get_text_config()
        self.windows = attention_windows(config, max_length)
        self.write = Write()
        self.write.compiled = compile
        layers = [
            SlotLayer(num_slots, max_length, self.write) for _ in range(config.num_hidden_layers)
        ]
        self.cache = Cache(layers=layers)
        self.rows = torch.arange(num_slots, device=trunk.device)[:, None]
        self.steps = torch.arange(max_length, device=trunk.device)
        self.step_trunk = compiled(trunk) if compile else trunk

    def __getstate__(self) -> dict[str, Any]:
        """Without the compiled trunk, which can be neither copied nor pickled: a copy compiles its
        own."""
        return {name: value for name, value in vars(self).items() if name != "step_trunk"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.step_trunk = compiled(self.trunk) if self.write.compiled else self.trunk
        if self.write.compiled:
            for layer in self.cache.layers:
                layer.mark_static()

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values; 0 before the first prefill."""
        return sum(
            x.nbytes
            for layer in self.cache.layers
            for x in (layer.keys, layer.values)
            if x is not None
        )

    def prefill(self, slots: Tensor, tokens: Tensor) -> Tensor:
        """Puts `tokens` (B, L) at positions 0..L-1 of `slots` (B,); returns all states (B, L, H).

        What lies right of a text is stored as well, and overwritten by the tokens to come.
        """
        positions = self.steps[None, : tokens.shape[1]]
        self._write_to(slots[:, None], positions, None)
        masks = self._masks(positions, tokens.shape[1])
        return self._forward(self.trunk, tokens, positions.expand(tokens.shape), masks)

    def append(self, tokens: Tensor, positions: np.ndarray, moving: np.ndarray) -> Tensor:
        """Puts `tokens` (N,) at `positions` (N,); returns states (N, H), valid where `moving`.

        The others' tokens land where their next one will overwrite them, or on the last place of a
        full row.
        """
        where = upload(np.minimum(positions, self.max_length - 1), self.rows.device)[:, None]
        bucket = self._bucket(int(positions[moving].max(initial=0)) + 1)
        self._write_to(self.rows, where, bucket)
        with (
            torch.inference_mode()
        ):  # a step is many small operations, and this makes each a little cheaper
            states = self._forward(
                self.step_trunk, tokens[:, None], where, self._masks(where, bucket)
            )[:, 0]
        return states.clone()  # an ordinary tensor again

    def fork(self, sources: Tensor, targets: Tensor, width: int) -> None:
        """Copies the first `width` tokens of rows `sources` onto rows `targets`, reading all before
        writing any."""
        for layer in self.cache.layers:
            layer.keys[targets, :, :width] = layer.keys[sources, :, :width]
            layer.values[targets, :, :width] = layer.values[sources, :, :width]

    def _write_to(self, slots: Tensor, positions: Tensor, bucket: int | None) -> None:
        self.write.slots, self.write.positions, self.write.bucket = slots, positions, bucket

    def _bucket(self, length: int) -> int:
        bucket = -(-length // BUCKET) * BUCKET
        if self.write.compiled:  # one compiled step per bucket: doubling keeps them few
            bucket = 1 << (bucket - 1).bit_length()
        return min(bucket, self.max_length)

    def _masks(self, positions: Tensor, keys: int) -> Tensor | dict[str, Tensor]:
        """Additive masks (B, 1, Q, keys) for queries at `positions` (B, Q); one per kind of layer
        where they differ.

        Additive, since eager attention adds what it is given, and sdpa would convert a bool mask in
        every layer.
        """
        keys_at, positions = self.steps[:keys], positions[:, None, :, None]
        masks = {
            kind: self._mask(positions, keys_at, window) for kind, window in self.windows.items()
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _mask(self, positions: Tensor, keys_at: Tensor, window: int) -> Tensor:
        hidden = keys_at > positions
        if window < self.max_length:
            hidden |= keys_at <= positions - window
        dtype = self.trunk.dtype
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return mask.masked_fill_(hidden, torch.finfo(dtype).min)

    def _forward(
        self, trunk: Any, tokens: Tensor, positions: Tensor, masks: Tensor | dict[str, Tensor]
    ) -> Tensor:
        with masked_attention(self.trunk):
            return trunk(
                input_ids=tokens,
                position_ids=positions,
                attention_mask=masks,
                past_key_values=self.cache,
                use_cache=True,
            )[0]


def attention_windows(config: Any, max_length: int) -> dict[str, int]:
    """How far back each kind of layer looks, in tokens; one entry where all layers look equally
    far.

    Raises `Uncacheable` for kinds that are neither full nor sliding attention.
    """
    window = getattr(config, "sliding_window", None) or max_length
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    reach = {"full_attention": max_length, "sliding_attention": min(window, max_length)}
    if unknown := kinds - set(reach):
        raise Uncacheable(f"layers of type {', '.join(sorted(unknown))}")
    if len({reach[kind] for kind in kinds}) == 1:
        kinds = {min(kinds)}
    return {kind: reach[kind] for kind in sorted(kinds)}


@contextmanager
def masked_attention(trunk: Any) -> Iterator[None]:
    """Flash and flex kernels take no 4D masks: cached forwards run under sdpa or, where a model has
    none, eager."""
    config = trunk.config
    chosen = config._attn_implementation
    if chosen in ("sdpa", "eager", None):
        yield
        return
    config._attn_implementation = "sdpa" if trunk._supports_sdpa else "eager"
    try:
        yield
    finally:
        config._attn_implementation = chosen


def compiled(trunk: Any) -> Any:
    """The trunk compiled with static shapes, one graph per bucket; captured as CUDA graphs where
    there are any."""
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, MAX_GRAPHS)
    if trunk.device.type != "cuda":
        return torch.compile(trunk, dynamic=False)
    step = torch.compile(trunk, dynamic=False, mode="reduce-overhead")
    return lambda **kwargs: (
        step(**kwargs)[0].clone(),
    )  # the next replay overwrites a graph's own outputs
