"""NumPy and torch arrays: the same numbers, and a torch step that copies one small array to the
host.

Without a GPU the copies are counted on PyTorch's "meta" device, whose tensors have shapes but no
data: every operation that needs the data on the host (`.item()`, `.cpu()`, `bool()`, `nonzero`,
indexing with a mask) raises there.
"""

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import memories
import numpy as np
import pytest
import tasks
import torch
from gymnasium.vector import AutoresetMode
from tasks import MODES, TOYS, assert_equal, copied, make_vec, random_actions, some_modes

from tokenenv.env import build as parts
from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.models import heads, probing
from tokenenv.rewards import (
    Clipped,
    Distill,
    Implicit,
    PositionScaled,
    RewardTerm,
    Rule,
    Scaled,
    Segment,
    Shaping,
    TokenRule,
    progressive,
)

N = 4


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, (dict, tuple)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from tensors(entry)
    else:
        yield value


@pytest.mark.parametrize(
    ("env_id", "options", "mode"), some_modes(AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP)
)
def test_torch_arrays_hold_the_numpy_numbers(
    env_id: str, options: dict[str, Any], mode: AutoresetMode
) -> None:
    plain = make_vec(N, mode, env_id, **options)
    envs = make_vec(N, mode, env_id, array="torch", **options)
    rng = np.random.default_rng(1)
    for a, b in ((plain.reset(seed=3), envs.reset(seed=3)),):
        assert_equal(
            dict(enumerate(copied(a[i]) for i in range(2))),
            dict(enumerate(copied(b[i]) for i in range(2))),
        )
    for step in range(10):
        actions = random_actions(rng, plain)
        as_tensors = (
            {k: torch.from_numpy(v) for k, v in actions.items()}
            if isinstance(actions, dict)
            else torch.from_numpy(actions)
        )
        a, b = plain.step(actions), envs.step(as_tensors if step % 2 else actions)
        assert all(type(leaf) is torch.Tensor and leaf.device == envs.device for leaf in tensors(b))
        assert all(type(leaf) is np.ndarray for leaf in tensors(a))
        assert_equal(
            {str(i): copied(a[i]) for i in range(5)}, {str(i): copied(b[i]) for i in range(5)}
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options", [{"reward": "delta"}, {"observation": "features"}], ids=["tokens", "features"]
)
@pytest.mark.parametrize("array", ["numpy", "torch"])
def test_returned_arrays_never_change_again(
    mode: AutoresetMode, options: dict[str, Any], array: str
) -> None:
    envs = make_vec(N, mode, array=array, **options)
    rng = np.random.default_rng(1)
    returned = [envs.reset(seed=0)]
    kept = [copied(dict(enumerate(returned[0])))]
    for _ in range(8):
        returned.append(envs.step(random_actions(rng, envs)))
        kept.append(copied(dict(enumerate(returned[-1]))))
        ended = kept[-1][2] | kept[-1][3]
        if mode == AutoresetMode.DISABLED and ended.any():
            envs.reset(options={"reset_mask": ended})
    envs.unwrapped.fork([0], [1])
    envs.unwrapped.load_state(envs.unwrapped.save_state())
    for now, then in zip(returned, kept, strict=True):
        assert_equal(copied(dict(enumerate(now))), then)


ON_TEXT = {
    "rule": (Rule(lambda prompt, response: len(response), on="tokens"), 1.0),
    "words": Rule(lambda prompt, response: len(response.split())),
    "each": TokenRule(lambda prompt, response: [1.0] * len(response), on="tokens"),
}
DEVICE_CASES: dict[str, dict[str, Any]] = {
    "token": {},
    "all": {
        "reward": {"a": "token", "b": "delta", "c": "uniform", "d": "terminal"},
        "missing_eos_penalty": 1.0,
    },
    "text": {"reward": ON_TEXT},
    "policy": {"kl": "policy", "kl_estimator": "k3", "kl_clamp": 3.0},
    "unscored": {"reward": "uniform", "score_truncated": False},
    "features": {"observation": "features", "reward": "delta"},
    "none": {"kl": "none", "reward": {}},
    "segment": {"reward": Segment(1.0)},
    "memories": TOYS["memories"],
    "watched": {"reward": "token", "watch": {"a": Scaled(Segment(1.0)), "b": "uniform"}},
    "implicit": {"reward": Implicit(clip=0.5, mix=1.0)},
    "distill": {"reward": Distill(first=0.5)},
    "fading": {"reward": progressive("terminal", Shaping(gamma=0.9))},
    "wrapped": {
        "reward": {
            "a": Scaled(Segment(1.0)),
            "b": PositionScaled("uniform"),
            "c": Clipped("delta", -1, 1),
        }
    },
}
CASES_IN_MODES = [(name, AutoresetMode.SAME_STEP) for name in DEVICE_CASES] + [
    ("all", mode) for mode in MODES[:1] + MODES[2:]
]


