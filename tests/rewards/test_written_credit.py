"""Hand-made texts that an environment has written into: where hindsight designs place a score, and
what they leave out, against definitions on one text at a time."""

import copy
from collections.abc import Iterator
from itertools import permutations
from typing import Any

import credit
import numpy as np
import pytest
import torch
from credit import TRANSFORMERS, T, bound, close, finished
from torch import Tensor

from tokenenv.models.prefix_scores import score_texts
from tokenenv.rewards.attention import Attention
from tokenenv.rewards.gradient import Gradient, quadrature
from tokenenv.rewards.occlusion import Occlusion
from tokenenv.rewards.process import Process
from tokenenv.rewards.redistribute import distinct_scores
from tokenenv.rewards.rule import TokenRule
from tokenenv.rewards.scaling import PositionScaled, Scaled
from tokenenv.rewards.seen import FinishedTexts
from tokenenv.rewards.shapley import Shapley
from tokenenv.rewards.term import Context
from tokenenv.rewards.uniform import Uniform
from tokenenv.types import Scorer, Task, TextIds, TokenSpec

PAIRS, _ = credit.texts()
PAIRS = PAIRS[:1] + PAIRS[2:5]
OWN = [np.array([c == "1" for c in mask]) for mask in ("110001011", "011010", "10010", "1111111")]
"""A reply in the middle, replies at both ends, a reply behind the last own token, and none."""
PREFIX = [1, 0, 3, 2]
"""Response tokens that were given at the reset, whoever wrote them."""
STEPS = [int(mask.sum()) for mask in OWN]
DESIGNS: dict[str, Any] = {
    "uniform": Uniform,
    "attention": Attention,
    "gradient": lambda: Gradient(steps=4),
    "occlusion": Occlusion,
    "shapley": lambda: Shapley(3, 6),
}


class Each:
    """Scores the tokens of finished texts, by what stands behind them."""

    per_token = True

    def token_scores(self, texts: list[TextIds], width: int) -> Tensor:
        out = torch.zeros(len(texts), width)
        for row, (prompt, response) in enumerate(texts):
            for t, token in enumerate(response):
                out[row, t] = (token * (1 + sum(response[t:])) + len(prompt)) % 17 / 4
        return out


SCORERS = credit.SCORERS | {"each": Each}
CASES = [
    (design, scorer)
    for design in DESIGNS
    for scorer in SCORERS
    if scorer in TRANSFORMERS or design not in ("attention", "gradient")
]
quiet = pytest.mark.filterwarnings("ignore:reward='gradient':RuntimeWarning")


def score_of(scorer: Any, prompt: list[int], response: list[int], own: np.ndarray) -> float:
    """The score of one text: of its own tokens, if the scorer scores tokens, else of all of it."""
    if isinstance(scorer, Each):
        return float(
            scorer.token_scores([(prompt, response)], max(1, len(own)))[0, : len(own)][own].sum()
        )
    if not isinstance(scorer, Scorer):
        return scorer.score(prompt, response)
    ids = torch.tensor([[*prompt, *response]])
    states = (
        scorer.model.states(ids, [ids.shape[1]])
        if hasattr(scorer.model, "states")
        else scorer.model(input_ids=ids)[0]
    )[0]
    if not scorer.per_token:
        return float(scorer.head(states[-1:]))
    return float(scorer.head(states[len(prompt) :])[torch.from_numpy(own)].double().sum())


def scores() -> Iterator[Any]:
    return zip(PAIRS, OWN, PREFIX, strict=True)


def texts_of(scorer: Any, own: Any = OWN) -> FinishedTexts:
    score = [score_of(scorer, *pair, mask) for pair, mask in zip(PAIRS, OWN, strict=True)]
    return finished(PAIRS, PREFIX, torch.tensor(score), own=own)


def begun(scorer: Any, row: int) -> float:
    """The score of a text before the first token that may be paid."""
    first = columns_of(row)[0][1]
    return score_of(scorer, PAIRS[row][0], PAIRS[row][1][:first], OWN[row][:first])


def columns_of(row: int) -> list[tuple[int, int]]:
    """(column, place in the response) of the tokens that may be paid."""
    places = np.flatnonzero(OWN[row]).tolist()
    return [(column, t) for column, t in enumerate(places) if t >= PREFIX[row]]


@pytest.mark.parametrize("scorer", SCORERS)
def test_tokens_that_the_environment_wrote_are_no_part_of_a_sum_of_token_scores(scorer):
    scorer = SCORERS[scorer]()
    expected = [score_of(scorer, *pair, mask) for pair, mask in zip(PAIRS, OWN, strict=True)]
    close(score_texts(scorer, PAIRS, 20, own=OWN), expected)


def test_equal_texts_of_other_authors_are_scored_apart():
    pair = ([5], [7, 8, 9])
    own = [np.array([c == "1" for c in mask]) for mask in ("111", "101", "111")]
    found = distinct_scores(Each(), [pair] * 3, 100, own)
    close(found, [score_of(Each(), *pair, mask) for mask in own])
    assert found[0] == found[2] != found[1]


