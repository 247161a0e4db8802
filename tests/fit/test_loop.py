"""Training: what an optimizer step is, what is kept, and what is saved."""

import fakes
import fitting
import numpy as np
import pytest
import torch
from fitting import trained, weights

from tokenenv.errors import NotFinite
from tokenenv.fit.batches import batches, forwards, longest
from tokenenv.fit.examples import Example
from tokenenv.fit.readers import HeadReader
from tokenenv.fit.training import Training, default_lr, schedule
from tokenenv.models.heads import make_scorer
from tokenenv.models.loading import load_reward_model
from tokenenv.models.prefix_scores import score_texts

# ----------------------------------------------------------------------------------------- batches


def test_an_epoch_holds_every_example_once_in_an_order_of_its_seed():
    lengths = np.random.default_rng(0).integers(2, 60, 50)
    one, same, other = (batches(lengths, 8, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert sorted(np.concatenate(one).tolist()) == list(range(50))
    assert sorted(map(len, one)) == [2, 8, 8, 8, 8, 8, 8]
    assert [group.tolist() for group in one] == [group.tolist() for group in same]
    assert [group.tolist() for group in one] != [group.tolist() for group in other]


def test_examples_of_a_batch_are_of_similar_length_and_batches_in_no_order_of_it():
    lengths = np.random.default_rng(0).integers(2, 200, 400)
    groups = batches(lengths, 20, np.random.default_rng(0))
    spreads = [np.ptp(lengths[group]) for group in groups]
    assert max(spreads) < 40 < np.ptp(lengths)
    means = [lengths[group].mean() for group in groups]
    assert abs(np.corrcoef(means, np.arange(len(groups)))[0, 1]) < 0.5


@pytest.mark.parametrize("size", [1, 30, 64, 10**6])
def test_forwards_have_at_most_so_many_tokens_or_one_example(size):
    examples = fitting.pairs(20)
    groups = list(forwards(examples, size))
    assert sorted(e.where for group in groups for e in group) == sorted(e.where for e in examples)
    for group in groups:
        tokens = max(map(longest, group)) * sum(len(e.texts) for e in group)
        assert tokens <= size or len(group) == 1
    assert {1: len(groups) == 20, 10**6: len(groups) == 1}.get(size, 1 < len(groups) < 20)


# ------------------------------------------------------------------------------------------- steps


def test_weights_do_not_depend_on_max_batch_tokens(tmp_path):
    small, large = (
        weights(trained(fitting.config(tmp_path / str(size), max_batch_tokens=size)))
        for size in (64, 10**6)
    )
    for name, weight in small.items():
        torch.testing.assert_close(weight, large[name], atol=1e-6, rtol=0)


def test_a_step_is_adamw_on_the_mean_loss_of_its_examples(tmp_path):
    """The gradient is that of the mean over the examples of the batch, clipped; vectors do not
    decay."""
    config = fitting.config(tmp_path, batch_examples=20, weight_decay=0.5, warmup=0.0, lr=0.01)
    data = fitting.data(fitting.pairs(20), fitting.pairs(8, seed=1))
    training = Training(config, fitting.reader(config), data)
    other = Training(config, fitting.reader(config), data)
    loss = other.objective.loss(other._read(data.train)).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(other.weights.values(), 1.0)
    figures = training.learn()
    assert figures["loss"] == pytest.approx(float(loss.detach()), abs=1e-6)
    assert figures["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    for name, weight in other.weights.items():
        # Adam's first step is the sign of the gradient.
        decayed = weight * (1 - 0.01 * 0.5) if weight.ndim > 1 else weight
        expected = decayed - 0.01 * weight.grad / (weight.grad.abs() + 1e-8)
        clear = weight.grad.abs() > 1e-5
        assert clear.any()
        torch.testing.assert_close(
            training.weights[name][clear], expected[clear], atol=1e-5, rtol=0
        )


def test_the_learning_rate_rises_and_falls():
    rates = [schedule(step, 100, 0.1) for step in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3], rel=0.01)
    assert max(rates) == rates[9] > 0.97
    assert rates[55] == pytest.approx(0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * 0.55)))
    assert rates[99] == pytest.approx(0.05, abs=0.001)
    assert schedule(0, 1, 0.0) == 1.0


def test_a_loss_that_is_not_finite_is_named_and_not_learnt_from(tmp_path):
    config = fitting.config(tmp_path, "score-end")
    data = fitting.data(fitting.scored(20), fitting.scored(8, seed=1), "score-end")
    data.train = [Example(e.texts, (float("nan"),), e.where) for e in data.train]
    training = Training(config, fitting.reader(config), data)
    before = {name: w.clone() for name, w in training.weights.items()}
    with pytest.raises(NotFinite, match=r"step 1 is nan.*scores:\d+"):
        training.learn()
    assert all(torch.equal(w, training.weights[name]) for name, w in before.items())


def test_the_rate_is_that_of_what_is_trained(tmp_path):
    small, large = torch.nn.Linear(3, 3), torch.nn.Linear(4000, 3000, device="meta")
    named = {"all": {}, "adapters": {"lora_rank": 4}, "head": {"freeze": True}}
    configs = {name: fitting.config(tmp_path, **options) for name, options in named.items()}
    assert {name: default_lr(config, large) for name, config in configs.items()} == {
        "all": 2e-5,
        "adapters": 2e-4,
        "head": 1e-3,
    }
    assert {default_lr(config, small) for config in configs.values()} == {1e-3}


