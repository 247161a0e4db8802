"""Tests on real models, which `make real` makes in the folder that REAL_MODELS names. Elsewhere
they are not collected."""

import os
from pathlib import Path

import gymnasium as gym
import pytest
import torch

import tokenenv  # noqa: F401  (registers the ids)

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
REAL_MODELS = os.environ.get("REAL_MODELS")
if REAL_MODELS is None:
    collect_ignore_glob = ["test_*.py"]
QUESTIONS = [f"Tell me about {thing}." for thing in ("a bridge", "the moon", "bread", "a map")]


@pytest.fixture(scope="session")
def folder():
    """The path of a model's folder, by its name."""
    return lambda name: str(Path(REAL_MODELS).resolve() / name)


@pytest.fixture(scope="session")
def load(folder):
    """A model of transformers by its name, loaded once, and the same object each time; frozen, as
    envs have it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = {}

    def load(name):
        if name not in found:
            model = AutoModelForCausalLM.from_pretrained(folder(name), dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(folder(name))
            found[name] = model.eval().requires_grad_(False), tokenizer
        return found[name]

    return load


@pytest.fixture(scope="session")
def make(load):
    """Envs of TextGen-v0 on a real model: four texts of 16 tokens."""

    def make(name="smollm2", **options):
        model, tokenizer = load(name)
        chat = tokenizer.chat_template is not None
        defaults = {"num_envs": 4, "prompts": QUESTIONS, "max_new_tokens": 16, "kl_coef": 0.05}
        defaults |= {"model": model, "tokenizer": tokenizer, "chat_template": chat}
        return gym.make_vec(
            "tokenenv/TextGen-v0", autoreset_mode="SameStep", **(defaults | options)
        )

    return make
