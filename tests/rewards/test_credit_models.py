"""Credit read inside the reward model, against hand-made forwards of one text: attention and
integrated gradients."""

import warnings
from types import SimpleNamespace
from typing import Any

import credit
import fakes
import numpy as np
import pytest
import torch
from credit import T, bound, close, finished, placed, smooth
from torch import nn

from tokenenv.errors import ModelError
from tokenenv.models.heads import make_scorer
from tokenenv.models.prefix_scores import score_texts
from tokenenv.rewards.attention import Attention, eager_attention, last_attention, shares
from tokenenv.rewards.gradient import Gradient, quadrature
from tokenenv.types import Scorer

PAIRS, UNPAID = credit.texts()
ATTENDING = (
    "llama",
    "gpt2",
    "gpt_neox",
    "qwen2_mixed",
    "qwen2_sliding",
    "gemma2",
    "gemma3",
    "granite",
    "bloom",
)


def summing(trunk: Any, seed: int = 3) -> Scorer:
    """A linear token scorer on any trunk."""
    weight = torch.randn(
        trunk.config.get_text_config().hidden_size, generator=torch.Generator().manual_seed(seed)
    )
    return Scorer(trunk, lambda states: states.float() @ weight, per_token=True)


@pytest.mark.parametrize("architecture", ATTENDING)
def test_attention_shares_the_score_as_the_last_token_attends(architecture):
    model = fakes.causal_lm(architecture)
    model.set_attn_implementation("sdpa") if model._supports_sdpa else None
    before = model.config._attn_implementation
    scorer = summing(model.base_model)
    rewards = placed(Attention(), scorer, PAIRS, UNPAID)
    assert model.config._attn_implementation == before
    eager = fakes.causal_lm(architecture, attn_implementation="eager").base_model
    for row, ((prompt, response), prefix_length) in enumerate(zip(PAIRS, UNPAID, strict=True)):
        text = torch.tensor([prompt + response])
        weights = (
            eager(text, output_attentions=True).attentions[-1][0].mean(0)[-1, len(prompt) :].numpy()
        )
        weights[:prefix_length] = 0
        score = float(score_texts(scorer, [(prompt, response)]))
        close(rewards[row, : len(response)], score * weights / weights.sum())
        assert (rewards[row, len(response) :] == 0).all()


def test_a_sliding_window_ends_credit_before_it():
    rewards = placed(
        Attention(), summing(fakes.causal_lm("qwen2_sliding").base_model), PAIRS, UNPAID
    )
    assert (rewards[0] != 0).tolist() == [False] * 4 + [True] * 5


