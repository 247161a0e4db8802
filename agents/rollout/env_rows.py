"""What agents read from a vector env: some slots of its arrays, NumPy or torch, and the little that
they may know of the env itself.

Suffixes: N slots, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from tokenenv import ranks
from tokenenv.errors import InvalidArgument
from tokenenv.models.vllm_models import VLLMReference

# ---------------------------------------------------------------- about the env


def env_core(envs: VectorEnv) -> Any:
    """Return the env beneath its wrappers, which may have more than Gymnasium's interface."""
    return envs.unwrapped


def method(envs: VectorEnv, name: str) -> Any:
    """Return a method beyond Gymnasium's interface, or None where no layer of the env has it.

    It is the one of the outermost wrapper that has it: a wrapper that adds to observations must
    see a `fork` or a `load_state` too.
    """
    layer: Any = envs
    while layer is not None:
        if hasattr(layer, name):
            return getattr(layer, name)
        layer = getattr(layer, "env", None)
    return None


def wants_logprob(envs: VectorEnv) -> bool:
    """Return whether the action carries `logprob`: the env then pays the whole KL penalty."""
    return isinstance(envs.single_action_space, gym.spaces.Dict)


def responds(envs: VectorEnv) -> bool:
    """Return whether the environment writes into texts: its observation then says which tokens are
    the policy's (`own_mask`)."""
    return "own_mask" in getattr(envs.single_observation_space, "spaces", {})


def num_actions(envs: VectorEnv) -> int:
    """Return V."""
    space: Any = envs.single_action_space
    return int(space["token"].n if wants_logprob(envs) else space.n)


def reference_of(envs: VectorEnv, otherwise: str) -> Any:
    """Return the env's reference model; where it has none, raise `InvalidArgument` that says what
    to do `otherwise`."""
    reference = getattr(envs.unwrapped, "reference", None)
    if reference is None or getattr(envs.unwrapped, "token_spec", None) is None:
        name = type(envs.unwrapped).__name__
        raise InvalidArgument(f"{name} has no token_spec and reference to start from: {otherwise}.")
    return reference


def teacher_of(envs: VectorEnv) -> Any:
    """Return the env's teacher, whose whole vocabulary can be read; where it has none, raise
    `InvalidArgument`."""
    teacher = getattr(envs.unwrapped, "teacher", None)
    if teacher is None:
        raise InvalidArgument(
            f"distill_coef needs a teacher, and {type(envs.unwrapped).__name__} has none: give the "
            "env teacher=, or leave distill_coef at 0."
        )
    if isinstance(teacher, VLLMReference):
        raise InvalidArgument(
            "distill_coef reads the teacher's probabilities of all tokens, and a vLLM server gives "
            "those of the text's: take reward='distill', or a teacher= in this process."
        )
    return teacher


def tell_policy_updated(envs: VectorEnv, updates: int) -> None:
    """Tell an env that wants to know how many updates the policy has had: a reward model of its may
    be trained meanwhile."""
    tell = getattr(env_core(envs), "policy_updated", None)
    if tell is not None:
        tell(updates)


def save_learned(envs: VectorEnv) -> dict[str, Any] | None:
    """Return what an env keeps beside its texts: what its terms have learned, and the tokens that
    it has seen, which schedules go by. None where it is another's env, and keeps neither."""
    core = env_core(envs)
    if not hasattr(core, "save_statistics"):
        return None
    statistics = core.save_statistics()
    return {"tokens_seen": core.tokens_seen, "statistics": statistics}


def load_learned(envs: VectorEnv, saved: Mapping[str, Any] | None) -> None:
    """Have an env go on from what `save_learned` returned, or from that part of a whole state."""
    if saved is None or not hasattr(env_core(envs), "load_statistics"):
        return
    learned = saved["statistics"] if only_learned(saved) else saved["engine"]["learned"]
    env_core(envs).load_statistics(learned)
    env_core(envs).tokens_seen = int(saved["tokens_seen"])


def learned_together(envs: VectorEnv, before: Any = None) -> Any:
    """Have this env's terms take in what those of all ranks have learned since they had `before`;
    return what they have now, as `before` of the next time. Without `before` nothing is taken in,
    and terms that cannot learn together are refused."""
    core = env_core(envs)
    if ranks.count() == 1 or not hasattr(core, "join_statistics"):
        return None
    if before is None:
        core.check_joins()
    else:
        core.join_statistics(before, ranks.gathered(core.save_statistics()))
    return core.save_statistics()


