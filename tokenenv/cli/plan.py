"""`tokenenv plan`: the memory that a run will take, before anything is loaded."""

import sys
from dataclasses import dataclass, field, replace
from typing import Any, Generic, cast

from rich.table import Table

from tokenenv.agents import PPOConfig
from tokenenv.agents.config import AgentConfig
from tokenenv.agents.learning.learner import FrozenLM
from tokenenv.agents.learning.peak import acting_peak, learning_peak
from tokenenv.agents.learning.policy import LMPolicy
from tokenenv.agents.rollout.make import default_policy
from tokenenv.cli.console import console, say
from tokenenv.cli.train import Config, Train, check_count
from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.errors import InvalidArgument
from tokenenv.models.memory import Places
from tokenenv.models.shapes import shapes_only
from tokenenv.ranks import MESSAGE_BYTES

LIBRARIES = "Python, libraries, tokenizer"
MOMENTS = {"adamw": 2, "adamw8bit": 0.5}
"""Bytes that an optimizer keeps for each byte of a float32 weight."""
OF_THE_POLICY = ("step", "episode", "auto")
"""Ways to write texts in which the policy has the caches."""
ENGINE = "the engine that writes the texts has weights and caches of its own, which are not counted"


@dataclass(kw_only=True)
class Plan(Train[Config], Generic[Config]):
    """Print the memory that a run with these settings would take, part by part. The options are
    those of `tokenenv train`. No weights are loaded: configs say all sizes.

    docs/your-model.md says what the parts are.
    """

    ranks: int = 1
    """Processes that torchrun will start; the table is of each of them."""
    agent: Config = field(default_factory=lambda: cast(Config, PPOConfig()))
    """Settings of the algorithm that --algo names."""

    def run(self) -> None:
        """Print the table."""
        check_count("ranks", self.ranks)
        parts = plan(share(self, self.ranks))
        if self.ranks > 1 and "gradients" in parts:
            # A tensor larger than a message crosses alone.
            parts["a message between ranks"] = min(parts["gradients"], MESSAGE_BYTES)
        table = Table("part", "MiB" if self.ranks == 1 else "MiB of each rank", box=None)
        table.columns[1].justify = "right"
        for name, size in (parts | {"together": sum(parts.values())}).items():
            table.add_row(name, f"{size / 2**20:,.1f}")
        console.print(table)
        if self.agent.rollout not in OF_THE_POLICY:
            say(ENGINE)


def share(run: Plan, ranks: int) -> Plan:
    """Return the settings of one of several ranks: its slots, and its part of a batch."""
    num_envs, left = divmod(run.num_envs, ranks)
    if left:
        raise InvalidArgument(f"--num-envs {run.num_envs} must be a multiple of --ranks {ranks}.")
    batch_tokens = -(-run.agent.batch_tokens // ranks)
    return replace(run, num_envs=num_envs, agent=replace(run.agent, batch_tokens=batch_tokens))


def plan(run: Train) -> dict[str, int]:
    """Return the bytes of each part of a run's memory; together they are its peak."""
    with shapes_only():
        envs = run.make_envs()
        policy = default_policy(envs, run.agent, learns=run.algorithm.learns)
    # By now all is imported that a run imports, and there is all that a run has beside tensors, as
    # the tokenizer, whose vocabulary may take more than 100 MiB.
    libraries = _resident()
    return parts(envs, policy, run.agent, learns=run.algorithm.learns) | {LIBRARIES: libraries}


def parts(
    envs: TokenVectorEnv, policy: LMPolicy, config: AgentConfig, *, learns: bool
) -> dict[str, int]:
    """Return the bytes of what an env and a policy that learns in it have in memory, by part; parts
    of 0 bytes, which share what an earlier one has, are left out.

    The policy may be on the device "meta", where this computes nothing. Otherwise it reads and
    learns from one batch of zeros; its weights stay as they are, and get gradients.
    """
    core, spec, places = envs.unwrapped, envs.unwrapped.token_spec, Places()
    of_env = core.memory(places)
    caches = of_env.pop("caches")
    sizes = {f"weights: {role}": size for role, size in of_env.items()}
    sizes["weights: policy, beyond those"] = places.new_bytes(policy)
    sizes["caches: env"] = caches
    acting = learning = 0
    if config.rollout in OF_THE_POLICY:
        shape = envs.num_envs, spec.max_length, spec.max_prompt_tokens
        sizes["caches: policy"], acting = acting_peak(policy, *shape)
    if learns:
        trained = sum(weight.nbytes for weight in policy.parameters() if weight.requires_grad)
        moments = MOMENTS[config.optimizer] * trained
        sizes |= {"gradients": trained, "optimizer": int(moments)}
        frozen = _compared_with(envs, policy, config)
        learning = learning_peak(policy, config, spec.max_length, spec.max_new_tokens, **frozen)
    sizes["forwards and backward"] = max(acting, learning)
    return {name: size for name, size in sizes.items() if size}


def _compared_with(envs: Any, policy: LMPolicy, config: Any) -> dict[str, FrozenLM | None]:
    """Return the frozen models that an update's losses read, as an `Agent` makes them."""
    models = {
        "reference": envs.unwrapped.reference if getattr(config, "full_kl_coef", 0) else None,
        "teacher": envs.unwrapped.teacher if getattr(config, "distill_coef", 0) else None,
    }
    return {
        name: None if model is None else FrozenLM(model, policy.vocab_size)
        for name, model in models.items()
    }


def _resident() -> int:
    """Return the most bytes of memory that this process has taken so far; 0 where nobody knows."""
    try:
        import resource  # imported here, because only Unix has it
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
