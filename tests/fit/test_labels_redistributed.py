"""Labels that share out a teacher's score: they are what an environment with this teacher pays."""

from typing import Any

import fakes
import numpy as np
import pytest
import tasks
from credit import Words
from gymnasium.vector import AutoresetMode

from tokenenv.errors import InvalidArgument
from tokenenv.fit.examples import Example, Text
from tokenenv.fit.labels import MAKERS, LabelContext
from tokenenv.models.heads import make_scorer
from tokenenv.models.prefix_scores import score_texts

DESIGNS = [name.removeprefix("share-") for name in MAKERS if name.startswith("share-")]


def examples(played: list[Any]) -> list[Example]:
    return [
        Example((Text(np.asarray(p.prompt), np.asarray(p.response), own=np.asarray(p.own)),))
        for p in played
    ]


def targets(design: str, given: list[Example], teacher: Any, **options: Any) -> list[np.ndarray]:
    made = MAKERS[f"share-{design}"](given, LabelContext(teacher=teacher, **options))
    assert all(len(one.texts) == 1 for one in made)
    return [one.texts[0].target for one in made]


@pytest.mark.parametrize("turns", [None, "fixed"])
@pytest.mark.parametrize("scorer", ["token", "sequence"])
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.filterwarnings("ignore:reward='gradient'")
def test_targets_are_what_the_environment_places(design, scorer, turns):
    options = {"scorer": scorer, "turns": turns, "reward": design, "kl": "none"}
    envs = tasks.make_vec(4, AutoresetMode.SAME_STEP, **options)
    played = tasks.play(envs, steps=14)
    assert len(played) > 6
    found = targets(design, examples(played), tasks.scorer_of(scorer))
    for episode, target in zip(played, found, strict=True):
        own = np.asarray(episode.own)
        expected = episode.infos[-1]["token_rewards"][: own.sum()]
        np.testing.assert_allclose(target[own], expected, rtol=1e-4, atol=1e-5)
        assert np.isnan(target[~own]).all()
    assert turns is None or not all(all(episode.own) for episode in played)


def random_examples(count: int, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    texts = [
        Text(rng.integers(3, 61, rng.integers(1, 5)), rng.integers(3, 61, rng.integers(1, 9)))
        for _ in range(count)
    ]
    pairs = zip(texts[::2], texts[1::2], strict=True)
    return [Example(pair, where=f"{i}") for i, pair in enumerate(pairs)]


def test_each_text_of_an_example_becomes_one_and_keeps_its_place():
    given = random_examples(100)
    context = LabelContext(teacher=tasks.scorer_of("token"))
    made = MAKERS["share-delta"](given, context)
    assert [one.where for one in made] == [one.where for one in given for _ in range(2)]
    texts = [text for one in given for text in one.texts]
    for text, one in zip(texts, made, strict=True):
        assert one.texts[0].response is text.response
        assert text.target is None


@pytest.mark.parametrize("design", ["attention", "occlusion"])
def test_targets_add_up_to_the_teachers_score(design):
    given, teacher = random_examples(80), tasks.scorer_of("sequence")
    pairs = [(text.prompt.tolist(), text.response.tolist()) for one in given for text in one.texts]
    sums = [target.sum() for target in targets(design, given, teacher)]
    np.testing.assert_allclose(sums, score_texts(teacher, pairs), rtol=1e-4, atol=1e-5)


def test_batches_change_nothing():
    given, teacher = random_examples(20), tasks.scorer_of("sequence")
    for a, b in zip(
        targets("occlusion", given, teacher),
        targets("occlusion", given, teacher, max_batch_tokens=12),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_teacher_of_finished_texts_is_asked_by_occlusion():
    teacher = Words(lambda prompt, response: 2.0 * len(response) + 5.0 * (7 in response))
    given = [Example((Text(np.asarray([3]), np.asarray([4, 7, 5])),))]
    (target,) = targets("occlusion", given, teacher)
    # The last token is also paid what is missing to the score, 11: nothing.
    np.testing.assert_allclose(target, [2, 7, 2])


@pytest.mark.parametrize("design", ["delta", "attention", "gradient"])
def test_a_teacher_that_cannot_be_read_so_is_refused(design):
    with pytest.raises(InvalidArgument, match=f"cannot use this teacher: share-'{design}' needs"):
        targets(design, random_examples(2), Words(lambda prompt, response: 0.0))


@pytest.mark.parametrize("design", DESIGNS)
def test_without_a_teacher_nothing_is_shared_out(design):
    with pytest.raises(InvalidArgument, match=f"objective='share-{design}' needs a teacher"):
        targets(design, random_examples(2), None)


def test_the_teacher_keeps_its_mode():
    teacher = fakes.reward_model("token").train()
    targets("delta", random_examples(2), make_scorer(teacher))
    assert teacher.training
