"""What all bundled agents share: driving an env, learning in minibatches, saving and resuming.

An algorithm is a subclass with a config and an `update`; see `ppo.py`. Suffixes: B episodes, T
response tokens.
"""

import copy
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from tokenenv.agents.config import AgentConfig, learning_rate, run_progress
from tokenenv.agents.episodes import Episode, EpisodeBatch, summary
from tokenenv.agents.learning import losses
from tokenenv.agents.learning.advantages import KL_ROUNDING, ROUNDING, kl_penalised
from tokenenv.agents.learning.learner import (
    FrozenLM,
    LossFunction,
    Metrics,
    accumulate_gradient,
    token_logprobs,
)
from tokenenv.agents.learning.policy import LMPolicy
from tokenenv.agents.rollout.actor import Actor
from tokenenv.agents.rollout.collector import Collector, Stopped
from tokenenv.agents.rollout.env_rows import (
    check_apart,
    check_default_dtype,
    check_env,
    check_kl,
    env_core,
    group_size_of,
    num_actions,
    reference_of,
    wants_logprob,
    warn_if_biased,
)
from tokenenv.agents.rollout.generate import Prompts, generate
from tokenenv.agents.rollout.staleness import mismatch, staleness, waiting
from tokenenv.agents.rollout.text_collector import TextCollector, check_text_env, make_engine
from tokenenv.agents.run.checkpoint import (
    agent_state,
    check_state,
    read_newest,
    reading,
    restore,
    trained_weights,
    write_checkpoint,
)
from tokenenv.agents.run.failures import write_failures
from tokenenv.agents.run.progress import ProgressLine
from tokenenv.agents.run.tracking import RunFolder
from tokenenv.errors import InvalidArgument, NotFinite, check_choice, check_number
from tokenenv.safety.trust import check_from_file

OnUpdate = Callable[[Metrics, Sequence[Episode]], None]


