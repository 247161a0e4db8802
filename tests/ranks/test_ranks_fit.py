"""Several processes fit a reward model as one does."""

import fitting
import pytest
from runs import same

from tokenenv import ranks
from tokenenv.fit.checkpoint import read_state


def config(folder, objective, **options):
    return fitting.config(folder, objective, epochs=2, **options)


def fitted(settings, **options):
    """The weights, measures and history of a run of these settings on this rank."""
    if settings.objective.startswith("score"):
        options |= {"train_on": fitting.scored(20), "held_out": fitting.scored(8, seed=1)}
    found = fitting.trained(settings, **options)
    return fitting.weights(found), found.measures, found.history


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("bt-sum", {}),
        ("score-end", {"max_batch_tokens": 16}),
        ("score-every", {}),
    ],
)
def test_two_ranks_fit_what_one_fits(on_ranks, tmp_path, objective, options):
    parts = on_ranks(2, lambda: fitted(config(tmp_path / "two", objective, **options)))
    weights, measures, history = fitted(config(tmp_path / "one", objective, **options))
    for there, found, epochs in parts:
        assert same(there, parts[0][0])
        for name, weight in weights.items():
            assert float((weight - there[name]).abs().max()) < 1e-5
        assert found["tokens"] == measures["tokens"]
        for one, other in zip(history, epochs, strict=True):
            assert one == pytest.approx(other, rel=1e-3, abs=1e-4)
    written = [sorted(path.name for path in (tmp_path / run).iterdir()) for run in ("one", "two")]
    assert [name for name in written[0] if "tfevents" not in name] == [
        name for name in written[1] if "tfevents" not in name
    ]


def stopped_and_gone_on(folder):
    """A run that one rank stops, and what it comes to."""
    left = [2 if ranks.number() == 1 else 10**6]

    def stop():
        left[0] -= 1
        return left[0] == 0

    with pytest.raises(KeyboardInterrupt):
        fitting.trained(config(folder, "bt-mean"), stop=stop)
    again = config(folder, "bt-mean", resume=True)
    return fitted(again, state=ranks.of_first(lambda: read_state(again)))


def test_a_fit_that_one_rank_stops_goes_on_as_if_it_had_not_been(on_ranks, tmp_path):
    stopped = on_ranks(2, lambda: stopped_and_gone_on(tmp_path / "stopped"))
    whole = on_ranks(2, lambda: fitted(config(tmp_path / "whole", "bt-mean")))
    for one, other in zip(stopped, whole, strict=True):
        assert same(one[0], other[0])
        assert same(one[2], other[2])
