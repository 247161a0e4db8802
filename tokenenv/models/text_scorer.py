"""Reward models that score finished texts only: those with a tokenizer of their own, and those that look ahead."""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenenv.errors import ModelError
from tokenenv.types import TextIds

from .alignment import align, read_text
from .batching import micro_batches
from .cached_lm import acting, trunk_of
from .loading import max_positions


def make_text_scorer(model: Any, tokenizer: Any, policy_tokenizer: Any, *, max_batch_tokens: int = 16384) -> "AlignedScorer":
    """A `TextScorer` that gives a reward model the policy's texts in the reward model's own tokens.

    The text is prompt and response as the policy's tokenizer decodes them together, without special tokens; the reward
    model's tokenizer adds its own, and reads those that the text spells out as what they are. Of a text that is longer than
    the reward model's positions the beginning is left out, with one warning; response tokens there score 0.

    Args:
        model: a sequence- or token-classification model with one label; causal or not.
        tokenizer: the reward model's, a fast one.
        policy_tokenizer: the one that the token ids of texts belong to.
        max_batch_tokens: the largest forward, in the reward model's tokens with padding.

    Raises:
        ModelError: the tokenizer gives no offsets or has more tokens than the model, or the model gives no scalar scores.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{type(tokenizer).__name__} of the reward model gives no character offsets; allowed: fast tokenizers "
            "(those of the tokenizers library)"
        )
    _check_vocabulary(model, tokenizer)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.truncation_side = "left"
    return AlignedScorer(
        model=model,
        tokenizer=tokenizer,
        policy_tokenizer=policy_tokenizer,
        per_token=_scores_tokens(model),
        max_tokens=_max_tokens(model, tokenizer),
        max_batch_tokens=max_batch_tokens,
    )


@dataclass(slots=True, eq=False)
class AlignedScorer:
    """Scores finished texts in the reward model's own tokens; see `make_text_scorer`."""

    model: Any
    tokenizer: Any
    policy_tokenizer: Any
    per_token: bool
    """Whether the model scores tokens (the score is their sum), or the text as a whole."""
    max_tokens: int | None
    """The longest text that the model can read, in its own tokens; None: no limit."""
    max_batch_tokens: int
    looks_ahead: bool = True
    """What a token of other tokens is worth is known when the whole of it is there."""
    warned: bool = False
    """Whether the user knows that texts are cut."""

    def token_scores(self, texts: Sequence[TextIds], width: int) -> Tensor:
        """(B, width) float32: the score of each of the policy's response tokens, zero to the right.

        Scores of reward tokens go to the policy's tokens by the characters they share (see `alignment`); a text's own
        score goes to its last token, and to the first place where the response is empty.
        """
        decoded = [self._decode(text) for text in texts]
        ids, offsets = self._encode([text for text, _ in decoded])
        out = np.zeros((len(texts), width), dtype=np.float32)
        for i, scores in enumerate(self._scores(ids)):
            if self.per_token:
                aligned = align(scores, offsets[i], decoded[i][1])
                out[i, : len(aligned)] = aligned
            else:
                out[i, max(0, len(texts[i][1]) - 1)] = scores.item()
        return torch.from_numpy(out).to(self.model.device)

    def _decode(self, text: TextIds) -> tuple[str, np.ndarray]:
        """The whole text, and where the prompt and each response token end; only its own end where nothing is aligned.

        Prompt and response are decoded together: alone, some tokenizers drop the space between them.
        """
        prompt, response = text
        if not self.per_token:
            prompt, response = [*prompt, *response], []
        return read_text(partial(self.policy_tokenizer.batch_decode, skip_special_tokens=True), prompt, response)

    def _encode(self, texts: list[str]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        """The reward tokens of each text and their characters."""
        cut = {} if self.max_tokens is None else {"truncation": True, "max_length": self.max_tokens}
        encoded = self.tokenizer(texts, return_offsets_mapping=True, verbose=False, **cut)
        if not self.warned and any(one.overflowing for one in encoded.encodings):
            self.warned = True
            warnings.warn(
                f"a text is longer than the {self.max_tokens} tokens that the reward model can read; its beginning is left "
                "out, and response tokens there score 0",
                stacklevel=4,
            )
        return encoded["input_ids"], encoded["offset_mapping"]

    def _scores(self, ids: list[list[int]]) -> list[np.ndarray]:
        """The model's score of each of the tokens, (R,) float32, or of each text, (1,); 0 of a text without tokens."""
        lengths = np.array([len(text) for text in ids])
        scores = [np.zeros(0 if self.per_token else 1, dtype=np.float32)] * len(ids)
        with acting(self.model):
            for group in micro_batches(lengths, self._budget):
                rows = group[lengths[group] > 0]
                if len(rows):
                    logits = self._forward([ids[i] for i in rows], lengths[rows])
                    for i, row in zip(rows, logits, strict=True):
                        scores[i] = row[: lengths[i]]
        return scores

    def _forward(self, ids: list[list[int]], lengths: np.ndarray) -> np.ndarray:
        """The model's own logits (b, R) or (b, 1) of right-padded texts."""
        mask = np.arange(lengths.max()) < lengths[:, None]
        tokens = np.full(mask.shape, self._pad_id or 0)
        known = self.model.get_input_embeddings().num_embeddings  # a text may spell out a special token that the model lacks
        tokens[mask] = np.concatenate(ids).clip(max=known - 1)
        options = {"use_cache": False} if "use_cache" in signature(self.model.forward).parameters else {}
        on_device = [torch.from_numpy(array).to(self.model.device) for array in (tokens, mask.astype(np.int64))]
        logits = self.model(input_ids=on_device[0], attention_mask=on_device[1], **options).logits
        return logits.float().reshape(len(ids), -1).cpu().numpy()

    @property
    def _pad_id(self) -> int | None:
        """The id by which the model itself finds a text's last token; some configs say -1 where there is none."""
        pad_id = self.model.config.get_text_config().pad_token_id
        return None if pad_id is None or pad_id < 0 else pad_id

    @property
    def _budget(self) -> int:
        """Tokens of a forward. A model that scores texts but names no pad id takes one text at a time."""
        return 1 if self._pad_id is None and not self.per_token else self.max_batch_tokens


def _scores_tokens(model: Any) -> bool:
    """Whether the model gives one score a token, rather than one a text."""
    with acting(model):
        logits = getattr(model(input_ids=torch.tensor([[1, 2, 3]], device=model.device)), "logits", torch.zeros(0))
    if tuple(logits.shape) not in ((1, 3, 1), (1, 1)):
        raise ModelError(
            f"{type(model).__name__} gives logits {tuple(logits.shape)} for a text of 3 tokens; allowed: sequence- or "
            "token-classification models with one label"
        )
    return logits.ndim == 3


def _check_vocabulary(model: Any, tokenizer: Any) -> None:
    """An id that the model has no embedding for would end a CUDA process."""
    special, size = set(tokenizer.all_special_ids), model.get_input_embeddings().num_embeddings
    common = [index for index in tokenizer.get_vocab().values() if index not in special]
    last = max([*common, *tokenizer("")["input_ids"]])  # a special token that no text is given is often beyond the model's
    if last >= size:
        raise ModelError(
            f"the reward model's tokenizer has ids up to {last} and {type(model).__name__} {size} embeddings; "
            "give the tokenizer it was trained with as reward_tokenizer="
        )


def _max_tokens(model: Any, tokenizer: Any) -> int | None:
    """The model's positions or the tokenizer's own limit, the smaller one."""
    positions = max_positions(model.config.get_text_config())
    limits = [limit for limit in (positions, tokenizer.model_max_length) if limit is not None]
    for name, module in trunk_of(model).named_modules():  # the RoBERTa family counts positions from behind the pad id
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min(limits) if min(limits) < 2**31 else None