class Copies:
    """Stands for the one allowed copy: hands out the tokens it was given, and notes what was asked
    for."""

    def __init__(self) -> None:
        self.tokens = np.zeros(N, np.int64)
        self.asked: list[tuple[tuple[int, ...], torch.dtype]] = []

    def __call__(self, codes: torch.Tensor) -> np.ndarray:
        self.asked.append((tuple(codes.shape), codes.dtype))
        return self.tokens.copy()


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes envs whose device is "meta"; what compares numbers when a model is loaded has nothing
    to compare there."""
    monkeypatch.setattr(probing, "why_uncached", lambda trunk, max_length: None)
    for module in (parts, memories):
        monkeypatch.setattr(module, "hidden_size_of", lambda model: model.config.hidden_size)
    monkeypatch.setattr(heads, "looks_ahead", lambda model: False)
    monkeypatch.setattr(heads, "_passed_over", lambda model, head: None)
    monkeypatch.setattr(heads, "_check_head", lambda model, head, select: True)

    def make(mode: Any, **options: Any) -> tuple[TokenVectorEnv, Copies]:
        envs, copies = (
            TokenVectorEnv(
                N, task=tasks.device_task("meta"), array="torch", autoreset_mode=mode, **options
            ),
            Copies(),
        )
        monkeypatch.setattr(envs, "_to_host", copies)
        return envs, copies

    return make


def run_on_device(envs: Any, mode: Any, put: Any, device: str, steps: int = 8) -> None:
    """Random steps with actions made on the device; `put` is called with the tokens before each."""
    rng = np.random.default_rng(0)
    envs.reset(seed=0)
    for _ in range(steps):
        actions = random_actions(rng, envs, stop=0.2)
        put(tasks.tokens_of(actions).astype(np.int64))
        moved = (
            {k: torch.from_numpy(v).to(device) for k, v in actions.items()}
            if isinstance(actions, dict)
            else None
        )
        out = envs.step(torch.from_numpy(actions).to(device) if moved is None else moved)
        assert {leaf.device.type for leaf in tensors(out)} == {device}
        if mode == AutoresetMode.DISABLED and envs._ended.any():
            envs.reset(options={"reset_mask": envs._ended.copy()})


@pytest.mark.parametrize(("name", "mode"), CASES_IN_MODES)
def test_a_step_makes_one_small_copy_to_the_host(name: str, mode: AutoresetMode, meta: Any) -> None:
    envs, copies = meta(mode, **DEVICE_CASES[name])
    run_on_device(envs, mode, lambda tokens: setattr(copies, "tokens", tokens), "meta")
    assert copies.asked == [((N,), torch.int64)] * 8


@pytest.mark.parametrize("reward", ["oracle", "terminal", "distill"])
def test_an_automaton_steps_on_its_device_and_copies_its_actions_alone(
    reward: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Automaton, reference and oracle are tables there; texts of 4 tokens end and begin anew."""
    monkeypatch.setattr(parts, "check_device", lambda device: None)  # "meta" holds no numbers
    envs = gym.make_vec(
        "tokenenv/DelayedKey-v0",
        num_envs=N,
        device="meta",
        array="torch",
        reward=reward,
        max_new_tokens=4,
        autoreset_mode="SameStep",
    ).unwrapped
    copies = Copies()
    monkeypatch.setattr(envs, "_to_host", copies)
    run_on_device(
        envs, AutoresetMode.SAME_STEP, lambda tokens: setattr(copies, "tokens", tokens), "meta"
    )
    assert copies.asked == [((N,), torch.int64)] * 8


class Waits(RewardTerm):
    """A term that does what a step must not."""

    name = "waits"

    def __init__(self, wait: Any) -> None:
        self.wait = wait

    def reward(self, batch: Any) -> torch.Tensor:
        self.wait(batch.ref_logprob)
        return batch.ref_logprob


WAITS = {
    "item": lambda x: x.sum().item(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "bool": lambda x: bool(x.any()),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "tolist": lambda x: x.tolist(),
    "to": lambda x: x.to("cpu", non_blocking=True),
    "int": lambda x: range(int(x[0])),
    "repeat": lambda x: x.repeat_interleave(x.long()),
    "equal": lambda x: torch.equal(x, x),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_a_second_copy_would_be_seen(wait: Any, meta: Any) -> None:
    envs, copies = meta(AutoresetMode.SAME_STEP, reward=Waits(wait))
    with pytest.raises((NotImplementedError, RuntimeError, TypeError)):
        run_on_device(
            envs,
            AutoresetMode.SAME_STEP,
            lambda tokens: setattr(copies, "tokens", tokens),
            "meta",
            1,
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("name", "mode"), CASES_IN_MODES)
def test_a_cuda_step_waits_for_the_device_once(
    name: str, mode: AutoresetMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    envs = TokenVectorEnv(
        N, task=tasks.device_task("cuda"), array="torch", autoreset_mode=mode, **DEVICE_CASES[name]
    )
    to_host, step, copies = envs._to_host, envs.step, []

    def exempted(codes: torch.Tensor) -> np.ndarray:
        copies.append(codes.numel())
        torch.cuda.set_sync_debug_mode("default")
        try:
            return to_host(codes)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    def strict(actions: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(actions)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(envs, "_to_host", exempted)
    monkeypatch.setattr(envs, "step", strict)
    run_on_device(envs, mode, lambda tokens: None, "cuda")
    assert copies == [N] * 8
