"""A sequence classifier reads a text at its last token that is not its pad id: in every path, as
transformers does."""

from itertools import pairwise
from types import SimpleNamespace

import fakes
import numpy as np
import pytest
import tasks
import torch
from credit import bound, finished
from gymnasium.vector import AutoresetMode
from tasks import T, make_vec, play

from tokenenv.errors import ModelError
from tokenenv.models.heads import make_scorer
from tokenenv.models.prefix_scores import score_texts
from tokenenv.models.vllm_models import VLLMRewardModel
from tokenenv.rewards.attention import Attention, last_attention
from tokenenv.rewards.gradient import Gradient
from tokenenv.rewards.process import Process

SAME_STEP = AutoresetMode.SAME_STEP
PAD, STEP = fakes.PAD, 20
STOPS = (PAD, 7)
TEXTS = [
    ([5, 6, 8], [10, 11, PAD]),
    ([5, 6, 8], [10, PAD, 11]),
    ([5, 6, PAD], [PAD, PAD]),
    ([5, PAD, 8, PAD], []),
    ([PAD], [PAD]),
    ([PAD, 9], [12, 13, 14]),
]
DESIGNS = {
    "terminal": "terminal",
    "delta": "delta",
    "segment": "segment",
    "process": Process("delta"),
    "worst step": Process("min"),
    "attention": "attention",
    "gradient": "gradient",
    "occlusion": "occlusion",
    "shapley": "shapley",
    "uniform": "uniform",
}
PAY_THE_SCORE = ("terminal", "attention", "gradient", "occlusion", "uniform")


def own_score(text, kind="sequence"):
    """By transformers alone."""
    with torch.no_grad():
        return float(tasks.reward_model(kind)(input_ids=torch.tensor([text])).logits)


def made(design="terminal", **options):
    options = {"scorer": "sequence", "stops": STOPS, "step_ends": (STEP,), "kl": "none", **options}
    return make_vec(4, SAME_STEP, reward=DESIGNS[design], **options)


