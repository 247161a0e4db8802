"""Small agents that several processes train together."""

import gymnasium as gym
import tasks
import torch

import tokenenv  # noqa: F401
from tokenenv.agents import ALGORITHMS

SMALL = {
    "klq": {"replay_tokens": 300},
    "vineppo": {"rollouts": 2, "segments": 2, "batch_tokens": 40},
}


def envs_of(name, num_envs=8, **options):
    options = {"max_new_tokens": 8, "autoreset_mode": "SameStep", **options}
    if ALGORITHMS[name].grouped:
        options["group_size"] = 4
    return gym.make_vec(tasks.TOY, num_envs=num_envs, **options)


def agent_of(name, num_envs=8, options=None, **settings):
    settings = {"lr_schedule": "constant", "rollout": "step", **settings}
    given = {"batch_tokens": 150, "lr": 3e-4, "seed": 1, **SMALL.get(name, {}), **settings}
    return ALGORITHMS[name](envs_of(name, num_envs, **(options or {})), **given)


def weights_of(agent):
    """The weights (n,), and how many tokens were seen."""
    weights = [weight.detach().flatten() for weight in agent.policy.parameters()]
    return torch.cat(weights).numpy(), agent.tokens_seen
