"""Driving a vector env with an `Actor`, one token at a time, and taking out the episodes that end.

Any Gymnasium vector env with the observation `{tokens, length, prompt_length}` will do, NumPy or
torch, in any autoreset mode. Suffixes: N slots.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

from tokenenv.agents.episodes import Episode, check_finite
from tokenenv.agents.learning.masks import pack
from tokenenv.agents.rollout.actor import Actor
from tokenenv.agents.rollout.ending import Ending, no_listener
from tokenenv.agents.rollout.env_rows import (
    action,
    env_core,
    flags,
    load_learned,
    method,
    only_learned,
    read_ends,
    save_learned,
    tell_policy_updated,
)
from tokenenv.agents.rollout.finite import require_finite_policy, running_texts
from tokenenv.agents.rollout.pairing import Pairing
from tokenenv.agents.rollout.recorder import Recorder
from tokenenv.errors import InvalidAction, NotFinite
from tokenenv.tables import Columns, by_name

MARK = "_texts_begun_by"
"""The attribute of an env that tells which collector's texts run in it."""


class Prefix(NamedTuple):
    """A text that is to be played on from."""

    prompt: np.ndarray
    """(P,) int64."""
    response: np.ndarray
    """(R,) int64: the tokens behind the prompt so far, whoever wrote them."""
    own: np.ndarray | None = None
    """(R,) bool: which of these are the policy's; None: all."""


class Stopped(Exception):
    """`collect` was asked to stop. The next one goes on with the texts that had ended by then; at
    `max_staleness` 0 it begins anew."""


