"""Reward models that score finished texts only: those with a tokenizer of their own, and those that
look ahead."""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenenv.errors import ModelError
from tokenenv.types import TextIds

from .alignment import align, common_length, read_text
from .batching import micro_batches
from .cached_lm import acting, trunk_of
from .chats import Chats, Frame, frame_of
from .loading import max_positions


def make_aligned_scorer(
    model: Any,
    tokenizer: Any,
    policy_tokenizer: Any,
    *,
    chats: Chats | None = None,
    stop_token_ids: Sequence[int] = (),
    max_batch_tokens: int = 16384,
) -> "AlignedScorer":
    """A `TextScorer` that gives a reward model the policy's texts in the reward model's own tokens.

    The text is prompt and response as the policy's tokenizer decodes them together, without special
    tokens; the reward model's tokenizer adds its own, and reads those that the text spells out as
    what they are. Where the prompt is one of `chats` and the reward model's tokenizer has a chat
    template, the text is the conversation as that template writes it, the response being the
    assistant's; its closing stands for the policy's stop token. Of a text that is longer than the
    reward model's positions the beginning is left out, with one warning; response tokens there
    score 0.

    Args:
        model: a sequence- or token-classification model with one label; causal or not.
        tokenizer: the reward model's, a fast one.
        policy_tokenizer: the one that the token ids of texts belong to.
        chats: the conversations behind the policy's prompts.
        stop_token_ids: the policy's; a text that ends in none is not closed.
        max_batch_tokens: the largest forward, in the reward model's tokens with padding.

    Raises:
        ModelError: the tokenizer gives no offsets or has more tokens than the model, or the model
            gives no scalar scores.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{type(tokenizer).__name__} of the reward model gives no character offsets; allowed: "
            f"fast tokenizers "
            "(those of the tokenizers library)"
        )
    _check_vocabulary(model, tokenizer)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.truncation_side = "left"
    return AlignedScorer(
        model=model,
        tokenizer=tokenizer,
        policy_tokenizer=policy_tokenizer,
        chats=chats if getattr(tokenizer, "chat_template", None) else None,
        stop_token_ids=tuple(stop_token_ids),
        per_token=_scores_tokens(model),
        max_tokens=_max_tokens(model, tokenizer),
        max_batch_tokens=max_batch_tokens,
    )


@dataclass(slots=True, eq=False)
class AlignedScorer:
    """Scores finished texts in the reward model's own tokens; see `make_aligned_scorer`."""

    model: Any
    tokenizer: Any
    policy_tokenizer: Any
    chats: Chats | None
    """The conversations behind prompts, if the model is to read them by its own template."""
    stop_token_ids: tuple[int, ...]
    per_token: bool
    """Whether the model scores tokens (the score is their sum), or the text as a whole."""
    max_tokens: int | None
    """The longest text that the model can read, in its own tokens; None: no limit."""
    max_batch_tokens: int
    looks_ahead: bool = True
    """What a token of other tokens is worth is known when the whole of it is there."""
    warned: set[str] = field(default_factory=set)
    """What the user has been told."""
    frames: dict[tuple[int, ...], Frame] = field(default_factory=dict)
    """What the model's template writes around the answers to the prompts that were scored."""

    def token_scores(self, texts: Sequence[TextIds], width: int) -> Tensor:
        """(B, width) float32: the score of each of the policy's response tokens, zero to the right.

        Scores of reward tokens go to the policy's tokens by the characters they share (see
        `alignment`); a text's own score goes to its last token, and to the first place where the
        response is empty.
        """
        read = [self._read(text) for text in texts]
        ids, offsets = self._encode(read)
        out = np.zeros((len(texts), width), dtype=np.float32)
        for i, scores in enumerate(self._scores(ids)):
            if self.per_token:
                aligned = align(scores, offsets[i], read[i].ends)
                out[i, : len(aligned)] = aligned
            else:
                out[i, max(0, len(texts[i][1]) - 1)] = scores.item()
        return torch.from_numpy(out).to(self.model.device)

    def _read(self, text: TextIds) -> "_Reading":
        """What the model is given."""
        frame, (decoded, ends) = self._frame(text[0]), self._decode(text)
        if frame is None:
            return _Reading(decoded, ends, False)
        if not self.per_token:
            ends[0] = common_length(
                self.policy_tokenizer.decode(text[0], skip_special_tokens=True), decoded
            )
        answer, complete = decoded[ends[0] :], bool(text[1]) and text[1][-1] in self.stop_token_ids
        left_out = len(answer) - len(answer.lstrip()) if frame.strips else 0
        whole, start = frame.fill(answer, complete), len(frame.before)
        ends = (start + ends - ends[0] - left_out).clip(start, len(frame.fill(answer, False)))
        ends[-1] = len(whole)
        return _Reading(whole, ends, True)

    def _frame(self, prompt: list[int]) -> Frame | None:
        """What the model's template writes around the answer to a prompt, if it is to be written by
        that."""
        if self.chats is None:
            return None
        frame = self.frames.get(tuple(prompt))
        if frame is None:
            messages = self.chats.messages(prompt)
            if messages is None:
                self._warn(
                    "a prompt was given as token ids of no known conversation: the reward model "
                    "reads it as plain text"
                )
                return None
            frame = self.frames[tuple(prompt)] = frame_of(self.tokenizer, messages)
        return frame

    def _warn(self, message: str) -> None:
        if message not in self.warned:
            self.warned.add(message)
            warnings.warn(message, stacklevel=5)

    def _decode(self, text: TextIds) -> tuple[str, np.ndarray]:
        """The whole text, and where the prompt and each response token end; only its own end where
        nothing is aligned.

        Prompt and response are decoded together: alone, some tokenizers drop the space between
        them.
        """
        prompt, response = text
        if not self.per_token:
            prompt, response = [*prompt, *response], []
        return read_text(
            partial(self.policy_tokenizer.batch_decode, skip_special_tokens=True), prompt, response
        )

    def _encode(
        self, read: list["_Reading"]
    ) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        """The reward tokens of each text and their characters."""
        cut = {} if self.max_tokens is None else {"truncation": True, "max_length": self.max_tokens}
        ids: list[list[int]] = [[]] * len(read)
        offsets: list[list[tuple[int, int]]] = [[]] * len(read)
        for templated in {
            reading.templated for reading in read
        }:  # templates write special tokens themselves
            rows = [i for i, reading in enumerate(read) if reading.templated == templated]
            options = {
                "return_offsets_mapping": True,
                "verbose": False,
                "add_special_tokens": not templated,
                **cut,
            }
            encoded = self.tokenizer([read[i].text for i in rows], **options)
            for place, i in enumerate(rows):
                ids[i], offsets[i] = encoded["input_ids"][place], encoded["offset_mapping"][place]
            if any(one.overflowing for one in encoded.encodings):
                self._warn(
                    f"a text is longer than the {self.max_tokens} tokens that the reward model can "
                    f"read; its beginning is left "
                    "out, and response tokens there score 0"
                )
        return ids, offsets

    def _scores(self, ids: list[list[int]]) -> list[np.ndarray]:
        """The model's score of each of the tokens, (R,) float32, or of each text, (1,); 0 of a text
        without tokens."""
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
        known = (
            self.model.get_input_embeddings().num_embeddings
        )  # a text may spell out a special token that the model lacks
        tokens[mask] = np.concatenate(ids).clip(max=known - 1)
        options = (
            {"use_cache": False} if "use_cache" in signature(self.model.forward).parameters else {}
        )
        on_device = [
            torch.from_numpy(array).to(self.model.device)
            for array in (tokens, mask.astype(np.int64))
        ]
        logits = self.model(input_ids=on_device[0], attention_mask=on_device[1], **options).logits
        return logits.float().reshape(len(ids), -1).cpu().numpy()

    @property
    def _pad_id(self) -> int | None:
        """The id by which the model itself finds a text's last token; some configs say -1 where
        there is none, or name an added token that the model has no embedding for."""
        pad_id = self.model.config.get_text_config().pad_token_id
        known = self.model.get_input_embeddings().num_embeddings
        return pad_id if pad_id is not None and 0 <= pad_id < known else None

    @property
    def _budget(self) -> int:
        """Tokens of a forward. A model that scores texts but names no pad id takes one text at a
        time."""
        return 1 if self._pad_id is None and not self.per_token else self.max_batch_tokens


