"""A reward design of your own, from the class to a trained policy.

The design pays a token for what it changes in the reward model's score, but only once the score has
moved by a margin since the last payment: a milestone. docs/your-reward.md explains each part of the
class, and what simpler rewards look like.

    python examples/custom_reward.py
"""

import gymnasium as gym
import torch
from torch import Tensor

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents import PPO
from tokenenv.agents.run.evaluate import evaluate
from tokenenv.rewards import RewardTerm, States, Transitions


class Milestones(RewardTerm):
    """Potential-based shaping, with Phi the score at the last milestone: r_t = Phi(s_{t+1}) -
    Phi(s_t).

    A milestone is a token at which the score is at least `margin` away from the last milestone's.
    The end of a scored text is a milestone too, so the rewards add up to score - f(prompt).
    """

    name = "milestones"
    needs = frozenset({"causal scorer"})  # a reward model that scores every prefix
    has_memory = True
    has_potential = True
    preserves_return = True
    preserves_gradient = True

    def __init__(self, margin: float) -> None:
        self.margin = margin

    def remember(self, memory: Tensor | None, tokens: Tensor, states: States) -> Tensor:
        """(K,): the score at the last milestone, carried along each text."""
        if memory is None:  # the text begins
            return states.score
        return torch.where((states.score - memory).abs() >= self.margin, states.score, memory)

    def potential(self, states: States) -> Tensor:
        """(K,): Phi, which the env reports for `PPO(critic_offset="potential")`."""
        return states.memory[self.name]

    def reward(self, batch: Transitions) -> Tensor:
        """(K,): the change of Phi, which becomes the score where a text is scored."""
        after = torch.where(batch.scored, batch.after.score, self.potential(batch.after))
        return after - self.potential(batch.before)


def main(total_tokens: int = 20_000, num_texts: int = 256) -> None:
    """Train on the design and on the score at the end; measure both on held-out prompts."""
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
