"""What agents read from a vector env: single rows of its arrays, NumPy or torch, and the little
they may know of it."""

import warnings
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor, nn

from tokenenv.errors import InvalidArgument
from tokenenv.models.adapters import shared_weight


def check_default_dtype() -> None:
    """Raises `InvalidArgument` where new tensors are not float32, as policies are."""
    if torch.get_default_dtype() != torch.float32:
        raise InvalidArgument(
            f"torch's default dtype is {torch.get_default_dtype()}; agents learn under "
            f"torch.set_default_dtype(torch.float32)."
        )


def check_env(envs: Any) -> None:
    """Raises `InvalidArgument` unless this is a vector env of texts."""
    if not isinstance(envs, VectorEnv):
        raise InvalidArgument(
            f"envs={type(envs).__name__} is no vector env; build one with gym.make_vec."
        )
    space = envs.single_observation_space
    if not isinstance(space, gym.spaces.Dict) or not {"tokens", "length", "prompt_length"} <= set(
        space.spaces
    ):
        raise InvalidArgument(
            'envs must observe "tokens", "length" and "prompt_length"; agents read texts, not '
            "features."
        )


def check_apart(policy: nn.Module, core: Any) -> None:
    """Raises `InvalidArgument` if training the policy would change a model that the env reads, its
    reference first of all, or would change nothing."""
    models = {"reference": getattr(core, "reference", None), **getattr(core, "frozen_models", {})}
    for role, model in models.items():
        if name := shared_weight(policy, model):
            raise InvalidArgument(
                f"policy trains {name}, a weight of the env's own {role}, which must stay as it "
                f"is: give the policy a deep "
                "copy (before peft puts adapters into it)."
            )
    model = getattr(policy, "model", None)
    if isinstance(model, nn.Module) and not any(
        weight.requires_grad for weight in model.parameters()
    ):
        raise InvalidArgument(
            "policy's model has no weight to train: an env freezes the models it is given, so give "
            "the policy a deep copy."
        )


def warn_if_biased(envs: VectorEnv) -> None:
    """Says so where reward-to-go does not estimate the gradient of the expected score under the
    env's rewards."""
    terms = getattr(envs.unwrapped, "biased_terms", ())
    if terms:
        warnings.warn(
            f"reward-to-go on {', '.join(map(repr, terms))} does not estimate the gradient of the "
            f"expected score: either the "
            "rewards add up to something else, or early ones depend on later tokens "
            "(docs/rewards.md). 'terminal', 'delta', "
            "'segment', 'shaping' and a causal 'token' do; keep this one to compare with, and "
            "judge by score and gold.",
            UserWarning,
            stacklevel=3,
        )


def check_kl(envs: VectorEnv, kl_coef: float | None, kl_target: float | None) -> None:
    """Raises `InvalidArgument` where an agent's beta, or a KL to steer it to, would do nothing in
    this env."""
    given = [
        f"{name}={value}"
        for name, value in (("kl_coef", kl_coef), ("kl_target", kl_target))
        if value
    ]
    if given and getattr(getattr(envs.unwrapped, "config", None), "kl", None) == "none":
        raise InvalidArgument(
            f"{' and '.join(given)} would do nothing in an env with kl='none'; make it with "
            f"kl='reference'."
        )
    beta = getattr(envs.unwrapped, "kl_coef", 0.0) if kl_coef is None else kl_coef
    if kl_target is not None and not beta > 0:
        raise InvalidArgument(
            f"kl_target={kl_target} cannot adapt kl_coef={beta}, which stays 0; start with kl_coef "
            f"above 0."
        )


def env_core(envs: VectorEnv) -> Any:
    """The env beneath its wrappers, which may have more than Gymnasium's interface."""
    return envs.unwrapped


def method(envs: VectorEnv, name: str) -> Any:
    """A method beyond Gymnasium's interface, of the outermost wrapper that has it (one that adds to
    observations, say); None where there is none."""
    layer: Any = envs
    while layer is not None:
        if hasattr(layer, name):
            return getattr(layer, name)
        layer = getattr(layer, "env", None)
    return None


def num_actions(envs: VectorEnv) -> int:
    """V."""
    space: Any = envs.single_action_space
    return int(space["token"].n if wants_logprob(envs) else space.n)


