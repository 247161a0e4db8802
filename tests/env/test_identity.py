"""A checkpoint goes on in the env that it was made in, and in no other of the same shapes."""

import dataclasses

import fakes
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from toy_env import ToyEnv

import tokenenv  # noqa: F401
from tokenenv.agents import PPO
from tokenenv.env.identity import digest, plain, prompts_digest
from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.errors import CheckpointError
from tokenenv.models.heads import make_scorer
from tokenenv.rewards.rule import Rule
from tokenenv.rewards.scaling import Clipped
from tokenenv.types import Task
from tokenenv.wrappers import ActionMask


def one(prompt, response):
    return 1.0


def other(prompt, response):
    return 2.0


@pytest.fixture(scope="module")
def task():
    """Tiny models; a task that nobody registered."""
    return Task(
        tokenizer=fakes.tokenizer(),
        reference=fakes.causal_lm(num_hidden_layers=1),
        prompts=[[5, 6, 7], [8], [9, 10]],
        max_prompt_tokens=4,
        max_new_tokens=7,
        stop_token_ids=(fakes.EOS,),
        scorer=make_scorer(fakes.reward_model("token", num_hidden_layers=1)),
    )


def make(task, num_envs=4, **options):
    return TokenVectorEnv(
        num_envs, task=task, **{"autoreset_mode": AutoresetMode.SAME_STEP, **options}
    )


def changed(model):
    """The same model with one weight moved a little."""
    import copy

    model = copy.deepcopy(model)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 0.25
    return model


@pytest.fixture(scope="module")
def saved(task, tmp_path_factory):
    """A checkpoint of a run that has begun."""
    path = tmp_path_factory.mktemp("saved") / "c"
    PPO(make(task), batch_tokens=20).learn(20).save(path)
    return path


OTHERS = {
    "prompts": (
        lambda t: make(dataclasses.replace(t, prompts=[[5, 6, 7], [8], [9, 11]])),
        "prompts is '3 prompts, ",
    ),
    "reference": (
        lambda t: make(dataclasses.replace(t, reference=changed(t.reference))),
        "models.reference is ",
    ),
    "model": (
        lambda t: make(dataclasses.replace(t, model=changed(t.reference))),
        "models.model is 'absent' there and ",
    ),
    "reward model": (
        lambda t: make(
            dataclasses.replace(
                t, scorer=make_scorer(fakes.reward_model("token", seed=5, num_hidden_layers=1))
            )
        ),
        "models.scorer is ",
    ),
    "reward": (
        lambda t: make(t, reward="terminal"),
        "terms.token.class is 'Token' there and 'absent' here",
    ),
    "weight": (
        lambda t: make(t, reward={"token": ("token", 0.5)}),
        "terms.token.weight is 1.0 there and 0.5 here",
    ),
    "beta": (lambda t: make(t, kl_coef=0.3), "options.kl_coef is 0.05 there and 0.3 here"),
    "kl": (lambda t: make(t, kl="policy"), "options.kl is 'reference' there and 'policy' here"),
    "length": (lambda t: make(t, max_new_tokens=6), "options.max_new_tokens is 7 there and 6 here"),
    "unscored": (
        lambda t: make(t, score_truncated=False),
        "options.score_truncated is True there and False here",
    ),
    "penalty": (
        lambda t: make(t, missing_eos_penalty=1.0),
        "options.missing_eos_penalty is 0.0 there and 1.0 here",
    ),
    "mode": (
        lambda t: make(t, autoreset_mode="NextStep"),
        "options.autoreset_mode is 'SameStep' there and 'NextStep' here",
    ),
    "groups": (lambda t: make(t, group_size=2), "options.group_size is 1 there and 2 here"),
    "stop tokens": (
        lambda t: make(dataclasses.replace(t, stop_token_ids=(fakes.EOS, 9))),
        "tokens.stop_token_ids is ",
    ),
    "fewer": (lambda t: make(t, 3), "num_envs is 4 there and 3 here"),
    "more": (lambda t: make(t, 5), "num_envs is 4 there and 5 here"),
    "mask": (
        lambda t: ActionMask(make(t), top_p=0.9),
        "ActionMask.top_p is 'absent' there and 0.9 here",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_env_of_the_same_shapes_is_refused(task, saved, name):
    make_other, message = OTHERS[name]
    envs = make_other(task)
    before = envs.unwrapped.kl_coef
    with pytest.raises(CheckpointError, match="belongs to another env") as error:
        PPO.load(saved, envs, policy=PPO(make(task)).policy)
    assert message in str(error.value)
    assert envs.unwrapped.kl_coef == before


@pytest.mark.parametrize(
    "options", [{}, {"array": "torch"}, {"max_batch_tokens": 64}, {"render_mode": "ansi"}]
)
def test_what_changes_no_result_may_differ(task, saved, options):
    agent = PPO.load(saved, make(task, **options))
    assert agent.learn(60).updates > 1


def test_an_id_is_not_another_of_the_same_shapes(tmp_path):
    options = {"num_envs": 2, "autoreset_mode": "SameStep", "max_new_tokens": 4}
    PPO(gym.make_vec("tokenenv/Negation-v0", **options), batch_tokens=8).save(tmp_path / "c")
    PPO.load(tmp_path / "c", gym.make_vec("tokenenv/Negation-v0", **options))
    with pytest.raises(
        CheckpointError,
        match="id is 'tokenenv/Negation-v0' there and 'tokenenv/DelayedKey-v0' here",
    ):
        PPO.load(tmp_path / "c", gym.make_vec("tokenenv/DelayedKey-v0", **options))


def test_an_env_of_another_kind_is_told_by_its_class_and_actions(tmp_path):
    class Other(ToyEnv):
        pass

    PPO(ToyEnv(2)).save(tmp_path / "c")
    with pytest.raises(CheckpointError, match="class is 'ToyEnv' there and 'Other' here"):
        PPO.load(tmp_path / "c", Other(2))


def test_an_env_is_the_same_before_and_after_it_has_run(task):
    envs = make(task, reward={"rule": Clipped(Rule(one), low=0.0, high=0.5)})
    before = envs.identity
    PPO(envs, batch_tokens=20).learn(40)
    assert (
        envs.identity
        == before
        == make(task, reward={"rule": Clipped(Rule(one), low=0.0, high=0.5)}).identity
    )
    assert before != make(task, reward={"rule": Clipped(Rule(other), low=0.0, high=0.5)}).identity
    assert before != make(task, reward={"rule": Clipped(Rule(one), low=0.0, high=0.25)}).identity
    assert set(before) == {"id", "options", "tokens", "prompts", "models", "terms"}


def test_digests_see_values_types_and_shapes():
    values = np.arange(100_000, dtype=np.float32)
    assert digest(values) == digest(values.copy()) != digest(values + 1)
    assert digest(values) != digest(np.r_[values, 0].astype(np.float32)) != digest(values[:-1])
    assert (
        digest(torch.zeros(2, 3))
        != digest(torch.zeros(3, 2))
        != digest(torch.zeros(3, 2, dtype=torch.bfloat16))
    )
    assert prompts_digest([[1, 2], [3]]) != prompts_digest([[1], [2, 3]])
    assert plain([one, (1, None), {"a": np.float32(0.5)}]) == ["one", [1, None], {"a": 0.5}]


def test_reward_models_that_differ_in_their_head_alone_are_told_apart():
    models = [fakes.reward_model() for _ in range(3)]
    with torch.no_grad():
        models[2].score.weight.add_(1.0)
    first, same, other_head = (digest(make_scorer(model)) for model in models)
    assert first == same != other_head
