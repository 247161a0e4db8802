"""Reward models with a tokenizer of their own, against their own logits on the whole text."""

import warnings
from functools import cache

import fakes
import numpy as np
import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tokenenv.errors import ModelError
from tokenenv.models.aligned_scorer import make_aligned_scorer
from tokenenv.models.alignment import token_ends
from tokenenv.models.prefix_scores import score_texts
from tokenenv.types import Scorer

CORPUS = [
    "the café in Zürich is très bon",
    "naïve façade, coöperate!",
    "今日は良い天気です",
    "😀 👍🏽 great 😀",
    "señor niño año",
]
TEXTS = [
    "the café in Zürich",
    "今日は 😀👍🏽, naïve!",
    "fac\u0327ade e\u0301",
    "a [SEP] in <stop> the [CLS]text [PAD]",
    "  spaces \n and more  ",
    "unknown 🦊 \u200d ok",
    "b",
    "",
]
LONG = 64
"""Positions of the models."""


@cache
def byte_level(vocab_size, trim_offsets=False, stop="<stop>"):
    """Byte-level BPE: characters beyond ASCII may be several tokens, which may hold a part of two
    characters."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {
        "special_tokens": ["<pad>", stop],
        "initial_alphabet": alphabet,
        "show_progress": False,
    }
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=vocab_size, **options))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token=stop
    )


@cache
def word_piece():
    """Lower case without accents, no spaces, unknown words, [CLS] before the text and [SEP] behind
    it."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.train_from_iterator(
        CORPUS,
        trainers.WordPieceTrainer(vocab_size=110, special_tokens=special, show_progress=False),
    )
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names)


POLICY = byte_level(300)
SIZE = len(word_piece())
TOKENIZERS = {
    "bytes": lambda: byte_level(275, True, "<end>"),
    "words": word_piece,
    "same": lambda: POLICY,
}


@cache
def reward_model(architecture, kind, tokenizer="words", **changes):
    vocab_size = len(TOKENIZERS[tokenizer]())
    if architecture != "bert":
        return fakes.reward_model(
            kind, architecture, vocab_size=vocab_size, max_position_embeddings=LONG, **changes
        )
    options = {
        **fakes.NO_GROUPS,
        "vocab_size": vocab_size,
        "max_position_embeddings": LONG,
        "num_labels": 1,
        **changes,
    }
    name = {"token": "BertForTokenClassification", "sequence": "BertForSequenceClassification"}[
        kind
    ]
    return fakes.randomized(getattr(transformers, name)(transformers.BertConfig(**options)), 1)


def scorer_of(architecture, kind, tokenizer="words", **options):
    return make_aligned_scorer(
        reward_model(architecture, kind, tokenizer), TOKENIZERS[tokenizer](), POLICY, **options
    )


def split(text, share=0.4, stop=True):
    """The policy's ids of a text: a prompt and a response, which may be cut within a character."""
    ids = POLICY(text)["input_ids"]
    at = int(share * len(ids))
    return ids[:at], ids[at:] + [POLICY.eos_token_id] * stop


def logits_by_hand(model, tokenizer, pair):
    """The model's own logits on the text as it stands, and its reward tokens' characters."""
    text = POLICY.decode(pair[0] + pair[1], skip_special_tokens=True)
    encoded = tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
    offsets, ids = encoded.pop("offset_mapping")[0].tolist(), encoded["input_ids"]
    if not ids.numel():
        return torch.zeros(0), offsets
    with torch.no_grad():
        return model(input_ids=ids).logits.flatten(), offsets


def scores_by_hand(model, tokenizer, pair):
    """(T,) a loop over the reward tokens and their characters."""
    logits, offsets = logits_by_hand(model, tokenizer, pair)
    ends = token_ends(
        POLICY.batch_decode(
            [pair[0] + pair[1][:k] for k in range(len(pair[1]) + 1)], skip_special_tokens=True
        )
    )
    out, reached = np.zeros(len(pair[1])), 0
    spelled = max([i for i, (begin, end) in enumerate(offsets) if begin < end], default=-1)
    for i, (score, (begin, end)) in enumerate(zip(logits.tolist(), offsets, strict=True)):
        reached = max(reached, end)
        if i > spelled and end < reached:
            out[-1:] += score
            continue
        places = range(begin, end) if begin < end else range(reached - 1, reached)
        inside = [
            int(np.searchsorted(ends[1:], place, side="right"))
            for place in places
            if place >= ends[0]
        ]
        for t in inside:
            out[t] += score / len(inside)
    return out


PAIRS = [split(text, share, stop) for text in TEXTS for share, stop in ((0.4, True), (0.7, False))]
MODELS = [
    (architecture, tokenizer)
    for architecture in ("llama", "gpt2", "bert")
    for tokenizer in TOKENIZERS
]


