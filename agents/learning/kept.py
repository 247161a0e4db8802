"""States of a batch's texts that no step of an update changes. They are computed in its first
epoch, and kept for the others.

There are two kinds: the states of a frozen model (a reference, a teacher), and, where adapters are
in the upper layers alone, the states that the first adapted layer reads. The first costs H numbers
a response token, the second H a token of the texts.

Suffixes: B texts, L context, H hidden size, K response tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tokenenv.agents.learning.policy import LMPolicy
from tokenenv.agents.learning.recomputing import layers_in, replaced_forward
from tokenenv.models.batching import is_varlen
from tokenenv.models.probing import random_ids
from tokenenv.models.trunks import text_states, trunk_of

TOLERANCE = 1e-4
"""Share of their size by which states may differ where lower layers are skipped; more than rounding
is an architecture that hands its upper layers something else as well."""


class KeptStates:
    """The states of one batch, for one update of this policy."""

    def __init__(self, policy: Any) -> None:
        self._states: dict[tuple[Any, int], Tensor] = {}
        trunks = (
            (trunk_of(policy.model), policy.value_trunk) if isinstance(policy, LMPolicy) else ()
        )
        found = {trunk: frozen_layers(trunk) for trunk in trunks if trunk is not None}
        self._frozen = {trunk: layers for trunk, layers in found.items() if layers}

    def of(
        self, model: Any, rows: np.ndarray, counts: list[int], read: Callable[[], Tensor]
    ) -> Tensor:
        """Return the states (K, H) of a frozen model at the response tokens of the texts `rows`,
        each of which has as many as `counts` says; what was not kept yet is what `read` returns."""
        keys = [(model, row) for row in rows.tolist()]
        if not self._states.keys() >= set(keys):
            self._states |= dict(zip(keys, read().split(counts), strict=True))
        return torch.cat([self._states[key] for key in keys])

    @contextmanager
    def below(self, rows: np.ndarray, lengths: np.ndarray) -> Iterator[None]:
        """Have the forwards of the policy's trunks over the right-padded texts `rows` (B,), of
        these `lengths`, begin at the first layer that is trained, where the states that it reads
        are kept, and otherwise keep them."""
        with ExitStack() as undo:
            for trunk, layers in self._frozen.items():
                keys = [(trunk, row) for row in rows.tolist()]
                if self._states.keys() >= set(keys):
                    states_BLH = pad_sequence([self._states[key] for key in keys], True)
                    undo.enter_context(beginning_at(layers, states_BLH))
                else:
                    states = undo.enter_context(noting(layers[-1]))
                    undo.callback(self._keep, keys, states, lengths)
            yield

    def _keep(self, keys: list[Any], states: list[Tensor], lengths: np.ndarray) -> None:
        if states:  # an error may have come before them
            rows = zip(keys, states[0], lengths.tolist(), strict=True)
            self._states |= {key: row[:length].clone() for key, row, length in rows}


@contextmanager
def noting(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Give a list that the states which a layer reads are put into."""
    states: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, given: states.append(given[0].detach()))
    try:
        yield states
    finally:
        hook.remove()


@contextmanager
def beginning_at(layers: list[nn.Module], states_BLH: Tensor) -> Iterator[None]:
    """Have a forward through these layers begin at the last of them, with these states."""
    *lower, first = layers
    with ExitStack() as undo:
        hook = first.register_forward_pre_hook(lambda _, given: (states_BLH, *given[1:]))
        undo.callback(hook.remove)
        for layer in lower:
            undo.enter_context(replaced_forward(layer, lambda states, *_, **__: states))
        yield


def frozen_layers(trunk: Any) -> list[nn.Module]:
    """Return the layers of a trunk up to the first one that is trained. There are none where it is
    the lowest, where anything beside the layers is trained, or where a forward that begins there
    is not the same."""
    layers = layers_in(trunk)
    trained = [any(w.requires_grad for w in layer.parameters()) for layer in layers]
    if not any(trained[1:]) or trained[0] or trunk.training or is_varlen(trunk):
        return []
    inside = {id(weight) for layer in layers for weight in layer.parameters()}
    if any(weight.requires_grad and id(weight) not in inside for weight in trunk.parameters()):
        return []
    found = layers[: trained.index(True) + 1]
    return found if _begins_alike(trunk, found) else []


def _begins_alike(trunk: Any, layers: list[nn.Module]) -> bool:
    """Return whether two short texts have the same states where the lower layers are skipped."""
    tokens, lengths = random_ids(trunk, 2, 4), np.array([4, 4])
    try:
        with torch.no_grad():
            with noting(layers[-1]) as states:
                plain = text_states(trunk, tokens, lengths)
            with beginning_at(layers, states[0]):
                again = text_states(trunk, tokens, lengths)
    # Layers that are called in another way, or give more than states.
    except (AttributeError, IndexError, TypeError, ValueError):
        return False
    return bool((plain - again).abs().max() <= TOLERANCE * plain.abs().max())
