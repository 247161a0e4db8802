"""PPO in one file, in the manner of CleanRL, on any Gymnasium id with vector observations and
discrete actions.

    python examples/cleanrl_ppo.py --env-id CartPole-v1
    python examples/cleanrl_ppo.py --env-id tokenenv/Negation-v0
    python examples/cleanrl_ppo.py --env-id tokenenv/Negation-v0 --env-options max_new_tokens 8

Nothing here knows about text. tokenenv is imported to register its ids, and is asked for features
(`observation="features"`): numbers that a frozen reference model has read off the text.

What this file leaves out: continuous actions, frame stacks, recurrent policies, annealed clipping,
more than one process. On tokenenv it also leaves out the KL penalty (`kl="none"`), because the
little network above the features is a policy of its own and no language model. Truncations mean
what Gymnasium means by them, in CartPole and in texts: the value of the last state counts. A text
that is cut and scored is terminated.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode
from torch import Tensor, nn


@dataclass
class Args:
    """PPO's settings."""

    env_id: str = "CartPole-v1"
    """Any id with Box observations and Discrete actions."""
    env_options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Further options of the env, as in: --env-options max_new_tokens 8"""
    total_steps: int = 100_000
    """Steps of all environments together."""
    num_envs: int = 16
    """Environments side by side."""
    num_steps: int = 64
    """Steps of each environment between two updates."""
    epochs: int = 6
    """Passes over each batch."""
    minibatches: int = 4
    """Optimizer steps in each pass."""
    lr: float = 2e-3
    """Adam's learning rate, annealed to zero."""
    gamma: float = 0.99
    """Discount of a step; texts want 1."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation."""
    clip: float = 0.2
    """How far the probability ratio may go from 1."""
    entropy_coef: float = 0.01
    """Weight of the entropy bonus."""
    value_coef: float = 0.5
    """Weight of the value loss."""
    seed: int = 0
    """Seed of the environments and of the network."""


class Network(nn.Module):
    """Two small networks, as CleanRL's CartPole agent has them."""

    def __init__(self, num_inputs: int, num_actions: int) -> None:
        super().__init__()
        self.actor = nn.Sequential(
            layer(num_inputs, 64), nn.Tanh(), layer(64, 64), nn.Tanh(), layer(64, num_actions, 0.01)
        )
        self.critic = nn.Sequential(
            layer(num_inputs, 64), nn.Tanh(), layer(64, 64), nn.Tanh(), layer(64, 1, 1.0)
        )

    def policy(self, obs: Tensor) -> torch.distributions.Categorical:
        """Return the distribution of the next action."""
        return torch.distributions.Categorical(logits=self.actor(obs))

    def value(self, obs: Tensor) -> Tensor:
        """Return the value of each observation."""
        return self.critic(obs)[..., 0]


def layer(num_inputs: int, num_outputs: int, gain: float = 2**0.5) -> nn.Linear:
    """Make a layer with orthogonal weights and a bias of zero."""
    made = nn.Linear(num_inputs, num_outputs)
    nn.init.orthogonal_(made.weight, gain)
    nn.init.zeros_(made.bias)
    return made


def make_envs(args: Args) -> gym.vector.VectorEnv:
    """Make the vector env in SAME_STEP mode, so that no step is lost: the last observation of an
    episode is in the infos, and the step's own is the first one of the next episode."""
    if not args.env_id.startswith("tokenenv/"):
        kwargs = {"autoreset_mode": AutoresetMode.SAME_STEP}
        return gym.make_vec(
            args.env_id, args.num_envs, "sync", vector_kwargs=kwargs, **args.env_options
        )
    import tokenenv  # noqa: F401  (registers the ids)

    options = {"observation": "features", "kl": "none", "autoreset_mode": "SameStep"}
    return gym.make_vec(args.env_id, num_envs=args.num_envs, **{**options, **args.env_options})


def final_rows(final_obs: Any, rows: np.ndarray) -> np.ndarray:
    """Return the last observations of the episodes that ended in `rows`. Gymnasium gives an array
    of arrays, other vector envs a batch."""
    return np.stack([np.asarray(final_obs[row], dtype=np.float32) for row in rows])


