"""Rewards with the whole KL penalty, and the beta that it is paid with.

Under `kl="reference"` an env pays `+beta log pi_ref` only, and the learner adds `-beta log pi`
(docs/contract.md). Under `kl="policy"` the env pays all of it, and nothing is added here.

Suffixes: B episodes, T response tokens.
"""

import numpy as np
import torch
from torch import Tensor

from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning.advantages import KL_ROUNDING, ROUNDING, kl_penalised


def with_penalty(rewards_BT: Tensor, batch: EpisodeBatch, *, env_pays_all: bool) -> Tensor:
    """Return rewards (B, T) of the env with the learner's half of the penalty."""
    if not env_pays_all:
        rewards_BT = kl_penalised(rewards_BT, batch.logprob_BT, batch.kl_coef_B)
    # Where policy and reference are one model, the two log-probs differ by the rounding of two
    # forwards. A token that earns nothing else must not earn this.
    rounding_B1 = KL_ROUNDING * batch.kl_coef_B[:, None]
    return rewards_BT.masked_fill(rewards_BT.abs() <= rounding_B1, 0.0)


def by_source(batch: EpisodeBatch, *, env_pays_all: bool) -> dict[str, Tensor]:
    """Return the rewards (B, T) by where they come from; they add up to those `with_penalty`.

    The sources are the env's terms, or "reward" where it names none, and "kl", which is the whole
    penalty. No source holds the rounding of another one: a group's deviation of it would be tiny,
    and dividing by that would make it large.
    """
    terms = {name: values for name, values in batch.terms.items() if name != "kl"}
    if terms:
        paid_BT = batch.terms.get("kl", torch.zeros_like(batch.reward_BT))
        return {**terms, "kl": with_penalty(paid_BT, batch, env_pays_all=env_pays_all)}
    beta_B1 = batch.kl_coef_B[:, None]
    penalty_BT = -beta_B1 * (batch.logprob_BT - batch.ref_logprob_BT)
    rest_BT = with_penalty(batch.reward_BT, batch, env_pays_all=env_pays_all) - penalty_BT
    parts_BT = beta_B1 * (batch.logprob_BT.abs() + batch.ref_logprob_BT.abs())
    rest_BT = rest_BT.masked_fill(rest_BT.abs() <= ROUNDING * parts_BT, 0.0)
    return {"reward": rest_BT, "kl": penalty_BT}


def adapted(kl_coef: float, batch: EpisodeBatch, *, target: float, horizon: int) -> float:
    """Return beta for the texts that follow this batch.

    It is the proportional controller of Ziegler et al. 2019, with the KL in nats per response
    token: `beta *= 1 + clip(KL / target - 1, -0.2, 0.2) min(tokens / horizon, 1)`. A positive beta
    stays positive.
    """
    tokens = int(batch.response_length_B.sum())
    kl = float((batch.logprob_BT - batch.ref_logprob_BT).sum()) / tokens
    error = float(np.clip(kl / target - 1.0, -0.2, 0.2))
    return kl_coef * (1.0 + error * min(tokens / horizon, 1.0))
