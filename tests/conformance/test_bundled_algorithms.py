"""Every bundled algorithm's own method is exact in every world of the conformance kit."""

import pytest
from conforming import bundled

from tokenenv.agents import ALGORITHMS
from tokenenv.conformance import check_advantages
from tokenenv.conformance.checks import GROUP_WORLDS, WORLDS

# The critic's values are given, in the size of the returns.
UNSCALED = {"scale_rewards": False}
CRITICS = {
    "ppo": (("lambda_actor",), UNSCALED),
    "a2c": (("lambda_actor",), UNSCALED),
    "klq": (("lambda_",), {}),
    "reinforce++": ((), {}),
    "vineppo": ((), {"segments": 4}),
}
GROUPS = {"rloo": {}, "grpo": {"scale": "none"}}


@pytest.mark.parametrize("algorithm", CRITICS)
def test_it_is_exact_text_by_text(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lambdas, settings = CRITICS[algorithm]
    function = bundled(monkeypatch, algorithm, lambdas, **settings)
    # VinePPO has no critic that could be wrong: its values are means over continuations.
    worlds = [w for w in WORLDS if algorithm != "vineppo" or w.critic_error == 0]
    report = check_advantages(function, algorithm, worlds=worlds)
    assert report.exact, str(report)
    assert len(report.rows) == len(worlds)


@pytest.mark.parametrize("algorithm", GROUPS)
def test_it_is_exact_in_groups(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function = bundled(monkeypatch, algorithm, **GROUPS[algorithm])
    report = check_advantages(function, algorithm, grouped=True)
    assert report.exact, str(report)
    assert len(report.rows) == len(GROUP_WORLDS)


@pytest.mark.parametrize("algorithm", ["ppo", "klq"])
def test_a_critic_is_asked_what_a_cut_text_is_worth(
    algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lambdas, settings = CRITICS[algorithm]
    report = check_advantages(bundled(monkeypatch, algorithm, lambdas, **settings))
    assert {one.world: outcome for one, outcome in report.rows}["cut texts"] == "exact"


def test_grpos_division_by_the_groups_spread_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    report = check_advantages(bundled(monkeypatch, "grpo"), grouped=True, worlds=GROUP_WORLDS[:1])
    assert "divides the returns of each group by their own spread" in report.verdict


def test_no_algorithm_is_left_out() -> None:
    assert {*CRITICS, *GROUPS} == set(ALGORITHMS) - {"best-of-n", "reference"}
