"""Readers: what is trained, read and saved is one function."""

import copy
import itertools
import json

import fakes
import numpy as np
import pytest
import torch
import transformers

from tokenenv.errors import InvalidArgument, ModelError
from tokenenv.fit.config import FitConfig
from tokenenv.fit.examples import Text
from tokenenv.fit.objectives import Objective
from tokenenv.fit.readers import make_reader
from tokenenv.models.heads import make_scorer
from tokenenv.models.loading import load_causal_lm, load_reward_model
from tokenenv.models.prefix_scores import score_texts

V = fakes.VOCAB_SIZE
TOKENIZER = fakes.tokenizer()


def reader(model="new", readout="token", tokenizer=TOKENIZER, **options):
    """A reader whose forwards hold two or three of the texts."""
    options = {"hidden_size": 32, "num_layers": 1, "max_batch_tokens": 30, **options}
    config = FitConfig(data=None, out=None, model=model, **options)
    return make_reader(config, Objective("scores", readout, None, "", ""), V, tokenizer)


def texts(seed=0, count=7, own=False):
    """Texts of many lengths that end with the stop token; `own`: others wrote parts of them."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        response = np.append(rng.integers(3, V, rng.integers(1, 9)), fakes.EOS)
        mask = rng.random(len(response)) < 0.6 if own else None
        made.append(Text(rng.integers(3, V, rng.integers(1, 6)), response, own=mask))
    return made


def saved_numbers(folder, some):
    """What plain transformers, given one text after another, says of it as saved."""
    config = json.loads((folder / "config.json").read_text())
    model = getattr(transformers, config["architectures"][0]).from_pretrained(folder).eval()
    with torch.no_grad():
        return [model(torch.from_numpy(text.ids)[None]).logits.flatten() for text in some]


STARTS = {
    "new": lambda: "new",
    "llama": lambda: fakes.causal_lm("llama"),
    "tied llama": lambda: fakes.causal_lm("llama", tie_word_embeddings=True),
    "qwen2": lambda: fakes.causal_lm("qwen2"),
    "qwen3": lambda: fakes.causal_lm("qwen3"),
    "gpt2": lambda: fakes.causal_lm("gpt2"),
    "token classifier": lambda: fakes.reward_model("token"),
    "sequence classifier": lambda: fakes.reward_model("sequence"),
}


@pytest.mark.parametrize("start", STARTS)
def test_the_saved_model_gives_each_token_the_reward_that_was_read(start, tmp_path):
    mine, some = reader(STARTS[start]()), texts(own=True)
    reward, running, start_B, mask = (x.detach() for x in mine.read(some))
    mine.save(tmp_path / "m", divisor=3.0, scale=2.0)
    assert reward.abs().max() > 0.02
    scorer = make_scorer(load_reward_model(str(tmp_path / "m")))
    assert scorer.per_token
    pairs = [(text.prompt, text.response) for text in some]
    total = score_texts(scorer, pairs, own=[text.own_mask for text in some])
    torch.testing.assert_close(total, reward.sum(1) * 2 / 3, atol=1e-5, rtol=0)
    saved = zip(some, saved_numbers(tmp_path / "m", some), strict=True)
    for row, (text, scores) in enumerate(saved):
        expected = torch.where(torch.from_numpy(text.own_mask), scores[len(text.prompt) :], 0.0)
        width = len(text.response)
        torch.testing.assert_close(reward[row, :width] * 2 / 3, expected, atol=1e-5, rtol=0)
        assert mask[row].tolist() == [*text.own_mask, *[False] * (mask.shape[1] - width)]
    assert not reward[~mask].any()
    torch.testing.assert_close(running, reward.cumsum(1))
    assert not start_B.any()


@pytest.mark.parametrize(
    "start", ["new", "llama", "gpt2", "gemma3", "token classifier", "sequence classifier"]
)
@pytest.mark.parametrize("pad", [fakes.PAD, fakes.EOS])
def test_the_saved_model_gives_each_prefix_the_value_that_was_read(start, pad, tmp_path):
    """The stop token is read too, also where it is the pad token."""
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.pad_token_id = pad
    model = {"gemma3": fakes.causal_lm("gemma3"), **{k: make() for k, make in STARTS.items()}}[
        start
    ]
    if start != "new":
        model.config.pad_token_id = pad
    mine, some = reader(model, "value", tokenizer), texts(count=3)
    reward, running, start_B, mask = (x.detach() for x in mine.read(some))
    mine.save(tmp_path / "m", divisor=0.5, scale=3.0)
    scorer = make_scorer(load_reward_model(str(tmp_path / "m")))
    assert (scorer.per_token, scorer.pad_token_id) == (False, None)
    for row, text in enumerate(some):
        width, first = len(text.response), len(text.prompt)
        prefixes = [Text(text.prompt, text.response[:n]) for n in range(width + 1)]
        expected = torch.cat([start_B[row : row + 1], running[row, :width]]) * 6
        saved = torch.cat(saved_numbers(tmp_path / "m", prefixes))
        torch.testing.assert_close(saved, expected, atol=1e-5, rtol=0)
        pairs = [(text.ids[:first], text.ids[first : first + n]) for n in range(width + 1)]
        torch.testing.assert_close(score_texts(scorer, pairs), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(reward[row, :width] * 6, expected.diff(), atol=1e-5, rtol=0)
    assert running.abs().max() > 0.02
    assert not reward[~mask].any()
    torch.testing.assert_close(reward.sum(1), differences_of(some, running, start_B))


def differences_of(some, running, start_B):
    """The value after the last token of each text, less that of its prompt."""
    rows = range(len(some))
    return torch.stack([running[row, len(some[row].response) - 1] - start_B[row] for row in rows])


def test_an_own_token_is_paid_the_change_up_to_the_state_that_the_policy_acts_in_next():
    some, mine = texts(3, count=12, own=True), reader(fakes.causal_lm(), "value")
    reward, running, start_B, _ = mine.read(some)
    assert any(text.own_mask.any() and not text.own_mask.all() for text in some)
    for row, text in enumerate(some):
        every = mine.read([Text(text.prompt, text.response)])
        values = torch.cat([every.start_B, every.running_BR[0]])
        acts = [*np.flatnonzero(text.own_mask), len(text.response)]
        torch.testing.assert_close(start_B[row], values[acts[0]])
        for place, following in itertools.pairwise(acts):
            torch.testing.assert_close(running[row, place], values[following])
            torch.testing.assert_close(reward[row, place], values[following] - values[place])
        assert not reward[row, : len(text.response)][torch.from_numpy(~text.own_mask)].any()


def test_what_others_write_is_read_and_not_paid():
    own = np.array([False, True, False, True])
    one = Text(np.array([3, 4]), np.array([5, 6, 7, 8]), own=own)
    other = Text(np.array([3, 4]), np.array([9, 6, 10, 8]), own=own)
    for readout in ("token", "value", "log-ratio"):
        mine = reader(fakes.causal_lm(), readout)
        moved(mine)
        reward = mine.read([one, other]).reward_BR
        assert reward.ne(0).tolist() == [own.tolist()] * 2
        assert (reward[0] - reward[1]).abs()[own].min() > 1e-4, readout


def moved(mine, seed=0):
    """Change all weights that learn, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in mine.trained().values():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))


