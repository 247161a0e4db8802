"""What a task's file says about itself is what its environment is: pages are made from it."""

import inspect
import re

import gymnasium as gym
import pytest

from tokenenv.env.build import load_task
from tokenenv.registration import TASKS

SECTIONS = [
    "Description",
    "Observation Space",
    "Action Space",
    "Rewards",
    "Starting State",
    "Episode End",
    "Arguments",
    "Version History",
]
OWN = sorted(set(TASKS) - {"tokenenv/ChatGen-v0", "tokenenv/TextGen-v0"})


def page_of(env_id):
    return inspect.getdoc(inspect.getmodule(load_task(TASKS[env_id])))


def sections_of(env_id):
    """The text under each heading, on one line each."""
    parts = re.split(r"^## (.*)\n", page_of(env_id), flags=re.M)
    return {
        name: " ".join(text.split()) for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }


@pytest.mark.parametrize("env_id", sorted(TASKS))
def test_every_page_has_the_sections_of_gymnasiums_own(env_id):
    assert page_of(env_id).split("\n")[0].startswith(f"{env_id.split('/')[1]}: ")
    assert list(sections_of(env_id)) == SECTIONS


@pytest.mark.parametrize("env_id", sorted(TASKS))
def test_every_argument_is_described_once(env_id):
    task = load_task(TASKS[env_id])
    described = re.findall(
        r"^    (\w+): ", inspect.getdoc(task).split("Args:")[1].split("\n\n")[0], re.M
    )
    assert described == list(inspect.signature(task).parameters)


@pytest.mark.parametrize("env_id", OWN)
def test_spaces_and_numbers_are_those_of_the_env(env_id):
    envs = gym.make_vec(env_id, num_envs=2).unwrapped
    spec, page = envs.token_spec, sections_of(env_id)
    space = envs.single_observation_space
    order = [
        one for one in ("tokens", "length", "prompt_length", "own_mask") if one in space.spaces
    ]
    said = ", ".join(f"{key}={space[key]}" for key in order)
    assert f"`Dict({said})`" in page["Observation Space"]
    assert f"P = {spec.max_prompt_tokens}" in page["Observation Space"]
    assert f"T = {spec.max_new_tokens}" in page["Observation Space"]
    features = gym.make_vec(env_id, num_envs=2, observation="features").single_observation_space
    assert str(features) in page["Observation Space"]
    assert f"`{envs.single_action_space}`" in page["Action Space"]
    assert f"`kl_coef={envs.kl_coef}`" in page["Rewards"]
    assert f'The default design is "{envs._task.reward}"' in page["Rewards"]
    for token in spec.stop_token_ids:
        assert f"`{spec.tokenizer.convert_ids_to_tokens(token)}`" in page["Episode End"]
    assert spec.stop_token_ids or "no stop token" in page["Episode End"]


@pytest.mark.parametrize("env_id", [one for one in OWN if "split" not in page_of(one)])
def test_the_optimum_is_the_one_that_is_said(env_id):
    envs = gym.make_vec(env_id, num_envs=2).unwrapped
    found = re.search(
        r"is ([-\d.]+) at the optimum \(J\*\) and ([-\d.]+) for the",
        page_of(env_id).replace("\n", " "),
    )
    best, reference = map(float, found.groups())
    assert best == round(envs.oracle.optimal_objective(envs.kl_coef), 3)
    assert reference == round(envs.oracle.reference_objective(), 3)
    states = re.search(r"automaton state \((\d+)\)", " ".join(page_of(env_id).split()))
    assert int(states[1]) == envs.oracle.automaton.num_states


@pytest.mark.parametrize(
    "env_id", ["tokenenv/Reviews-v0", "tokenenv/Arithmetic-v0", "tokenenv/Calculator-v0"]
)
def test_the_numbers_of_prompts_are_those_that_are_said(env_id):
    """PyDocs-v0 has other prompts in other versions of Python."""
    start = sections_of(env_id)["Starting State"]
    for split in ("train", "test"):
        count = f"{len(gym.make_vec(env_id, num_envs=2, split=split).unwrapped.prompts):,}"
        assert re.search(rf'"{split}" (has )?{count}\b', start)


@pytest.mark.parametrize("env_id", OWN)
def test_the_example_of_a_page_runs(env_id):
    (code,) = re.findall(r"```python\n(.*?)```", page_of(env_id), flags=re.S)
    names = {"gym": gym}
    exec(code, names)
    assert names["envs"].num_envs == 64
    assert names["envs"].spec.id == env_id
