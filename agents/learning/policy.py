"""The policy: a language model with a value head.

Suffixes: B texts, L context, H hidden size, V vocabulary, K transitions.
"""

import copy
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenenv.agents.learning.recomputing import layers_of, recomputing
from tokenenv.models.adapters import adapter_layers, beside, train_adapters, with_lora
from tokenenv.models.saving import check_not_its_base, save_model, whole_folder
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

    It takes `model` over: the weights become float32 and trainable. With `lora_rank` it freezes the
    model, leaves it as it is and trains low-rank adapters (peft) in a copy that shares the weights;
    they keep their dtype, and the adapters are float32. If the model has adapters already, only the
    active ones are trained. A float16 model becomes float32 in each case. With `frozen` the model
    is left as it is. It stays in eval mode, so that acting and learning see the same distribution
    (no dropout). With `gradient_checkpointing` its layers keep what they read, and are computed
    again in the backward pass.

    Raises:
        InvalidArgument: `lora_rank` is given for a model that has adapters already, or those
            adapters are switched off or merged; or `gradient_checkpointing` for a model that is
            none of transformers.
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
        frozen: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.model = model = trainable(model, lora_rank, seed, frozen)
        self.vocab_size = vocab_size_of(model)
        self.max_batch_tokens = max_batch_tokens
        self.head = logits_head(model, self.vocab_size)
        self.value_trunk = copy_to_train(trunk_of(model)) if separate_value else None
        self.value_head = nn.Linear(hidden_size_of(model), 1, device=self.device)
        # A random critic would bias the first advantages. At zero, the first targets are the
        # returns themselves.
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            layers_of(trunk_of(model))  # says so where it has none
        self.uses_bfloat16 = wants_bfloat16(precision, self.device)
        self.eval()

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.model.parameters()).device

    @property
    def acts_with_values(self) -> bool:
        """Whether the states that tokens are drawn in give the critic's values as well, equal to
        those of a forward over the text up to float32's rounding."""
        return self.value_trunk is None and not self.uses_bfloat16

    def slots(self, num_slots: int, max_length: int) -> SlotModel:
        """Return a model of N running texts of at most `max_length` tokens, with a cache."""
        return slot_model(
            trunk_of(self.model), num_slots, max_length, max_batch_tokens=self.max_batch_tokens
        )

    def states(self, tokens_BL: Tensor, lengths: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the states (B, L, H) that the LM head reads at each token of right-padded texts,
        and those that the value head reads."""
        states_BLH = self.lm_states(tokens_BL, lengths)
        if self.value_trunk is None:
            return states_BLH, states_BLH
        return states_BLH, self.value_states(tokens_BL, lengths)

    def lm_states(self, tokens_BL: Tensor, lengths: np.ndarray) -> Tensor:
        """Return the first of `states` alone."""
        return self._read(trunk_of(self.model), tokens_BL, lengths)

    def value_states(self, tokens_BL: Tensor, lengths: np.ndarray) -> Tensor:
        """Return the second of `states` alone."""
        trunk = trunk_of(self.model) if self.value_trunk is None else self.value_trunk
        return self._read(trunk, tokens_BL, lengths)

    def _read(self, trunk: Any, tokens_BL: Tensor, lengths: np.ndarray) -> Tensor:
        with recomputing(trunk) if self.gradient_checkpointing else nullcontext():
            return text_states(trunk, tokens_BL, lengths)

    def value(self, states_KH: Tensor) -> Tensor:
        """Return the values (K,) float32 of value states, in reward."""
        # In full precision whatever the trunk runs in: returns are not rounded to bfloat16.
        with torch.autocast(self._autocast_type, enabled=False):
            return self.value_head(states_KH[:, : self.value_head.in_features].float())[:, 0]

    def autocast(self) -> AbstractContextManager:
        """Return the context in which forwards run, which sets their precision."""
        return torch.autocast(self._autocast_type, torch.bfloat16, enabled=self.uses_bfloat16)

    @property
    def _autocast_type(self) -> str:
        # torch has no autocast on the device "meta", where nothing is computed.
        return "cpu" if self.device.type == "meta" else self.device.type

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        merge: bool = False,
        tokenizer: Any = None,
        card: str | None = None,
    ) -> None:
        """Write a folder that transformers loads by itself or, under adapters, peft; the value head
        is not part of it.

        The folder appears whole or not at all. One that an earlier save wrote is replaced.

        Args:
            directory: a new or empty folder, or one that an earlier save wrote.
            merge: adds adapters to the weights that they adapt, and writes full weights.
            tokenizer: is written too, with its chat template.
            card: the text of the folder's README.md.

        Raises:
            InvalidArgument: the model is none of transformers, or `directory` holds other files, or
                the base of the adapter that is saved.
            RunFolderError: the folder cannot be written.
        """
        if not merge:
            check_not_its_base(self.model, directory)
        with whole_folder(directory) as folder:
            save_model(self.model, folder, merge=merge)
            if hasattr(tokenizer, "save_pretrained"):
                tokenizer.save_pretrained(folder)
            if card is not None:
                (folder / "README.md").write_text(card, encoding="utf-8")


def trainable(model: Any, lora_rank: int, seed: int, frozen: bool) -> Any:
    """Return what a policy trains of a model: nothing, new adapters beside it, its own adapters, or
    all of it in float32."""
    if frozen:
        return model.requires_grad_(False)
    if lora_rank:
        return with_lora(model, lora_rank, seed)
    if adapter_layers(model):
        train_adapters(model)
        return model
    return model.float().requires_grad_(True)


def copy_to_train(model: Any) -> Any:
    """Return a copy with weights of its own where a policy trains them. The weights beneath
    adapters are shared."""
    return beside(model) if adapter_layers(model) else copy.deepcopy(model)


def wants_bfloat16(precision: str, device: torch.device) -> bool:
    """Return whether forwards run in bfloat16 autocast; "auto" means on a GPU that has it."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bfloat16"
