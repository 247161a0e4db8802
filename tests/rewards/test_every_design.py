"""Every named design on every registered id: it steps as it scores, or says what is missing."""

import warnings
from typing import Any

import fakes
import numpy as np
import pytest
import tasks
from gymnasium.vector import AutoresetMode

from tokenenv.errors import InvalidArgument
from tokenenv.registration import TASKS
from tokenenv.rewards.designs import DESIGNS, make_terms
from tokenenv.rewards.term import NEEDS

CAUSAL = {"causal scorer", "scorer", "reference", "step scorer", "trainable model"}
TRANSFORMER = CAUSAL | {"token scorer", "transformer scorer", "tokenizer"}
AUTOMATON = CAUSAL | {"oracle", "teacher", "tokenizer"}
HAS = {
    "Arithmetic": CAUSAL | {"step ends", "tokenizer"},
    "Brackets": AUTOMATON,
    "Calculator": CAUSAL | {"step ends", "tokenizer", "turns"},
    "ChatGen": TRANSFORMER | {"implicit model", "step ends", "teacher", "turns"},
    "DelayedKey": AUTOMATON,
    "Dialogue": AUTOMATON | {"turns"},
    "Negation": AUTOMATON,
    "PlantedPhrase": AUTOMATON,
    "PyDocs": TRANSFORMER,
    "Reviews": TRANSFORMER,
    "TextGen": TRANSFORMER | {"implicit model", "step ends", "teacher"},
    "Twenty": AUTOMATON | {"turns"},
}
"""What each id has for a design to build on."""
CASES = [
    pytest.param(env_id, design, id=f"{env_id.split('/')[1]}-{design}")
    for env_id in TASKS
    for design in DESIGNS
]


def make(env_id: str, design: str) -> Any:
    options = tasks.registered(env_id)
    if "Gen" in env_id:
        options |= {
            "implicit_model": fakes.causal_lm(seed=5, num_hidden_layers=1),
            "teacher": fakes.causal_lm(seed=6, num_hidden_layers=1),
            "step_end_token_ids": [4, 5, 6],
        }
    return tasks.make_vec(4, AutoresetMode.SAME_STEP, env_id, reward=design, **options)


def missing(env_id: str, design: str) -> set[str]:
    name = env_id.split("/")[1].removesuffix("-v0")
    return {need for term in make_terms(design).values() for need in term.needs} - HAS[name]


@pytest.mark.filterwarnings("ignore:reward='gradient':RuntimeWarning")
@pytest.mark.parametrize(("env_id", "design"), CASES)
def test_a_design_steps_as_it_scores_or_names_what_it_lacks(env_id: str, design: str) -> None:
    lacks = missing(env_id, design)
    if lacks:
        with pytest.raises(InvalidArgument) as error:
            make(env_id, design)
        assert (
            f"reward={design!r} needs {NEEDS[sorted(lacks)[0]]}, which this env does not have"
            in str(error.value)
        )
        return
    envs = make(env_id, design)
    # A schedule goes on with every token: of that design, the texts that began with the reset.
    episodes = (
        tasks.play(envs, steps=tasks.T, stop=0.0)
        if design == "progressive"
        else tasks.play(envs, steps=2 * tasks.T)
    )
    turns: dict[str, Any] = {}
    if envs.unwrapped.token_spec.responds:
        turns["own"] = [e.own for e in episodes]
        turns["turn_rewards"] = [[info["turn_reward"] for info in e.infos] for e in episodes]
    paid = envs.unwrapped.score_episodes(
        [e.prompt for e in episodes],
        [e.response for e in episodes],
        truncated=[e.truncated for e in episodes],
        weights={"terminal": 1.0, "delta": 0.0} if design == "progressive" else None,
        **turns,
    )
    placed = np.stack([e.infos[-1]["token_rewards"] for e in episodes])
    stepped = np.stack([e.padded(e.rewards, tasks.T) for e in episodes])
    # An integral adds up slopes of both signs, so its rounding is relative to their sizes (up to 19
    # here), not to the reward.
    size = np.abs(placed).sum(1, keepdims=True).clip(1.0) if design == "gradient" else 1.0
    tasks.assert_equal(paid.token_rewards / size, placed / size, 1e-5)
    for name, values in paid.token_reward_terms.items():
        theirs = np.stack([e.infos[-1]["token_reward_terms"][name] for e in episodes])
        tasks.assert_equal(values / size, theirs / size, 1e-5)
    tasks.assert_equal(paid.step_rewards / size, stepped / size, 1e-5)
    tasks.assert_equal(placed.sum(1), stepped.sum(1), 1e-5)
    assert len(episodes) >= 4
    assert np.abs(stepped).max() > 0


def test_no_id_is_left_out() -> None:
    assert {env_id.split("/")[1].removesuffix("-v0") for env_id in TASKS} == set(HAS)


def test_every_design_runs_somewhere() -> None:
    assert {
        design for _, design in (case.values for case in CASES if not missing(*case.values))
    } == set(DESIGNS)


def test_a_learner_is_told_once_of_a_bias_and_of_what_to_do() -> None:
    from tokenenv.agents import PPO

    for reward, told in {"uniform": True, "delta": False, "terminal": False}.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            PPO(tasks.make_vec(2, AutoresetMode.SAME_STEP, reward=reward), batch_tokens=8).learn(16)
        messages = [str(w.message) for w in caught if "reward-to-go" in str(w.message)]
        assert len(messages) == told
        assert all("'uniform'" in message and "'delta'" in message for message in messages)