def reference_of(envs: VectorEnv, otherwise: str) -> Any:
    """The env's reference model, or `InvalidArgument` that says what to do `otherwise`."""
    reference = getattr(envs.unwrapped, "reference", None)
    if reference is None or getattr(envs.unwrapped, "token_spec", None) is None:
        name = type(envs.unwrapped).__name__
        raise InvalidArgument(f"{name} has no token_spec and reference to start from: {otherwise}.")
    return reference


def group_size_of(envs: VectorEnv, agent: str) -> int:
    """How many consecutive slots share each prompt, or `InvalidArgument` where that is one."""
    group_size = int(getattr(envs.unwrapped, "group_size", 1))
    if group_size < 2:
        raise InvalidArgument(
            f"group_size={group_size} leaves {agent} nothing to compare a text with; make the env "
            f"with group_size=4, say."
        )
    return group_size


def wants_logprob(envs: VectorEnv) -> bool:
    """True where the action carries `logprob`, i.e. where the env pays the whole KL penalty
    itself."""
    return isinstance(envs.single_action_space, gym.spaces.Dict)


def action(envs: VectorEnv, obs: Mapping[str, Any], tokens_N: Tensor, logprobs_N: Tensor) -> Any:
    """The env's action for these tokens: arrays of the observation's kind, with log-probabilities
    where it asks for them."""
    torch_env = isinstance(obs["tokens"], Tensor)
    tokens, logprobs = (x if torch_env else x.cpu().numpy() for x in (tokens_N, logprobs_N))
    return {"token": tokens, "logprob": logprobs} if wants_logprob(envs) else tokens


def flags(
    terminations: Any, truncations: Any, logprobs_N: Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both flags (N,) on the host, and which log-probs are not finite; in one copy where the env
    gives tensors."""
    invalid_N = ~logprobs_N.isfinite()
    if isinstance(terminations, Tensor):
        three = (
            torch.stack([terminations, truncations, invalid_N.to(terminations.device)])
            .cpu()
            .numpy()
        )
        return three[0], three[1], three[2]
    return np.asarray(terminations), np.asarray(truncations), invalid_N.cpu().numpy()


def read_ends(
    envs: VectorEnv,
    terminated: np.ndarray,
    truncated: np.ndarray,
    infos: Mapping[str, Any],
    rows: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Which of the episodes that end in `rows` were cut by the length limit, and after which the
    last state's value counts.

    The flags mean what Gymnasium means by them: learners bootstrap at truncations. But under
    `cut="truncated"` a scored cut is a truncation too, and its score is all there is.
    """
    bootstraps = truncated[rows] & ~terminated[rows]
    cut = take_info(infos, "cut", rows, bootstraps)
    scored = getattr(getattr(env_core(envs), "token_spec", None), "score_truncated", False)
    return cut, bootstraps & ~(cut & scored)


def take(values: Any, rows: np.ndarray) -> np.ndarray:
    """`values[rows]` on the host."""
    if isinstance(values, Tensor):
        return values[torch.as_tensor(rows, device=values.device)].cpu().numpy()
    return np.asarray(values)[rows]


def take_by_name(
    infos: Mapping[str, Any], key: str, rows: np.ndarray
) -> list[dict[str, np.ndarray]]:
    """Return what the mapping `infos[key]` holds for each of `rows`: a float32 array a name.

    The list has a dict for each row. Rows that a name's mask `_name` leaves out are NaN.
    """
    by_name = infos.get(key, {})
    taken = {
        name: take_info(by_name, name, rows, np.nan).astype(np.float32)
        for name in by_name
        if not name.startswith("_")  # Gymnasium's masks
    }
    return [{name: values[n] for name, values in taken.items()} for n in range(len(rows))]


def take_obs(obs: Any, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of a batched observation, or of Gymnasium's object array of single ones
    (`final_obs`)."""
    keys = ("tokens", "length", "prompt_length")
    if isinstance(obs, Mapping):
        return {key: take(obs[key], rows) for key in keys}
    return {key: np.stack([obs[i][key] for i in rows]) for key in keys}


def take_info(infos: Mapping[str, Any], key: str, rows: np.ndarray, default: Any) -> np.ndarray:
    """`infos[key][rows]`; `default`, one value or one a row, in rows that its mask `_key` leaves
    out, and where there is no such key."""
    if key not in infos:
        return np.full(len(rows), default)
    values = take(infos[key], rows)
    known = take(infos[f"_{key}"], rows) if f"_{key}" in infos else np.ones(len(rows), bool)
    return np.where(known.reshape(-1, *[1] * (values.ndim - 1)), values, default)
