import fakes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tokenenv.errors import ModelError
from tokenenv.models import batching, heads
from tokenenv.models.batching import hidden_states
from tokenenv.models.heads import in_chunks, lm_head, make_scorer, score_head, token_logprobs

TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.mark.parametrize("name", fakes.ARCHITECTURES)
def test_lm_head_gives_the_models_own_logits(name):
    model = fakes.causal_lm(name)
    states = hidden_states(model.base_model, TOKENS, [6])[0]
    logits = lm_head(model)(states)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, model(TOKENS).logits[0], atol=1e-5, rtol=1e-5)


def test_lm_head_is_float32_whatever_the_model():
    model = fakes.causal_lm("llama").to(torch.bfloat16)
    assert lm_head(model)(torch.zeros(2, 32, dtype=torch.bfloat16)).dtype == torch.float32


def test_lm_head_follows_the_weights():
    model = fakes.causal_lm("llama")
    head, states = lm_head(model), torch.ones(1, 32)
    before = head(states)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    torch.testing.assert_close(head(states), 2 * before)


def test_ids_beyond_a_smaller_model_are_impossible_and_those_of_a_larger_one_are_cut():
    model = fakes.causal_lm("llama")
    states = torch.randn(3, 32)
    logits = lm_head(model)(states)
    wider, narrower = lm_head(model, 70)(states), lm_head(model, 50)(states)
    assert torch.equal(wider[:, :61], logits)
    assert (wider[:, 61:] == -torch.inf).all()
    assert wider.shape == (3, 70)
    assert torch.equal(narrower, logits[:, :50])
    assert token_logprobs(
        states, torch.tensor([60, 61, 69]), lm_head(model, 70)
    ).isinf().tolist() == [False, True, True]


@pytest.fixture
def in_place(monkeypatch):
    """Have oneDNN multiply with every weight, and return the list of its calls."""
    if not heads.HAS_ONEDNN:
        pytest.skip("this torch has no oneDNN")
    calls, product = [], torch.ops.mkldnn._linear_pointwise

    def counted(*args):
        calls.append(args)
        return product(*args)

    monkeypatch.setattr(heads, "LARGE_WEIGHT", 1)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    return calls


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_a_large_weight_is_read_in_place_and_the_product_is_the_same(in_place, bias):
    linear, states = nn.Linear(32, 5000, bias=bias), torch.randn(7, 32)
    found = heads.vocabulary_product(linear, states)
    assert len(in_place) == 1
    assert in_place[0][1] is linear.weight
    torch.testing.assert_close(found, linear(states), atol=1e-5, rtol=1e-5)
    linear.weight.mul_(2)
    torch.testing.assert_close(
        heads.vocabulary_product(linear, states), linear(states), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("what", ["gradients", "a hook", "a subclass", "bfloat16", "autocast"])
def test_other_products_are_the_layers_own(in_place, what):
    class Doubled(nn.Linear):
        def forward(self, states):
            return 2 * super().forward(states)

    linear = (Doubled if what == "a subclass" else nn.Linear)(32, 50)
    states = torch.randn(3, 32)
    if what == "a hook":
        linear.register_forward_hook(lambda module, args, output: output + 1)
    if what == "bfloat16":
        linear, states = linear.bfloat16(), states.bfloat16()
    with torch.set_grad_enabled(what == "gradients"), torch.autocast("cpu", enabled="auto" in what):
        found = heads.vocabulary_product(linear, states)
        assert torch.equal(found, linear(states))
    assert found.requires_grad == (what == "gradients")
    assert not in_place


def test_unknown_logits_are_refused():
    model = fakes.causal_lm("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: output)
    lm_head(model)
    forward = model.forward

    def shifted(**kwargs):
        output = forward(**kwargs)
        output.logits = output.logits + 1e-2
        return output

    model.forward = shifted
    with pytest.raises(ModelError, match=r"LlamaForCausalLM .* logits in a way that is not known"):
        lm_head(model)
    with pytest.raises(
        ModelError, match=r"LlamaModel \(built in memory\) has no language-model head"
    ):
        lm_head(model.base_model)


@pytest.mark.parametrize("name", ["bert_generation", "cpmant", "xlm"])
def test_language_models_that_look_ahead_are_refused(name):
    with pytest.raises(
        ModelError, match=r"\(built in memory\) looks ahead: .*; allowed: causal language models"
    ):
        lm_head(fakes.lm_that_looks_ahead(name))


@pytest.mark.parametrize("method", ["PromptTuningConfig", "PrefixTuningConfig", "LoraConfig"])
@pytest.mark.parametrize("kind", ["language model", "token"])
def test_a_learned_prompt_is_no_part_of_the_trunk_and_an_adapter_is(method, kind):
    peft = pytest.importorskip("peft")
    make, model, task_type = lm_head, fakes.causal_lm("llama"), "CAUSAL_LM"
    if kind == "token":
        make, model, task_type = make_scorer, fakes.reward_model("token"), "TOKEN_CLS"
    options = (
        {"target_modules": ["q_proj"], "init_lora_weights": False}
        if "Lora" in method
        else {"num_virtual_tokens": 3}
    )
    tuned = peft.get_peft_model(model, getattr(peft, method)(task_type=task_type, **options)).eval()
    if "Lora" in method:
        assert make(tuned)
        return
    with pytest.raises(ModelError, match="learned prompts cannot be used, LoRA can"):
        make(tuned)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "qwen3", "mistral"])
