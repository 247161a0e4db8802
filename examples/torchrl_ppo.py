"""TorchRL's PPO on a token environment, through TorchRL's own Gymnasium wrapper.

    pip install torchrl
    python examples/torchrl_ppo.py --env-id tokenenv/Negation-v0

TorchRL resets rows itself, so the env is made with `autoreset_mode="Disabled"`. The policy is a
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
    """Make a network with two hidden layers."""
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
    """Train, and print the mean reward of a step; return the critic's mean value of a new text."""
    torch.manual_seed(0)
    options = {"observation": "features", "kl": "none", "autoreset_mode": "Disabled", **env_options}
    env = GymWrapper(gym.make_vec(env_id, num_envs=num_envs, **options))
    num_inputs = env.observation_spec["observation"].shape[-1]
    num_actions = env.action_spec.shape[-1]
    logits = network(num_inputs, num_actions)
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(logits, in_keys=["observation"], out_keys=["logits"]),
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
                # TorchRL returns the parts of the loss, whose names begin so, beside diagnostics.
                losses = loss(flat[rows])
                sum(value for name, value in losses.items() if name.startswith("loss_")).backward()
                nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        if number % 10 == 0:
            steps = (number + 1) * batch_steps
            print(f"{steps:>8,} steps | mean reward of a step {mean_reward(batch):.3f}")
    print(f"{env_id}: mean reward of a step {mean_reward(batch):.3f} at the end")
    collector.shutdown()
    with torch.no_grad():
        return float(critic(fresh)["state_value"].mean())


def mean_reward(batch: object) -> float:
    """Return the mean reward of all steps of a batch."""
    return float(batch["next", "reward"].mean())


def main() -> None:
    """Train with the settings of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env-id", default="tokenenv/Negation-v0")
    parser.add_argument("--total-steps", type=int, default=100_000)
    parser.add_argument("--num-envs", type=int, default=32)
    parser.add_argument("--batch-steps", type=int, default=2048)
    value = train(**vars(parser.parse_args()))
    print(f"the critic's value of a new text: {value:.2f}")


if __name__ == "__main__":
    main()
