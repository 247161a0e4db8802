"""The parts that an agent is given when it does not bring its own: a policy, an actor and a
collector."""

from typing import Any

from gymnasium.vector import VectorEnv

from tokenenv.agents.config import AgentConfig
from tokenenv.agents.learning.policy import LMPolicy, copy_to_train
from tokenenv.agents.rollout.actor import Actor
from tokenenv.agents.rollout.collector import Collector
from tokenenv.agents.rollout.env_rows import env_core, reference_of
from tokenenv.agents.rollout.text_collector import TextCollector, check_text_env, make_engine
from tokenenv.errors import InvalidArgument
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


def make_actor(
    envs: VectorEnv,
    policy: Any,
    config: AgentConfig,
    *,
    seed: int = 0,
    reads_values: bool = False,
) -> Actor:
    """Return the policy's actor in this env, which draws from `seed`, shares forwards as
    `config.backbone` says and `reads_values` of the critic where that is asked for.

    Raises:
        InvalidArgument: it says "shared", and nothing can be shared.
    """
    why = None if config.backbone == "separate" else why_separate(envs, policy)
    if config.backbone == "shared" and why is not None:
        raise InvalidArgument(f"backbone='shared' is not possible here: {why}.")
    apart = config.backbone == "separate" or why is not None
    share = None if apart else env_core(envs).share_backbone
    return Actor(
        policy,
        temperature=config.temperature,
        seed=seed,
        share=share,
        reads_values=reads_values,
    )


def why_separate(envs: VectorEnv, policy: Any) -> str | None:
    """Return in words why a policy and the env's models cannot be read in one forward; None where
    they can."""
    core = env_core(envs)
    if not hasattr(core, "shares_backbone"):
        return f"{type(core).__name__} has no share_backbone"
    if not isinstance(policy, LMPolicy):
        return f"{type(policy).__name__} is no LMPolicy"
    if policy.uses_bfloat16:
        return "the policy runs in bfloat16 autocast, and the env's models do not"
    if not core.shares_backbone(policy.model):
        return (
            "no cached model of the env has its weights in common with the policy, as it has with "
            "lora_rank= and without compile= or frozen_dtype="
        )
    return None


def make_collector(
    envs: VectorEnv, actor: Actor, config: AgentConfig, group_size: int, *, seed: int
) -> Collector | TextCollector:
    """Return what `config.rollout` names: a collector that steps the env with this actor, or one
    whose engine writes whole texts with the actor's policy. Prompts follow from `seed`."""
    if config.rollout == "step":
        return Collector(
            envs,
            actor,
            seed=seed,
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
        seed=seed,
        group_size=group_size,
        # An engine is kept busy while the policy learns, which needs texts that are one update old.
        max_staleness=1 if config.max_staleness is None else config.max_staleness,
    )
