"""The cost of act + step on a GPU, with a policy, a reference and a reward model of 0.5 billion
parameters each.

The models have the shape of a Qwen-style 0.5B configuration and random weights in bfloat16, so
nothing is downloaded. Beside the step stand its parts, the bare cached forwards of the same three
trunks, and the memory-bandwidth floor: the bytes of weights and of cached keys and values that a
step has to read, over the bandwidth that a large copy reaches here.
"""

import argparse
import time
from collections.abc import Callable

import gymnasium as gym
import numpy as np
import torch
from rich.console import Console
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForTokenClassification

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents.config import AgentConfig
from tokenenv.agents.rollout.actor import Actor
from tokenenv.agents.rollout.make import default_policy
from tokenenv.models import slot_cache
from tokenenv.models.cached_lm import CachedLM
from tokenenv.models.trunks import trunk_of

PROMPT = 16
STOP = 1
"""A stop id of which the policy is kept, so that no step also begins a text."""
SHAPES = {
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
             "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49_152},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512},
}  # fmt: skip
console = Console(width=140)


def make_envs(args: argparse.Namespace) -> gym.vector.VectorEnv:
    """Make N texts of random models, on the device, with observations and rewards as tensors."""
    torch.manual_seed(0)
    shape = SHAPES[args.size] | {"max_position_embeddings": 4096, "tie_word_embeddings": True}
    causal = Qwen2Config(**shape, dtype=torch.bfloat16)
    scoring = Qwen2Config(**shape, num_labels=1, pad_token_id=0, dtype=torch.bfloat16)
    with torch.device(args.device):
        policy, reward = Qwen2ForCausalLM(causal), Qwen2ForTokenClassification(scoring)
    prompts = np.random.default_rng(0).integers(10, 500, (64, PROMPT)).tolist()
    return gym.make_vec(
        "tokenenv/TextGen-v0", num_envs=args.num_envs, model=policy.bfloat16(),
        reward_model=reward.bfloat16(), prompts=prompts, max_new_tokens=args.tokens + 8,
        stop_token_ids=[STOP], array="torch", compile=args.compile, autoreset_mode="SameStep",
    )  # fmt: skip


def timed(run: Callable[[], object], steps: int, device: str) -> float:
    """Return the seconds of one call: `steps` calls between two synchronisations of the device."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    for _ in range(steps):
        run()
    wait()
    return (time.perf_counter() - started) / steps


def bandwidth(device: str) -> float:
    """Return the bytes per second, read and written, of a large copy."""
    source = torch.empty(2**28 if device == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    timed(lambda: target.copy_(source), 3, device)
    return 2 * source.nbytes / timed(lambda: target.copy_(source), 10, device)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SHAPES, default="0.5b")
    parser.add_argument("--num-envs", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=256, help="steps after the prompt")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile the cached forwards")
    parser.add_argument("--eager", action="store_true", help="launch kernels one by one")
    args = parser.parse_args()
    if args.eager:
        slot_cache.StepGraphs = lambda trunk, forward: None
    how = "compiled" if args.compile else "kernel by kernel" if args.eager else "CUDA graphs"
    envs = make_envs(args)
    env = envs.unwrapped
    policy = default_policy(envs, AgentConfig(precision="float32"))
    policy.model.bfloat16()
    head = policy.head
    stops = torch.tensor([STOP], device=args.device)
    policy.head = lambda states: head(states).index_fill(-1, stops, -torch.inf)
    trunks = [trunk_of(policy.model), trunk_of(env.reference), env._task.scorer.model]
    actor = Actor(policy, seed=0)
    obs = envs.reset(seed=0)[0]
    length = obs["tokens"].shape[1]
    bare = [CachedLM(trunk, args.num_envs, length, compile=args.compile) for trunk in trunks]
    lengths, fixed = obs["length"].cpu().numpy(), torch.full((args.num_envs,), 10)
    fixed = fixed.to(args.device)
    spent = {"act": 0.0, "step": 0.0}
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None

    def begin() -> None:
        nonlocal obs
        obs = envs.reset(seed=0)[0]
        for cached in bare:
            cached.prefill(range(args.num_envs), obs["tokens"], lengths)

    def whole() -> None:
        nonlocal obs
        obs = envs.step(actor.act(obs)[0])[0]

    def by_part() -> None:
        nonlocal obs
        started = time.perf_counter()
        tokens = actor.act(obs)[0]
        wait()
        middle = time.perf_counter()
        obs = envs.step(tokens)[0]
        wait()
        spent["act"] += middle - started
        spent["step"] += time.perf_counter() - middle

    def forwards() -> None:
        for cached in bare:
            cached.append(fixed)

    def over_a_text(run: Callable[[], object]) -> float:
        begin()
        run()
        return timed(run, args.tokens - 1, args.device)

    first = over_a_text(whole)  # records or compiles a graph for each length
    over_a_text(forwards)
    whole_s, bare_s = over_a_text(whole), over_a_text(forwards)
    over_a_text(by_part)
    policys, references, rewards = (sum(p.nbytes for p in trunk.parameters()) for trunk in trunks)
    # The tied embeddings of policy and reference are read by their heads; the reward model's not.
    weights = policys + references + rewards - trunks[2].get_input_embeddings().weight.nbytes
    cache = sum(cached.cache_bytes for cached in bare) * (PROMPT + args.tokens / 2) / length
    speed = bandwidth(args.device)
    floor = (weights + cache) / speed
    act_ms, step_ms = (1e3 * value / args.tokens for value in spent.values())
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    console.print(f"{name}, torch {torch.__version__}: a large copy moves {speed / 1e12:.2f} TB/s")
    console.print(
        f"{args.size}, N={args.num_envs}, {args.tokens} tokens, {how}: "
        f"act + step {1e3 * whole_s:.2f} ms ({args.num_envs / whole_s:,.0f} steps/s), waiting "
        f"after each: act {act_ms:.2f} and step {step_ms:.2f} ms; three "
        f"bare forwards {1e3 * bare_s:.2f} ms (ratio {whole_s / bare_s:.2f}); floor "
        f"{1e3 * floor:.2f} ms ({floor / whole_s:.1%} of the step); a step of the first text "
        f"{1e3 * first:.2f} ms"
    )
    if args.device == "cuda":
        console.print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