def test_a_frozen_trunk_reads_each_text_once_and_trains_as_if_it_read_it_anew(tmp_path):
    """The states that are kept give the weights that reading them again and again gives."""
    options = {"model": fakes.causal_lm("llama"), "freeze": True, "epochs": 3}
    kept = trained(fitting.config(tmp_path / "kept", **options))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeadReader, "remember", lambda self, texts: None)
        anew = trained(fitting.config(tmp_path / "anew", **options))
    assert {name.partition(".")[0] for name in weights(kept)} == {"score"}
    torch.testing.assert_close(weights(kept), weights(anew), atol=1e-6, rtol=0)
    texts = [t for e in (*fitting.pairs(20), *fitting.pairs(8, seed=1)) for t in e.texts]
    assert kept.measures["tokens"] == sum(map(len, texts))


# -------------------------------------------------------------------------------- what is kept


def test_the_best_epoch_is_kept_and_patience_ends_the_run(tmp_path, monkeypatch):
    losses = iter([0.5, 0.3, 0.4, 0.35, 0.2])
    config = fitting.config(tmp_path / "m", epochs=5, patience=2)
    kept = []

    def measure(training):
        kept.append({name: w.detach().clone() for name, w in training.weights.items()})
        return {"loss": next(losses)}

    monkeypatch.setattr(Training, "measure", measure)
    fitted = trained(config)
    assert len(kept) == len(fitted.history) == 4
    assert fitted.measures["epoch"] == 2
    assert fitted.measures["loss"] == 0.3
    for name, weight in fitted.reader.trained().items():
        assert torch.equal(weight, kept[1][name])
        assert not torch.equal(weight, kept[3][name])


def test_without_held_out_examples_the_last_epoch_is_kept(tmp_path):
    config = fitting.config(tmp_path / "m", epochs=3, patience=1)
    fitted = trained(config, held_out=[])
    assert fitted.measures["epoch"] == fitted.measures["epochs"] == 3
    assert "accuracy" not in fitted.measures
    assert "nothing was measured" in (tmp_path / "m" / "README.md").read_text()


def test_training_learns_what_is_good(tmp_path):
    config = fitting.config(tmp_path / "m", epochs=5, lr=1e-2)
    fitted = trained(config, fitting.pairs(100), fitting.pairs(40, seed=1))
    assert fitted.measures["accuracy"] > 0.95
    assert fitted.history[0]["loss"] > fitted.measures["loss"]


# -------------------------------------------------------------------------------- what is saved


def saved_totals(folder, examples):
    scorer = make_scorer(load_reward_model(str(folder)))
    texts = [text for example in examples for text in example.texts]
    return score_texts(scorer, [(text.prompt, text.response) for text in texts])


def test_saved_rewards_of_bt_mean_are_divided_by_the_mean_length(tmp_path):
    train, held_out = fitting.pairs(20), fitting.pairs(8, seed=1)
    fitted = trained(fitting.config(tmp_path / "m", "bt-mean"), train, held_out)
    length = np.mean([len(text.response) for e in train for text in e.texts])
    texts = [text for e in held_out for text in e.texts]
    total = fitted.reader.read(texts).reward_BR.detach().sum(1)
    saved = saved_totals(tmp_path / "m", held_out)
    torch.testing.assert_close(saved, (total / length).float(), atol=1e-5, rtol=0)
    assert fitted.factor == pytest.approx(1 / length)
    mean = float(saved.sum()) / sum(len(text.response) for text in texts)
    assert fitted.measures["reward_per_token"] == pytest.approx(mean, abs=1e-6)


def test_scores_are_standardised_and_saved_rewards_have_the_datas_unit(tmp_path):
    """The sum of saved rewards foretells the score less the mean of the training scores."""
    train, held_out = fitting.scored(100), fitting.scored(30, seed=1)
    config = fitting.config(tmp_path / "m", "score-end", epochs=6, lr=1e-2)
    fitted = trained(config, train, held_out)
    mean = np.mean([e.scores[0] for e in train])
    wanted = np.array([e.scores[0] for e in held_out]) - mean
    error = np.sqrt(np.mean((saved_totals(tmp_path / "m", held_out).numpy() - wanted) ** 2))
    assert fitted.measures["score_error"] == pytest.approx(error, rel=1e-4)
    assert error < 0.4 * wanted.std()
    assert f"{mean:.6g}, which the rewards leave out" in (tmp_path / "m" / "README.md").read_text()


def test_what_pays_for_length_is_said(tmp_path):
    """The longer text of each pair is the better one, so that the sum learns to pay each token."""
    rng = np.random.default_rng(0)

    def longer(count):
        texts = ((fitting.text(rng, 12), fitting.text(rng, 12)) for _ in range(count))
        ordered = (sorted(both, key=len, reverse=True) for both in texts)
        return [Example(tuple(both)) for both in ordered if len(both[0]) > len(both[1])]

    config = fitting.config(tmp_path / "m", epochs=4, lr=3e-3)
    fitted = trained(config, longer(100), longer(40))
    assert fitted.measures["length_correlation"] > 0.9
    assert [note for note in fitted.notes if "pays for length" in note]
    assert "pays for length" in (tmp_path / "m" / "README.md").read_text()