@quiet
@pytest.mark.parametrize(("design", "scorer"), CASES)
def test_the_score_is_placed_on_own_columns_alone(design, scorer):
    scorer = SCORERS[scorer]()
    texts = texts_of(scorer)
    rewards = bound(DESIGNS[design](), scorer).place(texts, T)
    for row in range(len(PAIRS)):
        paid = [column for column, _ in columns_of(row)]
        assert not np.delete(rewards[row].numpy(), paid).any()
    if design == "shapley":
        first = [begun(scorer, row) for row in range(len(PAIRS))]
        close(rewards.sum(1), texts.score - torch.tensor(first))
    else:
        close(rewards.sum(1), texts.score)
    assert (rewards != 0).sum() > 0.6 * sum(len(columns_of(row)) for row in range(len(PAIRS)))


@quiet
@pytest.mark.parametrize(
    ("design", "scorer"), [case for case in CASES if case[1] not in ("text", "each")]
)
def test_written_tokens_at_the_beginning_are_like_ones_of_the_prompt(design, scorer):
    scorer = SCORERS[scorer]()
    own = [np.arange(len(response)) >= 2 for _, response in PAIRS]
    pairs = [(prompt + response[:2], response[2:]) for prompt, response in PAIRS]
    score, prefix = score_texts(scorer, pairs), [0] * len(PAIRS)
    close(score_texts(scorer, PAIRS, own=own), score)
    term = bound(DESIGNS[design](), scorer)
    written = term.place(finished(PAIRS, prefix, score, own=own), T)
    close(written, term.place(finished(pairs, prefix, score), T))


@quiet
@pytest.mark.parametrize(("design", "scorer"), CASES)
def test_where_nothing_is_written_all_is_as_before_to_the_bit(design, scorer):
    scorer = SCORERS[scorer]()
    score, everyone = score_texts(scorer, PAIRS), [np.ones_like(mask) for mask in OWN]
    term = bound(DESIGNS[design](), scorer)
    plain, masked = (
        term.place(finished(PAIRS, PREFIX, score, own=own), T) for own in (None, everyone)
    )
    assert torch.equal(plain, masked)
    assert torch.equal(score, score_texts(scorer, PAIRS, own=everyone))


def test_uniform_shares_are_of_own_tokens():
    texts = finished(PAIRS, PREFIX, torch.full((4,), 12.0), own=OWN)
    rewards = bound(Uniform(), SCORERS["text"]()).place(texts, T)
    expected = [
        [0, 3, 3, 3, 3, 0, 0, 0, 0],
        [4, 4, 4, 0, 0, 0, 0, 0, 0],
        [0, 12, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 2.4, 2.4, 2.4, 2.4, 2.4, 0, 0],
    ]
    close(rewards, expected)


@pytest.mark.parametrize("scorer", TRANSFORMERS)
def test_attention_is_that_of_the_last_token_whoever_wrote_it(scorer):
    scorer = SCORERS[scorer]()
    rewards = bound(Attention(), scorer).place(texts_of(scorer), T)
    eager = copy.deepcopy(scorer.model)
    eager.set_attn_implementation("eager")
    for row, ((prompt, response), own, _) in enumerate(scores()):
        ids = torch.tensor([[*prompt, *response]])
        weights = eager(ids, output_attentions=True).attentions[-1][0].mean(0)[-1]
        weights = weights[len(prompt) :].detach().numpy()
        columns, places = np.transpose(columns_of(row))
        share = weights[places] / weights[places].sum()
        close(rewards[row, columns], score_of(scorer, prompt, response, own) * share)


@pytest.mark.parametrize("scorer", SCORERS)
def test_occlusion_leaves_out_own_tokens_alone(scorer):
    scorer = SCORERS[scorer]()
    rewards = bound(Occlusion(), scorer).place(texts_of(scorer), T)
    for row, ((prompt, response), own, _) in enumerate(scores()):
        score, expected = score_of(scorer, prompt, response, own), np.zeros(T)
        for column, t in columns_of(row):
            without = response[:t] + response[t + 1 :]
            expected[column] = score - score_of(scorer, prompt, without, np.delete(own, t))
        expected[STEPS[row] - 1] += score - expected.sum()
        close(rewards[row], expected)


@pytest.mark.parametrize("scorer", SCORERS)
def test_shapley_values_are_of_own_segments_and_what_was_written_stays(scorer):
    scorer = SCORERS[scorer]()
    rewards = bound(Shapley(3, 6), scorer).place(texts_of(scorer), T)
    for row, ((prompt, response), own, _) in enumerate(scores()):
        players = np.array_split(columns_of(row), min(3, len(columns_of(row))))
        expected, paid = np.zeros(T), [t for _, t in columns_of(row)]
        for order in permutations(range(len(players))):
            kept = set(range(len(response))) - set(paid)
            for player in order:
                joined = kept | set(players[player][:, 1].tolist())
                worth = [
                    score_of(scorer, prompt, [response[t] for t in sorted(some)], own[sorted(some)])
                    for some in (kept, joined)
                ]
                expected[players[player][:, 0]] += (worth[1] - worth[0]) / len(players[player])
                kept = joined
        expected /= len(list(permutations(range(len(players)))))
        # What was written changes the score by itself, which no player does.
        rest = score_of(scorer, prompt, response, own) - begun(scorer, row) - expected.sum()
        expected[STEPS[row] - 1] += rest
        close(rewards[row], expected)


