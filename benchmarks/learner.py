"""One update of PPO, beside the bare forward and backward of the same models.

    OMP_NUM_THREADS=1 python benchmarks/learner.py [--shape 1m 262k] [--separate-value]
    [--texts 64] [--tokens 32] [--epochs 4] [--minibatches 4] [--repetitions 5]
    [--gradient-checkpointing] [--adapters-from LAYER] [--ragged]

The models have random weights: "1m" is a Llama of 1.1 million parameters and a vocabulary of 1,024,
"262k" one with 262,144 ids (0.4 million parameters beside its embeddings, of which there are 50).

"update" is all that `PPO.update` does with texts that its present policy has drawn: advantages,
losses, gradients, clipping, optimizer steps, and the last look at how far the policy moved; with
`--separate-value` values as well, which come from collection otherwise. "bare" reads the same
micro-batches with the same models: forward, logits of response tokens, `log_softmax` and values,
backward; no loss of an algorithm, no optimizer. It reads whole texts, of which an update leaves out
the last tokens, as nothing is drawn behind them. "AdamW" are as many optimizer steps alone. With
`--ragged` texts have 1 to 32 tokens, and "uncut" is "bare" on minibatches that are cut by memory
alone, padded to the longest text. With `--adapters-from` the layers from that one on have LoRA
adapters of rank 8, and nothing else is trained; what lies below is read in the update's first epoch
alone, and by "bare" in each. Seconds are of the process on the CPU (of the wall on a GPU),
medians of turns. "peak" is what the memory rises by, each measured in a process of its own; that of
"update" has AdamW's moments.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from timing import medians
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents import PPO
from tokenenv.agents.episodes import Episode, EpisodeBatch
from tokenenv.agents.learning.learner import micro_batches_for, state_values
from tokenenv.agents.learning.optimise import minibatches
from tokenenv.models.adapters import unwrapped
from tokenenv.models.batching import micro_batches

PROMPT, STOP = 8, 1
SHAPES: dict[str, dict[str, int]] = {
    "1m": {
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    },
    "262k": {
        "vocab_size": 262_144,
        "hidden_size": 192,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    },
}
CUDA = torch.cuda.is_available()


def make_agent(args: argparse.Namespace, shape: str) -> PPO:
    """Make an agent whose policy has this shape; its env is never stepped."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=shape == "262k")
    model = LlamaForCausalLM(config).eval().to("cuda" if CUDA else "cpu")
    if args.adapters_from is not None:
        model = adapted(model, range(args.adapters_from, config.num_hidden_layers))
    envs = gym.make_vec(
        "tokenenv/TextGen-v0",
        num_envs=1,
        model=model,
        prompts=[[2] * PROMPT],
        stop_token_ids=[STOP],
        reward={},
        max_new_tokens=args.tokens,
    )
    fixed = {"lr": 1e-6, "precision": "float32", "separate_value": args.separate_value}
    if args.gradient_checkpointing:
        fixed["gradient_checkpointing"] = True
    return PPO(envs, epochs=args.epochs, minibatches=args.minibatches, **fixed)


def adapted(model: Any, layers: Iterable[int]) -> Any:
    """Put adapters of rank 8 into some layers, and freeze what is not one."""
    from peft import LoraConfig, get_peft_model

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(
        model, LoraConfig(r=8, target_modules=names, layers_to_transform=list(layers))
    )


def make_batch(args: argparse.Namespace, shape: str) -> EpisodeBatch:
    """Make finished texts of random tokens, with random rewards; all are as long as they can be, as
    in the comparison with TRL's trainer, or of any length."""
    rng, vocab_size = np.random.default_rng(0), SHAPES[shape]["vocab_size"]

    def episode(index: int) -> Episode:
        size = int(rng.integers(1, args.tokens + 1)) if args.ragged else args.tokens
        noise = rng.normal(size=(3, size)).astype(np.float32)
        return Episode(
            prompt=np.full(PROMPT, 2),
            response=rng.integers(2, vocab_size, size),
            logprob=noise[0] * 0.01 - np.float32(np.log(vocab_size)),
            ref_logprob=noise[1] * 0.01 - np.float32(np.log(vocab_size)),
            reward=noise[2],
            kl_coef=0.1,
            terminated=True,
            truncated=False,
            score=0.0,
            gold=0.0,
            prompt_id=0,
            slot=index,
            potential=np.zeros(size + 1, np.float32),
            index=0,
        )

    return EpisodeBatch.stack([episode(index) for index in range(args.texts)])


