"""What a checkpoint of an agent holds, and how a run goes on from it."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tokenenv.errors import CheckpointError, TokenEnvError
from tokenenv.shown import without_secrets

from .env_rows import method

if TYPE_CHECKING:
    from .agent import Agent

PARTS = {"agent", "config", "identity", "weights", "optimizer", "generator"}
PARTS |= {"rng", "updates", "updated_at", "statistics", "collector", "kl_coef", "env"}
"""Of a checkpoint's state."""


def agent_state(agent: "Agent") -> dict[str, Any]:
    """Everything that the next update depends on; frozen weights come from the env's model again."""
    return {
        "agent": type(agent).__name__,
        "config": without_secrets(asdict(agent.config)),
        "identity": env_identity(agent),
        "weights": trained_weights(agent.policy),
        "optimizer": agent.optimizer.state_dict(),
        "generator": agent.actor.generator.get_state(),
        "rng": agent.rng.bit_generator.state,
        "updates": agent.updates,
        "updated_at": agent.updated_at,
        "statistics": {name: value.state_dict() for name, value in agent.statistics.items()},
        "collector": agent.collector.state_dict(),
        "kl_coef": agent.kl_coef,
        "env": agent.collector.save_env(),
    }


@contextmanager
def reading(path: object) -> Iterator[None]:
    """Within it, a checkpoint that holds something else than `agent_state` writes is a `CheckpointError`: whole, with the
    right checksum, it may still have been written by another program, or by hand."""
    try:
        yield
    except TokenEnvError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        what = f"{type(error).__name__}: {error}"[:200]
        raise CheckpointError(f"{path} does not hold what a checkpoint of this agent does ({what}).") from error


def check_state(state: Any, agent: str, config: Iterable[str], path: object) -> None:
    """Raises `CheckpointError` unless this is an `agent_state` of an agent of this class, whose config has these fields."""
    if not isinstance(state, dict) or state.get("agent") != agent:
        by = state.get("agent") if isinstance(state, dict) else None
        raise CheckpointError(f"{path} was saved by {by}, not by {agent}.")
    wanted = {"state": (state, PARTS), "config": (state.get("config"), set(config))}
    for name, (found, expected) in wanted.items():
        if not isinstance(found, dict) or set(found) != set(expected):
            wrong = sorted(set(expected) ^ set(found), key=str) if isinstance(found, dict) else "no mapping"
            raise CheckpointError(
                f"{path} does not fit this version of the package: of its {name}, {wrong} is missing or unknown."
            )


def restore(agent: "Agent", state: dict[str, Any]) -> None:
    """Puts `agent_state` into a new agent; the env is touched last."""
    check_identity(env_identity(agent), state["identity"])
    check_weights(trained_weights(agent.policy), state["weights"])
    agent.policy.load_state_dict(state["weights"], strict=False)
    agent.optimizer.load_state_dict(state["optimizer"])
    agent.actor.generator.set_state(state["generator"])
    agent.rng.bit_generator.state = state["rng"]
    agent.updates, agent.updated_at = state["updates"], state["updated_at"]
    for name, value in agent.statistics.items():
        value.load_state_dict(state["statistics"][name])
    if agent.kl_coef != state["kl_coef"]:
        agent.kl_coef = state["kl_coef"]
    if (agent.config.rollout == "step") == (state["config"]["rollout"] == "step"):
        agent.collector.load_state_dict(state["collector"], running=state["env"] is not None)
        agent.collector.load_env(state["env"])
    else:  # texts that were running are of the other kind: they are left, and the env begins anew
        agent.collector.tokens_seen, agent.collector.version = state["collector"]["tokens_seen"], state["collector"]["version"]
        agent.collector.load_env(None)


def env_identity(agent: "Agent") -> dict[str, Any]:
    """What makes the env this one, in plain values: its own `identity`, or the class and spaces of an env without one; and
    its size, where the texts are stepped."""
    envs = agent.envs
    own = method(envs, "identity")
    if own is None:
        own = {"class": type(agent.core).__name__, "actions": str(envs.single_action_space)}
    return {**own, "num_envs": envs.num_envs} if agent.config.rollout == "step" else dict(own)


def check_identity(env: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` that names what differs between the env and the one of the checkpoint."""
    here, there = dict(flat(env)), dict(flat(saved))
    # One of both may write whole texts, and knows no slots.
    names = [name for name in {**there, **here} if name != "num_envs" or (name in here and name in there)]
    pairs = [(name, there.get(name, "absent"), here.get(name, "absent")) for name in names]
    differing = [f"{name} is {saved!r} there and {own!r} here" for name, saved, own in pairs if saved != own]
    if differing:
        raise CheckpointError(f"the checkpoint belongs to another env: {'; '.join(differing)}.")


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The plain values of nested mappings under dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def trained_weights(policy: nn.Module) -> dict[str, Tensor]:
    """The weights that learning changes, by name."""
    return {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}


def check_weights(expected: dict[str, Tensor], saved: dict[str, Tensor]) -> None:
    """Raises `CheckpointError` unless the saved weights are those of this policy, by name and shape."""
    shapes = [{name: tuple(weight.shape) for name, weight in weights.items()} for weights in (expected, saved)]
    if shapes[0] != shapes[1]:
        name = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))[0][0]
        here, there = (which.get(name, "nothing") for which in shapes)
        raise CheckpointError(f"the checkpoint belongs to another model: it has {there} for {name}, this policy {here}.")
