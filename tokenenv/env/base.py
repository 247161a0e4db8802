"""What an env is and can tell without running texts: its task, its spaces, its models, and the
rewards of whole texts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from tokenenv.env import build, render, saved_state
from tokenenv.env.ambient import ordinary_tensors
from tokenenv.env.as_typed import AsTyped, as_typed
from tokenenv.env.config import check_kl_coef
from tokenenv.env.identity import identity
from tokenenv.env.memory import env_memory
from tokenenv.env.replies import answer, is_asked
from tokenenv.env.reset_options import read_own
from tokenenv.env.scoring import score_episodes
from tokenenv.env.scoring_arguments import read_weights
from tokenenv.errors import EnvClosed, Interrupted, InvalidArgument
from tokenenv.models.memory import Places
from tokenenv.rewards.term import Learned, RewardTerm
from tokenenv.tables import Columns
from tokenenv.turns import Reply, TextSoFar, segments_of
from tokenenv.types import EpisodeScores, SlotModel


class EnvBase(VectorEnv):
    """The half of `TokenVectorEnv` that runs no texts."""

    @ordinary_tensors
    def __init__(
        self,
        num_envs: int,
        task: build.TaskSource,
        render_mode: str | None,
        max_episode_steps: int | None,
        options: dict[str, Any],
    ) -> None:
        build.check_arguments(render_mode, max_episode_steps)
        self.config, self._task = build.split_options(task, options)
        self.num_envs = num_envs = build.check_num_envs(num_envs, self.config)
        self.render_mode = render_mode
        self.autoreset_mode = AutoresetMode(self.config.autoreset_mode)
        self.metadata = {
            "autoreset_mode": self.autoreset_mode,
            "render_modes": list(render.RENDER_MODES),
            "render_fps": 10,
        }
        self.token_spec = spec = build.token_spec_of(self._task, self.config.score_truncated)
        self.single_observation_space, self.single_action_space = build.single_spaces(
            self._task, spec, self.config
        )
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._engine = build.make_engine(self._task, spec, self.config, num_envs)
        self._kl_coef = check_kl_coef(
            self._task.kl_coef if self.config.kl_coef is None else self.config.kl_coef
        )
        self._interrupted: _Interrupted | None = None
        self.changes = 0
        """Calls that have changed the texts: what was made of them before the last one is out of
        date."""
        self.tokens_seen = 0
        """Tokens emitted in all slots since construction, those of an interrupted step aside;
        schedules are asked with it."""
        self.tokens_elsewhere = 0
        """Tokens that the envs of other processes have seen, where several learn together; the
        learner says it. Schedules are asked with the sum."""

    # ------------------------------------------------------------------- facts

    @property
    def reference(self) -> Any:
        """pi_ref, frozen."""
        return self._task.reference

    @property
    def model(self) -> Any:
        """The policy's default initial weights: the reference's, unless the task was given another
        model."""
        return self._task.model or self._task.reference

    @property
    def teacher(self) -> Any:
        """The language model to distil, or None where the task has none and none was given."""
        return self._task.teacher

    @property
    def frozen_models(self) -> dict[str, Any]:
        """The models that observations, rewards and watched terms are read from, by role, the
        reference first: nobody may train these."""
        self._require_open()
        return self._engine.frozen_models()

    @property
    def oracle(self) -> Any:
        """The task's exact optimum, or None where it is not known."""
        return self._task.oracle

    @property
    def reward_terms(self) -> Mapping[str, RewardTerm]:
        """The terms of the reward by name, "kl" included: what each declares of itself."""
        self._require_open()
        return dict(self._engine.rewards.terms)

    @property
    def biased_terms(self) -> tuple[str, ...]:
        """The terms of the reward under which reward-to-go does not estimate the gradient of the
        expected score without bias."""
        self._require_open()
        terms = self._engine.rewards.terms.items()
        return tuple(name for name, term in terms if term.preserves_gradient is False)

    @property
    def group_size(self) -> int:
        """The number of consecutive slots that share each prompt."""
        return self.config.group_size

    @property
    def prompts(self) -> Sequence[Sequence[int]]:
        """The prompts that episodes begin with, token ids; `infos["prompt_id"]` counts them."""
        return self._task.prompts

    @property
    def columns(self) -> Sequence[Columns]:
        """What belongs to each of `prompts`: the other columns of its row, by name. Empty where
        the prompts came without any."""
        return self._task.columns

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term of the reward, "kl" included, in an episode that begins now."""
        self._require_open()
        return self._engine.weights_now(self.tokens_seen + self.tokens_elsewhere, self._kl_coef)

    @property
    def device(self) -> torch.device:
        """Where the models, and the tensors of `array="torch"`, are."""
        self._require_open()
        return self._engine.context.device

    @property
    def kl_coef(self) -> float:
        """beta for the episodes that begin from now on, reward per nat."""
        return self._kl_coef

    @kl_coef.setter
    def kl_coef(self, value: float) -> None:
        self._kl_coef = check_kl_coef(value)

    @property
    def identity(self) -> dict[str, Any]:
        """What makes this env the one that a run was trained in, as plain values; a checkpoint of
        another is refused."""
        self._require_open()
        env_id = None if self.spec is None else self.spec.id
        terms, made_with = self._engine.rewards.terms, self._engine.context.kl_coef
        return identity(env_id, self.config, self._task, self.token_spec, terms, made_with)

    @property
    def as_typed(self) -> AsTyped:
        """What the command line would be told to make this env again."""
        self._require_open()
        return as_typed(self)

    @property
    def cache_bytes(self) -> int:
        """The memory that the caches take, in bytes."""
        self._require_open()
        return self._engine.trunks.cache_bytes

    def memory(self, places: Places | None = None) -> dict[str, int]:
        """Return the bytes that the weights of each model take, by role, and the caches. A memory
        that an earlier role has, or `places` has counted, does not count again."""
        self._require_open()
        return env_memory(self._engine, places or Places())

    def shares_backbone(self, model: Any) -> bool:
        """Return whether a policy's `model` is the frozen base of one of this env's models in
        memory, with adapters of its own or none, so that both can be read in one forward."""
        self._require_open()
        return self._engine.trunks.share_base(model)

    @ordinary_tensors
    def share_backbone(self, texts: SlotModel | None) -> SlotModel | None:
        """Have a policy's running texts read in this env's own forwards: `step` reads each token
        for the policy too, which then finds the state ready.

        Args:
            texts: as many as this env's, of a model that `shares_backbone`, at one precision with
                this env's; None: nobody's are read along from now on.

        Returns:
            What the policy reads its texts by from now on; `texts` where nothing can be shared. It
            is as good in another env, or beside another actor, where it reads for itself. Of
            several policies the last one is read along.
        """
        self._require_open()
        return self._engine.trunks.read_along(texts)

    # ------------------------------------------------------------- whole texts

    @ordinary_tensors
    def score_episodes(
        self,
        prompts: Sequence[Any],
        responses: Sequence[Any],
        *,
        logprobs: Sequence[Sequence[float]] | None = None,
        truncated: Sequence[bool] | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        own: Sequence[Sequence[bool]] | None = None,
        turn_rewards: Sequence[Sequence[float]] | None = None,
        kl_coef: float | Sequence[float] | None = None,
        weights: Mapping[str, float | Sequence[float]] | None = None,
        played: bool = False,
    ) -> EpisodeScores:
        """Return the rewards that stepping would have paid for B whole texts, from batched parallel
        forwards.

        Args:
            prompts: B texts or token id sequences; under a chat template texts are messages, and
                messages are taken too.
            responses: B texts or token id sequences, the stop token included where there was one,
                and nowhere else. A text goes on from its prompt as it stands: a new word begins
                with a space, and no special tokens are added. Where the environment writes into
                texts they are token ids, whoever wrote them, and a stop token may stand within.
            logprobs: log pi of every token of the policy's, in nats; needed under kl="policy".
            truncated: which texts were cut; by default those that do not end in a stop token, and
                never one that does (of the policy's, where the environment writes too: a text that
                the task ended needs False here). A cut text that is shorter than `max_new_tokens`
                was cut by whoever wrote it, and counts like one that reached it.
            columns: what belongs to the prompts: a list of B values, by name, for each column that
                the reward or the task's `gold` asks for.
            own: for each text which of its response tokens are the policy's; by default all. Only
                where the environment writes into texts.
            turn_rewards: the task's own rewards of turns, one number for each token of the policy's
                (`infos["turn_reward"]`); needed where a term of the reward pays them.
            kl_coef: beta of the episodes, 0 or more; by default the env's present one.
            weights: the weights of the reward's terms; by default the present ones, as are the
                statistics of terms that learn any.
            played: whether the texts count as played here: their tokens as seen, and as something
                for terms to learn from.
        """
        self._require_open()
        # Running texts are not looked at, so the mark of an interrupted call may stay.
        self._undo_interrupted()
        chosen = read_weights(self.weights, weights, kl_coef, self.config.kl)
        learned = self._engine.snapshot()
        try:
            scores = score_episodes(
                self._engine,
                prompts,
                responses,
                logprobs=logprobs,
                truncated=truncated,
                columns=columns,
                own=own,
                turn_rewards=turn_rewards,
                weights=chosen,
                learning=played,
            )
        except BaseException:
            # A reward server that is down, or Ctrl-C: texts that are scored again must not teach
            # twice.
            self._engine.load_statistics(learned)
            raise
        self.tokens_seen += int(scores.lengths.sum()) if played else 0
        return scores

    def reply(
        self,
        prompt: Sequence[int],
        response: Sequence[int],
        own: Sequence[bool],
        *,
        columns: Columns | None = None,
        seed: int = 0,
    ) -> Reply | None:
        """Return what the environment answers to a text that was written elsewhere, with the tokens
        as a list of ids; None where it is not asked, or has nothing to say.

        Args:
            prompt: token ids.
            response: token ids, the last one the policy's.
            own: which of them are the policy's.
            columns: what belongs to the prompt, by name.
            seed: the text's own number, 0 or more, from which the environment draws.

        Raises:
            InvalidArgument: `own` is no mask of the response, or its last token is not the
                policy's.
        """
        self._require_open()
        mask = read_own(own, len(response), "own")
        if not mask or not mask[-1]:
            raise InvalidArgument(
                f"own={own!r} must end with True: the environment answers a token of the policy's."
            )
        if not is_asked(self.token_spec, response[-1]):
            return None
        segments = segments_of(response, np.asarray(mask))
        text = TextSoFar(
            list(prompt), segments, self.token_spec.tokenizer, dict(columns or {}), seed
        )
        return answer(self._task, self.token_spec, text)

    @property
    def learns_from_texts(self) -> bool:
        """Whether terms learn from the texts that are played: what a text is paid then depends on
        those that were scored before it."""
        self._require_open()
        rewards = self._engine.rewards
        trains = rewards.model_version is not None
        return trains or bool(rewards.statistics()) or bool(self._engine.snapshot())

    @property
    def why_step(self) -> str | None:
        """What speaks for stepping this design, in words; None where nothing does. Whole texts are
        scored alike, but not faster, or by what has been learned from other texts."""
        self._require_open()
        rewards = self._engine.rewards
        reasons = {
            "the environment writes into texts": self.token_spec.responds,
            "a reward model is trained meanwhile": rewards.model_version is not None,
            "a term carries a memory along each text": bool(rewards.with_memory),
            "a term learns from the texts": bool(rewards.statistics()),
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    @property
    def reward_version(self) -> int | None:
        """Updates that the reward model has had which a term trains (`reward="prime"`); None where
        no term trains one."""
        self._require_open()
        return self._engine.rewards.model_version

    def policy_updated(self, updates: int) -> None:
        """Take in how many updates the policy has had. A learner says it when it begins and after
        each update, so that a reward model that is trained meanwhile keeps to its `max_lag`."""
        self._require_open()
        for term in self._engine.rewards.every.values():
            term.policy_updated(updates)

    def save_statistics(self) -> dict[str, Any]:
        """Return what terms have learned, by name: all that a run has to keep of this env beside
        its texts and `tokens_seen`. An interrupted call has taught nothing."""
        self._require_open()
        self._undo_interrupted()
        return self._engine.save_statistics()

    @ordinary_tensors
    def load_statistics(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `save_statistics` returned; raises `CheckpointError` where it is of other
        terms."""
        self._require_open()
        saved_state.check_statistics(saved, self._engine.layout(0))
        self._engine.load_statistics(saved)
        if self._interrupted is not None:
            self._interrupted = replace(self._interrupted, statistics=self._engine.snapshot())

    def check_joins(self) -> None:
        """Raise `InvalidArgument` where a term learns, and cannot take in what those of other
        processes have learned that train one policy with this one."""
        self._require_open()
        for name in self._engine.save_statistics():
            term = self._engine.rewards.every[name]
            if type(term).join is RewardTerm.join:
                raise InvalidArgument(
                    f"reward={name!r} learns from what it pays, and several processes train here: "
                    f"{type(term).__name__} must define join(before, parts)."
                )

    @ordinary_tensors
    def join_statistics(
        self, before: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]
    ) -> None:
        """Have terms take in what those of all processes have learned since `before`; each of
        `parts` is what `save_statistics` returned in one of them. Without parts, terms go on from
        `before`, with nothing of one process's own."""
        self._require_open()
        for name in before:
            term = self._engine.rewards.every[name]
            term.join(before[name], [part[name] for part in parts])

    # ------------------------------------------------------------ transactions

    @contextmanager
    def _changing(self, call: str, whole: bool = False) -> Iterator[None]:
        """Surround what must not stop half-way. Whatever interrupts it (Ctrl-C, no memory, a rule
        that raises) leaves a mark, and only a call that begins or loads all texts, a `whole` call,
        goes on from there."""
        if whole:
            self._undo_interrupted()
        self._interrupted = self._interrupted or _Interrupted(
            call, self.tokens_seen, self._engine.snapshot()
        )
        if whole:
            self._engine.forget()
        self.changes += 1
        yield
        # Not in a `finally`: after an exception the mark has to stay.
        self._interrupted = None

    def _undo_interrupted(self) -> None:
        """Take back what an interrupted call has counted and has taught terms."""
        if self._interrupted is not None:
            self.tokens_seen = self._interrupted.tokens_seen
            self._engine.load_statistics(self._interrupted.statistics)

    def _require_open(self) -> None:
        if self.closed:
            raise EnvClosed("this env is closed; make a new one.")

    def _require_whole(self) -> None:
        self._require_open()
        if self._interrupted is not None:
            raise Interrupted(
                f"{self._interrupted.call}() was interrupted half-way, so the env cannot go on; "
                "call reset() for all slots, or load_state() with all of them."
            )


@dataclass(frozen=True, slots=True)
class _Interrupted:
    """The mark of a call that has not come to its end, and what the env had as a whole before
    it."""

    call: str
    tokens_seen: int
    statistics: dict[str, Learned]
