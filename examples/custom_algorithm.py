"""An algorithm of one's own: ReMax (Li et al. 2023, arXiv 2310.10505), end to end.

ReMax is REINFORCE whose baseline is the likeliest text:

    A_t = R_t - R_t(greedy text of the same prompt)

For each prompt the policy also writes greedily, and a token's return R_t is compared with that
text's return at the same place. The baseline does not depend on the sampled token, so it does not
bias the gradient.

An algorithm is a class with `advantages`. Sampling, the KL penalty, minibatches, clipping, logging,
checkpoints and evaluation are those of the bundled ones. docs/your-algorithm.md says what else may
be replaced: the policy loss (examples/gspo.py), the weights of tokens (examples/reshaping.py), the
whole update.
"""

import argparse

import gymnasium as gym
import torch
from torch import Tensor

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents import PolicyGradient
from tokenenv.agents.algorithms.groups import hold_last
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning.advantages import returns_to_go
from tokenenv.agents.run.evaluate import evaluate


class ReMax(PolicyGradient):
    """REINFORCE with the return of the greedy text as baseline."""

    def advantages(self, batch: EpisodeBatch) -> Tensor:
        """Return (B, T): each token's return-to-go minus the greedy text's at the same place."""
        returns_BT = returns_to_go(self.rewards(batch), batch.response_length_B, self.config.gamma)
        return returns_BT - self.greedy_returns(batch)[:, : returns_BT.shape[1]]

    def greedy_returns(self, batch: EpisodeBatch) -> Tensor:
        """Return (B, T): what the greedy text of each prompt still earns, without the KL penalty,
        from each place on."""
        prompts = [episode.prompt.tolist() for episode in batch.unstack()]
        greedy = self.generate(prompts, greedy=True)
        scores = self.core.score_episodes(prompts, greedy, kl_coef=0.0)
        paid = torch.from_numpy(scores.token_rewards)
        lengths_B = torch.tensor([len(response) for response in greedy])
        return hold_last(returns_to_go(paid, lengths_B, self.config.gamma), lengths_B)


def main() -> None:
    """Train it and print what it has learned on held-out prompts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--total-tokens", type=int, default=40_000)
    parser.add_argument("--num-envs", type=int, default=64)
    args = parser.parse_args()
    envs, test_envs = (
        gym.make_vec(
            "tokenenv/Reviews-v0", num_envs=args.num_envs, autoreset_mode="SameStep", split=split
        )
        for split in ("train", "test")
    )
    agent = ReMax(envs, lr=1e-3)
    before = evaluate(agent, test_envs, num_texts=args.num_envs)
    agent.learn(args.total_tokens, progress=True)
    after = evaluate(agent, test_envs, num_texts=args.num_envs)
    print(
        f"positive reviews: {before.gold:.2f} before, {after.gold:.2f} after, {after.kl:.1f} nats "
        f"of KL per text"
    )


if __name__ == "__main__":
    main()
