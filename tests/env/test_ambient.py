"""A caller's own torch settings change nothing: a default dtype of float64, and
`torch.inference_mode` around any call."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from tasks import assert_equal, copied, id_cases, make_vec, random_actions, toy_cases

from tokenenv.agents import PPO
from tokenenv.errors import InvalidArgument
from tokenenv.rewards import PositionScaled, Rule, Scaled, Segment, TokenRule

RULES = {
    "each": TokenRule(lambda prompt, response: [0.5] * len(response), on="tokens"),
    "text": Rule(lambda prompt, response: len(response), on="tokens"),
}
LEARNED = {"a": Scaled(Segment(1.0)), "b": PositionScaled("uniform"), **RULES}
CASES = [
    *toy_cases(),
    *[case for case in id_cases() if case.id in ("Arithmetic-v0", "Negation-v0")],
    pytest.param("tests/Toy-v0", {"reward": LEARNED}, id="learned"),
    *[
        pytest.param("tests/Toy-v0", {"reward": name}, id=name)
        for name in ("attention", "occlusion", "shapley", "gradient")
    ],
]


@contextmanager
def double() -> Any:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def calls(env_id: str, options: dict[str, Any], around: Callable[[], Any]) -> dict[int, Any]:
    """What an env shows that lives through all kinds of calls, every second one inside `around`."""
    with around():
        envs = make_vec(3, AutoresetMode.DISABLED, env_id, **options)
    core, rng = envs.unwrapped, np.random.default_rng(0)
    shown = [copied(core.reset(seed=0)[0])]
    pays = {"logprobs": [[-1.0, -1.0]]} if core.config.kl == "policy" else {}
    pays |= {"turn_rewards": [[0.5, 1.0]]} if core.token_spec.responds else {}
    for number in range(5):
        actions = random_actions(rng, envs, stop=0.2)
        if number % 2:
            with around():
                step = core.step(actions)
        else:
            step = core.step(actions)
        shown.append(copied(dict(enumerate(step))))
        ended = step[2] | step[3]
        if ended.any():
            core.reset(options={"reset_mask": ended})
    with around():
        saved = core.save_state()
        core.load_state(saved)
        core.fork([0], [1])
        scores = core.score_episodes([[0]], [[3, 4]], played=True, **pays)
        shown.append({"rewards": scores.token_rewards, "ref": np.exp(core.ref_logprobs())})
    shown.append(copied(core.reset(options={"reset_mask": np.array([True, False, False])})[0]))
    return dict(enumerate(shown))


@pytest.mark.filterwarnings("ignore:reward='gradient':RuntimeWarning")
@pytest.mark.parametrize(("env_id", "options"), CASES)
def test_the_callers_torch_settings_change_nothing(env_id: str, options: dict[str, Any]) -> None:
    plain = calls(env_id, options, torch.enable_grad)
    for around in (torch.inference_mode, double):
        assert_equal(calls(env_id, options, around), plain, 1e-6)


@pytest.mark.parametrize("array", ["numpy", "torch"])
def test_what_is_returned_inside_inference_mode_may_be_used_outside(array: str) -> None:
    with torch.inference_mode():
        envs = make_vec(2, AutoresetMode.SAME_STEP, array=array)
        envs.reset(seed=0)
        tokens = torch.tensor([20, 21]) if array == "torch" else np.array([20, 21])
        obs, reward, *_ = envs.step(tokens)
    if array == "torch":
        assert not any(
            tensor.is_inference() or tensor.requires_grad for tensor in (obs["tokens"], reward)
        )
        reward += 1.0
    envs.step(tokens)


def test_agents_refuse_another_default_dtype_in_a_sentence() -> None:
    envs = make_vec(3, AutoresetMode.SAME_STEP, "tokenenv/Negation-v0", max_new_tokens=4)
    agent = PPO(envs, batch_tokens=32)
    for call in (lambda: PPO(envs), lambda: agent.learn(total_tokens=64)):
        with (
            double(),
            pytest.raises(
                InvalidArgument, match=r"default dtype is torch.float64; agents learn under"
            ),
        ):
            call()
    agent.learn(total_tokens=64)
