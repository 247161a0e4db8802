"""What rewards and the reference add to writing texts, beside `generate` of transformers.

    OMP_NUM_THREADS=1 python benchmarks/episode_rollout.py [--model FOLDER_OR_HUB_ID]
    [--texts 64] [--tokens 32 128] [--repetitions 7] [--frozen-dtype bfloat16]

Every candidate samples as many tokens after the same number of prompts, the prompts' forward
included, in one process and in turns. Seconds are those of the process on the CPU.

- generate: transformers alone, with the policy. No reward, no reference, no log-probs.
- episode, step: `collect` of an agent with this `rollout`, which returns episodes with the rewards
  of a token reward model, log pi_ref and log-probs.
- bare: the cached forwards of policy, reference and reward model, without their heads.

Without `--model` it is a Llama of 1.1 million parameters with a vocabulary of 1,024, random
weights, and prompts of 8 tokens. The reward model is as large as the policy.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from timing import medians
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForTokenClassification,
)

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents import PPO
from tokenenv.models.cached_lm import CachedLM
from tokenenv.models.trunks import trunk_of

PROMPT, STOP = 8, 1
SMALL: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}


def make_models(model: str | None) -> tuple[Any, Any]:
    """Return a language model and a token reward model."""
    torch.manual_seed(0)
    if model is None:
        config = LlamaConfig(**SMALL, num_labels=1)
        return LlamaForCausalLM(config).eval(), LlamaForTokenClassification(config).eval()
    reward_model = AutoModelForTokenClassification.from_pretrained(model, num_labels=1)
    return AutoModelForCausalLM.from_pretrained(model), reward_model


def make_agent(
    rollout: str, models: tuple[Any, Any], texts: int, tokens: int, frozen_dtype: str | None
) -> PPO:
    """Return an agent whose texts all have T tokens: the one id that ends a text is never drawn."""
    model, reward_model = models
    ids = np.random.default_rng(0).integers(10, 1000, (256, PROMPT))
    envs = gym.make_vec(
        "tokenenv/TextGen-v0",
        num_envs=texts,
        model=model,
        reward_model=reward_model,
        prompts=ids.tolist(),
        reward="token",
        max_prompt_tokens=PROMPT,
        max_new_tokens=tokens,
        stop_token_ids=[STOP],
        frozen_dtype=frozen_dtype,
        autoreset_mode="SameStep",
    )
    agent = PPO(envs, rollout=rollout)
    head, stop = agent.policy.head, torch.tensor([STOP])
    agent.policy.head = lambda states: head(states).index_fill(-1, stop, -torch.inf)
    return agent


def collecting(agent: PPO, texts: int, tokens: int) -> Callable[[], None]:
    """Return a function that collects N texts of T tokens."""

    def run() -> None:
        episodes = agent.collector.collect(texts * tokens)
        assert sum(len(episode.response) for episode in episodes) == texts * tokens

    return run


def generating(model: Any, texts: int, tokens: int) -> Callable[[], None]:
    """Return a function that has `generate` sample as many tokens."""
    ids = torch.randint(10, 1000, (texts, PROMPT))
    lengths = {"min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0}
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}

    def run() -> None:
        model.generate(ids, attention_mask=torch.ones_like(ids), **options, **lengths)

    return run


def decoding(models: list[Any], texts: int, tokens: int) -> Callable[[], None]:
    """Return a function that runs the bare forwards of N texts of T tokens."""
    caches = [CachedLM(trunk_of(model), texts, PROMPT + tokens) for model in models]
    ids = torch.randint(10, 1000, (texts, PROMPT + tokens))

    def run() -> None:
        for cache in caches:
            cache.prefill(range(texts), ids[:, :PROMPT], [PROMPT] * texts)
            for column in ids.T[PROMPT:-1]:
                cache.append(column)

    return run


def compare(
    models: tuple[Any, Any], texts: int, tokens: int, repetitions: int, frozen_dtype: str | None
) -> None:
    """Print a line for each candidate, and both ratios."""
    ways = ("episode", "step")
    agents = {name: make_agent(name, models, texts, tokens, frozen_dtype) for name in ways}
    policy, env = agents["step"].policy.model, agents["step"].envs.unwrapped
    read = [env.frozen_models[name] for name in ("reference", "reward model")]
    candidates = {
        "generate": generating(models[0], texts, tokens),
        **{name: collecting(agent, texts, tokens) for name, agent in agents.items()},
        "bare": decoding([policy, *read], texts, tokens),
    }
    found = medians(candidates, repetitions, time.process_time)
    for name, seconds in found.items():
        print(f"  {name:9} {seconds:8.3f} s {texts * tokens / seconds:10,.0f} tokens/CPU-s")
    print(
        f"T={tokens}: generate / episode {found['generate'] / found['episode']:.2f} "
        f"(at least 0.85), generate / step {found['generate'] / found['step']:.2f}, "
        f"step / bare {found['step'] / found['bare']:.2f} (at most 1.10)",
        flush=True,
    )


def main() -> None:
    """Compare at each number of tokens."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a folder or a hub id; by default a small one is made")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--frozen-dtype", help="of reference and reward model")
    args = parser.parse_args()
    models = make_models(args.model)
    print(f"N={args.texts}, {models[0].num_parameters() / 1e6:.1f} million parameters")
    for tokens in args.tokens:
        compare(models, args.texts, tokens, args.repetitions, args.frozen_dtype)


if __name__ == "__main__":
    main()