@pytest.mark.parametrize("readout", ["token", "value", "log-ratio"])
def test_micro_batches_and_the_order_of_texts_change_nothing(readout):
    some, found = texts(own=True), []
    for size in (1, 30, 10_000):
        mine = reader(fakes.causal_lm(), readout, max_batch_tokens=size)
        moved(mine)
        reading = mine.read(some)
        upstream = torch.linspace(-1, 1, reading.reward_BR.numel()).view_as(reading.reward_BR)
        ((reading.reward_BR * upstream).sum() + reading.start_B.sum()).backward()
        found.append([*reading, *(one.grad for one in mine.trained().values())])
        backwards = mine.read(some[::-1])
        torch.testing.assert_close(backwards.reward_BR.flip(0), reading.reward_BR)
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
    assert all(one.abs().sum() > 0 for one in found[0][4:])


def test_texts_of_one_token_and_texts_of_any_number_are_read():
    mine = reader()
    one = Text(np.array([3]), np.array([4]))
    assert mine.read([one]).reward_BR.shape == (1, 1)
    mine.remember([])


@pytest.mark.parametrize("readout", ["token", "value"])
def test_a_head_learns_on_states_that_are_computed_once(readout, caplog):
    model, some = fakes.causal_lm(), texts(own=True)
    frozen, whole = reader(model, readout, freeze=True), reader(model, readout)
    assert {name.split(".")[0] for name in frozen.trained()} == {"score"}
    counted, forwards = [], []
    frozen.model.base_model.register_forward_hook(lambda *_: forwards.append(1))
    with caplog.at_level("INFO", "tokenenv"):
        frozen.remember(some, counted.append)
    states = sum(len(text.response) + 1 for text in some)
    size = f"{len(some)} texts will take {states * 32 * 4 / 2**20:.1f} MiB"
    assert size in caplog.text
    assert sum(counted) == len(some)
    before = len(forwards)
    frozen.remember(some)
    for mine in (frozen, whole):
        moved_head(mine)
    for subset in (some, some[::-2]):
        for one, other in zip(frozen.read(subset), whole.read(subset), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert len(forwards) == before == len(counted) > 1
    fresh = texts(9)
    torch.testing.assert_close(frozen.read(fresh).reward_BR, whole.read(fresh).reward_BR)
    assert len(forwards) > before


def moved_head(mine):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        mine.model.score.weight.add_(torch.randn(1, 32, generator=generator))


def test_the_memory_of_many_states_is_a_warning(caplog, monkeypatch):
    monkeypatch.setattr("tokenenv.fit.frozen.LARGE", 1000)
    reader(fakes.causal_lm(), freeze=True).remember(texts())
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize("start", ["llama", "token classifier"])
def test_a_frozen_trunk_in_bfloat16_has_a_head_in_float32(start, tmp_path):
    mine, some = reader(STARTS[start](), freeze=True, dtype="bfloat16"), texts()
    mine.remember(some)
    assert {rows.dtype for rows in mine._kept._rows.values()} == {torch.bfloat16}
    mine.read(some).reward_BR.sum().backward()
    assert {weight.dtype for weight in mine.trained().values()} == {torch.float32}
    weight = mine.model.score.weight
    mine.save(tmp_path / "m")
    assert torch.equal(load_reward_model(str(tmp_path / "m")).score.weight, weight)


@pytest.mark.parametrize("readout", ["token", "value"])
@pytest.mark.parametrize("start", ["tied llama", "gpt2", "sequence classifier"])
def test_adapters_are_merged_into_a_plain_model(readout, start, tmp_path):
    pytest.importorskip("peft")
    model, some = STARTS[start](), texts()
    mine = reader(model, readout, lora_rank=2)
    assert all(
        "lora_" in name or "score" in name or "classifier" in name for name in mine.trained()
    )
    assert len(mine.trained()) > 4
    plain = {name: weight.clone() for name, weight in mine.model.state_dict().items()}
    moved(mine)
    reward = mine.read(some).reward_BR.detach()
    mine.save(tmp_path / "m", divisor=2.0)
    assert {"model.safetensors", "config.json"} <= {p.name for p in (tmp_path / "m").iterdir()}
    assert not list((tmp_path / "m").glob("adapter*"))
    loaded = load_reward_model(str(tmp_path / "m"))
    pairs = [(text.prompt, text.response) for text in some]
    total = score_texts(make_scorer(loaded), pairs)
    if readout == "value":
        total -= score_texts(make_scorer(loaded), [(text.prompt, []) for text in some])
    torch.testing.assert_close(total, reward.sum(1) / 2, atol=1e-5, rtol=0)
    after = mine.model.state_dict()  # saving merged a copy
    assert all(torch.equal(after[name], plain[name]) for name in plain if "base_layer" in name)
    torch.testing.assert_close(mine.read(some).reward_BR, reward)


def plain_ratios(model, reference, text):
    """log pi - log pi_ref of each response token, from plain logits."""
    ids = torch.from_numpy(text.ids)
    with torch.no_grad():
        one, two = (m(ids[None]).logits[0].log_softmax(-1) for m in (model, reference))
    row, first = torch.arange(len(ids) - 1), len(text.prompt) - 1
    return (one - two)[:-1][row, ids[1:]][first:]


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}], ids=["all weights", "adapters"])
def test_log_ratios_are_those_of_the_saved_language_model(options, tmp_path):
    reference, some = fakes.causal_lm(), texts(own=True)
    before = copy.deepcopy(reference.state_dict())
    mine = reader(reference, "log-ratio", coef=0.5, **options)
    assert not mine.read(some).running_BR.any()
    moved(mine)
    reading = mine.read(some)
    assert torch.equal(reading.start_B, torch.zeros(len(some)))
    torch.testing.assert_close(reading.running_BR, reading.reward_BR.cumsum(1))
    mine.save(tmp_path / "m")
    saved = load_causal_lm(str(tmp_path / "m"))
    for row, text in enumerate(some):
        ratio = torch.where(
            torch.from_numpy(text.own_mask), plain_ratios(saved, reference, text), 0.0
        )
        found = reading.reward_BR[row, : len(text.response)].detach()
        torch.testing.assert_close(found, 0.5 * ratio, atol=1e-5, rtol=0)
    assert reading.reward_BR.abs().max() > 0.1
    after = reference.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}], ids=["all weights", "adapters"])
