"""`rollout="auto"`: what is chosen and why, that the trial leaves no trace, and that the choice is
kept."""

import itertools
import logging

import numpy as np
import pytest
import tasks
import torch
from gymnasium.vector import AutoresetMode
from test_text_collector import make, run
from test_text_turns import make as make_turns

from tokenenv.agents import GRPO, PPO, VinePPO
from tokenenv.agents.rollout import choose
from tokenenv.errors import InvalidArgument
from tokenenv.rewards.scaling import Scaled
from tokenenv.wrappers import ActionMask


def agent_of(envs, algorithm=PPO, **options):
    given = {"rollout": "auto", "batch_tokens": 60, "minibatches": 2, "lr": 1e-2}
    return algorithm(envs, **given | options)


@pytest.fixture
def seconds(monkeypatch):
    """What the trial is to find of each part, in the place of what it measures; it is run all the
    same."""
    fixed = {"_stepping": 3.0, "_writing": 1.0, "_reading": 1.0}
    for part in fixed:
        real = getattr(choose, part)

        def measured(*args, real=real, part=part, **options):
            assert real(*args, **options) > 0
            return fixed[part]

        monkeypatch.setattr(choose, part, measured)
    return fixed


SETTLED = {
    "turns": (lambda: make_turns("turns"), "the environment writes into texts"),
    "memory": (lambda: tasks.make_vec(4, **tasks.TOYS["memories"]), "carries a memory"),
    "statistics": (lambda: make(reward=Scaled("token")), "learns from the texts"),
    "mask": (lambda: ActionMask(make(), top_p=0.9), "ActionMask around the env"),
}


@pytest.mark.parametrize("name", SETTLED)
def test_what_needs_stepping_is_stepped_without_a_trial(name, caplog, monkeypatch):
    monkeypatch.setattr(choose, "_tried", lambda *args: pytest.fail("tried"))
    make_envs, reason = SETTLED[name]
    with caplog.at_level(logging.WARNING, logger="tokenenv"):
        agent = agent_of(make_envs())
    assert agent.config.rollout == "step"
    [line] = [r.getMessage() for r in caplog.records if "rollout" in r.getMessage()]
    assert line.startswith('rollout="auto" is "step" here: ')
    assert reason in line


@pytest.mark.parametrize("slower", ["_stepping", "_writing", "_reading"])
def test_the_faster_one_is_taken(slower, seconds, caplog):
    seconds[slower] = 10.0
    with caplog.at_level(logging.WARNING, logger="tokenenv"):
        agent = agent_of(make())
    wanted = "episode" if slower == "_stepping" else "step"
    assert agent.config.rollout == wanted
    [line] = [r.getMessage() for r in caplog.records]
    assert line.startswith(f'rollout="auto" is "{wanted}" here: in a trial a token took ')


OPTIONS = {
    "plain": (PPO, {}, {}),
    "next step": (PPO, {"mode": AutoresetMode.NEXT_STEP}, {}),
    "penalty in the env": (PPO, {"kl": "policy", "reward": "uniform"}, {}),
    "scheduled": (PPO, {"reward": {"a": ("token", lambda seen: 1 + seen / 50)}}, {}),
    "groups, torch": (GRPO, {"group_size": 3, "array": "torch"}, {"lora_rank": 2}),
    "continuations": (VinePPO, {}, {"rollouts": 2}),
}


@pytest.mark.parametrize(
    ("name", "slower"), zip(OPTIONS, itertools.cycle(["_stepping", "_writing"]))
)
def test_a_trial_leaves_no_trace(name, slower, seconds):
    """The run is the one of what was chosen, bit for bit."""
    seconds[slower] = 10.0
    algorithm, env_options, options = OPTIONS[name]
    tried = agent_of(make(**env_options), algorithm, **options)
    named = agent_of(make(**env_options), algorithm, **options | {"rollout": tried.config.rollout})
    assert tried.core.tokens_seen == tried.tokens_seen == 0
    for (one, some), (other, others) in zip(run(tried, 2), run(named, 2), strict=True):
        del one["time/tokens_per_second"], other["time/tokens_per_second"]
        np.testing.assert_equal(one, other)
        for a, b in zip(some, others, strict=True):
            np.testing.assert_array_equal(a.response, b.response)
    for a, b in zip(tried.policy.parameters(), named.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_resumed_run_keeps_the_choice(seconds, tmp_path, monkeypatch):
    agent = agent_of(make())
    agent.learn(1)
    agent.save(tmp_path / "c")
    monkeypatch.setattr(choose, "_tried", lambda *args: pytest.fail("tried again"))
    resumed = PPO.load(tmp_path / "c", make())
    assert resumed.config.rollout == agent.config.rollout == "episode"


def test_short_texts_and_other_prompts_can_be_tried():
    """By what the trial really measures, whatever that is."""
    for envs in (make(3), tasks.make_vec(4, AutoresetMode.SAME_STEP, "tokenenv/Arithmetic-v0")):
        assert agent_of(envs).config.rollout in ("step", "episode")


def test_options_of_another_engine_are_named():
    with pytest.raises(InvalidArgument, match=r"rollout_options='timeout'.*num_texts"):
        agent_of(make(), rollout_options={"timeout": 3})
