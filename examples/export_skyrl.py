"""Token rewards in SkyRL: a `GeneratorOutput` with one reward for each response token.

    python examples/export_skyrl.py episodes.jsonl

A generator of SkyRL's returns such a mapping. Where its `rewards` are lists, they are taken token
by token: GAE and REINFORCE++ use them as they are, GRPO and RLOO sum them. Tokens that an
environment wrote have 0 in `loss_masks`. SkyRL's own KL penalty (`use_kl_in_reward`) is added
there. Checked with skyrl 0.3.0 on a CPU: its validation of the mapping, and the tensors that it
makes of it.

What it leaves out: a training run, which needs GPUs. In one, return this from the `generate` of a
`GeneratorInterface` of your own; or call SkyRL's, and put what
`envs.unwrapped.score_episodes(prompts, responses, own=loss_masks)` finds in the place of its
`rewards`.
"""

import sys

from tokenenv.agents.run.export import read_episodes


def generator_output(rows):
    """Return what a generator of SkyRL's returns."""
    return {
        "prompt_token_ids": [row["prompt_ids"] for row in rows],
        "response_ids": [row["response_ids"] for row in rows],
        "rewards": [row["token_rewards"] for row in rows],
        "loss_masks": [[int(own) for own in row["own"]] for row in rows],
        "stop_reasons": ["stop" if row["terminated"] else "length" for row in rows],
        "rollout_metrics": None,
        "rollout_logprobs": [row["logprobs"] for row in rows],
    }


def main(path):
    """Show what the trainer would be given."""
    output = generator_output(read_episodes(path))
    tokens, texts = sum(map(len, output["response_ids"])), len(output["response_ids"])
    paid = sum(map(sum, output["rewards"])) / texts
    print(f"{texts} texts, {tokens} response tokens, {paid:.3f} a text, token by token")


if __name__ == "__main__":
    main(sys.argv[1])