def test_a_log_ratio_has_a_gradient_where_training_begins(options):
    """There the model is its reference, and every log-ratio is exactly 0."""
    mine = reader(fakes.causal_lm(), "log-ratio", **options)
    rewards = mine.read(texts()).reward_BR
    assert not rewards.any()
    rewards.sum().backward()
    assert any(weight.grad.abs().max() > 1e-3 for weight in mine.trained().values())


def test_adapters_share_the_weights_of_their_reference():
    mine = reader(fakes.causal_lm(), "log-ratio", lora_rank=2)
    own = {weight.data_ptr() for weight in mine._reference.parameters()}
    shared = [w for w in mine.model.parameters() if w.data_ptr() in own]
    assert len(shared) == len(own)
    assert not any(weight.requires_grad for weight in shared)
    assert all("lora_" in name for name in mine.trained())


def test_a_reference_reads_a_text_once():
    some, reference = texts(own=True), fakes.causal_lm(seed=1)
    mine = reader(fakes.causal_lm(), "log-ratio", reference=reference)
    before = mine.read(some).reward_BR
    forwards = []
    mine._reference.base_model.register_forward_hook(lambda *_: forwards.append(1))
    mine.remember(some)
    first = len(forwards)
    torch.testing.assert_close(mine.read(some[::-1]).reward_BR.flip(0), before)
    assert len(forwards) == first > 1
    expected = 0.1 * plain_ratios(fakes.causal_lm(), reference, some[0])[some[0].own_mask]
    torch.testing.assert_close(before[0, : len(some[0].response)][some[0].own_mask], expected)


