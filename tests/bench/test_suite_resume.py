"""A run by a method of benchmarks/suite that was stopped and is gone on with is the one that was
not, bit for bit."""

import numpy as np
import pytest
import torch
from runs import learn_until, same
from suite_methods import METHODS, few, make

SETTINGS = {
    "batch_tokens": 16,
    "minibatches": 2,
    "epochs": 2,
    "lr": 1e-2,
    "kl_target": 0.05,
    "kl_horizon": 500,
    "temperature": 0.9,
    "lr_schedule": "cosine",
}
OPTIONS = {
    "max_new_tokens": 4,
    "score_truncated": False,
    "reward": {"end": "terminal", "task": "turn"},
}
RUNS = {name: (name, {}) for name in METHODS} | {
    "resets, no stale texts": ("random-resets", {"max_staleness": 0}),
    "resets, whole texts": ("random-resets", {"rollout": "episode"}),
}


@pytest.mark.filterwarnings("ignore:reward-to-go on", "ignore:update . moved")
@pytest.mark.parametrize("run", RUNS)
def test_resuming_is_exact(tmp_path, run):
    """In an environment that writes into texts, under action masks, with texts on their way. Two
    updates, a checkpoint, another agent and env, two updates: equal to four updates."""
    name, settings = RUNS[run]
    algorithm, own = METHODS[name]
    # An engine that writes whole texts takes the bare env.
    allowed = None if "rollout" in settings else few
    straight = algorithm(make(allowed, **OPTIONS), **SETTINGS, **own | settings)
    whole = learn_until(straight, 4, save_to=tmp_path / "c")
    resumed = algorithm.load(tmp_path / "c", make(allowed, **OPTIONS))
    assert resumed.updates == 2
    rest = learn_until(resumed, 4)
    first = len(whole.episodes) - len(rest.episodes)
    assert first > 0
    assert any(len(e.written) for e in rest.episodes)
    assert any(e.advantage.any() for e in rest.episodes)
    for one, two in zip(whole.episodes[first:], rest.episodes, strict=True):
        for field in one.__dataclass_fields__:
            np.testing.assert_equal(getattr(one, field), getattr(two, field))
    np.testing.assert_equal(whole.metrics[2:], rest.metrics)
    assert same(straight.policy.state_dict(), resumed.policy.state_dict())
    assert same(straight.optimizer.state_dict(), resumed.optimizer.state_dict())
    assert straight.rng.bit_generator.state == resumed.rng.bit_generator.state
    assert torch.equal(*(a.actor.generator.get_state() for a in (straight, resumed)))
