"""TorchRL's PPO on a token environment, through TorchRL's own Gymnasium wrapper.

The env is made with `autoreset_mode="Disabled"`, as TorchRL resets rows itself. Its policy is a
small network on the reference's frozen features, and `kl="none"`, because TorchRL's losses know no
KL to a reference.
"""

import argparse
from typing import Any

import gymnasium as gym
import torch
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import GymWrapper
from torchrl.modules import OneHotCategorical, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

import tokenenv  # noqa: F401  (registers the ids)


def network(num_inputs: int, num_outputs: int) -> nn.Module:
    """Two hidden layers."""
    return nn.Sequential(
        nn.Linear(num_inputs, 64),
        nn.Tanh(),
        nn.Linear(64, 64),
        nn.Tanh(),
        nn.Linear(64, num_outputs),
    )


def train(
    env_id: str, total_steps: int, num_envs: int, batch_steps: int, **env_options: Any
) -> float:
    """Prints the mean reward of a step as it goes; returns the critic's mean value of a fresh
    text."""
    torch.manual_seed(0)
    options = {"observation": "features", "kl": "none", "autoreset_mode": "Disabled", **env_options}
    env = GymWrapper(gym.make_vec(env_id, num_envs=num_envs, **options))
    num_inputs, num_actions = (
        env.observation_spec["observation"].shape[-1],
        env.action_spec.shape[-1],
    )
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(
            network(num_inputs, num_actions), in_keys=["observation"], out_keys=["logits"]
        ),
        ProbabilisticTensorDictModule(
            in_keys=["logits"],
            out_keys=["action"],
            distribution_class=OneHotCategorical,
            return_log_prob=True,
        ),
    )
    critic = ValueOperator(network(num_inputs, 1), in_keys=["observation"])
    loss = ClipPPOLoss(actor, critic, entropy_coeff=0.01)
    advantages = GAE(gamma=1.0, lmbda=0.95, value_network=critic)
    optimizer = torch.optim.Adam(loss.parameters(), lr=2e-3)
    fresh = env.reset()
    collector = Collector(env, actor, frames_per_batch=batch_steps, total_frames=total_steps)
    for number, batch in enumerate(collector):
        for _ in range(4):
            advantages(batch)
            flat = batch.reshape(-1)
            for rows in torch.randperm(len(flat)).chunk(4):
                losses = loss(flat[rows])
                sum(value for name, value in losses.items() if name.startswith("loss_")).backward()
                nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        if number % 10 == 0:
            print(
                f"{(number + 1) * batch_steps:>8,} steps | mean reward of a step "
                f"{mean_reward(batch):.3f}"
            )
    print(f"{env_id}: mean reward of a step {mean_reward(batch):.3f} at the end")
    collector.shutdown()
    with torch.no_grad():
        return float(critic(fresh)["state_value"].mean())


def mean_reward(batch: object) -> float:
    """Of all steps of a batch."""
    return float(batch["next", "reward"].mean())


def main() -> None:
    """Trains with the settings of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env-id", default="tokenenv/Negation-v0")
    parser.add_argument("--total-steps", type=int, default=100_000)
    parser.add_argument("--num-envs", type=int, default=32)
    parser.add_argument("--batch-steps", type=int, default=2048)
    value = train(**vars(parser.parse_args()))
    print(f"the critic's value of a fresh text: {value:.2f}")


if __name__ == "__main__":
    main()
