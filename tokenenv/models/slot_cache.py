"""Keys and values of N slots, each at its own position, behind transformers' own cache interface.

A transformers cache has one length for the whole batch: it appends the new keys of all rows at the
same place. Here every slot is at a place of its own, so keys and values are *scattered* to explicit
places, positions are given explicitly, and an explicit mask hides what a text has not reached.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, StaticLayer

from .batching import upload
from .shapes import ATTENTION as SHAPES
from .step_graphs import StepGraphs

BUCKET = 16
"""A step reads the keys up to the longest slot, rounded up to a multiple of this: few different
shapes, and little reading in vain."""

RECORDED_TOKENS = 4096
"""The most tokens, padding left out, of a prefill that is recorded as a CUDA graph. What takes
longer to compute than to launch would gain nothing, and its graph would hold much memory."""

MAX_GRAPHS = 64
"""The most compiled graphs of one model class, for all its models and buckets together. Beyond
torch's own limit, which is lower, a step would silently run uncompiled."""


class Uncacheable(Exception):
    """The model cannot be cached per slot; the text says why."""


class Write:
    """Where the keys and values of one forward go, and what it attends to.

    All layers of a cache share one object, which is set before each forward: transformers calls the
    layers itself and passes none of this on.
    """

    slots: Tensor
    """(B, 1) or (M,) int64: the slot of each text of the forward, or of each token that is
    stored."""
    positions: Tensor
    """(B or 1, Q) or (M,) int64: the place of each new token in its slot."""
    bucket: int | None
    """A number: attend to that many first places of the cache. None: attend to the forward's own
    tokens alone."""
    stored: tuple[Tensor, Tensor] | None = None
    """The rows (M,) and columns (M,) of the tokens that are stored; None: all are."""
    read: Tensor | None = None
    """(B,) int64: the slots to attend to, one for each row; None: all N slots."""
    compiled: bool = False
    """True: keys and values keep their addresses, and CUDA graphs are told so."""


