"""What an agent asks of an env, of a policy and of its own settings, before it makes anything."""

import warnings
from typing import Any

import gymnasium as gym
import torch
from gymnasium.vector import VectorEnv
from torch import nn

from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.rollout.env_rows import num_actions, responds
from tokenenv.errors import InvalidArgument
from tokenenv.models.adapters import shared_weight


def check_default_dtype() -> None:
    """Raise `InvalidArgument` where new tensors are not float32, as policies are."""
    if torch.get_default_dtype() != torch.float32:
        raise InvalidArgument(
            f"torch's default dtype is {torch.get_default_dtype()}; agents learn under "
            f"torch.set_default_dtype(torch.float32)."
        )


def check_env(envs: Any) -> None:
    """Raise `InvalidArgument` unless this is a vector env of texts."""
    if not isinstance(envs, VectorEnv):
        raise InvalidArgument(
            f"envs={type(envs).__name__} is no vector env; build one with gym.make_vec."
        )
    space = envs.single_observation_space
    read = {"tokens", "length", "prompt_length"}
    if not isinstance(space, gym.spaces.Dict) or not read <= set(space.spaces):
        raise InvalidArgument(
            'envs must observe "tokens", "length" and "prompt_length"; agents read texts, not '
            "features."
        )
    spec = getattr(envs.unwrapped, "token_spec", None)
    if getattr(spec, "responds", False) and not responds(envs):
        raise InvalidArgument(
            'this env writes into texts, and a wrapper has taken "own_mask" out of what it '
            "observes; without it an agent cannot tell its own tokens from the env's."
        )


def check_policy(policy: Any, envs: VectorEnv, *, learns: bool = True) -> None:
    """Raise `InvalidArgument` unless the policy has the env's tokens and, for an agent that
    `learns`, weights of its own to train."""
    if learns:
        check_apart(policy, envs.unwrapped)
    if policy.vocab_size != num_actions(envs):
        raise InvalidArgument(
            f"policy has {policy.vocab_size} tokens, the env {num_actions(envs)} actions."
        )


def check_apart(policy: nn.Module, core: Any) -> None:
    """Raise `InvalidArgument` if training the policy would change a model that the env reads (its
    reference first of all), or would change nothing."""
    models = {"reference": getattr(core, "reference", None), **getattr(core, "frozen_models", {})}
    for role, model in models.items():
        if name := shared_weight(policy, model):
            raise InvalidArgument(
                f"policy trains {name}, a weight of the env's own {role}, which must stay as it "
                f"is: give the policy a deep copy (before peft puts adapters into it)."
            )
    model = getattr(policy, "model", None)
    if isinstance(model, nn.Module) and not any(w.requires_grad for w in model.parameters()):
        raise InvalidArgument(
            "policy's model has no weight to train: an env freezes the models it is given, so give "
            "the policy a deep copy."
        )


def check_kl(envs: VectorEnv, kl_coef: float | None, kl_target: float | None) -> None:
    """Raise `InvalidArgument` where an agent's beta, or a KL to steer it to, would do nothing in
    this env."""
    kl = getattr(getattr(envs.unwrapped, "config", None), "kl", None)
    check_kl_settings(kl, getattr(envs.unwrapped, "kl_coef", 0.0), kl_coef, kl_target)


def check_kl_settings(
    kl: str | None, beta: float | None, kl_coef: float | None, kl_target: float | None
) -> None:
    """The same of an env's options `kl` and beta, where no env is made yet; None is not known."""
    settings = {"kl_coef": kl_coef, "kl_target": kl_target}
    given = [f"{name}={value}" for name, value in settings.items() if value]
    if given and kl == "none":
        raise InvalidArgument(
            f"{' and '.join(given)} would do nothing in an env with kl='none'; make it with "
            f"kl='reference'."
        )
    beta = beta if kl_coef is None else kl_coef
    if kl_target is not None and beta is not None and not beta > 0:
        raise InvalidArgument(
            f"kl_target={kl_target} cannot adapt kl_coef={beta}, which stays 0; start with kl_coef "
            f"above 0."
        )


def check_ref_logprob(batch: EpisodeBatch, config: Any) -> None:
    """Raise `InvalidArgument` where a setting needs log pi_ref, which the env does not report."""
    for name in ("kl_target", "k3_coef"):
        value = getattr(config, name, None)
        if value and not batch.ref_logprob_BT.any():
            raise InvalidArgument(f"{name}={value} needs an env that reports ref_logprob.")


def group_size_of(envs: VectorEnv, agent: str) -> int:
    """Return how many consecutive slots share each prompt, or raise `InvalidArgument` where that is
    one."""
    group_size = int(getattr(envs.unwrapped, "group_size", 1))
    check_group_size(group_size, agent)
    return group_size


def check_group_size(group_size: int, agent: str) -> None:
    """Raise `InvalidArgument` where texts have no others of their prompt beside them."""
    if group_size < 2:
        raise InvalidArgument(
            f"group_size={group_size} leaves {agent} nothing to compare a text with; make the env "
            f"with group_size=4, say."
        )


def warn_if_biased(envs: VectorEnv) -> None:
    """Warn where reward-to-go does not estimate the gradient of the expected score under the env's
    rewards."""
    terms = getattr(envs.unwrapped, "biased_terms", ())
    if terms:
        warnings.warn(
            f"reward-to-go on {', '.join(map(repr, terms))} does not estimate the gradient of the "
            f"expected score: either the rewards add up to something else, or early ones depend on "
            f"later tokens (docs/rewards.md). 'terminal', 'delta', 'segment', 'shaping' and a "
            f"causal 'token' do; keep this one to compare with, and judge by score and gold.",
            UserWarning,
            stacklevel=3,
        )
