"""Memory of tensors: where they lie, and how much is alive at a time. Also on the device "meta",
where they take none."""

import weakref
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


@cache
def keep_freed_memory() -> None:
    """Have the C library keep what is freed, up to 64 MiB, for what is made next.

    glibc hands the free end of its heap back to the system, and a forward, which makes and frees
    its states layer by layer, then waits for the same pages again and again: a third of the time
    of whole texts of a small model. How much it keeps is twice the largest block, of 32 MiB at
    most, that has ever been freed. No page of the block made here is touched.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


class Places:
    """The memories that have been counted."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def new_bytes(self, *holders: Any) -> int:
        """Return the bytes of the tensors in these (see `tensors_of`) that lie in memories which
        were not counted before; they count from now on."""
        storages = {
            tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
            for holder in holders
            for tensor in tensors_of(holder)
        }
        new = storages.keys() - self._seen
        self._seen |= new
        return sum(storages[place] for place in new)


def tensors_of(holder: Any) -> Iterator[Tensor]:
    """Yield the tensors of a module, a tensor, a mapping of such things, or any other object that
    holds them as attributes, such as a `TokenModel`."""
    if isinstance(holder, Tensor):
        yield holder
    elif isinstance(holder, nn.Module):
        yield from holder.parameters()
        yield from holder.buffers()
    elif isinstance(holder, Mapping):
        for value in holder.values():
            yield from tensors_of(value)
    else:
        values = getattr(holder, "__dict__", {}).values()
        yield from (value for value in values if isinstance(value, Tensor))


class LiveMemory(TorchDispatchMode):
    """Counts the memory of the tensors that are made within it, from their making to their end.

    What an operation takes and frees inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        """Bytes now."""
        self.peak = 0
        """The most bytes so far."""
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count what it makes."""
        # What an operation reads before anything has made it was there before.
        for storage in _storages((args, kwargs)):
            self._known.setdefault(storage, 0)
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage not in self._known:
                self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._known[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._end, size)

    def _end(self, size: int) -> None:
        self.live -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
