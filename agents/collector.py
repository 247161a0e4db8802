"""Driving a vector env with an `Actor`, and cutting what happens into episodes.

Any Gymnasium vector env with the observation `{tokens, length, prompt_length}` will do, NumPy or torch, in any autoreset mode.
Suffixes: N envs, L context, T response tokens.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from .actor import Actor
from .env_rows import action, flags, method, take, take_info, take_obs
from .episodes import Episode, EpisodeBatch
from .masks import pack

Prefix = tuple[np.ndarray, np.ndarray]
"""The token ids of a prompt and of the response so far."""

# One line per step: what must be remembered of a running text; the text itself is in the observation.
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
    """`collect` was asked to stop; what had ended by then is kept for the next one."""


class Collector:
    """Steps an env one token at a time; slots never idle, and only finished episodes come out.

    An episode may straddle updates: each token keeps the log-probability it was sampled with.
    """

    def __init__(self, envs: VectorEnv, actor: Actor, *, seed: int = 0, group_size: int = 1) -> None:
        self.envs, self.actor, self.seed, self.group_size = envs, actor, seed, group_size
        self.mode = AutoresetMode(envs.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
        self.tokens_seen = 0
        """Tokens emitted so far, those of running episodes included."""
        self._obs: Mapping[str, Any] = {}
        self._seeded = False
        self._ring = torch.zeros(0)
        self._masks = np.zeros((0, 0, 0), np.uint8)
        """(L, N, M): the action masks of each step, beside the ring; empty where the env allows everything."""
        self._potential = torch.zeros(envs.num_envs)
        """(N,) the env's Phi of the texts as they stand."""
        self.has_potential = False
        """Whether the env has reported one."""
        self._clock = 0
        self._age = np.zeros(envs.num_envs, np.int64)
        self.finished = np.zeros(envs.num_envs, np.int64)
        """(N,) episodes that have ended in each row."""
        self._resetting = np.zeros(envs.num_envs, bool)
        self._waiting: list[Episode] = []
        self._batch: list[Episode] = []
        """What has ended for the batch that is being collected."""
        self.stopping = False
        """Set by a signal's handler, say: `collect` ends after the step that is under way."""
        self._first = np.zeros(envs.num_envs, np.int64)
        """(N,) episodes that had ended in each row when all began anew."""
        self.version = 0
        """Updates that the policy has had."""
        self._version = np.zeros(envs.num_envs, np.int64)
        """(N,) the version that each row's text began with."""

    def collect(self, num_tokens: int) -> list[Episode]:
        """Steps until the episodes that ended hold at least `num_tokens` response tokens, and returns them.

        With a `group_size` above 1, whole groups only, one after the other: the k-th texts of consecutive slots, which
        share a prompt. The first texts of a group wait for its last. Raises `Stopped` where `stopping` is set meanwhile.
        """
        missing = num_tokens - sum(len(e.response) for e in self._batch)
        while missing > 0:
            if self.stopping:
                raise Stopped
            ended = self.step() if self.group_size == 1 else self._complete_groups(self.step())
            self._batch += ended
            missing -= sum(len(e.response) for e in ended)
        episodes, self._batch = self._batch, []
        return episodes

    def _complete_groups(self, ended: list[Episode]) -> list[Episode]:
        self._waiting += ended
        groups: dict[tuple[int, int], list[Episode]] = {}
        for episode in self._waiting:
            count = episode.index - int(self._first[episode.slot])
            groups.setdefault((episode.slot // self.group_size, count), []).append(episode)
        complete = {key: group for key, group in groups.items() if len(group) == self.group_size}
        self._waiting = [episode for key, group in groups.items() if key not in complete for episode in group]
        return [episode for group in complete.values() for episode in sorted(group, key=lambda e: e.slot)]

    def step(self) -> list[Episode]:
        """Emits one token in every row and returns the episodes that this ended."""
        if not self.running:
            self.reset()
        tokens, logprobs = self.actor.act(self._obs)
        allowed = pack(self._obs)
        obs, rewards, terminations, truncations, infos = self._step_env(action(self.envs, self._obs, tokens, logprobs))
        self._record(logprobs, rewards, infos, allowed)
        terminated, truncated = flags(terminations, truncations)
        ended = terminated | truncated
        episodes = self._finish(terminated, truncated, obs, infos) if ended.any() else []
        self._obs = obs
        if self.mode == AutoresetMode.NEXT_STEP:
            self._resetting = ended
        elif self.mode == AutoresetMode.DISABLED and ended.any():
            self._obs, infos = self.envs.reset(options={"reset_mask": ended})
            self._note_potential(infos)
        return episodes

    def _step_env(self, actions: Any) -> Any:
        try:
            return self.envs.step(actions)
        except Exception:
            # A reward server that is down, say: half a step cannot be gone on from. The next step begins anew.
            self._obs = {}
            raise

    def reset(self, options: dict[str, Any] | None = None) -> None:
        """Begins anew in every row; running episodes are dropped. The first time is seeded."""
        self._obs, infos = self.envs.reset(seed=None if self._seeded else self.seed, options=options)
        self._seeded = True
        num_envs, length = self._obs["tokens"].shape
        self._ring = torch.zeros(length, 4, num_envs, device=_device(self._obs))
        self._potential = torch.zeros(num_envs, device=self._ring.device)
        self._note_potential(infos)
        self._age[:], self._resetting[:] = 0, False
        self._waiting, self._first = [], self.finished.copy()

    @property
    def running(self) -> bool:
        """Whether the env has been reset."""
        return bool(self._obs)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the env's own state and the observation that comes with it."""
        names = ["tokens_seen", "finished", "version", "_version", "_first", "_age", "_resetting", "_clock"]
        names += ["_ring", "_masks", "_potential"] if self.running else []
        lists = {"waiting": self._waiting, "batch": self._batch}
        stacked = {name: asdict(EpisodeBatch.stack(some)) if some else None for name, some in lists.items()}
        return copy.deepcopy({name: getattr(self, name) for name in names}) | stacked

    def load_state_dict(self, state: dict[str, Any], *, running: bool) -> None:
        """Continues from `state_dict()`; without `running`, episodes that had begun are forgotten."""
        waiting, batch = (EpisodeBatch(**some).unstack() if some else [] for some in (state["waiting"], state["batch"]))
        names = [name for name in state if name not in ("waiting", "batch")]
        vars(self).update({name: state[name] for name in (names if running else ["tokens_seen", "finished", "version"])})
        self._waiting, self._batch = (waiting if running else []), batch

    def refresh(self) -> None:
        """To be called when the weights have changed."""
        self.version += 1
        self.actor.refresh()

    def save_env(self) -> Any:
        """The env's state; None where no text runs, or the env cannot save it."""
        save_state = method(self.envs, "save_state")
        return save_state() if self.running and save_state else None

    def load_env(self, saved: Any) -> None:
        """Goes on from what `save_env` returned, with caches filled anew: how they were filled shows in the last bits of
        what they give."""
        if saved is not None:
            self.resume(method(self.envs, "load_state")(saved)[0])
        self.actor.refresh()

    def play_on(self, states: Sequence[Prefix], rollouts: int) -> list[Episode]:
        """`rollouts` continuations of each state to the end, one after the other; the running texts wait meanwhile."""
        running, found = self.save_env(), []
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
        # Slots that are left over play on from the last state, and what they write is not looked at.
        given = [states[min(slot // rollouts, len(states) - 1)] for slot in range(self.envs.num_envs)]
        collector = Collector(self.envs, self.actor)
        collector.reset({"reset_mask": mask, "prompts": [p for p, _ in given], "prefixes": [r for _, r in given]})
        if len(followers):
            collector.resume(method(self.envs, "fork")(followers // rollouts * rollouts, followers)[0])
        found: dict[int, Episode] = {}
        while len(found) < wanted:
            found = {e.slot: e for e in collector.step() if e.slot < wanted} | found
        self.tokens_seen += collector.tokens_seen
        return [found[slot] for slot in range(wanted)]

    def resume(self, obs: Mapping[str, Any]) -> None:
        """Goes on from the observation of an env that has been restored to where it was."""
        self._obs, self._seeded = obs, True
        self._ring, self._potential = self._ring.to(_device(obs)), self._potential.to(_device(obs))

    def _record(self, logprobs: Tensor, rewards: Any, infos: Mapping[str, Any], allowed: np.ndarray | None) -> None:
        """Writes one line of the ring; the row that only reset (NEXT_STEP) did not act, and its age stays 0."""
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
            known, potential = (torch.as_tensor(infos[key], device=self._ring.device) for key in ("_potential", "potential"))
            self._potential = torch.where(known, potential.float(), self._potential)

    def _finish(self, terminated: np.ndarray, truncated: np.ndarray, obs: Any, infos: Mapping[str, Any]) -> list[Episode]:
        rows = np.flatnonzero(terminated | truncated)
        if self.mode == AutoresetMode.SAME_STEP:
            obs, infos = infos["final_obs"], infos["final_info"]
        known = {key: take_info(infos, key, rows, default) for key, default in INFO_DEFAULTS.items()}
        ends = {"terminated": terminated[rows], "truncated": truncated[rows], **take_obs(obs, rows), **known}
        placed = infos.get("token_reward_terms", {})
        terms = {name: take(values, rows) for name, values in placed.items() if not name.startswith("_")}
        records = take(self._ring.movedim(2, 0), rows)
        # Gymnasium's own SAME_STEP gives the numbers of the last step in final_info only.
        records[:, self._clock, REF_LOGPROB] = known["ref_logprob"]
        episodes = [
            self._episode(
                int(slot),
                {key: values[n] for key, values in ends.items()},
                records[n],
                {name: values[n] for name, values in terms.items()},
            )
            for n, slot in enumerate(rows)
        ]
        self.finished[rows] += 1
        self._age[rows] = 0
        return episodes

    def _episode(self, slot: int, end: dict[str, Any], record: np.ndarray, terms: dict[str, np.ndarray]) -> Episode:
        """One finished text from its last observation and infos, its row of the ring, and its terms (T,)."""
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
            terminated=bool(end["terminated"]),
            truncated=bool(end["truncated"]),
            score=float(end["score"]),
            gold=float(end["gold"]),
            prompt_id=int(end["prompt_id"]),
            slot=slot,
            index=int(self.finished[slot]),
            version=int(self._version[slot]),
            terms={name: values[own] for name, values in terms.items()},
            action_mask=self._masks[lines, slot] if self._masks.size else None,
        )


def _device(obs: Mapping[str, Any]) -> torch.device:
    return obs["tokens"].device if isinstance(obs["tokens"], Tensor) else torch.device("cpu")
