"""NeMo RL (github.com/NVIDIA-NeMo/RL; on PyPI there is a placeholder): the advantage estimators of
`algorithms/advantage_estimator.py` and the KL terms of `algorithms/utils.py`. Tried with commit
7ea279a (22 August 2026). Its policy loss is bound to its distributed batches and is left out."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from tokenenv.conformance.batches import Batch
from tokenenv.conformance.sources import functions_of
from tokenenv.conformance.subjects import DENSE_WORLDS, KL_WORLDS, Subject

GAE = {
    "normalize_advantages": True,
    "gae_lambda_value": None,
    "gae_lambda_policy": None,
    "length_adaptive_alpha": 0,
    "gae_gamma": 1.0,
}


def subjects(root: Path) -> list[Subject]:
    """Return NeMo RL's estimators. They take one number a text, so rewards of tokens are summed."""
    utils = functions_of(root / "nemo_rl/algorithms/utils.py")
    shared = ("calculate_baseline_and_std_per_prompt", "calculate_kl", "masked_mean", "masked_var")
    estimators = functions_of(
        root / "nemo_rl/algorithms/advantage_estimator.py",
        **{name: getattr(utils, name) for name in shared},
    )

    def of(kind: str, which: int = 0, **settings: Any) -> Any:
        def found(b: Batch) -> Tensor:
            kl = {"use_kl_in_reward": True, "reference_policy_kl_type": "k1"}
            loss_config = SimpleNamespace(**kl, reference_policy_kl_penalty=b.kl_coef)
            options: Any = SimpleNamespace(**settings)
            if kind == "GeneralizedAdvantageEstimator":
                options = GAE | {"gae_lambda": b.lambda_}
            return _called(getattr(estimators, kind)(options, loss_config), b)[which]

        return found

    grpo, plus = "GRPOAdvantageEstimator", "ReinforcePlusPlusAdvantageEstimator"

    def group(name: str, normalize: bool, others: bool) -> Subject:
        function = of(grpo, normalize_rewards=normalize, use_leave_one_out_baseline=others)
        return Subject(name, "groups", function, without=KL_WORLDS)

    return [
        Subject("gae", "advantages", of("GeneralizedAdvantageEstimator")),
        Subject(
            "gae, returns", "returns", of("GeneralizedAdvantageEstimator", which=1), DENSE_WORLDS
        ),
        Subject("reinforce++", "advantages", of(plus, minus_baseline=False)),
        Subject("reinforce++ minus baseline", "groups", of(plus, minus_baseline=True)),
        group("grpo, leave one out", True, True),
        group("grpo, leave one out, not normalized", False, True),
        group("grpo, not normalized", False, False),
        *(Subject(f"KL, {name}", "kl", _kl(utils, name)) for name in ("k1", "k2", "k3")),
    ]


def _called(estimator: Any, b: Batch) -> tuple[Tensor, ...]:
    found = estimator.compute_advantage(
        prompt_ids=b.groups[:, None],
        rewards=b.scores.float(),  # its means over a group are float32
        mask=b.mask.float(),
        values=b.values.float(),
        logprobs=b.old_logprobs.float(),
        reference_logprobs=b.ref_logprobs.float(),
        logprobs_policy=b.old_logprobs.float(),
        logprobs_reference=b.ref_logprobs.float(),
    )
    return found if isinstance(found, tuple) else (found,)


def _kl(utils: Any, name: str) -> Any:
    return lambda b: utils.calculate_kl(b.logprobs, b.ref_logprobs, kl_type=name)
