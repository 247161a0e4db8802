"""A world of `tabular.py` in which an environment answers, at random, and in which every text can
still be enumerated.

The policy's token 1 ends a turn. The environment then gives one of `ANSWERS`, with probabilities
and a reward that depend on all that came before. B texts, T tokens of the policy's own.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from tabular import (
    SCORERS,
    STEP_END,
    STOP,
    Tabular,
    TabularOracle,
    TrainableTabular,
    V,
    World,
)
from torch import Tensor

from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.turns import Reply, TextSoFar
from tokenenv.types import EpisodeScores, Task

T, TURN_END = 3, 1
ANSWERS = (([2], False), ([STOP, STEP_END], False), ([2], True))
"""What the environment may write, and whether the text ends with it. A stop token that it writes
ends nothing."""
L = 1 + T + 2 * T
NUM_HISTORIES = (V**L - 1) // (V - 1)


@dataclass
class Outcome:
    """A finished text and how it came about."""

    response: list[int] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    chance: float = 1.0
    """Of what the environment drew."""
    turn_rewards: list[float] = field(default_factory=list)
    """One for each token of the policy's."""
    truncated: bool = False

    def plus(self, tokens: list[int], own: bool, **changes: Any) -> "Outcome":
        """With more tokens of one author."""
        made = {
            "chance": self.chance,
            "turn_rewards": self.turn_rewards,
            "truncated": self.truncated,
        } | changes
        return Outcome([*self.response, *tokens], [*self.own, *[own] * len(tokens)], **made)


