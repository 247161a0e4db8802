import fakes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenenv.models import batching
from tokenenv.models.batching import hidden_states, in_micro_batches, last_states, micro_batches

TEXTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [3], [4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14]]
LENGTHS = [len(text) for text in TEXTS]


def padded(width=12):
    return torch.tensor([text + [60] * (width - len(text)) for text in TEXTS])


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 120))
def test_micro_batches_hold_every_text_once_within_the_limit(lengths, limit):
    groups = micro_batches(lengths, limit)
    order = np.concatenate(groups)
    assert sorted(order) == list(range(len(lengths)))
    assert (np.diff(np.asarray(lengths)[order]) <= 0).all()
    for group in groups:
        longest = max(lengths[i] for i in group)
        assert len(group) == 1 or len(group) * longest <= limit


def test_micro_batches_by_hand():
    assert [group.tolist() for group in micro_batches([3, 9, 2, 6, 2], 12)] == [[1], [3, 0], [2, 4]]
    assert micro_batches([], 12) == []


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 30))
def test_a_group_is_cut_only_where_that_spares_more_than_a_forward(lengths, cost):
    lengths = np.asarray(lengths)
    whole, cut = micro_batches(lengths, 200), micro_batches(lengths, 200, cost)
    assert np.concatenate(cut).tolist() == np.concatenate(whole).tolist()

    def padded_tokens(groups):
        return sum(len(group) * lengths[group[0]] for group in groups)

    # What is spared is at least what the added forwards cost, and no cut that pays is left.
    spared = padded_tokens(whole) - padded_tokens(cut)
    assert spared >= (cost + 1) * (len(cut) - len(whole))
    for group in cut:
        for k in range(1, len(group)):
            both = padded_tokens([group[:k], group[k:]])
            assert padded_tokens([group]) - both <= cost


def test_cuts_by_hand():
    lengths = [10, 10, 2, 1]
    assert [g.tolist() for g in micro_batches(lengths, 100, 15)] == [[0, 1], [2, 3]]
    assert [g.tolist() for g in micro_batches(lengths, 100, 16)] == [[0, 1, 2, 3]]


@pytest.mark.parametrize("name", fakes.ARCHITECTURES)
def test_padded_states_equal_each_text_alone(name):
    model = fakes.causal_lm(name).base_model
    states = hidden_states(model, padded(), LENGTHS)
    assert states.shape[:2] == (4, 12)
    for row, text in zip(states, TEXTS, strict=True):
        expected = model(input_ids=torch.tensor([text]), use_cache=False)[0][0]
        torch.testing.assert_close(row[: len(text)], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2_mixed", "gemma3", "mistral"])
def test_packed_states_and_gradients_equal_padded_ones(name, monkeypatch):
    model = fakes.causal_lm(name).base_model.requires_grad_(True)
    valid = torch.arange(12) < torch.tensor(LENGTHS)[:, None]
    results = {}
    for packed in (False, True):
        monkeypatch.setattr(batching, "is_varlen", lambda trunk, packed=packed: packed)
        states = hidden_states(model, padded(), LENGTHS)
        model.zero_grad()
        states[valid].pow(2).sum().backward()
        results[packed] = states[valid].detach(), [p.grad.clone() for p in model.parameters()]
        assert states.shape[:2] == (4, 12)
    torch.testing.assert_close(results[True], results[False], atol=1e-4, rtol=1e-4)


def test_packing_is_for_flash_kernels_only():
    model = fakes.causal_lm("llama").base_model
    chosen = {}
    for name in (
        "sdpa",
        "eager",
        "flash_attention_2",
        "flash_attention_3",
        "kernels-community/flash-attn3",
    ):
        model.config._attn_implementation_internal = name
        chosen[name] = batching.is_varlen(model)
    assert [name for name, packed in chosen.items() if not packed] == ["sdpa", "eager"]


def test_last_states_by_hand():
    states = torch.arange(24.0).view(2, 4, 3)
    assert last_states(states, [1, 4]).tolist() == [[0, 1, 2], [21, 22, 23]]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 30))
def test_in_micro_batches_returns_rows_in_their_order(lengths, limit):
    lengths = np.array(lengths)

    def forward(rows, width):  # state t of row r is (r, t)
        column = torch.arange(width).expand(len(rows), width)
        return torch.stack([torch.from_numpy(rows)[:, None].expand_as(column), column], dim=-1)

    states = in_micro_batches(forward, lengths, limit)
    assert states.tolist() == [[row, length - 1] for row, length in enumerate(lengths)]
