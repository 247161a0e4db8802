"""Token rewards in OpenRLHF: a `compute_reward` that pays each response token, not only the last
one.

    python examples/export_openrlhf.py episodes.jsonl

OpenRLHF's experience maker calls `compute_reward(r, kl_coef, kl, action_mask, reward_clip_range)`
with one number r for each text and puts it on the text's last token. This one takes the token
rewards of the same texts instead and gives the same shape back. To use it:
`experience_maker.compute_reward = TokenReward(lookup)`, where `lookup` finds the rows of the
experiences, in their order. Checked against the formula of OpenRLHF 0.11.2 on one reward at the
end.

What it leaves out: a training run, which needs GPUs; and baselines of whole groups, which are
subtracted from r before.
"""

import sys

import torch

from tokenenv.agents.run.export import padded, read_episodes


class TokenReward:
    """A function in the place of OpenRLHF's `compute_reward`. `rows()` has to return the exported
    episodes of the present batch."""

    def __init__(self, rows):
        self.rows = rows

    def __call__(self, r, kl_coef, kl, action_mask=None, reward_clip_range=None):
        """Return rewards (B, A): -beta KL everywhere, and the token rewards where the action mask
        says that there is a token of the policy's (OpenRLHF's `action_ranges`)."""
        batch = padded(self.rows())
        mask, rewards = action_mask.bool(), batch["token_rewards"][batch["response_mask"]]
        if reward_clip_range:
            rewards = rewards.clamp(*reward_clip_range)
        placed = torch.zeros_like(kl).masked_scatter(mask, rewards.to(kl.dtype))
        return placed - max(kl_coef, 0.0) * kl


def main(path):
    """Show what the trainer would be given."""
    rows = read_episodes(path)
    batch = padded(rows)
    kl = (batch["logprobs"] - batch["ref_logprobs"]) * batch["response_mask"]
    rewards = TokenReward(lambda: rows)(None, 0.05, kl, batch["response_mask"])
    paid, penalty = rewards.sum(1).mean(), -0.05 * kl.sum(1).mean()
    print(f"rewards {tuple(rewards.shape)}, {paid:.3f} a text, of which KL {penalty:.3f}")


if __name__ == "__main__":
    main(sys.argv[1])
