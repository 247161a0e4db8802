"""TokenEnv: one text at a time."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from tokenenv.env.render import RENDER_MODES
from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.errors import InvalidArgument


class TokenEnv(gym.Env):
    """One text at a time: a `TokenVectorEnv` with one slot, without logic of its own. Rewards are
    `float`, flags `bool`.

    Takes the same options, but for those of a batch (num_envs, autoreset_mode, group_size) and for
    array="torch": Gymnasium's spaces hold NumPy arrays, and its `NumpyToTorch` wrapper gives
    tensors. Attributes beyond Gymnasium's, read or set, are the vector env's.
    """

    metadata: dict[str, Any] = {"render_modes": list(RENDER_MODES), "render_fps": 10}  # noqa: RUF012

    def __init__(self, **options: Any) -> None:
        for key in ("num_envs", "autoreset_mode", "group_size"):
            if key in options:
                raise InvalidArgument(
                    f"{key}={options[key]!r} is for gym.make_vec; one text at a time has no {key}."
                )
        if options.get("array") == "torch":
            raise InvalidArgument(
                "array='torch' is for gym.make_vec; for one text at a time, gymnasium has "
                "NumpyToTorch."
            )
        self.vector = TokenVectorEnv(num_envs=1, autoreset_mode=AutoresetMode.DISABLED, **options)
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space
        self.render_mode = self.vector.render_mode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin a new text; see `TokenVectorEnv.reset`."""
        super().reset(seed=int(seed) if isinstance(seed, np.integer) else seed)
        observation, infos = self.vector.reset(seed=seed, options=options)
        return _first(observation), _first_info(infos)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Append one token; see `TokenVectorEnv.step`."""
        actions = (
            {key: [value] for key, value in action.items()}
            if isinstance(action, dict)
            else [action]
        )
        observation, rewards, terminations, truncations, infos = self.vector.step(actions)
        ends, info = (bool(terminations[0]), bool(truncations[0])), _first_info(infos)
        if "cut" in info:
            info["cut"] = bool(
                info["cut"]
            )  # as a NumPy bool, SyncVectorEnv would make objects of it
        return _first(observation), float(rewards[0]), *ends, info

    def render(self) -> Any:
        """Return a string or a picture (H, W, 3) uint8 of the text, by `render_mode`; see
        `TokenVectorEnv.render`."""
        shown = self.vector.render()
        return None if shown is None else shown[0]

    def close(self) -> None:
        """Let go of the models."""
        self.vector.close()

    def __getattr__(self, name: str) -> Any:
        # token_spec, reference, decode, save_state and the rest are the vector env's, but for what
        # would make this one look like a vector env itself.
        if name.startswith(("_", "single_")) or name in ("vector", "num_envs"):
            raise AttributeError(name)
        return getattr(self.vector, name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = (
            name.startswith("_")
            or "vector" not in vars(self)
            or name in vars(self)
            or hasattr(type(self), name)
        )
        setattr(self.vector, name, value) if not own and hasattr(
            self.vector, name
        ) else super().__setattr__(name, value)


def _first(observation: Any) -> Any:
    return (
        {key: value[0] for key, value in observation.items()}
        if isinstance(observation, dict)
        else observation[0]
    )


def _first_info(infos: dict[str, Any]) -> dict[str, Any]:
    present = {
        key: value
        for key, value in infos.items()
        if not key.startswith("_") and bool(infos[f"_{key}"][0])
    }
    return {
        key: _first_info(value) if isinstance(value, dict) else value[0]
        for key, value in present.items()
    }
