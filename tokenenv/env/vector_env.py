"""TokenVectorEnv: text generation as a batched Gymnasium environment. Its `step` is the only one
with logic."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium.utils.seeding import np_random
from gymnasium.vector import AutoresetMode
from torch import Tensor

from tokenenv.env import build, render, saved_state
from tokenenv.env.actions import invalid_action, read_actions, token_codes
from tokenenv.env.ambient import ordinary_tensors
from tokenenv.env.base import EnvBase
from tokenenv.env.infos import Infos, reply_infos, step_infos
from tokenenv.env.replies import reply_all
from tokenenv.env.reset_options import ResetOptions, Seed, read_options, read_seed
from tokenenv.env.streams import PromptStreams
from tokenenv.env.texts import TextBuffer, decode
from tokenenv.env.transitions import Ends
from tokenenv.errors import FinishedRow, InvalidArgument, NotReset
from tokenenv.models.pieces import TokenPieces
from tokenenv.tables import Columns
from tokenenv.turns import Segment


class TokenVectorEnv(EnvBase):
    """N texts: each step appends one token to each and returns one dense reward for each.

    Observation: `tokens` (N, L) int64 right-padded, `length` and `prompt_length` (N,) int64, and
    where the environment writes into texts `own_mask` (N, L) int8, 1 on emitted tokens; with
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
        super().__init__(num_envs, task, render_mode, max_episode_steps, options)
        num_slots, spec = self.num_envs, self.token_spec
        self._texts = TextBuffer(
            num_slots, spec.max_length, spec.pad_token_id, self.device, spec.responds
        )
        self._pieces = TokenPieces(spec.tokenizer)
        self._is_stop = np.isin(np.arange(spec.vocab_size), spec.stop_token_ids)
        self._prompt_id = np.zeros(num_slots, dtype=np.int64)
        self._episode_kl_coef = np.zeros(num_slots, dtype=np.float32)
        self._ended = np.zeros(num_slots, dtype=bool)
        self._scored = np.zeros(num_slots, dtype=bool)
        """(N,) the texts that have ended and whose score counts."""
        self._texts_begun_by: object = None
        """What a collector leaves here after each reset of its own. It is None after any other
        reset and after `load_state`, so the collector sees that its texts are gone."""
        self._streams = PromptStreams(self._task.prompts, num_slots, self.config.group_size)
        self._streams.reseed(
            read_seed(np_random()[1] % 2**31, num_slots), np.ones(num_slots, dtype=bool)
        )

    @ordinary_tensors
    def reset(
        self, *, seed: Seed = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin new texts in every slot, or in those of `options["reset_mask"]`.

        Args:
            seed: slot i draws its prompts from seed + i, or from seed[i] (a group from its first
                slot's), from the first one on; None goes on. One whole number also seeds
                `np_random`, which this env does not draw from.
            options: `reset_mask` (N,) bool, at least one True; `prompts`, one text or sequence of
                token ids an env (under a chat template a text is one message of the user's, and a
                list of messages is taken too); `columns`, what belongs to these prompts: a list of
                one value an env, by name; `prefixes`, given as prompts are: the beginning of each
                response, which uses up `max_new_tokens` and earns nothing; a text goes on from the
                prompt as it stands, without special tokens. Without a mask each group goes on with
                a new prompt; with one its texts keep their order, as where they end and begin by
                themselves.

        Raises:
            InvalidArgument: an argument is not allowed; nothing changes. `seed` with a mask that
                parts a group is not.
        """
        self._require_open()
        given = read_options(options, self.num_envs, self.token_spec)
        if given.prompts:
            rows = list(given.columns.values())
            self._engine.require_columns(rows, "given prompts (columns=)")
        seeds = read_seed(seed, self.num_envs)
        if not given.mask.all():
            self._require_reset()
        if seed is not None and self._streams.split_groups(given.mask):
            raise InvalidArgument(
                "options['reset_mask'] holds a part of a group, which shares prompts; seed= takes "
                "all of it."
            )
        with self._changing("reset", whole=bool(given.mask.all())):
            self._texts_begun_by = None
            if isinstance(seed, (int, np.integer)):
                super().reset(seed=int(seed))
            if not given.masked:
                self._streams.round_up()
            self._streams.reseed(seeds, given.mask)
            infos = self._begin(given)
            if self.render_mode == "human":
                self._show()
            return self._observation(), infos.to_dict(self._export)

    @ordinary_tensors
    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Append one token to each text, and what the environment writes behind it.

        Returns:
            (observations, rewards (N,) float32, terminations (N,) bool, truncations (N,) bool,
            infos).

        Raises:
            InvalidAction: a token id out of range, a wrong batch size, a missing or non-finite
                logprob; nothing changes.
            FinishedRow: a finished slot is stepped under DISABLED; nothing changes.
        """
        self._require_reset()
        if self.autoreset_mode == AutoresetMode.DISABLED and self._ended.any():
            raise FinishedRow(
                f"rows {np.flatnonzero(self._ended).tolist()} have finished; reset them first, "
                "with options={'reset_mask': ...} under autoreset_mode=DISABLED."
            )
        active = ~self._ended  # slots that NEXT_STEP resets now take no token
        tokens, logprob = self._check_actions(actions, active)
        with self._changing("step"):
            return self._step(tokens, logprob, active)

    def _check_actions(self, actions: Any, active: np.ndarray) -> tuple[np.ndarray, Tensor | None]:
        """The tokens (N,) on the host and the log-probs (N,) on the device."""
        spec, finite = self.token_spec, self._engine.finite
        tokens, logprob = read_actions(
            actions, self.config.kl == "policy", self.num_envs, self._texts.device
        )
        # The only device-to-host copy of a step. What was wrong with the last step's rewards comes
        # with it, since the device is not waited for in the step that pays them.
        on_device = token_codes(tokens, logprob, spec.vocab_size)
        if finite.suspects is None:
            codes = self._to_host(on_device)
        else:
            codes = self._to_host(finite.mark(on_device))
            finite.check(codes)
        codes[~active] = spec.pad_token_id
        if (codes < 0).any():
            raise invalid_action(codes, tokens, logprob, spec)
        return codes, logprob

    def _to_host(self, codes: Tensor) -> np.ndarray:
        return codes.cpu().numpy()

    def _step(
        self, tokens: np.ndarray, logprob: Tensor | None, active: np.ndarray
    ) -> tuple[Any, Any, Any, Any, Any]:
        texts, spec, export = self._texts, self.token_spec, self._export
        # Texts first: ends are found, and rules and gold metrics read, from the host's own copy.
        texts.append(tokens, active)
        terminated = active & self._is_stop[tokens]
        full = texts.steps >= spec.max_new_tokens
        replies = None
        if spec.responds:
            replies = reply_all(self._task, spec, texts, tokens, active)
            terminated = terminated & ~replies.answered | replies.ends
            full |= replies.cut | (texts.length >= spec.max_length)
        truncated = active & full & ~terminated
        ended = terminated | truncated
        ends = Ends(terminated, truncated, ended if spec.score_truncated else terminated, ended)
        self.tokens_seen += int(np.count_nonzero(active))
        paid = self._engine.step(texts.upload(tokens), logprob, active, ends, texts, replies)
        self._ended, self._scored = ended.copy(), ends.scored.copy()
        infos = step_infos(
            self._engine, paid, ends, active, self._prompt_id.copy(), self._episode_kl_coef.copy()
        )
        if replies is not None:
            infos.overlay(reply_infos(replies, texts, active, ended))
        final: dict[str, Any] = {}
        if self.autoreset_mode == AutoresetMode.NEXT_STEP and not active.all():
            infos.overlay(self._begin_next(~active))
        elif self.autoreset_mode == AutoresetMode.SAME_STEP and ended.any():
            # The account of what ended is made before its slot begins anew.
            final = self._final(infos, ended)
            infos.overlay(self._begin_next(ended))
        terminations = ends.scored if self.config.cut == "terminated" else terminated
        info = infos.to_dict(export) | final
        if self.render_mode == "human":
            self._show()
        flags = export(terminations.copy()), export(ended & ~terminations)
        return self._observation(), export(paid.reward), *flags, info

    def render(self) -> tuple[Any, ...] | None:
        """Return one string or picture (H, W, 3) uint8 for each text, by `render_mode`. It shows
        the rewards so far, each where it is placed."""
        if self.render_mode is None:
            return None
        self._require_reset()
        return self._show()

    @ordinary_tensors
    def fork(self, sources: Sequence[int], targets: Sequence[int]) -> tuple[Any, dict[str, Any]]:
        """Copy the running episodes `sources` onto the slots `targets`, caches included; return
        (obs, info).

        Prompt streams stay with their slots. The info is a reset's, for the targets.
        """
        self._require_reset()
        source, target = saved_state.check_fork(sources, targets, self._ended)
        with self._changing("fork"):
            self._texts.fork(source, target)
            self._engine.fork(source, target, self._texts)
            for array in (self._prompt_id, self._episode_kl_coef, self._ended, self._scored):
                array[target] = array[source]
            return self._observation(), self._start_infos(target).to_dict(self._export)

    @ordinary_tensors
    def save_state(self, slots: Sequence[int] | None = None) -> dict[str, Any]:
        """Return the episodes of `slots` (all by default) and their prompt streams, without caches,
        as nested dicts of arrays and numbers."""
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
            "scored": self._scored[chosen],
            "streams": self._streams.save(chosen),
            "kl_coef": self._kl_coef,
            "tokens_seen": self.tokens_seen,
        }

    @ordinary_tensors
    def load_state(self, saved: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Take up saved episodes in the slots they were saved from, here or in another env of the
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
        saved_state.check_columns(saved["texts"]["columns"], self._engine.require_columns)
        whole = len(slots) == self.num_envs
        if not whole:
            self._require_reset()
        with self._changing("load_state", whole=whole):
            self._texts_begun_by = None
            self._texts.load(slots, saved["texts"])
            if whole:
                self._engine.load_statistics(saved["engine"]["learned"])
                self._kl_coef, self.tokens_seen = float(saved["kl_coef"]), int(saved["tokens_seen"])
            self._engine.load(slots, self._texts, saved["engine"])
            self._prompt_id[slots], self._ended[slots] = saved["prompt_id"], saved["ended"]
            self._scored[slots] = saved["scored"]
            self._episode_kl_coef[slots] = saved["episode_kl_coef"]
            self._streams.load(slots, saved["streams"])
            # Under SAME_STEP no text stands at its end, as one that was saved elsewhere may.
            if self.autoreset_mode == AutoresetMode.SAME_STEP and self._ended.any():
                self._begin_next(self._ended.copy())
            return self._observation(), self._start_infos(slots).to_dict(self._export)

    @ordinary_tensors
    def ref_logprobs(self) -> Any:
        """Return log pi_ref of every next token of the texts as they stand, (N, V) float32, in
        nats."""
        self._require_reset()
        return self._export(self._engine.ref_logprobs())

    def responses(self) -> list[list[int]]:
        """Return the response tokens of the N texts as they stand."""
        self._require_reset()
        texts = self._texts
        spans = zip(texts.tokens, texts.prompt_length, texts.length, strict=True)
        return [row[start:end].tolist() for row, start, end in spans]

    def segments(self) -> list[list[Segment]]:
        """Return the responses of the N texts as they stand, in segments: the policy's turns, and
        what the environment wrote between them."""
        self._require_reset()
        return self._texts.running(None).segments()

    @property
    def ended(self) -> np.ndarray:
        """(N,) bool: the slots whose text has ended and waits for its reset."""
        return self._ended.copy()

    def decode(self, observation: Mapping[str, Any]) -> list[str]:
        """Return the texts, prompt and response, of a token observation, batched or of one
        text."""
        return decode(observation, self.token_spec.tokenizer)

    def close_extras(self, **kwargs: Any) -> None:
        """Let go of the models and their caches."""
        del self._engine, self._texts

    def _show(self) -> tuple[Any, ...] | None:
        return render.show(
            str(self.render_mode), render.running_texts(self._texts, self._engine, self._pieces)
        )

    # ---------------------------------------------------------------- episodes

    def _begin_next(self, mask: np.ndarray) -> Infos:
        """Start an episode in the slots of `mask` (N,), each with the next prompt of its stream."""
        return self._begin(ResetOptions(mask, masked=True))

    def _begin(self, given: ResetOptions) -> Infos:
        """Start an episode in the slots of `given.mask`, each with the given prompt or the next one
        of its stream; return their infos."""
        slots = np.flatnonzero(given.mask)
        index, numbers = self._streams.draw(slots)
        responds = self.token_spec.responds
        seeds = self._streams.text_seeds(slots, numbers) if responds else ()
        drawn, which = np.unique(index, return_inverse=True)
        prompts: list[Sequence[int]] = [self._streams.prompts[i] for i in drawn]
        for slot, prompt in given.prompts.items():
            place = np.searchsorted(slots, slot)
            index[place], which[place] = -1, len(prompts)
            prompts.append(prompt)
        columns = self._columns_of(slots, index, given)
        self._texts.restart(slots, prompts, which, columns, given.prefixes, given.prefix_own, seeds)
        self._prompt_id[slots] = index
        self._engine.start(slots, self._texts, self.weights)
        self._episode_kl_coef[slots] = 0.0 if self.config.kl == "none" else self._kl_coef
        self._ended[given.mask] = self._scored[given.mask] = False
        return self._start_infos(slots)

    def _columns_of(
        self, slots: np.ndarray, index: np.ndarray, given: ResetOptions
    ) -> Sequence[Columns]:
        """What belongs to the prompts of `slots` (n,): those with the index (n,) -1 were given.
        Empty where nothing belongs to any prompt."""
        own, rows = self._task.columns, zip(slots.tolist(), index.tolist(), strict=True)
        if not own and not any(given.columns.values()):
            return ()
        return [given.columns[s] if i < 0 else own[i] if own else {} for s, i in rows]

    # ------------------------------------------------------------------- infos

    def _start_infos(self, slots: np.ndarray) -> Infos:
        """The infos of the episodes that stand at their beginning in `slots` (n,)."""
        rows = np.zeros(self.num_envs, dtype=bool)
        rows[slots] = True
        entries: dict[str, Any] = {"prompt_id": (self._prompt_id.copy(), rows)}
        if self._engine.rewards.shaped:
            # Slots that have ended and were scored wait for their reset, outside SAME_STEP.
            scored = self._texts.upload(self._scored)
            entries["potential"] = self._engine.potential(scored), rows
        return Infos(entries)

    def _final(self, infos: Infos, ended: np.ndarray) -> dict[str, Any]:
        """SAME_STEP's account of the episodes that ended: their last observation and infos."""
        info = infos.only(ended).to_dict(self._export)
        masks = {key: self._export(ended.copy()) for key in ("_final_obs", "_final_info")}
        return {"final_obs": self._observation(), "final_info": info, **masks}

    def _observation(self) -> Any:
        """Return fresh arrays, never the env's own."""
        texts, export = self._texts, self._export
        if self.config.observation == "features":
            return export(self._engine.features().clone())
        on_host = self.config.array == "numpy"
        own = {"own_mask": export(texts.own_mask)} if self.token_spec.responds else {}
        return {
            "tokens": texts.tokens.copy() if on_host else texts.device_tokens(),
            "length": export(texts.length.copy()),
            "prompt_length": export(texts.prompt_length.copy()),
            **own,
        }

    def _export(self, values: Tensor | np.ndarray) -> Any:
        """Return the values as the caller's kind of array."""
        if self.config.array == "torch":
            return self._texts.upload(values) if isinstance(values, np.ndarray) else values
        return values if isinstance(values, np.ndarray) else values.cpu().numpy()

    def _require_reset(self) -> None:
        if self.closed or self._interrupted is not None:
            self._require_whole()
        if self._engine.states is None:
            raise NotReset("call reset() first: no text has begun in every slot yet.")
