"""Runs of a vector env of texts under planned actions, with all that the env returns copied to the
host; and what checks are made of (`require`, `close`, `difference`)."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from torch import Tensor

from tokenenv.errors import ContractError
from tokenenv.types import TokenSpec

Action = tuple[np.ndarray, np.ndarray]
"""The tokens (N,) int64 and, for envs that take them, their log-probs (N,) float32."""


@dataclass(slots=True)
class Step:
    """One step of all N slots, as NumPy arrays on the host."""

    action: Action
    """What was given to the env."""
    active: np.ndarray
    """(N,) bool: the slots that took a token; all except those that NEXT_STEP only resets."""
    age: np.ndarray
    """(N,) int64: tokens of the policy's at the end of the step, a prefix's included."""
    before: Any
    """The observation before the step."""
    after: Any
    """The observation that the step returned."""
    end: Any
    """The observation after the step, in which slots whose text ended show its end."""
    reward: np.ndarray
    """(N,) float32."""
    terminated: np.ndarray
    """(N,) bool."""
    truncated: np.ndarray
    """(N,) bool."""
    info: Any
    """The infos that the step returned."""
    returned: tuple[Any, ...]
    """What the step returned: the very objects, not copies."""

    @property
    def ended(self) -> np.ndarray:
        """(N,) bool: the slots whose text ended."""
        return self.terminated | self.truncated

    @property
    def copied(self) -> tuple[Any, ...]:
        """What the step returned, as it was at that time."""
        return self.after, self.reward, self.terminated, self.truncated, self.info


def mode_of(envs: Any) -> Any:
    """Return the env's autoreset mode."""
    return envs.metadata.get("autoreset_mode")


def draw(envs: Any, rng: np.random.Generator, stop: float = 0.15) -> Action:
    """Draw random tokens, of which about the share `stop` end a text or a turn, and log-probs."""
    tokens = np.array(draw_ids(envs, rng, envs.num_envs))
    spec = envs.unwrapped.token_spec
    stops = spec.stop_token_ids if stop == 1.0 else closing_ids(spec)
    if stops:
        stopping = rng.random(envs.num_envs) < stop
        tokens = np.where(stopping, rng.choice(stops, envs.num_envs), tokens)
    return tokens, -rng.exponential(2.0, envs.num_envs).astype(np.float32)


def draw_ids(envs: Any, rng: np.random.Generator, count: int) -> list[int]:
    """Draw `count` random tokens, none of which ends a text, or a turn if there are others."""
    spec = envs.unwrapped.token_spec
    ids = np.arange(spec.vocab_size)
    quiet = np.setdiff1d(ids, closing_ids(spec))
    if not len(quiet):
        quiet = np.setdiff1d(ids, spec.stop_token_ids)
    return rng.choice(quiet, count).tolist()


def closing_ids(spec: TokenSpec) -> tuple[int, ...]:
    """Return the ids that end a text, and those after which the environment may write into it."""
    turn_ends = spec.turn_end_token_ids if spec.responds else ()
    return (*spec.stop_token_ids, *(turn_ends or ()))


def asked(tokens: np.ndarray, spec: TokenSpec) -> np.ndarray:
    """Return bool: the tokens (N,) after which the environment may write into the text, or end
    it."""
    if not spec.responds or spec.turn_end_token_ids is None:
        return np.full(tokens.shape, spec.responds)
    return np.isin(tokens, spec.turn_end_token_ids)


def as_action(envs: Any, action: Action) -> Any:
    """Return an action in the form that the env takes, as a copy."""
    tokens, logprobs = action[0].copy(), action[1].copy()
    if isinstance(envs.single_action_space, spaces.Dict):
        return {"token": tokens, "logprob": logprobs}
    return tokens


def bad_actions(envs: Any, tokens: np.ndarray, logprobs: np.ndarray) -> list[tuple[str, Any]]:
    """Return actions that an env must refuse, each with what is wrong with it: the given action
    with one thing changed."""

    def at_0(array: np.ndarray, value: float) -> np.ndarray:
        return np.concatenate([np.array([value], array.dtype), array[1:]])

    vocab_size = envs.unwrapped.token_spec.vocab_size
    bad = [
        ("token -1", at_0(tokens, -1), logprobs),
        (f"token {vocab_size}", at_0(tokens, vocab_size), logprobs),
        ("a token too many", np.append(tokens, 0), logprobs),
        ("float tokens", tokens.astype(np.float32), logprobs),
    ]
    if not isinstance(envs.single_action_space, spaces.Dict):
        return [(name, wrong) for name, wrong, _ in bad]
    bad += [(f"logprob {value}", tokens, at_0(logprobs, value)) for value in (np.nan, -np.inf, 1.0)]
    wrong = [(name, {"token": a, "logprob": b}) for name, a, b in bad]
    return [*wrong, ("no logprob", {"token": tokens})]


