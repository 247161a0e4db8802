"""The loop that all bundled agents share: collect texts, learn from them, tell who listens.

An algorithm is a subclass with a config and an `update`; `algorithms/ppo.py` is one. What surrounds
the loop is in the rooms beside this file: `rollout/` makes episodes, `learning/` makes gradients,
`run/` writes folders and checkpoints.

Several processes may learn one policy together (ranks, `tokenenv.ranks`). Each has an env of its
own and collects a part of every batch. Then all of them have the whole batch, so that everything
that is made of it is the same on each; only the forwards and backwards over it are shared out
(`learning/learner.py`).

Suffixes: N slots, B episodes, T response tokens.
"""

import copy
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from gymnasium.vector import VectorEnv
from torch import Tensor

from tokenenv import ranks
from tokenenv.agents.config import AgentConfig, build_config, learning_rate, run_progress
from tokenenv.agents.episodes import Episode, EpisodeBatch, summary, turn_summary
from tokenenv.agents.hooks import check_config_class, check_statistics, described
from tokenenv.agents.learning.kl_rewards import adapted, by_source, with_penalty
from tokenenv.agents.learning.learner import FrozenLM, Metrics
from tokenenv.agents.learning.optimise import MakeLoss, optimise
from tokenenv.agents.learning.optimizers import make_optimizer
from tokenenv.agents.learning.policy import LMPolicy
from tokenenv.agents.learning.rates import default_lr
from tokenenv.agents.learning.update_kl import warn_if_far
from tokenenv.agents.rollout.choose import choose_rollout
from tokenenv.agents.rollout.collector import Prefix, Stopped
from tokenenv.agents.rollout.ending import Ending
from tokenenv.agents.rollout.env_rows import (
    env_core,
    learned_together,
    reference_of,
    responds,
    teacher_of,
    wants_logprob,
)
from tokenenv.agents.rollout.generate import Prompts, generate, options_of
from tokenenv.agents.rollout.make import default_policy, make_actor, make_collector
from tokenenv.agents.rollout.replay import Replay
from tokenenv.agents.rollout.requirements import (
    check_default_dtype,
    check_env,
    check_kl,
    check_policy,
    check_ref_logprob,
    group_size_of,
    warn_if_biased,
)
from tokenenv.agents.rollout.staleness import reward_lag, rollout_metrics, waiting
from tokenenv.agents.run.card import model_card
from tokenenv.agents.run.checkpoint import (
    agent_state,
    read_agent,
    reading,
    restore,
    write_checkpoint,
)
from tokenenv.agents.run.listeners import OnUpdate, listening
from tokenenv.errors import InvalidArgument, check_number
from tokenenv.tables import Columns