# ------------------------------------------------------------------- scores


def test_the_tokenizers_cut_differently_and_within_characters():
    cuts = [tokenizer()("the café, 今日 😀")["input_ids"] for tokenizer in TOKENIZERS.values()]
    assert len({len(cut) for cut in cuts}) == 3
    assert any("\ufffd" in POLICY.decode(pair[0]) for pair in PAIRS)
    assert "[SEP]" in POLICY.decode(PAIRS[6][0] + PAIRS[6][1])
    assert word_piece()(TEXTS[3])["input_ids"].count(word_piece().sep_token_id) == 2


@pytest.mark.parametrize(("architecture", "tokenizer"), MODELS)
def test_token_scores_equal_the_models_own_logits(architecture, tokenizer):
    scorer = scorer_of(architecture, "token", tokenizer)
    assert scorer.per_token
    assert not isinstance(scorer, Scorer)
    scores = scorer.token_scores(PAIRS, 30)
    assert scores.shape == (len(PAIRS), 30)
    assert scores.dtype == torch.float32
    for row, pair in zip(scores, PAIRS, strict=True):
        by_hand = scores_by_hand(scorer.model, TOKENIZERS[tokenizer](), pair)
        np.testing.assert_allclose(row[: len(pair[1])], by_hand, atol=1e-5)
        assert (row[len(pair[1]) :] == 0).all()
    assert (scores != 0).sum() > 2 * len(PAIRS)


@pytest.mark.parametrize(("architecture", "tokenizer"), MODELS)
def test_a_texts_score_is_the_models_own_and_stands_on_its_last_token(architecture, tokenizer):
    scorer = scorer_of(architecture, "sequence", tokenizer)
    assert not scorer.per_token
    scores = scorer.token_scores(PAIRS, 30)
    for row, pair in zip(scores, PAIRS, strict=True):
        by_hand = logits_by_hand(scorer.model, TOKENIZERS[tokenizer](), pair)[0]
        torch.testing.assert_close(
            row[max(0, len(pair[1]) - 1)], by_hand.sum(), atol=1e-5, rtol=1e-5
        )
        assert (row != 0).sum() == len(by_hand)


def test_the_sum_is_what_the_response_and_the_closing_token_score():
    """The prompt ends between two words: its tokens and [CLS] earn nothing, [SEP] does."""
    pair = (
        POLICY("the café")["input_ids"],
        POLICY(" in Zürich")["input_ids"] + [POLICY.eos_token_id],
    )
    tokenizer, scorer = word_piece(), scorer_of("bert", "token")
    logits, offsets = logits_by_hand(scorer.model, tokenizer, pair)
    first = next(i for i, (begin, _) in enumerate(offsets) if begin == len("the café "))
    scores = scorer.token_scores([pair], len(pair[1]))[0]
    torch.testing.assert_close(scores.sum(), logits[first:].sum())
    torch.testing.assert_close(scores[-1], logits[-1])
    torch.testing.assert_close(score_texts(scorer, [pair])[0], logits[first:].sum())


def test_the_same_tokenizer_gives_each_token_its_own_logit():
    scorer = scorer_of("llama", "token", "same")
    pair = POLICY("the cafe")["input_ids"], POLICY(" is great!")["input_ids"]
    with torch.no_grad():
        logits = scorer.model(input_ids=torch.tensor([pair[0] + pair[1]])).logits[
            0, len(pair[0]) :, 0
        ]
    torch.testing.assert_close(scorer.token_scores([pair], len(pair[1]))[0], logits)


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_empty_responses_and_texts(kind):
    prompt = POLICY("the café")["input_ids"]
    pairs = [
        (prompt, []),
        (prompt, [POLICY.eos_token_id]),
        ([POLICY.pad_token_id], [POLICY.eos_token_id]),
    ]
    words = scorer_of("bert", kind)
    expected = [logits_by_hand(words.model, word_piece(), pair)[0] for pair in pairs]
    if (
        kind == "token"
    ):  # [SEP] goes to the stop token; it is not told from [CLS] where there is no text
        expected = [torch.zeros(1), expected[1][-1:], torch.zeros(1)]
    torch.testing.assert_close(words.token_scores(pairs, 1), torch.stack(expected))
    assert scorer_of("llama", kind, "bytes").token_scores(pairs[2:], 3).tolist() == [
        [0.0, 0.0, 0.0]
    ]  # no tokens at all


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(
        st.text(max_size=20) | st.text(st.sampled_from("aé 今😀\u0301\n[SEP]"), max_size=20),
        min_size=1,
        max_size=4,
    ),
    share=st.floats(0, 1),
    model=st.sampled_from(MODELS),
    kind=st.sampled_from(["token", "sequence"]),
)
@example(texts=["[SEP]", "a[SEP]", "[CLS]"], share=0.0, model=("bert", "words"), kind="token")
@pytest.mark.filterwarnings("ignore:a text is longer")
def test_random_texts(texts, share, model, kind):
    architecture, name = model
    scorer, tokenizer = scorer_of(architecture, kind, name), TOKENIZERS[name]()
    pairs = [split(text, share) for text in texts]
    scores = scorer.token_scores(pairs, 100)
    for row, pair, text in zip(scores, pairs, texts, strict=True):
        logits = (
            logits_by_hand(scorer.model, tokenizer, pair)[0]
            if len(tokenizer(text)["input_ids"]) <= LONG
            else None
        )
        if logits is not None and kind == "token":
            by_hand = scores_by_hand(scorer.model, tokenizer, pair)
            np.testing.assert_allclose(row[: len(pair[1])], by_hand, atol=1e-5)
        elif logits is not None:
            torch.testing.assert_close(row.sum(), logits.sum(), atol=1e-5, rtol=1e-5)
        assert row.isfinite().all()


