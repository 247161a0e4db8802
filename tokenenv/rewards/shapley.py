"""The score, shared out by the Shapley value of each part of the response."""

from collections.abc import Iterator
from itertools import permutations
from math import factorial

import numpy as np
import torch
from torch import Tensor

from tokenenv.errors import InvalidArgument
from tokenenv.models.batching import upload
from tokenenv.rewards.redistribute import Redistribution, distinct_scores
from tokenenv.rewards.seen import FinishedTexts
from tokenenv.types import TextIds


class Shapley(Redistribution):
    """The score, shared out by Shapley values: r_t = phi_k / n_k on the n_k tokens of segment k,
    where phi_k is what segment k adds to the score when it joins the text, averaged over the orders
    in which the segments may join.

    This is SCAR (Cao et al. 2025, arXiv 2505.20417) with consecutive segments of equal length as
    players. A coalition is worth the score of the prompt followed by its segments alone; a prefix
    given to reset is always there. All m! orders are walked if they are no more than
    `permutations`. Otherwise that many are drawn, each with its reverse (Mitchell et al. 2022,
    arXiv 2104.12199), from a generator seeded with the text: an estimate whose mean is phi.
    Whichever orders are drawn, the sum is score - f(prompt), with f the score without own tokens.

    Hindsight: preserves the return, not the gradient of reward-to-go (early shares depend on tokens
    not yet chosen). Costs at most permutations * (max_segments - 1) + 1 scores a text (57 by
    default), of responses that are half as long on average. It fails where the scorer has never
    seen texts with holes, and where credit belongs to a part of a segment.

    Args:
        max_segments: the players of a text, m; a response of fewer tokens has one player a token.
        permutations: the orders that are walked, an even number.
    """

    name = "shapley"

    def __init__(self, max_segments: int = 8, permutations: int = 8) -> None:
        if max_segments < 1:
            raise InvalidArgument(
                f"max_segments={max_segments} is not allowed; it must be 1 or more."
            )
        if permutations < 2 or permutations % 2:
            raise InvalidArgument(
                f"permutations={permutations} is not allowed; it must be an even number, 2 or more."
            )
        self.max_segments, self.permutations = max_segments, permutations

    def place(self, texts: FinishedTexts, max_new_tokens: int) -> Tensor:
        """(B, T): the value of each token's segment, in equal shares."""
        assert texts.score is not None
        pairs = texts.prompt_and_response_ids()
        players = [
            self._players(int(given), len(response))
            for given, (_, response) in zip(texts.prefix_length, pairs, strict=True)
        ]
        orders = [
            _orders(len(own), self.permutations, pair)
            for own, pair in zip(players, pairs, strict=True)
        ]
        before = [
            text for each in zip(pairs, players, orders, strict=True) for text in _coalitions(*each)
        ]
        worth = distinct_scores(self._scorer, before, self._max_batch_tokens).to(texts.score.device)
        values = _mean_gains(worth, texts.score, orders, self.max_segments)
        return _spread(values, players, max_new_tokens)

    def _players(self, start: int, end: int) -> list[np.ndarray]:
        """The places in the response of each segment's tokens."""
        return np.array_split(np.arange(start, end), min(self.max_segments, end - start))


def _orders(num_players: int, count: int, text: TextIds) -> np.ndarray:
    """The orders to walk, (P, m): all, or a sample with every order's reverse."""
    if factorial(num_players) <= count:
        return np.asarray(list(permutations(range(num_players))))
    generator = np.random.default_rng([*text[0], *text[1]])
    drawn = generator.permuted(np.tile(np.arange(num_players), (count // 2, 1)), axis=1)
    return np.concatenate([drawn, drawn[:, ::-1]])


def _coalitions(text: TextIds, players: list[np.ndarray], orders: np.ndarray) -> Iterator[TextIds]:
    """The text that each player joins, order by order."""
    prompt, response = text
    given = response[: players[0][0]]
    for order in orders:
        for k in range(len(order)):
            kept = [players[player] for player in sorted(order[:k])]
            yield prompt, given + [response[t] for places in kept for t in places]


def _mean_gains(
    worth: Tensor, score: Tensor, orders: list[np.ndarray], max_segments: int
) -> Tensor:
    """(B, m): what each player adds when it joins, averaged over the orders. `worth` holds the
    scores of what each player joins, in the sequence of `_coalitions`."""
    row = np.concatenate([np.full(order.size, i) for i, order in enumerate(orders)])
    weight = np.concatenate(
        [np.full(order.size, 1 / len(order), dtype=np.float32) for order in orders]
    )
    last = np.concatenate(
        [np.tile(np.arange(order.shape[1]) == order.shape[1] - 1, len(order)) for order in orders]
    )
    player = np.concatenate([order.ravel() for order in orders])
    # After a player has joined, the text is what the next player joins; after the last player of an
    # order it is the whole text.
    rows = upload(row, worth.device)
    after = torch.where(upload(last, worth.device), score[rows], worth.roll(-1))
    gains = (after - worth) * upload(weight, worth.device)
    return worth.new_zeros(len(score), max_segments).index_put(
        (rows, upload(player, worth.device)), gains, accumulate=True
    )


def _spread(values: Tensor, players: list[list[np.ndarray]], max_new_tokens: int) -> Tensor:
    """(B, T): each player's value (B, m) in equal shares on its tokens."""
    segment = np.zeros((len(players), max_new_tokens), dtype=np.int64)
    share = np.zeros((len(players), max_new_tokens), dtype=np.float32)
    for row, own in enumerate(players):
        for number, places in enumerate(own):
            segment[row, places], share[row, places] = number, 1 / len(places)
    return values.gather(1, upload(segment, values.device)) * upload(share, values.device)
