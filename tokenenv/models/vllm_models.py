"""A reward model and a reference that vLLM runs, in this process or on a server: whole texts only.

vLLM reads no prefix cache for token rewards and prompt log-probs, so that a step would cost a
forward of the whole text.
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
        """One raw score for every token of each text."""
        ...

    def text_scores(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """One raw score (1,) for each text."""
        ...

    def prompt_logprobs(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """log p of every token of each text but its first."""
        ...


class VLLMRewardModel:
    """A causal reward model with the policy's tokens, as a `TextScorer`: finished texts are scored,
    prefixes are not.

    Args:
        backend: the URL of a vLLM server, or a `Backend`.
        per_token: whether it is a token-classification model, or a sequence-classification one;
            with one label.
        pad_token_id: of a sequence-classification model whose pad id is a stop id, which
            transformers reads at the token before its padding: tokens of this id at the end of a
                text are not sent. vLLM reads the last token it is sent.
    """

    looks_ahead = False

    def __init__(
        self, backend: str | Backend, *, per_token: bool = True, pad_token_id: int | None = None
    ) -> None:
        self.backend: Backend = VLLMServer(backend) if isinstance(backend, str) else backend
        self.per_token, self.pad_token_id = per_token, pad_token_id

    def token_scores(self, texts: Sequence[TextIds], width: int) -> Tensor:
        """(B, width) float32 on the CPU: see `TextScorer`."""
        whole, lengths = (
            [[*prompt, *response] for prompt, response in texts],
            [len(response) for _, response in texts],
        )
        if self.per_token:
            scores = self.backend.token_scores(whole)
        else:
            scores = self.backend.text_scores(
                [ids[: read_length(ids, self.pad_token_id)] for ids in whole]
            )
        out = np.zeros((len(texts), width), np.float32)
        for row, (values, length) in enumerate(zip(scores, lengths, strict=True)):
            if self.per_token:
                out[row, :length] = values[len(values) - length :]
            else:
                out[row, max(0, length - 1)] = values.item()
        return torch.from_numpy(out)


class VLLMReference:
    """pi_ref, as as much of a `TokenModel` as `score_episodes` asks for: stepping and features need
    a model in this process.

    A state here is log p of the token that comes next in the text, which is all that scoring reads
    of a reference.

    Args:
        backend: the URL of a vLLM server, or a `Backend`; it reads the policy's token ids.
    """

    def __init__(self, backend: str | Backend) -> None:
        self.backend: Backend = VLLMServer(backend) if isinstance(backend, str) else backend

    def states(self, tokens: Tensor, lengths: Sequence[int] | np.ndarray) -> Tensor:
        """(B, L): log p of the token after each, 0 from each text's last on."""
        rows = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
        out = np.zeros(tokens.shape, np.float32)
        for row, values in enumerate(self.backend.prompt_logprobs(rows)):
            out[row, : len(values)] = values
        return torch.from_numpy(out).to(tokens.device)

    def logprob(self, states: Tensor, tokens: Tensor) -> Tensor:
        """(K,): of the tokens that follow the states in their texts, and of no others."""
        return states

    def slots(self, num_slots: int, max_length: int) -> "WholeTextsOnly":
        """Rows that are for `states` alone."""
        return WholeTextsOnly(self)

    def head(self, states: Tensor) -> Tensor:
        """Refused: vLLM gives log-probs of the tokens of a text, not of the vocabulary."""
        raise InvalidArgument(NO_STEPS)


NO_STEPS = (
    "this reference is run by vLLM, on whole texts only: an env with it is for rollout='vllm' and "
    "score_episodes; stepping, "
    "features and full_kl_coef need a reference= in this process."
)


class WholeTextsOnly:
    """The rows of a model that cannot step."""

    def __init__(self, model: Any) -> None:
        self.states = model.states

    def prefill(self, slots: Slots, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Refused."""
        raise InvalidArgument(NO_STEPS)

    def append(self, tokens: Tensor, active: np.ndarray | None = None) -> Tensor:
        """Refused."""
        raise InvalidArgument(NO_STEPS)

    def fork(self, sources: Slots, targets: Slots) -> None:
        """Refused."""
        raise InvalidArgument(NO_STEPS)
