"""`benchmarks/profile_step.py` finds the parts that it measures, whatever they are called."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from profile_step import STEP_PARTS, UPDATE_PARTS, profile_step, profile_update
from profiled import Subject, subject

sys.path.pop(0)


@pytest.fixture(scope="module")
def tiny() -> Subject:
    args = Namespace(model="tiny", device="cpu", dtype="float32", frozen_dtype=None)
    return subject(Namespace(**vars(args), even=False, compile=False, lora_rank=0), 4, 4)


def test_every_part_of_a_step_takes_time_and_they_add_up_to_a_step(tiny):
    found = profile_step(tiny, 4, "cpu", even=False)
    parts = [found[name] for name in STEP_PARTS]
    assert all(seconds > 0 for seconds in parts)
    assert found["running"] < found["whole"]
    assert 0 < found["bare"] < sum(parts)


def test_a_step_has_to_read_all_weights_once_and_the_keys_and_values_of_each_text(tiny):
    found = profile_step(tiny, 4, "cpu", even=False)
    trunks = tiny.trunks
    weights = 4 * sum(p.numel() for trunk in trunks for p in trunk.parameters())
    weights -= tiny.scorer_trunk.get_input_embeddings().weight.nbytes
    # Two layers with two heads of 16 numbers in each, keys and values, float32.
    per_token = 2 * 2 * 2 * 16 * 4
    at_least, at_most = (weights + 3 * 4 * length * per_token for length in (16, 20))
    assert at_least <= found["bytes"] <= at_most


def test_every_part_of_an_update_takes_time(tiny):
    found = profile_update(tiny, "cpu")
    assert all(found[name] > 0 for name in (*UPDATE_PARTS, "flops"))