def as_drawn(agent: PPO, batch: EpisodeBatch) -> EpisodeBatch:
    """Return the batch with what acting adds: the critic's values, where it reads the policy's
    states."""
    if not agent.actor.reads_values:
        return batch
    values_BT1 = state_values(agent.policy, batch, agent.config.max_batch_tokens)
    return replace(batch, drawn_value_BT=values_BT1[:, :-1])


def bare(agent: PPO, batch: EpisodeBatch, cut: bool = True) -> None:
    """Run the forward and the backward of every micro-batch that an update learns from; unless they
    are to be `cut`, of minibatches that are cut by memory alone."""
    policy, config = agent.policy, agent.config
    lengths, limit = batch.length_B.numpy(), config.max_batch_tokens
    for rows in minibatches(len(batch), config, np.random.default_rng(0)):
        sizes = lengths[rows]
        groups = micro_batches_for(policy, sizes, limit) if cut else micro_batches(sizes, limit)
        for micro in groups:
            sum_of_numbers(policy, batch, rows[micro]).backward()
        policy.zero_grad()


def sum_of_numbers(policy: Any, batch: EpisodeBatch, rows: np.ndarray) -> Tensor:
    """Return the sum of log-probs and values of the response tokens of some texts, plainly."""
    model, width = unwrapped(policy.model), int(batch.length_B[rows].max())
    tokens_BL = batch.tokens_BL[rows, :width].to(policy.device)
    mask_BT = batch.mask_BT[rows, : width - PROMPT].to(policy.device)
    before_KH = model.model(input_ids=tokens_BL, use_cache=False)[0][:, PROMPT - 1 : -1][mask_BT]
    logprobs_KV = torch.log_softmax(model.lm_head(before_KH), -1)
    total = logprobs_KV.gather(-1, tokens_BL[:, PROMPT:][mask_BT][:, None]).sum()
    if policy.value_trunk is not None:
        states_BLH = policy.value_trunk(input_ids=tokens_BL, use_cache=False)[0]
        before_KH = states_BLH[:, PROMPT - 1 : -1][mask_BT]
    return total + policy.value_head(before_KH).sum()


def steps(agent: PPO) -> None:
    """Take as many optimizer steps as an update does, of gradients that are there already."""
    for _ in range(agent.config.epochs * agent.config.minibatches):
        agent.optimizer.step()


def candidates(args: argparse.Namespace, shape: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield what is measured, by name."""
    agent = make_agent(args, shape)
    batch = as_drawn(agent, make_batch(args, shape))
    other = make_agent(args, shape)
    for weight in other.policy.parameters():
        weight.grad = torch.full_like(weight, 1e-6)
    yield "update", lambda: agent.update(batch)
    yield "bare", lambda: bare(agent, batch)
    if args.ragged:
        yield "uncut", lambda: bare(agent, batch, cut=False)
    yield "AdamW", lambda: steps(other)


def clock() -> float:
    """Return seconds: of the process on the CPU, and of the wall after what a GPU has to do."""
    if not CUDA:
        return process_time()
    torch.cuda.synchronize()
    return perf_counter()


def memory() -> float:
    """Return the largest memory so far, in MiB."""
    if CUDA:
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**10


def rise(args: argparse.Namespace, shape: str, name: str) -> float:
    """Return by how many MiB the memory rises when a candidate first runs."""
    torch.set_num_threads(1)
    agent = make_agent(args, shape)
    batch = as_drawn(agent, make_batch(args, shape))
    if not CUDA:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is what is in memory now
    before = memory()
    bare(agent, batch) if name == "bare" else agent.update(batch)
    return memory() - before


def main() -> None:
    """Print each, and its share of the bare forward and backward."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--minibatches", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--separate-value", action="store_true")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--adapters-from", type=int, metavar="LAYER")
    parser.add_argument("--ragged", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for shape in args.shape:
        seconds = medians(dict(candidates(args, shape)), args.repetitions, clock)
        peaks = dict.fromkeys(seconds, float("nan"))
        for name in ("update", "bare"):
            with get_context("spawn").Pool(1) as pool:
                peaks[name] = pool.apply(rise, (args, shape, name))
        tokens = int(make_batch(args, shape).response_length_B.sum())
        print(f"{shape}: {args.texts} texts with {tokens} tokens of responses, {args.epochs} x "
              f"{args.minibatches} minibatches")  # fmt: skip
        print(f"  {'':8} {'seconds':>9} {'x bare':>7} {'tokens/s':>9} {'peak, MiB':>10}")
        for name, each in seconds.items():
            speed, share = tokens / each, each / seconds["bare"]
            print(f"  {name:8} {each:>9.3f} {share:>7.2f} {speed:>9.0f} {peaks[name]:>10.0f}",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
