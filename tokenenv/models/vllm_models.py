"""A reward model and a reference that vLLM runs, in this process or on a server.

Both read whole texts only. vLLM reads no prefix cache for token rewards and prompt log-probs, so a
step would cost a forward of the whole text.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tokenenv.errors import InvalidArgument
from tokenenv.types import Slots, TextIds

from .prefix_scores import read_length
from .vllm_server import VLLMServer


class Backend(Protocol):
    """Where vLLM runs: `VLLMServer`, or `tokenenv.rollout.vllm.LocalVLLM` in this process."""

    def token_scores(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Return one raw score for every token of each text, (len(text),) float32."""
        ...

    def text_scores(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Return one raw score for each text, (1,) float32."""
        ...

    def prompt_logprobs(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Return log p of every token of each text except its first, (len(text) - 1,) float32."""
        ...


class VLLMRewardModel:
    """A causal reward model with one label and the policy's tokens, as a `TextScorer`: it scores
    finished texts, not prefixes.

    Args:
        backend: the URL of a vLLM server, or a `Backend`.
        per_token: True for a token-classification model, False for a sequence-classification one.
        pad_token_id: of a sequence-classification model: tokens of this id at the end of a text are
            not sent. Needed where the pad id is also a stop id, since vLLM reads a score at the
            last token that it is sent, and transformers at the token before the padding.
    """

    looks_ahead = False
    """The model is causal: the score of a token does not depend on later ones."""

    def __init__(
        self, backend: str | Backend, *, per_token: bool = True, pad_token_id: int | None = None
    ) -> None:
        self.backend: Backend = VLLMServer(backend) if isinstance(backend, str) else backend
        self.per_token, self.pad_token_id = per_token, pad_token_id

    def token_scores(self, texts: Sequence[TextIds], width: int) -> Tensor:
        """Return the scores (B, width) float32 on the CPU; see `TextScorer`."""
        whole = [[*prompt, *response] for prompt, response in texts]
        lengths = [len(response) for _, response in texts]
        if self.per_token:
            scores = self.backend.token_scores(whole)
        else:
            read = [ids[: read_length(ids, self.pad_token_id)] for ids in whole]
            scores = self.backend.text_scores(read)
        out = np.zeros((len(texts), width), np.float32)
        for row, (values, length) in enumerate(zip(scores, lengths, strict=True)):
            if self.per_token:
                out[row, :length] = values[len(values) - length :]
            else:
                out[row, max(0, length - 1)] = values.item()
        return torch.from_numpy(out)


class VLLMReference:
    """The reference policy, run by vLLM on whole texts: the part of a `TokenModel` that
    `score_episodes` asks for. Stepping and features need a model in this process.

    A state of this model is log p of the token that comes next in the text. That is all that
    scoring reads of a reference.

    Args:
        backend: the URL of a vLLM server, or a `Backend`; it reads the policy's token ids.
    """

    def __init__(self, backend: str | Backend) -> None:
        self.backend: Backend = VLLMServer(backend) if isinstance(backend, str) else backend

    def states(self, tokens: Tensor, lengths: Sequence[int] | np.ndarray) -> Tensor:
        """Return log p of the token that follows each token, (B, L) float32 in nats; 0 from the
        last token of each text on."""
        rows = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
        out = np.zeros(tokens.shape, np.float32)
        for row, values in enumerate(self.backend.prompt_logprobs(rows)):
            out[row, : len(values)] = values
        return torch.from_numpy(out).to(tokens.device)

    def logprob(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Return the log-probs (K,), which the states are. The `tokens` have to be those that
        follow the states in their texts."""
        return states

    def slots(self, num_slots: int, max_length: int) -> "WholeTextsOnly":
        """Make slots that refuse everything except `states`."""
        return WholeTextsOnly(self)

    def head(self, states: Tensor) -> Tensor:
        """Raise `InvalidArgument`: vLLM gives log-probs of the tokens of a text, not of the whole
        vocabulary."""
        raise InvalidArgument(NO_STEPS)


NO_STEPS = (
    "this reference is run by vLLM, on whole texts only: an env with it is for rollout='vllm' and "
    "score_episodes; stepping, features and full_kl_coef need a reference= in this process."
)


class WholeTextsOnly:
    """The slots of a model that cannot step."""

    def __init__(self, model: Any) -> None:
        self.states = model.states

    def prefill(self, slots: Slots, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Raise `InvalidArgument`."""
        raise InvalidArgument(NO_STEPS)

    def append(self, tokens: Tensor, active: np.ndarray | None = None) -> Tensor:
        """Raise `InvalidArgument`."""
        raise InvalidArgument(NO_STEPS)

    def extend(self, slots: Slots, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Raise `InvalidArgument`."""
        raise InvalidArgument(NO_STEPS)

    def fork(self, sources: Slots, targets: Slots) -> None:
        """Raise `InvalidArgument`."""
        raise InvalidArgument(NO_STEPS)
