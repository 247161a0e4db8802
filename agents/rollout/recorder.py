"""What a collector has seen of the texts that run, and the episodes that they become.

The text itself is in the env's observation when it ends, so only what each step adds is kept here:
one line of numbers for every slot. Suffixes: N slots, L context, T response tokens, M bytes of an
action mask.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenenv.agents.episodes import Episode, told_apart
from tokenenv.agents.rollout.env_rows import take, take_by_name, take_info, take_obs
from tokenenv.errors import ContractError
from tokenenv.tables import Columns

LOGPROB, REWARD, REF_LOGPROB, POTENTIAL, VALUE = NUMBERS = range(5)
"""The numbers of a line."""

INFO_DEFAULTS: dict[str, float] = {
    "score": np.nan,
    "gold": np.nan,
    "token_rewards": np.nan,
    "kl_coef": 0.0,
    "ref_logprob": 0.0,
    "potential": 0.0,
    "prompt_id": -1,
    "reward_version": -1,
}
"""What an env may say about a finished text, and what an episode has where the env does not."""
STATE = ("age", "version", "prefix", "_ring", "_clock", "_masks", "_potential")
"""The attributes that a checkpoint holds."""


class Recorder:
    """Records N running texts step by step, and cuts finished ones out of the record."""

    def __init__(self, num_slots: int, columns: Sequence[Columns] = ()) -> None:
        self.columns = columns
        """What belongs to each of the env's own prompts, by name; empty where the env has none."""
        self._given: list[Columns] = [{}] * num_slots
        """What belongs to the prompt that each slot was given at the last full reset."""
        self.age = np.zeros(num_slots, np.int64)
        """(N,) tokens that the policy has emitted in each slot's text."""
        self.version = np.zeros(num_slots, np.int64)
        """(N,) updates that the policy had had when each slot's text began."""
        self.prefix = np.zeros(num_slots, np.int64)
        """(N,) tokens of the prefix that each slot's text began with, of those that count as the
        policy's; of envs that write into texts only, the others have them in the observation."""
        self.has_potential = False
        """Whether the env has reported a potential."""
        # A ring of L steps: no text is longer than the context, so what is overwritten belongs to
        # texts that have ended. One clock serves all slots, and a step writes one line for all of
        # them, whatever their ages: on a GPU that is one write without an index per slot.
        self._ring = torch.zeros(0)
        """(L, 5, N), on the device of the env's arrays."""
        self._clock = 0
        """The line of the latest step."""
        self._masks = np.zeros((0, 0, 0), np.uint8)
        """(L, N, M): the action masks of each step; empty where the env allows everything."""
        self._potential = torch.zeros(num_slots)
        """(N,) the env's Phi of the texts as they stand."""

    def restart(
        self,
        obs: Mapping[str, Any],
        infos: Mapping[str, Any],
        given: Sequence[Columns] = (),
        prefix: np.ndarray | int = 0,
    ) -> None:
        """Begin a text in every slot, from what a full reset returned; `given` (N) are the columns
        of the prompts that it was given, `prefix` (N,) is what the attribute of this name says."""
        num_slots, length = obs["tokens"].shape
        self._given = list(given) or [{}] * num_slots
        device = _device(obs)
        self._ring = torch.zeros(length, len(NUMBERS), num_slots, device=device)
        self._potential = torch.zeros(num_slots, device=device)
        self.note_potential(infos)
        self.age[:], self.prefix[:] = 0, prefix

    def end(self, slots: np.ndarray) -> None:
        """Begin the next texts of `slots`, which have no token and no prefix yet."""
        self.age[slots] = self.prefix[slots] = 0

    def record(
        self,
        logprobs_N: Tensor,
        rewards: Any,
        infos: Mapping[str, Any],
        allowed: np.ndarray | None,
        acted: np.ndarray,
        version: int,
        values_N: Tensor | None = None,
    ) -> None:
        """Take in one step: the log-probs and rewards (N,), its infos, the packed masks (N, M), and
        the critic's values (N,) of the states before it where they were read.

        A slot that has not `acted` (N,) was only reset. Its line is written all the same, and its
        age of 0 says that it counts for nothing.
        """
        self._clock = (self._clock + 1) % len(self._ring)
        line = self._ring[self._clock]
        line[LOGPROB] = logprobs_N
        line[REWARD] = torch.as_tensor(rewards)
        line[REF_LOGPROB] = torch.as_tensor(infos.get("ref_logprob", 0.0))
        # Phi of the state before this token: the env's infos tell the one after it.
        line[POTENTIAL] = self._potential
        line[VALUE] = torch.nan if values_N is None else values_N
        if allowed is not None:
            if not self._masks.size:
                self._masks = np.zeros((len(self._ring), *allowed.shape), np.uint8)
            self._masks[self._clock] = allowed
        self.note_potential(infos)
        self.version[self.age == 0] = version
        self.age += acted

    def forget_values(self) -> None:
        """Forget the critic's values in all running texts."""
        self._ring[:, VALUE] = torch.nan

    def note_potential(self, infos: Mapping[str, Any]) -> None:
        """Take in the potential that infos report; slots that they leave out keep theirs."""
        if "potential" not in infos:
            return
        self.has_potential = True
        device = self._ring.device
        known_N = torch.as_tensor(infos["_potential"], device=device)
        potential_N = torch.as_tensor(infos["potential"], device=device).float()
        self._potential = torch.where(known_N, potential_N, self._potential)

    def episodes(
        self,
        slots: np.ndarray,
        obs: Any,
        infos: Mapping[str, Any],
        cut: np.ndarray,
        bootstraps: np.ndarray,
        finished: np.ndarray,
    ) -> list[Episode]:
        """Return the episodes that end in `slots` with the step that was recorded last.

        Args:
            obs, infos: of that step, for all N slots, before any slot is reset.
            cut, bootstraps: for each of `slots`, as `read_ends` returns them.
            finished: (N,) how many episodes each slot has ended before.
        """
        ends = take_obs(obs, slots)
        for key, default in INFO_DEFAULTS.items():
            ends[key] = take_info(infos, key, slots, default)
        ends |= {"truncated": cut, "bootstraps": bootstraps, "index": finished[slots]}
        terms = take_by_name(infos, "token_reward_terms", slots)
        watched = take_by_name(infos, "token_watched", slots)
        records = take(self._ring.movedim(2, 0), slots)
        # Gymnasium's own SAME_STEP has the numbers of the last step in final_info only, so the
        # line of that step does not hold them.
        records[:, self._clock, REF_LOGPROB] = ends["ref_logprob"]
        episodes = []
        for n, slot in enumerate(slots):
            end = {key: values[n] for key, values in ends.items()}
            episodes.append(self._episode(int(slot), end, records[n], terms[n], watched[n]))
        return episodes

    def _episode(
        self,
        slot: int,
        end: dict[str, Any],
        record: np.ndarray,
        terms: dict[str, np.ndarray],
        watched: dict[str, np.ndarray],
    ) -> Episode:
        """Cut one text out of its slot's record (L, 5); `terms` and `watched` are by name, (T,)."""
        age, text = int(self.age[slot]), end["tokens"][: end["length"]]
        places, prefix = self._places(slot, end)
        # The tokens of a prefix were given at reset and not emitted. They stand before the first
        # recorded token, belong to the prompt here, and what the env places on them is dropped.
        own = slice(prefix, prefix + age)
        lines = (self._clock - np.arange(age)[::-1]) % len(record)
        record = record[lines]
        if not np.isnan(end["token_rewards"]).all():
            # Hindsight terms are paid at the last step, and placed where they belong only here.
            record[:, REWARD] = end["token_rewards"][own]
        return Episode(
            prompt=text[: places[0]],
            **told_apart(text, places),
            logprob=record[:, LOGPROB],
            ref_logprob=record[:, REF_LOGPROB],
            reward=record[:, REWARD],
            potential=np.append(record[:, POTENTIAL], np.float32(end["potential"])),
            drawn_value=record[:, VALUE],
            kl_coef=float(end["kl_coef"]),
            terminated=not end["truncated"],
            truncated=bool(end["truncated"]),
            score=float(end["score"]),
            gold=float(end["gold"]),
            prompt_id=int(end["prompt_id"]),
            slot=slot,
            index=int(end["index"]),
            version=int(self.version[slot]),
            bootstraps=bool(end["bootstraps"]),
            reward_version=int(end["reward_version"]),
            terms={name: values[own] for name, values in terms.items()},
            watched={name: values[own] for name, values in watched.items()},
            columns=dict(self._columns(int(end["prompt_id"]), slot)),
            action_mask=self._masks[lines, slot] if self._masks.size else None,
        )

    def _places(self, slot: int, end: dict[str, Any]) -> tuple[np.ndarray, int]:
        """Return the places of a text's emitted tokens (T,), and how many columns the policy's
        tokens of its prefix have before theirs."""
        age, length = int(self.age[slot]), int(end["length"])
        if "own_mask" not in end:
            return np.arange(length - age, length), length - age - int(end["prompt_length"])
        places = np.flatnonzero(end["own_mask"][:length])
        if len(places) != age:
            raise ContractError(
                f"own_mask marks {len(places)} tokens of the text that ended in slot {slot}, and "
                f"actions emitted {age}: it must be 1 on these and on no others."
            )
        return places, int(self.prefix[slot])

    def _columns(self, prompt_id: int, slot: int) -> Columns:
        """What belongs to a text's prompt: the env's own, or one that the slot was given."""
        own = 0 <= prompt_id < len(self.columns)
        return self.columns[prompt_id] if own else self._given[slot]

    def move_to(self, obs: Mapping[str, Any]) -> None:
        """Go on beside the arrays of `obs`, which may be on another device than before."""
        device = _device(obs)
        self._ring, self._potential = self._ring.to(device), self._potential.to(device)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a checkpoint needs."""
        return copy.deepcopy({name: getattr(self, name) for name in STATE})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`."""
        vars(self).update(copy.deepcopy({name: state[name] for name in STATE}))


def _device(obs: Mapping[str, Any]) -> torch.device:
    return obs["tokens"].device if isinstance(obs["tokens"], Tensor) else torch.device("cpu")
