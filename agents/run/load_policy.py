"""The policy of a checkpoint, without the rest of its run."""

import os
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

from gymnasium.vector import VectorEnv

from tokenenv.agents.config import AgentConfig
from tokenenv.agents.learning.policy import LMPolicy
from tokenenv.agents.rollout.env_rows import method
from tokenenv.agents.rollout.make import default_policy
from tokenenv.agents.rollout.requirements import check_policy
from tokenenv.agents.run.checkpoint import check_weights, read_newest, reading, trained_weights
from tokenenv.errors import CheckpointError


def load_policy(
    path: str | os.PathLike[str], envs: VectorEnv, *, policy: LMPolicy | None = None
) -> LMPolicy:
    """Return the policy that an agent's checkpoint at `path` holds.

    The rest of the run does not matter: `envs` may have another reward, other prompts and another
    number of slots. It is there to be evaluated (`evaluate(policy, envs)`), or to be the start of
    another run (`PPO(envs, policy=policy)`). `Agent.load` goes on with the run itself.

    Args:
        path: a file that `agent.save` wrote, such as the `checkpoint` of a run folder.
        envs: an env with the model that the run began with.
        policy: gives the architecture where it was not the default.

    Raises:
        CheckpointError: the file is damaged, or its weights are those of another model.
    """
    state = read_newest(path)
    with reading(path):
        config = dict(state["config"])
        shared = {field.name: config[field.name] for field in fields(AgentConfig)}
        # What is checked here is what the policy is made of; texts are not written by an engine.
        AgentConfig(**{**shared, "rollout": "step", "rollout_options": {}})
        settings: Any = SimpleNamespace(**config)
        # An agent that learns nothing has no weights in its checkpoint but an idle critic's.
        learns = not all(name.startswith("value_head.") for name in state["weights"])
        made = policy or default_policy(envs, settings, learns=learns)
        check_policy(made, envs, learns=learns)
        check_weights(trained_weights(made), state["weights"])
        if policy is None and not all(weight.requires_grad for weight in made.parameters()):
            check_base(method(envs, "identity"), state["ranks"][0]["identity"])
        made.load_state_dict(state["weights"], strict=False)
    return made


def check_base(env: Any, saved: dict[str, Any]) -> None:
    """Raise `CheckpointError` where the weights beneath trained adapters, which no checkpoint
    holds, are those of another model."""
    here, there = (
        models.get("model", models.get("reference"))
        for models in (identity.get("models", {}) for identity in (env or {}, saved))
    )
    if here != there:
        raise CheckpointError(
            f"the checkpoint belongs to another model: its adapters were trained on {there}, and "
            f"the env's model is {here}."
        )
