"""Tests on the real vLLM, which lives in an environment of its own: `make test-vllm`."""

import importlib.util
import os

import gymnasium as gym
import numpy as np
import pytest

import tokenenv  # noqa: F401  (registers the ids)

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def make():
    """Envs of Reviews-v0."""

    def make(num_envs=16, **options):
        return gym.make_vec(
            "tokenenv/Reviews-v0", num_envs=num_envs, autoreset_mode="SameStep", **options
        )

    return make


@pytest.fixture(scope="session")
def texts():
    """Prompts of the env, and responses of random words: some end with a stop token, some are
    cut."""
    envs = gym.make_vec("tokenenv/Reviews-v0", num_envs=1)
    rng, spec = np.random.default_rng(0), envs.unwrapped.token_spec
    prompts = [list(prompt) for prompt in envs.unwrapped.prompts[:24]]
    responses = [
        rng.integers(2, spec.vocab_size, rng.integers(1, spec.max_new_tokens)).tolist()
        for _ in prompts
    ]
    for row, response in enumerate(responses):
        ends = row % 3 == 0
        response += (
            [spec.stop_token_ids[0]]
            if ends
            else rng.integers(2, 200, spec.max_new_tokens - len(response)).tolist()
        )
    return prompts, responses
