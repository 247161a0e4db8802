"""Sums over the vocabulary at K states, and their gradients, which are written by hand here.

With l the logits, p = softmax(l), H the entropy, q and r the teacher's and the reference's
probabilities:

    d log p_a / d l = 1_a - p                      d KL(p || r) / d l = p (log p - log r - KL)
    d H / d l       = -p (log p + H)               d KL(q || p) / d l = p - q

So a backward pass needs the log-probs alone: what autograd would keep of the way there is many
times as much. Where even the logits (K, V) are too large to hold, `head_numbers` computes them a
chunk at a time, and once more in the backward pass, into one buffer of gradients.

Two things are done for large vocabularies. Log-probs are logits minus `logsumexp`, because
`log_softmax` adds exponentials up in float32, one after the other: at 262,144 tokens its
probabilities miss a sum of 1 by 3e-5 on the CPU, and these by 1e-6. And the passes over the
vocabulary go over a few rows at a time, which stay in the processor's cache.

Suffixes: K tokens, H hidden size, V vocabulary, M = V / 8 rounded up.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tokenenv.agents.learning.masks import rule_out, unpack
from tokenenv.models.batching import vocabulary_blocks
from tokenenv.models.heads import LMHead
from tokenenv.types import Head

CHUNK_ELEMENTS = 2**25
"""Logits held at a time: 128 MiB in float32. A matrix product over fewer rows than this gives at a
vocabulary of 262,144 would read the head's weights more often than it works."""
RULED_OUT = -1e20
"""What stands for the log-prob of an impossible token: 0 log 0 = 0, where 0 * inf would be NaN."""


class Numbers(NamedTuple):
    """Float32 (K,) each; see `TokenStats`."""

    logprob: Tensor
    entropy: Tensor
    kl: Tensor
    teacher_kl: Tensor