class Rollout:
    """Steps all envs, and keeps the returns of the episodes that have ended."""

    def __init__(self, args: Args, envs: gym.vector.VectorEnv) -> None:
        self.envs, self.args = envs, args
        self.obs = torch.as_tensor(envs.reset(seed=args.seed)[0], dtype=torch.float32)
        self.returns: list[float] = []
        self._running = np.zeros(args.num_envs)

    @torch.no_grad()
    def collect(self, network: Network) -> dict[str, Tensor]:
        """Collect one batch (steps * envs, ...), with advantages and returns."""
        lines = [self._step(network) for _ in range(self.args.num_steps)]
        batch = {name: torch.stack([line[name] for line in lines]) for name in lines[0]}
        batch["advantage"] = advantages(batch, network.value(self.obs), self.args)
        batch["return"] = batch["advantage"] + batch["value"]
        return {name: values.flatten(0, 1) for name, values in batch.items()}

    def _step(self, network: Network) -> dict[str, Tensor]:
        policy, obs = network.policy(self.obs), self.obs
        action = policy.sample()
        next_obs, reward, terminated, truncated, infos = self.envs.step(action.numpy())
        reward = np.array(reward, dtype=np.float32)
        ended = terminated | truncated
        self._running += reward
        self.returns += self._running[ended].tolist()
        self._running[ended] = 0.0
        # The value of the last state stands for what a truncated episode would still have earned.
        cut = np.flatnonzero(truncated & ~terminated)
        if len(cut):
            last = torch.as_tensor(final_rows(infos["final_obs"], cut))
            reward[cut] += self.args.gamma * network.value(last).numpy()
        self.obs = torch.as_tensor(next_obs, dtype=torch.float32)
        seen = {
            "obs": obs,
            "action": action,
            "logprob": policy.log_prob(action),
            "value": network.value(obs),
        }
        return seen | {"reward": torch.as_tensor(reward), "ended": torch.as_tensor(ended)}


def advantages(batch: dict[str, Tensor], next_value: Tensor, args: Args) -> Tensor:
    """Estimate advantages (steps, envs); nothing flows over the end of an episode."""
    out, running = torch.zeros_like(batch["reward"]), torch.zeros_like(next_value)
    for t in reversed(range(len(out))):
        going_on = 1.0 - batch["ended"][t].float()
        error = batch["reward"][t] + args.gamma * next_value * going_on - batch["value"][t]
        running = error + args.gamma * args.gae_lambda * going_on * running
        out[t], next_value = running, batch["value"][t]
    return out


def loss(network: Network, part: dict[str, Tensor], args: Args) -> Tensor:
    """Return the clipped policy loss, plus the value loss, minus the entropy bonus."""
    policy = network.policy(part["obs"])
    advantage = (part["advantage"] - part["advantage"].mean()) / (part["advantage"].std() + 1e-8)
    ratio = torch.exp(policy.log_prob(part["action"]) - part["logprob"])
    clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
    gain = torch.minimum(ratio * advantage, clipped * advantage).mean()
    error = 0.5 * ((network.value(part["obs"]) - part["return"]) ** 2).mean()
    return -gain + args.value_coef * error - args.entropy_coef * policy.entropy().mean()


def train(args: Args) -> tuple[list[float], float]:
    """Train; return the returns of all episodes, in the order in which they ended, and the critic's
    mean value of the first states."""
    torch.manual_seed(args.seed)
    envs = make_envs(args)
    num_inputs = int(np.prod(envs.single_observation_space.shape))
    network = Network(num_inputs, int(envs.single_action_space.n))
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr, eps=1e-5)
    rollout, start = Rollout(args, envs), time.time()
    first_obs = rollout.obs
    size = args.num_envs * args.num_steps
    updates = args.total_steps // size
    for update in range(updates):
        optimizer.param_groups[0]["lr"] = args.lr * (1 - update / updates)
        batch = rollout.collect(network)
        for _ in range(args.epochs):
            for rows in torch.randperm(size).chunk(args.minibatches):
                part = {name: values[rows] for name, values in batch.items()}
                optimizer.zero_grad()
                loss(network, part, args).backward()
                nn.utils.clip_grad_norm_(network.parameters(), 0.5)
                optimizer.step()
        if update % max(1, updates // 10) == 0 or update == updates - 1:
            steps, recent = (update + 1) * size, mean(rollout.returns[-100:])
            speed = steps / (time.time() - start)
            print(f"{steps:>8,} steps | {speed:,.0f} steps/s | mean return {recent:.2f}")
    envs.close()
    return rollout.returns, float(network.value(first_obs).mean().detach())


def mean(values: list[float]) -> float:
    """Return the mean, or NaN where there is no value."""
    return float(np.mean(values)) if values else float("nan")


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    returns, value = train(args)
    tenth = max(1, len(returns) // 10)
    first, last = mean(returns[:tenth]), mean(returns[-tenth:])
    print(f"{args.env_id}: mean return {first:.2f} first, {last:.2f} last")
    print(f"the critic's value of a first state: {value:.2f}")
