"""The models and texts that `profile_step.py` measures: bundled ones, a folder's, or random weights
of a given shape; and the least work that a step and an update of them are."""

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents import PPO
from tokenenv.agents.episodes import Episode, EpisodeBatch
from tokenenv.models.adapters import adapter_layers
from tokenenv.models.trunks import trunk_of

PROMPT, STOP = 16, 1
"""Tokens of a prompt of models that are not bundled, and the id that ends their texts."""
SHAPES = {
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
             "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49_152},
    "3m": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6,
           "num_attention_heads": 6, "num_key_value_heads": 6, "vocab_size": 1024},
    "1m": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 5,
           "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 1024},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512},
}  # fmt: skip


@dataclass
class Subject:
    """An env of N texts of T tokens, and the agent that steps it."""

    envs: Any
    agent: PPO
    tokens: int
    """T."""

    @property
    def env(self) -> Any:
        """The env itself."""
        return self.envs.unwrapped

    @property
    def trunks(self) -> list[Any]:
        """The trunks that a step runs, the policy's first, then the reference's and the reward
        model's."""
        own = trunk_of(self.agent.policy.model)
        return [own, *self.env._engine.trunks._slots]

    @property
    def scorer_trunk(self) -> Any:
        """The reward model's trunk."""
        return trunk_of(self.env._task.scorer.model)


