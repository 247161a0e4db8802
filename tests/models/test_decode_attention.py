"""One query a slot: the same as sdpa, without a copy of keys and values for each head."""

from types import SimpleNamespace

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tokenenv.models import decode_attention

N, L, SIZE = 5, 23, 8


def inputs(heads: int, shared: int, dtype: torch.dtype, queries: int = 1, device: str = "cpu"):
    torch.manual_seed(0)
    query = 3 * torch.randn(N, heads, queries, SIZE)
    # Parts of a longer cache, as a step reads them.
    key, value = torch.randn(2, N, heads // shared, 2 * L, SIZE)[..., :L, :]
    hidden = torch.arange(L) > torch.randint(L, (N, 1, queries, 1))
    mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(dtype).min)
    module = SimpleNamespace(num_key_value_groups=shared, is_causal=True, training=False)
    return module, *(x.to(device, dtype) for x in (query, key, value, mask))


@pytest.fixture
def by_sdpa(monkeypatch):
    """The calls that are left to sdpa."""
    calls = []

    def counted(*args, **options):
        calls.append(args)
        return sdpa_attention_forward(*args, **options)

    monkeypatch.setattr(decode_attention, "sdpa_attention_forward", counted)
    return calls


@pytest.mark.parametrize("shared", [2, 3, 6])
@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_it_equals_sdpa(shared, scaling, dtype, within, by_sdpa):
    given = inputs(6, shared, dtype)
    found, weights = decode_attention.attention(*given, scaling=scaling)
    wanted, _ = sdpa_attention_forward(*given, scaling=scaling)
    assert not by_sdpa
    assert weights is None
    assert found.shape == wanted.shape == (N, 1, 6, SIZE)
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted, atol=within, rtol=0)


@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_keys_for_each_head_it_is_as_near_the_truth_as_sdpa(scaling, dtype, by_sdpa):
    module, *given = inputs(6, 1, dtype)
    query, key, value, mask = (x.double() for x in given)
    scores = query @ key.transpose(-1, -2) * (SIZE**-0.5 if scaling is None else scaling)
    truth = ((scores + mask).softmax(-1) @ value).transpose(1, 2)
    found, _ = decode_attention.attention(module, *given, scaling=scaling)
    wanted, _ = sdpa_attention_forward(module, *given, scaling=scaling)
    assert not by_sdpa
    apart, allowed = ((x.double() - truth).abs().max() for x in (found, wanted))
    assert apart <= 2 * allowed


def test_keys_of_a_wider_dtype_are_read_as_under_autocast():
    module, query, key, value, mask = inputs(4, 2, torch.bfloat16)
    narrow, _ = decode_attention.attention(module, query, key, value, mask)
    wide, _ = decode_attention.attention(module, query, key.float(), value.float(), mask)
    assert torch.equal(narrow, wide)


def test_several_queries_are_left_to_sdpa(by_sdpa):
    decode_attention.attention(*inputs(4, 2, torch.float32, queries=3))
    assert len(by_sdpa) == 1


def test_an_option_that_changes_attention_is_not_passed_over(by_sdpa):
    with pytest.raises(ValueError, match="softcap"):
        decode_attention.attention(*inputs(4, 2, torch.float32), softcap=30.0)
    assert len(by_sdpa) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_on_cuda_it_equals_sdpa_too(shared, dtype, within, by_sdpa):
    given = inputs(6, shared, dtype, device="cuda")
    found, _ = decode_attention.attention(*given)
    assert not by_sdpa
    wanted, _ = sdpa_attention_forward(*given)
    torch.testing.assert_close(found, wanted, atol=within, rtol=0)
