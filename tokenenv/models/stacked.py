"""Models that are one base and adapters of their own: a token of all of them in one forward.

The rows of the models stand behind each other in one batch, so the weights of the base are read
once. Each adapter adds to its own model's rows alone. Suffixes: M models, N slots, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from tokenenv.types import Slots

from .adapters import adapter_layers, is_plain_lora, sharing
from .batching import upload
from .cached_lm import CachedLM
from .sharing import same_function


class AdaptedRows(nn.Module):
    """A layer of the base for the rows of M models, with the adapters that some of them have there.

    Args:
        base: the layer that all models share.
        adapters: peft's layers by the number of their model. Their weights, and which adapter is
            switched on, are looked up at each forward.
        num_models: M.
    """

    def __init__(self, base: nn.Module, adapters: dict[int, Any], num_models: int) -> None:
        super().__init__()
        self.base, self.num_models, self.numbers = base, num_models, list(adapters)
        self.adapters = nn.ModuleList(adapters.values())

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output (M N, ...) for `x` (M N, ...)."""
        out, size = self.base(x), len(x) // self.num_models
        for number, layer in zip(self.numbers, self.adapters, strict=True):
            rows = slice(number * size, (number + 1) * size)
            _add(layer, x[rows], out[rows])
        return out


def _add(layer: Any, x: Tensor, out: Tensor) -> None:
    """Add to `out` what a layer's active adapters make of `x`."""
    if layer.disable_adapters or layer.merged:
        return
    for name in layer.active_adapters:
        if name in layer.lora_A:
            down, up = layer.lora_A[name], layer.lora_B[name]
            out.add_(up(down(x.to(down.weight.dtype))), alpha=layer.scaling[name])


def share_base(one: Any, other: Any) -> bool:
    """Return whether two trunks of transformers are one base in memory, with or without adapters
    that add low-rank products to linear layers, and nothing else."""
    if one is other or type(one) is not type(other) or not isinstance(one, nn.Module):
        return False
    if not all(map(is_plain_lora, (*adapter_layers(one), *adapter_layers(other)))):
        return False
    one, other = _without_adapters(one), _without_adapters(other)
    return _parts(one) == _parts(other) and same_function(one, other)


def _parts(trunk: nn.Module) -> list[Any]:
    """What a trunk is made of: the class of each module, its hooks and the identity of its
    weights."""
    return [
        (name, type(module), [*module._forward_hooks, *module._forward_pre_hooks], weights)
        for name, module in trunk.named_modules()
        for weights in [[id(weight) for weight in module._parameters.values()]]
    ]


def _without_adapters(trunk: Any) -> Any:
    """Return a copy of a trunk's modules around the same weights, without peft's; where it has
    none, the trunk itself."""
    return _with_layers(trunk, {}) if adapter_layers(trunk) else trunk


def stacked(trunks: Sequence[Any]) -> Any:
    """Return one trunk for the rows of M trunks that share a base, in eval mode."""
    found: dict[str, dict[int, Any]] = {}
    for number, trunk in enumerate(trunks):
        for name, module in trunk.named_modules():
            if getattr(module, "adapter_layer_names", ()):
                found.setdefault(name, {})[number] = module
    return _with_layers(trunks[0], found, len(trunks))


def _with_layers(trunk: Any, adapters: dict[str, dict[int, Any]], num_models: int = 1) -> Any:
    """Return a copy of a trunk's modules around the same weights, in eval mode, with these adapters
    in place of its own."""
    tree = sharing(trunk, [*trunk.parameters(), *trunk.buffers()]).eval()
    own = [name for name, m in tree.named_modules() if getattr(m, "adapter_layer_names", ())]
    for name in {*own, *adapters}:
        parent, _, own_name = name.rpartition(".")
        layer = tree.get_submodule(name)
        base = layer.get_base_layer() if name in own else layer
        if name in adapters:
            base = AdaptedRows(base, adapters[name], num_models)
        setattr(tree.get_submodule(parent), own_name, base)
    return tree


def can_stack(model: Any) -> TypeGuard[CachedLM]:
    """Return whether running texts are of a kind that may be stacked: those of a model with a
    cache, which is not compiled."""
    slots: Any = model._slots if isinstance(model, CachedLM) else None
    return hasattr(slots, "write") and not slots.write.compiled


