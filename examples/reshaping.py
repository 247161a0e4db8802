"""Per-token reweighting of advantages, end to end: two algorithms with a `reshape` of their own.

`reshape` is called once an update, after the advantages are found and before the loss. It may read
entropies and log-probs of the policy before the update, positions, rewards and groups.

**GTPO** (Group Token Policy Optimization, Tan et al. 2025, arXiv 2508.04349): what a text earns is
shared out among its tokens by the policy's entropy. The paper gives token t of text i the reward

    1   x (a1 + a2 d_t H_it / sum_k H_kt)             in a successful text
    -1  x (a1 + a2 h_t (1 / H_it) / sum_k (1 / H_kt))     in a failed one

where the sums are over the d_t successful (h_t failed) texts of the group that are not over at
place t. An uncertain token of a good text is credited more, and a confident token of a bad text is
blamed more. At each place the factors behind a2 have mean 1.

Taken from the paper: these weights, their two forms, the group, the entropy of the policy before
the update. Left out: the paper weighs rewards of 1 and -1 and then normalises them over tokens;
here GRPO's advantages are weighed, after GRPO's own baseline and deviation. So `alpha=0` is GRPO,
a group whose texts all earn the same teaches nothing, and dense rewards work: "successful" then
means that the token's advantage is positive. Left out as well is GRPO-S, the paper's form for whole
texts.

**Positions**: `PositionMask` learns from some places of each text only, here from its first tokens.
The others keep their rewards, which the returns of the first tokens include; the critic learns at
all places.
"""

import argparse
from dataclasses import dataclass

import gymnasium as gym
import torch
from torch import Tensor

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents import GRPO, PPO, GRPOConfig, PPOConfig
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.run.evaluate import evaluate


@dataclass(kw_only=True, slots=True)
class GTPOConfig(GRPOConfig):
    """Settings of `GTPO`: GRPO's, and one more."""

    alpha: float = 0.3
    """Share of a token's weight that its entropy decides (a2 of the paper; a1 is the rest), 0 to
    1."""
    min_entropy: float = 0.01
    """Entropies count as at least this, in nats, above 0: 1 / H has no bound."""

    def __post_init__(self) -> None:
        GRPOConfig.__post_init__(self)
        self.check_share("alpha")
        self.check("above", 0, "min_entropy")


class GTPO(GRPO):
    """GRPO whose advantages are weighted by the policy's entropy."""

    config_class = GTPOConfig
    config: GTPOConfig

    def reshape(self, advantages_BT: Tensor, batch: EpisodeBatch) -> Tensor:
        """Return (B, T): each advantage times `1 - alpha + alpha w`; see the top of this file."""
        entropy_BT = self.token_outputs(batch).entropy_BT.clamp(min=self.config.min_entropy)
        good_BT, bad_BT = advantages_BT > 0, advantages_BT < 0
        weights_BT = self.shares(entropy_BT, good_BT) + self.shares(1.0 / entropy_BT, bad_BT)
        alpha = self.config.alpha
        return advantages_BT * (1.0 - alpha + alpha * weights_BT)

    def shares(self, values_BT: Tensor, chosen_BT: Tensor) -> Tensor:
        """Return (B, T): the values over their mean at each place, over the chosen texts of a
        group; zero elsewhere. Right of a text the advantage is zero, so nothing is chosen there."""
        groups_NGT = (values_BT * chosen_BT).unflatten(0, (-1, self.group_size))
        counts_N1T = chosen_BT.unflatten(0, (-1, self.group_size)).sum(1, keepdim=True)
        means_N1T = groups_NGT.sum(1, keepdim=True) / counts_N1T.clamp(min=1)
        return (groups_NGT / torch.where(counts_N1T > 0, means_N1T, 1.0)).flatten(0, 1)


@dataclass(kw_only=True, slots=True)
class PositionMaskConfig(PPOConfig):
    """Settings of `PositionMask`: PPO's, and one more."""

    first_tokens: int = 4
    """Tokens at the beginning of each response that are learned from; 1 or more."""

    def __post_init__(self) -> None:
        PPOConfig.__post_init__(self)
        self.check("at least", 1, "first_tokens")


class PositionMask(PPO):
    """PPO that learns from the first tokens of each text only."""

    config_class = PositionMaskConfig
    config: PositionMaskConfig

    def reshape(self, advantages_BT: Tensor, batch: EpisodeBatch) -> Tensor:
        """Return (B, T): zero after the first tokens."""
        places_T = torch.arange(advantages_BT.shape[1])
        return advantages_BT.masked_fill(places_T >= self.config.first_tokens, 0.0)


def main() -> None:
    """Train both and print what they have learned on held-out prompts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--total-tokens", type=int, default=40_000)
    parser.add_argument("--num-envs", type=int, default=64)
    args = parser.parse_args()
    make = {"id": "tokenenv/Reviews-v0", "num_envs": args.num_envs, "autoreset_mode": "SameStep"}
    test_envs = gym.make_vec(**make, split="test")
    for algorithm in (GTPO, PositionMask):
        agent = algorithm(gym.make_vec(**make, group_size=4), lr=1e-3)
        agent.learn(args.total_tokens, progress=True)
        found = evaluate(agent, test_envs, num_texts=args.num_envs)
        print(
            f"{algorithm.__name__}: {found.gold:.2f} of the reviews are positive, "
            f"{found.kl:.1f} nats of KL per text"
        )


if __name__ == "__main__":
    main()
