"""Checkpoints: what one holds of an agent, and the file that it is.

The file is safetensors, not pickle: reading it runs no code. Tensors and NumPy arrays are its
tensors; everything else is JSON in its header, beside a format version and a checksum.
"""

import json
import os
import warnings
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenenv import ranks
from tokenenv.agents.config import AgentConfig
from tokenenv.agents.rollout.env_rows import load_joined, load_learned, method, only_learned
from tokenenv.agents.run.files import previous_of, replace_file, reporting
from tokenenv.errors import CheckpointError, TokenEnvError
from tokenenv.safety.shown import without_secrets
from tokenenv.safety.trust import check_from_file

if TYPE_CHECKING:
    from tokenenv.agents.agent import Agent

FORMAT, VERSION = "tokenenv-checkpoint", "8"
PARTS = {"agent", "config", "weights", "optimizer"}
PARTS |= {"rng", "updates", "updated_at", "kl_coef", "joined", "ranks"}
"""The entries of a checkpoint's state."""
RANK_PARTS = {"identity", "generator", "statistics", "collector", "env"}
RANK_PARTS |= {"pending", "own_updated_at"}
"""The entries of what each of the processes that learn together adds, under its number."""


def rank_state(agent: "Agent") -> dict[str, Any]:
    """Return what this rank alone has: its texts, its env, and what draws them."""
    return {
        "identity": env_identity(agent),
        "generator": agent.actor.generator.get_state(),
        "statistics": {name: value.state_dict() for name, value in agent.statistics.items()},
        "collector": agent.collector.state_dict(),
        "env": agent.collector.save_env(),
        "pending": agent.pending.state_dict(),
        "own_updated_at": agent.own_updated_at,
    }


def agent_state(agent: "Agent") -> dict[str, Any]:
    """Return everything that the next update depends on, but frozen weights: those come from the
    env's model again. All ranks call it, and all have what it returns."""
    return {
        "agent": type(agent).__name__,
        "config": without_secrets(asdict(agent.config)),
        "weights": trained_weights(agent.policy),
        "optimizer": agent.optimizer.state_dict(),
        "rng": agent.rng.bit_generator.state,
        "updates": agent.updates,
        "updated_at": agent.updated_at,
        "kl_coef": agent.kl_coef,
        "joined": agent.joined,
        "ranks": dict(enumerate(ranks.gathered(rank_state(agent)))),
    }


@contextmanager
def reading(path: object) -> Iterator[None]:
    """Turn errors about the contents of a checkpoint into `CheckpointError`.

    A file that is whole, with the right checksum, may still have been written by another program or
    by hand, and then holds something else than `agent_state` writes.
    """
    try:
        yield
    except TokenEnvError:
        raise
    except (
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        OverflowError,
    ) as error:
        what = f"{type(error).__name__}: {error}"[:200]
        raise CheckpointError(
            f"{path} does not hold what a checkpoint of this agent does ({what})."
        ) from error


def check_state(state: Any, agent: str, config: Iterable[str], path: object) -> None:
    """Raise `CheckpointError` unless this is an `agent_state` of an agent of this class, whose
    config has these fields."""
    if not isinstance(state, dict) or state.get("agent") != agent:
        by = state.get("agent") if isinstance(state, dict) else None
        raise CheckpointError(f"{path} was saved by {by}, not by {agent}.")
    parts = state.get("ranks")
    first = parts.get(0) if isinstance(parts, dict) else None
    wanted: dict[str, tuple[Any, Collection[str]]] = {
        "state": (state, PARTS),
        "config": (state.get("config"), set(config)),
        "first rank": (first, RANK_PARTS),
    }
    for name, (found, expected) in wanted.items():
        if not isinstance(found, dict) or set(found) != set(expected):
            wrong = (
                sorted(set(expected) ^ set(found), key=str)
                if isinstance(found, dict)
                else "no mapping"
            )
            raise CheckpointError(
                f"{path} does not fit this version of the package: of its {name}, {wrong} is "
                f"missing or unknown."
            )


def read_agent(
    path: str | os.PathLike[str],
    kind: "type[Agent]",
    overrides: Mapping[str, Any],
    *,
    set_aside: bool,
) -> tuple[dict[str, Any], AgentConfig]:
    """Return the newest state at `path` that an agent of this kind saved, and its config.

    Raises:
        CheckpointError: the file is not one of this agent, or is damaged (`read_newest`).
        InvalidArgument: its config names an engine that a file may not name (`check_rollout`).
    """
    state = read_newest(path, set_aside=set_aside)
    with reading(path):
        known = [field.name for field in fields(kind.config_class)]
        check_state(state, kind.__name__, known, path)
        check_rollout(state["config"], path, overrides)
        check_optimizer(state["config"], path, overrides)
        return state, kind.config_class(**state["config"])


