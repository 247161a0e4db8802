"""Heads: what is read from a causal model's states, as next-token logits, log-probs and scores."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from tokenenv.errors import ModelError
from tokenenv.types import Head, Scorer

from .adapters import unwrapped
from .batching import hidden_states, vocabulary_blocks
from .cached_lm import acting, evaluating, trunk_of
from .probing import looks_ahead

CHUNK = 512
"""Tokens whose logits are held at once: 0.3 GB in float32 at V = 150,000."""
LARGE_WEIGHT = 2**22
"""Elements of a weight from which on oneDNN is faster on a CPU: V = 7,000 at H = 576."""
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
UNKNOWN = "computes its logits in a way that is not known here"


# Heads are objects rather than closures: a copy or a pickle of what holds a head then reads its own
# model, not the original's.
@dataclass(frozen=True, slots=True, eq=False)
class LMHead:
    """The map from states (K, H) to float32 logits (K, V); see `lm_head`."""

    linear: Any
    """The model's output layer."""
    scale: float
    """The logits are multiplied by it."""
    cap: float | None
    """The soft cap of the logits; None: not capped."""
    vocab_size: int | None = None
    """V, where it is not the model's own."""

    def __call__(self, states: Tensor) -> Tensor:
        """Return the logits (K, V) float32 of `states` (K, H)."""
        return self.after(vocabulary_product(self.linear, states))

    def after(self, outputs: Tensor) -> Tensor:
        """Return the logits (K, V) float32 that the model makes of its output layer's outputs; the
        outputs themselves where it changes nothing."""
        logits = outputs.float()
        if self.scale != 1:
            logits = logits * self.scale
        if self.cap:
            logits = torch.tanh(logits / self.cap) * self.cap
        if self.vocab_size is None or self.vocab_size == logits.shape[-1]:
            return logits
        return self._resized(logits, self.vocab_size)

    def _resized(self, logits: Tensor, vocab_size: int) -> Tensor:
        missing = vocab_size - logits.shape[-1]
        if missing > 0:
            return pad(logits, (0, missing), value=-torch.inf)
        return logits[:, :vocab_size]


@dataclass(frozen=True, slots=True, eq=False)
class ScoreHead:
    """The map from states (K, H) to float32 scores (K,); see `score_head`."""

    linear: Any
    """The model's scalar output layer, or layers."""
    dtype: torch.dtype | None = None
    """The dtype in which states are read; None: their own."""

    def __call__(self, states: Tensor) -> Tensor:
        """Return the scores (K,) float32 of `states` (K, H)."""
        states = states if self.dtype is None else states.to(self.dtype)
        # Some heads are more than one layer, with dropout between them.
        with evaluating(self.linear):
            return self.linear(states).float().squeeze(-1)


def vocabulary_product(linear: Any, states: Tensor) -> Tensor:
    """Return `linear(states)`, (K, V) of states (K, H).

    On a CPU, and without gradients, oneDNN multiplies with a large float32 weight where it lies.
    torch's own product first copies all of it into another order, at every call, which for the
    few states of a step takes longer than the multiplication.
    """
    if not _read_in_place(linear, states):
        return linear(states)
    return torch.ops.mkldnn._linear_pointwise(states, linear.weight, linear.bias, "none", [], "")


def _read_in_place(linear: Any, states: Tensor) -> bool:
    # A subclass, such as a quantized layer or one with an adapter, or a layer with hooks, computes
    # something else.
    return (
        type(linear) is nn.Linear
        and linear.weight.numel() >= LARGE_WEIGHT
        and linear.weight.device.type == "cpu"
        and linear.weight.dtype == states.dtype == torch.float32
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and HAS_ONEDNN
    )


def lm_head(model: Any, vocab_size: int | None = None) -> Head:
    """Return a language model's map from states (K, H) to float32 logits (K, V), with the model's
    own scaling and soft cap.

    Args:
        model: a transformers causal language model.
        vocab_size: V, the policy's. Ids beyond a smaller model's get -inf, and a larger model's
            logits beyond V are cut off. None: the model's own.

    Raises:
        ModelError: the model has no such head, it looks ahead, or its logits are not the function
            of its last hidden states that is known here.
    """
    linear = unwrapped(model).get_output_embeddings()
    if linear is None:
        raise ModelError(
            f"{_name(model)} has no language-model head; allowed: causal language models"
        )
    if looks_ahead(model):
        raise ModelError(
            f"{_name(model)} looks ahead: later tokens change what it says of earlier ones; "
            "allowed: causal language models"
        )
    # Checked before it is resized: the model's own logits have the model's own size.
    head = LMHead(linear, *_logit_options(model.config.get_text_config()))
    _check_head(model, head, lambda logits: logits[0])
    return replace(head, vocab_size=vocab_size)