# ----------------------------------------------------------------- batching


@pytest.mark.parametrize("kind", ["token", "sequence"])
@pytest.mark.parametrize(("architecture", "tokenizer"), MODELS)
def test_a_texts_scores_depend_on_no_other_text_and_forwards_are_small(
    architecture, tokenizer, kind
):
    together = scorer_of(architecture, kind, tokenizer).token_scores(PAIRS, 30)
    scorer, sizes = scorer_of(architecture, kind, tokenizer, max_batch_tokens=60), []
    hook = scorer.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    torch.testing.assert_close(
        scorer.token_scores(PAIRS[::-1], 30).flip(0), together, atol=1e-5, rtol=1e-5
    )
    hook.remove()
    assert max(rows * width for rows, width in sizes) <= 60
    assert max(rows for rows, _ in sizes) > 1
    alone = torch.cat([scorer.token_scores([pair], 30) for pair in PAIRS])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pad_token_id", [None, -1])
@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_models_that_name_no_pad_id(kind, pad_token_id):
    """Those that score texts could not find a padded text's last token."""
    model = reward_model("llama", kind, "bytes", pad_token_id=pad_token_id)
    scorer, sizes = make_aligned_scorer(model, TOKENIZERS["bytes"](), POLICY), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    scores = scorer.token_scores(PAIRS, 30)
    assert (max(sizes) > 1) == (kind == "token")
    for row, pair in zip(scores, PAIRS, strict=True):
        logits = logits_by_hand(model, TOKENIZERS["bytes"](), pair)[0]
        by_hand = (
            scores_by_hand(model, TOKENIZERS["bytes"](), pair).sum()
            if kind == "token"
            else logits.sum()
        )
        np.testing.assert_allclose(row.sum(), by_hand, atol=2e-5)


def test_the_model_keeps_its_mode_and_no_graph_is_made():
    model = fakes.reward_model("token", vocab_size=len(word_piece())).train().requires_grad_(True)
    scorer = make_aligned_scorer(model, word_piece(), POLICY)
    scores = scorer.token_scores(PAIRS, 30)
    assert model.training
    assert not scores.requires_grad
    torch.testing.assert_close(scorer.token_scores(PAIRS, 30), scores, atol=0, rtol=0)  # no dropout


def test_half_precision_gives_float32():
    model = fakes.reward_model("token", vocab_size=len(word_piece())).to(torch.bfloat16)
    assert (
        make_aligned_scorer(model, word_piece(), POLICY).token_scores(PAIRS, 30).dtype
        == torch.float32
    )


# --------------------------------------------------------------- truncation


@pytest.mark.parametrize("limit", ["positions", "tokenizer"])
def test_long_texts_lose_their_beginning_with_one_warning(limit):
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=word_piece()._tokenizer, pad_token="[PAD]"
    )
    tokenizer.model_max_length = 12 if limit == "tokenizer" else 1000
    model = fakes.reward_model(
        "token",
        vocab_size=len(tokenizer),
        max_position_embeddings=12 if limit == "positions" else 64,
    )
    scorer = make_aligned_scorer(model, tokenizer, POLICY)
    short, long = (
        split("the café in Zürich"),
        split("the café in Zürich is très bon " * 3, share=0.1),
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scorer.token_scores([short], 90)
        assert not caught
        scores = scorer.token_scores([long, short], 90)[0]
        scorer.token_scores([long], 90)
    assert [str(warning.message) for warning in caught] == [
        "a text is longer than the 12 tokens that the reward model can read; its beginning is left "
        "out, and response tokens there score 0"
    ]
    text = POLICY.decode(long[0] + long[1], skip_special_tokens=True)
    ids, offsets = (
        tokenizer(text, return_offsets_mapping=True)[key] for key in ("input_ids", "offset_mapping")
    )
    with torch.no_grad():
        logits = model(torch.tensor([[ids[0], *ids[-11:]]])).logits[0, :, 0]
    torch.testing.assert_close(scores.sum(), logits[1:].sum())
    ends = token_ends(
        POLICY.batch_decode(
            [long[0] + long[1][:k] for k in range(len(long[1]) + 1)], skip_special_tokens=True
        )
    )
    left_out = int((ends[1:] <= offsets[-11][0]).sum())
    assert left_out > 5
    assert (scores[:left_out] == 0).all()
    assert (scores[left_out : len(long[1])] != 0).any()


def test_the_users_tokenizer_stays_as_it_was():
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=word_piece()._tokenizer, pad_token="[PAD]"
    )
    tokenizer.truncation_side = "right"
    model = fakes.reward_model("token", vocab_size=len(tokenizer), max_position_embeddings=12)
    with pytest.warns(UserWarning, match="12 tokens"):
        make_aligned_scorer(model, tokenizer, POLICY).token_scores([split(" ".join(CORPUS))], 99)
    assert tokenizer.truncation_side == "right"
    assert tokenizer.backend_tokenizer.truncation is None


