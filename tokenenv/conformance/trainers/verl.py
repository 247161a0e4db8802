"""verl (`pip install verl`): advantages, losses and KL terms of `trainer/ppo/core_algos.py`. Tried
with 0.5.0, 0.7.0 and 0.9.1."""

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tokenenv.conformance.batches import Batch
from tokenenv.conformance.sources import functions_of
from tokenenv.conformance.subjects import Subject

SOLO = {"reinforce++": "compute_reinforce_plus_plus_outcome_advantage"}
GROUPS = {
    "reinforce++ baseline": "compute_reinforce_plus_plus_baseline_outcome_advantage",
    "rloo": "compute_rloo_outcome_advantage",
    "opo": "compute_opo_outcome_advantage",
    "gpg": "compute_gpg_outcome_advantage",
}
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm")
KL_TERMS = ("k1", "k2", "k3", "k3+")


class _Config(SimpleNamespace):
    def get(self, name: str, default: Any) -> Any:
        return getattr(self, name, default)


def subjects(root: Path) -> list[Subject]:
    """Return verl's functions that are there; older versions have fewer."""
    tensors = functions_of(root / "verl/utils/torch_functional.py")
    given = {"verl_F": tensors, "AlgoConfig": type("AlgoConfig", (), {})}
    core = functions_of(root / "verl/trainer/ppo/core_algos.py", **given)
    config = _Config(gamma=1.0, clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.2)
    config.global_batch_info = {}

    def gae(b: Batch) -> Any:
        known = b.penalised, b.values, b.mask.double()
        return core.compute_gae_advantage_return(*known, gamma=1.0, lam=b.lambda_)

    def outcome(function: Any, **options: Any) -> Any:
        def advantages(b: Batch) -> Tensor:
            known = {"token_level_rewards": b.penalised, "response_mask": b.mask.double()}
            return function(**known, index=b.groups.numpy(), config=config, **options)[0]

        return advantages

    found = [
        Subject("gae", "advantages", lambda b: gae(b)[0]),
        Subject("gae, returns", "returns", lambda b: gae(b)[1]),
    ]
    found += [Subject(n, "advantages", outcome(getattr(core, f))) for n, f in SOLO.items()]
    found += [
        Subject(n, "groups", outcome(getattr(core, f)))
        for n, f in GROUPS.items()
        if f in vars(core)
    ]
    grpo = core.compute_grpo_outcome_advantage
    for name, std in (("grpo", True), ("grpo, not divided by std", False)):
        found.append(Subject(name, "groups", outcome(grpo, norm_adv_by_std_in_grpo=std)))
    if hasattr(core, "compute_policy_loss_vanilla"):
        losses = {how: _loss(core, config, how) for how in AGGREGATIONS}
        found += [Subject(f"clipped loss, {how}", "loss", one) for how, one in losses.items()]
    return found + [Subject(f"KL, {name}", "kl", _kl(core, name)) for name in _known(core)]


def _known(core: Any) -> list[str]:
    """The KL terms that this version computes."""
    known = []
    for name in KL_TERMS:
        with suppress(NotImplementedError):
            core.kl_penalty(torch.zeros(1), torch.zeros(1), name)
            known.append(name)
    return known


def _loss(core: Any, config: Any, aggregation: str) -> Any:
    def loss(b: Batch) -> Tensor:
        known = b.old_logprobs, b.logprobs, b.advantages, b.mask.double()
        return core.compute_policy_loss_vanilla(*known, loss_agg_mode=aggregation, config=config)[0]

    return loss


def _kl(core: Any, name: str) -> Any:
    return lambda b: core.kl_penalty(b.logprobs, b.ref_logprobs, name)