def score_head(model: Any) -> Head:
    """Return a reward model's map from states (K, H) to float32 scores (K,).

    Raises:
        ModelError: the model is no sequence- or token-classification model with one label.
    """
    return make_scorer(model).head


def make_scorer(model: Any) -> Scorer:
    """Make a `Scorer` of a causal sequence- or token-classification model with one label.

    Raises:
        ModelError: the model is none, or its scores are not a linear function of its last hidden
            states.
    """
    base = unwrapped(model)
    linear = getattr(base, "score", None) or getattr(base, "classifier", None)
    if linear is None or model.config.num_labels != 1:
        labels = "no scalar head" if linear is None else f"{model.config.num_labels} labels"
        raise ModelError(
            f"{_name(model)} has {labels}; allowed: sequence- or token-classification models with "
            "one label"
        )

    head = ScoreHead(linear)
    per_token = _check_head(model, head, lambda logits: logits.flatten())
    pad_token_id = None if per_token else _passed_over(model, head)
    return Scorer(model=trunk_of(model), head=head, per_token=per_token, pad_token_id=pad_token_id)


def token_logprobs(
    states: Tensor, tokens: Tensor, head: Head, *, temperature: float = 1.0, chunk: int = CHUNK
) -> Tensor:
    """Return log p(token | state) of each token, (K,) float32, in nats.

    Args:
        states: (K, H), each the state before its token.
        tokens: (K,) int64.
        head: states to logits.
        temperature: the logits are divided by it.
        chunk: how many tokens' logits are held at a time, so that (K, V) exists neither in the
            forward nor in the backward.
    """

    def logprobs(states: Tensor, tokens: Tensor) -> Tensor:
        logits = head(states)
        if temperature != 1:
            logits = logits / temperature
        totals = [logits[rows].logsumexp(-1) for rows in vocabulary_blocks(logits)]
        return logits.gather(-1, tokens[:, None]).squeeze(-1) - torch.cat(totals)

    return in_chunks(logprobs, states, tokens, chunk=chunk)


def in_chunks(function: Callable[..., Tensor], *columns: Tensor, chunk: int = CHUNK) -> Tensor:
    """Return `function(*columns)`, computed `chunk` rows at a time. What a chunk computes on the
    way is freed, and computed again in the backward."""
    parts = zip(*(column.split(chunk) for column in columns), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([function(*part) for part in parts])
    # The functions draw nothing at random, so no generator's state needs to be kept.
    once_more = partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([once_more(*part) for part in parts])


def _name(model: Any) -> str:
    return f"{type(model).__name__} ({model.config.name_or_path or 'built in memory'})"


def _logit_options(config: Any) -> tuple[float, float | None]:
    """Return the factor and the soft cap of a model's logits. The config names them `logit_scale`
    (Cohere), `logits_scaling` (Granite) and `final_logit_softcapping` (Gemma)."""
    factor = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return factor / divisor, getattr(config, "final_logit_softcapping", None)


def _check_head(model: Any, head: Head, select: Callable[[Tensor], Tensor]) -> bool:
    """Compare `head` on the states of a few tokens with the model's own logits, and return whether
    the model gives logits for every token (rather than one row of them for a text)."""
    trunk, ids = trunk_of(model), _three_tokens(model)
    tokens = torch.tensor([ids], device=trunk.device)
    with acting(model):
        logits = model(input_ids=tokens, use_cache=False).logits
        states = hidden_states(trunk, tokens, [len(ids)])[0]
        if not _agree(head, states, select(logits).float()):
            of_peft = ": of peft's methods, learned prompts cannot be used, LoRA can"
            why = "" if unwrapped(model) is model else of_peft
            raise ModelError(f"{_name(model)} {UNKNOWN}{why}")
    return logits.ndim == 3


def _three_tokens(model: Any) -> list[int]:
    """Return three token ids that are not the pad id: a classifier would pass over that one."""
    vocab_size, pad_id = model.config.get_text_config().vocab_size, _pad_id(model)
    return [token for token in range(vocab_size) if token != pad_id][1:4]


def _pad_id(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "pad_token_id", None)


def _passed_over(model: Any, head: Head) -> int | None:
    """Return the pad id of a model that scores texts, if the model passes over it at a text's end.

    transformers' own classifiers do: a text that ends in the pad id is read at the last token
    before. Others read every text at its last token, and give None. The model is run to find out,
    because its config does not say.

    Raises:
        ModelError: the model does neither.
    """
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
    """Whether `head` gives `expected` (n, ...) on the last n of the `states`."""
    tolerance = 1e-4 if states.dtype == torch.float32 else 5e-2
    try:
        actual = head(states)[-len(expected) :]
    except RuntimeError:  # the head reads states of another size
        return False
    same_shape = actual.shape == expected.shape
    # On no device (`shapes_only`) there are no numbers to compare.
    return same_shape and (
        actual.is_meta or torch.allclose(actual, expected, rtol=tolerance, atol=tolerance)
    )