def test_weights_go_out_and_come_back_by_name():
    one, other, some = reader(), reader(seed=1), texts()
    assert not torch.equal(one.read(some).reward_BR, other.read(some).reward_BR)
    kept = {name: weight.detach().clone() for name, weight in one.trained().items()}
    other.load_trained(kept)
    assert torch.equal(one.read(some).reward_BR, other.read(some).reward_BR)
    wide = {**kept, "score.bias": torch.zeros(2)}
    for wrong in ({}, {**kept, "more": torch.zeros(1)}, wide):
        with pytest.raises(InvalidArgument, match="weights of another model"):
            other.load_trained(wrong)


def test_the_seed_alone_decides_the_first_weights():
    some, models = texts(), ("new", fakes.causal_lm())
    state = torch.random.get_rng_state()
    for model in models:
        one, two, three = (reader(model, seed=seed).read(some).reward_BR for seed in (0, 0, 1))
        assert torch.equal(one, two)
        assert not torch.equal(one, three)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_model_that_is_given_stays_as_it_was():
    for kind in (fakes.causal_lm("llama"), fakes.reward_model("token").bfloat16()):
        before = copy.deepcopy(kind.state_dict())
        mine = reader(kind)
        assert {weight.dtype for weight in mine.trained().values()} == {torch.float32}
        assert len(mine.trained()) == len(list(mine.model.parameters()))
        assert not mine.model.training
        moved(mine)
        after = kind.state_dict()
        assert all(
            torch.equal(after[name], before[name]) and after[name].dtype == before[name].dtype
            for name in before
        )
        assert not any(weight.requires_grad for weight in kind.parameters())
        assert kind.config.num_labels == (1 if "Token" in type(kind).__name__ else 2)


def test_a_classifier_goes_on_with_its_head_and_another_gets_a_new_one(tmp_path):
    model, some = fakes.reward_model("token"), texts()
    fakes.saved(model, tmp_path / "rm")
    reward = reader(str(tmp_path / "rm")).read(some).reward_BR
    expected = saved_numbers(tmp_path / "rm", some)
    for row, text in enumerate(some):
        scores = expected[row][len(text.prompt) :]
        torch.testing.assert_close(reward[row, : len(scores)].detach(), scores)
    value = reader(str(tmp_path / "rm"), "value")
    assert value.model.score.weight.std() < 2 / 33
    assert torch.equal(
        value.model.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight
    )


