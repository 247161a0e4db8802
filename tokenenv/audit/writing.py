"""Texts of the reference and of policies that read nothing, to their ends, the environment's
replies included.

Suffixes: n rows, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenenv.agents.rollout.actor import sample
from tokenenv.agents.rollout.text import Text, answered, turn_limit, with_turn
from tokenenv.audit.texts import OnText, no_listener
from tokenenv.env.replies import is_asked
from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.models.same_texts import first_equals, prefill_once
from tokenenv.models.trunks import logits_head, slot_model, trunk_of
from tokenenv.tables import Columns

ROWS = 128
"""Texts that run side by side."""

Speak = Callable[[Sequence[Text]], list[list[int]]]
"""A policy: maps running texts to the tokens of the next turn of each, 1 to `turn_limit` of
them."""


def blank(number: int, prompt: Sequence[int], prompt_id: int, columns: Columns) -> Text:
    """Return a text without a response; `number` seeds what the environment writes."""
    return Text(number, 0, list(map(int, prompt)), prompt_id, {}, columns=columns)


def written(
    envs: TokenVectorEnv, texts: Sequence[Text], speak: Speak, on_text: OnText = no_listener
) -> list[Text]:
    """Return the texts after they have been played to their ends, at most `ROWS` side by side."""
    done: list[Text] = list(texts)
    # Texts of similar length share a cache, so that it is no longer than its texts.
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i].so_far))
    for start in range(0, len(order), ROWS):
        running = order[start : start + ROWS]
        while running:
            turns = speak([done[i] for i in running])
            for i, tokens in zip(running, turns, strict=True):
                done[i] = _after(envs, with_turn(done[i], tokens, [0.0] * len(tokens)))
            running = [i for i in running if not done[i].ended]
        on_text(min(start + ROWS, len(order)), len(order))
    return done


def _after(envs: TokenVectorEnv, text: Text) -> Text:
    """Return a text that ends in a turn of the policy's, with what the environment answers."""
    reply = None
    if is_asked(envs.token_spec, text.tokens[-1]):
        reply = envs.reply(
            text.prompt, text.tokens, text.own, columns=text.columns, seed=text.number
        )
    return answered(text, reply, envs.token_spec)


def ends_of(envs: TokenVectorEnv) -> list[int]:
    """Return the tokens that end a turn of the policy's."""
    spec = envs.token_spec
    return [*spec.stop_token_ids, *(spec.turn_end_token_ids or ())]


def repeating(envs: TokenVectorEnv, tokens: Sequence[int]) -> Speak:
    """Return the policy that repeats one token in each text, the i-th in text number i."""
    ends = ends_of(envs)

    def speak(texts: Sequence[Text]) -> list[list[int]]:
        chosen = [tokens[text.number] for text in texts]
        rooms = [turn_limit(text, envs.token_spec) for text in texts]
        return [
            [token] * (1 if token in ends else room)
            for token, room in zip(chosen, rooms, strict=True)
        ]

    return speak


class Reference:
    """The env's reference as a policy of texts.

    Args:
        seed: of the sampling, at temperature 1.
        greedy: takes the likeliest token each time.
        may_stop: "always", "never", or "later": not at the first token of a turn.
    """

    def __init__(
        self,
        envs: TokenVectorEnv,
        *,
        seed: int = 0,
        greedy: bool = False,
        may_stop: str = "always",
    ) -> None:
        self.envs, self.greedy, self.may_stop = envs, greedy, may_stop
        self.device, self.ends = envs.device, ends_of(envs)
        self.head = logits_head(envs.reference, envs.token_spec.vocab_size)
        self.stops = torch.tensor(
            envs.token_spec.stop_token_ids, dtype=torch.int64, device=self.device
        )
        self.generator = torch.Generator(self.device).manual_seed(seed)

    @torch.no_grad()
    def __call__(self, texts: Sequence[Text]) -> list[list[int]]:
        """Return the next turn of each text."""
        begun = [text.so_far for text in texts]
        room = np.array([turn_limit(text, self.envs.token_spec) for text in texts])
        lengths = list(map(len, begun))
        slots = slot_model(
            trunk_of(self.envs.reference), len(begun), int(max(room + np.array(lengths)))
        )
        padded = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(ids) for ids in begun], batch_first=True
        )
        first = first_equals(padded, lengths)
        states = prefill_once(slots, range(len(begun)), padded.to(self.device), lengths, first)
        return self._turns(slots, states, room)

    def _turns(self, slots: Any, states: Tensor, room: np.ndarray) -> list[list[int]]:
        """Go on with some texts side by side until all turns have ended."""
        out: list[list[int]] = [[] for _ in room]
        running = np.ones(len(room), dtype=bool)
        for step in range(int(room.max())):
            tokens = self._choose(states, step)
            chosen = tokens.tolist()
            for i in np.flatnonzero(running):
                out[i].append(chosen[i])
                running[i] = chosen[i] not in self.ends and len(out[i]) < room[i]
            # The last token needs no state after it.
            if not running.any():
                break
            states = slots.append(tokens, running)
        return out

    def _choose(self, states: Tensor, step: int) -> Tensor:
        logits_nV = self.head(states).float()
        if self.may_stop == "never" or (self.may_stop == "later" and step == 0):
            logits_nV = logits_nV.index_fill(1, self.stops, -torch.inf)
        return logits_nV.argmax(-1) if self.greedy else sample(logits_nV, 1.0, self.generator)[0]
