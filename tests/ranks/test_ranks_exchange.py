"""What ranks tell each other, and which rank works on what."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenenv import ranks
from tokenenv.errors import RankFailed


def exchanged():
    me = ranks.number()
    tensors = [torch.full((2, 2), me + 1.0), torch.tensor([me]), torch.full((3,), 2.0**me)]
    ranks.add_up(tensors)
    first = [torch.full((2,), me + 5.0), torch.tensor([me])]
    ranks.take_first(first)
    return {
        "gathered": ranks.gathered({"rank": me}),
        "each": ranks.each(lambda: me * 10),
        "of_first": ranks.of_first(lambda: f"rank {me}"),
        "summed": ranks.summed({"all": 1.0, f"of {me}": 2.0}),
        "added": [tensor.tolist() for tensor in tensors],
        "first": [tensor.tolist() for tensor in first],
    }


def test_ranks_have_what_the_others_have(on_ranks):
    for found in on_ranks(3, exchanged):
        assert found == {
            "gathered": [{"rank": 0}, {"rank": 1}, {"rank": 2}],
            "each": [0, 10, 20],
            "of_first": "rank 0",
            "summed": {"all": 3.0, "of 0": 2.0, "of 1": 2.0, "of 2": 2.0},
            "added": [[[6.0, 6.0], [6.0, 6.0]], [3], [7.0, 7.0, 7.0]],
            "first": [[5.0, 5.0], [0]],
        }


def test_what_crosses_at_once_is_bounded(on_ranks, monkeypatch):
    monkeypatch.setattr(ranks, "MESSAGE_BYTES", 20)

    def added():
        tensors = [torch.full((size,), ranks.number() + 1.0) for size in (2, 3, 1, 9, 1, 4)]
        ranks.add_up(tensors)
        sizes = [flat.numel() for flat, _ in ranks._packed(tensors)]
        return sizes, [set(tensor.tolist()) for tensor in tensors]

    assert on_ranks(2, added) == [([5, 1, 9, 5], [{3.0}] * 6)] * 2


def test_a_process_alone_is_the_only_rank():
    tensor = torch.ones(2)
    ranks.add_up([tensor])
    ranks.take_first([tensor])
    assert (ranks.count(), ranks.number(), tensor.tolist()) == (1, 0, [1.0, 1.0])
    assert ranks.gathered(3) == ranks.each(lambda: 3) == [3]
    assert ranks.summed({"a": 1.0}) == {"a": 1.0}
    assert ranks.share(np.array([3, 1, 2])).tolist() == [0, 1, 2]


def failing():
    def make():
        if ranks.number() == 1:
            raise ValueError("no text")
        return "done"

    with pytest.raises((ValueError, RankFailed)) as raised:
        ranks.each(make)
    return type(raised.value), str(raised.value), getattr(raised.value, "__notes__", [])


def test_an_error_on_one_rank_is_one_on_all(on_ranks):
    zeroth, first, second = on_ranks(3, failing)
    assert first == (ValueError, "no text", ["This was on rank 1 of 3 alone."])
    assert zeroth == second == (RankFailed, "rank 1 failed: ValueError: no text", [])


def first_failing():
    with pytest.raises((ValueError, RankFailed)) as raised:
        ranks.of_first(failing_on_the_first)
    return type(raised.value), str(raised.value), ranks.of_first(lambda: "next")


def failing_on_the_first():
    assert ranks.number() == 0
    raise ValueError("no file")


def test_an_error_on_the_first_rank_is_one_on_all(on_ranks):
    first, second = on_ranks(2, first_failing)
    assert first == (ValueError, "no file", "next")
    assert second == (RankFailed, "rank 0 failed: ValueError: no file", "next")


@given(
    sizes=st.lists(st.integers(1, 50), max_size=40),
    count=st.integers(1, 5),
)
def test_each_thing_is_one_ranks_and_all_have_about_as_much(sizes, count):
    sizes = np.array(sizes, dtype=np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "count", lambda: count)
        shares = []
        for number in range(count):
            patch.setattr(ranks, "number", lambda number=number: number)
            shares.append(ranks.share(sizes))
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(sizes)))
    assert all((np.diff(share) > 0).all() for share in shares)
    loads = [int(sizes[share].sum()) for share in shares]
    assert max(loads) - min(loads) <= sizes.max(initial=0)
