"""Driving a vector env with an `Actor`, and cutting what happens into episodes.

Any Gymnasium vector env with the observation `{tokens, length, prompt_length}` will do, NumPy or
torch, in any autoreset mode. Suffixes: N envs, L context, T response tokens.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from tokenenv.agents.episodes import Episode, check_finite
from tokenenv.agents.learning.masks import pack
from tokenenv.agents.rollout.actor import Actor
from tokenenv.agents.rollout.env_rows import (
    action,
    flags,
    method,
    read_ends,
    take,
    take_by_name,
    take_info,
    take_obs,
)
from tokenenv.agents.rollout.finite import require_finite_policy, running_texts
from tokenenv.agents.rollout.pairing import Pairing
from tokenenv.errors import InvalidAction, NotFinite

Prefix = tuple[np.ndarray, np.ndarray]
"""The token ids of a prompt and of the response so far."""

# One line per step: what must be remembered of a running text; the text itself is in the
# observation.
LOGPROB, REWARD, REF_LOGPROB, POTENTIAL = range(4)

# What an env may say about a finished text, and what stands for silence.
INFO_DEFAULTS: dict[str, float] = {
    "score": np.nan,
    "gold": np.nan,
    "token_rewards": np.nan,
    "kl_coef": 0.0,
    "ref_logprob": 0.0,
    "potential": 0.0,
    "prompt_id": -1,
}


class Stopped(Exception):
    """`collect` was asked to stop; the next one goes on with what had ended by then, or at
    `max_staleness` 0 begins anew."""


class Collector:
    """Steps an env one token at a time; slots never idle, and only finished episodes come out.

    An episode may straddle updates: each token keeps the log-probability it was sampled with. What
    interrupts a step or a reset, whatever it is, costs the texts of the present batch: the next
    step begins anew, by a full reset. (To keep those that had ended and to lose those that ran
    would favour short texts.)

    With a `group_size` above 1, groups come out whole (`Pairing`).
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
        self.running = False
        """Whether texts run that can be gone on with: not before the first reset, nor after an
        interrupted step."""
        self._obs: Mapping[str, Any] = {}
        self._seeded = False
        self._ring = torch.zeros(0)
        self._masks = np.zeros((0, 0, 0), np.uint8)
        """(L, N, M): the action masks of each step, beside the ring; empty where the env allows
        everything."""
        self._potential = torch.zeros(envs.num_envs)
        """(N,) the env's Phi of the texts as they stand."""
        self.has_potential = False
        """Whether the env has reported one."""
        self._clock = 0
        self._age = np.zeros(envs.num_envs, np.int64)
        self.finished = np.zeros(envs.num_envs, np.int64)
        """(N,) episodes that have ended in each row."""
        self._resetting = np.zeros(envs.num_envs, bool)
        self.pairing = Pairing(envs.num_envs, group_size)
        self.stopping = False
        """Set by a signal's handler, say: `collect` ends after the step that is under way."""
        self.version = 0
        """Updates that the policy has had."""
        self._version = np.zeros(envs.num_envs, np.int64)
        """(N,) the version that each row's text began with."""

    def collect(self, num_tokens: int) -> list[Episode]:
        """Steps until the episodes that ended hold at least `num_tokens` response tokens, and
        returns them: whole groups, one after the other.

        Does not return before every text that would be more than `max_staleness` updates old in the
        next batch has ended; nothing is thrown away for its age, which would favour short texts. At
        0 all begin anew, and a batch is every text that is begun until there are tokens enough;
        what free slots begin while the last of them are waited for is thrown away, whatever becomes
        of it. Raises `Stopped` where `stopping` is set meanwhile.
        """
        fresh = self.max_staleness == 0
        if fresh:
            self.reset()
        while num_tokens > sum(len(e.response) for e in self.pairing.ready):
            self._advance()
        due = self._due()
        while due:
            due -= self._advance(due if fresh else None)
        episodes, self.pairing.ready = self.pairing.ready, []
        return episodes

    def _due(self) -> set[int]:
        """The groups with a text, running or waiting, that would be too old for the next batch."""
        if self.max_staleness is None:
            return set()
        oldest, drawn = self.version + 1 - self.max_staleness, self._age > 0
        running = self.pairing.number[drawn & (self._version < oldest)].tolist()
        waiting = [
            number for number, episode in self.pairing.waiting.items() if episode.version < oldest
        ]
        return {number // self.pairing.group_size for number in [*running, *waiting]}

    def _advance(self, wanted: set[int] | None = None) -> set[int]:
        """One step; takes in what it ended, of the `wanted` groups alone if any are named. Returns
        the groups it completed."""
        if self.stopping:
            raise Stopped
        with self._whole():
            ended = self._step()
            if wanted is not None:
                ended = {
                    n: episode
                    for n, episode in ended.items()
                    if n // self.pairing.group_size in wanted
                }
            return self.pairing.take(ended)

    @property
    def waiting(self) -> list[Episode]:
        """Texts that have ended and wait for the rest of their group."""
        return list(self.pairing.waiting.values())

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Around what must not be gone on from half-way."""
        if not self.running:
            self.reset()
        self.running = False
        try:
            yield
        except NotFinite as error:
            error.texts = error.texts or running_texts(self._obs, error.rows)
            raise
        self.running = True

    def step(self) -> list[Episode]:
        """Emits one token in every row and returns the episodes that this ended."""
        with self._whole():
            return list(self._step().values())

    def _step(self) -> dict[int, Episode]:
        """The episodes that one more token ended, by number."""
        tokens, logprobs = self.actor.act(self._obs)
        allowed = pack(self._obs)
        try:
            obs, rewards, terminations, truncations, infos = self.envs.step(
                action(self.envs, self._obs, tokens, logprobs)
            )
        except InvalidAction:  # kl="policy" takes the log-probs
            require_finite_policy(~logprobs.isfinite().cpu().numpy(), self.version)
            raise
        self._record(logprobs, rewards, infos, allowed)
        terminated, truncated, invalid = flags(terminations, truncations, logprobs)
        require_finite_policy(invalid, self.version)
        ended = terminated | truncated
        episodes = self._finish(terminated, truncated, obs, infos) if ended.any() else {}
        self._obs = obs
        if self.mode == AutoresetMode.NEXT_STEP:
            self._resetting = ended
        elif self.mode == AutoresetMode.DISABLED and ended.any():
            self._obs, infos = self.envs.reset(options={"reset_mask": ended})
            self._note_potential(infos)
        return episodes

    def reset(self, options: dict[str, Any] | None = None) -> None:
        """Begins anew in every row; running episodes are dropped. The first time is seeded."""
        self.running = False
        self._obs, infos = self.envs.reset(
            seed=None if self._seeded else self.seed, options=options
        )
        self._seeded = True
        num_envs, length = self._obs["tokens"].shape
        self._ring = torch.zeros(length, 4, num_envs, device=_device(self._obs))
        self._potential = torch.zeros(num_envs, device=self._ring.device)
        self._note_potential(infos)
        self._age[:], self._resetting[:] = 0, False
        self.pairing.restart()
        self.running = True

    def state_dict(self) -> dict[str, Any]:
        """Everything but the env's own state and the observation that comes with it."""
        names = ["tokens_seen", "finished", "version", "_version", "_age", "_resetting", "_clock"]
        names += ["_ring", "_masks", "_potential"] if self.running else []
        return copy.deepcopy({name: getattr(self, name) for name in names}) | {
            "pairing": self.pairing.state_dict()
        }

    def load_state_dict(self, state: dict[str, Any], *, running: bool) -> None:
        """Continues from `state_dict()`; without `running`, episodes that had begun are
        forgotten."""
        names = (
            [name for name in state if name != "pairing"]
            if running
            else ["tokens_seen", "finished", "version"]
        )
        vars(self).update(copy.deepcopy({name: state[name] for name in names}))
        if running:
            self.pairing.load_state_dict(state["pairing"])

    def refresh(self) -> None:
        """To be called when the weights have changed."""
        self.version += 1
        self.actor.refresh()

    def save_env(self) -> Any:
        """The env's state; None where no text runs, or the env cannot save it."""
        save_state = method(self.envs, "save_state")
        return save_state() if self.running and save_state else None

    def load_env(self, saved: Any) -> None:
        """Goes on from what `save_env` returned, with caches filled anew: how they were filled
        shows in the last bits of what they give."""
        if saved is not None:
            self.resume(method(self.envs, "load_state")(saved)[0])
        self.actor.refresh()

    def play_on(self, states: Sequence[Prefix], rollouts: int) -> list[Episode]:
        """`rollouts` continuations of each state to the end, one after the other; the running texts
        wait meanwhile. Where they cannot be taken up again (this is interrupted, or the env saves
        no state), the next step begins anew."""
        running, found = self.save_env(), []
        self.running = False
        at_once = self.envs.num_envs // rollouts
        for first in range(0, len(states), at_once):
            found += self._play_on(states[first : first + at_once], rollouts)
        self.load_env(running)
        return found

    def _play_on(self, states: Sequence[Prefix], rollouts: int) -> list[Episode]:
        """Each state is read once, then copied."""
        wanted = len(states) * rollouts
        followers = np.flatnonzero(np.arange(wanted) % rollouts)
        mask = ~np.isin(np.arange(self.envs.num_envs), followers)
        # Slots that are left over play on from the last state, and what they write is not looked
        # at.
        given = [
            states[min(slot // rollouts, len(states) - 1)] for slot in range(self.envs.num_envs)
        ]
        collector = Collector(self.envs, self.actor)
        collector._seeded = self._seeded
        collector.reset(
            {
                "reset_mask": mask,
                "prompts": [p for p, _ in given],
                "prefixes": [r for _, r in given],
            }
        )
        if len(followers):
            collector.resume(
                method(self.envs, "fork")(followers // rollouts * rollouts, followers)[0]
            )
        found: dict[int, Episode] = {}
        while len(found) < wanted:
            found = {e.slot: e for e in collector.step() if e.slot < wanted} | found
        self.tokens_seen += collector.tokens_seen
        return [found[slot] for slot in range(wanted)]

    def resume(self, obs: Mapping[str, Any]) -> None:
        """Goes on from the observation of an env that has been restored to where it was."""
        self.running = False
        self._obs, self._seeded = obs, True
        self._ring, self._potential = self._ring.to(_device(obs)), self._potential.to(_device(obs))
        self.running = True

    def _record(
        self, logprobs: Tensor, rewards: Any, infos: Mapping[str, Any], allowed: np.ndarray | None
    ) -> None:
        """Writes one line of the ring; the row that only reset (NEXT_STEP) did not act, and its age
        stays 0."""
        self._clock = (self._clock + 1) % len(self._ring)
        line = self._ring[self._clock]
        line[LOGPROB] = logprobs
        line[REWARD] = torch.as_tensor(rewards)
        line[REF_LOGPROB] = torch.as_tensor(infos.get("ref_logprob", 0.0))
        line[POTENTIAL] = self._potential
        if allowed is not None:
            if not self._masks.size:
                self._masks = np.zeros((len(self._ring), *allowed.shape), np.uint8)
            self._masks[self._clock] = allowed
        self._note_potential(infos)
        self._version[self._age == 0] = self.version
        self._age += ~self._resetting
        self.tokens_seen += int(np.count_nonzero(~self._resetting))

    def _note_potential(self, infos: Mapping[str, Any]) -> None:
        """Rows that the info leaves out keep theirs."""
        if "potential" in infos:
            self.has_potential = True
            known, potential = (
                torch.as_tensor(infos[key], device=self._ring.device)
                for key in ("_potential", "potential")
            )
            self._potential = torch.where(known, potential.float(), self._potential)

    def _finish(
        self, terminated: np.ndarray, truncated: np.ndarray, obs: Any, infos: Mapping[str, Any]
    ) -> dict[int, Episode]:
        """The episodes that ended, by number; their rows begin new ones."""
        rows = np.flatnonzero(terminated | truncated)
        if self.mode == AutoresetMode.SAME_STEP:
            obs, infos = infos["final_obs"], infos["final_info"]
        known = {
            key: take_info(infos, key, rows, default) for key, default in INFO_DEFAULTS.items()
        }
        cut, bootstraps = read_ends(self.envs, terminated, truncated, infos, rows)
        ends = {"truncated": cut, "bootstraps": bootstraps, **take_obs(obs, rows), **known}
        terms = take_by_name(infos, "token_reward_terms", rows)
        watched = take_by_name(infos, "token_watched", rows)
        records = take(self._ring.movedim(2, 0), rows)
        # Gymnasium's own SAME_STEP gives the numbers of the last step in final_info only.
        records[:, self._clock, REF_LOGPROB] = known["ref_logprob"]
        episodes = {
            int(self.pairing.number[slot]): self._episode(
                int(slot),
                {key: values[n] for key, values in ends.items()},
                records[n],
                terms[n],
                watched[n],
            )
            for n, slot in enumerate(rows)
        }
        check_finite(list(episodes.values()), self.version)
        self.finished[rows] += 1
        self._age[rows] = 0
        self.pairing.begin(rows)
        return episodes

    def _episode(
        self,
        slot: int,
        end: dict[str, Any],
        record: np.ndarray,
        terms: dict[str, np.ndarray],
        watched: dict[str, np.ndarray],
    ) -> Episode:
        """One finished text from its last observation and infos, its row of the ring, its terms and
        its watched numbers (T,)."""
        age, length, placed = int(self._age[slot]), int(end["length"]), end["token_rewards"]
        start = length - age
        own = slice(start - end["prompt_length"], length - end["prompt_length"])
        lines = (self._clock - np.arange(age)[::-1]) % len(record)
        record = record[lines]
        if not np.isnan(placed).all():
            record[:, REWARD] = placed[own]
        return Episode(
            prompt=end["tokens"][:start],
            response=end["tokens"][start:length],
            logprob=record[:, LOGPROB],
            ref_logprob=record[:, REF_LOGPROB],
            reward=record[:, REWARD],
            potential=np.append(record[:, POTENTIAL], np.float32(end["potential"])),
            kl_coef=float(end["kl_coef"]),
            terminated=not end["truncated"],
            truncated=bool(end["truncated"]),
            score=float(end["score"]),
            gold=float(end["gold"]),
            prompt_id=int(end["prompt_id"]),
            slot=slot,
            index=int(self.finished[slot]),
            version=int(self._version[slot]),
            bootstraps=bool(end["bootstraps"]),
            terms={name: values[own] for name, values in terms.items()},
            watched={name: values[own] for name, values in watched.items()},
            action_mask=self._masks[lines, slot] if self._masks.size else None,
        )


def _device(obs: Mapping[str, Any]) -> torch.device:
    return obs["tokens"].device if isinstance(obs["tokens"], Tensor) else torch.device("cpu")