def run(
    envs: Any,
    obs: Any,
    plan: list[Action],
    age: int = 0,
    after_step: Callable[[Any], None] = lambda returned: None,
) -> list[Step]:
    """Take planned steps from a state in which all slots run, and return what they showed.

    Slots whose text ends under DISABLED are reset at once.

    Args:
        envs: the env.
        obs: the observation of the state.
        plan: an action for each step.
        age: how many tokens of the policy's each slot holds.
        after_step: called with what each step returned, after it was copied.
    """
    mode, steps = mode_of(envs), []
    ages, active = np.full(envs.num_envs, age), np.ones(envs.num_envs, bool)
    for action in plan:
        returned = envs.step(as_action(envs, action))
        new, reward, terminated, truncated, info = host(returned)
        arrays = {"rewards": reward, "terminations": terminated, "truncations": truncated}
        _check_arrays(envs.num_envs, returned, info, arrays)
        ages, ended = ages + active, terminated | truncated
        end = _choose(ended, info["final_obs"], new) if "final_obs" in info else new
        shown = (reward, terminated, truncated, info, returned)
        steps.append(Step(action, active, ages, obs, new, end, *shown))
        after_step(returned)
        if mode == AutoresetMode.DISABLED and ended.any():
            new = host(envs.reset(options={"reset_mask": ended.copy()})[0])
        # Under NEXT_STEP the next step resets the slots that ended, and takes no token in them.
        obs, ages = new, np.where(ended, 0, ages)
        active = ~ended if mode == AutoresetMode.NEXT_STEP else np.ones_like(ended)
    return steps


def host(value: Any) -> Any:
    """Copy a nest of arrays and tensors to NumPy arrays."""
    if isinstance(value, Mapping):
        return {key: host(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return tuple(host(entry) for entry in value)
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy().copy()
    return value.copy() if isinstance(value, np.ndarray) else value


def leaves(value: Any) -> Iterator[Any]:
    """Yield the arrays of a nest."""
    if isinstance(value, (Mapping, tuple)):
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from leaves(entry)
    else:
        yield value


def overwrite(returned: Any) -> None:
    """Fill every array of a nest that can be written to with ones."""
    for leaf in leaves(returned):
        if isinstance(leaf, Tensor) or leaf.flags.writeable:
            leaf[...] = 1


def difference(a: Any, b: Any, tolerance: float, rows: Any = slice(None)) -> str | None:
    """Return the name of what differs in `rows` between two nests of host arrays; None if nothing
    does."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if set(a) != set(b):
            return f"the keys {sorted(set(a) ^ set(b))}"
        found = ((key, difference(a[key], b[key], tolerance, rows)) for key in a)
        return next((f"{key} {what}".strip() for key, what in found if what is not None), None)
    return None if close(a[rows], b[rows], tolerance) else ""


def rows_of(value: Any, rows: Any) -> Any:
    """Return some rows of a nest. An info that none of them has is left out, since it is there for
    other rows only."""
    if not isinstance(value, Mapping):
        return value[rows]
    absent = {key for key in value if f"_{key}" in value and not value[f"_{key}"][rows].any()}
    return {
        key: rows_of(entry, rows)
        for key, entry in value.items()
        if key.removeprefix("_") not in absent
    }


def close(a: Any, b: Any, tolerance: float) -> bool:
    """Whether two arrays are equal: floats up to `tolerance`, relative to the larger of 1 and the
    largest of them, with NaN equal to NaN; anything else exactly."""
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        return False
    if a.dtype.kind != "f" and b.dtype.kind != "f":
        return bool((a == b).all())
    size = np.abs(b[np.isfinite(b)]).max(initial=1.0)
    with np.errstate(invalid="ignore"):
        same = (a == b) | (np.abs(a - b) <= tolerance * size) | (np.isnan(a) & np.isnan(b))
    return bool(same.all())


def require(kept: Any, sentence: str) -> None:
    """Raise `ContractError` with `sentence` unless `kept`."""
    if not kept:
        raise ContractError(sentence)


def require_raises(
    error: type[Exception], sentence: str, call: Callable[..., Any], *args: Any
) -> None:
    """Raise `ContractError` with `sentence` unless the call raises `error`."""
    try:
        call(*args)
    except error:
        return
    except Exception as other:
        raise ContractError(f"{sentence} (but {type(other).__name__}: {other})") from other
    raise ContractError(sentence)


def _check_arrays(num_envs: int, returned: Any, info: Any, arrays: dict[str, Any]) -> None:
    """Raise `ContractError` unless infos are a dict, all arrays are of one kind, and those given by
    name are (N,) of the right dtype."""
    require(isinstance(info, dict), f"infos are of type {type(info).__name__}, not dict.")
    kinds = {type(leaf) for leaf in leaves(returned)}
    names = sorted(kind.__name__ for kind in kinds)
    require(
        kinds in ({np.ndarray}, {Tensor}),
        f"step() mixes kinds of arrays: {names}; return NumPy arrays alone, or tensors alone.",
    )
    for name, array in arrays.items():
        dtype = np.dtype(np.float32 if name == "rewards" else np.bool_)
        require(
            array.shape == (num_envs,) and array.dtype == dtype,
            f"{name} are {array.shape} {array.dtype}, not ({num_envs},) {dtype}; return these.",
        )


def _choose(rows: np.ndarray, yes: Any, no: Any) -> Any:
    """Return the `rows` of one nest and the other rows of another."""
    if isinstance(yes, Mapping):
        return {key: _choose(rows, yes[key], no[key]) for key in yes}
    return np.where(rows.reshape(-1, *[1] * (no.ndim - 1)), yes, no)