class Agent:
    """Base of the bundled agents.

    Args:
        envs: a vector env of texts, such as `gym.make_vec("tokenenv/Reviews-v0", num_envs=64)`;
            with SAME_STEP no step is lost.
        config: an instance of the agent's config; None is the default one.
        policy: what to train; None is a copy of the env's model.
        run_dir: the run folder, one without a run in it: config, TensorBoard events, episodes and,
            at the end of `learn`, a checkpoint, for `tokenenv evaluate`, `show` and `train
            --resume`. None writes nothing.
        **overrides: single fields of the config.
    """

    config_class: ClassVar[type[AgentConfig]] = AgentConfig
    algo: ClassVar[str]
    """The name of a bundled algorithm on the command line; other classes have none of their own."""
    grouped: ClassVar[bool] = False
    """Whether texts are compared with others of their prompt: the env needs a `group_size`, and
    batches hold whole groups."""

    learns: ClassVar[bool] = True
    """Whether updates train the policy. If not, the default one shares all weights with the env's
    model."""

    own_statistics: ClassVar[tuple[str, ...]] = ()
    """Names of `running_statistics` that are of one process's texts, where several learn together;
    the others are the same on all of them."""

    reads_values: ClassVar[bool] = False
    """Whether the critic's values of the states that tokens are drawn in are kept with the texts
    (`Episode.drawn_value`), where the policy's own states give them."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        check_config_class(cls, [base for base in cls.__mro__[1:] if hasattr(base, "config_class")])

    # ---------------------------------------------------------------- what an algorithm says

    def update(self, batch: EpisodeBatch) -> Metrics:
        """Learn from finished episodes and return scalars to log.

        What an algorithm makes of each token goes into `batch.learned`.
        """
        raise NotImplementedError(f"{type(self).__name__} must define update(batch).")

    def collect(self) -> list[Episode]:
        """Return the finished episodes that the next update learns from: this rank's part."""
        return self.collector.collect(self.batch_tokens)

    def running_statistics(self) -> dict[str, Any]:
        """Return what the algorithm keeps besides weights, by name.

        Each is an object with `state_dict` and `load_state_dict`, which checkpoints use, and with a
        `copy.copy` that does not change when the object does.
        """
        return {}

    # ---------------------------------------------------------------- making one

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
        self.config = cfg = build_config(self.config_class, config, overrides)
        check_kl(envs, cfg.kl_coef, cfg.kl_target)
        self.envs, self.core = envs, env_core(envs)
        self.spec = getattr(self.core, "token_spec", None)
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.run_config: Mapping[str, Any] | None = None
        """What the run folder's config says; None: what agent and env say of themselves."""
        self.own_policy = policy is not None
        """Whether the policy was given, so that only Python can make it again."""
        self.policy = policy or default_policy(envs, cfg, learns=self.learns)
        check_policy(self.policy, envs, learns=self.learns)
        self.chose_lr = cfg.lr is None
        """Whether the learning rate is the default one for what is trained. A run's config leaves
        it open then: a run that is made from it, with other weights to train, has its own."""
        if cfg.lr is None:
            self.config = cfg = replace(cfg, lr=default_lr(self.policy))
        if cfg.rollout == "auto":
            chosen = ranks.of_first(lambda: choose_rollout(envs, self.policy, cfg))
            self.config = cfg = replace(cfg, rollout=chosen)
        # A policy of one's own need not say it; its values are then read before updates.
        with_values = self.reads_values and getattr(self.policy, "acts_with_values", False)
        # Slot i of an env draws its prompts from seed + i. The ranks' slots are numbered on from
        # rank to rank, as if they were slots of one env.
        slots = ranks.gathered(envs.num_envs)
        self.num_envs = sum(slots)
        """Texts that are written side by side, by all ranks."""
        seed = cfg.seed + sum(slots[: ranks.number()])
        self.actor = make_actor(envs, self.policy, cfg, seed=seed, reads_values=with_values)
        self.group_size = group_size_of(envs, type(self).__name__) if self.grouped else 1
        self.collector = make_collector(envs, self.actor, cfg, self.group_size, seed=seed)
        self.pending = Replay(sys.maxsize)
        """Texts that this rank has collected for an update that has not come yet."""
        self.joined: Any = learned_together(envs)
        """What the ranks' envs had learned when they last told each other."""
        ranks.take_first(list(self.policy.parameters()))
        weights = [weight for weight in self.policy.parameters() if weight.requires_grad]
        assert cfg.lr is not None
        self.optimizer = make_optimizer(cfg.optimizer, weights, cfg.lr)
        self.rng = np.random.default_rng(cfg.seed)
        self.reference = None
        if getattr(cfg, "full_kl_coef", 0.0):
            model = reference_of(envs, "leave full_kl_coef at 0")
            self.reference = FrozenLM(model, self.policy.vocab_size)
        self.teacher = None
        if getattr(cfg, "distill_coef", 0.0):
            self.teacher = FrozenLM(teacher_of(envs), self.policy.vocab_size)
        self.updates = 0
        self.updated_at = 0
        """Tokens that had been seen after the last update."""
        self.own_updated_at = 0
        """The same, of this rank's alone."""
        self.others_seen = 0
        """Tokens that the other ranks have emitted, as they have last said."""
        self.statistics: dict[str, Any] = self.running_statistics()
        check_statistics(self.statistics, type(self).__name__)
        self.metrics: Metrics = {}
        """What the last update of this object logged."""
        self._has_warned = False
        self._has_begun = False
        """Whether what is in the run folder is this agent's."""

    @property
    def tokens_seen(self) -> int:
        """Tokens emitted so far, by all ranks."""
        return self.collector.tokens_seen + self.others_seen

    @property
    def batch_tokens(self) -> int:
        """Response tokens that this rank collects for an update, at least."""
        return -(-self.config.batch_tokens // ranks.count())

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

    # ---------------------------------------------------------------- the loop

    def learn(
        self,
        total_tokens: int,
        *,
        progress: bool = False,
        on_update: OnUpdate | None = None,
        checkpoint_every: int | None = None,
    ) -> Self:
        """Learn until `total_tokens` tokens have been seen in all, those before a `load` included.

        Tokens are counted as they are written, those of running texts included. The last update
        learns from what has ended when `total_tokens` have been seen, one text or group at least,
        and from no less than about half a batch where the run is longer than that. So a run goes
        beyond its end by less than one token in each slot, or until the texts have ended that
        `max_staleness` or an engine waits for; VinePPO's continuations of the last batch come on
        top. `tokens_seen` is the exact number, and the progress line ends with it. `learn(a)` and
        then `learn(b)` is thus not `learn(b)`: it has an update that ends at a, and the schedule of
        a run of a tokens up to there.

        `progress` shows a live line. `on_update(metrics, episodes)` is called after each update,
        and may `save` or `stop`. In a `run_dir` a checkpoint is written at the end, and with
        `checkpoint_every` also at the beginning and after every so many updates. Raises
        `InvalidArgument` where a new agent's `run_dir` holds a run, and `RunFolderError` where
        another process trains there, or where nothing more can be written there.
        """
        check_default_dtype()
        check_number("total_tokens", total_tokens)
        if not math.isfinite(total_tokens):
            raise InvalidArgument(f"total_tokens={total_tokens} must be a finite number.")
        if self.config.kl_coef is not None and self.updates == 0:
            self.kl_coef = self.config.kl_coef
        new = not self._has_begun
        with listening(
            self,
            total_tokens,
            new=new,
            progress=progress,
            on_update=on_update,
            checkpoint_every=checkpoint_every,
        ) as listeners:
            self._has_begun = True
            try:
                while not self._count_tokens() and self.tokens_seen < total_tokens:
                    self.metrics, episodes = self._iterate(total_tokens)
                    for listener in listeners:
                        listener(self.metrics, episodes)
            except Stopped:
                pass  # the texts are kept: the next `learn` goes on with them
            finally:
                self.collector.stopping, self.collector.ending = False, Ending()
        return self

    def stop(self) -> None:
        """Have `learn` return after the step or the update that is under way; for signal handlers,
        `on_update`, other threads.

        Nothing is lost: the next `learn`, of this agent or of one that is loaded from what it then
        saves, goes on there.
        """
        self.collector.stopping = True

    def _iterate(self, total_tokens: int) -> tuple[Metrics, list[Episode]]:
        """One update: its scalars, and the episodes with what was learnt of them."""
        started, before = time.perf_counter(), self.tokens_seen
        begun, share = self.own_updated_at, (total_tokens - self.updated_at) / ranks.count()
        self.collector.ending = Ending.of(begun + share, begun, self.batch_tokens)
        episodes = self._collected()
        lr = self._schedule(total_tokens)
        batch, kl_coef = EpisodeBatch.stack(episodes), self.kl_coef
        check_ref_logprob(batch, self.config)  # before anything learns from it
        with self._whole_or_nothing():
            metrics = summary(episodes) | rollout_metrics(
                batch,
                self.policy,
                self.config,
                self.updates,
                with_values=self.reads_values,
            )
            metrics |= ranks.summed(waiting(self.collector.waiting))
            metrics |= turn_summary(episodes) if responds(self.envs) else {}
            metrics |= reward_lag(batch, getattr(self.core, "reward_version", None))
            found = self.update(batch)
            if not isinstance(found, Mapping):
                raise InvalidArgument(
                    f"{type(self).__name__}.update returned {described(found)}; it must return the "
                    f"metrics to log, a dict such as self.optimise(batch, make_loss) returns."
                )
            metrics |= found
        self._adapt_kl_coef(batch)
        # Counted before the weights are handed over, which may fail: the policy has had its update.
        self._count_tokens()
        self.updates, self.updated_at = self.updates + 1, self.tokens_seen
        self.own_updated_at = self.collector.tokens_seen
        self.collector.refresh()
        self.joined = learned_together(self.envs, self.joined)
        speed = (self.tokens_seen - before) / (time.perf_counter() - started)
        return metrics | {
            "objective/kl_coef": kl_coef,
            "policy/lr": lr,
            "time/tokens": self.tokens_seen,
            "time/updates": self.updates,
            "time/tokens_per_second": speed,
        }, batch.unstack()

    def _count_tokens(self) -> bool:
        """Ask all ranks for the tokens that they have seen; return whether one is to stop."""
        own, of_env = self.collector.tokens_seen, getattr(self.core, "tokens_seen", 0)
        found = ranks.gathered((own, of_env, self.collector.stopping))
        seen, of_envs, stopping = zip(*found, strict=True)
        self.others_seen = sum(seen) - own
        if hasattr(self.core, "tokens_elsewhere"):
            self.core.tokens_elsewhere = sum(of_envs) - of_env
        return any(stopping)

    def _collected(self) -> list[Episode]:
        """Return the finished episodes that all ranks have collected, in the ranks' order.

        Raises `Stopped` where one of them is to stop. What the others have collected is pending
        then, and the next call goes on with it.
        """
        if ranks.count() == 1:
            return self.collect()

        def own() -> list[Episode]:
            if not self.pending.episodes:
                with suppress(Stopped):
                    self.pending.add(self.collect())
            return list(self.pending.episodes)

        parts = ranks.each(own)
        if self._count_tokens():
            raise Stopped
        self.pending.take()
        return [episode for part in parts for episode in part]

    @contextmanager
    def _whole_or_nothing(self) -> Iterator[None]:
        """Around an update: a batch that cannot be learnt from leaves no trace in statistics."""
        known = {name: copy.copy(value) for name, value in self.statistics.items()}
        try:
            yield
        except BaseException:
            self.statistics.update(known)
            # Some minibatches may have had their step, and what the collector holds of the texts
            # that are on their way is of the weights before it.
            self.collector.weights_moved()
            raise

    def _schedule(self, total_tokens: int) -> float:
        """Set and return the learning rate of the next update."""
        over = run_progress(self.updated_at, self.tokens_seen, total_tokens)
        lr = learning_rate(self.config, over)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _adapt_kl_coef(self, batch: EpisodeBatch) -> None:
        target, horizon = self.config.kl_target, self.config.kl_horizon
        if target is not None:
            self.kl_coef = adapted(self.kl_coef, batch, target=target, horizon=horizon)

    # ---------------------------------------------------------------- what an update is made of

    def rewards(self, batch: EpisodeBatch) -> Tensor:
        """Return rewards (B, T) with the whole KL penalty: what the env pays, and the learner's
        half where the env pays only its own."""
        return with_penalty(batch.reward_BT, batch, env_pays_all=wants_logprob(self.envs))

    def sources(self, batch: EpisodeBatch) -> dict[str, Tensor]:
        """Return `rewards` (B, T) by where they come from: each term of the env, or "reward" where
        it names none, and "kl", which is the whole penalty."""
        return by_source(batch, env_pays_all=wants_logprob(self.envs))

    def optimise(self, batch: EpisodeBatch, make_loss: MakeLoss) -> Metrics:
        """Take the epochs and minibatches of one update; see `learning.optimise` for the loss. Warn
        the first time that an update moves the policy far (`learning.update_kl`)."""
        metrics = optimise(
            self.policy,
            self.optimizer,
            batch,
            make_loss,
            self.config,
            rng=self.rng,
            update=self.updates,
            max_new_tokens=self.max_new_tokens,
            reference=self.reference,
            teacher=self.teacher,
        )
        if not self._has_warned:
            lr = self.optimizer.param_groups[0]["lr"]
            self._has_warned = warn_if_far(metrics["policy/update_kl"], self.updates, lr)
        return metrics

    def play_on(
        self, states: Sequence[Prefix], rollouts: int, columns: Sequence[Columns] = ()
    ) -> list[Episode]:
        """Return `rollouts` continuations of each state to the end, one after the other; `columns`
        are what belongs to the prompt of each state. Each rank writes those of some states, and all
        ranks have all of them."""
        own = range(ranks.number(), len(states), ranks.count())
        mine = [states[i] for i in own], rollouts, [columns[i] for i in own] if columns else ()
        played = ranks.each(lambda: self.collector.play_on(*mine) if len(own) else [])
        found = [iter(part) for part in played]
        return [next(found[i % ranks.count()]) for i in range(len(states)) for _ in range(rollouts)]

    # ---------------------------------------------------------------- using the policy

    def act(self, obs: Any) -> Tensor:
        """Return tokens (N,) for an observation of this agent's envs, drawn from the policy."""
        return self.actor.act(obs)[0]

    def generate(self, prompts: Prompts, **options: Any) -> list[list[int]]:
        """Continue each prompt, read as the env reads its own, with the current policy; see
        `rollout.generate.generate` for the options.

        Where the env writes into texts, this is the policy's first turn: it ends with a token after
        which the env would be asked. `run.evaluate.evaluate(agent, envs, prompts=...)` plays whole
        texts.
        """
        defaults = {"temperature": self.config.temperature} | options_of(self.spec)
        return generate(self.policy, prompts, **(defaults | options))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint atomically, and keep the one that was at `path` as `path`.previous.
        All ranks call it, and the first writes.

        Raises `RunFolderError` where it cannot be written.
        """
        state = agent_state(self)
        ranks.of_first(lambda: write_checkpoint(path, state))
        # This run goes on from the file too, with caches filled anew. A resumed run does the same,
        # so both stay equal, bit for bit.
        self.collector.load_env(state["ranks"][ranks.number()]["env"])

    def save_pretrained(self, directory: str | os.PathLike[str], *, merge: bool = False) -> None:
        """Write the policy as a folder that others load: full weights for transformers, or under
        LoRA the adapter for peft; with the tokenizer and a model card. Of processes that learn
        together the first writes.

        With `merge` an adapter is added to the weights that it adapts, and full weights are
        written. The critic is not part of it; `save` writes it. See `LMPolicy.save_pretrained`.
        """
        if ranks.number() == 0:
            self.policy.save_pretrained(
                directory,
                merge=merge,
                tokenizer=getattr(self.spec, "tokenizer", None),
                card=model_card(self, merge=merge),
            )

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
        """Return the agent that `save` wrote, going on in `envs`.

        `policy` gives the architecture where it was not the default. An env that cannot save its
        state begins anew. Where the file is damaged, the one before it is taken, with a warning.
        Raises `CheckpointError` where file, agent and env do not fit, and `InvalidArgument` for a
        server's URL or an engine's options that a file may not give (`tokenenv.safety.trust`): say
        them again, as `rollout=` and `rollout_options=`.
        """
        state, config = ranks.of_first(
            lambda: read_agent(path, cls, overrides, set_aside=run_dir is not None)
        )
        agent = cls(envs, config, policy=policy, run_dir=run_dir, **overrides)
        with reading(path):
            restore(agent, state)
        agent._has_begun = True
        if "kl_coef" in overrides:
            agent.kl_coef = overrides["kl_coef"]
        return agent
