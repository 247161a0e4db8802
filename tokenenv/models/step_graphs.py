"""CUDA graphs of a step: what a forward of one token per slot, or of a few prompts, launches is
recorded once, and replayed at every step.

Such a forward is hundreds of small kernels. Launching them from Python takes many times longer than
running them; a replay launches them all at once.
"""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger("tokenenv")


class StepGraphs:
    """Forwards of one trunk on CUDA, with one graph for each of them and each shape of its inputs.

    A graph holds the addresses of the weights and caches that it was recorded with, so it sees
    weights that are trained in place. There is another one for each precision of autocast, and all
    are recorded anew where the model has changed: other modules, weights at other addresses, an
    adapter that is switched on or off.

    Args:
        trunk: whose weights the forwards read.
    """

    def __init__(self, trunk: Any) -> None:
        self._trunk = trunk
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]] = {}
        self._recorded: list[Any] = []
        self._pool: Any = None
        self._refused = False

    def __call__(self, name: Any, forward: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Return `forward(*inputs)`, which is overwritten by the next call.

        Args:
            name: of the forward. Whatever it depends on beside its inputs' shapes and values is
                part of the name.
            forward: maps tensors to states. It may write to tensors that stay at their addresses,
                such as a cache.
            inputs: on the device.
        """
        if self._refused:
            return forward(*inputs)
        what = fingerprint(self._trunk, [])
        if what != self._recorded:
            self._graphs, self._pool, self._recorded = {}, None, what
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = name, *(tuple(x.shape) for x in inputs), autocast
        if key not in self._graphs:
            try:
                self._graphs[key] = self._record(forward, inputs)
            except torch.OutOfMemoryError:
                raise
            # What a foreign model does while it is recorded may raise anything.
            except Exception as error:
                return self._refuse(error, forward, inputs)
        graph, its_inputs, states = self._graphs[key]
        for its, given in zip(its_inputs, inputs, strict=True):
            its.copy_(given)
        graph.replay()
        return states

    def _record(
        self, forward: Callable[..., Tensor], inputs: tuple[Tensor, ...]
    ) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], Tensor]:
        """Record the forward, reading from and writing to tensors that the graph keeps."""
        inputs = tuple(x.clone() for x in inputs)
        # Outside a graph first: libraries allocate their workspaces at the first call. It writes
        # into the cache what the replay will write again.
        forward(*inputs)
        graph = torch.cuda.CUDAGraph()
        with (
            collector_waiting(),
            casts_not_kept(),
            torch.cuda.graph(graph, pool=self._pool),
        ):
            states = forward(*inputs)
        self._pool = graph.pool()
        return graph, inputs, states

    def _refuse(
        self, error: Exception, forward: Callable[..., Tensor], inputs: tuple[Tensor, ...]
    ) -> Tensor:
        self._refused, self._graphs = True, {}
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        logger.warning(
            "%s cannot be recorded as a CUDA graph (%s): its steps are launched kernel by kernel",
            type(self._trunk).__name__,
            reason,
        )
        return forward(*inputs)


@contextmanager
def casts_not_kept() -> Iterator[None]:
    """Have autocast convert weights anew. It keeps what it has converted until the forward is over,
    and a graph must not read what is freed then, or was converted by another graph."""
    kept = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(kept)


@contextmanager
def collector_waiting() -> Iterator[None]:
    """Keep Python from collecting cycles meanwhile: a graph or an event that is freed while another
    graph is recorded ends the recording."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def fingerprint(module: nn.Module, known: list[Any]) -> list[Any]:
    """Append to `known` what a graph of this module depends on, and return it: its modules, the
    addresses of its weights, and the state of adapters that peft has put in."""
    # This runs at every step. It takes a quarter of the time that `parameters()` would.
    known.append(id(module))
    known += [weight.data_ptr() for weight in module._parameters.values() if weight is not None]
    if "_disable_adapters" in vars(module):
        layer: Any = module
        known.append((layer.disable_adapters, str(layer.active_adapters), *layer.merged_adapters))
    for part in module._modules.values():
        if part is not None:
            fingerprint(part, known)
    return known
