"""What is made of the scores before a model learns them."""

import numpy as np
import pytest

from tokenenv.errors import InvalidArgument
from tokenenv.fit.examples import Example, Text
from tokenenv.fit.losses import log_mean_exp
from tokenenv.fit.objectives import OBJECTIVES
from tokenenv.fit.prepare import Data, check_outcomes, less_value, scaled


def scored(prompt: int, *scores: float) -> Example:
    texts = tuple(Text(np.array([prompt]), np.array([1])) for _ in scores)
    return Example(texts, scores, "data[3]")


def test_the_value_is_that_of_all_texts_of_a_prompt():
    examples = [scored(0, 1.0), scored(1, 5.0), scored(0, 0.0), scored(1, 5.0, 5.0)]
    value = log_mean_exp([1.0, 0.0], 0.5)
    assert 0.5 < value < 1.0
    found = [example.scores for example in less_value(examples, 0.5)]
    assert found == [(1.0 - value,), (0.0,), (0.0 - value,), (0.0, 0.0)]


@pytest.mark.parametrize("score", [-0.1, 1.1])
def test_a_score_that_is_no_outcome_is_refused(score):
    check_outcomes([scored(0, 0.0, 1.0), scored(0, 0.3)])
    with pytest.raises(InvalidArgument, match=r"data\[3\] has the score"):
        check_outcomes([scored(0, 0.5), scored(1, score)])


def test_texts_that_are_alone_of_their_prompt_teach_a_star_nothing():
    """Their V* is their own score: log-ratios of 0 would be learnt, whatever the scores are."""
    alone = [scored(0, 1.0), scored(1, 5.0)]
    with pytest.raises(InvalidArgument, match="each of the 2 prompts has one text"):
        scaled(Data(alone, [], [], "f"), OBJECTIVES["a-star"], 0.1)
    scaled(Data([*alone, scored(1, 3.0)], [], [], "f"), OBJECTIVES["a-star"], 0.1)


def shared(*target: float) -> Example:
    response = np.arange(len(target))
    return Example((Text(np.array([1]), response, np.array(target, np.float32)),))


def test_a_teachers_shares_are_learnt_in_a_unit_of_their_own():
    train, held_out = [shared(3000.0, np.nan), shared(-4000.0)], [shared(1000.0)]
    data = scaled(Data(train, held_out, held_out, "f"), OBJECTIVES["share-delta"], 0.1)
    assert data.scale == pytest.approx(1000 * np.sqrt(12.5))
    found = [example.texts[0].target * data.scale for example in (*data.train, *data.held_out)]
    np.testing.assert_allclose(np.concatenate(found), [3000, np.nan, -4000, 1000], rtol=1e-6)
    assert "Targets were divided by 3535.53" in data.scaling()[0]
    nothing = Data([shared(0.0)], [], [], "f")
    with pytest.raises(InvalidArgument, match="says 0 of every token"):
        scaled(nothing, OBJECTIVES["share-delta"], 0.1)


@pytest.mark.parametrize("name", ["values", "value-labels"])
def test_values_are_learnt_in_a_unit_of_their_own(name):
    train, held_out = [shared(1000.0, np.nan), shared(3000.0)], [shared(2000.0)]
    data = scaled(Data(train, held_out, held_out, "f"), OBJECTIVES[name], 0.1)
    # Only a reward that is a difference of values does not know their mean.
    assert (data.mean, data.scale) == (
        (2000, 1000) if name == "value-labels" else (0, pytest.approx(np.sqrt(5e6)))
    )
    targets = [example.texts[0].target for example in (*data.train, *data.held_out)]
    back = np.concatenate(targets) * data.scale + data.mean
    np.testing.assert_allclose(back, [1000, np.nan, 3000, 2000], rtol=1e-6)