def check_rollout(config: Mapping[str, Any], path: object, said: Collection[str]) -> None:
    """Raise where a checkpoint's config asks for what a file may not, and is not said again."""
    entries = {"agent.rollout": config["rollout"]}
    if "rollout" in said or config["rollout"] != "step":
        options = config["rollout_options"].items()
        entries |= {f"agent.rollout_options.{key}": value for key, value in options}
    again = {"rollout": "agent.rollout", "rollout_options": "agent.rollout_options.*"}
    check_from_file(entries, path, {again[name] for name in said if name in again})


def check_optimizer(config: Mapping[str, Any], path: object, said: Mapping[str, Any]) -> None:
    """Raise where another optimizer is asked for than the one whose moments a checkpoint holds."""
    before = config["optimizer"]
    if said.get("optimizer", before) != before:
        raise CheckpointError(
            f"{path} holds the moments of optimizer={before!r}, which "
            f"{said['optimizer']!r} cannot go on with."
        )


def restore(agent: "Agent", state: dict[str, Any]) -> None:
    """Put an `agent_state` into a new agent; the env is touched last."""
    parts, again = state["ranks"], len(state["ranks"]) == ranks.count()
    part = parts[ranks.number() if again else 0]
    here, there = env_identity(agent), part["identity"]
    if not again:  # the slots are dealt out anew
        here, there = ({**one, "num_envs": None} for one in (here, there))
    check_identity(here, there)
    check_weights(trained_weights(agent.policy), state["weights"])
    agent.policy.load_state_dict(state["weights"], strict=False)
    agent.optimizer.load_state_dict(state["optimizer"])
    agent.rng.bit_generator.state = state["rng"]
    agent.updates, agent.updated_at = state["updates"], state["updated_at"]
    if agent.kl_coef != state["kl_coef"]:
        agent.kl_coef = state["kl_coef"]
    seen = sum(one["collector"]["tokens_seen"] for one in parts.values())
    if again:
        _restore_rank(agent, part, state)
    else:
        _restore_others(agent, state, seen)
    agent.others_seen = seen - agent.collector.tokens_seen


def _restore_rank(agent: "Agent", part: dict[str, Any], state: dict[str, Any]) -> None:
    """Go on with what this rank had."""
    agent.joined = state["joined"]
    agent.actor.generator.set_state(part["generator"])
    for name, value in agent.statistics.items():
        value.load_state_dict(part["statistics"][name])
    agent.pending.load_state_dict(part["pending"])
    agent.own_updated_at = part["own_updated_at"]
    if (agent.config.rollout == "step") == (state["config"]["rollout"] == "step"):
        running = part["env"] is not None and not only_learned(part["env"])
        agent.collector.load_state_dict(part["collector"], running=running)
        agent.collector.load_env(part["env"])
    else:
        # Stepped texts cannot be gone on with by an engine, nor the other way round: the texts that
        # were running are left, and the env begins anew, but for what its terms have learned.
        agent.collector.tokens_seen = part["collector"]["tokens_seen"]
        agent.collector.version = part["collector"]["version"]
        load_learned(agent.envs, part["env"])
        agent.collector.load_env(None)


def _restore_others(agent: "Agent", state: dict[str, Any], seen: int) -> None:
    """Go on where there were more ranks, or fewer: without the texts of theirs that had not been
    learned from, by the policy or by a reward term, and with seeds of one's own, that no rank
    had."""
    part = state["ranks"][0]
    for name, value in agent.statistics.items():
        if name not in agent.own_statistics:
            value.load_state_dict(part["statistics"][name])
    stream = np.random.SeedSequence([agent.collector.seed, agent.updates, ranks.count()])
    agent.collector.seed = int(stream.generate_state(1)[0])
    agent.actor.generator.manual_seed(agent.collector.seed)
    agent.collector.tokens_seen = agent.own_updated_at = seen if ranks.number() == 0 else 0
    agent.collector.version = part["collector"]["version"]
    agent.updated_at = seen
    saved = [one["env"] for one in state["ranks"].values()]
    agent.joined = load_joined(agent.envs, saved, state["joined"])
    agent.collector.load_env(None)


def env_identity(agent: "Agent") -> dict[str, Any]:
    """Return what makes the env this one, in plain values.

    It is the env's own `identity`, or the class and the actions of an env without one, and the
    number of slots where the texts are stepped.
    """
    envs = agent.envs
    own = method(envs, "identity")
    if own is None:
        own = {"class": type(agent.core).__name__, "actions": str(envs.single_action_space)}
    return {**own, "num_envs": envs.num_envs} if agent.config.rollout == "step" else dict(own)


