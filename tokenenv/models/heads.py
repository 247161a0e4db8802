"""What is read from a causal model's states: next-token logits, scores, log-probs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from tokenenv.errors import ModelError
from tokenenv.types import Head, Scorer

from .adapters import unwrapped
from .batching import hidden_states
from .cached_lm import acting, evaluating, trunk_of
from .probing import looks_ahead

CHUNK = 512
"""Tokens whose logits are held at once: 0.3 GB in float32 at V = 150,000."""
UNKNOWN = "computes its logits in a way that is not known here"


# Heads are objects rather than functions, so that a copy or a pickle of what holds them reads its
# own model.
@dataclass(frozen=True, slots=True, eq=False)
class LMHead:
    """States (K, H) to float32 logits (K, V); see `lm_head`."""

    linear: Any
    scale: float
    cap: float | None
    vocab_size: int | None = None

    def __call__(self, states: Tensor) -> Tensor:
        """The logits (K, V)."""
        logits = self.linear(states).float()
        if self.scale != 1:
            logits = logits * self.scale
        if self.cap:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits if self.vocab_size is None else self._resized(logits, self.vocab_size)

    def _resized(self, logits: Tensor, vocab_size: int) -> Tensor:
        missing = vocab_size - logits.shape[-1]
        return (
            pad(logits, (0, missing), value=-torch.inf) if missing > 0 else logits[:, :vocab_size]
        )


@dataclass(frozen=True, slots=True, eq=False)
class ScoreHead:
    """States (K, H) to float32 scores (K,); see `score_head`."""

    linear: Any

    def __call__(self, states: Tensor) -> Tensor:
        """The scores (K,)."""
        with evaluating(self.linear):  # some heads are more than a layer, with dropout
            return self.linear(states).float().squeeze(-1)


def lm_head(model: Any, vocab_size: int | None = None) -> Head:
    """The model's map from states (K, H) to float32 logits (K, V), final soft-capping and scaling
    included.

    With `vocab_size` V is that: ids beyond a smaller model's are -inf, those beyond V are cut off.

    Raises:
        ModelError: the model has no such head, it looks ahead, or its logits are not a function of
            the last hidden states we know.
    """
    linear = unwrapped(model).get_output_embeddings()
    if linear is None:
        raise ModelError(
            f"{_name(model)} has no language-model head; allowed: causal language models"
        )
    if looks_ahead(model):
        raise ModelError(
            f"{_name(model)} looks ahead: later tokens change what it says of earlier ones; "
            f"allowed: causal language models"
        )
    head = LMHead(linear, *_logit_options(model.config.get_text_config()))
    _check_head(model, head, lambda logits: logits[0])
    return replace(head, vocab_size=vocab_size)


def score_head(model: Any) -> Head:
    """A reward model's map from states (K, H) to float32 scores (K,).

    Raises:
        ModelError: not a sequence- or token-classification model with one label.
    """
    return make_scorer(model).head


def make_scorer(model: Any) -> Scorer:
    """A sequence- or token-classification model with one label as a `Scorer`; errors as
    `score_head`."""
    base = unwrapped(model)
    linear = getattr(base, "score", None) or getattr(base, "classifier", None)
    if linear is None or model.config.num_labels != 1:
        labels = "no scalar head" if linear is None else f"{model.config.num_labels} labels"
        raise ModelError(
            f"{_name(model)} has {labels}; allowed: sequence- or token-classification models with "
            f"one label"
        )

    head = ScoreHead(linear)
    per_token = _check_head(model, head, lambda logits: logits.flatten())
    pad_token_id = None if per_token else _passed_over(model, head)
    return Scorer(model=trunk_of(model), head=head, per_token=per_token, pad_token_id=pad_token_id)


def token_logprobs(
    states: Tensor, tokens: Tensor, head: Head, *, temperature: float = 1.0, chunk: int = CHUNK
) -> Tensor:
    """log p(token | state), (K,) float32, of `tokens` (K,) under `states` (K, H), with logits
    divided by `temperature`.

    Logits of `chunk` tokens at a time: (K, V) exists neither in the forward nor in the backward.
    """

    def logprobs(states: Tensor, tokens: Tensor) -> Tensor:
        logits = head(states)
        if temperature != 1:
            logits = logits / temperature
        return logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)

    return in_chunks(logprobs, states, tokens, chunk=chunk)


def in_chunks(function: Callable[..., Tensor], *columns: Tensor, chunk: int = CHUNK) -> Tensor:
    """`function(*columns)` computed `chunk` rows at a time; what it makes is freed, and made again
    in the backward."""
    parts = zip(*(column.split(chunk) for column in columns), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([function(*part) for part in parts])
    return torch.cat(
        [
            checkpoint(function, *part, use_reentrant=False, preserve_rng_state=False)
            for part in parts
        ]
    )


def _name(model: Any) -> str:
    return f"{type(model).__name__} ({model.config.name_or_path or 'built in memory'})"


def _logit_options(config: Any) -> tuple[float, float | None]:
    """Factor and soft cap: `logit_scale` (Cohere), `logits_scaling` (Granite),
    `final_logit_softcapping` (Gemma)."""
    scale = (getattr(config, "logit_scale", None) or 1.0) / (
        getattr(config, "logits_scaling", None) or 1.0
    )
    return scale, getattr(config, "final_logit_softcapping", None)


def _check_head(model: Any, head: Head, select: Callable[[Tensor], Tensor]) -> bool:
    """Compares `head` on the states of a few tokens with the model's own logits; returns whether
    there is one logit row per token (rather than one per text)."""
    trunk, ids = trunk_of(model), _three_tokens(model)
    tokens = torch.tensor([ids], device=trunk.device)
    with acting(model):
        logits = model(input_ids=tokens, use_cache=False).logits
        if not _agree(head, hidden_states(trunk, tokens, [len(ids)])[0], select(logits).float()):
            of_peft = (
                ""
                if unwrapped(model) is model
                else ": of peft's methods, learned prompts cannot be used, LoRA can"
            )
            raise ModelError(f"{_name(model)} {UNKNOWN}{of_peft}")
    return logits.ndim == 3


def _three_tokens(model: Any) -> list[int]:
    """Ids other than the pad id."""
    pad_id = _pad_id(model)
    return [token for token in range(model.config.get_text_config().vocab_size) if token != pad_id][
        1:4
    ]


def _pad_id(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "pad_token_id", None)


def _passed_over(model: Any, head: Head) -> int | None:
    """The pad id of a model that scores texts, if it reads a text that ends in it at the token
    before, as transformers' own classifiers do; None if it reads every text at its last token.
    Other models' code is asked, not believed."""
    pad_id, trunk = _pad_id(model), trunk_of(model)
    if pad_id is None or not 0 <= pad_id < trunk.get_input_embeddings().num_embeddings:
        return None
    tokens = torch.tensor([[*_three_tokens(model), pad_id, pad_id]], device=trunk.device)
    with acting(model):
        score = model(input_ids=tokens, use_cache=False).logits.flatten().float()
        states = hidden_states(trunk, tokens, [tokens.shape[1]])[0]
        if _agree(head, states[:-2], score):
            return pad_id
        if _agree(head, states, score):
            return None
    raise ModelError(f"{_name(model)} {UNKNOWN}")


def _agree(head: Head, states: Tensor, expected: Tensor) -> bool:
    """Whether `head` gives `expected` on the last states."""
    tolerance = 1e-4 if states.dtype == torch.float32 else 5e-2
    try:
        actual = head(states)[-len(expected) :]
    except RuntimeError:  # states of another size than the head reads
        return False
    return actual.shape == expected.shape and torch.allclose(
        actual, expected, rtol=tolerance, atol=tolerance
    )
