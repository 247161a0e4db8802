"""The two parts that an agent is given when it does not bring its own: a policy and a collector."""

from typing import Any

from gymnasium.vector import VectorEnv

from tokenenv.agents.config import AgentConfig
from tokenenv.agents.learning.policy import LMPolicy, copy_to_train
from tokenenv.agents.rollout.actor import Actor
from tokenenv.agents.rollout.collector import Collector
from tokenenv.agents.rollout.env_rows import reference_of
from tokenenv.agents.rollout.text_collector import TextCollector, check_text_env, make_engine
from tokenenv.models.adapters import sharing


def default_policy(envs: VectorEnv, config: AgentConfig, *, learns: bool = True) -> LMPolicy:
    """Return a policy that starts as the env's model, which stays as it is.

    It has weights of its own where they are trained, and shares the others. Where the agent never
    `learns` it shares all of them.
    """
    model: Any = getattr(envs.unwrapped, "model", None) or reference_of(
        envs, "give policy=LMPolicy(model)"
    )
    if not learns:
        model = sharing(model, model.parameters())
    elif not config.lora_rank:  # with it, the policy makes a copy that shares the weights
        model = copy_to_train(model)
    return LMPolicy(
        model,
        separate_value=getattr(config, "separate_value", False),
        lora_rank=config.lora_rank,
        precision=config.precision,
        max_batch_tokens=config.max_batch_tokens,
        seed=config.seed,
        frozen=not learns,
        gradient_checkpointing=config.gradient_checkpointing,
    )


def make_collector(
    envs: VectorEnv, actor: Actor, config: AgentConfig, group_size: int
) -> Collector | TextCollector:
    """Return what `config.rollout` names: a collector that steps the env with this actor, or one
    whose engine writes whole texts with the actor's policy."""
    if config.rollout == "step":
        return Collector(
            envs,
            actor,
            seed=config.seed,
            group_size=group_size,
            max_staleness=config.max_staleness,
        )
    spec = check_text_env(envs).token_spec
    options: dict[str, Any] = {"temperature": config.temperature, "num_texts": envs.num_envs}
    options |= config.rollout_options
    policy: Any = actor.policy
    engine = make_engine(config.rollout, policy, spec, reads_values=actor.reads_values, **options)
    return TextCollector(
        envs,
        engine,
        num_texts=options["num_texts"],
        seed=config.seed,
        group_size=group_size,
        # An engine is kept busy while the policy learns, which needs texts that are one update old.
        max_staleness=1 if config.max_staleness is None else config.max_staleness,
    )
