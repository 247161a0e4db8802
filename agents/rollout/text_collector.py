"""Collecting whole texts from an engine, the policy's own or vLLM; the env scores them when they
have ended.

It does what `Collector` does, for texts that are generated outside the env. The engine is kept
busy: a text may be begun under one version of the weights and ended under a later one, and its
later tokens then have log-probs of the later one.

Where the environment writes into texts, the engine writes a turn at a time. The environment is
asked at the end of each, and the engine goes on behind its answer. What has been written stays the
tokens that it is: no text is decoded and encoded again.

An engine in another process writes on while texts that have ended are scored here.
"""

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv

from tokenenv.agents.episodes import Episode, check_finite
from tokenenv.agents.learning.policy import LMPolicy
from tokenenv.agents.rollout.collector import Prefix, Stopped
from tokenenv.agents.rollout.ending import Ending, no_listener
from tokenenv.agents.rollout.env_rows import (
    load_learned,
    save_learned,
    tell_policy_updated,
    wants_logprob,
)
from tokenenv.agents.rollout.episode_engine import EpisodeEngine, check_options
from tokenenv.agents.rollout.pairing import whole_groups
from tokenenv.agents.rollout.text import (
    Text,
    afresh,
    answered,
    turn_limit,
    with_turn,
    without_values,
)
from tokenenv.agents.rollout.text_scores import TextScores
from tokenenv.errors import InvalidArgument, NotFinite
from tokenenv.tables import Columns
from tokenenv.types import EngineApart, RolloutEngine, TokenSpec, Written

ENGINES = {
    "vllm": "tokenenv.rollout.vllm:VLLMEngine",
    "vllm apart": "tokenenv.rollout.vllm:VLLMEngineApart",
    "http": "tokenenv.rollout.server:VLLMServerEngine",
}
"""The engines of vLLM that `rollout=` may name: "vllm", in this process or in its own ("vllm
apart"), or a server's URL ("http"). An engine is imported when it is made, because vLLM need not be
installed."""


