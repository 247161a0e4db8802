"""Layers whose activations are computed again in the backward pass instead of being kept
("gradient checkpointing", Chen et al. 2016, arXiv 1604.06174)."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tokenenv.errors import InvalidArgument


def layers_in(trunk: Any) -> list[nn.Module]:
    """Return the layers of a transformers trunk, from the lowest on; none of another model."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    modules = trunk.modules() if isinstance(trunk, nn.Module) else ()
    return [module for module in modules if isinstance(module, GradientCheckpointingLayer)]


def layers_of(trunk: Any) -> list[nn.Module]:
    """Return the layers of a transformers trunk that can be computed again, one by one.

    Raises:
        InvalidArgument: it has none.
    """
    layers = layers_in(trunk)
    if not layers:
        raise InvalidArgument(
            f"gradient_checkpointing=True needs a transformers model of layers that it can compute "
            f"again, and {type(trunk).__name__} has none; leave it at False."
        )
    return layers


@contextmanager
def replaced_forward(layer: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Have a layer call this in place of its forward, or of what already replaces that."""
    before = vars(layer).get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        if before is None:
            del layer.forward
        else:
            layer.forward = before


@contextmanager
def recomputing(trunk: Any) -> Iterator[None]:
    """Have each layer of a trunk keep only what it reads, in forwards that have gradients.

    transformers' own switch works in train mode alone, which has dropout; a policy stays in eval
    mode.
    """
    with ExitStack() as undo:
        for layer in layers_of(trunk) if torch.is_grad_enabled() else ():
            # In eval mode nothing is drawn at random, so no generator's state is kept.
            again = partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )
            undo.enter_context(replaced_forward(layer, again))
        yield