def test_positions_counted_from_behind_the_pad_id():
    """RoBERTa's first token has position pad id + 1."""
    config = transformers.RobertaConfig(
        **{
            **fakes.NO_GROUPS,
            "vocab_size": len(word_piece()),
            "max_position_embeddings": 14,
            "pad_token_id": 1,
        },
        num_labels=1,
    )
    model = fakes.randomized(transformers.RobertaForTokenClassification(config))
    with pytest.warns(UserWarning, match="longer than the 12 tokens"):
        scores = make_aligned_scorer(model, word_piece(), POLICY).token_scores(
            [split(" ".join(CORPUS))], 99
        )
    assert scores.isfinite().all()


def test_models_without_positions_read_any_text():
    model = fakes.reward_model("token", "llama_dynamic", vocab_size=len(word_piece()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            make_aligned_scorer(model, word_piece(), POLICY)
            .token_scores([split(" ".join(CORPUS))], 99)
            .isfinite()
            .all()
        )


# --------------------------------------------------------- what does not fit


def one_more(special, closing=False):
    """A WordPiece tokenizer with [MORE] as its last token, special or not, which may close every
    text."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=word_piece()._tokenizer, pad_token="[PAD]"
    )
    if special:
        tokenizer.add_special_tokens({"mask_token": "[MORE]"})
    else:
        tokenizer.add_tokens(["[MORE]"])
    if closing:
        template = processors.TemplateProcessing(
            single="$A [MORE]", special_tokens=[("[MORE]", SIZE)]
        )
        tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


def test_a_special_token_beyond_the_models_is_allowed_and_does_no_harm_where_it_is_spelled_out():
    model, plain = fakes.reward_model("token", vocab_size=SIZE), split("the café")
    scorer = make_aligned_scorer(model, one_more(special=True), POLICY)
    expected = make_aligned_scorer(model, word_piece(), POLICY).token_scores([plain], 9)
    torch.testing.assert_close(scorer.token_scores([plain], 9), expected)
    assert scorer.token_scores([split("the [MORE] café"), plain], 20).isfinite().all()


class Slow:
    is_fast = False


@pytest.mark.parametrize(
    ("model", "tokenizer", "message"),
    [
        (
            lambda: reward_model("bert", "token"),
            Slow,
            "Slow of the reward model gives no character offsets; allowed: fast",
        ),
        (
            lambda: reward_model("llama", "token"),
            lambda: one_more(False),
            f"ids up to {SIZE} and LlamaForTokenC.* {SIZE} emb",
        ),
        (
            lambda: reward_model("llama", "token"),
            lambda: one_more(True, True),
            f"ids up to {SIZE} and .* as reward_tokenizer=",
        ),
        (
            lambda: reward_model("llama", "token", num_labels=2),
            word_piece,
            r"LlamaForTokenClassification .* \(1, 3, 2\) for a",
        ),
        (
            lambda: reward_model("llama", "sequence", num_labels=3),
            word_piece,
            r"\(1, 3\) .* allowed: .* with one label",
        ),
        (
            lambda: reward_model("bert", "sequence", num_labels=2),
            word_piece,
            r"BertForSequenceClassification .* \(1, 2\)",
        ),
        (
            lambda: fakes.causal_lm(vocab_size=SIZE),
            word_piece,
            rf"LlamaForCausalLM gives logits \(1, 3, {SIZE}\)",
        ),
        (lambda: reward_model("bert", "token").bert, word_piece, r"BertModel gives logits \(0,\)"),
    ],
)
def test_what_does_not_fit_is_named(model, tokenizer, message):
    with pytest.raises(ModelError, match=message):
        make_aligned_scorer(model(), tokenizer(), POLICY)