@pytest.mark.parametrize(
    "name", ["llama", "qwen2_mixed", "qwen3", "mistral", "gpt2", "gpt_neox", "gemma3", "bloom"]
)
def test_scores_are_the_models_own_whatever_the_architecture(name):
    model = fakes.reward_model("sequence", name)
    scorer = make_scorer(model)
    assert scorer.pad_token_id == PAD
    with torch.no_grad():
        own = torch.cat([model(input_ids=torch.tensor([p + r])).logits[0] for p, r in TEXTS])
    torch.testing.assert_close(score_texts(scorer, TEXTS, 12), own, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("design", DESIGNS)
def test_stepping_equals_scoring_and_transformers(design):
    envs = made(design)
    episodes = play(envs, steps=24, stop=0.3)
    texts = [e.prompt + e.response for e in episodes]
    assert sum(text[-1] == PAD for text in texts) > 3
    whole = envs.unwrapped.score_episodes(
        [e.prompt for e in episodes], [e.response for e in episodes]
    )
    own = [own_score(text) for text in texts]
    np.testing.assert_allclose([e.infos[-1]["score"] for e in episodes], own, atol=1e-5)
    np.testing.assert_allclose(whole.score, own, atol=1e-5)
    np.testing.assert_allclose(
        whole.step_rewards, [e.padded(e.rewards, T) for e in episodes], atol=1e-5
    )
    np.testing.assert_allclose(
        whole.token_rewards, [e.infos[-1]["token_rewards"] for e in episodes], atol=1e-5
    )
    total = whole.token_rewards.sum(1)
    if design in PAY_THE_SCORE:
        np.testing.assert_allclose(total, own, atol=1e-4)
    elif design != "worst step":
        np.testing.assert_allclose(
            total, np.array(own) - [own_score(e.prompt) for e in episodes], atol=1e-5
        )
    if design == "delta":
        assert all(e.rewards[-1] == 0 for e in episodes if e.response[-1] == PAD)


def test_pad_tokens_inside_a_text_change_no_score_of_its_beginning():
    """Here the pad id stops nothing; prompts and prefixes may end in it."""
    envs = made("delta", stops=(7,))
    prompts, response = [[5, PAD], [PAD], [5, 6], [5, 6, PAD]], [9, PAD, PAD, 11, PAD, 12, PAD]
    prefixes = [None, None, [8, PAD], [PAD, PAD]]
    envs.reset(seed=0, options={"prompts": prompts, "prefixes": prefixes})
    steps = [envs.step(np.full(4, token)) for token in response[:5]]
    for row, (prompt, prefix) in enumerate(zip(prompts, prefixes, strict=True)):
        start = prompt + (prefix or [])
        texts = [start + response[:t] for t in range(len(response) - len(prefix or []) + 1)][:6]
        expected = [own_score(after) - own_score(before) for before, after in pairwise(texts)]
        np.testing.assert_allclose(
            [reward[row] for _, reward, *_ in steps][: len(expected)], expected, atol=1e-5
        )
    scored = envs.unwrapped.score_episodes(prompts[:2], [response] * 2)
    np.testing.assert_allclose(
        scored.step_rewards[:, :5], np.stack([r[:2] for _, r, *_ in steps], 1), atol=1e-5
    )
    potentials = [[own_score(prompt + response[:t]) for t in range(T)] for prompt in prompts[:2]]
    np.testing.assert_allclose(scored.potentials[:, :T], potentials, atol=1e-5)


def test_saved_and_forked_texts_go_on_from_the_score_that_was_read():
    envs = made("delta", stops=(7,))
    envs.reset(seed=0, options={"prompts": [[5, 6]] * 4, "prefixes": [[9, PAD]] * 4})
    envs.step(np.array([11, PAD, PAD, PAD]))
    saved = envs.unwrapped.save_state()
    envs.unwrapped.fork([1], [0])
    (_, forked, *_), other = envs.step(np.full(4, 12)), made("delta", stops=(7,))
    other.unwrapped.load_state(saved)
    loaded = other.step(np.full(4, 12))[1]
    after, before = own_score([5, 6, 9, PAD, PAD, 12]), own_score([5, 6, 9])
    np.testing.assert_allclose(forked, after - before, atol=1e-5)
    np.testing.assert_allclose(loaded[1:], after - before, atol=1e-5)


def test_credit_is_read_from_the_token_that_the_score_was_read_at():
    pairs = [([5, 6, 8], [10, 11, PAD]), ([5, 6, 8], [10, 11])]
    scorer = tasks.scorer_of("sequence")
    score = score_texts(scorer, pairs)
    attended, alone = bound(Attention(), scorer).place(finished(pairs, [0, 0], score), 9)
    torch.testing.assert_close(attended, alone)
    slopes, alone = bound(Gradient(steps=32), scorer).place(finished(pairs, [0, 0], score), 9)
    torch.testing.assert_close(slopes[0], alone[0], atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(
        slopes[1:].sum(), alone[1:].sum(), atol=1e-5, rtol=1e-3
    )  # the rest is on the last token
    at_pad = last_attention(scorer.model, torch.tensor([pairs[0][0] + pairs[0][1]]), np.array([6]))
    assert at_pad[0, 5] > 0


@pytest.mark.parametrize("pad_token_id", [None, -1, 61, 99])
def test_a_pad_id_that_no_text_holds_is_none(pad_token_id):
    model = fakes.reward_model("sequence")
    model.config.pad_token_id = pad_token_id
    scorer = make_scorer(model)
    assert scorer.pad_token_id is None
    with torch.no_grad():
        own = model(input_ids=torch.tensor([[5, 6, 10, PAD]])).logits[0]
    torch.testing.assert_close(score_texts(scorer, [([5, 6], [10, PAD])]), own)


def test_a_token_scorer_has_none_and_other_models_code_is_asked():
    assert make_scorer(fakes.reward_model("token")).pad_token_id is None

    def reading_at(place):
        model = fakes.reward_model("sequence")
        model.forward = lambda input_ids, **_: SimpleNamespace(
            logits=model.score(model.model(input_ids)[0])[:, place]
        )
        return model

    assert make_scorer(reading_at(-1)).pad_token_id is None  # always the last token
    model = reading_at(-1)
    plain = model.forward
    model.forward = lambda input_ids, **_: (
        plain(input_ids) if input_ids[0, -1] != PAD else reading_at(0).forward(input_ids)
    )
    with pytest.raises(ModelError, match="computes its logits in a way that is not known here"):
        make_scorer(model)


def test_vllm_is_sent_no_padding_where_it_is_told_of_it():
    sent = []

    class Backend:
        def text_scores(self, texts):
            sent.append(texts)
            return [np.array([float(len(text))]) for text in texts]

    for pad_token_id, lengths in ((None, [6, 6, 5, 4, 2, 5]), (PAD, [5, 6, 2, 3, 1, 5])):
        model = VLLMRewardModel(Backend(), per_token=False, pad_token_id=pad_token_id)
        assert model.token_scores(TEXTS, 3).sum(1).tolist() == lengths
