"""The questions of `benchmarks/suite` that need no training run: identities of what they measure."""

import importlib.util
import sys
from pathlib import Path

import fakes
import gymnasium as gym
import numpy as np
import pytest
import torch
from tabular import relative_error, to_go
from transformers import LlamaConfig, LlamaForCausalLM

from tokenenv.fit.examples import Text
from tokenenv.fit.measure import correlation, ranks
from tokenenv.rewards import Shapley
from tokenenv.rewards.shaping import Oracle

SUITE = Path(__file__).parents[2] / "benchmarks" / "suite"


def script(name, file="run"):
    """A script of the suite, as a module. Scripts put folders in front of `sys.path`."""
    path, before = SUITE / name / f"{file}.py", list(sys.path)
    spec = importlib.util.spec_from_file_location(f"suite_{name}_{file}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    return module


gradients, bound = script("gradient_preserving"), script("entropy_bound")
sweep, lora = script("reward_model"), script("lora_credit")
prepare, attribution = script("attribution", "prepare"), script("attribution")
from tidy import fill, interval, read, text_of  # noqa: E402  (a script has imported it)

World = sweep.World


def language_model():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, vocab_size=64)).eval()


# ------------------------------------------------------------------------------ gradient_preserving


@pytest.mark.parametrize("scores", ["any", "sum"])
def test_what_a_causal_difference_and_a_hindsight_share_do_to_the_gradient(scores):
    found = {row["design"]: row for row in gradients.measured(scores, seed=3)}
    for name, row in found.items():
        exact = name.startswith(("terminal", "prefix")) or "whole return" in name
        additive = scores == "sum" and name in ("leave-one-out + rest", "shapley")
        assert row["error"] < 1e-9 if exact or additive else row["error"] > 0.1, name
    assert found["terminal"]["variance"] == 1.0
    # The true value is the baseline of the texts' own mean, so nothing is added to the variance.
    assert found["prefix difference, f = E_pi[R | prefix]"]["variance"] < 1.0


def test_every_placement_pays_the_score_in_all():
    world = gradients.world_of("any", 0)
    score = world.rewards(per_token=False).sum(1)
    for placed in (gradients.shares(world), gradients.leave_one_out(world)):
        torch.testing.assert_close(placed.sum(1), score)
    for placed in (gradients.shapley(world), gradients.prefix_difference(world, world.scores)):
        torch.testing.assert_close(placed.sum(1), score - world.scores[0])


def test_the_placements_are_those_of_the_env():
    world = gradients.world_of("any", 1)
    # The env draws 8 orders of the 24; with all of them there is nothing to draw.
    for reward, placed in (
        ("delta", gradients.prefix_difference(world, world.scores)),
        ("occlusion", gradients.leave_one_out(world)),
        (Shapley(permutations=24), gradients.shapley(world)),
    ):
        paid = torch.from_numpy(world.paid(reward=reward).token_rewards).double()
        torch.testing.assert_close(paid, placed, rtol=0, atol=1e-5)


def test_the_variance_is_that_of_the_gradients_of_single_texts():
    world = gradients.world_of("any", 2)
    credit = gradients.DESIGNS["uniform"](world)
    probs, mean = world.probs(world.policy), world.policy_gradient(credit)
    total = 0.0
    for row in range(len(probs)):
        alone = torch.zeros_like(credit)
        alone[row] = credit[row] / probs[row]
        total += float(probs[row] * (world.policy_gradient(alone) - mean).square().sum())
    assert gradients.variance(world, credit) == pytest.approx(total)


def test_the_expected_score_goes_on_with_the_policy():
    world = gradients.world_of("any", 0)
    start = gradients.expected_scores(world, world.policy)[0]
    score = world.rewards(per_token=False).sum(1)
    assert float(start) == pytest.approx(float(world.probs(world.policy) @ score))
    # And its differences are unbiased with the least credit left at the first token.
    credit = to_go(
        gradients.prefix_difference(world, gradients.expected_scores(world, world.policy))
    )
    exact = world.gradient_of_mean(lambda logprob: score)
    assert relative_error(world.policy_gradient(credit), exact) < 1e-9


# ------------------------------------------------------------------------------------ entropy_bound


