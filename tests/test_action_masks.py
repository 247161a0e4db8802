"""`ActionMask`: what may follow each text, by the reference's nucleus, a regular expression or a grammar."""

import re
import sys
from typing import Any

import fakes
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from tasks import MODES, STOPS, TOYS, T, assert_equal, copied, make_vec

from tokenenv.agents import PPO
from tokenenv.errors import FinishedRow, InvalidAction, InvalidArgument, MissingDependency, NotReset
from tokenenv.wrappers import ActionMask, nucleus

V, N = fakes.VOCAB_SIZE, 4
NEXT_STEP, SAME_STEP, DISABLED = AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED
SENTENCE = "(the|a) (cat|dog|bird) (is|was) (very )*(good|bad)"
GRAMMAR = """
start: " "? subject " " verb (" and " subject " " verb)*
subject: "the cat" | "a dog"
verb: "is" | "was"
"""
GRAMMAR_AS_REGEX = "(the cat|a dog) (is|was)( and (the cat|a dog) (is|was))*"


def wordy(mode: Any = SAME_STEP, num_envs: int = N, **options: Any) -> Any:
    """The toy env with a stop token that has no text."""
    return make_vec(num_envs, mode, stops=(fakes.EOS,), **options)


def draw(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """A token of each row's mask."""
    return np.array([rng.choice(np.flatnonzero(row)) for row in mask])


def finished_texts(envs: ActionMask, steps: int, seed: int = 0) -> list[str]:
    """The responses that ended by a stop token within some random steps of a SAME_STEP env."""
    rng, texts = np.random.default_rng(seed), []
    tokenizer = envs.unwrapped.token_spec.tokenizer
    envs.reset(seed=seed)
    for _ in range(steps):
        mask = envs.action_masks()
        assert mask.any(1).all()
        responses = envs.unwrapped.responses()
        _, _, terminated, _, _ = envs.step(draw(rng, mask))
        texts += [tokenizer.decode(responses[row]) for row in np.flatnonzero(terminated)]
    return texts


BUNDLED = {
    "Reviews-v0": ("the (food|service) (was|is) (very |really )*(good|bad|awful|great)(, but i (liked|hated) the (fish|curry))?", 40),
    "Arithmetic-v0": "[1-9][0-9]*",
    "PyDocs-v0": "(The|A|Any) [a-z]{1,5}( [a-z]{1,5})? (is|returns) ([0-9]{1,3}|None|'[a-z]{0,3}')\\.",
}


@pytest.mark.parametrize("env_id", list(BUNDLED))
def test_every_finished_text_matches_the_expression(env_id: str) -> None:
    regex = BUNDLED[env_id] if isinstance(BUNDLED[env_id], str) else BUNDLED[env_id][0]
    envs = ActionMask(gym.make_vec(f"tokenenv/{env_id}", num_envs=16, autoreset_mode=SAME_STEP), regex=regex)
    texts = finished_texts(envs, 80)
    print(len(texts), texts[:8])
    assert len(texts) >= 10
    assert {bool(re.fullmatch(regex, text.removeprefix(" "))) for text in texts} == {True}
