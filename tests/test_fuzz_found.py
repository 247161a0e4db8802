"""What the fuzz test found, by hand: each was a traceback of another library's, and is refused by
an error of ours."""

import json

import fakes
import gymnasium as gym
import numpy as np
import pytest
import tasks
import torch

from tokenenv.agents import PPO
from tokenenv.agents.run.checkpoint import read_checkpoint, write_checkpoint
from tokenenv.agents.run.export import read_episodes
from tokenenv.errors import CheckpointError, InvalidArgument, ModelError
from tokenenv.prompts import load_prompts

TWO = torch.zeros(2)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("kl_coef", []),
        ("kl_clamp", TWO),
        ("kl_clamp", "1"),
        ("missing_eos_penalty", (1, 2)),
        ("missing_eos_penalty", None),
        ("score_truncated", "no"),
        ("compile", TWO),
        ("kl", TWO),
        ("array", np.zeros(2)),
        ("group_size", None),
        ("max_batch_tokens", None),
        ("door_mass", None),
        ("door_mass", "x"),
        ("device", "meta"),
        ("device", "nowhere"),
    ],
)
def test_an_option_of_another_type_is_named(option, value):
    with pytest.raises(InvalidArgument, match=option):
        gym.make_vec("tokenenv/DelayedKey-v0", num_envs=2, **{option: value})


@pytest.mark.parametrize("name", ["DelayedKey", "Brackets", "Arithmetic", "Reviews"])
def test_no_device_is_the_tasks_own(name):
    envs = gym.make_vec(f"tokenenv/{name}-v0", num_envs=2, device=None)
    assert envs.unwrapped.reference.device == torch.device("cpu")


OPTIONS = [
    object,
    TWO,
    np.zeros(2),
    3,
    "x",
    {"prompts": {0: 1, 1: 2}},
    {"prefixes": np.float32("nan")},
    {"prompts": b"ab"},
]


@pytest.mark.parametrize("options", [*OPTIONS, {"prompts": ["\udfff\ud800", [3]]}], ids=repr)
def test_options_of_a_reset_that_are_none_are_refused(options):
    envs = tasks.make_vec(2)
    envs.reset(seed=0)
    with pytest.raises(InvalidArgument, match="options"):
        envs.reset(options=options)
    envs.step(np.full(2, 10))


@pytest.mark.parametrize("key", ["format", "streams", "kl_coef", "tokens_seen", "texts"])
def test_a_state_with_an_array_in_the_place_of_a_number_is_refused(key):
    envs = tasks.make_vec(2)
    envs.reset(seed=0)
    state = envs.unwrapped.save_state()
    for junk in (TWO, np.zeros(2), {"group_size": TWO}):
        with pytest.raises(CheckpointError):
            envs.unwrapped.load_state(state | {key: junk})
    envs.step(np.full(2, 10))


@pytest.mark.parametrize(
    "key",
    [
        "agent",
        "config",
        "weights",
        "optimizer",
        "generator",
        "rng",
        "statistics",
        "collector",
        "env",
    ],
)
@pytest.mark.parametrize("junk", [{}, [], np.zeros(2), "x"], ids=repr)
def test_a_checkpoint_with_another_part_is_refused(key, junk, tmp_path):
    envs = tasks.make_vec(2, "SameStep")
    PPO(envs).save(tmp_path / "c")
    write_checkpoint(tmp_path / "c", read_checkpoint(tmp_path / "c") | {key: junk})
    with pytest.raises(CheckpointError):
        PPO.load(tmp_path / "c", envs)
    envs.reset(seed=0)
    envs.step(np.full(2, 10))


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "1" * 5000, "{}", "3", '{"half'], ids=lambda text: text[:8]
)
def test_a_file_that_holds_no_exported_episodes_is_refused(content, tmp_path):
    (tmp_path / "e.jsonl").write_text(content)
    with pytest.raises(InvalidArgument, match=r"e\.jsonl"):
        read_episodes(tmp_path / "e.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b"\xa7")
    with pytest.raises(InvalidArgument, match=r"b\.jsonl"):
        read_episodes(tmp_path / "b.jsonl")


def test_a_chat_template_that_is_neither_on_nor_off_is_refused():
    with pytest.raises(InvalidArgument, match="chat_template"):
        load_prompts(
            ["the cat"], fakes.tokenizer(), vocab_size=61, max_prompt_tokens=5, chat_template=TWO
        )


def test_a_prompts_file_of_deep_json_is_named(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt":' * 5000)
    with pytest.raises(InvalidArgument, match=r"p\.jsonl:1 is not JSON"):
        load_prompts(tmp_path / "p.jsonl", fakes.tokenizer(), vocab_size=61, max_prompt_tokens=5)
    (tmp_path / "q.jsonl").write_text(json.dumps({"prompt": "the cat"}))
    assert load_prompts(tmp_path / "q.jsonl", fakes.tokenizer(), vocab_size=61, max_prompt_tokens=5)


def test_a_model_whose_config_names_no_architecture_is_refused(tmp_path):
    models = {name: str(tmp_path / name) for name in ("model", "reward_model")}
    fakes.saved(fakes.causal_lm(num_hidden_layers=1), models["model"])
    fakes.saved(fakes.reward_model("token", num_hidden_layers=1), models["reward_model"])
    path = tmp_path / "reward_model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": True}))
    with pytest.raises(ModelError, match="reward_model="):
        gym.make_vec(
            "tokenenv/TextGen-v0",
            num_envs=2,
            prompts=[[4]],
            max_prompt_tokens=4,
            max_new_tokens=4,
            **models,
        )
