"""The settings that all agents share, and the schedules that follow from them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin

from tokenenv.errors import InvalidArgument, check_choice
from tokenenv.safety.shown import without_user

MAX_SEED = 2**62
CALLED = {
    "lr": ("learning_rate",),
    "optimizer": ("optim", "optim_type"),
    "lr_schedule": ("lr_scheduler_type",),
    "lr_warmup": ("warmup_ratio",),
    "batch_tokens": ("batch_size", "n_steps", "num_steps", "train_batch_size"),
    "epochs": ("n_epochs", "num_epochs", "num_ppo_epochs", "num_iterations", "update_epochs"),
    "minibatches": ("num_minibatches", "num_mini_batches"),
    "kl_coef": ("beta", "init_kl_coef", "kl_coeff"),
    "clip_range": ("cliprange", "clip_coef", "clip_ratio", "epsilon"),
    "clip_high": ("epsilon_high", "clip_ratio_high"),
    "value_clip": ("clip_range_vf", "cliprange_value"),
    "entropy_coef": ("ent_coef",),
    "lambda_actor": ("gae_lambda", "lam"),
    "whiten": ("normalize_advantage", "norm_adv", "whiten_advantages"),
    "scale": ("scale_rewards",),
    "lora_rank": ("lora_r",),
    "rollout": ("use_vllm",),
}
"""For a field, what TRL, stable-baselines3, CleanRL or verl call what is nearest to it."""
ELSEWHERE = {
    "num_generations": "group_size= of the env",
    "max_completion_length": "max_new_tokens= of the env",
    "max_new_tokens": "an argument of the env",
    "group_size": "an argument of the env",
    "total_timesteps": "total_tokens of learn()",
    "total_tokens": "an argument of learn()",
}
"""What other libraries take as a setting of the algorithm, and where it is here."""
AGGREGATIONS = ("token-mean", "sequence-mean", "fixed-length")
PRECISIONS = ("auto", "float32", "bfloat16")
ROLLOUTS = ("step", "episode", "auto", "vllm", "http://HOST:PORT")
BACKBONES = ("auto", "shared", "separate")
OPTIMIZERS = ("adamw", "adamw8bit")
SCHEDULES = ("constant", "linear", "cosine")
KINDS: dict[Any, tuple[type, str]] = {
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    bool: (bool, "True or False"),
    str: (str, "text"),
    dict: (Mapping, "a mapping"),
    type(None): (type(None), "None"),
}
"""For each type of a field, what values are taken, and the words for that in an error."""


@dataclass(kw_only=True, slots=True)
class AgentConfig:
    """Settings shared by the bundled agents; each adds its own. Types and ranges are checked when a
    config is made."""

    seed: int = 0
    """Seed of everything random in the agent, and of the env's first reset; 0 or more."""
    batch_tokens: int = 2048
    """Response tokens of finished episodes that one update learns from, at the least; 1 or more."""
    max_batch_tokens: int = 16384
    """Tokens of one learning forward, padding included; 1 or more. It bounds memory and changes no
    result."""
    gradient_checkpointing: bool = False
    """Whether layers keep only what they read, and are computed again in the backward pass: less
    memory for about a third more arithmetic. It changes no result."""
    epochs: int = 2
    """Passes over each batch; 1 or more."""
    minibatches: int = 4
    """Optimizer steps per pass; 1 or more."""
    lr: float | None = None
    """Learning rate of AdamW (no weight decay), above 0. None chooses by what is trained
    (`learning.rates`): 3e-4 for a small model (at most 10 million weights, as all bundled ones),
    1e-5 for all weights of a larger one, 2e-4 for its LoRA adapters. `agent.config.lr` is what was
    chosen."""
    lr_schedule: str = "linear"
    """How the learning rate goes over the tokens of a run (`run_progress`): "constant", or "linear"
    or "cosine" towards 0."""
    lr_warmup: float = 0.0
    """Share of a run over which the learning rate first rises from 0; 0 to 1."""
    optimizer: str = "adamw"
    """"adamw", or "adamw8bit" of bitsandbytes, which keeps AdamW's two moments in 8 bits each:
    2 bytes a trained weight in place of 8. A checkpoint goes on with the one that it began with."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm, above 0."""
    temperature: float = 1.0
    """Logits are divided by it when tokens are drawn, and again when their log-probabilities are
    computed anew; above 0."""
    aggregation: str = "token-mean"
    """"token-mean": every token counts alike; "sequence-mean": every episode counts alike, whatever
    its length; "fixed-length": every token counts alike, and the sum is divided by the longest
    length that texts can have."""
    kl_coef: float | None = None
    """Beta, in reward per nat, 0 or more; None leaves the env's."""
    kl_target: float | None = None
    """KL to the reference that beta is adapted to reach, in nats per response token, above 0; None
    keeps beta fixed. Beta must start above 0."""
    kl_horizon: int = 50_000
    """Response tokens over which the adaptive beta can change by a fifth; 1 or more. A larger batch
    changes it by a fifth at most, too."""
    target_kl: float | None = None
    """An update ends when a minibatch's KL(before || now) exceeds this, in nats per token, above 0;
    None never ends one early. "Before" is the learner's policy at the start of the update. Its
    log-probs are computed anew for texts that an older policy began (one more forward over those),
    so the age of texts does not count."""
    precision: str = "auto"
    """Precision of forwards: "float32", "bfloat16" (autocast; weights stay float32), or "auto",
    which is bfloat16 on GPUs that have it. A bfloat16 model under adapters runs as it is."""
    lora_rank: int = 0
    """Rank of low-rank adapters that are trained in place of all weights, and share the env's model
    with the reference; 0 trains a copy of all weights, in float32."""
    backbone: str = "auto"
    """Where the env steps: "shared", the policy's token is read in one forward with those of the
    env's models that have the same frozen base, as under LoRA; "separate", in a forward of its own;
    "auto", shared wherever that is possible. The numbers are the same (docs/rollout.md)."""
    rollout: str = "step"
    """What writes the texts: "step", the env one token at a time; "episode", the policy alone;
    "auto", that of the two which a short trial finds faster; "vllm", vLLM in this process; or the
    URL of a vLLM server. All but "step" write whole texts, which the env scores when they have
    ended: rewards are the same (docs/rollout.md)."""
    rollout_options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Options of the engine that `rollout` names, such as gpu_memory_utilization 0.4. num_texts is
    the number of texts side by side, by default the env's num_envs."""
    max_staleness: int | None = None
    """Updates that may lie between a text's first token and the update that learns from it, 0 or
    more. A text that would get older is waited for, never thrown away. None is 1 where whole texts
    are written. Where the env steps, None sets no limit: the age of texts follows from their length
    and from the wait for their group. At 0 every text of a batch is drawn from the policy that
    learns from it, and slots idle until the last one has ended (docs/algorithms.md, "How old texts
    are")."""

    def __post_init__(self) -> None:
        self.check_kinds()
        check_choice("lr_schedule", self.lr_schedule, SCHEDULES)
        check_choice("aggregation", self.aggregation, AGGREGATIONS)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("backbone", self.backbone, BACKBONES)
        if not self.rollout.startswith(("http://", "https://")):
            check_choice(
                "rollout",
                without_user(self.rollout),
                ROLLOUTS,
            )
        self.check(
            "at least", 1, "batch_tokens", "max_batch_tokens", "epochs", "minibatches", "kl_horizon"
        )
        self.check("at least", 0, "seed", "kl_coef", "lora_rank", "max_staleness")
        self.check("above", 0, "lr", "max_grad_norm", "temperature", "kl_target", "target_kl")
        self.check_share("lr_warmup")
        check_seed(self.seed)

    def check_kinds(self) -> None:
        """Raise `InvalidArgument` for a field whose value is not of its type, such as a number as
        text, or a fraction where tokens are counted. Types that are not in `KINDS` are not checked.
        """
        for known in fields(self):
            parts = get_args(known.type) if isinstance(known.type, UnionType) else (known.type,)
            kinds = [KINDS.get(get_origin(part) or part, (object, "")) for part in parts]
            value = getattr(self, known.name)
            is_flag = isinstance(value, bool)  # Python takes True for a number
            if not any(
                isinstance(value, kind) and is_flag <= (kind in (bool, object)) for kind, _ in kinds
            ):
                words = " or ".join(word for _, word in kinds)
                raise InvalidArgument(f"{known.name}={value!r} is not allowed; it must be {words}.")

    def check(self, how: str, bound: float, *names: str) -> None:
        """Raise `InvalidArgument` unless each field is finite, and "at least" or "above" the
        `bound`, as `how` says; None passes."""
        for name in names:
            value = getattr(self, name)
            if value is None or (
                math.isfinite(value) and (value > bound or (value == bound and how == "at least"))
            ):
                continue
            raise InvalidArgument(f"{name}={value} is not allowed; it must be {how} {bound}.")

    def check_share(self, *names: str) -> None:
        """Raise `InvalidArgument` for a field outside 0..1; None passes."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and 0.0 <= value <= 1.0):
                raise InvalidArgument(
                    f"{name}={value} is not allowed; it must lie between 0 and 1."
                )


Config = TypeVar("Config", bound=AgentConfig)


def build_config(kind: type[Config], config: Any, overrides: Mapping[str, Any]) -> Config:
    """Return `config`, by default a new one of this kind, with single fields changed."""
    if not isinstance(config, kind | None):
        raise InvalidArgument(
            f"config= is of type {type(config).__name__}; allowed: {kind.__name__}."
        )
    known = [known.name for known in fields(kind)]
    for name in overrides:
        if name not in known:
            check_called(kind.__name__, name, known)
            check_choice(f"{kind.__name__} field", name, known)
    return replace(config or kind(), **overrides)


def check_called(kind: str, name: str, known: list[str]) -> None:
    """Raise `InvalidArgument` where `name` is what other libraries call one of the `known` fields,
    or an argument of the env or of `learn`."""
    if name in ELSEWHERE:
        raise InvalidArgument(f"{kind} has no field {name!r}: it is {ELSEWHERE[name]}.")
    here = next((field for field, names in CALLED.items() if name in names), None)
    if here in known:
        raise InvalidArgument(f"{kind} has no field {name!r}: it is called {here!r} here.")


def run_progress(before: int, seen: int, total: float) -> float:
    """Return the share of a run of `total` tokens that is over in the middle of its next update,
    above 0 and below 1.

    `before` tokens, fewer than `total`, had been seen after the last update, and `seen` tokens now,
    with those that the next update learns from. Those beyond `total` do not count, so the last
    update still has a learning rate above 0.
    """
    return (before + min(seen, total)) / (2 * total)


def check_seed(seed: int) -> None:
    """Raise `InvalidArgument` for a seed that torch or NumPy would not take, with a little added:
    slots and streams have seeds near it."""
    if not (isinstance(seed, Integral) and 0 <= seed <= MAX_SEED):
        raise InvalidArgument(f"seed={seed} is not allowed; it must be a whole number, 0 to 2**62.")


def learning_rate(config: AgentConfig, progress: float) -> float:
    """Return the scheduled learning rate when this share (0 to 1) of a run is over. The config is
    an agent's, whose `lr` is a number."""
    peak: Any = config.lr
    if progress < config.lr_warmup:
        return peak * progress / config.lr_warmup
    left = (1.0 - progress) / (1.0 - config.lr_warmup) if config.lr_warmup < 1.0 else 1.0
    left = min(max(left, 0.0), 1.0)
    shapes = {"constant": 1.0, "linear": left, "cosine": 0.5 * (1.0 - math.cos(math.pi * left))}
    return peak * shapes[config.lr_schedule]
