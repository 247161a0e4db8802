"""Functions that ask for the turns of a response, plain, batched and dense; and `gold`."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import fakes
import numpy as np
import pytest
import tasks
import torch
from gymnasium.vector import AutoresetMode
from tasks import make_vec, play

from tokenenv.errors import InvalidArgument
from tokenenv.rewards import Rule, TokenRule
from tokenenv.rewards.function import parameters_of
from tokenenv.rewards.seen import FinishedTexts, RunningTexts
from tokenenv.types import Task

SAME_STEP, CPU = AutoresetMode.SAME_STEP, torch.device("cpu")
IDS = [np.array([7, 20, 21, 30, 31, 22]), np.array([7, 8, 23, 24])]
WRITTEN = [np.array([0, 0, 0, 1, 1, 0], bool), np.zeros(4, bool)]
LENGTHS = {"length": np.array([6, 4]), "prompt_length": np.array([1, 2])}
SEGMENTS = [[(True, [20, 21]), (False, [30, 31]), (True, [22])], [(True, [23, 24])]]


def finished(tokenizer: Any = None, columns: Any = ()) -> FinishedTexts:
    """Two texts, into the first of which two tokens were written."""
    return FinishedTexts(
        tokens=torch.tensor([IDS[0].tolist(), [*IDS[1].tolist(), 0, 0]]),
        ids=IDS,
        prefix_length=np.zeros(2, int),
        score=None,
        written=WRITTEN,
        tokenizer=tokenizer,
        columns=columns,
        **LENGTHS,
    )


def readable(tokenizer: Any) -> list[list[dict[str, Any]]]:
    """The turns of `finished`, of words that spaces join."""

    def one(number: int, own: bool, tokens: list[int]) -> dict[str, Any]:
        if tokenizer is None:
            return {"own": own, "tokens": tokens}
        return {"own": own, "text": " " + tokenizer.decode(tokens)}

    return [[one(i, *segment) for i, segment in enumerate(text)] for text in SEGMENTS]


@pytest.mark.parametrize("on", ["text", "tokens"])
@pytest.mark.parametrize("tokenizer", [fakes.tokenizer(), None], ids=["words", "ids"])
def test_a_function_gets_the_segments_of_the_whole_response(on: str, tokenizer: Any) -> None:
    if tokenizer is None and on == "text":
        return
    seen: list[Any] = []

    def function(prompt: Any, response: Any, turns: Any) -> float:
        seen.append((prompt, response, turns))
        return float(len(turns))

    assert Rule(function, on).numbers(finished(tokenizer), CPU).tolist() == [3.0, 1.0]
    assert [turns for *_, turns in seen] == readable(tokenizer)
    if on == "text":
        for _, response, turns in seen:
            assert "".join(turn["text"] for turn in turns) == response
    else:
        assert [response for _, response, _ in seen] == [[20, 21, 30, 31, 22], [23, 24]]


def test_a_batched_function_gets_a_list_of_them_for_each_text() -> None:
    def function(prompts: Any, responses: Any, turns: Any) -> list[int]:
        assert turns == readable(None)
        return [len(segments) for segments in turns]

    assert Rule(function, "tokens", batched=True).numbers(finished(), CPU).tolist() == [3.0, 1.0]


def test_a_text_so_far_has_the_turns_so_far() -> None:
    rows, lengths = np.zeros(6, int), np.arange(1, 7)
    texts = RunningTexts(IDS, rows, np.ones(6, int), lengths, written=WRITTEN)
    rule = Rule(lambda prompt, response, turns: float(len(turns)), on="tokens")
    assert rule.numbers(texts, CPU).tolist() == [0, 1, 1, 2, 2, 3]


def test_a_token_rule_gets_them_too() -> None:
    def each(prompt: Any, response: Any, turns: Any) -> list[float]:
        return [float(10 * i + 1) for i, turn in enumerate(turns) for _ in turn["tokens"]]

    placed = TokenRule(each, on="tokens").place(finished(), 4)
    assert placed.tolist() == [[1.0, 1.0, 21.0, 0.0], [1.0, 1.0, 0.0, 0.0]]


def test_a_column_called_turns_is_no_parameter_called_turns() -> None:
    """A function that does not ask for turns may have such a column; one that does gets the text's,
    and the env says that the column is in the way."""
    columns = [{"turns": 8, "answer": 3}, {"turns": 9, "answer": 4}]
    seen: list[Any] = []
    rule = Rule(lambda p, r, **row: seen.append(row) or 0.0, on="tokens")
    rule.numbers(finished(columns=columns), CPU)
    assert seen == columns
    asks = parameters_of(lambda p, r, turns, answer: 0)
    assert asks.turns
    assert asks.columns == ("answer",)
    assert asks.of_row(columns[0]) == {"answer": 3}

    def counts(prompt: Any, response: Any, turns: Any) -> float:
        return 0.0

    def table() -> Task:
        toy = tasks.toy(turns="fixed")
        return replace(toy, columns=[{"turns": 1}] * len(toy.prompts))

    for option in ("reward", "gold"):
        given: dict[str, Any] = {option: counts}
        with pytest.raises(InvalidArgument, match=r"'counts' asks for turns.*rename the column"):
            make(table, **given)


def make(task: Any, gold: Any = None, **options: Any) -> Any:
    def with_gold() -> Task:
        return replace(task(), gold=gold)

    return make_vec(4, SAME_STEP, task=with_gold, **options)


def spoken(prompt: str, response: str, turns: list[dict[str, Any]]) -> float:
    """Words of the policy's, and ten for each reply."""
    assert "".join(turn["text"] for turn in turns) == response
    assert all(a["own"] != b["own"] for a, b in pairwise(turns))
    own = sum(len(turn["text"].split()) for turn in turns if turn["own"])
    return own + 10.0 * sum(not turn["own"] for turn in turns)


