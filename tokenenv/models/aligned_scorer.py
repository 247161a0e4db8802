"""Reward models with a tokenizer of their own, or that look ahead: they score finished texts only.

A finished text is decoded and read by the reward model in its own tokens. Its scores are shared
out over the policy's tokens by the characters they have in common (`alignment`). A reward model
that has the policy's tokens and looks only back is read prefix by prefix instead
(`prefix_scores`).
"""

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
    """Make a `TextScorer` of a reward model that reads the policy's texts in its own tokens.

    What the reward model reads is prompt and response as the policy's tokenizer decodes them
    together, without special tokens. The reward model's tokenizer adds its own, and special tokens
    that the text spells out are read as such.

    If the prompt is one of `chats` and the reward model's tokenizer has a chat template, the model
    reads the conversation as that template writes it, with the response as the assistant's answer.
    The end that the template puts to the answer stands for the policy's stop token. What an
    environment wrote into a response is read as a part of the answer.

    If a text is longer than the reward model's positions, its beginning is left out, with one
    warning. Response tokens there score 0.

    Args:
        model: a sequence- or token-classification model with one label, causal or not.
        tokenizer: the reward model's, a fast one.
        policy_tokenizer: the one that the token ids of texts belong to.
        chats: the conversations behind the policy's prompts.
        stop_token_ids: the policy's. An answer that ends in none of them is not closed.
        max_batch_tokens: tokens of one forward, the reward model's, padding included.

    Raises:
        ModelError: the tokenizer gives no character offsets or has more tokens than the model has
            embeddings, or the model gives no scalar scores.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{type(tokenizer).__name__} of the reward model gives no character offsets; allowed: "
            "fast tokenizers (those of the tokenizers library)"
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
    """A `TextScorer` that reads finished texts in the reward model's own tokens; see
    `make_aligned_scorer`."""

    model: Any
    """The reward model, in eval mode."""
    tokenizer: Any
    """The reward model's. It truncates on the left, so that the end of a text is kept."""
    policy_tokenizer: Any
    """The tokenizer that the token ids of texts belong to."""
    chats: Chats | None
    """The conversations behind prompts, where the model is to read them by its own template."""
    stop_token_ids: tuple[int, ...]
    """The policy's."""
    per_token: bool
    """True: the model scores tokens, and the score of a text is their sum. False: it scores texts
    as a whole."""
    max_tokens: int | None
    """The longest text that the model can read, in its own tokens; None: no limit."""
    max_batch_tokens: int
    """Tokens of one forward, the reward model's, padding included."""
    looks_ahead: bool = True
    """Always True: the score of a reward token is known when the whole token is there, which may be
    some policy tokens later."""
    warned: set[str] = field(default_factory=set)
    """The warnings that were given."""
    frames: dict[tuple[int, ...], Frame] = field(default_factory=dict)
    """What the model's template writes around the answer, by the tokens of the prompt."""

    def token_scores(self, texts: Sequence[TextIds], width: int) -> Tensor:
        """Return the score of each response token, whoever wrote it, (B, width) float32, zero to
        the right of each response.

        The score of a text as a whole goes to its last response token, and to the first place where
        the response is empty.
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
        """Decode a text to what the model is given."""
        frame, (decoded, ends) = self._frame(text[0]), self._decode(text)
        if frame is None:
            return _Reading(decoded, ends, False)
        # The answer begins where the prompt ends. `_decode` found that place only for models that
        # score tokens.
        if not self.per_token:
            prompt = self.policy_tokenizer.decode(text[0], skip_special_tokens=True)
            ends[0] = common_length(prompt, decoded)
        answer, complete = decoded[ends[0] :], bool(text[1]) and text[1][-1] in self.stop_token_ids
        # The ends of the policy's tokens move with the answer: from behind the decoded prompt to
        # behind the frame's beginning, less the spaces that the template strips there.
        left_out = len(answer) - len(answer.lstrip()) if frame.strips else 0
        whole, start = frame.fill(answer, complete), len(frame.before)
        ends = (start + ends - ends[0] - left_out).clip(start, len(frame.fill(answer, False)))
        # The last token, the stop token where there is one, also has what closes the answer.
        ends[-1] = len(whole)
        return _Reading(whole, ends, True)

    def _frame(self, prompt: list[int]) -> Frame | None:
        """Return what the model's template writes around the answer to a prompt; None where the
        model reads plain text."""
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
        """Return the whole text, and where in it the prompt and each response token end; only its
        own end where a model scores texts and nothing is aligned."""
        # Prompt and response are decoded together: alone, some tokenizers drop the space between
        # them.
        prompt, response = text
        if not self.per_token:
            prompt, response = [*prompt, *response], []
        decode = partial(self.policy_tokenizer.batch_decode, skip_special_tokens=True)
        return read_text(decode, prompt, response)

    def _encode(
        self, read: list["_Reading"]
    ) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        """Return the reward tokens of each text, and the first character and end of each token."""
        cut = {} if self.max_tokens is None else {"truncation": True, "max_length": self.max_tokens}
        ids: list[list[int]] = [[]] * len(read)
        offsets: list[list[tuple[int, int]]] = [[]] * len(read)
        # Two calls at most: templates write special tokens themselves, to plain text the tokenizer
        # adds them.
        for templated in {reading.templated for reading in read}:
            rows = [i for i, reading in enumerate(read) if reading.templated == templated]
            encoded = self.tokenizer(
                [read[i].text for i in rows],
                return_offsets_mapping=True,
                verbose=False,
                add_special_tokens=not templated,
                **cut,
            )
            for place, i in enumerate(rows):
                ids[i], offsets[i] = encoded["input_ids"][place], encoded["offset_mapping"][place]
            if any(one.overflowing for one in encoded.encodings):
                self._warn(
                    f"a text is longer than the {self.max_tokens} tokens that the reward model can "
                    "read; its beginning is left out, and response tokens there score 0"
                )
        return ids, offsets

    def _scores(self, ids: list[list[int]]) -> list[np.ndarray]:
        """Return the model's score of each reward token of each text, (R,) float32, or of each text
        as a whole, (1,). A text without tokens scores 0."""
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
        """Return the model's own logits, (b, R) or (b, 1), of b texts."""
        mask = np.arange(lengths.max()) < lengths[:, None]
        tokens = np.full(mask.shape, self._pad_id or 0)
        # A text may spell out a special token that the model has no embedding for.
        known = self.model.get_input_embeddings().num_embeddings
        tokens[mask] = np.concatenate(ids).clip(max=known - 1)
        takes_cache = "use_cache" in signature(self.model.forward).parameters
        logits = self.model(
            input_ids=torch.from_numpy(tokens).to(self.model.device),
            attention_mask=torch.from_numpy(mask.astype(np.int64)).to(self.model.device),
            **({"use_cache": False} if takes_cache else {}),
        ).logits
        return logits.float().reshape(len(ids), -1).cpu().numpy()

    @property
    def _pad_id(self) -> int | None:
        """The id by which the model itself finds a text's last token; None where it has none."""
        # Some configs say -1 where there is none, or name an added token that the model has no
        # embedding for.
        pad_id = self.model.config.get_text_config().pad_token_id
        known = self.model.get_input_embeddings().num_embeddings
        return pad_id if pad_id is not None and 0 <= pad_id < known else None

    @property
    def _budget(self) -> int:
        """The tokens of one forward."""
        # A model that scores texts but names no pad id cannot find the last token beside padding,
        # and transformers refuses more than one text at a time.
        return 1 if self._pad_id is None and not self.per_token else self.max_batch_tokens


