"""The processes that learn one policy together, and what they tell each other.

Such processes are called ranks, as in `torch.distributed`. torchrun, Ray, or a program of one's own
starts them, and each joins a process group; `joined` does that from the variables that torchrun
sets. A process that has joined none is the only rank, and everything here then costs nothing.

What `gathered` exchanges are Python objects, pickled: all ranks are processes of one program.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, distributed

from tokenenv.errors import RankFailed

T = TypeVar("T")

MESSAGE_BYTES = 2**26
"""The most bytes of tensors that cross at once, where one tensor has no more."""
PATIENCE = timedelta(hours=2)
"""How long a rank waits for the others. They may be writing long texts; that one has died is for
whoever started them to see."""


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the ranks that torchrun has started, if it has (it sets WORLD_SIZE): NCCL between
    GPUs, one for each rank of a machine, and gloo between hosts."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _in_a_group():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, timeout=PATIENCE)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def count() -> int:
    """Return how many ranks there are."""
    return distributed.get_world_size() if _in_a_group() else 1


def number() -> int:
    """Return this rank's number, from 0."""
    return distributed.get_rank() if _in_a_group() else 0


def _in_a_group() -> bool:
    # Some builds of torch lack all of it but this question.
    return distributed.is_available() and distributed.is_initialized()


def gathered(value: T) -> list[T]:
    """Return what each rank calls this with, in the order of the ranks."""
    if count() == 1:
        return [value]
    found: list[T | None] = [None] * count()
    distributed.all_gather_object(found, value)
    return found  # type: ignore[return-value]


def each(make: Callable[[], T]) -> list[T]:
    """Return what `make` returns on each rank, in the order of the ranks.

    An error on one rank is raised there, and on the others as `RankFailed`: none waits for it.
    """
    if count() == 1:
        return [make()]
    try:
        value, error = make(), None
    except Exception as raised:
        value, error = None, raised
    found = gathered((value, None if error is None else f"{type(error).__name__}: {error}"))
    if error is not None:
        error.add_note(f"This was on rank {number()} of {count()} alone.")
        raise error
    for rank, (_, failed) in enumerate(found):
        if failed is not None:
            raise RankFailed(f"rank {rank} failed: {failed}")
    return [value for value, _ in found]  # type: ignore[misc]


def of_first(make: Callable[[], T]) -> T:
    """Return what `make` returns on the first rank, which alone calls it. An error of its is raised
    as in `each`."""
    if count() == 1:
        return make()
    found: list[tuple[T | None, str | None]] = [(None, None)]
    error: Exception | None = None
    if number() == 0:
        try:
            found = [(make(), None)]
        except Exception as raised:
            error = raised
            found = [(None, f"{type(raised).__name__}: {raised}")]
    distributed.broadcast_object_list(found, src=0)
    value, failed = found[0]
    if error is not None:
        raise error
    if failed is not None:
        raise RankFailed(f"rank 0 failed: {failed}")
    return value  # type: ignore[return-value]


def summed(numbers: Mapping[str, float]) -> dict[str, float]:
    """Return the sums over ranks of numbers by name; a rank may lack some."""
    total: dict[str, float] = {}
    for part in gathered(dict(numbers)):
        for name, value in part.items():
            total[name] = total.get(name, 0.0) + value
    return total


@torch.no_grad()
def add_up(tensors: Sequence[Tensor]) -> None:
    """Put the sum over ranks in the place of each tensor. All ranks give the same shapes, dtypes
    and devices, in the same order."""
    if count() == 1:
        return
    for flat, parts in _packed(tensors):
        distributed.all_reduce(flat)
        _unpack(flat, parts)


def add_up_gradients(weights: Sequence[Tensor]) -> None:
    """Sum the gradients of weights over ranks. A rank that has none of a weight, since it had
    nothing to read, takes that of the others; where no rank has one there stays none."""
    if count() == 1:
        return
    have = gathered([weight.grad is not None for weight in weights])
    gradients = []
    for weight, *of_ranks in zip(weights, *have, strict=True):
        if any(of_ranks):
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            gradients.append(weight.grad)
    add_up(gradients)


@torch.no_grad()
def take_first(tensors: Sequence[Tensor]) -> None:
    """Put the first rank's values in the place of each tensor, which are alike as in `add_up`."""
    if count() == 1:
        return
    for flat, parts in _packed(tensors):
        distributed.broadcast(flat, src=0)
        _unpack(flat, parts)


def _packed(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Yield flat copies, each of some tensors of a kind: few messages, and little memory."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        parts = kinds.setdefault((tensor.device, tensor.dtype), [])
        if parts and sum(part.nbytes for part in parts) + tensor.nbytes > MESSAGE_BYTES:
            yield _flat(parts), parts
            parts = kinds[tensor.device, tensor.dtype] = []
        parts.append(tensor)
    for parts in kinds.values():
        yield _flat(parts), parts


def _flat(parts: Sequence[Tensor]) -> Tensor:
    flat = [part.reshape(-1) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _unpack(flat: Tensor, parts: Sequence[Tensor]) -> None:
    for part, values in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
        part.copy_(values.view_as(part))


def share(sizes: np.ndarray) -> np.ndarray:
    """Return the places, ascending, of those of the things of these `sizes` (n,) that are this
    rank's to work on. Each is one rank's, and all ranks have about the same size in all."""
    if count() == 1:
        return np.arange(len(sizes))
    # The largest are dealt out first, to and fro: 0 1 2 2 1 0 0 1 2 ...
    order = np.argsort(-np.asarray(sizes), kind="stable")
    turn, place = np.divmod(np.arange(len(order)), count())
    dealt_to = np.where(turn % 2 == 0, place, count() - 1 - place)
    return np.sort(order[dealt_to == number()])