class Agent:
    """Base of the bundled agents.

    Args:
        envs: a vector env of texts, such as `gym.make_vec("tokenenv/Reviews-v0", num_envs=64)`;
            with SAME_STEP no step is lost.
        config: an instance of the agent's config; None is the default one.
        policy: what to train; None is a copy of the env's model.
        run_dir: where TensorBoard events and episodes go, a folder without a run in it; None writes
            nothing.
        **overrides: single fields of the config.
    """

    config_class: ClassVar[type[AgentConfig]] = AgentConfig
    grouped: ClassVar[bool] = False
    """Whether texts are compared with others of their prompt: the env needs a `group_size`; batches
    hold whole groups."""

    def __init__(
        self,
        envs: VectorEnv,
        config: Any = None,
        *,
        policy: LMPolicy | None = None,
        run_dir: str | os.PathLike[str] | None = None,
        **overrides: Any,
    ) -> None:
        check_default_dtype()
        check_env(envs)
        warn_if_biased(envs)
        if not isinstance(config, self.config_class | None):
            raise InvalidArgument(
                f"config= is of type {type(config).__name__}; allowed: "
                f"{self.config_class.__name__}."
            )
        for name in overrides:
            check_choice(
                f"{self.config_class.__name__} field",
                name,
                [f.name for f in fields(self.config_class)],
            )
        self.config = cfg = replace(config or self.config_class(), **overrides)
        check_kl(envs, cfg.kl_coef, cfg.kl_target)
        self.envs, self.core, self.run_dir = (
            envs,
            env_core(envs),
            Path(run_dir) if run_dir is not None else None,
        )
        self.spec = getattr(self.core, "token_spec", None)
        self.policy = policy or default_policy(envs, cfg)
        check_apart(self.policy, self.core)
        if self.policy.vocab_size != num_actions(envs):
            raise InvalidArgument(
                f"policy has {self.policy.vocab_size} tokens, the env {num_actions(envs)} actions."
            )
        self.actor = Actor(self.policy, temperature=cfg.temperature, seed=cfg.seed)
        self.group_size = group_size_of(envs, type(self).__name__) if self.grouped else 1
        self.collector: Collector | TextCollector = self._make_collector()
        self.optimizer = torch.optim.AdamW(
            trained_weights(self.policy).values(), lr=cfg.lr, weight_decay=0.0
        )
        self.rng = np.random.default_rng(cfg.seed)
        self.updates = 0
        self.updated_at = 0
        """Tokens that had been seen after the last update."""
        self._has_begun = False
        """Whether what is in the run folder is this agent's."""
        self.reference = None
        if cfg.full_kl_coef:
            self.reference = FrozenLM(
                reference_of(envs, "leave full_kl_coef at 0"), self.policy.vocab_size
            )
        self.statistics: dict[str, Any] = self.running_statistics()

    def _make_collector(self) -> Collector | TextCollector:
        cfg, group_size = self.config, self.group_size
        if cfg.rollout == "step":
            limit = cfg.max_staleness
            return Collector(
                self.envs, self.actor, seed=cfg.seed, group_size=group_size, max_staleness=limit
            )
        spec = check_text_env(self.envs).token_spec
        options = {
            "temperature": cfg.temperature,
            "num_texts": self.envs.num_envs,
        } | cfg.rollout_options
        engine = make_engine(cfg.rollout, self.policy, spec=spec, **options)
        limit = 1 if cfg.max_staleness is None else cfg.max_staleness
        limits: dict[str, Any] = {"num_texts": options["num_texts"], "max_staleness": limit}
        return TextCollector(self.envs, engine, seed=cfg.seed, group_size=group_size, **limits)

    def running_statistics(self) -> dict[str, Any]:
        """What an algorithm keeps besides weights, by name: objects with `state_dict`, which
        checkpoints hold, and whose `copy.copy` does not change with them."""
        return {}

    def collect(self) -> list[Episode]:
        """The finished episodes that the next update learns from."""
        return self.collector.collect(self.config.batch_tokens)

    def update(self, batch: EpisodeBatch) -> Metrics:
        """Learns from finished episodes; returns scalars to log, and leaves in `batch.learned` what
        it makes of each token."""
        raise NotImplementedError

    @property
    def tokens_seen(self) -> int:
        """Tokens emitted so far."""
        return self.collector.tokens_seen

    @property
    def max_new_tokens(self) -> int:
        """The longest response."""
        space: Any = self.envs.single_observation_space
        return self.spec.max_new_tokens if self.spec else int(space["tokens"].shape[0])

    @property
    def kl_coef(self) -> float:
        """The env's beta for episodes that begin from now on; 0 for an env without one."""
        return float(getattr(self.core, "kl_coef", 0.0))

    @kl_coef.setter
    def kl_coef(self, value: float) -> None:
        if not hasattr(self.core, "kl_coef"):
            raise InvalidArgument(f"kl_coef={value} needs an env that has a kl_coef.")
        self.core.kl_coef = value

    def learn(
        self, total_tokens: int, *, progress: bool = False, on_update: OnUpdate | None = None
    ) -> Self:
        """Learns until `total_tokens` tokens have been seen in all, those before a `load` included.

        `progress` shows a live line; `on_update(metrics, episodes)` is called after each update,
        and may `save` or `stop`. Raises `InvalidArgument` where a new agent's `run_dir` holds a
        run, `RunFolderError` where another process trains there, or where nothing more can be
        written there.
        """
        check_default_dtype()
        check_number("total_tokens", total_tokens)
        if self.config.kl_coef is not None and self.updates == 0:
            self.kl_coef = self.config.kl_coef
        listeners: list[OnUpdate] = [on_update] if on_update else []
        if self.run_dir is not None:
            listeners.insert(
                0, RunFolder(self.run_dir, self.spec, self.tokens_seen if self._has_begun else None)
            )
        self._has_begun = True
        if progress:
            listeners.append(ProgressLine(total_tokens, self.tokens_seen))
        try:
            while self.tokens_seen < total_tokens and not self.collector.stopping:
                started, before = time.perf_counter(), self.tokens_seen
                try:
                    metrics, episodes = self._iterate(total_tokens)
                except Stopped:
                    break
                metrics["time/tokens_per_second"] = (self.tokens_seen - before) / (
                    time.perf_counter() - started
                )
                for listener in listeners:
                    listener(metrics, episodes)
        except NotFinite as error:
            if self.run_dir is not None:
                write_failures(self.run_dir, error, self.spec, self.updates, self.tokens_seen)
            raise
        finally:
            self.collector.stopping = False
            for listener in listeners:
                getattr(listener, "close", lambda: None)()
        return self

    def stop(self) -> None:
        """Has `learn` return after the step or the update that is under way; for signal handlers,
        `on_update`, other threads.

        Nothing is lost: the next `learn`, of this agent or of one that is loaded from what it then
        saves, goes on there.
        """
        self.collector.stopping = True

    def _iterate(self, total_tokens: int) -> tuple[Metrics, list[Episode]]:
        episodes = self.collect()
        lr = learning_rate(
            self.config, run_progress(self.updated_at, self.tokens_seen, self.updates, total_tokens)
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        batch = EpisodeBatch.stack(episodes)
        self._check_batch(batch)  # before anything learns from it
        kl_coef, known = (
            self.kl_coef,
            {name: copy.copy(value) for name, value in self.statistics.items()},
        )
        try:
            metrics = summary(episodes) | self._rollout_metrics(batch) | self.update(batch)
        except BaseException:
            self.statistics.update(known)  # a batch that cannot be learnt from leaves no trace
            # Some minibatches may have had their step: no cache holds what the weights are now
            self.actor.refresh()
            raise
        self._adapt_kl_coef(batch)
        # Before weights are handed over, which may fail: the policy has had it.
        self.updates, self.updated_at = self.updates + 1, self.tokens_seen
        self.collector.refresh()
        return metrics | {
            "objective/kl_coef": kl_coef,
            "policy/lr": lr,
            "time/tokens": self.tokens_seen,
            "time/updates": self.updates,
        }, batch.unstack()

    def _check_batch(self, batch: EpisodeBatch) -> None:
        """Raises `InvalidArgument` where a setting needs log pi_ref, which the env does not
        report."""
        for name in ("kl_target", "k3_coef"):
            value = getattr(self.config, name, None)
            if value and not batch.ref_logprob_BT.any():
                raise InvalidArgument(f"{name}={value} needs an env that reports ref_logprob.")

    def _rollout_metrics(self, batch: EpisodeBatch) -> Metrics:
        """How old the texts are and, where an engine wrote them, how far its log-probs are from the
        learner's."""
        metrics = staleness(batch, self.updates) | waiting(self.collector.waiting)
        if self.config.rollout == "step":
            return metrics
        cfg = self.config
        batch.learned["learner_logprob"] = token_logprobs(
            self.policy, batch, cfg.max_batch_tokens, cfg.temperature
        )
        return metrics | mismatch(batch, self.updates)

    def rewards(self, batch: EpisodeBatch) -> Tensor:
        """Rewards (B, T) with the whole KL penalty: the env's, and the learner's half where the env
        pays only its own."""
        return self._penalised(batch.reward_BT, batch)

    def _penalised(self, rewards_BT: Tensor, batch: EpisodeBatch) -> Tensor:
        """What the env pays (B, T), and the learner's half of the KL penalty where the env pays
        only its own."""
        if not wants_logprob(self.envs):
            rewards_BT = kl_penalised(rewards_BT, batch.logprob_BT, batch.kl_coef_B)
        # What the two forwards leave of equal log-probs: where nothing else is earned, nothing may
        # be made of it.
        return rewards_BT.masked_fill(
            rewards_BT.abs() <= KL_ROUNDING * batch.kl_coef_B[:, None], 0.0
        )

    def sources(self, batch: EpisodeBatch) -> dict[str, Tensor]:
        """The rewards (B, T) by where they come from, which add up to `rewards`: each term of the
        env, or "reward" where it names none, and "kl", which is the whole penalty. None holds
        another's rounding, which a deviation would blow up."""
        terms = {name: values for name, values in batch.terms.items() if name != "kl"}
        if terms:
            return {
                **terms,
                "kl": self._penalised(
                    batch.terms.get("kl", torch.zeros_like(batch.reward_BT)), batch
                ),
            }
        beta_B1 = batch.kl_coef_B[:, None]
        penalty_BT = -beta_B1 * (batch.logprob_BT - batch.ref_logprob_BT)
        reward_BT, parts_BT = (
            self.rewards(batch) - penalty_BT,
            beta_B1 * (batch.logprob_BT.abs() + batch.ref_logprob_BT.abs()),
        )
        return {
            "reward": reward_BT.masked_fill(reward_BT.abs() <= ROUNDING * parts_BT, 0.0),
            "kl": penalty_BT,
        }

    def optimise(self, batch: EpisodeBatch, make_loss: Callable[[Tensor], LossFunction]) -> Metrics:
        """The epochs and minibatches of one update. `make_loss(weights_B)` gives the loss of a
        minibatch, in which a token of episode b counts `weights_B[b]`; a metric "policy/approx_kl",
        of the policy that the update began with, above `target_kl` ends it before its step.
        Whatever interrupts it, no gradient is left behind."""
        self.optimizer.zero_grad()
        try:
            seen = self._steps(batch, make_loss)
        finally:
            self.optimizer.zero_grad()
        names = dict.fromkeys(name for metrics in seen for name in metrics)
        means = {name: float(np.mean([m[name] for m in seen if name in m])) for name in names}
        return means | {"policy/minibatches": len(seen)}

    def _steps(
        self, batch: EpisodeBatch, make_loss: Callable[[Tensor], LossFunction]
    ) -> list[Metrics]:
        """The metrics of each minibatch."""
        cfg, seen = self.config, []
        for rows in self._minibatches(len(batch)):
            weights_B = torch.zeros(len(batch))
            lengths = batch.response_length_B[rows]
            weights_B[rows] = losses.token_weights(lengths, cfg.aggregation)
            metrics = accumulate_gradient(
                self.policy,
                batch,
                rows,
                make_loss(weights_B),
                cfg.max_batch_tokens,
                temperature=cfg.temperature,
                reference=self.reference,
                scale=losses.loss_scale(lengths, cfg.aggregation, self.max_new_tokens),
            )
            seen.append(metrics)
            if cfg.target_kl is not None and metrics.get("policy/approx_kl", 0.0) > cfg.target_kl:
                break
            metrics["policy/grad_norm"] = norm = float(
                clip_grad_norm_(self.policy.parameters(), cfg.max_grad_norm)
            )
            if not math.isfinite(norm):
                raise NotFinite(
                    f"the gradient's norm is {norm} in minibatch {len(seen) - 1} of update "
                    f"{self.updates}, with {metrics}; "
                    "the weights are as they were before that minibatch.",
                    texts=[episode for row, episode in enumerate(batch.unstack()) if row in rows],
                )
            self.optimizer.step()
            self.optimizer.zero_grad()
        return seen

    def _minibatches(self, num_episodes: int) -> Iterator[np.ndarray]:
        for _ in range(self.config.epochs):
            rows = self.rng.permutation(num_episodes)
            yield from np.array_split(rows, min(self.config.minibatches, num_episodes))

    def _adapt_kl_coef(self, batch: EpisodeBatch) -> None:
        """The proportional controller of Ziegler et al. 2019, in nats per response token:
        `beta *= 1 + clip(KL / target - 1, -0.2, 0.2) min(tokens / horizon, 1)`, which stays
        positive."""
        target, tokens = self.config.kl_target, int(batch.response_length_B.sum())
        if target is None:
            return
        kl = float((batch.logprob_BT - batch.ref_logprob_BT).sum()) / tokens
        self.kl_coef *= 1.0 + float(np.clip(kl / target - 1.0, -0.2, 0.2)) * min(
            tokens / self.config.kl_horizon, 1.0
        )

    def act(self, obs: Any) -> Tensor:
        """Tokens (N,) for an observation of this agent's envs, drawn from the policy."""
        return self.actor.act(obs)[0]

    def generate(self, prompts: Prompts, **options: Any) -> list[list[int]]:
        """Continues each prompt, read as the env reads its own, with the current policy; see
        `generate.generate` for the options."""
        defaults: dict[str, Any] = {"temperature": self.config.temperature}
        if self.spec is not None:
            defaults |= {
                "max_new_tokens": self.spec.max_new_tokens,
                "stop_token_ids": self.spec.stop_token_ids,
                "tokenizer": self.spec.tokenizer,
                "chats": self.spec.chats,
            }
        return generate(self.policy, prompts, **(defaults | options))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a checkpoint atomically, and keeps the one that was at `path` as `path`.previous.
        The run then goes on from the new one too, so that it and a resumed run stay equal. Raises
        `RunFolderError` where it cannot be written."""
        state = agent_state(self)
        write_checkpoint(path, state)
        self.collector.load_env(state["env"])

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        envs: VectorEnv,
        *,
        policy: LMPolicy | None = None,
        run_dir: str | os.PathLike[str] | None = None,
        **overrides: Any,
    ) -> Self:
        """The agent that `save` wrote, going on in `envs`; `policy` gives the architecture where it
        was not the default.

        An env that cannot save its state begins anew. Where the file is damaged, the one before it
        is taken, with a warning. Raises `CheckpointError` where file, agent and env do not fit, and
        `InvalidArgument` for a server's URL or an engine's options that a file may not give
        (`tokenenv.safety.trust`): say them again, as `rollout=` and `rollout_options=`.
        """
        state = read_newest(path, set_aside=run_dir is not None)
        with reading(path):
            check_state(
                state, cls.__name__, [field.name for field in fields(cls.config_class)], path
            )
            check_rollout(state["config"], path, overrides)
            config = cls.config_class(**state["config"])
        agent = cls(envs, config, policy=policy, run_dir=run_dir, **overrides)
        with reading(path):
            restore(agent, state)
        agent._has_begun = True
        if "kl_coef" in overrides:
            agent.kl_coef = overrides["kl_coef"]
        return agent


def check_rollout(config: dict[str, Any], path: object, said: Collection[str]) -> None:
    """Raises where a checkpoint's config asks for what a file may not, and is not said again."""
    entries = {"agent.rollout": config["rollout"]}
    if "rollout" in said or config["rollout"] != "step":
        entries |= {
            f"agent.rollout_options.{key}": value
            for key, value in config["rollout_options"].items()
        }
    again = {"rollout": "agent.rollout", "rollout_options": "agent.rollout_options.*"}
    check_from_file(entries, path, {again[name] for name in said if name in again})


def default_policy(envs: VectorEnv, config: AgentConfig) -> LMPolicy:
    """A policy that starts as the env's model."""
    model = getattr(envs.unwrapped, "model", None) or reference_of(
        envs, "give policy=LMPolicy(model)"
    )
    return LMPolicy(
        copy.deepcopy(model),
        separate_value=getattr(config, "separate_value", False),
        lora_rank=config.lora_rank,
        precision=config.precision,
        max_batch_tokens=config.max_batch_tokens,
        seed=config.seed,
    )
