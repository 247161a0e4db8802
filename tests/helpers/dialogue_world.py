"""A small Dialogue-v0 as a world of `tabular.py`: all its texts, and a policy with logits of its own
in every state in which it acts."""

from typing import Any

import numpy as np
import torch
from dialogues import score, small, turn_rewards
from tabular import Tabular, World
from torch import Tensor

from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.types import EpisodeScores


class Beginnings(Tabular):
    """A language model as a table of log-probs (K, V), by the number of what has been written so
    far (`numbered`)."""

    def __init__(self, logprobs: Tensor, children: Tensor) -> None:
        super().__init__(logprobs)
        self.children, self.vocab_size = children, children.shape[1]

    def states(self, tokens: Tensor, lengths: Any) -> Tensor:
        """The numbers (B, L); those to the right of a text mean nothing."""
        histories = [torch.zeros_like(tokens[:, 0])]
        for token in tokens[:, 1:].T:
            histories.append(self.children[histories[-1], token])
        return torch.stack(histories, 1)


class DialogueWorld(World):
    """All texts of a small dialogue, "deterministic" or "stochastic".

    Histories are numbered as they come, and hold the words of both authors. B texts, T words of the
    policy's in each, L words in all.
    """

    def __init__(self, kind: str, seed: int = 0, **options: Any) -> None:
        self.seed, self._generator = seed, torch.Generator().manual_seed(seed)
        self.small = s = small(kind, **options)
        said = s.beginnings(s.T)
        self.chance = torch.tensor(list(said.values()), dtype=torch.float64)
        self.own, self.texts = [list(one.own) for one in said], [s.ids(one) for one in said]
        self.turn_rewards = [turn_rewards(one) for one in said]
        self.final_score = torch.tensor([score(one) for one in said], dtype=torch.float64)
        children, last = numbered(self.texts, s.V)
        self.policy = self.normal(*children.shape)
        logprobs = torch.from_numpy(np.log(s.task.reference.probs))
        self.reference = Beginnings(logprobs[last], children)
        width = max(map(len, self.texts))
        self.whole = torch.tensor([[0, *text, *[0] * (width - len(text))] for text in self.texts])
        self.places = torch.tensor([[*own_places(own), 1 + len(own)] for own in self.own])
        at = self.places[:, :-1]
        self.tokens, self.before = (
            self.whole.gather(1, at),
            self.states(self.whole).gather(1, at - 1),
        )
        self.length, self.mask = torch.full((len(at),), s.T), torch.ones_like(at, dtype=torch.bool)

    def texts_of(self, rows: Tensor) -> dict[str, Tensor]:
        places = self.places[rows]
        return {"tokens_BL": self.whole[rows], "length_B": places[:, -1], "position_BT1": places}

    def rewards(self, per_token: bool = False) -> Tensor:
        """r (B, T): the text's score on the policy's last word."""
        last = torch.arange(self.tokens.shape[1]) == self.length[:, None] - 1
        return self.final_score[:, None] * last

    def env(self, scorer: str = "", **options: Any) -> TokenVectorEnv:
        """A vector env of this dialogue."""
        return TokenVectorEnv(1, task=self.small.task, **options)

    def score(self, envs: TokenVectorEnv, **options: Any) -> EpisodeScores:
        """All texts, scored by `envs`."""
        options = {"own": self.own, "turn_rewards": self.turn_rewards} | options
        return envs.score_episodes([[0]] * len(self.texts), self.texts, **options)


def numbered(texts: list[list[int]], vocab_size: int) -> tuple[Tensor, Tensor]:
    """Every beginning of a text has a number, 0 is the empty one: the number (K, V) of the
    beginning with one more token, 0 where there is none, and the last token (K,), V of the empty
    one."""
    number: dict[tuple[int, ...], int] = {(): 0}
    for text in texts:
        for end in range(1, len(text) + 1):
            number.setdefault(tuple(text[:end]), len(number))
    children = torch.zeros(len(number), vocab_size, dtype=torch.int64)
    for beginning, n in number.items():
        if beginning:
            children[number[beginning[:-1]], beginning[-1]] = n
    return children, torch.tensor(
        [beginning[-1] if beginning else vocab_size for beginning in number]
    )


def own_places(own: list[bool]) -> list[int]:
    """The places of the policy's words in the text, behind the prompt's one."""
    return [1 + i for i, mine in enumerate(own) if mine]
