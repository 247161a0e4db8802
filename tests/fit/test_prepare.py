"""What is made of the scores before a model learns them."""

import numpy as np
import pytest

from tokenenv.errors import InvalidArgument
from tokenenv.fit.examples import Example, Text
from tokenenv.fit.losses import log_mean_exp
from tokenenv.fit.prepare import check_outcomes, less_value


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