@quiet
@pytest.mark.parametrize("scorer", TRANSFORMERS)
def test_gradients_move_own_embeddings_alone(scorer):
    scorer, steps = SCORERS[scorer](), 4
    rewards = bound(Gradient(steps, tolerance=1e9), scorer).place(texts_of(scorer), T)
    for row, ((prompt, response), own, _) in enumerate(scores()):
        columns, places = np.transpose(columns_of(row))
        ids = torch.tensor([[*prompt, *response]])
        embeddings = scorer.model.get_input_embeddings()(ids).detach()
        moving = torch.zeros_like(embeddings)
        moving[0, len(prompt) + places] = embeddings[0, len(prompt) + places]
        expected = np.zeros(T)
        for point, weight in zip(*quadrature(steps), strict=True):
            inputs = (embeddings - (1 - float(point)) * moving).requires_grad_()
            states = scorer.model(inputs_embeds=inputs)[0][0]
            counted = len(prompt) + np.flatnonzero(own) if scorer.per_token else [-1]
            scorer.head(states[counted]).sum().backward()
            slopes = (inputs.grad * moving)[0, len(prompt) + places].sum(-1)
            expected[columns] += weight * slopes.numpy()
        expected[STEPS[row] - 1] += score_of(scorer, prompt, response, own) - expected.sum()
        close(rewards[row], expected)


# ------------------------------------------------------- what is no redistribution


def process(scorer: Any) -> Process:
    """A process reward of the worst step; steps end with even tokens."""
    ends = tuple(range(0, 60, 2))
    spec = TokenSpec(None, 61, 0, (1,), 5, T)
    task = Task(
        tokenizer=None,
        reference=object(),
        prompts=[],
        max_prompt_tokens=5,
        max_new_tokens=T,
        stop_token_ids=(1,),
        scorer=scorer,
        step_end_token_ids=ends,
    )
    term = Process("min", temperature=0.5)
    term.bind(Context(spec, task, torch.device("cpu"), kl_coef=0.1, max_batch_tokens=30))
    return term


@pytest.mark.parametrize("scorer", ["sequence", "token", "automaton"])
def test_steps_end_with_own_tokens(scorer):
    scorer = SCORERS[scorer]()
    rewards = process(scorer).place(texts_of(scorer), T)
    single = Scorer(scorer.model, scorer.head, per_token=False)
    for row, (prompt, response) in enumerate(PAIRS):
        q, ends = [], []
        for column, t in columns_of(row):
            if response[t] % 2 == 0 or column == STEPS[row] - 1:
                ends.append(column)
                q.append(score_of(single, prompt, response[: t + 1], OWN[row][: t + 1]))
        share, expected = torch.softmax(-torch.tensor(q) / 0.5, 0), np.zeros(T)
        expected[ends] = share * torch.tensor(q)
        close(rewards[row], expected)


def test_a_token_rules_numbers_of_written_tokens_are_left_out():
    rule = TokenRule(lambda prompt, response: [t + 1 for t in range(len(response))], on="tokens")
    rewards = rule.place(finished(PAIRS, PREFIX, None, own=OWN), T)
    for row, mask in enumerate(OWN):
        numbers = (np.flatnonzero(mask) + 1).tolist()
        assert rewards[row].tolist() == numbers + [0] * (T - len(numbers))


@pytest.mark.parametrize("wrapper", [Scaled, PositionScaled])
def test_wrappers_learn_from_own_columns(wrapper):
    scorer = SCORERS["text"]()
    texts, term = texts_of(scorer), bound(wrapper(Uniform()), scorer)
    started = finished(
        PAIRS,
        PREFIX,
        texts.score,
        own=OWN,
        learning=True,
        statistics={term.name: term.statistics().expand(4, -1)},
    )
    term.place(started, T)
    paid = [len(columns_of(row)) for row in range(4)]
    count = term.save_statistics()[0]
    assert int(count.sum()) == sum(paid)
    if wrapper is PositionScaled:
        columns = [column for row in range(4) for column, _ in columns_of(row)]
        assert count.tolist() == np.bincount(columns, minlength=T).tolist()
    assert sum(paid) < sum(len(response) for _, response in PAIRS)


def test_texts_without_padding_keep_their_columns():
    """Columns to the right of the last own token read nothing of the text's end."""
    scorer = SCORERS["sequence"]()
    pair: list[TextIds] = [([5, 6], [7, 8, 9, 10, 11])]
    own = [np.array([True, False, True, False, True])]
    score = score_texts(scorer, pair, own=own)
    for design in ("attention", "gradient"):
        term = bound(DESIGNS[design](), scorer)
        for padding in (0, 5):
            rewards = term.place(finished(pair, [0], score, padding=padding, own=own), T)
            assert not rewards[0, 3:].any()
            close(rewards.sum(1), score)