@dataclass(frozen=True, slots=True)
class _Reading:
    """A text as the reward model is given it."""

    text: str
    ends: np.ndarray
    """Where the prompt and each of the policy's response tokens end in it, of a model that scores
    tokens (see `align`)."""
    templated: bool
    """Whether a chat template wrote it, special tokens included."""


def _scores_tokens(model: Any) -> bool:
    """Whether the model gives one score a token, rather than one a text."""
    with acting(model):
        logits = getattr(
            model(input_ids=torch.tensor([[1, 2, 3]], device=model.device)),
            "logits",
            torch.zeros(0),
        )
    if tuple(logits.shape) not in ((1, 3, 1), (1, 1)):
        raise ModelError(
            f"{type(model).__name__} gives logits {tuple(logits.shape)} for a text of 3 tokens; "
            f"allowed: sequence- or "
            "token-classification models with one label"
        )
    return logits.ndim == 3


def _check_vocabulary(model: Any, tokenizer: Any) -> None:
    """An id that the model has no embedding for would end a CUDA process."""
    special, size = set(tokenizer.all_special_ids), model.get_input_embeddings().num_embeddings
    common = [index for index in tokenizer.get_vocab().values() if index not in special]
    last = max(
        [*common, *tokenizer("")["input_ids"]]
    )  # a special token that no text is given is often beyond the model's
    if last >= size:
        raise ModelError(
            f"the reward model's tokenizer has ids up to {last} and {type(model).__name__} {size} "
            f"embeddings; "
            "give the tokenizer it was trained with as reward_tokenizer="
        )


def _max_tokens(model: Any, tokenizer: Any) -> int | None:
    """The model's positions or the tokenizer's own limit, the smaller one."""
    positions = max_positions(model.config.get_text_config())
    limits = [limit for limit in (positions, tokenizer.model_max_length) if limit is not None]
    for name, module in trunk_of(
        model
    ).named_modules():  # the RoBERTa family counts positions from behind the pad id
        if (
            name.endswith("position_embeddings")
            and isinstance(module, nn.Embedding)
            and module.padding_idx is not None
        ):
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min(limits) if min(limits) < 2**31 else None
