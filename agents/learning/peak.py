"""The memory that learning takes beside weights, found by running it: on the device "meta" without
computing anything."""

from typing import Any

import numpy as np
import torch

from tokenenv.agents.config import AgentConfig
from tokenenv.agents.episodes import Episode, EpisodeBatch
from tokenenv.agents.learning.learner import FrozenLM, outputs
from tokenenv.agents.learning.policy import LMPolicy
from tokenenv.models.memory import LiveMemory


def learning_peak(
    policy: LMPolicy,
    config: AgentConfig,
    max_length: int,
    max_new_tokens: int,
    *,
    reference: FrozenLM | None = None,
    teacher: FrozenLM | None = None,
) -> int:
    """Return the most bytes that forwards and the backward of an update take at a time: states kept
    for the backward, logits and what operations hand on; not gradients.

    Every text is taken to have the largest length. What an operation takes for itself alone is not
    seen.

    Args:
        policy: learns; its weights have gradients afterwards.
        config: the agent's: tokens of a batch, of a micro-batch, and the number of minibatches.
        max_length: tokens of the longest text.
        max_new_tokens: how many of them are the policy's, at most.
        reference, teacher: as `outputs` takes them.
    """
    texts = -(-config.batch_tokens // max_new_tokens)
    at_once = max(1, config.max_batch_tokens // max_length)
    whole = EpisodeBatch.stack([longest(max_length, max_new_tokens)] * min(texts, at_once))
    learned = np.arange(min(-(-texts // config.minibatches), len(whole)))

    def learn() -> None:
        out = outputs(
            policy,
            whole,
            learned,
            temperature=config.temperature or 1.0,
            reference=reference,
            teacher=teacher,
        )
        (out.logprob + out.entropy + out.ref_kl + out.teacher_kl + out.value).sum().backward()

    # Values and log-probs before an update are of the whole batch, and keep nothing.
    with LiveMemory() as memory, torch.no_grad():
        outputs(policy, whole, np.arange(len(whole)))
    peak = memory.peak
    learn()  # which makes the gradients
    with LiveMemory() as memory:
        learn()
    return max(peak, memory.peak)


def acting_peak(policy: LMPolicy, num_slots: int, max_length: int, prompt: int) -> tuple[int, int]:
    """Return the bytes of the caches of a policy's running texts, and the most bytes that reading
    all prompts and drawing a token of each take at a time.

    Args:
        policy: writes.
        num_slots: texts side by side.
        max_length: tokens of the longest text.
        prompt: tokens of the longest prompt.
    """
    slots = policy.slots(num_slots, max_length)
    prompts = torch.zeros(num_slots, prompt, dtype=torch.int64, device=policy.device)
    with LiveMemory() as memory, torch.no_grad(), policy.autocast():
        states = slots.prefill(np.arange(num_slots), prompts, [prompt] * num_slots)
        torch.log_softmax(policy.head(states).float(), -1).exp().cumsum(-1)
    return getattr(slots, "cache_bytes", 0), memory.peak


def longest(max_length: int, max_new_tokens: int) -> Episode:
    """Return a text of the largest length, of which as much as possible is the policy's."""
    zeros: Any = np.zeros(max_new_tokens, dtype=np.float32)
    return Episode(
        prompt=np.zeros(max_length - max_new_tokens, dtype=np.int64),
        response=np.zeros(max_new_tokens, dtype=np.int64),
        logprob=zeros,
        ref_logprob=zeros,
        reward=zeros,
        kl_coef=0.0,
        terminated=False,
        truncated=True,
        score=0.0,
        gold=0.0,
        prompt_id=0,
        slot=0,
        potential=np.zeros(max_new_tokens + 1, dtype=np.float32),
        index=0,
    )
