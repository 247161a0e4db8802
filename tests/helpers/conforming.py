"""The bundled algorithms as functions of a conformance kit's batch: their own `advantages`, called
with the same texts as an `EpisodeBatch`.

B rows, L tokens whoever wrote them, T own tokens.
"""

from typing import Any

import torch
from gradients import Case, agent_of
from tabular import World as TabularWorld
from torch import Tensor

from tokenenv.agents.algorithms import klq, ppo
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning.advantages import whiten
from tokenenv.conformance import Batch


def own_places(batch: Batch) -> tuple[Tensor, Tensor]:
    """The columns of the own tokens (B, T), in order, and how many there are (B,)."""
    lengths = batch.mask.sum(1)
    order = (~batch.mask).to(torch.int8).argsort(dim=1, stable=True)
    return order[:, : int(lengths.max())], lengths


def episodes_of(batch: Batch) -> EpisodeBatch:
    """The same texts as learners hold them; prompts are one token, and what tokens there are is
    left out, as nothing here reads them."""
    places, lengths = own_places(batch)
    real = torch.arange(places.shape[1]) < lengths[:, None]

    def own(values: Tensor) -> Tensor:
        return torch.where(real, values.gather(1, places), 0.0)

    rows, nothing = len(lengths), torch.zeros(len(lengths), dtype=torch.long)
    position = torch.cat([torch.where(real, places + 1, 0), nothing[:, None]], 1)
    position[torch.arange(rows), lengths] = batch.text_mask.sum(1) + 1
    reward = own(batch.rewards) + batch.kl_coef * own(batch.ref_logprobs)
    return EpisodeBatch(
        tokens_BL=torch.zeros(rows, batch.mask.shape[1] + 1, dtype=torch.long),
        length_B=batch.text_mask.sum(1) + 1,
        response_length_B=lengths,
        logprob_BT=own(batch.old_logprobs),
        ref_logprob_BT=own(batch.ref_logprobs),
        reward_BT=reward,
        potential_BT1=torch.zeros_like(position, dtype=torch.float64),
        kl_coef_B=torch.full((rows,), batch.kl_coef, dtype=torch.float64),
        terminated_B=~batch.cut,
        truncated_B=batch.cut,
        score_B=batch.scores,
        gold_B=batch.scores,
        prompt_id_B=nothing,
        slot_B=nothing,
        index_B=nothing,
        version_B=nothing,
        bootstraps_B=batch.cut,
        terms={},
        position_BT1=position,
    )


def values_of(batch: Batch) -> Tensor:
    """The critic's values (B, T + 1) before each own token, then of the last state."""
    places, lengths = own_places(batch)
    values = torch.cat([batch.values.gather(1, places), torch.zeros(len(lengths), 1)], 1)
    values[torch.arange(len(lengths)), lengths] = batch.last_values
    return values


def spread(values: Tensor, batch: Batch) -> Tensor:
    """(B, T) of own tokens as (B, L), zero elsewhere."""
    places, lengths = own_places(batch)
    real = torch.arange(places.shape[1]) < lengths[:, None]
    out = torch.zeros(batch.mask.shape, dtype=values.dtype)
    return out.scatter_(1, places, torch.where(real, values, 0.0))


def bundled(patch: Any, algorithm: str, lambdas: tuple[str, ...] = (), **settings: Any) -> Any:
    """A bundled algorithm as an estimator: its own method on these texts, with the batch's values
    for its critic's; `lambdas` are the settings that take the batch's lambda."""

    def advantages(batch: Batch) -> Tensor:
        episodes, values = episodes_of(batch), values_of(batch)
        case = Case(algorithm, settings | dict.fromkeys(lambdas, batch.lambda_))
        agent = agent_of(case, TabularWorld(0))
        agent.group_size = batch.group_size
        patch.setattr(type(agent), "max_new_tokens", values.shape[1] - 1)
        known = episodes.logprob_BT, values
        patch.setattr(ppo, "values_before", lambda *_: values)
        patch.setattr(klq, "logprobs_and_values", lambda *_: known)
        agent.values = lambda *_: values[:, :-1][episodes.mask_BT].tolist()  # VinePPO's rollouts
        if algorithm == "klq":
            agent.estimate(episodes)
            return spread(episodes.learned["advantage"], batch)
        found = agent.advantages(episodes)
        return spread(whiten(found, episodes.mask_BT) if agent.config.whiten else found, batch)

    return advantages