class Collector:
    """Steps an env one token at a time. Slots never idle, and only finished episodes come out.

    An episode may straddle updates: each token keeps the log-probability it was sampled with. With
    a `group_size` above 1, episodes come out in whole groups (`Pairing`).

    Whatever interrupts a step or a reset costs the texts of the present batch: the next step begins
    anew, by a full reset. So does whoever else has begun texts in the same env: an evaluation,
    another agent, or its owner by `reset` or `load_state`. To keep the texts that had ended, and to
    lose those that were running, would favour short texts.
    """

    def __init__(
        self,
        envs: VectorEnv,
        actor: Actor,
        *,
        seed: int = 0,
        group_size: int = 1,
        max_staleness: int | None = None,
    ) -> None:
        self.envs, self.actor, self.seed, self.max_staleness = envs, actor, seed, max_staleness
        self.mode = AutoresetMode(envs.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
        self.tokens_seen = 0
        """Tokens emitted so far, those of running episodes included."""
        self.version = 0
        """Updates that the policy has had."""
        self.finished = np.zeros(envs.num_envs, np.int64)
        """(N,) episodes that have ended in each slot."""
        self.stopping = False
        """Set from outside, by a signal's handler, say: `collect` ends after the step that is under
        way."""
        self.ending = Ending()
        """Where the run ends. Set from outside."""
        self.on_tokens: Callable[[int], None] = no_listener
        """Called with `tokens_seen` after each step of `collect` and `play_on`."""
        self.recorder = Recorder(envs.num_envs, getattr(env_core(envs), "columns", ()))
        self.pairing = Pairing(envs.num_envs, group_size)
        self._whole_step, self._begun = False, object()
        self._obs: Mapping[str, Any] = {}
        self._seeded = False
        self._resetting = np.zeros(envs.num_envs, bool)
        """(N,) the slots that the next step only resets (NEXT_STEP), whatever the action."""

    @property
    def running(self) -> bool:
        """Whether texts run that can be gone on with: not before the first reset, after an
        interrupted step, or where somebody else has begun texts in the env since."""
        return self._whole_step and getattr(env_core(self.envs), MARK, None) is self._begun

    @running.setter
    def running(self, whole: bool) -> None:
        self._whole_step = whole

    def _mark_env(self) -> None:
        """Have the env say, to all who drive it, that its texts are this collector's."""
        self._begun = object()
        setattr(env_core(self.envs), MARK, self._begun)

    @property
    def has_potential(self) -> bool:
        """Whether the env has reported a potential."""
        return self.recorder.has_potential

    @property
    def waiting(self) -> list[Episode]:
        """Texts that have ended and wait for the rest of their group."""
        return list(self.pairing.waiting.values())

    # ---------------------------------------------------------------- collecting

    def collect(self, num_tokens: int) -> list[Episode]:
        """Step until the episodes that ended hold at least `num_tokens` response tokens, or until
        the run's end (`ending`), and return them: whole groups, one after the other, at least one.

        It does not return before every text has ended that would be more than `max_staleness`
        updates old in the next batch. No text is thrown away for its age, which would favour short
        texts.

        At `max_staleness` 0 all slots begin anew, and the batch is every text that was begun until
        there were tokens enough. Slots that are free while the last of these are waited for begin
        texts too, and those are thrown away whatever becomes of them, which favours none.

        Raises `Stopped` where `stopping` is set meanwhile.
        """
        tell_policy_updated(self.envs, self.version)
        fresh = self.max_staleness == 0
        if fresh:
            self.reset()
        while self.ending.is_open(num_tokens, self.pairing.ready, self.tokens_seen):
            self._advance()
        # Which groups are waited for is fixed here. Texts that begin from now on are young enough
        # for the next batch, or at 0 belong to no batch.
        awaited = self._too_old_next_time()
        while awaited:
            awaited -= self._advance(awaited if fresh else None)
        episodes, self.pairing.ready = self.pairing.ready, []
        return episodes

    def _too_old_next_time(self) -> set[int]:
        """Return the groups with a text, running or waiting, that the next batch could not take."""
        if self.max_staleness is None:
            return set()
        oldest, size = self.version + 1 - self.max_staleness, self.pairing.group_size
        # A text without a token has no version yet: its first token may come after the update.
        running = (self.recorder.age > 0) & (self.recorder.version < oldest)
        numbers = self.pairing.number[running].tolist()
        numbers += [n for n, episode in self.pairing.waiting.items() if episode.version < oldest]
        return {number // size for number in numbers}

    def _advance(self, wanted: set[int] | None = None) -> set[int]:
        """Take one step and keep what it ended, of the `wanted` groups alone if any are named;
        return the groups that this completed."""
        if self.stopping:
            raise Stopped
        with self._whole():
            ended, size = self._step(), self.pairing.group_size
            if wanted is not None:
                ended = {n: episode for n, episode in ended.items() if n // size in wanted}
            completed = self.pairing.take(ended)
        self.on_tokens(self.tokens_seen)
        return completed

    def step(self) -> list[Episode]:
        """Emit one token in every slot and return the episodes that this ended."""
        with self._whole():
            return list(self._step().values())

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Around what must not be gone on from half-way: until it is through, no text is running,
        so whatever interrupts it makes the next step begin anew."""
        if not self.running:
            self.reset()
        self.running = False
        try:
            yield
        except NotFinite as error:
            error.texts = error.texts or running_texts(self._obs, error.rows)
            raise
        self.running = True

    def _step(self) -> dict[int, Episode]:
        """Emit one token in every slot; return the episodes that ended, by their text's number."""
        tokens, logprobs = self.actor.act(self._obs)
        allowed = pack(self._obs)
        try:
            obs, rewards, terminations, truncations, infos = self.envs.step(
                action(self.envs, self._obs, tokens, logprobs)
            )
        except InvalidAction:
            # Under kl="policy" the env refuses a log-prob that is not finite. The fault is the
            # policy's, and is named as such.
            require_finite_policy(~logprobs.isfinite().cpu().numpy(), self.version)
            raise
        acted = ~self._resetting
        self.recorder.record(
            logprobs, rewards, infos, allowed, acted, self.version, self.actor.values
        )
        self.tokens_seen += int(np.count_nonzero(acted))
        # The step's only wait for the device, where the env gives tensors.
        terminated, truncated, invalid = flags(terminations, truncations, logprobs)
        require_finite_policy(invalid, self.version)
        ended = terminated | truncated
        episodes = self._finish(terminated, truncated, obs, infos) if ended.any() else {}
        self._obs = obs
        if self.mode == AutoresetMode.NEXT_STEP:
            self._resetting = ended
        elif self.mode == AutoresetMode.DISABLED and ended.any():
            self._obs, infos = self.envs.reset(options={"reset_mask": ended})
            self._mark_env()
            self.recorder.note_potential(infos)
        return episodes

    def _finish(
        self, terminated: np.ndarray, truncated: np.ndarray, obs: Any, infos: Mapping[str, Any]
    ) -> dict[int, Episode]:
        """Return the episodes that ended, by their text's number, and begin new ones."""
        slots = np.flatnonzero(terminated | truncated)
        if self.mode == AutoresetMode.SAME_STEP:
            # The observation and the infos at top level are those of the next texts by now.
            obs, infos = infos["final_obs"], infos["final_info"]
        cut, bootstraps = read_ends(self.envs, terminated, truncated, infos, slots)
        episodes = self.recorder.episodes(slots, obs, infos, cut, bootstraps, self.finished)
        check_finite(episodes, self.version)
        numbers = self.pairing.number[slots].tolist()
        self.finished[slots] += 1
        self.recorder.end(slots)
        self.pairing.begin(slots)
        return dict(zip(numbers, episodes, strict=True))

    # ---------------------------------------------------------------- beginning, going on

    def reset(self, options: dict[str, Any] | None = None, columns: Sequence[Columns] = ()) -> None:
        """Begin anew in every slot; running episodes are dropped. The first time is seeded.

        Where the options give prompts, `columns` (N) are what belongs to them.
        """
        self.running = False
        seed = None if self._seeded else self.seed
        if options is not None and any(columns):
            options = options | {"columns": by_name(columns)}
        self._obs, infos = self.envs.reset(seed=seed, options=options)
        self._mark_env()
        self._seeded = True
        self.recorder.restart(self._obs, infos, columns, own_tokens(options or {}))
        self._resetting[:] = False
        self.pairing.restart()
        self.running = True

    def refresh(self) -> None:
        """To be called when the weights have changed: the policy has had one update more."""
        self.version += 1
        tell_policy_updated(self.envs, self.version)
        self.actor.refresh()

    def weights_moved(self) -> None:
        """To be called when an update that did not end may have changed the weights: what was read
        with those before it is read again or forgotten."""
        self.actor.refresh()
        self.recorder.forget_values()
        self.pairing.forget_values()

    def resume(self, obs: Mapping[str, Any]) -> None:
        """Go on from the observation of an env that has been restored to where it was."""
        self.running = False
        self._mark_env()
        self._obs, self._seeded = obs, True
        self.recorder.move_to(obs)
        self.running = True

    def save_env(self) -> Any:
        """Return the env's state. Where no text runs, or the env cannot save them, it is what the
        env keeps beside them."""
        save_state = method(self.envs, "save_state")
        return save_state() if self.running and save_state else save_learned(self.envs)

    def load_env(self, saved: Any) -> None:
        """Go on from what `save_env` returned.

        The actor's caches are filled anew even if they hold the same texts. A cache that grew token
        by token differs in its last bits from one that was filled at once, and a run that goes on
        from a checkpoint has the second kind.
        """
        if saved is None or only_learned(saved):
            load_learned(self.envs, saved)
        else:
            self.resume(method(self.envs, "load_state")(saved)[0])
        self.actor.refresh()

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the env's own state and the observation that comes with it."""
        names = ("tokens_seen", "version", "finished", "_resetting")
        return copy.deepcopy({name: getattr(self, name) for name in names}) | {
            "pairing": self.pairing.state_dict(),
            "recorder": self.recorder.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, running: bool) -> None:
        """Continue from `state_dict()`; without `running`, episodes that had begun are
        forgotten."""
        names = ("tokens_seen", "version", "finished", *(["_resetting"] if running else []))
        vars(self).update(copy.deepcopy({name: state[name] for name in names}))
        if running:
            self.pairing.load_state_dict(state["pairing"])
            self.recorder.load_state_dict(state["recorder"])

    # ---------------------------------------------------------------- continuations

    def play_on(
        self, states: Sequence[Prefix], rollouts: int, columns: Sequence[Columns] = ()
    ) -> list[Episode]:
        """Return `rollouts` continuations of each state to the end, one after the other; `columns`
        are what belongs to the prompt of each state.

        The running texts wait meanwhile. Where they cannot be taken up again (this is interrupted,
        or the env saves no state), the next step begins anew.
        """
        running, found = self.save_env(), []
        self.running = False
        at_once = self.envs.num_envs // rollouts
        for first in range(0, len(states), at_once):
            some = slice(first, first + at_once)
            found += self._play_on(states[some], rollouts, columns[some])
        self.load_env(running)
        return found

    def _play_on(
        self, states: Sequence[Prefix], rollouts: int, columns: Sequence[Columns]
    ) -> list[Episode]:
        """Play on from as many states as fit: slots `rollouts * k` and those after it from state k.

        Each state is read by one slot and copied to the others, caches included, so that its prompt
        and prefix cost one forward.
        """
        wanted, slots = len(states) * rollouts, np.arange(self.envs.num_envs)
        copies = np.flatnonzero(np.arange(wanted) % rollouts)
        # Slots that are left over play on from the last state, and what they write is not used.
        state_of = [min(slot // rollouts, len(states) - 1) for slot in slots.tolist()]
        given = [Prefix(*states[state]) for state in state_of]
        rows = [columns[state] for state in state_of] if columns else []
        # A collector of its own, so that this one's record of the running texts stays.
        collector = Collector(self.envs, self.actor)
        collector._seeded = self._seeded
        collector.reset({"reset_mask": ~np.isin(slots, copies)} | texts_of(given), rows)
        if len(copies):
            fork = method(self.envs, "fork")
            collector.resume(fork(copies // rollouts * rollouts, copies)[0])
        found: dict[int, Episode] = {}
        while len(found) < wanted:
            # The first text of a slot counts: what it writes after that is from another prompt.
            found = {e.slot: e for e in collector.step() if e.slot < wanted} | found
            self.on_tokens(self.tokens_seen + collector.tokens_seen)
        self.tokens_seen += collector.tokens_seen
        return [found[slot] for slot in range(wanted)]


def texts_of(states: Sequence[Prefix]) -> dict[str, Any]:
    """Return the options of a reset that begins a text in each slot from these states (N)."""
    options: dict[str, Any] = {
        "prompts": [state.prompt for state in states],
        "prefixes": [state.response for state in states],
    }
    if all(state.own is None for state in states):
        return options
    own = [np.ones(len(s.response), bool) if s.own is None else s.own for s in states]
    return options | {"prefix_own": own}


def own_tokens(options: Mapping[str, Any]) -> np.ndarray | int:
    """Return how many tokens of the prefix that each slot is given count as the policy's (N,)."""
    prefixes = options.get("prefixes", ())
    given = options.get("prefix_own", [np.ones(len(prefix), bool) for prefix in prefixes])
    return np.array([np.sum(own, dtype=np.int64) for own in given]) if len(given) else 0