def test_texts_to_which_nothing_attends_are_paid_in_equal_shares():
    own = torch.tensor([[0.0, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    weights = torch.tensor([[0.0, 0, 0, 0], [0, 3, 1, 0], [0, 0, 0, 0]])
    close(shares(weights, own), [[0, 0.5, 0.5, 0], [0, 0.75, 0.25, 0], [1, 0, 0, 0]])


def test_the_chosen_attention_comes_back_after_an_error():
    trunk = fakes.causal_lm().base_model

    def fail(module, args):
        assert trunk.config._attn_implementation == "eager"
        raise RuntimeError("out of memory")

    trunk.layers[1].register_forward_pre_hook(fail)
    for chosen in ("sdpa", "flash_attention_2"):
        trunk.config._attn_implementation = chosen
        with pytest.raises(RuntimeError, match="out of memory"):
            last_attention(trunk, torch.ones(1, 3, dtype=torch.int64), np.array([3]))
        assert trunk.config._attn_implementation == chosen
    assert not any(module._forward_hooks for module in trunk.layers[0].mlp.modules())


def test_parts_of_a_model_keep_their_own_attention():
    whole, part = (nn.Module() for _ in range(2))
    whole.config, part.config = (
        SimpleNamespace(_attn_implementation="sdpa"),
        SimpleNamespace(_attn_implementation="flex"),
    )
    whole.part = part
    with eager_attention(whole):
        assert part.config._attn_implementation == whole.config._attn_implementation == "eager"
    assert (whole.config._attn_implementation, part.config._attn_implementation) == ("sdpa", "flex")


def test_a_model_without_attention_is_refused():
    with pytest.raises(ModelError, match="MambaModel gives no attention weights"):
        bound(Attention(), summing(fakes.causal_lm("mamba").base_model))


def by_hand(
    scorer: Scorer, prompt: list[int], response: list[int], prefix_length: int, steps: int
) -> tuple[np.ndarray, float]:
    """The attributions (T,) of one text and the score of its zero embeddings, the response's
    embeddings being scaled where the model makes them."""
    text_L, start = torch.tensor(prompt + response), len(prompt) + prefix_length
    made: dict[str, torch.Tensor] = {}

    def scale(module, args, output):
        made["plain"] = output.detach()
        made["scaled"] = (
            torch.cat([output[:, :start], output[:, start:] * made["at"][:, None, None]], 1)
            .detach()
            .requires_grad_()
        )
        return made["scaled"]

    def score_at(points_S):
        """The sum of the text's scores at each share of its embeddings."""
        made["at"] = points_S
        states = scorer.model(input_ids=text_L.expand(len(points_S), -1))[0]
        return scorer.head(states[:, len(prompt) if scorer.per_token else -1 :]).sum()

    handle, out = scorer.model.get_input_embeddings().register_forward_hook(scale), np.zeros(T)
    points_S, weights_S = (torch.as_tensor(each, dtype=torch.float32) for each in quadrature(steps))
    score_at(points_S).backward()
    products_SL = (made["scaled"].grad * made["plain"]).sum(-1)
    out[prefix_length : len(response)] = (weights_S @ products_SL[:, start:]).numpy()
    baseline = float(score_at(torch.zeros(1)).detach())
    handle.remove()
    return out, baseline


@pytest.mark.parametrize(
    "architecture", ["llama", "gpt2", "gemma2", "gemma3", "granite", "bloom", "mamba"]
)
@pytest.mark.parametrize("per_token", [True, False])
def test_gradient_equals_one_texts_own_autograd(architecture, per_token):
    # Norms with a large epsilon: near zero embeddings the usual ones blow rounding up a
    # thousandfold.
    epsilon = {
        "layer_norm_epsilon" if architecture in ("gpt2", "bloom", "mamba") else "rms_norm_eps": 1.0
    }
    linear = summing(fakes.causal_lm(architecture, **epsilon).base_model)
    scorer = Scorer(linear.model, linear.head, per_token)
    rewards = placed(Gradient(steps=3, tolerance=1e9), scorer, PAIRS, UNPAID)
    score = score_texts(scorer, PAIRS)
    for row, ((prompt, response), prefix_length) in enumerate(zip(PAIRS, UNPAID, strict=True)):
        expected, _ = by_hand(scorer, prompt, response, prefix_length, steps=3)
        size = np.abs(expected).sum()
        expected[len(response) - 1] += float(score[row]) - expected.sum()
        np.testing.assert_allclose(rewards[row], expected, rtol=0, atol=2e-5 * size)


@pytest.mark.parametrize(
    "make", [smooth, lambda kind: make_scorer(fakes.reward_model(kind, rms_norm_eps=1.0))]
)
@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_attributions_add_up_to_the_score_less_the_baselines(make, kind):
    """So the last token is paid, besides its own attribution, the score of the zero embeddings."""
    scorer = make(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rewards = placed(Gradient(tolerance=1e-4), scorer, PAIRS, UNPAID).numpy()
    for row, ((prompt, response), prefix_length) in enumerate(zip(PAIRS, UNPAID, strict=True)):
        expected, baseline = by_hand(scorer, prompt, response, prefix_length, steps=200)
        expected[len(response) - 1] += baseline
        np.testing.assert_allclose(
            rewards[row], expected, rtol=0, atol=1e-3 * np.abs(rewards[row]).sum()
        )


class Embeddings(nn.Module):
    """A trunk whose states are the input embeddings, whatever comes before or after."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, uses_ids: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(fakes.VOCAB_SIZE, 4)
        self.base_model = self
        self.config = SimpleNamespace(
            get_text_config=lambda: SimpleNamespace(vocab_size=fakes.VOCAB_SIZE, hidden_size=4)
        )
        self.uses_ids = uses_ids

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids=None, inputs_embeds=None, use_cache=None):
        states = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        return (states + 1.0 if self.uses_ids and input_ids is not None else states,)


@pytest.mark.parametrize("steps", [1, 2, 3, 16])
def test_a_constant_is_integrated_exactly_and_what_is_steep_near_zero_well(steps):
    points, weights = quadrature(steps)
    assert weights.sum() == pytest.approx(1, abs=1e-6)
    if steps == 16:
        assert (weights * 1e-3 / (points + 1e-3) ** 2).sum() == pytest.approx(1 / 1.001, rel=0.01)


def test_a_score_linear_in_the_embeddings_is_shared_exactly_by_one_point():
    scorer = summing(Embeddings().requires_grad_(False))
    rewards = placed(Gradient(steps=1), scorer, PAIRS, UNPAID)
    own = [
        scorer.head(scorer.model.embed(torch.tensor(response))).tolist()
        + [0.0] * (T - len(response))
        for _, response in PAIRS
    ]
    for row, prefix_length in enumerate(
        UNPAID
    ):  # what the prefix scored is the baseline's, and goes to the last token
        own[row][len(PAIRS[row][1]) - 1] += sum(own[row][:prefix_length])
        own[row][:prefix_length] = [0.0] * prefix_length
    close(rewards, own)


def test_a_trunk_that_reads_more_than_embeddings_is_refused():
    with pytest.raises(
        ModelError, match="Embeddings reads tokens other than by their input embeddings"
    ):
        bound(Gradient(), summing(Embeddings(uses_ids=True)))


def test_points_are_doubled_where_they_miss_the_sum_and_only_there(recwarn):
    """A steep score needs 16 points, a flat one 4."""
    trunk = Embeddings().requires_grad_(False)
    trunk.embed.weight[:] = 0.0
    trunk.embed.weight[10] = 1.0
    scorer = Scorer(trunk, lambda states: states.sum(-1) ** 12, per_token=True)
    steep, flat = ([5], [10, 10]), ([5], [6, 7])
    texts = finished([steep, flat], [0, 0], score_texts(scorer, [steep, flat]))
    term = bound(Gradient(steps=4, tolerance=1e-4), scorer, max_batch_tokens=1000)
    rows: list[int] = []
    trunk.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(next(iter(kwargs.values())))), with_kwargs=True
    )
    close(term.place(texts, T).sum(1), texts.score)
    assert rows == [2, 2 * 4, 1 * 8, 1 * 16]  # the baselines, then the points of those that miss
    assert not recwarn.list


def test_a_sum_that_stays_wrong_is_warned_of_once_and_paid_on_the_last_token():
    scorer = make_scorer(fakes.reward_model("token"))
    texts = finished(PAIRS, UNPAID, score_texts(scorer, PAIRS))
    term = bound(Gradient(steps=1, tolerance=1e-6), scorer)
    with pytest.warns(
        RuntimeWarning,
        match=r"with 8 points the attributions of 7 text\(s\) miss their sum by up to .*%",
    ):
        rewards = term.place(texts, T)
    close(rewards.sum(1), texts.score)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        term.place(texts, T)


def test_a_caller_may_step_in_inference_mode():
    scorer = smooth("token")
    term, texts = bound(Gradient(), scorer), finished(PAIRS, UNPAID, score_texts(scorer, PAIRS))
    with torch.inference_mode():
        inside = term.place(finished(PAIRS, UNPAID, score_texts(scorer, PAIRS)), T)
    close(inside, term.place(texts, T))
