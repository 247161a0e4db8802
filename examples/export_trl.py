"""Token rewards in TRL: a `GRPOTrainer` that learns from exported episodes, with an advantage for
each token.

    python examples/export_trl.py episodes.jsonl path/to/model

GRPO's loss takes advantages (B, T) as well as (B,): here each token's return-to-go, minus its mean
over the batch. TRL's own KL to the reference is its `beta`, a loss; the rewards in the file leave
it out. What an environment wrote is read and not learned from, by TRL's `tool_mask`. Checked with
TRL 1.16.0 and transformers 5.23: steps on the bundled reviews model, on a CPU.

What it leaves out: generating. The texts are the file's; `old_per_token_logps` are the log-probs
they were drawn with.
"""

import sys

import torch

from tokenenv.agents.run.export import padded, read_episodes, token_advantages


def inputs_of(rows, pad_token_id=0):
    """Return what `GRPOTrainer._prepare_inputs` returns."""
    t = padded(rows, pad_token_id)
    advantages = [torch.tensor(one) for one in token_advantages(rows, with_kl=False)]
    return {
        "prompt_ids": t["prompt_ids"],
        "prompt_mask": t["prompt_mask"].long(),
        "completion_ids": t["response_ids"],
        "completion_mask": t["text_mask"].long(),
        "tool_mask": t["response_mask"].long(),
        "advantages": torch.nn.utils.rnn.pad_sequence(advantages, batch_first=True),
        "old_per_token_logps": t["logprobs"],
        "num_items_in_batch": t["response_mask"].sum(),
    }


def main(path, model):
    """Show what a step takes and, where TRL is installed, take four."""
    rows = read_episodes(path)
    print({name: tuple(tensor.shape) for name, tensor in inputs_of(rows).items()})
    try:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer
    except ImportError:
        return print("to go on: pip install trl==1.16.0")

    class Exported(GRPOTrainer):
        def _prepare_inputs(self, generation_batch):
            start = self.state.global_step * 8 % max(1, len(rows) - 7)
            batch = inputs_of(rows[start : start + 8], self.processing_class.pad_token_id or 0)
            return {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}

    options = {"per_device_train_batch_size": 8, "beta": 0.0, "bf16": False, "report_to": "none"}
    config = GRPOConfig("runs/trl", max_steps=4, **options)
    # The trainer wants prompts and a reward function, and uses neither.
    prompts = Dataset.from_dict({"prompt": ["-"] * 8})
    trainer = Exported(model, lambda completions, **_: [0.0] * len(completions), config, prompts)
    return print(trainer.train().metrics)


if __name__ == "__main__":
    main(*sys.argv[1:])
