"""SkyRL (`pip install skyrl`, or github.com/NovaSky-AI/SkyRL): advantages, losses and KL terms of
`backends/skyrl_train/utils/ppo_utils.py`. Tried with 0.3.0 and with commit a956457 (21 August
2026).

Its trainer gives advantage functions a `response_mask` that is 1 at all tokens of a response, those
of tools included, and masks these in the loss alone. The functions are looked at with that mask,
and REINFORCE++ with a mask of the policy's tokens as well.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from tokenenv.conformance.batches import Batch
from tokenenv.conformance.sources import functions_of
from tokenenv.conformance.subjects import Subject

FOLDER = "skyrl/backends/skyrl_train/utils"
REDUCTIONS = ("token_mean", "sequence_mean", "seq_mean_token_sum_norm")
CONFIG = SimpleNamespace(
    policy_loss_type="regular", eps_clip_low=0.2, eps_clip_high=0.2, off_policy_correction=None
)


def subjects(root: Path) -> list[Subject]:
    """Return SkyRL's functions."""
    tensors = functions_of(root / FOLDER / "torch_utils.py")
    utils = functions_of(
        root / FOLDER / "ppo_utils.py",
        masked_mean=tensors.masked_mean,
        safe_exp_delta=tensors.safe_exp_delta,
        apply_off_policy_correction=lambda loss, old, rollout, mask, config: (loss, mask, {}),
    )

    def solo(function: Any, own: bool = False, which: int = 0) -> Any:
        def found(b: Batch) -> Tensor:
            return _called(function, b, own, values=b.values, gamma=1.0, lambd=b.lambda_)[which]

        return found

    def grouped(function: Any, **options: Any) -> Any:
        return lambda b: _called(function, b, False, index=b.groups.numpy(), **options)[0]

    gae = utils.compute_gae_advantage_return
    grpo = utils.compute_grpo_outcome_advantage
    plus = utils.compute_reinforce_plus_plus_outcome_advantage
    undivided = grouped(grpo, grpo_norm_by_std=False)
    return [
        Subject("gae", "advantages", solo(gae)),
        Subject("gae, returns", "returns", solo(gae, which=1)),
        Subject("reinforce++", "advantages", solo(plus)),
        Subject("reinforce++, mask of own tokens", "advantages", solo(plus, own=True)),
        Subject("rloo", "groups", grouped(utils.compute_rloo_outcome_advantage)),
        Subject("grpo", "groups", grouped(grpo)),
        Subject("grpo, not divided by std", "groups", undivided),
        *(Subject(f"clipped loss, {how}", "loss", _loss(utils, how)) for how in REDUCTIONS),
        *(Subject(f"KL, {name}", "kl", _kl(utils, name)) for name in ("k1", "k2", "k3")),
    ]


def _called(function: Any, b: Batch, own: bool, **options: Any) -> Any:
    mask = (b.mask if own else b.text_mask).double()
    return function(token_level_rewards=b.penalised, response_mask=mask, **options)


def _loss(utils: Any, reduction: str) -> Any:
    def loss(b: Batch) -> Tensor:
        rows, width = b.mask.shape
        mask = b.mask.double()
        scaled = utils.apply_loss_reduction_to_advantages_minibatch(
            b.advantages, mask, reduction, micro_batch_size=rows, max_seq_len=width
        )
        return utils.ppo_policy_loss(b.logprobs, b.old_logprobs, scaled, CONFIG, mask)[0]

    return loss


def _kl(utils: Any, name: str) -> Any:
    return lambda b: utils.compute_approx_kl(
        b.logprobs, b.ref_logprobs, b.mask.double(), kl_estimator_type=name
    )
