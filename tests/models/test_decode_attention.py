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


@pytest.mark.parametrize("heads", [1, 6])
def test_half_precision_is_computed_here_where_each_head_has_keys_of_its_own(heads, by_sdpa):
    given = inputs(heads, 1, torch.bfloat16)
    found, _ = decode_attention.attention(*given)
    wanted, _ = sdpa_attention_forward(*given)
    assert not by_sdpa
    torch.testing.assert_close(found, wanted, atol=2e-2, rtol=0)


def test_keys_of_a_wider_dtype_are_read_as_under_autocast():
    module, query, key, value, mask = inputs(4, 2, torch.bfloat16)
    narrow, _ = decode_attention.attention(module, query, key, value, mask)
    wide, _ = decode_attention.attention(module, query, key.float(), value.float(), mask)
    assert torch.equal(narrow, wide)


@pytest.mark.parametrize(
    ("heads", "shared", "queries"), [(4, 2, 3), (4, 1, 1)], ids=["several queries", "own keys"]
)
def test_what_sdpa_does_well_is_left_to_it(heads, shared, queries, by_sdpa):
    decode_attention.attention(*inputs(heads, shared, torch.float32, queries))
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
