"""Token advantages in Tinker: a `Datum` for each text, with an advantage for each token.

    python examples/export_tinker.py episodes.jsonl

Tinker's "importance_sampling" and "ppo" losses take `target_tokens`, `logprobs` and `advantages`,
one number for each target; targets are the text's tokens from the second on. Where the advantage is
0 nothing is learned: in prompts and in what an environment wrote. Tinker has no KL penalty in these
losses, so the env's is part of the advantages. Checked with tinker 0.38.0: the `Datum`s, on a CPU.

What it leaves out: `forward_backward(data, "importance_sampling")` and `optim_step`, which run at
the service.
"""

import sys

import torch

from tokenenv.agents.run.export import read_episodes, token_advantages


def inputs_of(rows):
    """Return a list of (input tokens, loss inputs): what a `Datum` is made of."""
    return [
        inputs_of_text(row, values)
        for row, values in zip(rows, token_advantages(rows), strict=True)
    ]


def inputs_of_text(row, advantages):
    """Return the tokens but the last, and a number for each token but the first."""
    tokens = [*row["prompt_ids"], *row["response_ids"]]
    nothing = [0.0] * (len(row["prompt_ids"]) - 1)
    return tokens[:-1], {
        "target_tokens": torch.tensor(tokens[1:]),
        "logprobs": torch.tensor([*nothing, *row["logprobs"]]),
        "advantages": torch.tensor([*nothing, *advantages]),
    }


def main(path):
    """Make the inputs and, where Tinker is installed, its own objects of them."""
    inputs = inputs_of(read_episodes(path))
    print([tuple(targets["advantages"].shape) for _, targets in inputs][:3])
    try:
        from tinker import Datum, ModelInput
    except ImportError:
        return print("to go on: pip install tinker")
    data = [Datum(ModelInput.from_ints(tokens), targets) for tokens, targets in inputs]
    return print(f"{len(data)} datums; the first: {data[0].loss_fn_inputs['advantages']}")


if __name__ == "__main__":
    main(sys.argv[1])