def load_joined(envs: VectorEnv, saved: Sequence[Any], joined: Any) -> Any:
    """Have this process's env go on where there were more processes, or fewer: from what all their
    terms had learned when they last `joined`. `saved` are what their envs saved, texts or none.
    Return what `learned_together` does."""
    core = env_core(envs)
    if saved[0] is None or not hasattr(core, "load_statistics"):
        return None
    own = saved[0]["statistics"] if only_learned(saved[0]) else saved[0]["engine"]["learned"]
    learned = own if joined is None else joined
    core.load_statistics(learned)
    if ranks.count() > 1:
        core.join_statistics(learned, [])
    # Schedules go by the sum over processes.
    core.tokens_seen = sum(int(one["tokens_seen"]) for one in saved) if ranks.number() == 0 else 0
    return learned_together(envs)


@contextmanager
def learning_undone(envs: VectorEnv) -> Iterator[None]:
    """Around texts that are no part of a run: what they teach an env's terms is forgotten, and no
    schedule goes on by them."""
    learned = save_learned(envs)
    try:
        yield
    finally:
        load_learned(envs, learned)


def only_learned(saved: Any) -> bool:
    """Return whether a saved env is what `save_learned` returns, and no state with texts."""
    return isinstance(saved, Mapping) and "statistics" in saved


# ---------------------------------------------------------------- a step


def action(envs: VectorEnv, obs: Mapping[str, Any], tokens_N: Tensor, logprobs_N: Tensor) -> Any:
    """Return the env's action for these tokens: arrays of the observation's kind, with
    log-probabilities where the env asks for them."""
    torch_env = isinstance(obs["tokens"], Tensor)
    tokens, logprobs = (x if torch_env else x.cpu().numpy() for x in (tokens_N, logprobs_N))
    return {"token": tokens, "logprob": logprobs} if wants_logprob(envs) else tokens


def flags(
    terminations: Any, truncations: Any, logprobs_N: Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return both flags (N,) on the host, and which log-probs are not finite (N,)."""
    invalid_N = ~logprobs_N.isfinite()
    if isinstance(terminations, Tensor):
        # Stacked, so that a step on a GPU waits for one copy and not for three.
        stacked = torch.stack([terminations, truncations, invalid_N.to(terminations.device)])
        terminated, truncated, invalid = stacked.cpu().numpy()
        return terminated, truncated, invalid
    return np.asarray(terminations), np.asarray(truncations), invalid_N.cpu().numpy()


def read_ends(
    envs: VectorEnv,
    terminated: np.ndarray,
    truncated: np.ndarray,
    infos: Mapping[str, Any],
    rows: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return, for the episodes that end in `rows`, which were cut by the length limit, and after
    which the value of the last state counts.

    The flags mean what Gymnasium means by them: learners bootstrap at truncations. But under
    `cut="truncated"` a scored cut is a truncation too, and its score is all there is.
    """
    bootstraps = truncated[rows] & ~terminated[rows]
    cut = take_info(infos, "cut", rows, bootstraps)
    scored = getattr(getattr(env_core(envs), "token_spec", None), "score_truncated", False)
    return cut, bootstraps & ~(cut & scored)


# ---------------------------------------------------------------- some slots of an array


def take(values: Any, rows: np.ndarray) -> np.ndarray:
    """Return `values[rows]` on the host."""
    if isinstance(values, Tensor):
        return values[torch.as_tensor(rows, device=values.device)].cpu().numpy()
    return np.asarray(values)[rows]


def take_obs(obs: Any, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return `rows` of a batched observation, or of Gymnasium's object array of single ones
    (`final_obs`): the texts, with their `own_mask` where there is one."""
    keys = ("tokens", "length", "prompt_length", "own_mask")
    if isinstance(obs, Mapping):
        return {key: take(obs[key], rows) for key in keys if key in obs}
    return {key: np.stack([obs[i][key] for i in rows]) for key in keys if key in obs[rows[0]]}


def take_info(infos: Mapping[str, Any], key: str, rows: np.ndarray, default: Any) -> np.ndarray:
    """Return `infos[key][rows]`.

    Rows that the mask `_key` leaves out, and all rows where there is no such key, have the
    `default`, which is one value or one for each row.
    """
    if key not in infos:
        return np.full(len(rows), default)
    values = take(infos[key], rows)
    known = take(infos[f"_{key}"], rows) if f"_{key}" in infos else np.ones(len(rows), bool)
    return np.where(known.reshape(-1, *[1] * (values.ndim - 1)), values, default)


def take_by_name(
    infos: Mapping[str, Any], key: str, rows: np.ndarray
) -> list[dict[str, np.ndarray]]:
    """Return what the mapping `infos[key]` has for each of `rows`: float32 arrays by name, NaN
    where a name's mask leaves a row out."""
    by_name = infos.get(key, {})
    taken = {
        name: take_info(by_name, name, rows, np.nan).astype(np.float32)
        for name in by_name
        if not name.startswith("_")  # the masks, which Gymnasium puts beside the values
    }
    return [{name: values[n] for name, values in taken.items()} for n in range(len(rows))]
