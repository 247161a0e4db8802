"""Reading and checking the actions of a step, before anything changes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenenv.errors import InvalidAction
from tokenenv.types import TokenSpec

BAD_TOKEN, BAD_LOGPROB = -1, -2
INTEGERS = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
LOGPROB_SLACK = 1e-3
"""A log-prob may exceed 0 by rounding."""


def read_actions(
    actions: Any, with_logprob: bool, num_envs: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Return the actions on the device: tokens (N,) int64 and, under kl="policy", logprob (N,)
    float32 in nats."""
    if not with_logprob:
        if isinstance(actions, Mapping):
            raise InvalidAction(
                "actions are token ids (N,); a dict with a logprob is for kl='policy'."
            )
        return _read(actions, "actions", torch.int64, num_envs, device), None
    if not isinstance(actions, Mapping) or set(actions) != {"token", "logprob"}:
        given = sorted(actions) if isinstance(actions, Mapping) else type(actions).__name__
        raise InvalidAction(
            f"kl='policy' needs actions as a dict of 'token' and 'logprob', got {given}."
        )
    token = _read(actions["token"], "actions['token']", torch.int64, num_envs, device)
    return token, _read(actions["logprob"], "actions['logprob']", torch.float32, num_envs, device)


def token_codes(tokens: Tensor, logprob: Tensor | None, vocab_size: int) -> Tensor:
    """Return the tokens (N,) int64, with a negative code where a slot's action is invalid. It is
    all that the host needs of a step."""
    if logprob is None and tokens.device.type == "cpu" and _within(tokens.numpy(), vocab_size):
        return tokens.clone()
    codes = torch.where((tokens >= 0) & (tokens < vocab_size), tokens, BAD_TOKEN)
    if logprob is not None:
        codes = torch.where(logprob.isfinite() & (logprob <= LOGPROB_SLACK), codes, BAD_LOGPROB)
    return codes


def _within(tokens: np.ndarray, vocab_size: int) -> bool:
    """Whether all are token ids, in two passes over them."""
    return bool(tokens.min() >= 0 and tokens.max() < vocab_size)


def invalid_action(
    codes: np.ndarray, tokens: Tensor, logprob: Tensor | None, spec: TokenSpec
) -> InvalidAction:
    """Return the error that names the first slot whose code (N,) is negative."""
    row = int(np.flatnonzero(codes < 0)[0])
    if codes[row] == BAD_TOKEN or logprob is None:
        name = "actions" if logprob is None else "actions['token']"
        return InvalidAction(
            f"{name}[{row}]={int(tokens[row])} is no token id; allowed: 0 to {spec.vocab_size - 1}."
        )
    value = float(logprob[row])
    return InvalidAction(
        f"actions['logprob'][{row}]={value}; kl='policy' needs a finite log-prob, 0 or less (nats)."
    )


def _read(
    values: Any, name: str, dtype: torch.dtype, num_envs: int, device: torch.device
) -> Tensor:
    try:
        values = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
    except (TypeError, ValueError) as error:
        raise InvalidAction(
            f"{name} is no array of numbers; allowed: one number for each of {num_envs} envs."
        ) from error
    if tuple(values.shape) != (num_envs,):
        raise InvalidAction(
            f"{name} has shape {tuple(values.shape)}; allowed: ({num_envs},), one for each env."
        )
    if dtype == torch.int64 and values.dtype not in INTEGERS:
        raise InvalidAction(f"{name} has dtype {values.dtype}; allowed: an integer dtype.")
    return values.to(device, dtype, non_blocking=True)
