"""A reward design of your own, from the class to a trained policy.

It pays a token for what it changes in the reward model's score, but only when that has moved by a
margin since it last paid.
"""

import gymnasium as gym
import torch
from torch import Tensor

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents import PPO
from tokenenv.agents.run.evaluate import evaluate
from tokenenv.rewards.term import RewardTerm, States, Transitions


class Milestones(RewardTerm):
    """r_t = Phi(s_{t+1}) - Phi(s_t), with Phi the score at the last milestone: a change of at least
    `margin`.

    The end of a scored text is a milestone, so the rewards add up to score - f(prompt).
    """

    name = "milestones"
    needs = frozenset({"causal scorer"})
    preserves_return = True
    preserves_gradient = True
    has_memory = True
    has_potential = True

    def __init__(self, margin: float) -> None:
        self.margin = margin

    def remember(self, memory: Tensor | None, tokens: Tensor, states: States) -> Tensor:
        """(K,): the score at the last milestone."""
        if memory is None:
            return states.score
        return torch.where((states.score - memory).abs() >= self.margin, states.score, memory)

    def potential(self, states: States) -> Tensor:
        """(K,): the same number; the env reports it, for `PPO(critic_offset="potential")`."""
        return states.memory[self.name]

    def reward(self, batch: Transitions) -> Tensor:
        """(K,): the change since the last milestone, where there is a new one."""
        paid = batch.after.memory[self.name]
        return torch.where(batch.scored, batch.after.score, paid) - batch.before.memory[self.name]


def main(total_tokens: int = 20_000, num_texts: int = 256) -> None:
    """Trains on the design and on the score at the end, and measures both on held-out prompts."""
    make = {"id": "tokenenv/Reviews-v0", "num_envs": 64, "autoreset_mode": "SameStep"}
    held_out = gym.make_vec(**make, split="test")
    for name, reward in {"milestones": Milestones(margin=0.5), "terminal": "terminal"}.items():
        agent = PPO(gym.make_vec(**make, reward=reward)).learn(total_tokens, progress=True)
        found = evaluate(agent, held_out, num_texts=num_texts)
        print(
            f"{name}: {found.gold:.2f} of {num_texts} held-out reviews are positive, "
            f"{found.kl:.1f} nats of KL per text"
        )


if __name__ == "__main__":
    main()
