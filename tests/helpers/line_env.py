"""A vector env whose texts can be checked from the outside, an actor for it, and interruptions at
any line of any file.

Prompts are handed out in groups as `tokenenv` does; what a token earns, and its log-prob, follow
from prompt, place and token.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv

STOP, V, P = 1, 10, 2


def earned(prompt: Sequence[int], place: int, token: int) -> float:
    """The reward of a token."""
    return float(np.float32(np.sin(prompt[0] + 3 * prompt[1] + 7 * place + 11 * token)))


class LineEnv(VectorEnv):
    """Texts of at most T tokens; an interrupted call leaves a mark, and only a full reset takes it
    away."""

    def __init__(self, num_envs: int, mode: AutoresetMode, group_size: int = 1, T: int = 8) -> None:
        self.num_envs, self.mode, self.group_size, self.T = num_envs, mode, group_size, T
        self.metadata = {"autoreset_mode": mode}
        numbers = {name: gym.spaces.Discrete(P + T + 1) for name in ("length", "prompt_length")}
        tokens = gym.spaces.Box(0, 10**6, (P + T,), np.int64)
        self.single_observation_space = gym.spaces.Dict({"tokens": tokens, **numbers})
        self.single_action_space = gym.spaces.Discrete(V)
        self.begun = np.zeros(num_envs // group_size, np.int64)
        self.tokens = np.zeros((num_envs, P + T), np.int64)
        self.length, self.ended = np.full(num_envs, P), np.ones(num_envs, bool)
        self.marked = True
        self.emitted = 0
        """Tokens of whole steps."""

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        mask = (options or {}).get("reset_mask")
        assert mask is not None or not options
        assert mask is None or not self.marked
        self.marked = True
        if mask is None:
            self.begun = -(-self.begun // self.group_size) * self.group_size
        self._begin(np.ones(self.num_envs, bool) if mask is None else mask)
        self.marked = False
        return self._obs(), {}

    def _begin(self, rows: np.ndarray) -> None:
        for row in np.flatnonzero(rows):
            group = row // self.group_size
            self.tokens[row] = 0
            self.tokens[row, :P] = group, self.begun[group] // self.group_size
            self.begun[group] += 1
            self.length[row], self.ended[row] = P, False

    def _obs(self) -> dict[str, np.ndarray]:
        prompt_length = np.full(self.num_envs, P)
        return {
            "tokens": self.tokens.copy(),
            "length": self.length.copy(),
            "prompt_length": prompt_length,
        }

    def step(self, actions: Any) -> Any:
        assert not self.marked, "gone on from half a step"
        self.marked = True
        resting = self.ended.copy()
        assert not (self.mode == AutoresetMode.DISABLED and resting.any())
        rewards = np.zeros(self.num_envs, np.float32)
        for row in np.flatnonzero(~resting):
            self.tokens[row, self.length[row]] = actions[row]
            rewards[row] = earned(self.tokens[row], self.length[row] - P, actions[row])
            self.length[row] += 1
        terminated = ~resting & (actions == STOP)
        truncated = ~resting & ~terminated & (self.length == P + self.T)
        self.ended = terminated | truncated
        info: dict[str, Any] = {}
        if self.mode == AutoresetMode.SAME_STEP and self.ended.any():
            info = {"final_obs": self._obs(), "final_info": {}}
            self._begin(self.ended)
        elif resting.any():
            self._begin(resting)
        self.marked = False
        self.emitted += int((~resting).sum())
        return self._obs(), rewards, terminated, truncated, info


class LineActor:
    """Draws tokens without looking; a text ends with probability `stop` at each of them."""

    values = None

    def __init__(self, stop: float, seed: int = 0) -> None:
        self.rng, self.stop = np.random.default_rng(seed), stop

    def act(self, obs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        count = len(obs["length"])
        tokens = np.where(self.rng.random(count) < self.stop, STOP, self.rng.integers(2, V, count))
        return torch.from_numpy(tokens), -0.1 * torch.from_numpy(tokens).float()

    def refresh(self) -> None:
        pass


def check_episodes(episodes: Sequence[Any], group_size: int = 1) -> None:
    """Rewards and log-probs are those of the text; groups are whole and share a prompt."""
    assert len(episodes) % group_size == 0
    for n, e in enumerate(episodes):
        np.testing.assert_array_equal(
            e.reward, [earned(e.prompt, t, token) for t, token in enumerate(e.response)]
        )
        np.testing.assert_allclose(e.logprob, -0.1 * e.response, atol=1e-6)
        assert e.terminated == (e.response[-1] == STOP)
        first = episodes[n // group_size * group_size]
        assert (e.prompt.tolist(), e.slot // group_size) == (
            first.prompt.tolist(),
            first.slot // group_size,
        )


@contextmanager
def interrupted_at(
    line: int, *files: str, error: Callable[[], BaseException] = KeyboardInterrupt
) -> Any:
    """Raises `error` before the `line`-th line that is run in these files; the list it gives has an
    entry where it did."""
    left, raised = [line], []

    def trace(frame: Any, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.endswith(files) or raised:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                raised.append((frame.f_code.co_qualname, frame.f_lineno))
                raise error()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield raised
    except BaseException as one:
        if not isinstance(one, error):  # type: ignore[arg-type]
            raise
    finally:
        sys.settrace(before)
