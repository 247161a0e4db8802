"""CUDA graphs of a step: what a forward of one token per slot launches is recorded once, and
replayed at every step.

A step of N short rows is hundreds of small kernels. Launching them from Python takes many times
longer than running them; a replay launches them all at once.
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
    """A forward of one token for each of N slots on CUDA, with one graph for each length bucket.

    A graph holds the addresses of the weights and caches that it was recorded with, so it sees
    weights that are trained in place. There is another one for each precision of autocast, and all
    are recorded anew where the model has changed: other modules, weights at other addresses, an
    adapter that is switched on or off.

    Args:
        trunk: whose weights the forward reads.
        forward: maps tokens (N,) int64, their places (N, 1) int64 and a bucket to states (N, H). It
            may write to tensors that stay at their addresses, such as a cache.
    """

    def __init__(self, trunk: Any, forward: Callable[[Tensor, Tensor, int], Tensor]) -> None:
        self._trunk, self._forward = trunk, forward
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}
        self._recorded: list[Any] = []
        self._pool: Any = None
        self._refused = False

    def __call__(self, tokens: Tensor, places: Tensor, bucket: int) -> Tensor:
        """Return the states (N, H). They are overwritten by the next call."""
        if self._refused:
            return self._forward(tokens, places, bucket)
        what = fingerprint(self._trunk, [])
        if what != self._recorded:
            self._graphs, self._pool, self._recorded = {}, None, what
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = bucket, autocast
        if key not in self._graphs:
            try:
                self._graphs[key] = self._record(tokens, places, bucket)
            except torch.OutOfMemoryError:
                raise
            # What a foreign model does while it is recorded may raise anything.
            except Exception as error:
                return self._refuse(error, tokens, places, bucket)
        graph, its_tokens, its_places, states = self._graphs[key]
        its_tokens.copy_(tokens)
        its_places.copy_(places)
        graph.replay()
        return states

    def _record(
        self, tokens: Tensor, places: Tensor, bucket: int
    ) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]:
        """Record the forward, reading from and writing to tensors that the graph keeps."""
        tokens, places = tokens.clone(), places.clone()
        # Outside a graph first: libraries allocate their workspaces at the first call. It writes
        # into the cache what the replay will write again.
        self._forward(tokens, places, bucket)
        graph = torch.cuda.CUDAGraph()
        with collector_waiting(), torch.cuda.graph(graph, pool=self._pool):
            states = self._forward(tokens, places, bucket)
        self._pool = graph.pool()
        return graph, tokens, places, states

    def _refuse(self, error: Exception, tokens: Tensor, places: Tensor, bucket: int) -> Tensor:
        self._refused, self._graphs = True, {}
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        logger.warning(
            "%s cannot be recorded as a CUDA graph (%s): its steps are launched kernel by kernel",
            type(self._trunk).__name__,
            reason,
        )
        return self._forward(tokens, places, bucket)


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
