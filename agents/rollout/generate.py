"""Texts from a policy outside any env: sampling with temperature, top-k and top-p, or greedy.

Nobody answers here. With the options of an env that writes into texts, a response is one turn."""

from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenenv.agents.rollout.actor import Policy, device_of, sample
from tokenenv.errors import InvalidArgument
from tokenenv.models.chats import Chats, is_chat
from tokenenv.models.encoding import encode_prompt
from tokenenv.models.loading import max_positions
from tokenenv.models.same_texts import first_equals, prefill_once
from tokenenv.types import TokenSpec

Prompts = str | Sequence[Any]
"""Texts, token ids or lists of messages, or a single text."""


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    stop_token_ids: Sequence[int] = (),
    tokenizer: Any = None,
    chats: Chats | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
    seed: int = 0,
    num_rows: int = 64,
) -> list[list[int]]:
    """Return the response tokens of each prompt, the stop token included.

    At most `num_rows` texts run at a time.

    Args:
        prompts: token ids, or texts if there is a `tokenizer`; none of them empty. A single text
            counts as a list of one.
        chats: the env's, under a chat template: texts are then messages of the user's, and lists of
            messages are taken too.
        temperature: 0 or more, applied before `top_k` (0 keeps all tokens) and `top_p` (above 0, at
            most 1); 0 is `greedy`.
        greedy: takes the likeliest token and ignores the three.
    """
    check_options(max_new_tokens, temperature, top_k, top_p)
    greedy = greedy or temperature == 0
    ids = [tokenize(prompt, tokenizer, chats) for prompt in as_list(prompts)]
    check_room(policy, ids, max_new_tokens)
    generator = torch.Generator(device_of(policy)).manual_seed(seed)
    # Prompts of similar length share a cache, so that it is no longer than its texts.
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    responses: list[list[int]] = [[] for _ in ids]

    def choose(states_NH: Tensor) -> Tensor:
        logits_NV = policy.head(states_NH).float()
        if greedy:
            return logits_NV.argmax(-1)
        return sample(keep_likely(logits_NV / temperature, top_k, top_p), 1.0, generator)[0]

    for start in range(0, len(order), num_rows):
        group = order[start : start + num_rows]
        tokens = _run(policy, [ids[i] for i in group], max_new_tokens, choose, stop_token_ids)
        for i, row in zip(group, tokens, strict=True):
            responses[i] = row
    return responses


def _run(
    policy: Policy, prompts: list[list[int]], max_new_tokens: int, choose: Any, stops: Sequence[int]
) -> list[list[int]]:
    """Continue one batch of texts side by side until all have stopped."""
    lengths = [len(prompt) for prompt in prompts]
    slots = policy.slots(len(prompts), max(lengths) + max_new_tokens)
    padded = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(prompt) for prompt in prompts], batch_first=True
    )
    responses: list[list[int]] = [[] for _ in prompts]
    running = np.ones(len(prompts), bool)
    with policy.autocast():
        first = first_equals(padded, lengths)
        states_NH = prefill_once(
            slots, range(len(prompts)), padded.to(device_of(policy)), lengths, first
        )
        for step in range(max_new_tokens):
            tokens_N = choose(states_NH)
            chosen = tokens_N.tolist()
            for i in np.flatnonzero(running):
                responses[i].append(chosen[i])
                running[i] = chosen[i] not in stops
            # The last token needs no state after it.
            if not running.any() or step == max_new_tokens - 1:
                break
            states_NH = slots.append(tokens_N, running)
    return responses


def keep_likely(logits_NV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Rule out (-inf) all but the `top_k` likeliest tokens, then all but the fewest that hold
    probability `top_p`."""
    if 0 < top_k < logits_NV.shape[-1]:
        logits_NV = logits_NV.masked_fill(
            logits_NV < logits_NV.topk(top_k).values[:, -1:], -torch.inf
        )
    if top_p < 1.0:
        sorted_NV, order_NV = logits_NV.softmax(-1).sort(-1, descending=True)
        # A token goes if those before it hold enough already, so the likeliest always stays.
        surplus_NV = sorted_NV.cumsum(-1) - sorted_NV >= top_p
        logits_NV = logits_NV.masked_fill(surplus_NV.scatter(-1, order_NV, surplus_NV), -torch.inf)
    return logits_NV


def options_of(spec: TokenSpec | None) -> dict[str, Any]:
    """Return the options of `generate` that an env's `token_spec` gives. Where the environment
    writes into texts, a response also stops where it would be asked to."""
    if spec is None:
        return {}
    names = ("max_new_tokens", "stop_token_ids", "tokenizer", "chats")
    options = {name: getattr(spec, name) for name in names}
    if spec.responds:
        options["stop_token_ids"] += spec.turn_end_token_ids or ()
    return options


def as_list(prompts: Prompts) -> Sequence[Any]:
    """Return a list of prompts where a single one, a text or the messages of a chat, may have been
    given."""
    return [prompts] if isinstance(prompts, str) or is_chat(prompts) else prompts


def tokenize(prompt: Any, tokenizer: Any, chats: Chats | None = None) -> list[int]:
    """Return the token ids of a prompt.

    Raises `InvalidArgument` for an empty one, a text without a tokenizer, or messages without
    `chats`.
    """
    if chats is not None and (isinstance(prompt, str) or is_chat(prompt)):
        prompt = chats.encode(prompt, "a prompt")
    elif is_chat(prompt):
        raise InvalidArgument(
            "a prompt is a list of messages; these need an env with chat_template=True."
        )
    elif isinstance(prompt, str):
        if tokenizer is None:
            raise InvalidArgument(
                f"prompt={prompt!r} is a text and there is no tokenizer; give token ids."
            )
        prompt = encode_prompt(prompt, tokenizer)
    if len(prompt) == 0:
        raise InvalidArgument("a prompt is empty; it needs at least one token.")
    return [int(token) for token in prompt]


def check_room(policy: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise `InvalidArgument` where a prompt and its response have more tokens than the policy's
    model has positions."""
    config = getattr(getattr(policy, "model", None), "config", None)
    positions = None if config is None else max_positions(config.get_text_config())
    for i, prompt in enumerate(prompts):
        if positions is not None and len(prompt) + max_new_tokens > positions:
            room = positions - len(prompt)
            fits = f"max_new_tokens={room} or less" if room >= 1 else "a shorter prompt"
            raise InvalidArgument(
                f"prompts[{i}] has {len(prompt)} tokens, and with max_new_tokens={max_new_tokens} "
                f"more the text would not fit the policy's {positions} positions; give {fits}."
            )


def check_options(max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    """Raise `InvalidArgument` for an option out of range."""
    check_temperature(temperature)
    allowed = {
        f"max_new_tokens={max_new_tokens} must be at least 1": max_new_tokens >= 1,
        f"top_k={top_k} must be at least 0": top_k >= 0,
        f"top_p={top_p} must be above 0 and at most 1": 0 < top_p <= 1,
    }
    for message, fine in allowed.items():
        if not fine:
            raise InvalidArgument(f"{message}.")


def check_temperature(temperature: float) -> None:
    """Raise `InvalidArgument` unless it is 0 or more; 0 takes the likeliest token."""
    if not isinstance(temperature, Real) or not 0 <= temperature < float("inf"):
        raise InvalidArgument(
            f"temperature={temperature} must be finite and 0 or more (0 takes the likeliest token)."
        )