class TextCollector:
    """Keeps `num_texts` texts running in an engine, in groups that share a prompt, and has finished
    ones scored.

    A text's prompt, its sampling seeds and the seed of what the environment writes into it depend
    on the run's seed and on the text's number alone, so a text that is begun again has the same
    prompt. Where anything interrupts the engine, or asking the environment, the next `collect`
    begins the running texts again, from their prompts; those that had ended are kept.
    """

    def __init__(
        self,
        envs: VectorEnv,
        engine: RolloutEngine,
        *,
        num_texts: int,
        seed: int = 0,
        group_size: int = 1,
        max_staleness: int = 1,
    ) -> None:
        self.core = check_text_env(envs)
        self.engine, self.seed = engine, seed
        self.group_size, self.max_staleness = group_size, max_staleness
        self.num_texts = max(num_texts, group_size)
        self.scores = TextScores(
            self.core, num_texts=self.num_texts, pays_logprob=wants_logprob(envs)
        )
        self.spec: TokenSpec = self.core.token_spec
        self.tokens_seen = 0
        """The policy's tokens of the texts that have ended."""
        self.version = 0
        """Updates that the policy has had."""
        self._begun = 0
        """Texts that were begun."""
        self._continued = 0
        """Continuations that were begun."""
        self._running: dict[int, Text] = {}
        self._waiting: dict[int, Text] = {}
        """Finished texts of groups that are not complete, by number."""
        self._ready: list[Text] = []
        """Texts of complete groups that are not scored yet. They stay here until scoring has
        succeeded, so an error in it loses none."""
        self._continuations: dict[int, Text] = {}
        """Finished continuations, by number."""
        self._cut: dict[int, Text] = {}
        """Texts that are to be begun before new ones, by number: they were running when the engine
        was stopped, or were interrupted as they began."""
        self._synced = True
        """Whether the engine has the present weights."""
        self.stopping = False
        """Set from outside, by a signal's handler, say: `collect` ends with the text that ends
        next."""
        self.ending = Ending()
        """Where the run ends. Set from outside."""
        self.on_tokens: Callable[[int], None] = no_listener
        """Called with `tokens_seen` whenever texts have ended."""

    # ---------------------------------------------------------------- what agents call

    def collect(self, num_tokens: int) -> list[Episode]:
        """Return episodes that hold at least `num_tokens` response tokens, or those that have ended
        at the run's end (`ending`): whole groups, at least one.

        It does not return before every text has ended that would be more than `max_staleness`
        updates old in the next batch. No text is thrown away for its age, which would favour short
        texts. Raises `Stopped` where `stopping` is set meanwhile.
        """
        tell_policy_updated(self.core, self.version)
        if not self._synced:
            self._sync()
        with self._stopping():
            while self._is_open(num_tokens) or self._overdue():
                if self.stopping:
                    raise Stopped
                self._begin_cut()
                # At 0 a text that begins while the last ones are waited for would be too old for
                # the next batch, so slots of the engine idle instead.
                if self._is_open(num_tokens) or self.max_staleness > 0:
                    self._begin_groups(self._queue(num_tokens))
                self._write_on(num_tokens)
                self._wait()
        try:
            episodes = self.scores.played(self._ready)
            check_finite(episodes, self.version)
        except NotFinite as error:
            # Scored again they would fail again: the groups at fault go, the others stay.
            failed = {self._ready[row].number // self.group_size for row in error.rows}
            self._ready = [
                text for text in self._ready if text.number // self.group_size not in failed
            ]
            raise
        self._ready = []
        return episodes

    @property
    def has_potential(self) -> bool:
        """Whether the last episodes have potentials."""
        return self.scores.has_potential

    @property
    def waiting(self) -> list[Text]:
        """Texts that have ended and wait for the rest of their group."""
        return list(self._waiting.values())

    def refresh(self) -> None:
        """To be called when the weights have changed: the policy has had one update more."""
        self.version += 1
        tell_policy_updated(self.core, self.version)
        self._sync()

    def weights_moved(self) -> None:
        """To be called when an update that did not end may have changed the weights: the engine is
        handed them before it goes on, and what was read with those before them is forgotten."""
        self._synced = False
        self._ready = [without_values(text) for text in self._ready]
        self._running, self._waiting = (
            {number: without_values(text) for number, text in some.items()}
            for some in (self._running, self._waiting)
        )
        self.scores.forget()

    def play_on(
        self, states: Sequence[Prefix], rollouts: int, columns: Sequence[Columns] = ()
    ) -> list[Episode]:
        """Return `rollouts` continuations of each state to the end, one after the other; `columns`
        are what belongs to the prompt of each state.

        The engine writes them beside the running texts.
        """
        numbers = []
        with self._stopping():
            rows = columns or [{}] * len(states)
            for state, row in zip(states, rows, strict=True):
                for _ in range(rollouts):
                    text = self._continuation(Prefix(*state), row)
                    self._begin(text)
                    numbers.append(text.number)
            while not all(number in self._continuations for number in numbers):
                self._wait()
        written = [self._continuations.pop(number) for number in numbers]
        # They are no texts of the run: they teach the env's terms nothing, and no schedule goes on.
        episodes = self.scores.continuations(written)
        check_finite(episodes, self.version)
        return episodes

    def _continuation(self, state: Prefix, columns: Columns) -> Text:
        self._continued += 1
        own = np.ones(len(state.response), bool) if state.own is None else state.own
        return Text(
            -self._continued,
            self.version,
            state.prompt.tolist(),
            -1,
            self.core.weights,
            state.response.tolist(),
            own.tolist(),
            columns=columns,
        )

    def save_env(self) -> dict[str, Any] | None:
        """Return what the env keeps beside the texts."""
        return save_learned(self.core)

    def load_env(self, saved: Mapping[str, Any] | None) -> None:
        """Go on from what `save_env` returned, or from that part of a stepped env's state; running
        texts are begun again with the present weights."""
        load_learned(self.core, saved)
        self._stop()
        self._sync()

    def state_dict(self) -> dict[str, Any]:
        """Return everything but what the env and the engine keep."""
        texts = {
            "waiting": list(self._waiting.values()),
            "ready": self._ready,
            # As they were begun: what had been written of them by now is not gone on with.
            "cut": [afresh(text, text.version, text.weights) for text in self._unfinished()],
        }
        names = ("tokens_seen", "version", "_begun", "_continued")
        kept: dict[str, Any] = {name: getattr(self, name) for name in names}
        return kept | {name: [asdict(text) for text in some] for name, some in texts.items()}

    def load_state_dict(self, state: dict[str, Any], *, running: bool) -> None:
        """Continue from `state_dict()`."""
        texts = {
            name: [Text(**text) for text in state[name]] for name in ("waiting", "ready", "cut")
        }
        vars(self).update({name: value for name, value in state.items() if name not in texts})
        self._waiting, self._cut = (
            {text.number: text for text in texts[name]} for name in ("waiting", "cut")
        )
        self._ready = texts["ready"]
        self.scores.forget()

    # ---------------------------------------------------------------- texts

    def _is_open(self, num_tokens: int) -> bool:
        return self.ending.is_open(num_tokens, self._ready, self.tokens_seen)

    def _overdue(self) -> bool:
        """Return whether a text that is not ready yet would be too old for the next batch."""
        versions = [text.version for text in [*self._unfinished(), *self._waiting.values()]]
        return bool(versions) and self.version + 1 - min(versions) > self.max_staleness

    def _unfinished(self) -> list[Text]:
        texts = self._cut | self._running
        return [text for text in texts.values() if text.number >= 0]

    def _begin_cut(self) -> None:
        while self._cut:
            text = next(iter(self._cut.values()))
            self._begin(afresh(text, self.version, self.core.weights))
            # Last: an interruption finds the text in both places, and never in neither.
            del self._cut[text.number]

    def _queue(self, num_tokens: int) -> int:
        """Return how many texts more than run side by side are begun: an engine that writes on
        takes them as others end, without waiting for this process.

        They are no more than the batch will need, by the mean length of a text. What is begun under
        these weights and ends after the next update stays about the same.
        """
        if not isinstance(self.engine, EngineApart):
            return 0
        ended = self._begun - len(self._unfinished())
        mean = max(1.0, self.tokens_seen / ended) if ended else self.spec.max_new_tokens
        needed = self._left(num_tokens) / mean - self.num_texts
        return max(0, min(math.floor(needed), self.num_texts))

    def _left(self, num_tokens: int) -> float:
        return self.ending.left(num_tokens, self._ready, self.tokens_seen)

    def _begin_groups(self, queue: int) -> None:
        while len(self._running) + self.group_size <= self.num_texts + queue:
            prompt_id = self._draw(self._begun // self.group_size)
            prompt = [int(token) for token in self.core.prompts[prompt_id]]
            table = getattr(self.core, "columns", ())
            row = table[prompt_id] if table else {}
            numbers = range(self._begun, self._begun + self.group_size)
            cut = {
                number: Text(
                    number, self.version, prompt, prompt_id, self.core.weights, columns=row
                )
                for number in numbers
            }
            # A group is written down before its first text is begun: an interruption leaves no
            # group with some of its texts only.
            self._begun, self._cut = numbers.stop, cut
            self._begin_cut()

    def _draw(self, group: int) -> int:
        return int(np.random.default_rng([self.seed, group]).integers(len(self.core.prompts)))

    def _begin(self, text: Text) -> None:
        """Have the engine write the text's next turn."""
        self._running[text.number] = text
        # Streams of random numbers for each text and turn, so that what a text becomes does not
        # depend on what runs beside it. A turn with the numbers of the one before would repeat it.
        turn = [len(text.tokens)] if text.tokens else []
        seed, limit = self._seed_of(text, *turn), turn_limit(text, self.spec)
        self.engine.begin(text.number, text.so_far, limit, seed)

    def _seed_of(self, text: Text, *purpose: int) -> int:
        stream = [self.seed, int(text.number < 0), abs(text.number), *purpose]
        return int(np.random.SeedSequence(stream).generate_state(1)[0])

    def _write_on(self, num_tokens: int) -> None:
        """Where the engine can write on by itself, have it do so, and score meanwhile texts that
        wait for the rest of the batch."""
        if not isinstance(self.engine, EngineApart):
            return
        texts, tokens = self._round(num_tokens)
        self.engine.write_on(texts, tokens)
        # About as many as end meanwhile, and what has been left behind.
        found = self.scores.missing(self._ready)[: 2 * texts]
        if found and self.scores.can_be_ahead:
            self.scores.score_ahead(found)

    def _round(self, num_tokens: int) -> tuple[int, int]:
        """Return after how many texts, or tokens of texts, that have ended the engine has to wait
        for this process."""
        many = max(1, self.num_texts // 2)
        if self._is_open(num_tokens):
            # So that no slot stays free while there is something to begin.
            queued = len(self._running) - self.num_texts
            return max(1, min(many, queued)), max(1, math.ceil(self._left(num_tokens)))
        # At 0 the batch takes all that runs. Else it ends with the last text that is due.
        return (1, 1) if self.max_staleness else (many, self.spec.max_length * many)

    def _wait(self) -> None:
        """Wait for the turns that end next, and take them in: texts that have ended, and texts that
        go on."""
        written = self.engine.ended()
        now = {one.key: self._answered(one) for one in written}
        ended = {n: text for n, text in now.items() if text.ended}
        running = {n: now.get(n, text) for n, text in self._running.items() if n not in ended}
        waiting, ready = dict(self._waiting), list(self._ready)
        # In the order in which they ended, however many an engine returns at once.
        for _, together in groupby(written, key=lambda one: one.step):
            keys = [one.key for one in together if one.key >= 0]
            waiting |= {key: ended[key] for key in keys if key in ended}
            ready += [waiting.pop(n) for n in whole_groups(waiting, self.group_size)]
        continuations = self._continuations | {n: text for n, text in ended.items() if n < 0}
        seen = self.tokens_seen + sum(len(text.response) for text in ended.values())
        # All at once, from values made before: no interruption finds a text in none of them.
        self._running, self._waiting, self._ready = running, waiting, ready
        self._continuations, self.tokens_seen = continuations, seen
        for number, text in now.items():
            if number not in ended:
                self._begin(text)
        self.on_tokens(seen)

    def _answered(self, written: Written) -> Text:
        """Return a running text with the turn that the engine has written, and with what the
        environment answers."""
        text, reply = self._running[written.key], None
        text = with_turn(text, written.tokens, written.logprobs, written.values)
        if self.spec.responds:
            reply = self.core.reply(
                text.prompt,
                [*text.prefix, *text.tokens],
                [*text.prefix_own, *text.own],
                columns=text.columns,
                # A stream that none of its turns has.
                seed=self._seed_of(text, 0, 1),
            )
        return answered(text, reply, self.spec)

    def _sync(self) -> None:
        """Hand the engine the present weights. Where that fails, the next `collect` tries again
        before it draws anything."""
        self._synced = False
        self.engine.sync()
        self._synced = True

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """Within it, whatever interrupts the engine stops it: the next `collect` begins the running
        texts again."""
        try:
            yield
        except BaseException:
            self._stop()
            raise

    def _stop(self) -> None:
        unfinished = {text.number: text for text in self._unfinished()}
        self._cut, self._running, self._continuations = unfinished, {}, {}
        self.engine.abort()


def check_text_env(envs: VectorEnv) -> Any:
    """Return the env beneath `envs`.

    Raises `InvalidArgument` unless it scores whole texts, and unless nothing is around it: a
    wrapper would see none of the texts.
    """
    core: Any = envs.unwrapped
    if not hasattr(core, "score_episodes"):
        raise InvalidArgument(
            f"rollout needs an env that scores whole texts (score_episodes), not "
            f"{type(core).__name__}."
        )
    if envs is not core:
        raise InvalidArgument(
            f"rollout takes the bare env: {type(envs).__name__} around it would see none of the "
            f"texts, which are scored whole."
        )
    return core


def make_engine(
    rollout: str, policy: LMPolicy, spec: TokenSpec, *, reads_values: bool = False, **options: Any
) -> RolloutEngine:
    """Return the engine that `rollout` names, for this policy; a URL is a vLLM server's. One that
    has no critic ignores `reads_values`."""
    if rollout == "episode":
        check_options(set(options) - {"temperature"})
        return EpisodeEngine(policy, spec, reads_values=reads_values, **options)
    if rollout == "vllm" and options.pop("own_process", False):
        rollout = "vllm apart"
    name, given = ("http", {"url": rollout}) if rollout.startswith("http") else (rollout, {})
    module, _, attribute = ENGINES[name].partition(":")
    engine: Callable[..., RolloutEngine] = getattr(importlib.import_module(module), attribute)
    dtype = "bfloat16" if policy.uses_bfloat16 else "float32"
    return engine(policy.model, spec=spec, dtype=dtype, **given, **options)
