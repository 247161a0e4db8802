"""The policy: a language model with a value head.

Suffixes: B texts, L context, H hidden size, V vocabulary, K transitions.
"""

import copy
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenenv.errors import InvalidArgument, MissingDependency
from tokenenv.models.adapters import adapter_layers, train_adapters
from tokenenv.models.trunks import (
    hidden_size_of,
    logits_head,
    slot_model,
    text_states,
    trunk_of,
    vocab_size_of,
)
from tokenenv.types import SlotModel


class LMPolicy(nn.Module):
    """A causal LM (of transformers, or a `TokenModel`) that acts, with a value head that reads the
    LM's states or those of a trunk of its own.

    It takes `model` over: the weights become float32 and trainable. With `lora_rank` they are
    frozen beneath trainable low-rank adapters (peft). If the model has adapters already, only the
    active ones are trained. The model stays in eval mode, so that acting and learning see the same
    distribution (no dropout).

    Raises:
        InvalidArgument: `lora_rank` is given for a model that has adapters already, or those
            adapters are switched off or merged.
    """

    def __init__(
        self,
        model: Any,
        *,
        separate_value: bool = False,
        lora_rank: int = 0,
        precision: str = "auto",
        max_batch_tokens: int = 16384,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model.float().requires_grad_(True)
        if lora_rank:
            add_lora(self.model, lora_rank, seed)
        elif adapter_layers(model):
            train_adapters(self.model)
        self.vocab_size = vocab_size_of(model)
        self.max_batch_tokens = max_batch_tokens
        self.head = logits_head(model, self.vocab_size)
        self.value_trunk = copy.deepcopy(trunk_of(model)) if separate_value else None
        self.value_head = nn.Linear(hidden_size_of(model), 1, device=self.device)
        # A random critic would bias the first advantages. At zero, the first targets are the
        # returns themselves.
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.uses_bfloat16 = wants_bfloat16(precision, self.device)
        self.eval()

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.model.parameters()).device

    def slots(self, num_slots: int, max_length: int) -> SlotModel:
        """Return a model of N running texts of at most `max_length` tokens, with a cache."""
        return slot_model(
            trunk_of(self.model), num_slots, max_length, max_batch_tokens=self.max_batch_tokens
        )

    def states(self, tokens_BL: Tensor, lengths: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the states (B, L, H) that the LM head reads at each token of right-padded texts,
        and those that the value head reads."""
        states_BLH = text_states(self.model, tokens_BL, lengths)
        if self.value_trunk is None:
            return states_BLH, states_BLH
        return states_BLH, text_states(self.value_trunk, tokens_BL, lengths)

    def value(self, states_KH: Tensor) -> Tensor:
        """Return the values (K,) float32 of value states, in reward."""
        # In full precision whatever the trunk runs in: returns are not rounded to bfloat16.
        with torch.autocast(self.device.type, enabled=False):
            return self.value_head(states_KH[:, : self.value_head.in_features].float())[:, 0]

    def autocast(self) -> AbstractContextManager:
        """Return the context in which forwards run, which sets their precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.uses_bfloat16)


def wants_bfloat16(precision: str, device: torch.device) -> bool:
    """Return whether forwards run in bfloat16 autocast; "auto" means on a GPU that has it."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bfloat16"


def add_lora(model: Any, rank: int, seed: int) -> None:
    """Freeze the model and put trainable adapters of this rank (scale 2) beside all linear layers
    but the output."""
    name = type(model).__name__
    if hasattr(model, "slots"):
        raise InvalidArgument(f"lora_rank={rank} needs a transformers model, not {name}.")
    if adapter_layers(model):
        raise InvalidArgument(
            f"lora_rank={rank}: {name} has an adapter already. To train it leave lora_rank at 0; "
            "for a new one give a model that it is merged into (model.merge_and_unload())."
        )
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingDependency("lora_rank needs peft: pip install 'tokenenv-rl[lora]'") from error
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    # The adapters' first weights come from the seed alone; torch's own stream goes on untouched.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