def test_a_head_of_several_layers_is_scaled_in_its_last_one(tmp_path):
    model, some = fakes.reward_model("token"), texts()
    layers = torch.nn.Linear(32, 8), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1)
    model.score = torch.nn.Sequential(*layers)
    mine = reader(model)
    reward = mine.read(some).reward_BR
    assert torch.equal(mine.read(some).reward_BR, reward)  # dropout is off
    scaled = mine._scaled(0.25)
    pairs = [(text.prompt, text.response) for text in some]
    torch.testing.assert_close(score_texts(make_scorer(scaled), pairs), reward.sum(1) / 4)
    assert torch.equal(mine.read(some).reward_BR, reward)


def test_a_new_model_has_the_shape_and_the_ids_that_were_asked_for():
    config = reader(hidden_size=96, num_layers=3, max_length=300).model.config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (96, 256, 3)
    assert (config.head_dim, config.num_key_value_heads, config.num_labels) == (32, 1, 1)
    assert (config.vocab_size, config.max_position_embeddings) == (V, 300)
    assert (config.pad_token_id, config.eos_token_id) == (fakes.PAD, fakes.EOS)
    assert reader(tokenizer=None).model.config.max_position_embeddings == 256


def with_adapter():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(fakes.causal_lm(), peft.LoraConfig(target_modules="all-linear"))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: {"freeze": True}, InvalidArgument, "freeze=True leaves .* those of model='new'"),
        (lambda: {"lora_rank": 4}, InvalidArgument, "lora_rank=4 leaves the trunk's weights"),
        (
            lambda: {"model": fakes.causal_lm(), "readout": "log-ratio", "freeze": True},
            InvalidArgument,
            "freeze=True leaves nothing to train for objective='bt-sum'",
        ),
        (lambda: {"readout": "log-ratio"}, InvalidArgument, "takes log-ratios to reference="),
        (lambda: {"hidden_size": 48}, InvalidArgument, "hidden_size=48 .* multiple of 32"),
        (lambda: {"model": 3}, InvalidArgument, "model= is of type int"),
        (lambda: {"model": "/nowhere/at/all"}, ModelError, "model='/nowhere/at/all'"),
        (lambda: {"model": with_adapter()}, InvalidArgument, "model=PeftModel has an adapter"),
        (
            lambda: {"model": fakes.reward_model("token", num_labels=2)},
            ModelError,
            "has 2 labels",
        ),
        (
            lambda: {"model": fakes.reward_model("token"), "readout": "log-ratio"},
            ModelError,
            "is a classifier; objective='bt-sum' trains a causal language model",
        ),
        (
            lambda: {
                "model": fakes.causal_lm(),
                "readout": "log-ratio",
                "reference": fakes.reward_model("token"),
            },
            InvalidArgument,
            "reference= is a classifier",
        ),
        (
            lambda: {"model": fakes.bidirectional_reward_model()},
            ModelError,
            "looks ahead",
        ),
        (
            lambda: {"model": fakes.causal_lm("gemma3")},
            ModelError,
            "has no TokenClassification model of type 'gemma3_text'",
        ),
        (
            lambda: {"model": fakes.causal_lm(vocab_size=40)},
            ModelError,
            "has 40 token ids, and the tokenizer 61",
        ),
        (
            lambda: {"model": fakes.causal_lm(), "max_length": 65},
            ModelError,
            "max_length=65: .* has 64 positions",
        ),
    ],
)
def test_what_cannot_be_trained_is_one_clear_error(make, error, message):
    with pytest.raises(error, match=message):
        reader(**make())


def test_a_text_that_is_too_long_is_refused():
    long = Text(np.array([3]), np.full(64, 4))
    mine = reader(fakes.causal_lm())
    for read in (mine.read, reader(fakes.causal_lm(), freeze=True).remember):
        with pytest.raises(InvalidArgument, match="has 65 tokens; the model reads at most 64"):
            read([long])


def test_a_log_ratio_is_not_scaled_by_weights(tmp_path):
    with pytest.raises(InvalidArgument, match="scale coef instead"):
        reader(fakes.causal_lm(), "log-ratio").save(tmp_path / "m", divisor=2.0)
    assert not (tmp_path / "m").exists()