def random_models(shape: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Make a causal language model and a reward model of a Qwen-style shape, with random
    weights."""
    torch.manual_seed(0)
    sizes = SHAPES[shape] | {"max_position_embeddings": 4096, "tie_word_embeddings": True}
    config = AutoConfig.for_model("qwen2", **sizes, num_labels=1, pad_token_id=0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        return {
            "model": model,
            "reward_model": AutoModelForSequenceClassification.from_config(config, dtype=dtype),
        }


def folder_models(folder: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Load a language model from a folder or the hub, and the same again as a reward model, whose
    scalar head is random."""
    load = AutoModelForSequenceClassification.from_pretrained
    reward = load(folder, num_labels=1, pad_token_id=0, dtype=dtype).to(device)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    return {"model": model, "reward_model": reward}


def subject(args: Namespace, num_envs: int, tokens: int) -> Subject:
    """Make the env and the agent that the command line asks for."""
    options: dict[str, Any] = {}
    env_id = args.model
    if not env_id.startswith("tokenenv/"):
        make = random_models if args.model in SHAPES else folder_models
        prompts = np.random.default_rng(0).integers(10, 500, (64, PROMPT)).tolist()
        options = make(args.model, getattr(torch, args.dtype), args.device)
        options |= {"prompts": prompts, "stop_token_ids": [STOP], "reward": "delta"}
        env_id = "tokenenv/TextGen-v0"
    envs = gym.make_vec(
        env_id,
        num_envs=num_envs,
        # Where all texts begin together, there is room for the steps that come before the measured
        # ones, and for the measured ones twice.
        max_new_tokens=max(tokens, 3 * min(tokens, args.steps) + 8) if args.even else tokens,
        array="torch" if args.device == "cuda" else "numpy",
        compile=args.compile,
        frozen_dtype=args.frozen_dtype,
        autoreset_mode="SameStep",
        **options,
    )
    # The learning rate is so small that no update moves the policy.
    fixed = {"epochs": 1, "minibatches": 4, "lr": 1e-9, "precision": "float32"}
    # Each model in a forward of its own, so that each has a part.
    agent = PPO(envs, lora_rank=args.lora_rank, backbone="separate", **fixed)
    if args.dtype == "bfloat16" and not args.lora_rank:
        agent.policy.model.bfloat16()
    _never_stop(agent.policy, list(envs.unwrapped.token_spec.stop_token_ids))
    return Subject(envs, agent, tokens)


def _never_stop(policy: Any, stops: list[int]) -> None:
    """Keep a policy from ending texts: where they end is then the same in every run."""
    head, ids = policy.head, torch.tensor(stops, device=policy.device)
    policy.head = lambda states: head(states).index_fill_(-1, ids, -torch.inf)


def begin(chosen: Subject, even: bool) -> Any:
    """Begin a text in each slot and return the observation. Unless they are to be `even`, each is a
    little further on than the one before, so that as many end at each step as in a long run."""
    if even:
        return chosen.envs.reset(seed=0)[0]
    number, tokens = chosen.envs.num_envs, chosen.tokens
    done = [slot * tokens // number for slot in range(number)]
    prefixes = {"prefixes": [[10 + slot % 100] * count for slot, count in enumerate(done)]}
    return chosen.envs.reset(seed=0, options=prefixes)[0]


def episodes(chosen: Subject) -> EpisodeBatch:
    """Make N finished texts of T random tokens, as an update is given them."""
    env, rng, zeros = chosen.env, np.random.default_rng(0), np.zeros(chosen.tokens, np.float32)
    obs, _ = chosen.envs.reset(seed=0)
    texts, lengths = (np.asarray(torch.as_tensor(obs[k]).cpu()) for k in ("tokens", "length"))
    known = {"kl_coef": 0.05, "terminated": False, "truncated": True, "score": 0.0, "index": 0}
    return EpisodeBatch.stack(
        [
            Episode(
                prompt=text[:length],
                response=rng.integers(10, env.token_spec.vocab_size, chosen.tokens),
                # The log-probability of a token drawn evenly: ratios to it are finite.
                logprob=zeros - np.log(env.token_spec.vocab_size).astype(np.float32),
                ref_logprob=zeros,
                reward=rng.normal(size=chosen.tokens).astype(np.float32),
                potential=np.zeros(chosen.tokens + 1, np.float32),
                gold=float("nan"),
                prompt_id=0,
                slot=slot,
                **known,
            )
            for slot, (text, length) in enumerate(zip(texts, lengths, strict=True))
        ]
    )


# ------------------------------------------------------------------ the least work


def body_size(trunk: Any) -> int:
    """Return how many weights of a trunk take part in every token: all but its embeddings."""
    embeddings = trunk.get_input_embeddings().weight
    return sum(p.numel() for p in trunk.parameters()) - embeddings.numel()


def head_weights(chosen: Subject) -> list[torch.Tensor]:
    """Return the vocabulary's weights that a step multiplies with: the policy's and the
    reference's."""
    models = chosen.agent.policy.model, chosen.env.reference
    return [model.get_output_embeddings().weight for model in models]


def step_bytes(chosen: Subject, lengths: np.ndarray) -> float:
    """Return the bytes that a step has to read: weights that are shared once, and the keys and
    values that texts of `lengths` (N,) have."""
    weights = {w.data_ptr(): w.nbytes for w in head_weights(chosen)}
    cached = 0.0
    for trunk in chosen.trunks:
        table = trunk.get_input_embeddings().weight
        weights |= {p.data_ptr(): p.nbytes for p in trunk.parameters() if p is not table}
        cached += cache_bytes_per_token(trunk) * lengths.sum()
    return sum(weights.values()) + cached


def cache_bytes_per_token(trunk: Any) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    config = trunk.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    number = config.num_hidden_layers * config.num_key_value_heads * size
    return 2 * number * torch.empty((), dtype=trunk.dtype).element_size()


def attention_flops(trunk: Any, keys: float) -> float:
    """Return the operations of attending to `keys` keys in all layers."""
    config = trunk.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 4.0 * config.num_hidden_layers * config.num_attention_heads * size * keys


def step_flops(chosen: Subject, lengths: np.ndarray) -> float:
    """Return the floating-point operations of a step's forwards and of the heads over the
    vocabulary, with texts of `lengths` (N,)."""
    heads = sum(2.0 * w.numel() * len(lengths) for w in head_weights(chosen))
    return heads + sum(
        2.0 * body_size(trunk) * len(lengths) + attention_flops(trunk, lengths.sum())
        for trunk in chosen.trunks
    )


def update_flops(chosen: Subject, batch: EpisodeBatch) -> float:
    """Return the operations of one epoch: a forward and a backward of the policy over whole texts,
    and of its head where responses are; and the forward that gives the critic's values.

    A backward is two forwards, one for the gradient of the states and one for that of the weights;
    under adapters the frozen weights need none of the second.
    """
    policy, lengths = chosen.agent.policy, batch.length_B.double().numpy()
    trunk = trunk_of(policy.model)
    forward = 2.0 * body_size(trunk) * lengths.sum()
    # Token t attends to t keys.
    attention = attention_flops(trunk, float((lengths * (lengths + 1) / 2).sum()))
    head = 2.0 * head_weights(chosen)[0].numel() * int(batch.mask_BT.sum())
    backward = 1 if adapter_layers(policy.model) else 2
    return (forward + head) * (1 + backward) + attention * 3 + forward + attention
