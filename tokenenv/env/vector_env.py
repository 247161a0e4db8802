"""TokenVectorEnv: text generation as a batched Gymnasium environment. The only `step` with
logic."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from tokenenv.env import build, render, saved_state
from tokenenv.env.actions import read_actions, require_valid, token_codes
from tokenenv.env.ambient import ordinary_tensors
from tokenenv.env.config import check_kl_coef
from tokenenv.env.engine import Ends, Paid
from tokenenv.env.identity import identity
from tokenenv.env.infos import Infos
from tokenenv.env.reset_options import Seed, read_options, read_seed
from tokenenv.env.scoring import recall_prefixes, score_episodes
from tokenenv.env.streams import PromptStreams
from tokenenv.env.texts import TextBuffer
from tokenenv.errors import (
    EnvClosed,
    FinishedRow,
    Interrupted,
    InvalidArgument,
    NotReset,
    check_choice,
)
from tokenenv.models.pieces import TokenPieces
from tokenenv.types import EpisodeScores


class TokenVectorEnv(VectorEnv):
    """N texts: each step appends one token to each and returns one dense reward for each.

    Observation: `tokens` (N, L) int64 right-padded, `length` and `prompt_length` (N,) int64; with
    `observation="features"` the reference's last hidden state (N, H) float32. Action: token ids
    (N,); with `kl="policy"` a dict of `token` (N,) and `logprob` (N,) in nats. Rewards are float32
    (N,).

    Args:
        num_envs: N.
        task: a function that returns a `Task`, "module:function" naming one, or a `Task`; the
            registered id sets it.
        render_mode: what `render` gives of each text: "ansi", a string with terminal colours;
            "rgb_array", a picture; "human" prints them after every step.
        max_episode_steps: refused; the length of a text is `max_new_tokens`.
        **options: the fields of `tokenenv.env.config.EnvConfig`, and those of the task's function.
    """

    @ordinary_tensors
    def __init__(
        self,
        num_envs: int = 1,
        *,
        task: build.TaskSource,
        render_mode: str | None = None,
        max_episode_steps: int | None = None,
        **options: Any,
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
        self._texts = TextBuffer(
            num_envs, spec.max_prompt_tokens + spec.max_new_tokens, spec.pad_token_id, self.device
        )
        self._pieces = TokenPieces(spec.tokenizer)
        self._is_stop = np.isin(np.arange(spec.vocab_size), spec.stop_token_ids)
        self._prompt_id = np.zeros(num_envs, dtype=np.int64)
        self._episode_kl_coef = np.zeros(num_envs, dtype=np.float32)
        self._ended = np.zeros(num_envs, dtype=bool)
        self._streams = PromptStreams(self._task.prompts, num_envs, self.config.group_size)
        self._streams.reseed(
            read_seed(np_random()[1] % 2**31, num_envs), np.ones(num_envs, dtype=bool)
        )
        self._interrupted: _Interrupted | None = None
        self.changes = 0
        """Calls that have changed the texts: what was made of them before the last one is out of
        date."""
        self._kl_coef = check_kl_coef(
            self._task.kl_coef if self.config.kl_coef is None else self.config.kl_coef
        )
        self.tokens_seen = 0
        """Tokens emitted in all envs since construction, those of an interrupted step aside;
        schedules are asked with it."""

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
    def frozen_models(self) -> dict[str, Any]:
        """What observations and rewards are read from, by role, the reference first: nobody may
        train these."""
        self._require_open()
        return self._engine.frozen_models()

    @property
    def oracle(self) -> Any:
        """The task's exact optimum, or None where it is not known."""
        return self._task.oracle

    @property
    def biased_terms(self) -> tuple[str, ...]:
        """The paid terms under which reward-to-go does not estimate the gradient of the expected
        score without bias."""
        self._require_open()
        terms = self._engine.rewards.terms.items()
        return tuple(name for name, term in terms if term.preserves_gradient is False)

    @property
    def group_size(self) -> int:
        """How many consecutive slots share each prompt."""
        return self.config.group_size

    @property
    def prompts(self) -> Sequence[Sequence[int]]:
        """The prompts that episodes begin with, token ids; `infos["prompt_id"]` counts them."""
        return self._task.prompts

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term, "kl" included, in an episode that begins now."""
        self._require_open()
        return self._engine.weights_now(self.tokens_seen, self._kl_coef)

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
    def cache_bytes(self) -> int:
        """The memory that the caches take, in bytes."""
        self._require_open()
        return self._engine.trunks.cache_bytes

    @ordinary_tensors
    def reset(
        self, *, seed: Seed = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begins new texts in every slot, or in those of `options["reset_mask"]`.

        Args:
            seed: slot i draws its prompts from seed + i, or from seed[i] (a group from its first
                slot's), from the first one on; None goes on. One whole number also seeds
                `np_random`, which this env does not draw from.
            options: `reset_mask` (N,) bool, at least one True; `prompts`, one text or sequence of
                token ids an env (under a chat template a text is one message of the user's, and a
                list of messages is taken too); `prefixes`, likewise: the beginning of each
                response, which uses up `max_new_tokens` and earns nothing; a text goes on from the
                prompt as it stands, without special tokens. Without a mask each group goes on with
                a new prompt; with one its texts keep their order, as where they end and begin by
                themselves.

        Raises:
            InvalidArgument: an argument is not allowed; nothing changes. `seed` with a mask that
                parts a group is not.
        """
        self._require_open()
        given, seeds = (
            read_options(options, self.num_envs, self.token_spec),
            read_seed(seed, self.num_envs),
        )
        if not given.mask.all():
            self._require_reset()
        if seed is not None and self._streams.split_groups(given.mask):
            raise InvalidArgument(
                "options['reset_mask'] holds a part of a group, which shares prompts; seed= takes "
                "all of it."
            )
        with self._changing("reset", whole=bool(given.mask.all())):
            if isinstance(seed, (int, np.integer)):
                super().reset(seed=int(seed))
            if not given.masked:
                self._streams.round_up()
            self._streams.reseed(seeds, given.mask)
            infos = self._begin(given.mask, given.prompts, given.prefixes)
            self._render_for_people()
            return self._observation(), infos.to_dict(self._export)

    @ordinary_tensors
    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Appends one token to each text.

        Returns:
            (observations, rewards (N,) float32, terminations (N,) bool, truncations (N,) bool,
            infos).

        Raises:
            InvalidAction: a token id out of range, a wrong batch size, a missing or non-finite
                logprob; nothing changes.
            FinishedRow: a finished row is stepped under DISABLED; nothing changes.
        """
        self._require_reset()
        active = self._active_rows()
        tokens, logprob = self._check_actions(actions, active)
        with self._changing("step"):
            return self._step(tokens, logprob, active)

    def _step(
        self, tokens: np.ndarray, logprob: Tensor | None, active: np.ndarray
    ) -> tuple[Any, Any, Any, Any, Any]:
        self._texts.append(tokens, active)
        ends = self._find_ends(tokens, active)
        self.tokens_seen += int(active.sum())
        paid = self._engine.step(self._texts.upload(tokens), logprob, active, ends, self._texts)
        ended = ends.ended
        self._ended = ended.copy()
        infos = self._step_infos(paid, active, ended)
        infos.add("cut", ends.truncated.copy(), ended)
        final: dict[str, Any] = {}
        if self.autoreset_mode == AutoresetMode.NEXT_STEP and not active.all():
            infos.overlay(self._begin(~active))
        elif self.autoreset_mode == AutoresetMode.SAME_STEP and ended.any():
            final = self._final(infos, ended)
            infos.overlay(self._begin(ended))
        flags = map(self._export, ends.flags(self.config.cut))
        info = infos.to_dict(self._export) | final
        self._render_for_people()
        return self._observation(), self._export(paid.reward), *flags, info

    def render(self) -> tuple[Any, ...] | None:
        """One string or picture (H, W, 3) uint8 for each text, by `render_mode`; the rewards in it
        are those paid so far."""
        if self.render_mode is None:
            return None
        self._require_reset()
        return self._show()

    @ordinary_tensors
    def fork(self, sources: Sequence[int], targets: Sequence[int]) -> tuple[Any, dict[str, Any]]:
        """Copies the running episodes `sources` onto the slots `targets`, caches included; returns
        (obs, info).

        Prompt streams stay with their slots. The info is a reset's, for the targets.
        """
        self._require_reset()
        source, target = (
            saved_state.check_slots(sources, self.num_envs),
            saved_state.check_slots(targets, self.num_envs),
        )
        if len(source) != len(target) or len(set(target)) != len(target):
            raise InvalidArgument(
                f"fork needs one distinct target a source; got {list(sources)} and {list(targets)}."
            )
        if self._ended[source].any():
            raise InvalidArgument(
                f"sources={list(sources)} holds finished episodes; only running ones can be copied."
            )
        with self._changing("fork"):
            self._texts.fork(source, target)
            self._engine.fork(source, target, self._texts)
            for array in (self._prompt_id, self._episode_kl_coef, self._ended):
                array[target] = array[source]
            return self._observation(), self._start_infos(target).to_dict(self._export)

    @ordinary_tensors
    def save_state(self, slots: Sequence[int] | None = None) -> dict[str, Any]:
        """The episodes of `slots` (all by default) and their prompt streams, without caches: arrays
        and numbers only."""
        self._require_reset()
        chosen = np.unique(
            saved_state.check_slots(range(self.num_envs) if slots is None else slots, self.num_envs)
        )
        return {
            "format": saved_state.FORMAT,
            "slots": chosen,
            "texts": self._texts.save(chosen),
            "engine": self._engine.save(chosen, self._texts),
            "prompt_id": self._prompt_id[chosen],
            "episode_kl_coef": self._episode_kl_coef[chosen],
            "ended": self._ended[chosen],
            "streams": self._streams.save(chosen),
            "kl_coef": self._kl_coef,
            "tokens_seen": self.tokens_seen,
        }

    @ordinary_tensors
    def load_state(self, saved: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Takes up saved episodes in the slots they were saved from, here or in another env of the
        same id.

        Caches are filled from the texts. What belongs to the env as a whole (`tokens_seen`,
        `kl_coef`, what terms have learned) is taken up with all of its slots only, and a group's
        prompts with all of the group's. Returns (obs, info); the info is a reset's, for those
        slots. Nothing of `saved` is kept or changed: it may be loaded again.
        """
        self._require_open()
        slots = saved_state.check_state(
            saved, self.num_envs, self.config.group_size, self.token_spec, self._engine.layout
        )
        whole = len(slots) == self.num_envs
        if not whole:
            self._require_reset()
        with self._changing("load_state", whole=whole):
            self._texts.load(slots, saved["texts"])
            if whole:
                self._engine.load_statistics(saved["engine"]["learned"])
                self._kl_coef, self.tokens_seen = float(saved["kl_coef"]), int(saved["tokens_seen"])
            self._engine.load(slots, self._texts, saved["engine"])
            self._prompt_id[slots], self._ended[slots] = saved["prompt_id"], saved["ended"]
            self._episode_kl_coef[slots] = saved["episode_kl_coef"]
            self._streams.load(slots, saved["streams"])
            if (
                self.autoreset_mode == AutoresetMode.SAME_STEP and self._ended.any()
            ):  # saved under another mode
                self._begin(self._ended.copy())
            return self._observation(), self._start_infos(slots).to_dict(self._export)

    @ordinary_tensors
    def ref_logprobs(self) -> Any:
        """log pi_ref of every next token of the texts as they stand, (N, V) float32, in nats."""
        self._require_reset()
        return self._export(self._engine.ref_logprobs())

    def responses(self) -> list[list[int]]:
        """The response tokens of the texts as they stand."""
        self._require_reset()
        texts = self._texts
        spans = zip(texts.tokens, texts.prompt_length, texts.length, strict=True)
        return [row[start:end].tolist() for row, start, end in spans]

    def decode(self, observation: Mapping[str, Any]) -> list[str]:
        """The texts, prompt and response, of a token observation, batched or of one text."""
        if self.token_spec.tokenizer is None or not isinstance(observation, Mapping):
            raise InvalidArgument(
                "decode needs a token observation, and a task whose tokens have text."
            )
        tokens, lengths = (_host(observation.get(key)) for key in ("tokens", "length"))
        if (
            tokens.dtype.kind not in "iu"
            or lengths.dtype.kind not in "iu"
            or tokens.shape[:-1] != lengths.shape
        ):
            raise InvalidArgument(
                "decode needs the tokens and length of an observation; these are no such arrays."
            )
        rows = [
            row[:length].tolist()
            for row, length in zip(np.atleast_2d(tokens), np.atleast_1d(lengths), strict=True)
        ]
        return self.token_spec.tokenizer.batch_decode(rows, skip_special_tokens=True)

    @ordinary_tensors
    def score_episodes(
        self,
        prompts: Sequence[Any],
        responses: Sequence[Any],
        *,
        logprobs: Sequence[Sequence[float]] | None = None,
        truncated: Sequence[bool] | None = None,
        kl_coef: float | Sequence[float] | None = None,
        weights: Mapping[str, float | Sequence[float]] | None = None,
        played: bool = False,
    ) -> EpisodeScores:
        """The rewards that stepping would have paid for B whole texts, in batched parallel
        forwards.

        Args:
            prompts: B texts or token id sequences; under a chat template texts are messages, and
                messages are taken too.
            responses: B texts or token id sequences, the stop token included where there was one,
                and nowhere else. A text goes on from its prompt as it stands: a new word begins
                    with a space, and no special tokens are added.
            logprobs: log pi of every response token, in nats; needed under kl="policy".
            truncated: which texts were cut; by default those that do not end in a stop token, and
                never one that does. A cut text that is shorter than `max_new_tokens` was cut by
                whoever wrote it, and counts like one that reached it.
            kl_coef: beta of the episodes, 0 or more; by default the env's present one.
            weights: the terms' weights; by default the present ones, as are the statistics of terms
                that learn any.
            played: whether the texts count as played here: their tokens as seen, and as something
                for terms to learn from.
        """
        self._require_open()
        # Running texts are not looked at, so the mark of an interrupted call may stay
        self._undo_interrupted()
        if kl_coef is not None and self.config.kl == "none":
            raise InvalidArgument(
                f"kl_coef={kl_coef} has no term to weigh: this env was made with kl='none'."
            )
        now, weights = self.weights, {} if weights is None else weights
        if not isinstance(weights, Mapping):
            raise InvalidArgument(
                f"weights={weights!r} is not allowed; it must map names of terms to weights."
            )
        for name in weights:
            check_choice("weights key", name, now)
        chosen: dict[str, Any] = {**now, **({} if kl_coef is None else {"kl": kl_coef}), **weights}
        scores = score_episodes(
            self._engine,
            prompts,
            responses,
            logprobs=logprobs,
            truncated=truncated,
            weights={name: chosen[name] for name in now},
            gold=self._task.gold,
            max_batch_tokens=self.config.max_batch_tokens,
            learning=played,
        )
        self.tokens_seen += int(scores.lengths.sum()) if played else 0
        return scores

    def save_statistics(self) -> dict[str, np.ndarray]:
        """What terms have learned, by name: all that a run on whole texts has to keep of this env
        beside `tokens_seen`."""
        self._require_whole()
        return self._engine.save_statistics()

    @ordinary_tensors
    def load_statistics(self, saved: Mapping[str, np.ndarray]) -> None:
        """Goes on from what `save_statistics` returned; raises `CheckpointError` where it is of
        other terms."""
        self._require_whole()
        saved_state.check_statistics(saved, self._engine.layout(0))
        self._engine.load_statistics(saved)

    def close_extras(self, **kwargs: Any) -> None:
        """Lets go of the models and their caches."""
        del self._engine, self._texts

    def _show(self) -> tuple[Any, ...] | None:
        return render.show(
            str(self.render_mode), render.running_texts(self._texts, self._engine, self._pieces)
        )

    def _render_for_people(self) -> None:
        if self.render_mode == "human":
            self._show()

    # ---------------------------------------------------------------- episodes

    @contextmanager
    def _changing(self, call: str, whole: bool = False) -> Iterator[None]:
        """Around what must not stop half-way: whatever interrupts it (Ctrl-C, no memory, a rule
        that raises) leaves a mark, and nothing but what begins or loads all texts, a `whole` call,
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
        self._interrupted = None

    def _undo_interrupted(self) -> None:
        """What an interrupted call has counted, and has taught terms, counts for nothing."""
        if self._interrupted is not None:
            self.tokens_seen = self._interrupted.tokens_seen
            self._engine.load_statistics(self._interrupted.statistics)

    def _begin(
        self,
        mask: np.ndarray,
        prompts: Mapping[int, Sequence[int]] | None = None,
        prefixes: Mapping[int, Sequence[int]] | None = None,
    ) -> Infos:
        """Starts an episode in the rows of `mask`, each with the given prompt or one from its
        stream."""
        slots, given = np.flatnonzero(mask), prompts or {}
        started = []
        for slot in map(int, slots):
            drawn = self._streams.draw(slot)
            self._prompt_id[slot] = -1 if slot in given else drawn[0]
            started.append(given.get(slot, drawn[1]))
        self._texts.restart(slots, started, [(prefixes or {}).get(int(slot), ()) for slot in slots])
        self._engine.start(
            slots, self._texts, self._engine.weights_now(self.tokens_seen, self._kl_coef)
        )
        recall_prefixes(self._engine, slots, self._texts)
        self._episode_kl_coef[slots] = 0.0 if self.config.kl == "none" else self._kl_coef
        self._ended[mask] = False
        return self._start_infos(slots)

    def _active_rows(self) -> np.ndarray:
        """Rows that take a token: all but those that NEXT_STEP resets now."""
        if self.autoreset_mode == AutoresetMode.DISABLED and self._ended.any():
            raise FinishedRow(
                f"rows {np.flatnonzero(self._ended).tolist()} have finished; reset them first, "
                "with options={'reset_mask': ...} under autoreset_mode=DISABLED."
            )
        return ~self._ended

    def _check_actions(self, actions: Any, active: np.ndarray) -> tuple[np.ndarray, Tensor | None]:
        """The tokens (N,) on the host, by the one device-to-host copy of a step, and the log-probs
        on the device."""
        tokens, logprob = read_actions(
            actions, self.config.kl == "policy", self.num_envs, self.device
        )
        marked = self._engine.watch.mark(token_codes(tokens, logprob, self.token_spec.vocab_size))
        codes = self._to_host(marked)
        self._engine.watch.check(codes)
        codes[~active] = self.token_spec.pad_token_id
        require_valid(codes, tokens, logprob, self.token_spec)
        return codes, logprob

    def _to_host(self, codes: Tensor) -> np.ndarray:
        return codes.cpu().numpy()

    def _find_ends(self, tokens: np.ndarray, active: np.ndarray) -> Ends:
        terminated = active & self._is_stop[tokens]
        full = self._texts.response_length >= self.token_spec.max_new_tokens
        truncated = active & full & ~terminated
        scored = terminated | truncated if self.token_spec.score_truncated else terminated
        return Ends(terminated, truncated, scored)

    # ------------------------------------------------------------------- infos

    def _start_infos(self, slots: np.ndarray) -> Infos:
        rows = np.zeros(self.num_envs, dtype=bool)
        rows[slots] = True
        infos = Infos()
        infos.add("prompt_id", self._prompt_id.copy(), rows)
        potential = self._engine.potential(self._texts.upload(self._scored_rows()))
        if potential is not None:
            infos.add("potential", potential, rows)
        return infos

    def _scored_rows(self) -> np.ndarray:
        """(N,) bool: rows that have ended and were scored, which waits for their reset outside
        SAME_STEP."""
        last = self._texts.tokens[np.arange(self.num_envs), self._texts.length - 1]
        return self._ended & (self.token_spec.score_truncated | self._is_stop[last])

    def _step_infos(self, paid: Paid, active: np.ndarray, ended: np.ndarray) -> Infos:
        infos = Infos()
        infos.add("reward_terms", dict(paid.terms), active)
        infos.add("ref_logprob", paid.ref_logprob, active)
        infos.add("kl_coef", self._episode_kl_coef.copy(), active)
        infos.add("prompt_id", self._prompt_id.copy(), active)
        if paid.potential is not None:
            infos.add("potential", paid.potential, active)
        if paid.finished is not None:
            # Copies: the rows that end may begin anew before these are read.
            if paid.score is not None:
                infos.add("score", paid.score.clone(), ended)
            if self._task.gold is not None:
                infos.add("gold", self._gold(paid, ended), ended)
            placed = self._engine.token_terms.clone()
            infos.add("token_rewards", placed.sum(1), ended)
            infos.add(
                "token_reward_terms",
                dict(zip(self._engine.term_names, placed.unbind(1), strict=True)),
                ended,
            )
        return infos

    def _gold(self, paid: Paid, ended: np.ndarray) -> Tensor | np.ndarray:
        if not callable(self._task.gold):
            assert paid.score is not None
            return paid.score.clone()
        assert paid.finished is not None
        gold = np.zeros(self.num_envs, dtype=np.float32)
        gold[ended] = [
            self._task.gold(prompt, response)
            for prompt, response in paid.finished.prompt_and_response_texts()
        ]
        return gold

    def _final(self, infos: Infos, ended: np.ndarray) -> dict[str, Any]:
        """SAME_STEP's account of the episodes that ended: their last observation and infos."""
        info = infos.only(ended).to_dict(self._export)
        masks = {key: self._export(ended.copy()) for key in ("_final_obs", "_final_info")}
        return {"final_obs": self._observation(), "final_info": info, **masks}

    def _observation(self) -> Any:
        """Fresh arrays, never the env's own."""
        if self.config.observation == "features":
            return self._export(self._engine.features().clone())
        return {
            "tokens": self._export(self._texts.device_tokens()),
            "length": self._export(self._texts.length.copy()),
            "prompt_length": self._export(self._texts.prompt_length.copy()),
        }

    def _export(self, values: Tensor | np.ndarray) -> Any:
        """The caller's kind of array."""
        if isinstance(values, np.ndarray):
            return self._texts.upload(values) if self.config.array == "torch" else values
        return values if self.config.array == "torch" else values.cpu().numpy()

    def _require_open(self) -> None:
        if self.closed:
            raise EnvClosed("this env is closed; make a new one.")

    def _require_whole(self) -> None:
        self._require_open()
        if self._interrupted is not None:
            raise Interrupted(
                f"{self._interrupted.call}() was interrupted half-way, so the env cannot go on; "
                f"call reset() for all slots, or "
                "load_state() with all of them."
            )

    def _require_reset(self) -> None:
        self._require_whole()
        if not self._engine.started:
            raise NotReset("call reset() first: no text has begun in every slot yet.")


@dataclass(frozen=True, slots=True)
class _Interrupted:
    """The mark of a call that has not come to its end, and what was the env's as a whole before
    it."""

    call: str
    tokens_seen: int
    statistics: dict[str, Tensor | np.ndarray]


def _host(values: Any) -> np.ndarray:
    return values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