class TurnWorld(World):
    """As `World`, over everything that policy and environment may do together. `before`, `after` and
    `next` are the histories around each own token, (B, T)."""

    def __init__(self, seed: int, random: bool = True) -> None:
        self.seed, self.stops, self._generator = seed, (STOP,), torch.Generator().manual_seed(seed)
        self.policy = self.normal(NUM_HISTORIES, V)
        self.reference, self.other = (
            Tabular(self.normal(NUM_HISTORIES, V).log_softmax(-1)) for _ in range(2)
        )
        self.scores = self.normal(NUM_HISTORIES)
        # A mean that is not 0 is what centring by turn takes away.
        self.turn_rewards = 1.0 + self.normal(NUM_HISTORIES)
        answers = self.normal(NUM_HISTORIES, len(ANSWERS))
        self.share_table = self.normal(NUM_HISTORIES, L)
        self.answers = (answers if random else 1e4 * answers).softmax(-1)
        self.outcomes = [one for one in self._grow(Outcome()) if one.chance > 0]
        self._lay_out()

    def _grow(self, so_far: Outcome) -> list[Outcome]:
        if sum(so_far.own) == T:
            so_far.truncated = True
            return [so_far]
        found = []
        for token in range(V):
            rewards = [*so_far.turn_rewards, 0.0]
            more = so_far.plus([token], True, turn_rewards=rewards)
            if token == STOP:
                found.append(more)
            elif token == TURN_END:
                found += self._answered(more)
            else:
                found += self._grow(more)
        return found

    def _answered(self, so_far: Outcome) -> list[Outcome]:
        found, asked = [], history_of(so_far.response)
        for (tokens, ends), chance in zip(ANSWERS, self.answers[asked].tolist(), strict=True):
            more = so_far.plus(tokens, False, chance=so_far.chance * chance)
            earned = float(self.turn_rewards[history_of(more.response)])
            more.turn_rewards = [*so_far.turn_rewards[:-1], earned]
            found += [more] if ends else self._grow(more)
        return found

    def _lay_out(self) -> None:
        self.texts = [one.response for one in self.outcomes]
        self.own = [one.own for one in self.outcomes]
        self.length = torch.tensor([sum(own) for own in self.own])
        self.mask = torch.arange(T) < self.length[:, None]
        self.final = self.mask & (torch.arange(T) == self.length[:, None] - 1)
        self.truncated = torch.tensor([one.truncated for one in self.outcomes])
        self.chance = torch.tensor([one.chance for one in self.outcomes], dtype=torch.float64)
        self.earned = self._columns([one.turn_rewards for one in self.outcomes]).double()
        self.end = torch.tensor([history_of(text) for text in self.texts])
        places = [[t for t, own in enumerate(mask) if own] for mask in self.own]
        rows = list(zip(self.texts, places, strict=True))
        self.tokens = self._columns([[text[t] for t in at] for text, at in rows]).long()
        self.before, self.after, self.next = (
            self._columns([[history_of(text[:t]) for t in cut(at, text)] for text, at in rows])
            for cut in (
                lambda at, text: at,
                lambda at, text: [t + 1 for t in at],
                lambda at, text: [*at[1:], len(text)],
            )
        )
        # Places of own tokens and of the text's end, behind a prompt of one token.
        ends = [[*(t + 1 for t in at), len(text) + 1] for text, at in rows]
        self.positions = self._columns(ends, T + 1).long()
        numbers = (self.positions.diff(dim=1) != 1).long()
        self.turns = (numbers.cumsum(1) - numbers) * self.mask
        """The number of each own token's turn, from 0."""
        self.ends_turn = self.mask & (self.final | (numbers == 1))

    def _columns(self, rows: list[list[Any]], width: int = T) -> Tensor:
        return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])

    def score_of(self, scorer: str) -> Tensor:
        """(B,) the score of each text, by the definition of a `Scorer`."""
        if scorer == "token":
            return (self.scores[self.after] * self.mask).sum(1)
        return self.scores[self.end]

    def score_at(self, scorer: str, histories: Tensor, upto: int) -> Tensor:
        """(B,) the score at given histories (B,), `upto` own tokens into each text."""
        if scorer == "token":
            return (self.scores[self.after] * self.mask)[:, :upto].sum(1)
        return self.scores[histories]

    def env(self, scorer: str = "sequence", num_envs: int = 1, **options: Any) -> TokenVectorEnv:
        """A vector env of this world."""
        oracle = options.pop("oracle", lambda beta: self.scores)
        task = Task(
            tokenizer=None,
            reference=self.reference,
            prompts=[[0]],
            max_prompt_tokens=1,
            max_new_tokens=T,
            max_context_tokens=L,
            stop_token_ids=self.stops,
            respond=self.respond,
            turn_end_token_ids=(TURN_END,),
            scorer=SCORERS[scorer](self) if scorer else None,
            implicit_model=options.pop("implicit_model", self.other),
            teacher=self.other,
            model=TrainableTabular(self.other),
            step_end_token_ids=(STEP_END,),
            oracle=TabularOracle(self.reference, oracle),
        )
        return TokenVectorEnv(num_envs, task=task, **options)

    def respond(self, text: TextSoFar) -> Reply:
        """One of the answers, by the text's own numbers."""
        chances = self.answers[history_of(text.response)].numpy()
        tokens, ends = ANSWERS[int(text.rng().choice(len(ANSWERS), p=chances / chances.sum()))]
        earned = self.turn_rewards[history_of([*text.response, *tokens])]
        return Reply(tokens, float(earned), ends)

    def score(self, envs: TokenVectorEnv, **options: Any) -> EpisodeScores:
        """All texts, scored by `envs`."""
        options = {
            "own": self.own,
            "turn_rewards": [one.turn_rewards for one in self.outcomes],
            "truncated": self.truncated.tolist(),
        } | options
        return envs.score_episodes([[0]] * len(self.texts), self.texts, **options)


@cache
def turn_worlds() -> list[TurnWorld]:
    """Two whose environment draws its answers, and one whose environment always gives the same."""
    return [TurnWorld(0), TurnWorld(1), TurnWorld(2, random=False)]


def history_of(response: Any) -> int:
    """Its number in the tree."""
    number = 0
    for token in np.asarray(response, dtype=np.int64).tolist():
        number = V * number + 1 + token
    return number
