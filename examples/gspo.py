"""A policy ratio of one's own: GSPO (Group Sequence Policy Optimization, Zheng et al. 2025,
arXiv 2507.18071), end to end.

PPO and GRPO compare the new policy with the old one token by token. GSPO takes one ratio a text,
the geometric mean of the ratios of its n tokens, and clips that (equations 5 and 7 of the paper):

    s = (pi(y | x) / pi_old(y | x))^(1/n) = exp( 1/n sum_t (log pi_t - log pi_old_t) )
    loss = - mean over texts of min(s A, clip(s, 1 - clip_range, 1 + clip_high) A)

The advantages are GRPO's, and so are all settings. `policy_loss` is the only method that is new:
`target_kl`, the entropy bonus, both KL losses, the dual clip, importance weights and the clip
fraction work as they do for every policy gradient.

A text has one ratio, so the gradient gives all its tokens the text's mean advantage. That is what
the paper wants, for rewards at the end of a text. With dense rewards take `GSPOToken` (equation 13
of the paper): it has the same ratio, and each token keeps its own advantage. Where all advantages
of a text are equal, both have the same gradient.

The paper clips at 3e-4 and 4e-4 (section 5.1), far closer than GRPO's 0.2, as a mean over a text
moves less than a single token. Here the steps are larger, and so is the default.
"""

import argparse
from dataclasses import dataclass

import gymnasium as gym
from torch import Tensor

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents import GRPO, GRPOConfig
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning.learner import Outputs
from tokenenv.agents.run.evaluate import evaluate


@dataclass(kw_only=True, slots=True)
class GSPOConfig(GRPOConfig):
    """Settings of `GSPO`: GRPO's, with a closer clip."""

    clip_range: float | None = 0.03
    """The ratio of a text is clipped to 1 +- this, above 0; None takes the ratio as it is."""


class GSPO(GRPO):
    """GRPO with one policy ratio a text."""

    config_class = GSPOConfig
    config: GSPOConfig

    def policy_loss(self, out: Outputs, batch: EpisodeBatch, weights_K: Tensor) -> Tensor:
        """Return the loss () of a micro-batch's K tokens. It holds whole texts, so the mean of each
        text is exact."""
        change_K = out.logprob - out.pick(batch.learned["old_logprob"])
        return self.clipped_loss(out.text_means(change_K), out, batch, weights_K)


class GSPOToken(GSPO):
    """GSPO in which each token is learned with its own advantage, for dense rewards."""

    def policy_loss(self, out: Outputs, batch: EpisodeBatch, weights_K: Tensor) -> Tensor:
        """Return the loss () of a micro-batch's K tokens: the ratio has the value of the text's and
        the gradient of the token's."""
        change_K = out.logprob - out.pick(batch.learned["old_logprob"])
        log_ratio_K = out.text_means(change_K).detach() + change_K - change_K.detach()
        return self.clipped_loss(log_ratio_K, out, batch, weights_K)


def main() -> None:
    """Train it and print what it has learned on held-out prompts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--total-tokens", type=int, default=60_000)
    parser.add_argument("--num-envs", type=int, default=64)
    args = parser.parse_args()
    make = {"id": "tokenenv/Reviews-v0", "num_envs": args.num_envs, "autoreset_mode": "SameStep"}
    test_envs = gym.make_vec(**make, split="test")
    agent = GSPO(gym.make_vec(**make, reward="terminal", group_size=4), lr=1e-3)
    before = evaluate(agent, test_envs, num_texts=args.num_envs)
    agent.learn(args.total_tokens, progress=True)
    after = evaluate(agent, test_envs, num_texts=args.num_envs)
    print(
        f"positive reviews: {before.gold:.2f} before, {after.gold:.2f} after, "
        f"{after.kl:.1f} nats of KL per text"
    )


if __name__ == "__main__":
    main()
