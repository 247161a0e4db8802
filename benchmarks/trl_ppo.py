"""One iteration of PPO, beside one of TRL's PPOTrainer, in turns on one core.

    pip install --no-deps --target build/trl trl==1.12.0
    OMP_NUM_THREADS=1 PYTHONPATH=build/trl python benchmarks/trl_ppo.py

1.12.0 is the last release of TRL with a PPOTrainer. It needs `accelerate` and `datasets`, which
`make setup` installs. Both sides have a Llama of 1.1 million parameters and 1,024 tokens as policy,
reference, value model and reward model, with the same random weights. An iteration is 64 texts of
32 tokens behind prompts of 8, none of which ends early, and 4 epochs of 4 minibatches. TRL's value
model is a model of its own; so is ours with "own critic", and by default it reads the policy's
states ("shared trunk"). The reward model's score is paid at the end (`terminal`), as TRL does.

Seconds are of the process on the CPU, medians over the iterations after the first, and GFLOP are
the billions of floating-point operations of the first one's matrix products. TRL takes one
optimizer step for all minibatches of an epoch here (`gradient_accumulation_steps` counts them), and
we take four.
"""

import argparse
import statistics
import tempfile
from collections import defaultdict
from time import process_time
from typing import Any

import gymnasium as gym
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents import PPO

TEXTS, PROMPT, TOKENS, EPOCHS, MINIBATCHES = 64, 8, 32, 4, 4
STOP, PAD = 1022, 1023
"""Ids that no text has: their logits are far below the others'."""
SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
}
console = Console(width=110)


def language_model() -> Any:
    """Make the language model, always the same; it never emits `STOP` or `PAD`."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(SHAPE["vocab_size"]), requires_grad=False)
    model.lm_head.bias[[STOP, PAD]] = -1e4
    return model


def classifier() -> Any:
    """Make a model with one score; with the language model's trunk."""
    config = LlamaConfig(**SHAPE, num_labels=1)
    model = LlamaForSequenceClassification(config).eval()
    model.model.load_state_dict(language_model().model.state_dict())
    torch.manual_seed(1)
    torch.nn.init.normal_(model.score.weight, std=0.1)
    return model


def prompts() -> list[list[int]]:
    """Make the prompts."""
    rng = torch.Generator().manual_seed(0)
    return torch.randint(STOP, (TEXTS, PROMPT), generator=rng).tolist()


def our_agent(own_critic: bool, rollout: str) -> PPO:
    """Make an agent, whose batches are what TRL's are."""
    envs = gym.make_vec(
        "tokenenv/TextGen-v0",
        num_envs=TEXTS,
        model=language_model(),
        reward_model=classifier(),
        prompts=prompts(),
        stop_token_ids=[STOP],
        max_new_tokens=TOKENS,
        reward="terminal",
        autoreset_mode="SameStep",
    )
    settings: dict[str, Any] = {"epochs": EPOCHS, "minibatches": MINIBATCHES, "rollout": rollout}
    settings |= {"batch_tokens": TEXTS * TOKENS, "lr": 1e-6, "lr_schedule": "constant"}
    return PPO(envs, separate_value=own_critic, **settings)


class Turns(TrainerCallback):
    """Runs our agents after each of TRL's iterations, and keeps the seconds of all."""

    def __init__(self, agents: dict[str, PPO]) -> None:
        self.agents = agents
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.operations: dict[str, int] = {}
        """Floating-point operations of the first iteration's matrix products, by name."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Begin TRL's first iteration."""
        self.begin("TRL")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Take the turns of the others."""
        self.end("TRL")
        for name, agent in self.agents.items():
            self.begin(name)
            agent.learn(agent.tokens_seen + TEXTS * TOKENS)
            self.end(name)
        self.begin("TRL")

    def begin(self, name: str) -> None:
        """Start the clock, and in a first iteration the counter."""
        self.counter = None if self.seconds[name] else FlopCounterMode(display=False)
        if self.counter is not None:
            self.counter.__enter__()
        self.since = process_time()

    def end(self, name: str) -> None:
        """Note the seconds, and what was counted."""
        self.seconds[name].append(process_time() - self.since)
        if self.counter is not None:
            self.counter.__exit__(None, None, None)
            self.operations[name] = self.counter.get_total_flops()


def trl_trainer(turns: Turns, iterations: int, folder: str) -> Any:
    """Make TRL's trainer."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    words = {str(token): token for token in range(SHAPE["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")),
        pad_token=str(PAD),
        eos_token=str(STOP),
    )
    config = PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=TEXTS // MINIBATCHES,
        gradient_accumulation_steps=MINIBATCHES,
        num_mini_batches=MINIBATCHES,
        num_ppo_epochs=EPOCHS,
        total_episodes=TEXTS * iterations,
        response_length=TOKENS,
        temperature=1.0,
        learning_rate=1e-6,
        num_sample_generations=0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    rows = Dataset.from_dict({"input_ids": prompts()})
    return PPOTrainer(
        config,
        processing_class=tokenizer,
        model=language_model().requires_grad_(True),
        ref_model=language_model(),
        reward_model=classifier(),
        value_model=classifier().requires_grad_(True),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[turns],
    )


def main() -> None:
    """Run the iterations, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=8)
    args = parser.parse_args()
    agents = {
        f"{critic}, rollout={rollout!r}": our_agent(critic == "own critic", rollout)
        for critic in ("own critic", "shared trunk")
        for rollout in ("step", "episode")
    }
    turns = Turns(agents)
    with tempfile.TemporaryDirectory() as folder:
        trl_trainer(turns, args.iterations, folder).train()
    table = Table("", "seconds an iteration", "tokens/s", "times TRL's tokens/s", "GFLOP")
    seconds = {name: statistics.median(found[1:]) for name, found in turns.seconds.items()}
    for name, one in seconds.items():
        row = f"{one:.2f}", f"{TEXTS * TOKENS / one:,.0f}", f"{seconds['TRL'] / one:.2f}"
        table.add_row(name, *row, f"{turns.operations[name] / 1e9:.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
