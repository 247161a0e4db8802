"""OpenRLHF (`pip install openrlhf`): the advantages of its experience maker for every estimator,
its policy loss and its KL terms. Tried with 0.11.2."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tokenenv.conformance.batches import Batch
from tokenenv.conformance.sources import functions_of
from tokenenv.conformance.subjects import DENSE_WORLDS, Subject

SOLO = ("gae", "reinforce")
GROUPS = ("rloo", "reinforce_baseline", "group_norm", "dr_grpo")
LOSSES = {"token mean": True, "sequence mean": False}


def subjects(root: Path) -> list[Subject]:
    """Return OpenRLHF's functions. It takes one number a text, so rewards of tokens are summed."""
    utils = functions_of(root / "openrlhf/models/utils.py")
    maker = functions_of(
        root / "openrlhf/trainer/ppo_utils/experience_maker.py",
        compute_reward=utils.compute_reward,
        apply_length_penalties=lambda experiences, args: None,
        itertools=itertools,
    ).RemoteExperienceMaker
    losses = functions_of(
        root / "openrlhf/models/loss.py", masked_mean=utils.masked_mean, nn=torch.nn
    )
    return [
        Subject("gae, returns", "returns", _found(maker, utils, "gae", "returns"), DENSE_WORLDS),
        *(Subject(name, "advantages", _found(maker, utils, name)) for name in SOLO),
        *(Subject(name, "groups", _found(maker, utils, name)) for name in GROUPS),
        *(
            Subject(f"clipped loss, {how}", "loss", _loss(losses, flag))
            for how, flag in LOSSES.items()
        ),
        *(Subject(f"KL, {name}", "kl", _kl(utils, name)) for name in ("k1", "k2", "k3")),
        Subject("KL, k3 with unbiased_gradient", "kl", _kl(utils, "k3", unbiased_gradient=True)),
    ]


def _found(maker: Any, utils: Any, estimator: str, which: str = "advantages") -> Any:
    def found(b: Batch) -> Tensor:
        settings = SimpleNamespace(
            estimator=estimator, gamma=1.0, lambd=b.lambda_, no_std_norm=False
        )
        args = SimpleNamespace(
            algo=SimpleNamespace(advantage=settings),
            rollout=SimpleNamespace(n_samples_per_prompt=b.group_size),
            reward=SimpleNamespace(clip_range=None),
        )
        experience = SimpleNamespace(
            index=list(range(len(b.rows))),
            rewards=b.scores,
            kl=utils.compute_approx_kl(b.old_logprobs, b.ref_logprobs),
            action_mask=b.mask.double(),
            values=b.values,
            info={},
        )
        self = object.__new__(maker)
        self.strategy, self.advantage_estimator = SimpleNamespace(args=args), estimator
        self.kl_ctl = SimpleNamespace(value=b.kl_coef)
        made = maker.compute_advantages_and_returns(self, [experience])[0]
        return getattr(made, which)

    return found


def _loss(losses: Any, token_mean: bool) -> Any:
    policy_loss = losses.PolicyLoss(token_level_loss=token_mean)
    return lambda b: policy_loss(b.logprobs, b.old_logprobs, b.advantages, b.mask.double())[0]


def _kl(utils: Any, name: str, **options: Any) -> Any:
    return lambda b: utils.compute_approx_kl(
        b.logprobs, b.ref_logprobs, kl_estimator=name, **options
    )