def number_of(episode: tasks.Played, upto: int | None = None) -> float:
    """The number of `spoken`, from the tokens and the mask."""
    own = np.array(episode.own[:upto], bool)
    words = np.array([token > 1 for token in episode.response[:upto]], bool)
    return float((own & words).sum() + 10 * (np.diff([1, *own]) == -1).sum())


@pytest.mark.parametrize("batched", [False, True])
def test_an_env_gives_reward_and_gold_the_turns(batched: bool) -> None:
    rule = Rule(spoken)
    if batched:
        rule = Rule(
            lambda prompts, responses, turns: list(map(spoken, prompts, responses, turns)),
            batched=True,
        )
    toy = replace(tasks.toy(turns="random"), scorer=None)
    envs = make(lambda: toy, gold=rule, reward=rule, kl="none")
    episodes = play(envs, steps=24, stop=0.1)
    assert sum(not all(e.own) for e in episodes) >= 5
    for episode in episodes:
        expected = number_of(episode)
        assert episode.rewards == [0.0] * (len(episode.rewards) - 1) + [expected]
        assert episode.infos[-1]["gold"] == episode.infos[-1]["score"] == expected
    said = envs.unwrapped.score_episodes(
        [e.prompt for e in episodes],
        [e.response for e in episodes],
        own=[e.own for e in episodes],
    )
    assert said.gold.tolist() == said.score.tolist() == [number_of(e) for e in episodes]


def test_a_dense_rule_pays_the_reply_on_the_token_before_it() -> None:
    calls: list[str] = []

    def counted(prompt: str, response: str, turns: list[dict[str, Any]]) -> float:
        calls.append(response)
        return spoken(prompt, response, turns)

    toy = tasks.toy(turns="random")
    envs = make(lambda: toy, reward=Rule(counted, dense=True), kl="none")
    episodes = play(envs, steps=24, stop=0.1)
    for episode in episodes:
        places = [*np.flatnonzero(episode.own).tolist(), len(episode.own)]
        numbers = [number_of(episode, place) for place in places]
        np.testing.assert_allclose(episode.rewards, np.diff(numbers), atol=1e-6)
    calls.clear()
    envs.unwrapped.score_episodes(
        [e.prompt for e in episodes],
        [e.response for e in episodes],
        own=[e.own for e in episodes],
    )
    # Once for each token, whoever wrote it, and once where a text begins.
    assert len(calls) == sum(len(e.response) + 1 for e in episodes)


def test_where_the_policy_alone_writes_there_is_one_turn() -> None:
    envs = make(tasks.toy, reward=spoken, kl="none")
    for episode in play(envs, steps=12):
        assert episode.rewards[-1] == number_of(episode) < 10
