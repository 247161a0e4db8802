"""Sums over the vocabulary: values and gradients against plain float64 autograd, whole and in
chunks, at small vocabularies and at 262,144."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tokenenv.agents.learning.masks import pack
from tokenenv.agents.learning.token_stats import token_stats
from tokenenv.models import batching
from tokenenv.models.heads import LMHead

K, H, V = 11, 6, 21
NAMES = ("logprob", "entropy", "kl", "teacher_kl")
PATHS = {"whole": 10**6, "linear chunks": 3 * V, "other chunks": 3 * V}


def numbers_in_float64(
    states: Tensor, rows: dict[str, Any], linear: Any, after: Any, temperature: float
) -> list[Tensor]:
    """The four numbers by their definitions, with autograd's own gradients."""
    logits = after(nn.functional.linear(states, linear["weight"], linear.get("bias")))
    if "allowed" in rows:
        logits = logits.masked_fill(~rows["allowed"], -torch.inf)
    logp = torch.log_softmax(logits / temperature, -1)
    p = logp.exp()
    logp = logp.masked_fill(p == 0, 0.0)
    found = [logp.gather(-1, rows["tokens"][:, None])[:, 0], -(p * logp).sum(-1)]
    ref = torch.log_softmax(rows["ref"], -1).masked_fill(p == 0, 0.0)
    theirs = torch.log_softmax(rows["teacher"].masked_fill(p == 0, -torch.inf), -1)
    apart = (theirs - logp).masked_fill(p == 0, 0.0)
    return [*found, (p * (logp - ref)).sum(-1), (theirs.exp() * apart).sum(-1)]


class Other(nn.Module):
    """A head that is no plain linear layer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


HEADS = {
    "plain": (1.0, None, V),
    "scaled": (0.5, None, V),
    "capped": (1.0, 2.0, V),
    "cut": (2.0, None, V - 2),
    "larger": (1.0, None, V + 3),
}


def after(outputs: Tensor, scale: float, cap: float | None, size: int) -> Tensor:
    """What an `LMHead` does with its layer's outputs, written again."""
    logits = outputs * scale
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    nothing = logits.new_full((len(logits), max(0, size - V)), -torch.inf)
    return torch.cat([logits[:, :size], nothing], -1)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(("masked", "temperature"), [(False, 1.0), (True, 0.7)])