def test_the_two_sides_of_the_bound_for_two_words_by_hand():
    probs = np.array([[0.25, 0.75]])
    entropy = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    assert bound.entropy(probs) == pytest.approx(entropy)
    # The word decides the outcome: the credit is all of the entropy.
    chance, shift = bound.shifts(probs, np.array([[[1.0, 0.0], [0.0, 1.0]]]))
    assert chance == pytest.approx(probs)
    assert shift == pytest.approx(-np.log(probs))
    assert (chance * shift).sum() == pytest.approx(entropy)
    # The word says nothing: there is none.
    assert bound.shifts(probs, np.array([[[0.3, 0.7]] * 2]))[1] == pytest.approx(0.0)
    # Between: P(success) = 1/2, and h(first | success) = 1/2, h(first | failure) = 0.
    chance, shift = bound.shifts(probs, np.array([[[0.0, 1.0], [2 / 3, 1 / 3]]]))
    assert chance == pytest.approx(0.5)
    by_hand = [np.log(1 / 0.75), 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)]
    assert shift[0] == pytest.approx(by_hand)
    # A rare outcome may shift the policy by more than its entropy; the mean may not.
    assert bound.shifts(probs, np.array([[[0.01, 0.99], [0.0, 1.0]]]))[1][0, 0] > entropy


@pytest.fixture(scope="module")
def oracle():
    return gym.make_vec("tokenenv/Negation-v0", 1, max_new_tokens=5).unwrapped.oracle


@pytest.mark.parametrize("policy", ["reference", "random", "optimum, beta 0.05"])
def test_the_bound_holds_and_visits_and_outcomes_are_chances(oracle, policy):
    for step in bound.steps_of(oracle, policy, "score", 0):
        assert step.visits.sum() == pytest.approx(1.0)
        assert step.probs.sum(1) == pytest.approx(1.0)
        assert step.outcomes.sum(2) == pytest.approx(1.0)
        chance, shift = bound.shifts(step.probs, step.outcomes)
        assert ((chance * shift).sum(1) <= bound.entropy(step.probs) + 1e-12).all()
        assert (chance * shift).sum(1).max() > 1e-6


def test_the_worth_of_a_word_is_the_oracles_and_outcomes_say_it_too(oracle):
    scores = np.unique(oracle.automaton.payoff)
    steps = bound.steps_of(oracle, "reference", "score", 0)
    values = oracle.token_values(np.inf)
    for t, step in enumerate(steps):
        states = step.states[:, 0]
        expected = values[t, states]  # whatever the last word was
        np.testing.assert_allclose(step.worth, expected, atol=1e-12)
        np.testing.assert_allclose(step.outcomes @ scores, step.worth, atol=1e-12)
        # Where texts are and what they will earn: the mean over visits is the same at each step.
        mean = step.visits @ (step.probs * step.worth).sum(1)
        assert mean == pytest.approx(oracle.reference_objective())
    coarse = bound.measured(oracle, "reference", "success", 0)
    # What is known of an outcome cannot grow when scores are told apart no more.
    assert coarse["tightness"] < bound.measured(oracle, "reference", "score", 0)["tightness"]


def test_a_weighted_rank_correlation_is_that_of_repeated_values():
    rng = np.random.default_rng(0)
    x, y, count = rng.integers(0, 9, 40), rng.normal(size=40), rng.integers(1, 5, 40)
    many = correlation(ranks(np.repeat(x, count)), ranks(np.repeat(y, count)))
    assert bound.weighted_spearman(x.astype(float), y, count.astype(float)) == pytest.approx(many)


# --------------------------------------------------------- reward_model, lora_credit


def test_every_cell_of_the_sweep_sees_as_many_examples(tmp_path):
    data = World("Negation-v0", 0, 0, tmp_path, tmp_path)
    for setting in ({"seed": 0, "objective": "bt-sum", "lr": 1e-3, "batch": b} for b in (8, 128)):
        made = sweep.config(setting, [], [], tmp_path, data)
        assert (made.epochs, made.patience) == (sweep.EPOCHS, sweep.EPOCHS)
        assert made.batch_examples == setting["batch"]


def test_what_is_in_the_file_is_not_run_again(tmp_path):
    asked = []

    def work(setting):
        asked.append(setting)
        if setting["lr"] == 0.01 and len(asked) == 2:
            raise KeyboardInterrupt
        return {"rho": 1.5}

    path = tmp_path / "results" / "results.csv"
    settings = [{"seed": 0, "name": "a", "lr": lr} for lr in (1e-4, 0.01)]
    with pytest.raises(KeyboardInterrupt):
        fill(path, settings, work)
    assert read(path) == [settings[0] | {"rho": 1.5}]
    assert fill(path, settings, work) == [one | {"rho": 1.5} for one in settings]
    assert [one["lr"] for one in asked] == [1e-4, 0.01, 0.01]


