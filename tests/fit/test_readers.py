"""Readers: what is trained, read and saved is one function."""

import json

import fakes
import numpy as np
import pytest
import torch
import transformers

from tokenenv.fit.config import FitConfig
from tokenenv.fit.examples import Text
from tokenenv.fit.objectives import Objective
from tokenenv.fit.readers import make_reader
from tokenenv.models.heads import make_scorer
from tokenenv.models.loading import load_reward_model
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