class SlotLayer(StaticLayer):
    """The keys and values of one layer, (N, heads, max_length, size) each."""

    def __init__(self, num_slots: int, max_length: int, write: Write):
        super().__init__(max_cache_len=max_length)
        self.num_slots = num_slots
        self.write = write

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the memory of all slots. The first states show the number of heads, the sizes,
        the dtype and the device, which configs name in several ways."""
        self.keys, self.values = (
            x.new_zeros(self.num_slots, x.shape[1], self.max_cache_len, x.shape[3])
            for x in (key_states, value_states)
        )
        if self.write.compiled:
            self.mark_static()
        self.is_initialized = True

    def mark_static(self) -> None:
        """Tell CUDA graphs that keys and values keep their addresses."""
        torch._dynamo.mark_static_address(self.keys)
        torch._dynamo.mark_static_address(self.values)

    def join(self, parts: Sequence["SlotLayer"]) -> None:
        """Take over the memory of other layers, behind each other; they go on as views of it."""
        for name in ("keys", "values"):
            memory = torch.cat([getattr(part, name) for part in parts])
            setattr(self, name, memory)
            views = memory.split([part.num_slots for part in parts])
            for part, view in zip(parts, views, strict=True):
                setattr(part, name, view)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values (B, heads, Q, size), and return those to attend to, in the same
        layout. transformers calls this once in each layer of a forward."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._store(self.keys, key_states), self._store(self.values, value_states)

    def _store(self, cached: Tensor, new: Tensor) -> Tensor:
        # Under autocast new states are bfloat16, while the cache was allocated as float32.
        new = new.to(cached.dtype)
        write, by_place = self.write, new.transpose(1, 2)
        if write.stored is not None:
            by_place = by_place[write.stored]
        # With heads and places swapped, the two index tensors select whole (heads, size) states:
        # slot i receives its Q new states at its own Q places.
        cached.transpose(1, 2)[write.slots, write.positions] = by_place
        # In a prefill the new tokens are the whole text. Otherwise they are the last tokens of
        # each slot, and the queries need all earlier keys as well.
        if write.bucket is None:
            return new
        if write.read is None:
            return cached[:, :, : write.bucket]
        return cached[write.read, :, : write.bucket]

    def get_seq_length(self) -> int:
        """Return 0. transformers would derive positions and masks from it; both are explicit
        here."""
        return 0


class KVSlots:
    """N slots of keys and values: the fast way to run a `CachedLM`, which keeps the positions."""

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
        self.all_slots = torch.arange(num_slots, device=trunk.device)[:, None]
        self.places = torch.arange(max_length, device=trunk.device)
        self.set_up_step()

    def set_up_step(self) -> None:
        """Make the step's forward anew: compiled, or with graphs, where there are any."""
        self.step_trunk = compiled(self.trunk) if self.write.compiled else self.trunk
        # Compiled steps have CUDA graphs already.
        uses_graphs = self.places.device.type == "cuda" and not self.write.compiled
        self.graphs = StepGraphs(self.trunk) if uses_graphs else None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the compiled trunk and the graphs, which can be neither copied nor pickled. A
        copy makes its own."""
        left_out = ("step_trunk", "graphs")
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.set_up_step()
        # The mark sits on the tensor objects, and a copy has other ones.
        if self.write.compiled:
            for layer in self.cache.layers:
                layer.mark_static()

    @property
    def nbytes(self) -> int:
        """The bytes of all keys and values; 0 before the first prefill."""
        return sum(
            x.nbytes
            for layer in self.cache.layers
            for x in (layer.keys, layer.values)
            if x is not None
        )

    def prefill(self, slots: Tensor, tokens: Tensor) -> Tensor:
        """Put right-padded texts at the beginning of some slots, and return all their states.

        Args:
            slots: (B,) int64 on the device.
            tokens: (B, L) int64.

        Returns:
            (B, L, H). A state that is beyond its text means nothing, and all are overwritten by the
            next forward.
        """
        rows, width = tokens.shape
        # The first prefill allocates the slots.
        if self.graphs is None or not self.nbytes or rows * width > RECORDED_TOKENS:
            return self._prefill(slots, tokens)
        # A few prompts, as a step begins them, are padded to one of few shapes: to the right, and
        # by the last of them once more, which writes the same into the same slot.
        more = min(1 << max(width - 1, BUCKET - 1).bit_length(), self.max_length) - width
        again = (1 << (rows - 1).bit_length()) - rows
        tokens = pad(tokens, (0, more))
        slots = torch.cat([slots, slots[-1:].expand(again)])
        tokens = torch.cat([tokens, tokens[-1:].expand(again, -1)])
        return self._run("prefill", self._prefill, slots, tokens)[:rows, :width]

    def _prefill(self, slots: Tensor, tokens: Tensor) -> Tensor:
        # Padding is stored like any token. That does no harm: it lies at places that the text has
        # not reached, which the mask hides and the tokens to come overwrite.
        positions = self.places[None, : tokens.shape[1]]
        self._write_to(slots[:, None], positions, None)
        masks = self._masks(positions, tokens.shape[1])
        return self._forward(self.trunk, tokens, positions.expand(tokens.shape), masks)

    def append(self, tokens: Tensor, positions: np.ndarray, moving: np.ndarray) -> Tensor:
        """Put one token into each slot, and return the state after it.

        Args:
            tokens: (N,) int64 on the device.
            positions: (N,) host data, the place of each token in its slot.
            moving: (N,) bool host data: the slots whose text really grows.

        Returns:
            (N, H), valid where `moving`.
        """
        # The tokens of slots that do not move are written too. Theirs land at the place that the
        # slot's next token will overwrite; a full slot has no such place, and its last one, which
        # is never read again before a prefill, takes the token.
        where = upload(np.minimum(positions, self.max_length - 1), self.places.device)[:, None]
        # The bucket covers the longest slot that moves. It is computed on the host, so that the
        # shape of the forward is known without asking the device.
        bucket = self._bucket(int(positions[moving].max(initial=0)) + 1)
        # A step is many small operations, and inference mode makes each a little cheaper.
        with torch.inference_mode():
            states = self._run(bucket, partial(self._step, bucket=bucket), tokens, where)
        # An inference tensor cannot take part in autograd later; its clone can. The next replay of
        # a CUDA graph overwrites the states, too.
        return states.clone()

    def extend(
        self, slots: Tensor, tokens: Tensor, starts: np.ndarray, lengths: np.ndarray
    ) -> Tensor:
        """Put several tokens behind the texts of some slots, and return the state after each.

        Args:
            slots: (B,) int64 on the device.
            tokens: (B, K) int64, right-padded.
            starts: (B,) host data, how many tokens each slot holds.
            lengths: (B,) host data, how many each is given, 1..K; all fit into the slot.

        Returns:
            (B, K, H). A state to the right of a row's last token means nothing.
        """
        new = np.arange(tokens.shape[1])
        # Padding is not stored: in a slot that is nearly full there is no place for it. As a query
        # it needs a position, and one beyond the last would be outside a table of positions.
        stored = np.nonzero(new < lengths[:, None])
        places = np.minimum(starts[:, None] + new, self.max_length - 1)
        row, column, at, where = (
            upload(index, slots.device) for index in (*stored, places[stored], places)
        )
        bucket = self._bucket(int((starts + lengths).max()))
        self._write_to(slots[row], at, bucket)
        self.write.stored, self.write.read = (row, column), slots
        return self._forward(self.trunk, tokens, where, self._masks(where, bucket))

    def _run(self, name: Any, forward: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Return `forward(*inputs)`, by a graph where there are graphs (see `StepGraphs`)."""
        return self.graphs(name, forward, *inputs) if self.graphs else forward(*inputs)

    def _step(self, tokens: Tensor, where: Tensor, bucket: int) -> Tensor:
        """Run the forward of one token (N,) at its place `where` (N, 1) in each slot."""
        self._write_to(self.all_slots, where, bucket)
        masks = self._masks(where, bucket)
        return self._forward(self.step_trunk, tokens[:, None], where, masks)[:, 0]

    def fork(self, sources: Tensor, targets: Tensor, width: int) -> None:
        """Copy the first `width` places of slots `sources` onto slots `targets`, (n,) each. The
        right side is read as a whole before the left side is written."""
        for layer in self.cache.layers:
            layer.keys[targets, :, :width] = layer.keys[sources, :, :width]
            layer.values[targets, :, :width] = layer.values[sources, :, :width]

    def _write_to(self, slots: Tensor, positions: Tensor, bucket: int | None) -> None:
        self.write.slots, self.write.positions, self.write.bucket = slots, positions, bucket
        self.write.stored = self.write.read = None

    def _bucket(self, length: int) -> int:
        """Round the number of keys to read up to one of few sizes."""
        bucket = -(-length // BUCKET) * BUCKET
        # Each bucket is a graph of its own. Compiling one takes long: powers of two keep them few.
        # Recording one does not: there are at most four from one power of two to the next, and an
        # eighth of what is read is read in vain.
        if self.write.compiled:
            bucket = 1 << (bucket - 1).bit_length()
        elif self.graphs is not None:
            width = max(BUCKET, 1 << max(bucket - 1, 1).bit_length() >> 3)
            bucket = -(-length // width) * width
        return min(bucket, self.max_length)

    def _masks(self, positions: Tensor, keys: int) -> Tensor | dict[str, Tensor]:
        """Return what queries at `positions` (B, Q) may attend to among the first `keys` places.

        The masks (B, 1, Q, keys) are additive: 0 where a key is seen, the dtype's minimum where it
        is not. There is one mask where all layers look equally far back, and a dict by layer type
        where they do not: each form is refused by some models that want the other.
        """
        # Eager attention adds whatever it is given, and sdpa would convert a bool mask in every
        # layer, so an additive mask serves both.
        keys_at, positions = self.places[:keys], positions[:, None, :, None]
        masks = {
            kind: self._mask(positions, keys_at, window) for kind, window in self.windows.items()
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _mask(self, positions: Tensor, keys_at: Tensor, window: int) -> Tensor:
        # A place beyond the query holds padding, a token of an earlier text in this slot, or of a
        # slot that did not move. One comparison hides them all.
        hidden = keys_at > positions
        # A window of w tokens includes the query itself.
        if window < self.max_length:
            hidden |= keys_at <= positions - window
        dtype = self.trunk.dtype
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        # The minimum, not -inf: where every key of a row were hidden, -inf would give NaN.
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


def joined(trunk: Any, parts: Sequence[KVSlots]) -> KVSlots:
    """Return the slots of several models behind each other, as those of one trunk that runs for all
    of them. The parts keep what they hold, as views of the same memory."""
    slots = sum(len(part.all_slots) for part in parts)
    whole = KVSlots(trunk, slots, parts[0].max_length)
    for number, layer in enumerate(whole.cache.layers):
        layer.join([part.cache.layers[number] for part in parts])
    for part in parts:
        part.set_up_step()  # graphs hold the addresses of the memory that was
    return whole


def attention_windows(config: Any, max_length: int) -> dict[str, int]:
    """Return how many tokens back each type of layer looks, by its name in the config. There is one
    entry where all layers look equally far.

    Raises:
        Uncacheable: a layer is neither full nor sliding attention.
    """
    window = getattr(config, "sliding_window", None) or max_length
    # A config without `layer_types` has one kind of layer, with a window if it names one.
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    reach = {"full_attention": max_length, "sliding_attention": min(window, max_length)}
    if unknown := kinds - set(reach):
        raise Uncacheable(f"layers of type {', '.join(sorted(unknown))}")
    if len({reach[kind] for kind in kinds}) == 1:
        kinds = {min(kinds)}
    return {kind: reach[kind] for kind in sorted(kinds)}


@contextmanager
def masked_attention(trunk: Any) -> Iterator[None]:
    """Run under an attention that takes 4D masks: the project's own in place of sdpa; the model's
    own where that is eager or another; and neither flash nor flex kernels, which take none."""
    # It takes transformers' own attention along, which takes a second to import.
    from . import decode_attention

    config = trunk.config
    chosen = config._attn_implementation
    if chosen in ("eager", SHAPES, None):
        yield
        return
    config._attn_implementation = decode_attention.NAME if trunk._supports_sdpa else "eager"
    try:
        yield
    finally:
        config._attn_implementation = chosen


def compiled(trunk: Any) -> Any:
    """Compile a trunk for static shapes, one graph for each bucket. On CUDA the graphs are captured
    as CUDA graphs."""
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, MAX_GRAPHS)
    if trunk.device.type != "cuda":
        return torch.compile(trunk, dynamic=False)
    step = torch.compile(trunk, dynamic=False, mode="reduce-overhead")
    # A CUDA graph writes its outputs to the same memory at every replay, so they are copied out.
    return lambda **kwargs: (step(**kwargs)[0].clone(),)