@dataclass(frozen=True, slots=True)
class Rows:
    """What the numbers of K tokens are made of, besides the policy's logits; none of it has a
    gradient."""

    tokens: Tensor
    """(K,) int64."""
    temperature: float = 1.0
    mask: Tensor | None = None
    """(K, M) uint8: the allowed tokens, packed; None where all are."""
    ref: Tensor | None = None
    """(K, ...) the reference's states, or its logits (K, V) once `with_logits` has made them."""
    teacher: Tensor | None = None
    """The teacher's, likewise."""
    ref_head: Head | None = None
    teacher_head: Head | None = None

    def __getitem__(self, part: slice) -> "Rows":
        """Return some of the rows."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        some: dict[str, Any] = {
            name: column[part] for name, column in columns.items() if isinstance(column, Tensor)
        }
        return replace(self, **some)

    def with_logits(self) -> "Rows":
        """Return the rows with the logits of reference and teacher in place of their states."""
        ref, teacher = (
            None if head is None or states is None else head(states).float()
            for head, states in ((self.ref_head, self.ref), (self.teacher_head, self.teacher))
        )
        return replace(self, ref=ref, teacher=teacher)


# ---------------------------------------------------------------- of logits


def normalised(logits_KV: Tensor, out: Tensor | None = None) -> Tensor:
    """Return log-probs (K, V): logits minus their `logsumexp`, into `out` where it is given."""
    return torch.sub(logits_KV, logits_KV.logsumexp(-1, keepdim=True), out=out)


def teacher_logprobs(logits_KV: Tensor, logprobs_KV: Tensor) -> Tensor:
    """Return log pi_T (K, V), renormalised over the tokens that the policy can emit, whose
    log-probs are `logprobs_KV`: no weight of the policy's could follow it to others. A teacher that
    emits none of these tokens says nothing, and the policy stands in for it: their KL is 0."""
    logits_KV = logits_KV.masked_fill(logprobs_KV <= RULED_OUT, -torch.inf)
    total_K1 = logits_KV.logsumexp(-1, keepdim=True)
    return torch.where(total_K1.isneginf(), logprobs_KV, logits_KV - total_K1)


def _numbers(logits_KV: Tensor, rows: Rows, out_KV: Tensor) -> Tensor:
    """Return (K, 4) the numbers of each token, and leave the log-probs in `out_KV`, which may be
    the logits."""
    found_K4 = logits_KV.new_zeros(len(logits_KV), 4)
    for part in vocabulary_blocks(logits_KV):
        _numbers_of_block(logits_KV[part], rows[part], out_KV[part], found_K4[part])
    return found_K4


def _logprobs(logits_KV: Tensor, rows: Rows, out_KV: Tensor) -> Tensor:
    """Return log pi (K, V) of the tokens that are allowed, in `out_KV`, which may be the logits."""
    if rows.mask is not None:
        logits_KV = rule_out(logits_KV, unpack(rows.mask, logits_KV.shape[1]))
    if rows.temperature != 1:
        logits_KV = logits_KV / rows.temperature
    return normalised(logits_KV, out_KV).clamp_(min=RULED_OUT)


def _numbers_of_block(logits_KV: Tensor, rows: Rows, out_KV: Tensor, found_K4: Tensor) -> None:
    logprobs = _logprobs(logits_KV, rows, out_KV)
    found_K4[:, 0] = logprobs.gather(-1, rows.tokens[:, None])[:, 0]
    probs = logprobs.exp()
    if rows.ref is not None:
        found_K4[:, 2] = (probs * (logprobs - _ref_logprobs(rows.ref, probs))).sum(-1)
    if rows.teacher is not None:
        theirs = teacher_logprobs(rows.teacher, logprobs)
        weights = theirs.exp()
        found_K4[:, 3] = (weights * (theirs - logprobs).masked_fill(weights == 0, 0.0)).sum(-1)
    found_K4[:, 1] = -probs.mul_(logprobs).sum(-1)


def _ref_logprobs(ref_KV: Tensor, probs_KV: Tensor) -> Tensor:
    # A token that the policy never emits has no part in the sum, whatever the reference says of it.
    return normalised(ref_KV).masked_fill_(probs_KV == 0, 0.0)


def _gradient(
    logprobs_KV: Tensor,
    rows: Rows,
    found_K4: Tensor,
    grads: tuple[Tensor | None, ...],
    out_KV: Tensor,
) -> Tensor:
    """Return the gradient (K, V) by the logits in `out_KV`, which may be the log-probs, given the
    gradients (K,) by the four numbers; None is zero."""
    for part in vocabulary_blocks(logprobs_KV):
        some = tuple(None if grad is None else grad[part, None] for grad in grads)
        _gradient_of_block(logprobs_KV[part], rows[part], found_K4[part], some, out_KV[part])
    return out_KV


def _gradient_of_block(
    logprobs_KV: Tensor,
    rows: Rows,
    found_K4: Tensor,
    grads: tuple[Tensor | None, ...],
    out_KV: Tensor,
) -> None:
    by_logprob, by_entropy, by_kl, by_teacher = grads
    _, entropy, kl, _ = found_K4[:, :, None].unbind(1)
    by_kl = None if rows.ref is None else by_kl
    by_teacher = None if rows.teacher is None else by_teacher
    probs = logprobs_KV.exp()
    # Everything that is multiplied with p: a number for each row, and what log p is multiplied by.
    level = torch.zeros_like(entropy)
    slope = None
    if by_logprob is not None:
        level = level - by_logprob
    if by_teacher is not None:
        level = level + by_teacher
    if by_entropy is not None:
        level, slope = level - by_entropy * entropy, -by_entropy
    if by_kl is not None:
        level, slope = level - by_kl * kl, by_kl if slope is None else slope + by_kl
    factor = level if slope is None else torch.addcmul(level, slope, logprobs_KV)
    if by_kl is not None and rows.ref is not None:
        factor = factor - by_kl * _ref_logprobs(rows.ref, probs)
    theirs = None
    # Made before the log-probs are overwritten: `out_KV` may be the same memory.
    if by_teacher is not None and rows.teacher is not None:
        theirs = teacher_logprobs(rows.teacher, logprobs_KV).exp_().mul_(by_teacher)
    grad = torch.mul(probs, factor, out=out_KV)
    if theirs is not None:
        grad.sub_(theirs)
    if by_logprob is not None:
        grad.scatter_add_(-1, rows.tokens[:, None], by_logprob)
    if rows.temperature != 1:
        grad.div_(rows.temperature)


class _OfLogits(torch.autograd.Function):
    """The numbers of logits that are held whole."""

    @staticmethod
    def forward(ctx: Any, logits_KV: Tensor, rows: Rows) -> tuple[Tensor, ...]:
        rows = rows.with_logits()
        logprobs_KV = torch.empty_like(logits_KV)
        found_K4 = _numbers(logits_KV, rows, logprobs_KV)
        ctx.rows = rows
        ctx.save_for_backward(logprobs_KV, found_K4)
        ctx.set_materialize_grads(False)
        return tuple(column.clone() for column in found_K4.unbind(-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:
        logprobs_KV, found_K4 = ctx.saved_tensors
        out_KV = torch.empty_like(logprobs_KV)
        return _gradient(logprobs_KV, ctx.rows, found_K4, grads, out_KV), None


def logits_numbers(logits_KV: Tensor, rows: Rows) -> Numbers:
    """Return the numbers of K tokens from the policy's logits, which are held, and as many
    log-probs with them. Differentiable in the logits."""
    return Numbers(*_OfLogits.apply(logits_KV.float(), rows))


# ---------------------------------------------------------------- of a linear head, in chunks


def is_linear(head: Head) -> TypeGuard[LMHead]:
    """Return whether a head is one linear layer and what an `LMHead` does with its outputs."""
    return isinstance(head, LMHead) and type(head.linear) is nn.Linear


class _OfHead(torch.autograd.Function):
    """The numbers of a linear head's logits, a chunk of which is held at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        states_KH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        head: LMHead,
        rows: Rows,
        chunk: int,
    ) -> tuple[Tensor, ...]:
        found = []
        for part in _chunks(states_KH, chunk):
            logits_KV = head(states_KH[part])
            found.append(_numbers(logits_KV, rows[part].with_logits(), logits_KV))
        found_K4 = torch.cat(found)
        ctx.head, ctx.rows, ctx.chunk = head, rows, chunk
        ctx.autocast = _ambient_autocast(states_KH.device.type)
        ctx.save_for_backward(states_KH, weight_VH, bias_V, found_K4)
        ctx.set_materialize_grads(False)
        return tuple(column.clone() for column in found_K4.unbind(-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, found_K4 = ctx.saved_tensors
        totals = [
            torch.zeros_like(tensor) if wanted else None
            for tensor, wanted in zip(inputs, ctx.needs_input_grad[:3], strict=True)
        ]
        with torch.autocast(**ctx.autocast):
            # The products run in what autocast makes of states and weights; once is enough.
            dtype = ctx.autocast["dtype"] if ctx.autocast["enabled"] else inputs[1].dtype
            inputs = [None if tensor is None else tensor.to(dtype) for tensor in inputs]
            for part in _chunks(inputs[0], ctx.chunk):
                some = tuple(None if grad is None else grad[part] for grad in grads)
                _add_chunk(totals, part, inputs, ctx.head, ctx.rows[part], found_K4[part], some)
        return *totals, None, None, None


def _add_chunk(
    totals: list[Tensor | None],
    part: slice,
    inputs: list[Tensor | None],
    head: LMHead,
    rows: Rows,
    found_K4: Tensor,
    grads: tuple[Tensor | None, ...],
) -> None:
    """Add a chunk's part to the gradients by states, weight and bias; None is not wanted."""
    states_KH, weight_VH, bias_V = inputs
    assert states_KH is not None
    assert weight_VH is not None
    leaf_KV = nn.functional.linear(states_KH[part], weight_VH, bias_V).requires_grad_()
    with torch.enable_grad():
        made_KV = head.after(leaf_KV)
    # Where the head does more than its layer, autograd goes back through that.
    is_leaf = made_KV is leaf_KV
    logits_KV = made_KV.detach() if is_leaf else made_KV.detach().clone()
    for block in vocabulary_blocks(logits_KV):
        _logprobs(logits_KV[block], rows[block], logits_KV[block])
    grad_KV = _gradient(logits_KV, rows.with_logits(), found_K4, grads, logits_KV)
    if not is_leaf:
        grad_KV = torch.autograd.grad(made_KV, leaf_KV, grad_KV)[0]
    by_states, by_weight, by_bias = totals
    if by_states is not None:
        by_states[part] = grad_KV @ weight_VH
    if by_weight is not None:
        _add_product(by_weight, grad_KV.T, states_KH[part])
    if by_bias is not None:
        by_bias += grad_KV.sum(0)


def _ambient_autocast(device: str) -> dict[str, Any]:
    """Return the arguments of the autocast that is in force."""
    # torch has no autocast on the device "meta", where memory is planned.
    device = "cpu" if device == "meta" else device
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return {"device_type": device, "dtype": dtype, "enabled": enabled}


def _chunks(states_KH: Tensor, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in range(0, len(states_KH), chunk))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a matrix product to `total` in place; where dtypes are equal, without holding it."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def head_numbers(states_KH: Tensor, head: LMHead, rows: Rows, chunk: int) -> Numbers:
    """Return the numbers of K tokens from states and a linear head (`is_linear`), with the logits
    of `chunk` tokens in memory. Differentiable in states and head."""
    linear = head.linear
    return Numbers(*_OfHead.apply(states_KH, linear.weight, linear.bias, head, rows, chunk))