@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_scorers_give_the_models_own_scores(architecture, kind):
    model = fakes.reward_model(kind, architecture)
    scorer = make_scorer(model)
    assert scorer.per_token == (kind == "token")
    assert scorer.model is model.base_model
    states = hidden_states(scorer.model, TOKENS, [6])[0]
    scores = scorer.head(states)
    assert scores.shape == (6,)
    expected = model(TOKENS).logits.flatten()
    torch.testing.assert_close(scores[-len(expected) :], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(score_head(model)(states), scores)


def test_scorer_is_deterministic_and_float32_in_half_precision():
    model = fakes.reward_model("token").to(torch.bfloat16)
    head = score_head(model)
    states = torch.randn(4, 32, dtype=torch.bfloat16)
    assert head(states).dtype == torch.float32
    assert torch.equal(head(states), head(states))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: fakes.reward_model("token", num_labels=2),
            "LlamaForTokenClassification .* has 2 labels",
        ),
        (
            lambda: fakes.reward_model("sequence", num_labels=3),
            "has 3 labels; allowed: .* with one label",
        ),
        (lambda: fakes.causal_lm("llama"), "LlamaForCausalLM .* has no scalar head"),
    ],
)
def test_models_without_a_scalar_head_are_refused(model, message):
    with pytest.raises(ModelError, match=message):
        score_head(model())


class Recorder:
    """A linear head that keeps the sizes of the batches it saw."""

    def __init__(self, hidden, vocab):
        self.weight = torch.randn(vocab, hidden, dtype=torch.float64, requires_grad=True)
        self.sizes = []

    def __call__(self, states):
        self.sizes.append(len(states))
        return states @ self.weight.T


@settings(max_examples=60, deadline=None)
@given(
    k=st.integers(1, 40),
    hidden=st.integers(1, 6),
    vocab=st.integers(2, 20),
    chunk=st.integers(1, 45),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    seed=st.integers(0, 99),
)
def test_token_logprobs_and_gradients_equal_log_softmax(k, hidden, vocab, chunk, temperature, seed):
    torch.manual_seed(seed)
    head = Recorder(hidden, vocab)
    states = torch.randn(k, hidden, dtype=torch.float64, requires_grad=True)
    tokens, upstream = torch.randint(0, vocab, (k,)), torch.randn(k, dtype=torch.float64)
    plain = torch.log_softmax(states @ head.weight.T / temperature, -1)[torch.arange(k), tokens]
    expected = torch.autograd.grad(plain @ upstream, [states, head.weight])
    actual = token_logprobs(states, tokens, head, temperature=temperature, chunk=chunk)
    torch.testing.assert_close(actual, plain)
    torch.testing.assert_close(
        torch.autograd.grad(actual @ upstream, [states, head.weight]), expected
    )
    assert max(head.sizes) <= chunk
    assert sum(head.sizes) == 2 * k  # once forward, once again in the backward
    with torch.no_grad():
        torch.testing.assert_close(
            token_logprobs(states, tokens, head, temperature=temperature, chunk=chunk), plain
        )
    assert sum(head.sizes) == 3 * k


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_log_probs_are_the_same_a_few_rows_at_a_time(rows, monkeypatch):
    states, tokens, head = torch.randn(rows, 8), torch.randint(50, (rows,)), nn.Linear(8, 50)
    whole = token_logprobs(states, tokens, head)
    monkeypatch.setattr(batching, "BLOCK_ELEMENTS", 100)
    sizes, logsumexp = [], torch.Tensor.logsumexp
    monkeypatch.setattr(
        torch.Tensor, "logsumexp", lambda x, dim: sizes.append(len(x)) or logsumexp(x, dim)
    )
    assert torch.equal(token_logprobs(states, tokens, head), whole)
    assert sizes == {0: [0], 1: [1], 7: [2, 2, 2, 1]}[rows]


def test_no_tensor_of_all_logits_is_kept_for_the_backward():
    kept = []
    head = torch.nn.Linear(4, 50)
    states = torch.randn(64, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        token_logprobs(states, torch.zeros(64, dtype=torch.int64), head, chunk=8)
    assert max(kept) < 8 * 50


def test_in_chunks_takes_functions_of_several_columns():
    a, b = torch.arange(7.0), torch.arange(7.0) * 2
    assert in_chunks(lambda x, y: torch.stack([x + y, x * y], -1), a, b, chunk=3).tolist() == [
        [3 * i, 2 * i * i] for i in range(7)
    ]
