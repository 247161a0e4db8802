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
    given to reset, and what the environment wrote, are always there. Segments are cut from the own
    tokens one after the other, so one may span what was written between them. All m! orders are
    walked if they are no more than `permutations`. Otherwise that many are drawn, each with its
    reverse (Mitchell et al. 2022, arXiv 2104.12199), from a generator seeded with the text: an
    estimate whose mean is phi. What the environment wrote changes the score by itself, without own
    tokens; that stands on the last own token. So the sum is score - f(prompt), whichever orders are
    drawn.

    Hindsight: preserves the return, not the gradient of reward-to-go (early shares depend on tokens
    not yet chosen). Costs at most permutations * (max_segments - 1) + 1 scores a text (57 by
    default), of responses that are half as long on average, and one more where the environment
    wrote. It fails where the scorer has never seen texts with holes, and where credit belongs to a
    part of a segment.

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
        players = [self._players(mask) for mask in texts.own_columns(max_new_tokens)]
        orders = [
            _orders(len(each), self.permutations, pair)
            for each, pair in zip(players, texts.prompt_and_response_ids(), strict=True)
        ]
        worth, begun = self._worth(texts, players, orders, max_new_tokens)
        values = _mean_gains(worth, texts.score, orders, self.max_segments)
        placed = _spread(values, players, max_new_tokens)
        # What no player adds was added by what the environment wrote.
        without = np.cumsum([0, *(order.size for order in orders[:-1])])
        alone = worth[upload(without, worth.device)] - begun
        last = upload(texts.steps() - 1, placed.device)
        return placed.scatter_add(1, last[:, None], alone[:, None])

    def _worth(
        self,
        texts: FinishedTexts,
        players: list[list[np.ndarray]],
        orders: list[np.ndarray],
        max_new_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        """The scores of what each player joins, in the sequence of `_coalitions`, and those (B,) of
        the texts before their first own token."""
        assert texts.score is not None
        pairs, own = texts.prompt_and_response_ids(), texts.own_responses()
        places = texts.positions(max_new_tokens) - texts.prompt_length[:, None]
        joined = [
            (row, left)
            for row, (_, response) in enumerate(pairs)
            for left in _coalitions(
                len(response), [places[row, columns] for columns in players[row]], orders[row]
            )
        ]
        first = [(row, np.arange(places[row, each[0][0]])) for row, each in enumerate(players)]
        kept = [*joined, *first]
        some = [(pairs[row][0], [pairs[row][1][t] for t in left]) for row, left in kept]
        masks = None if own is None else [own[row][left] for row, left in kept]
        scores = distinct_scores(self._scorer, some, self._max_batch_tokens, masks)
        worth, begun = scores.to(texts.score.device).split([len(joined), len(first)])
        return worth, begun

    def _players(self, own: np.ndarray) -> list[np.ndarray]:
        """The columns of each segment's tokens, among those of `own` (T,) bool."""
        columns = np.flatnonzero(own)
        return np.array_split(columns, min(self.max_segments, len(columns)))


def _orders(num_players: int, count: int, text: TextIds) -> np.ndarray:
    """The orders to walk, (P, m): all, or a sample with every order's reverse."""
    if factorial(num_players) <= count:
        return np.asarray(list(permutations(range(num_players))))
    generator = np.random.default_rng([*text[0], *text[1]])
    drawn = generator.permuted(np.tile(np.arange(num_players), (count // 2, 1)), axis=1)
    return np.concatenate([drawn, drawn[:, ::-1]])


def _coalitions(length: int, players: list[np.ndarray], orders: np.ndarray) -> Iterator[np.ndarray]:
    """The places in a response of `length` tokens that each player joins, order by order; `players`
    are the places of each. What belongs to none of them is always there."""
    given = np.setdiff1d(np.arange(length), np.concatenate(players))
    for order in orders:
        for k in range(len(order)):
            yield np.sort(np.concatenate([given, *(players[player] for player in order[:k])]))


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