def check_identity(env: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` that names what differs between the env and the one of the
    checkpoint."""
    here, there = dict(flat(env)), dict(flat(saved))
    # Whole texts from an engine know of no slots, so num_envs may be on one side only.
    both = "num_envs" in here and "num_envs" in there
    names = [name for name in {**there, **here} if name != "num_envs" or both]
    pairs = [(name, there.get(name, "absent"), here.get(name, "absent")) for name in names]
    differing = [
        f"{name} is {saved!r} there and {own!r} here" for name, saved, own in pairs if saved != own
    ]
    if differing:
        raise CheckpointError(f"the checkpoint belongs to another env: {'; '.join(differing)}.")


def flat(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the plain values of nested mappings under dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def trained_weights(policy: nn.Module) -> dict[str, Tensor]:
    """Return the weights that learning changes, by name."""
    return {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}


def check_weights(expected: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """Raise `CheckpointError` unless the saved weights are those of this policy, by name and
    shape."""
    shapes = [
        {name: tuple(weight.shape) for name, weight in weights.items()}
        for weights in (expected, saved)
    ]
    if shapes[0] != shapes[1]:
        name = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))[0][0]
        here, there = (which.get(name, "nothing") for which in shapes)
        raise CheckpointError(
            f"the checkpoint belongs to another model: it has {there} for {name}, this policy "
            f"{here}."
        )


def write_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write nested dicts, lists and tuples of plain values, NumPy arrays and tensors.

    The file appears whole or not at all: a crash at any moment leaves the previous checkpoint at
    `path`. That one is then kept as `path`.previous, which `read_newest` takes where the newer one
    is damaged.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encode(state, tensors, "state"))
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "state": text,
        "checksum": str(_checksum(text, tensors)),
    }

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # its own error for a full disk
            raise OSError(str(error)) from error

    replace_file(Path(path), write, keep_previous=True)


def read_newest(path: str | os.PathLike[str], *, set_aside: bool = False) -> dict[str, Any]:
    """Return what the checkpoint at `path` holds or, where that file is missing or damaged, what
    the one before it holds, with a warning.

    `set_aside` renames the damaged file to `path`.damaged, so that the next `write_checkpoint` does
    not keep it as the previous one, in place of the good one.
    """
    path = Path(path)
    try:
        return read_checkpoint(path)
    except CheckpointError as error:
        try:
            state = read_checkpoint(previous_of(path))
        except CheckpointError:
            raise error from None
        warnings.warn(f"{error} The one before it is taken: {previous_of(path)}.", stacklevel=4)
        if set_aside and path.exists():
            with reporting(path, "be renamed"):
                os.replace(path, path.with_name(path.name + ".damaged"))
        return state


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what `write_checkpoint` was given, tensors on the CPU; raise `CheckpointError` where
    the file is missing, corrupt or foreign."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {error}.") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is a safetensors file, but not a checkpoint of this package."
        )
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has checkpoint version {metadata.get('version')}; this package reads "
            f"{VERSION}."
        )
    text = metadata.get("state", "")
    if metadata.get("checksum") != str(_checksum(text, tensors)):
        raise CheckpointError(f"{path} is corrupt: its contents do not match its checksum.")
    try:
        return _decode(json.loads(text), tensors)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:  # somebody else wrote it
        raise CheckpointError(
            f"{path} is corrupt: its state cannot be read ({type(error).__name__}: {error})."
        ) from error


def _checksum(text: str, tensors: dict[str, Tensor]) -> int:
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, value)
    return value


def _encode(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """Return JSON for `value`. What JSON does not have becomes `{kind: contents}`, and so does a
    dict, as a list of pairs: its keys need not be text."""
    if isinstance(value, Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, Tensor) else "array"
        # A copy: tied weights share memory, which safetensors refuses.
        tensors[name] = (
            torch.as_tensor(value).detach().cpu().clone(memory_format=torch.contiguous_format)
        )
        return {kind: name}
    if isinstance(value, dict):
        return {
            "dict": [
                [_encode(k, {}, ""), _encode(v, tensors, f"{name}.{k}")] for k, v in value.items()
            ]
        }
    if isinstance(value, list | tuple):
        items = [_encode(item, tensors, f"{name}.{i}") for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(f"{name} is a {type(value).__name__}, which a checkpoint cannot hold.")


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "dict":
        return {_decode(k, tensors): _decode(v, tensors) for k, v in content}
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    return tensors[content] if kind == "tensor" else tensors[content].numpy()
