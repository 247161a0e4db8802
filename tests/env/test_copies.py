"""Envs copied with `copy.deepcopy` or by a pickle: the same from there on, and nothing shared."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import fakes
import gymnasium as gym
import numpy as np
import pytest
import tasks
import torch
from gymnasium.vector import AutoresetMode
from tasks import TOY, assert_equal, copied, id_cases, make_vec, random_actions, toy_cases

from tokenenv.errors import ModelError
from tokenenv.models.automaton import Automaton
from tokenenv.models.slot_cache import KVSlots
from tokenenv.rewards import Implicit, PositionScaled, Scaled, Segment
from tokenenv.types import Scorer

N = 3
COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda envs: pickle.loads(pickle.dumps(envs)),
}
LEARNED = {
    "reward": {"a": Scaled(Segment(1.0)), "b": PositionScaled("uniform"), "c": "process"},
    "step_ends": (12, 13),
}
WHERE = [
    *[
        pytest.param(*case.values, how, id=f"{case.id}-{how}")
        for case in id_cases()
        for how in COPIES
    ],
    *[
        pytest.param(*case.values, "deepcopy", id=case.id)
        for case in toy_cases("mixture", "k1", "features", "no scorer")
    ],
    pytest.param(TOY, LEARNED, "deepcopy", id="learned"),
]


def follow(envs: Any, plan: list[Any]) -> list[Any]:
    return [copied(dict(enumerate(envs.step(copied(actions))))) for actions in plan]


@pytest.mark.parametrize(("env_id", "options", "how"), WHERE)
def test_a_copy_goes_on_as_the_original_and_shares_nothing_with_it(
    env_id: str, options: dict[str, Any], how: str
) -> None:
    envs = make_vec(N, AutoresetMode.SAME_STEP, env_id, **options)
    rng = np.random.default_rng(0)
    plan = [random_actions(rng, envs) for _ in range(12)]
    envs.reset(seed=4)
    follow(envs, plan[:4])
    twin = COPIES[how](envs)
    first = follow(twin, plan[4:])
    twin.unwrapped.kl_coef = 7.0
    for actual, expected in zip(follow(envs, plan[4:]), first, strict=True):
        assert_equal(actual, expected)
    assert envs.unwrapped.kl_coef != 7.0
    assert_equal(envs.reset(seed=2)[0], twin.reset(seed=2)[0])


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_reads_its_own_models(how: str) -> None:
    """Heads and caches included: weights that change in one do not show in the other."""
    envs = make_vec(N, AutoresetMode.SAME_STEP, "tokenenv/Reviews-v0")
    envs.reset(seed=0)
    twin = COPIES[how](envs.unwrapped)
    before = envs.unwrapped.ref_logprobs()
    with torch.no_grad():
        for parameter in [*twin.reference.parameters(), *twin._task.scorer.model.parameters()]:
            parameter.mul_(0.5)
    np.testing.assert_array_equal(envs.unwrapped.ref_logprobs(), before)
    ours, theirs = (env.score_episodes([[5, 6]], [[7, 8, 9]]) for env in (envs.unwrapped, twin))
    assert (ours.ref_logprobs[0, :3] != theirs.ref_logprobs[0, :3]).all()
    assert ours.score != theirs.score
    twin.step(np.full(N, 9))


@pytest.mark.parametrize("name", ["attention", "occlusion", "shapley", "gradient"])
def test_models_that_credit_was_read_from_can_still_be_pickled(name: str) -> None:
    """transformers leaves hooks in a model that has shown its attention."""
    envs = make_vec(
        N, AutoresetMode.SAME_STEP, "tokenenv/Reviews-v0", reward=name, max_new_tokens=2
    )
    envs.reset(seed=0)
    plan = [np.full(N, 9), np.full(N, 10)]
    twin = pickle.loads(pickle.dumps(envs))
    for actual, expected in zip(follow(envs, plan), follow(twin, plan), strict=True):
        assert_equal(actual, expected)
    pickle.dumps(envs)


def test_one_text_at_a_time_is_copied_too() -> None:
    for how in COPIES.values():
        env = gym.make("tokenenv/Brackets-v0", max_new_tokens=5)
        env.reset(seed=0)
        env.step(3)
        twin = how(env)
        assert_equal(env.step(2)[0], twin.step(2)[0])
        assert twin.unwrapped.vector is not env.unwrapped.vector


def test_a_model_runs_once_a_step_whoever_reads_it_and_two_models_run_twice() -> None:
    """A copy of a model is another model, though all its weights are equal."""
    other = copy.deepcopy(tasks.reference())
    calls: list[Any] = []
    hooks = [
        m.model.register_forward_hook(lambda m, *_: calls.append(m))
        for m in (tasks.reference(), other)
    ]
    terms = {
        "a": Implicit(tasks.reference(), coef=1.0),
        "b": Implicit(other, coef=1.0),
        "c": Segment(1.0),
    }
    envs = make_vec(2, AutoresetMode.SAME_STEP, reward=terms)
    envs.reset(seed=0)
    calls.clear()
    envs.step(np.array([20, 21]))
    assert [sum(one is m.model for one in calls) for m in (tasks.reference(), other)] == [1, 1]
    for hook in hooks:
        hook.remove()


@dataclass
class ByValue:
    """A model that compares by value and so has no hash."""

    device: str = "cpu"

    def slots(self, num_rows: int, max_length: int) -> Any:
        raise AssertionError("never asked for")


def test_models_that_compare_by_value_are_refused_in_a_sentence() -> None:
    task = tasks.toy()
    changed = {name: getattr(task, name) for name in type(task).__slots__}
    scorer = Scorer(ByValue(), lambda states: states, per_token=False)
    with pytest.raises(
        ModelError, match=r"ByValue defines __eq__ or __hash__, .* a dataclass takes eq=False"
    ):
        make_vec(2, task=type(task)(**{**changed, "scorer": scorer}), reward="terminal")


@pytest.mark.parametrize("how", COPIES)
def test_a_compiled_cache_compiles_anew(how: str) -> None:
    rows = KVSlots(fakes.causal_lm(num_hidden_layers=1).model, 2, 8, compile=True)
    rows.prefill(torch.tensor([0, 1]), torch.tensor([[5, 6], [7, 8]]))
    twin = COPIES[how](rows)
    assert twin.step_trunk._orig_mod is twin.trunk
    assert twin.trunk is not rows.trunk
    assert twin.nbytes == rows.nbytes > 0


def test_scorers_of_tables_are_copied_with_their_tables() -> None:
    automaton = Automaton(np.array([[0, 1], [1, 0]]), np.array([0.0, 1.0]))
    for how in COPIES.values():
        scorer = how(Scorer(automaton, automaton.score, per_token=False))
        assert scorer.head.__self__ is scorer.model is not automaton
