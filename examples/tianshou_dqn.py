"""Tianshou's DQN on a token environment, unmodified: single texts side by side in Tianshou's own
vector env.

    make test-tianshou     # makes an environment of its own, .venv-tianshou, and runs this file
    .venv-tianshou/bin/python examples/tianshou_dqn.py --env-id tokenenv/Negation-v0

Tianshou needs an environment of its own, because its pins and those of this repository do not meet
(docs/other-libraries.md). The policy is a small network on the reference's frozen features, and
`kl="none"`, as DQN knows no KL to a reference. Every env of Tianshou's holds models of its own; the
bundled n-gram ids are small enough for that.
"""

import argparse
from typing import Any

import gymnasium as gym
import torch
from tianshou.algorithm import DQN
from tianshou.algorithm.modelfree.dqn import DiscreteQLearningPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.trainer import OffPolicyTrainerParams
from tianshou.utils.net.common import Net

import tokenenv  # noqa: F401  (registers the ids)


def train(env_id: str, total_steps: int, num_envs: int, **env_options: Any) -> float:
    """Train, and print the mean return of greedy texts before and after; return the value of a new
    text, which is that of its best token."""
    torch.manual_seed(0)
    options = {"observation": "features", "kl": "none", **env_options}
    makers = [lambda: gym.make(env_id, **options)] * num_envs
    envs, test_envs = DummyVectorEnv(makers), DummyVectorEnv(makers)
    single = gym.make(env_id, **options)
    model = Net(
        state_shape=single.observation_space.shape,
        action_shape=single.action_space.n,
        hidden_sizes=[64, 64],
    )
    policy = DiscreteQLearningPolicy(
        model=model, action_space=single.action_space, eps_training=0.2
    )
    algorithm = DQN(
        policy=policy, optim=AdamOptimizerFactory(lr=1e-3), gamma=1.0, target_update_freq=200
    )
    collector = Collector(
        algorithm, envs, VectorReplayBuffer(20_000, num_envs), exploration_noise=True
    )
    test_collector = Collector(algorithm, test_envs)
    before = mean_return(test_collector, num_envs)
    algorithm.run_training(
        OffPolicyTrainerParams(
            training_collector=collector,
            max_epochs=1,
            epoch_num_steps=total_steps,
            collection_step_num_env_steps=8 * num_envs,
            update_step_num_gradient_steps_per_sample=0.25,
            batch_size=128,
            show_progress=False,
            verbose=False,
        )
    )
    after = mean_return(test_collector, num_envs)
    print(f"{env_id}: mean return {before:.2f} before, {after:.2f} after")
    with torch.no_grad():
        return float(model(single.reset(seed=0)[0][None])[0].max())


def mean_return(collector: Collector, num_envs: int) -> float:
    """Return the mean return of greedy texts, two in each env."""
    collected = collector.collect(n_episode=2 * num_envs, reset_before_collect=True)
    return float(collected.returns_stat.mean)


def main() -> None:
    """Train with the settings of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--env-id", default="tokenenv/Negation-v0")
    parser.add_argument("--total-steps", type=int, default=20_000)
    parser.add_argument("--num-envs", type=int, default=8)
    value = train(**vars(parser.parse_args()))
    print(f"the value of a new text: {value:.2f}")


if __name__ == "__main__":
    main()