def test_how_concentrated_weights_are():
    assert lora.concentrated(np.full(4, 0.3)) == pytest.approx((0.0, 1.0))
    assert lora.concentrated(np.array([0.0, 2.0, 0.0, 0.0])) == pytest.approx((0.75, 0.25))
    # Gini's coefficient is half the mean difference of two weights, over their mean.
    some = np.array([3.0, 1.0, 2.0])
    gini = np.abs(some[:, None] - some).mean() / 2 / some.mean()
    assert lora.concentrated(some) == pytest.approx((gini, 36 / (3 * 14)))


def test_a_residual_is_of_the_state_that_a_token_is_chosen_from():
    model, base = language_model(), language_model()
    texts = [Text(np.array([0]), np.array([3, 5, 7])), Text(np.array([0]), np.array([1, 2]))]
    with torch.no_grad():
        model.model.embed_tokens.weight[7] += 1.0
    data = World("Negation-v0", 0, 0, Path(), Path(), texts=texts)
    # Token 7 is the last one: no token is chosen from the state behind it.
    assert [len(row) for row in lora.residuals(model, base, data)] == [3, 2]
    assert np.concatenate(lora.residuals(model, base, data)).max() == 0.0
    with torch.no_grad():
        model.model.embed_tokens.weight[3] += 1.0
    first, second = lora.residuals(model, base, data)
    assert (first > 0).tolist() == [False, True, True]
    assert second.max() == 0.0


# ----------------------------------------------------------------------------------------- attribution


def test_the_model_is_told_the_score_of_whole_texts_alone():
    row = prepare.texts_of(3, 2)[0]
    envs = gym.make_vec(prepare.ENV, 1, task_seed=3)
    score = envs.unwrapped.score_episodes([row["prompt_ids"]], [row["response_ids"]]).gold[0]
    assert row["values"][-1] == pytest.approx(float(score))
    assert row["values"][:-1] == [None] * 15


def test_the_first_order_is_the_slope_towards_the_word_without_meaning():
    model = fakes.reward_model("sequence", num_hidden_layers=1, vocab_size=64)
    term = attribution.FirstOrder(null=21)
    envs = gym.make_vec(
        prepare.ENV, 1, kl="none", reward={"placed": term}, reward_model=model, max_new_tokens=4
    )
    response = [5, 33, 21, 8]
    paid = envs.unwrapped.score_episodes([[0]], [response])
    embed, step = model.get_input_embeddings().weight, 1e-2

    def score(t=None, share=0.0):
        inputs = embed[[0, *response]].clone()
        if t is not None:
            inputs[t + 1] += share * (embed[21] - inputs[t + 1])
        with torch.no_grad():
            return float(model(inputs_embeds=inputs[None]).logits[0, -1].squeeze())

    slopes = [(score(t, -step) - score(t, step)) / (2 * step) for t in range(4)]
    assert slopes[2] == 0.0
    slopes[3] += score() - sum(slopes)
    np.testing.assert_allclose(paid.token_rewards[0], slopes, atol=2e-3 * np.abs(slopes).max())


def test_the_references_own_advantage_is_found(monkeypatch):
    exact = {"exact": Oracle(beta=np.inf), "terminal": "terminal", "uniform": "uniform"}
    monkeypatch.setattr(attribution, "designs_of", lambda tokenizer: exact)
    found = {row["design"]: row for row in attribution.measured(0, None, texts=32)}
    assert found["exact"]["reward"] == pytest.approx(1.0, abs=1e-4)
    assert found["exact"]["rho"] > 0.99
    # The score at the end is the sum of all, so every token's share of it is in it.
    assert 0.1 < found["terminal"]["credit"] < 0.6
    # A share is read where it is placed, and not where `step` pays it.
    assert found["uniform"]["reward"] > 1.5 * found["terminal"]["reward"]


# --------------------------------------------------------------------------------------------- tidy


def test_means_have_their_intervals():
    assert interval([2.0, 2.0, 2.0]) == (2.0, 2.0, 2.0)
    mean, low, high = interval(list(range(10)))
    assert mean == 4.5
    assert 2.0 < low < 3.5 < 5.5 < high < 7.0
    assert text_of([1.0, float("nan"), 1.0], 1) == "1.0 [1.0, 1.0]"
    assert text_of([3e-16, 5e-16]) == "4e-16"
    assert text_of([float("nan")]) == "-"
