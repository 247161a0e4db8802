"""Tianshou's DQN on a token environment, unmodified: single texts side by side in Tianshou's own vector env.

The policy is a small network on the reference's frozen features and `kl="none"`, as DQN knows no KL to a reference. Every
env of Tianshou's holds models of its own; the bundled n-gram ids are small enough for that.
"""

import argparse

import gymnasium as gym
from tianshou.algorithm import DQN
from tianshou.algorithm.modelfree.dqn import DiscreteQLearningPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.trainer import OffPolicyTrainerParams
from tianshou.utils.net.common import Net

import tokenenv  # noqa: F401  (registers the ids)


def make_envs(env_id: str, num_envs: int) -> DummyVectorEnv:
    """Ordinary single envs."""
    return DummyVectorEnv([lambda: gym.make(env_id, observation="features", kl="none")] * num_envs)


def main() -> None:
    """Trains, and prints the mean return of greedy texts before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env-id", default="tokenenv/Negation-v0")
    parser.add_argument("--total-steps", type=int, default=20_000)
    parser.add_argument("--num-envs", type=int, default=8)
    args = parser.parse_args()
    envs, test_envs = make_envs(args.env_id, args.num_envs), make_envs(args.env_id, args.num_envs)
    single = gym.make(args.env_id, observation="features", kl="none")
    model = Net(state_shape=single.observation_space.shape, action_shape=single.action_space.n, hidden_sizes=[64, 64])
    policy = DiscreteQLearningPolicy(model=model, action_space=single.action_space, eps_training=0.2)
    algorithm = DQN(policy=policy, optim=AdamOptimizerFactory(lr=1e-3), gamma=1.0, target_update_freq=200)
    collector = Collector(algorithm, envs, VectorReplayBuffer(20_000, args.num_envs), exploration_noise=True)
    test_collector = Collector(algorithm, test_envs)
    before = mean_return(test_collector, args.num_envs)
    algorithm.run_training(
        OffPolicyTrainerParams(
            training_collector=collector,
            max_epochs=1,
            epoch_num_steps=args.total_steps,
            collection_step_num_env_steps=8 * args.num_envs,
            update_step_num_gradient_steps_per_sample=0.25,
            batch_size=128,
            show_progress=False,
            verbose=False,
        )
    )
    print(f"{args.env_id}: mean return {before:.2f} before, {mean_return(test_collector, args.num_envs):.2f} after")


def mean_return(collector: Collector, num_envs: int) -> float:
    """Of greedy texts."""
    return float(collector.collect(n_episode=2 * num_envs, reset_before_collect=True).returns_stat.mean)


if __name__ == "__main__":
    main()
