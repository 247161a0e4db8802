"""A step of agent and env, where the policy shares the env's backbone and where it does not.

Under LoRA the policy and the reference have the same weights but for the adapters. With
`backbone="shared"` the env reads each token for both, in one forward of stacked rows. It prints the
cost of a step of N texts, sampling, heads and rewards included, and no resets: CPU time of this
process, or time on a GPU, medians of turns, from one run for each N. With `--reward` a reward model
that is a second adapter on the same base scores each token too.
"""

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from rich.console import Console
from timing import medians
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents import PPO
from tokenenv.models.adapters import adapter_layers, with_lora
from tokenenv.models.cached_lm import trunk_of
from tokenenv.models.loading import load_causal_lm

PROMPT, STOP = 32, 1
console = Console(width=150)


def stir(model: nn.Module, seed: int) -> None:
    """Give adapters weights with which they change what a model says; at first they add nothing."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter_layers(model):
        for up in layer.lora_B.values():
            noise = torch.randn(up.weight.shape, generator=generator)
            up.weight.data.copy_(0.02 * noise)


def adapter_reward(base: Any) -> Any:
    """Return a reward model that is an adapter and a head on the base's weights."""
    config = copy.deepcopy(base.config)
    config.num_labels, config.pad_token_id = 1, 0
    with torch.device("meta"):
        model = AutoModelForTokenClassification.from_config(config)
    adapted = with_lora(base, 8, 1)
    stir(adapted, 1)
    setattr(model, model.base_model_prefix, trunk_of(adapted))
    model.score = nn.Linear(config.hidden_size, 1, device=base.device, dtype=base.dtype)
    return model.eval().requires_grad_(False)


class Run:
    """An agent whose texts run on and never end, step by step."""

    def __init__(self, base: Any, reward: Any, num_texts: int, steps: int, backbone: str) -> None:
        prompt = np.random.default_rng(0).integers(100, 1000, PROMPT).tolist()
        scored = {"reward": {}} if reward is None else {"reward_model": reward}
        self.envs = gym.make_vec(
            "tokenenv/TextGen-v0",
            num_envs=num_texts,
            model=base,
            prompts=[prompt],
            stop_token_ids=[STOP],
            max_new_tokens=steps,
            kl_coef=0.05,
            **scored,
        )
        agent = PPO(self.envs, lora_rank=8, backbone=backbone, precision="float32")
        stir(agent.policy.model, 0)
        self.actor, head = agent.actor, agent.policy.head
        stop = torch.tensor([STOP], device=base.device)
        agent.policy.head = lambda states: head(states).index_fill_(-1, stop, -torch.inf)
        self.obs = self.envs.reset(seed=0)[0]
        self.tokens: list[Tensor] = []
        self.logprobs: list[Tensor] = []
        """(2, N) of each step: those of the policy and of the reference."""

    def step(self) -> None:
        """Write a token in each text."""
        tokens, logprobs = self.actor.act(self.obs)
        self.obs, _, _, _, infos = self.envs.step(tokens.cpu().numpy())
        self.tokens.append(tokens)
        self.logprobs.append(torch.stack([logprobs.cpu(), torch.tensor(infos["ref_logprob"])]))


def clock_of(device: torch.device) -> Callable[[], float]:
    """Return a clock of what runs on the device."""
    if device.type == "cpu":
        return time.process_time

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def compare(base: Any, reward: Any, num_texts: int, turns: int) -> None:
    """Print the cost of a step either way, and how far the log-probs are apart."""
    ways = ("separate", "shared")
    runs = {way: Run(base, reward, num_texts, turns + 8, way) for way in ways}
    for run in runs.values():
        run.step()  # which reads the prompts
    seconds = medians({way: run.step for way, run in runs.items()}, turns, clock_of(base.device))
    one, other = runs.values()
    same = all(map(torch.equal, one.tokens, other.tokens))
    logprobs = [torch.stack(run.logprobs) for run in (one, other)]
    console.print(
        f"N={num_texts}: separate {1e3 * seconds['separate']:.1f} ms, shared "
        f"{1e3 * seconds['shared']:.1f} ms, ratio {seconds['separate'] / seconds['shared']:.2f}; "
        f"tokens are {'the same' if same else 'others'}, log-probs differ by at most "
        f"{(logprobs[0] - logprobs[1]).abs().max():.1e}, of policy and reference by "
        f"{logprobs[0].diff(dim=1).abs().mean():.1f}"
    )


def main() -> None:
    """Measure each number of texts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a directory or a hub id")
    parser.add_argument("--num-texts", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--reward", action="store_true", help="score by a second adapter")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    base = load_causal_lm(args.model, device=args.device)
    reward = adapter_reward(base) if args.reward else None
    for num_texts in args.num_texts:
        compare(base, reward, num_texts, args.turns)


if __name__ == "__main__":
    main()
