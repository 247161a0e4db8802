"""Labels that are made: edits of pairs, and texts that a reference has corrupted."""

from dataclasses import replace

import fakes
import numpy as np
import pytest
import torch

from tokenenv.errors import InvalidArgument
from tokenenv.fit import losses
from tokenenv.fit.corrupted import COPIES, samples
from tokenenv.fit.examples import Batch, Example, Text
from tokenenv.fit.labels import MAKERS, LabelContext
from tokenenv.fit.objectives import OBJECTIVES
from tokenenv.models.bigram import Bigram

NAN = np.nan
V = 5


def text(
    response: list[int], prompt: list[int] | None = None, own: list[int] | None = None
) -> Text:
    return Text(
        np.asarray(prompt or [0]),
        np.asarray(response),
        own=None if own is None else np.asarray(own, dtype=bool),
    )


def alone(*texts: Text) -> list[Example]:
    return [Example((one,), where=f"data:{i}") for i, one in enumerate(texts)]


def test_every_objective_that_needs_labels_has_a_maker():
    assert set(MAKERS) == {name for name, each in OBJECTIVES.items() if each.labels_from == name}
    assert {each.labels_from for each in OBJECTIVES.values()} - {None} == set(MAKERS)


# ---------------------------------------------------------------------------------------------- edits


def edits(*texts: Text) -> list[Example]:
    return MAKERS["edits"]([Example(texts, where="pairs:3")], LabelContext())


def test_edits_by_hand():
    better, worse = edits(text([7, 1, 2, 3, 9]), text([1, 2, 8, 3]))
    assert better.texts[0].target is not None
    assert worse.texts[0].target is not None
    assert better.texts[0].target.tolist() == [1, 0.5, 0.5, 0.5, 1]
    assert worse.texts[0].target.tolist() == [0.5, 0.5, 0, 0.5]
    assert better.texts[0].target.dtype == np.float32
    assert better.where == worse.where == "pairs:3"


def test_what_is_not_own_is_matched_and_not_labelled():
    better, worse = edits(text([7, 1, 2], own=[1, 0, 1]), text([1, 3], own=[0, 1]))
    np.testing.assert_array_equal(better.texts[0].target, [1, NAN, 1])
    np.testing.assert_array_equal(worse.texts[0].target, [NAN, 0])
    assert better.texts[0].own is not None


def test_each_text_of_a_ranking_is_compared_with_the_next():
    labelled = edits(text([1]), text([2]), text([2, 3]))
    assert [one.texts[0].target.tolist() for one in labelled] == [[1], [0], [0.5], [0.5, 0]]


def test_long_texts_are_matched_token_by_token():
    # difflib takes the commonest tokens of long texts for junk where it is not told otherwise.
    long = [1, 2] * 200
    better, _ = edits(text([3, *long]), text([4, *long]))
    assert better.texts[0].target is not None
    assert better.texts[0].target.tolist() == [1] + [0.5] * 400


# ------------------------------------------------------------------------------------------ corrupted


def cycle(sure: float = 1 - 4e-9) -> Bigram:
    """A reference that writes a + 1 after a, and 3 at the beginning."""
    rest = (1 - sure) / (V - 1)
    probs = np.full((V + 1, V), rest)
    probs[np.arange(V), (np.arange(V) + 1) % V] = sure
    probs[V, 3] = sure
    return Bigram(probs)


def random_texts(count: int, seed: int = 0, longest: int = 12) -> list[Text]:
    rng = np.random.default_rng(seed)
    return [text(rng.integers(0, V, rng.integers(1, longest)).tolist()) for _ in range(count)]


def made(texts: list[Text], reference: object, **options: object) -> list[Text]:
    context = LabelContext(reference=reference, **options)
    return [one.texts[0] for one in MAKERS["corrupted"](alone(*texts), context)]


def test_samples_follow_the_true_text():
    one = text([3, 0, 0, 2], prompt=[4, 1])
    ((drawn,),) = samples([one], 1, LabelContext(reference=cycle()))
    # After [4, 1], [.. 3], [.. 0] and [.. 0] of the author's, whatever was drawn before.
    assert drawn.tolist() == [2, 4, 1, 1]
    ((drawn,),) = samples([text([1, 1])], 1, LabelContext(reference=cycle()))
    assert drawn.tolist() == [3, 2]


def test_samples_have_the_probabilities_of_the_reference():
    rng = np.random.default_rng(3)
    probs = rng.dirichlet(np.ones(V), V + 1)
    ((drawn,),) = samples([text([2] * 20_001)], 1, LabelContext(reference=Bigram(probs)))
    drawn = drawn[1:]
    share = np.bincount(drawn, minlength=V) / len(drawn)
    error = np.sqrt(probs[2] * (1 - probs[2]) / len(drawn))
    assert (np.abs(share - probs[2]) < 4 * error).all()


def test_which_tokens_are_replaced_says_nothing_of_what_replaces_them():
    probs = np.random.default_rng(3).dirichlet(np.ones(V), V + 1)
    after = made([text([2] * 400, prompt=[0, 2])] * 20, Bigram(probs))
    drawn = np.concatenate([one.response[one.target == 0] for one in after])
    share = np.bincount(drawn, minlength=V) / len(drawn)
    error = np.sqrt(probs[2] * (1 - probs[2]) / len(drawn))
    assert (np.abs(share - probs[2]) < 4 * error).all()