def test_values_and_gradients_are_those_of_plain_autograd(
    path: str, kind: str, masked: bool, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "BLOCK_ELEMENTS", 2 * V)  # several passes in a chunk
    torch.manual_seed(0)
    scale, cap, size = HEADS[kind]
    linear = nn.Linear(H, V)
    states = torch.randn(K, H, requires_grad=True)
    rows = {
        "tokens": torch.arange(K) % (V - 2),
        "ref": torch.randn(K, size),
        "teacher": torch.randn(K, size),
    }
    mask = None
    if masked:
        rows["allowed"] = torch.rand(K, size) < 0.5
        rows["allowed"][torch.arange(K), rows["tokens"]] = True
        mask = torch.as_tensor(pack({"action_mask": rows["allowed"]}))
    used = Other(linear) if path == "other chunks" else linear
    stats = token_stats(
        states,
        rows["tokens"],
        LMHead(used, scale, cap, size),
        size,
        temperature=temperature,
        mask_KM=mask,
        ref_states_KH=rows["ref"],
        ref_head=lambda x: x,
        teacher_states_KH=rows["teacher"],
        teacher_head=lambda x: x,
        chunk_elements=PATHS[path],
    )
    found = [getattr(stats, name) for name in NAMES]
    leaves = [states, linear.weight, linear.bias]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    plain = {"weight": exact[1], "bias": exact[2]}
    wide = {k: v.double() if v.is_floating_point() else v for k, v in rows.items()}
    wanted = numbers_in_float64(
        exact[0], wide, plain, lambda x: after(x, scale, cap, size), temperature
    )
    weights = torch.rand(4, K)
    # Each number alone, then all of them: some gradients are not asked for, or are zero.
    for chosen in ([0], [1], [2], [3], [0, 1, 2, 3]):
        given = sum((weights[i] * found[i]).sum() for i in chosen)
        expected = sum((weights[i] * wanted[i]).sum() for i in chosen)
        grads = torch.autograd.grad(given, leaves, retain_graph=True)
        theirs = torch.autograd.grad(expected, exact, retain_graph=True)
        for one, other in zip(grads, theirs, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_elements", [2**25, 6 * 2**18], ids=["whole", "chunks"])
def test_it_is_exact_at_a_vocabulary_of_262144(chunk_elements: int) -> None:
    """`log_softmax` in float32 is not: its probabilities add up to 1 - 3e-5 or so there."""
    torch.manual_seed(0)
    size, tokens = 2**18, torch.arange(12)
    linear = nn.Linear(64, size, bias=False)
    nn.init.normal_(linear.weight, std=0.25)
    states = (2 * torch.randn(12, 64)).requires_grad_()
    head = LMHead(linear, 1.0, None)
    stats = token_stats(states, tokens, head, size, chunk_elements=chunk_elements)
    logits = (states.detach() @ linear.weight.detach().T).double()
    wanted = logits[range(12), tokens] - logits.logsumexp(-1)
    torch.testing.assert_close(stats.logprob.double(), wanted, rtol=0, atol=4e-6)
    stats.logprob.sum().backward()
    # A row's gradient by its logits is 1_a - p, so those by the weights add up to 0 over tokens, as
    # far as its probabilities add up to 1.
    assert linear.weight.grad is not None
    assert states.grad is not None
    missing = linear.weight.grad.double().sum(0).abs() / states.detach().double().abs().sum(0)
    assert missing.max() < 2e-6
    by_logits = -logits.softmax(-1)
    by_logits[range(12), tokens] += 1
    torch.testing.assert_close(
        states.grad.double(), by_logits @ linear.weight.detach().double(), rtol=1e-5, atol=1e-5
    )


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in (made,) if isinstance(t, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return made


@pytest.mark.parametrize("trained", [True, False], ids=["trained head", "frozen head"])
def test_no_more_than_a_chunk_of_logits_is_ever_made(trained: bool) -> None:
    linear = nn.Linear(4, 512, bias=False).requires_grad_(trained)
    states = torch.randn(64, 4, requires_grad=True)
    with Largest() as largest:
        stats = token_stats(
            states,
            torch.zeros(64, dtype=torch.int64),
            LMHead(linear, 1.0, None),
            512,
            ref_states_KH=states.detach(),
            ref_head=LMHead(linear, 2.0, None),
            chunk_elements=8 * 512,
        )
        (stats.logprob + stats.entropy + stats.kl).sum().backward()
    assert largest.elements <= 8 * 512
    assert (linear.weight.grad is not None) == trained
    assert states.grad is not None
    assert states.grad.abs().sum() > 0


@pytest.mark.parametrize("trained", [True, False], ids=["trained head", "frozen head"])
def test_under_autocast_chunks_are_what_the_whole_is(trained: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(H, V).requires_grad_(trained)
    states, other = torch.randn(2, K, H)
    found = []
    for elements in (10**6, 3 * V):
        mine = states.clone().requires_grad_()
        linear.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            stats = token_stats(
                mine,
                torch.arange(K),
                LMHead(linear, 1.0, None),
                V,
                ref_states_KH=other,
                ref_head=LMHead(linear, 1.0, None),
                chunk_elements=elements,
            )
        (stats.logprob + stats.kl).sum().backward()
        assert mine.grad is not None
        found.append([stats.logprob.detach(), stats.kl.detach(), mine.grad])
        if trained:
            assert linear.weight.grad is not None
            assert linear.bias.grad is not None
            found[-1] += [linear.weight.grad.clone(), linear.bias.grad.clone()]
    for one, other_way in pairwise(found):
        for a, b in zip(one, other_way, strict=True):
            assert a.dtype == b.dtype == torch.float32
            # bfloat16 has 8 bits: products over chunks are rounded one by one.
            torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7)
    assert np.isfinite(found[0][0].numpy()).all()
