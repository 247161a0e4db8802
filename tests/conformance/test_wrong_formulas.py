"""The kit passes formulas that are right, and names what each wrong one takes for granted."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tokenenv.agents.learning.losses import approx_kl, clipped_ratio_loss, token_weights
from tokenenv.conformance import Batch, check_advantages, check_kl, check_loss, check_returns
from tokenenv.conformance.batches import to_go
from tokenenv.conformance.checks import GROUP_WORLDS
from tokenenv.errors import InvalidArgument


def gae(b: Batch, *, bootstraps: bool = True, skips: bool = True, silent: bool = False) -> Tensor:
    """From one own token to the next, or (`skips` False) over all tokens, with others' tokens' own
    values or (`silent`) with 0 there."""
    out, running = torch.zeros_like(b.rewards), torch.zeros_like(b.last_values)
    after = b.last_values.clone() if bootstraps else running
    values = b.values * b.mask if silent else b.values
    takes = b.mask if skips else b.text_mask
    for t in reversed(range(out.shape[1])):
        new = b.penalised[:, t] + after - values[:, t] + b.lambda_ * running
        running = torch.where(takes[:, t], new, running)
        after = torch.where(takes[:, t], values[:, t], after)
        out[:, t] = running
    return out


def stops_at_gaps(b: Batch) -> Tensor:
    out, running = torch.zeros_like(b.rewards), torch.zeros_like(b.last_values)
    for t in reversed(range(out.shape[1])):
        running = b.penalised[:, t] + running
        out[:, t] = running
        running = running * b.mask[:, t]
    return out


def own_kl_only(b: Batch) -> Tensor:
    return to_go(b.rewards) - b.kl_coef * (b.old_logprobs - b.ref_logprobs)


def at_the_end(b: Batch) -> Tensor:
    return b.rewards.gather(1, b.last[:, None]).expand_as(b.rewards)


def grouped(b: Batch, *, std: bool = False, everyone: bool = False) -> Tensor:
    sums = b.penalised.sum(1)
    groups = sums.reshape(1, -1) if everyone else sums.reshape(-1, b.group_size)
    rest = groups - groups.mean(1, keepdim=True)
    rest = rest / groups.std(1, keepdim=True).clamp(min=1e-6) if std else rest
    return rest.reshape(-1, 1).expand_as(b.rewards)


RIGHT: dict[str, Callable[[Batch], Tensor]] = {
    "gae": gae,
    "gae over all tokens": lambda b: gae(b, skips=False),
    "returns": lambda b: to_go(b.penalised),
    "whole returns": lambda b: b.penalised.sum(1, keepdim=True).expand_as(b.rewards),
}
WRONG: dict[str, tuple[Callable[[Batch], Tensor], list[str], str]] = {
    "return stops at a gap": (
        stops_at_gaps,
        ["masked gap"],
        "the policy wrote every token up to the last reward: where others write in the middle of a "
        "text, own tokens 1 and 2 receive nothing, of 4",
    ),
    "values of 0 in a gap": (
        lambda b: gae(b, skips=False, silent=True),
        ["masked gap, lambda 0.9"],
        "lambda is 1 where others write",
    ),
    "KL of the token itself": (
        own_kl_only,
        ["KL in the reward"],
        "a token is not charged for the KL of the tokens after it",
    ),
    "last reward alone": (
        at_the_end,
        ["rewards on every token", "KL in the reward"],
        "only the last token earns something",
    ),
    "last column alone": (
        lambda b: b.penalised[:, -1:].expand_as(b.rewards),
        ["unequal lengths", "rewards on every token", "masked gap", "KL in the reward"],
        "texts are equally long",
    ),
    "no lambda but the critic": (
        lambda b: gae(replace(b, lambda_=0.5)),
        ["wrong critic"],
        "the critic is right",
    ),
    "sign": (lambda b: -to_go(b.penalised), [], "its sign is reversed"),
    "nothing": (lambda b: torch.zeros_like(b.rewards), [], "nothing is learned"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_passes(name: str) -> None:
    report = check_advantages(RIGHT[name], name)
    assert report.exact, str(report)
    assert report.verdict.startswith("Its expected gradient is exact.")


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found_and_named(name: str) -> None:
    function, off, said = WRONG[name]
    report = check_advantages(function, name)
    assert said in report.verdict
    assert not report.exact
    if off:
        assert report.off == off, str(report)
    else:
        assert report.off[0] == "plain"


def test_a_critics_targets() -> None:
    report = check_returns(lambda b: to_go(b.penalised))
    assert report.exact, str(report)
    assert report.verdict.startswith("Its targets are exact on average.")
    report = check_returns(lambda b: gae(b) + b.values)
    assert report.exact, str(report)
    outcome = {one.world: said for one, said in report.rows}
    assert outcome["wrong critic, lambda 0.9"] == "off by choice"
    assert outcome["cut texts"] == "exact"
    assert check_returns(stops_at_gaps).off[0] == "masked gap"
    halved = check_returns(lambda b: 0.5 * to_go(b.penalised))
    assert halved.verdict == "Its targets are off by 50% already in the plain world."


def test_a_text_that_is_cut_is_worth_what_would_have_come() -> None:
    outcome = {one.world: said for one, said in check_advantages(gae).rows}
    assert outcome["cut texts"] == "exact"
    report = check_advantages(lambda b: gae(b, bootstraps=False))
    outcome = {one.world: said for one, said in report.rows}
    assert outcome["cut texts"] == "off by choice"
    assert report.exact
    assert "texts are cut before their end" in report.verdict


def test_what_is_off_for_a_reason_that_was_said_is_off_as_well() -> None:
    outcome = {one.world: said for one, said in check_advantages(stops_at_gaps).rows}
    assert outcome["masked gap"] == "off"
    assert outcome["masked gap, lambda 0.9"] == "off as well"
    assert outcome["turns that some texts lack"] == "off as well"


def test_a_gap_takes_the_whole_gradient_of_what_came_before_it() -> None:
    one = next(one for one, _ in check_advantages(stops_at_gaps).rows if one.world == "masked gap")
    assert one.positions == pytest.approx((0, 0, 1, 1), abs=1e-9)


def test_how_a_kl_penalty_counts_is_said() -> None:
    def heavier(b: Batch) -> Tensor:
        return to_go(b.rewards) + 1.5 * (to_go(b.penalised) - to_go(b.rewards))

    report = check_advantages(heavier)
    assert report.off == ["KL in the reward"]
    assert (
        "every token is charged for the KL from there on, and the penalty weighs 1.50 times what it "
        "should" in report.verdict
    )


def test_a_spread_that_leaves_each_text_out_weighs_prompts() -> None:
    """Such a deviation does not depend on the text, so within one prompt it is a step size."""

    def standardised(b: Batch) -> Tensor:
        sums = b.penalised.sum(1).reshape(-1, b.group_size)
        others = torch.stack([sums.roll(i, 1) for i in range(1, b.group_size)], 2)
        rest = (sums - others.mean(2)) / (others.std(2) + 0.1)
        return rest.reshape(-1, 1).expand_as(b.rewards)

    report = check_advantages(standardised, grouped=True)
    assert report.off == ["two prompts"]
    assert "It assumes that all prompts have scores of the same spread" in report.verdict


def test_a_baseline_of_each_turn_needs_texts_with_the_same_turns() -> None:
    """What "normalise each turn" does: the reward of a turn, less its mean over the texts of the
    group that have the turn, then added up. It is a price for having the turn (verl#7244)."""

    def by_turn(b: Batch) -> Tensor:
        begins = b.mask & ~torch.nn.functional.pad(b.mask, (1, -1))
        turn, left = begins.cumsum(1), []
        for k in (1, 2):
            has = (begins & (turn == k)).any(1).double().reshape(-1, b.group_size)
            paid = (b.rewards * (turn == k)).sum(1).reshape(-1, b.group_size)
            mean = paid.sum(1, keepdim=True) / has.sum(1, keepdim=True).clamp(min=1)
            left.append(((paid - mean) * has).reshape(-1, 1))
        return torch.where(turn == 1, left[0] + left[1], left[1])

    worlds = [world for world in GROUP_WORLDS if world.name != "KL in the reward"]
    report = check_advantages(by_turn, grouped=True, worlds=worlds)
    assert report.off == ["turns that some texts lack"], str(report)
    assert "all texts have the same turns" in report.verdict


def test_groups() -> None:
    assert check_advantages(grouped, grouped=True).exact
    spread = check_advantages(lambda b: grouped(b, std=True), grouped=True)
    assert spread.off[0] == "plain"
    assert "divides the returns of each group by their own spread" in spread.verdict
    # One baseline for all prompts is right on average, if noisier.
    assert check_advantages(lambda b: grouped(b, everyone=True), grouped=True).exact


def loss(b: Batch, aggregation: str = "token-mean", *, masked: bool = True) -> Tensor:
    counted = b.mask if masked else b.text_mask
    weights = token_weights(counted.sum(1), aggregation).double()[:, None].expand_as(b.mask)
    advantages = torch.where(counted, b.advantages.sum(1, keepdim=True), 0.0)
    advantages = b.advantages if masked else advantages
    taken = (b.logprobs - b.old_logprobs)[counted], advantages[counted], weights[counted]
    return clipped_ratio_loss(*taken, 0.2)


def test_losses() -> None:
    report = check_loss(loss)
    assert report.exact, str(report)
    assert "off by choice where the policy has moved far" in report.verdict
    assert check_loss(lambda b: loss(b, "sequence-mean")).off == ["unequal lengths"]
    unmasked = check_loss(lambda b: loss(b, masked=False))
    assert unmasked.off == ["masked gap"]
    assert "of its gradient is of tokens that others wrote" in unmasked.verdict
    assert "its sign is reversed" in check_loss(lambda b: -loss(b)).verdict
    stale = check_loss(lambda b: -(b.logprobs * b.advantages)[b.mask].mean())
    assert stale.exact
    assert "a loss without a ratio is made for one step" in stale.verdict


def log_ratio(b: Batch) -> Tensor:
    return b.logprobs - b.ref_logprobs


def own_k3(b: Batch) -> Tensor:
    """Of the bundled `k3_coef`, token by token."""
    one = torch.ones((), dtype=torch.float64)
    each = torch.vmap(lambda ref, own: approx_kl(ref, own, one))
    return each(b.ref_logprobs.flatten(), b.logprobs.flatten()).view_as(b.logprobs)


KL: dict[str, tuple[Callable[[Batch], Tensor], bool, bool, str]] = {
    "k1": (log_ratio, True, True, "nothing: its gradient is 0 on average"),
    "k2": (lambda b: log_ratio(b) ** 2 / 2, False, False, "KL(pi || ref) of each state"),
    "k3": (own_k3, True, False, "KL(ref || pi) of each state"),
}
"""Its value is the KL, its gradient in the reward is right, and what it follows as a loss."""


@pytest.mark.parametrize("name", KL)
def test_each_kl_estimator_is_right_for_its_use(name: str) -> None:
    function, value, reward, follows = KL[name]
    report = check_kl(function, name)
    assert (abs(report.value - 1) < 1e-9) == value
    assert report.in_reward.exact == reward
    assert report.follows == follows
    assert report.exact
    assert not report.upside_down


@pytest.mark.parametrize(
    ("function", "follows"),
    [
        (lambda b: -log_ratio(b), "nothing: its gradient is 0 on average"),
        (
            lambda b: torch.expm1(log_ratio(b)) - log_ratio(b),
            "half the chi-square(pi || ref) of each state",
        ),
    ],
)
def test_a_ratio_upside_down_is_found(function: Callable[[Batch], Tensor], follows: str) -> None:
    report = check_kl(function)
    assert report.upside_down
    assert not report.exact
    assert report.follows == follows
    assert "upside down" in report.verdict


def test_reports_are_tables_and_plain_values() -> None:
    for report in (
        check_advantages(gae, "mine"),
        check_loss(loss, "mine"),
        check_kl(own_k3, "mine"),
    ):
        values = json.loads(json.dumps(report.to_dict()))
        assert values["name"] == "mine"
        assert values["exact"]
        assert "mine: " in str(report)


def test_another_shape_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"mine returned \(\d+,\); it must return a tensor"):
        check_advantages(lambda b: b.scores, "mine")
    with pytest.raises(InvalidArgument, match="not finite"):
        check_advantages(lambda b: b.rewards / 0)
