"""Token rewards in verl: a `DataProto` whose `rm_scores` hold one reward for each response token.

    python examples/export_verl.py episodes.jsonl

verl's trainer takes `rm_scores` (B, T) as they are, adds its own KL penalty
(`algorithm.use_kl_in_reward`), and estimates advantages from there. Checked with verl 0.9.1 and
tensordict 0.15 on a CPU: the batch, not its trainer.

What it leaves out: a training run, which needs GPUs. In one, return such a tensor from a reward
manager of your own.
"""

import sys

import torch

from tokenenv.agents.run.export import padded, read_episodes


def tensors_of(rows, pad_token_id=0):
    """Return the columns of a verl batch."""
    t = padded(rows, pad_token_id)
    # verl's own words: the attention mask holds all tokens, the response mask those of the policy.
    attention_mask = torch.cat([t["prompt_mask"], t["text_mask"]], 1).long()
    return {
        "prompts": t["prompt_ids"],
        "responses": t["response_ids"],
        "input_ids": torch.cat([t["prompt_ids"], t["response_ids"]], 1),
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
        "response_mask": t["response_mask"].long(),
        "rollout_log_probs": t["logprobs"],
        "old_log_probs": t["logprobs"],
        "ref_log_prob": t["ref_logprobs"],
        "rm_scores": t["token_rewards"],
    }


def main(path):
    """Make the batch and, where verl is installed, verl's own object of it."""
    tensors = tensors_of(read_episodes(path))
    print({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    try:
        from verl import DataProto
    except ImportError:
        return print("to go on: pip install verl")
    return print(DataProto.from_dict(tensors=tensors))


if __name__ == "__main__":
    main(sys.argv[1])