def test_a_replaced_token_is_the_references_and_all_others_stay():
    texts = random_texts(300)
    count = replaced = 0
    for before, after in zip(COPIES * texts, made(texts, cycle()), strict=True):
        assert after.target is not None
        new = after.target == 0
        last = [V, *before.response[:-1].tolist()]
        expected = [3 if a == V else (a + 1) % V for a in last]
        assert (after.response == np.where(new, expected, before.response)).all()
        assert np.isin(after.target, [0, 1]).all()
        count, replaced = count + len(new), replaced + int(new.sum())
    share = losses.REPLACED_SHARE
    assert abs(replaced / count - share) < 4 * np.sqrt(share * (1 - share) / count)


def test_the_label_says_who_wrote_a_token_and_not_whether_it_changed():
    texts = [text([3, 4, 0, 1, 2, 3, 4, 0])] * 50
    after = made(texts, cycle())
    assert all((one.response == texts[0].response).all() for one in after)
    assert any((one.target == 0).any() for one in after)


def test_what_is_not_own_is_neither_replaced_nor_labelled():
    own = [1, 0, 0, 1, 1, 0] * 20
    texts = [text([2] * len(own), own=own)] * 20
    for after in made(texts, cycle()):
        assert after.target is not None
        assert (after.response[~after.own_mask] == 2).all()
        assert np.isnan(after.target[~after.own_mask]).all()
        assert not np.isnan(after.target[after.own_mask]).any()


def test_a_text_ends_where_a_stop_token_was_drawn():
    texts = [text([2] * 20, own=[1] * 20)] * 30
    ended = made(texts, cycle(), stop_token_ids=(3,))
    whole = made(texts, cycle())
    for short, long in zip(ended, whole, strict=True):
        stops = np.flatnonzero(long.response == 3)
        end = stops[0] + 1 if len(stops) else 20
        assert short.response.tolist() == long.response[:end].tolist()
        assert short.own is not None
        assert len(short.target) == len(short.own) == end
    assert min(map(len, ended)) < max(map(len, ended))


def test_an_authors_stop_token_ends_nothing():
    # After these tokens the reference writes 1, 2, 4 and 2: never the stop token, 3.
    texts = [text([1, 3, 1, 3], prompt=[4, 0])] * 30
    after = made(texts, cycle(), stop_token_ids=(3,))
    assert all(len(one.response) == 4 for one in after)
    assert any((one.target == 0).any() for one in after)


@pytest.mark.parametrize("kind", ["bigram", "llama"])
def test_the_seed_decides_and_batches_do_not(kind):
    rng = np.random.default_rng(1)
    probs = rng.dirichlet(np.ones(V), V + 1)
    reference = Bigram(probs) if kind == "bigram" else fakes.causal_lm("llama")
    texts = random_texts(60)
    first = made(texts, reference, seed=5)
    for same in (
        made(texts, reference, seed=5, max_batch_tokens=20),
        made(texts, reference, seed=5),
    ):
        for a, b in zip(first, same, strict=True):
            np.testing.assert_array_equal(a.response, b.response)
            np.testing.assert_array_equal(a.target, b.target)
    other = made(texts, reference, seed=6)
    assert any(a.target.tolist() != b.target.tolist() for a, b in zip(first, other, strict=True))
    drawn = [samples(texts, 1, LabelContext(reference=reference, seed=seed)) for seed in (5, 6)]
    assert any(a.tolist() != b.tolist() for a, b in zip(*drawn, strict=True))


def test_samples_of_a_transformers_model_are_in_eval_mode_and_leave_its_mode():
    model = fakes.causal_lm("gpt2", resid_pdrop=0.5).train()
    rng = np.random.default_rng(0)
    one = text(rng.integers(3, fakes.VOCAB_SIZE, 40).tolist(), prompt=[4, 7])
    ((drawn,),) = samples([one], 1, LabelContext(reference=model))
    assert model.training
    # The token at the same share of the probabilities, from the model's own logits.
    number = np.random.default_rng([0, 0]).random(40, dtype=np.float32)
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.from_numpy(one.ids)[None]).logits[0, 1:-1]
    upto = logits.softmax(-1).cumsum(-1)
    expected = [int((upto[t] <= float(u)).sum()) for t, u in enumerate(number)]
    assert drawn.tolist() == expected


def test_without_a_reference_texts_cannot_be_corrupted():
    with pytest.raises(InvalidArgument, match="needs a reference"):
        MAKERS["corrupted"](alone(text([1])), LabelContext())


def test_what_is_learned_from_corrupted_texts_is_the_log_ratio():
    author, reference = np.asarray([0.7, 0.2, 0.1]), np.asarray([0.25, 0.25, 0.5])
    # All six things that may happen to a text of one token, in their exact shares.
    shares = np.concatenate(
        [author * (1 - losses.REPLACED_SHARE), reference * losses.REPLACED_SHARE]
    )
    reward = torch.tensor(np.log(author / reference)).float().repeat(2).requires_grad_()
    label = torch.tensor([1.0] * 3 + [0.0] * 3)[:, None]
    one = Batch(
        reward[:, None],
        reward[:, None],
        torch.zeros(6),
        torch.ones(6, 1, dtype=torch.bool),
        torch.arange(6),
        target_BR=label,
    )
    loss = losses.replaced_tokens(one)
    (loss * torch.from_numpy(shares).float()).sum().backward()
    assert reward.grad is not None
    by_token = reward.grad.view(2, 3).sum(0)
    torch.testing.assert_close(by_token, torch.zeros(3), rtol=0, atol=1e-6)
    assert torch.equal(loss, losses.replaced_tokens(replace(one, running_BR=loss[:, None])))


def test_copies_of_a_text_are_corrupted_apart():
    after = made([text([2] * 40)], cycle())
    assert len(after) == COPIES
    assert len({tuple(one.target.tolist()) for one in after}) == COPIES
