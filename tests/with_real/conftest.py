"""Tests on real models: those that REAL_MODELS names, which `make real` has made in build/real.
Where it names none, nothing is collected."""

import os
from pathlib import Path

import gymnasium as gym
import pytest
import torch

import tokenenv  # noqa: F401  (registers the ids)

REAL_MODELS = os.environ.get("REAL_MODELS", "").split()
if not REAL_MODELS:
    collect_ignore_glob = ["test_*.py"]
FOLDER = Path(__file__).parents[2] / "build" / "real"
QUESTIONS = [f"Tell me about {thing}." for thing in ("a bridge", "the moon", "bread", "a map")]


@pytest.fixture(scope="session")
def folder():
    """The path of a model's folder, by its name."""

    def folder(name):
        if name not in REAL_MODELS:
            pytest.skip(f"REAL_MODELS does not name {name}")
        return str(FOLDER / name)

    return folder


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
        defaults = {
            "num_envs": 4,
            "prompts": QUESTIONS,
            "max_new_tokens": 16,
            "kl_coef": 0.05,
            "reward": {},
        }
        defaults |= {"model": model, "tokenizer": tokenizer, "chat_template": chat}
        return gym.make_vec(
            "tokenenv/TextGen-v0", autoreset_mode="SameStep", **(defaults | options)
        )

    return make