class ReadAlong:
    """A policy's running texts (a `SlotModel`), whose next token a `Stack` may have read already.

    What was read ahead counts as soon as the policy is given the same token. Any other token, text
    or weight makes it void, and the policy reads for itself.
    """

    def __init__(self, model: CachedLM) -> None:
        self.model = model
        self.asked = True
        """Whether the policy has read anything since a token was last read along. If not, somebody
        else is acting, and nothing is read in vain."""
        self._ahead: _Ahead | None = None
        # Those made in inference mode are not counted, and cannot be trained.
        self._weights = [w for w in model.trunk.parameters() if not w.is_inference()]

    @property
    def positions(self) -> np.ndarray:
        """(N,) how many tokens each slot holds."""
        return self.model.positions

    @property
    def cache_bytes(self) -> int:
        """The memory that the slots take, in bytes."""
        return self.model.cache_bytes

    def moving(self, tokens: Tensor, active: np.ndarray) -> np.ndarray:
        """Return the slots (N,) bool that can take a token."""
        return self.model.moving(tokens, active & (self.positions < self.model.max_length))

    def take(self, tokens: Tensor, moving: np.ndarray, states: Tensor) -> None:
        """Keep the states (N, H) after tokens (N,), which have been read in the slots that are
        `moving` (N,)."""
        # The positions stay. A token that is not counted is overwritten by the next one.
        self.asked, self._ahead = False, _Ahead(tokens, moving, states, self._versions())

    def append(self, tokens: Tensor, active: np.ndarray | None = None) -> Tensor:
        """Add one token to each active slot; see `SlotModel`."""
        self.asked, ahead, self._ahead = True, self._ahead, None
        if ahead is None or ahead.versions != self._versions():
            return self.model.append(tokens, active)
        moving = self.model.moving(tokens, active)
        if not ahead.holds(tokens, moving):
            return self.model.append(tokens, active)
        self.model.positions += moving
        return ahead.states

    def prefill(self, slots: Slots, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Restart some slots; see `SlotModel`."""
        self._void(slots)
        return self.model.prefill(slots, tokens, lengths)

    def extend(self, slots: Slots, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Add several tokens to some slots; see `SlotModel`."""
        self._void(slots)
        return self.model.extend(slots, tokens, lengths)

    def fork(self, sources: Slots, targets: Slots) -> None:
        """Copy slots; see `SlotModel`."""
        self._void(targets)
        self.model.fork(sources, targets)

    def states(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Read whole texts; see `SlotModel`."""
        return self.model.states(tokens, lengths)

    def _void(self, slots: Slots) -> None:
        self.asked = True
        if self._ahead is not None:
            self._ahead.moving[np.asarray(slots)] = False

    def _versions(self) -> list[int]:
        """torch counts the changes of each weight."""
        return [weight._version for weight in self._weights]


@dataclass(slots=True)
class _Ahead:
    """What was read ahead."""

    tokens: Tensor
    moving: np.ndarray
    states: Tensor
    versions: list[int]

    def holds(self, tokens: Tensor, moving: np.ndarray) -> bool:
        """Whether these tokens (N,) have been read in all slots that are `moving` (N,)."""
        if (moving & ~self.moving).any():
            return False
        same = tokens.to(self.tokens.device) == self.tokens
        return bool((same | upload(~moving, same.device)).all())


class Stack:
    """Running texts of several models that share a base, which read a token in one forward.

    The models keep their slots, and can be used one by one at any time: their caches become parts
    of one memory.

    Args:
        models: with as many slots, of as many tokens.
        along: the texts of a policy with the same base, whose tokens are read along.
    """

    def __init__(self, models: Sequence[CachedLM], along: ReadAlong | None = None) -> None:
        from .slot_cache import joined  # takes transformers along

        self.models, self.along = list(models), along
        everyone = [*models, *([along.model] if along else [])]
        slots: list[Any] = [model._slots for model in everyone]
        self._slots = joined(stacked([model.trunk for model in everyone]), slots)

    def part(self) -> None:
        """Give each model memory of its own again, so that nothing is kept for those that leave."""
        from .slot_cache import joined

        for model in self.models:
            slots: Any = model._slots
            joined(model.trunk, [slots])

    def append(self, tokens: Tensor, active: np.ndarray) -> dict[Any, Tensor]:
        """Add one token (N,) to the slots that are `active` (N,) in all models. Return the states
        (N, H) after it, by trunk."""
        if self.along and not self.along.asked:
            return {model.trunk: model.append(tokens, active) for model in self.models}
        everyone: list[Any] = [*self.models, *([self.along] if self.along else [])]
        moving = [one.moving(tokens, active) for one in everyone]
        positions = np.concatenate([one.positions for one in everyone])
        ids = self.models[0].known_ids(tokens).repeat(len(everyone))
        with torch.no_grad():
            states = self._slots.append(ids, positions, np.concatenate(moving))
        by_model = states.chunk(len(everyone))
        for model, moved in zip(self.models, moving, strict=False):
            model.positions += moved
        if self.along:
            self.along.take(tokens, moving[-1], by_model[-1])
        return {m.trunk: found for m, found in zip(self.models, by_model, strict=False)}


def stacks_of(models: Sequence[Any], along: ReadAlong | None = None) -> list[Stack]:
    """Return a stack of all models that share a base, for each base that two or more have, those
    that are read `along` included. Other models are left out."""
    left, found = [model for model in models if can_stack(model)], []
    while left:
        first = left[0].trunk
        alike = [model for model in left if model is left[0] or share_base(first, model.trunk)]
        left = [model for model in left if model not in alike]
        its = along if along and share_base(first, along.model.trunk) else None
        if len(alike) > 1 or its:
            found.append(Stack(alike, its))
    return found