@dataclass(frozen=True, slots=True)
class _Reading:
    """A text as the reward model is given it."""

    text: str
    ends: np.ndarray
    """(T + 1,) int64, where a model scores tokens: the characters of `text` at which the prompt and
    each of the policy's response tokens end (see `align`)."""
    templated: bool
    """Whether a chat template wrote it, special tokens included."""


def _scores_tokens(model: Any) -> bool:
    """Whether the model gives one score for each token, rather than one for each text."""
    with acting(model):
        output = model(input_ids=torch.tensor([[1, 2, 3]], device=model.device))
    logits = getattr(output, "logits", torch.zeros(0))
    if tuple(logits.shape) not in ((1, 3, 1), (1, 1)):
        raise ModelError(
            f"{type(model).__name__} gives logits {tuple(logits.shape)} for a text of 3 tokens; "
            "allowed: sequence- or token-classification models with one label"
        )
    return logits.ndim == 3


def _check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Raise `ModelError` where the tokenizer writes ids that the model has no embedding for: such
    an id ends a CUDA process."""
    special, size = set(tokenizer.all_special_ids), model.get_input_embeddings().num_embeddings
    # A special token that no text is given is often beyond the model's embeddings, and does no
    # harm. Those that every text is given are in the encoding of the empty text.
    common = [index for index in tokenizer.get_vocab().values() if index not in special]
    last = max([*common, *tokenizer("")["input_ids"]])
    if last >= size:
        raise ModelError(
            f"the reward model's tokenizer has ids up to {last} and {type(model).__name__} {size} "
            "embeddings; give the tokenizer it was trained with as reward_tokenizer="
        )


def _max_tokens(model: Any, tokenizer: Any) -> int | None:
    """Return the smallest of the model's positions and the tokenizer's own limit; None: no
    limit."""
    positions = max_positions(model.config.get_text_config())
    limits = [limit for limit in (positions, tokenizer.model_max_length) if limit is not None]
    # The RoBERTa family counts positions from behind the pad id, so its table holds fewer than it
    # has rows.
    for name, module in trunk_of(model).named_modules():
        is_table = name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
        if is_table and module.padding_idx is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    # Tokenizers without a limit say 10**30.
    return min(limits) if min(limits) < 2**31 else None
