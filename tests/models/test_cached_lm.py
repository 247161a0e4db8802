import copy
import warnings

import fakes
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tokenenv.errors import InvalidArgument, ModelError
from tokenenv.models import probing, slot_cache
from tokenenv.models.cached_lm import CachedLM, cache_bytes, trunk_of
from tokenenv.models.recompute import TextSlots
from tokenenv.models.slot_cache import KVSlots

L = 40


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    monkeypatch.setattr(slot_cache, "BUCKET", 8)


def cached(model, num_slots=4, max_length=L, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return CachedLM(model, num_slots, max_length, **kwargs)


def alone(lm, text):
    """The state after `text` from transformers itself: one row, no cache, no mask, no positions."""
    with torch.no_grad():
        ids = torch.tensor([text], device=lm.device)
        return lm.trunk(input_ids=ids, use_cache=False)[0][0, -1]


def assert_states(lm, states, texts, rows, atol=1e-5):
    for i, row in enumerate(rows):
        torch.testing.assert_close(states[i], alone(lm, texts[row]), atol=atol, rtol=1e-5)


class Schedule:
    """Random prefills, appends with inactive rows and forks, each checked against the texts kept
    beside them."""

    def __init__(self, lm, seed):
        self.lm = lm
        self.random = np.random.default_rng(seed)
        self.texts = [[] for _ in range(lm.num_slots)]

    def ids(self, *shape):
        return self.random.integers(0, fakes.VOCAB_SIZE, shape)

    def prefill(self, everyone=False):
        n = self.lm.num_slots if everyone else self.random.integers(1, self.lm.num_slots + 1)
        slots = self.random.permutation(self.lm.num_slots)[:n]
        lengths = self.random.integers(1, 24, len(slots))
        tokens = self.ids(len(slots), 24)
        states = self.lm.prefill(slots, torch.from_numpy(tokens), lengths)
        for slot, text, length in zip(slots, tokens, lengths, strict=True):
            self.texts[slot] = text[:length].tolist()
        assert_states(self.lm, states, self.texts, slots)

    def append(self):
        active = self.random.random(self.lm.num_slots) < 0.7
        active &= [len(text) < self.lm.max_length for text in self.texts]
        tokens = self.ids(self.lm.num_slots)
        states = self.lm.append(torch.from_numpy(tokens), active)
        moved = [row for row in range(self.lm.num_slots) if active[row] and self.texts[row]]
        for row in moved:
            self.texts[row].append(int(tokens[row]))
        assert_states(self.lm, states[moved], self.texts, moved)

    def fork(self):
        n = self.random.integers(1, self.lm.num_slots + 1)
        sources, targets = (
            self.ids(n) % self.lm.num_slots,
            self.random.permutation(self.lm.num_slots)[:n],
        )
        self.lm.fork(sources, targets)
        copies = [list(self.texts[source]) for source in sources]
        for target, text in zip(targets, copies, strict=True):
            self.texts[target] = text

    def run(self, steps):
        self.prefill(everyone=self.lm.positions.any())
        for _ in range(steps):
            getattr(self, self.random.choice(["append"] * 12 + ["prefill", "fork"]))()
            assert self.lm.positions.tolist() == [len(text) for text in self.texts]


@pytest.mark.parametrize("name", fakes.ARCHITECTURES)
def test_any_schedule_equals_each_row_alone(name):
    lm = cached(fakes.causal_lm(name), max_batch_tokens=50)
    assert isinstance(lm._slots, KVSlots if name in fakes.CACHED else TextSlots)
    for seed in range(2):
        Schedule(lm, seed).run(25)


class Unrecorded:
    """What graphs are given, run as it is: shapes are those of CUDA, and no device is needed."""

    def __init__(self):
        self.shapes = set()

    def __call__(self, name, forward, *inputs):
        self.shapes.add((name, *(tuple(x.shape) for x in inputs)))
        return forward(*inputs)


@pytest.mark.parametrize("name", sorted(fakes.CACHED))
def test_prompts_padded_to_the_shapes_of_graphs_equal_each_row_alone(name):
    lm = cached(fakes.causal_lm(name))
    lm._slots.graphs = graphs = Unrecorded()
    Schedule(lm, 0).run(30)
    prefills = {tuple(shapes) for kind, *shapes in graphs.shapes if kind == "prefill"}
    assert prefills <= {((rows,), (rows, width)) for rows in (1, 2, 4) for width in (8, 16, 32)}
    assert len(prefills) > 1


def test_a_prompt_is_padded_to_no_more_than_the_slots_hold_and_a_large_one_not_at_all(monkeypatch):
    lm = cached(fakes.causal_lm("llama"), num_slots=3, max_length=24)
    lm._slots.graphs = graphs = Unrecorded()
    text = torch.randint(60, (3, 24))
    states = lm.prefill([0, 1, 2], text, [24, 3, 20])
    assert graphs.shapes == {("prefill", (4,), (4, 24))}
    texts = [text[0].tolist(), text[1, :3].tolist(), text[2, :20].tolist()]
    assert_states(lm, states, texts, range(3))
    monkeypatch.setattr(slot_cache, "RECORDED_TOKENS", 3 * 24 - 1)
    assert_states(lm, lm.prefill([0, 1, 2], text, [24, 3, 20]), texts, range(3))
    assert len(graphs.shapes) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", sorted(fakes.CACHED))
def test_steps_on_cuda_are_graphs_that_see_every_change(name):
    lm = cached(fakes.causal_lm(name).cuda())
    graphs = lm._slots.graphs
    Schedule(lm, 0).run(20)
    assert not graphs._refused
    assert graphs._graphs
    with torch.no_grad():
        for weight in lm.trunk.parameters():  # trained in place
            weight.mul_(0.9)
    Schedule(lm, 1).run(10)
    for weight in lm.trunk.parameters():  # moved, and something else put in its place
        weight.data, old = 0.9 * weight.data, weight.data
        old.zero_()
    Schedule(lm, 2).run(10)
    with torch.autocast("cuda", torch.bfloat16):
        lm.prefill([0], torch.tensor([[3, 4]]), [2])
        rough = lm.append(torch.full((4,), 5))[0]
    lm.prefill([0], torch.tensor([[3, 4]]), [2])
    fine = lm.append(torch.full((4,), 5))[0]
    assert 0 < (rough.float() - fine).norm() < 0.1 * fine.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_graph_is_not_replayed_when_an_adapter_is_switched_off():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(fakes.causal_lm("llama").cuda(), config)
    lm = cached(model)
    Schedule(lm, 0).run(10)
    with model.disable_adapter():
        Schedule(lm, 1).run(10)
    Schedule(lm, 2).run(10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_model_that_waits_for_the_device_is_stepped_without_graphs(caplog):
    model = fakes.causal_lm("llama").cuda()
    model.model.norm.register_forward_hook(
        lambda module, args, out: out * out.abs().max().item() ** 0
    )
    lm = cached(model)
    Schedule(lm, 0).run(10)
    assert lm._slots.graphs._refused
    assert "cannot be recorded as a CUDA graph" in caplog.text


def test_eager_attention_equals_each_row_alone():
    lm = cached(fakes.causal_lm("qwen2_mixed", attn_implementation="eager"))
    assert lm.trunk.config._attn_implementation == "eager"
    Schedule(lm, 0).run(40)


def test_a_kernel_without_4d_masks_is_left_for_sdpa_when_acting():
    def kernel(module, query, key, value, attention_mask, **kwargs):
        assert attention_mask is None, "takes no masks"
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)

    AttentionInterface.register("maskless", kernel)
    lm = CachedLM(fakes.causal_lm("llama", attn_implementation="maskless"), 4, L)
    assert isinstance(lm._slots, KVSlots)
    Schedule(lm, 0).run(10)  # compared with the kernel's own forward
    assert lm.trunk.config._attn_implementation == "maskless"


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_rows_fill_to_the_last_place_and_no_further(name):
    lm = cached(fakes.causal_lm(name), num_slots=2, max_length=6)
    text = [3, 4, 5, 6, 7, 8]
    lm.prefill([0, 1], torch.tensor([text, text]), [6, 3])
    before = lm.positions.copy()
    with pytest.raises(InvalidArgument, match=r"slots \[0\] already hold max_length=6"):
        lm.append(torch.tensor([9, 9]))
    assert (lm.positions == before).all()
    for token in (9, 10, 11):
        states = lm.append(torch.tensor([50, token]), [False, True])
    torch.testing.assert_close(states[1], alone(lm, [3, 4, 5, 9, 10, 11]), atol=1e-5, rtol=1e-5)
    assert lm.positions.tolist() == [6, 6]


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_rows_never_prefilled_stay_empty_and_harmless(name):
    lm = cached(fakes.causal_lm(name), num_slots=3, max_length=5)
    lm.append(torch.tensor([1, 2, 3]))
    lm.prefill([1], torch.tensor([[7, 8]]), [2])
    for token in (4, 5, 6):
        states = lm.append(torch.tensor([-1, token, 10_000]))
    assert states.shape == (3, 32)
    assert lm.positions.tolist() == [0, 5, 0]
    torch.testing.assert_close(states[1], alone(lm, [7, 8, 4, 5, 6]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_fork_reads_every_source_before_it_writes(name):
    lm = cached(fakes.causal_lm(name), num_slots=3)
    texts = [[3, 4, 5], [6, 7], [8]]
    lm.prefill([0, 1, 2], torch.tensor([[3, 4, 5], [6, 7, 0], [8, 0, 0]]), [3, 2, 1])
    lm.fork([0, 1, 2], [1, 2, 0])
    assert lm.positions.tolist() == [1, 3, 2]
    states = lm.append(torch.tensor([9, 9, 9]))
    for row, source in ((1, 0), (2, 1), (0, 2)):
        torch.testing.assert_close(
            states[row], alone(lm, [*texts[source], 9]), atol=1e-5, rtol=1e-5
        )


def test_prefill_keeps_the_order_of_slots_across_micro_batches():
    lm = cached(fakes.causal_lm("llama"), max_batch_tokens=7)
    texts = {3: [5, 6], 1: [7, 8, 9, 10], 2: [11]}
    tokens = torch.tensor([[5, 6, 0, 0], [7, 8, 9, 10], [11, 0, 0, 0]])
    states = lm.prefill([3, 1, 2], tokens, [2, 4, 1])
    assert_states(lm, states, texts, [3, 1, 2])


def test_micro_batches_bound_the_size_of_each_forward(monkeypatch):
    lm = cached(fakes.causal_lm("llama"), max_batch_tokens=12)
    sizes = []
    inner = lm._slots.prefill
    monkeypatch.setattr(
        lm._slots,
        "prefill",
        lambda slots, tokens: sizes.append(tokens.shape) or inner(slots, tokens),
    )
    lm.prefill([0, 1, 2, 3], torch.zeros(4, 9, dtype=torch.int64), [6, 2, 9, 3])
    assert sizes == [(1, 9), (2, 6), (1, 2)]


def test_append_returns_a_tensor_of_its_own():
    lm = cached(fakes.causal_lm("llama"), num_slots=2)
    lm.prefill([0, 1], torch.tensor([[3], [4]]), [1, 1])
    first = lm.append(torch.tensor([5, 6]))
    kept = first.clone()
    lm.append(torch.tensor([7, 8]))
    assert torch.equal(first, kept)


def test_keys_are_read_up_to_the_longest_active_row(monkeypatch):
    lm = cached(fakes.causal_lm("llama"), num_slots=2)
    lm.prefill([0, 1], torch.zeros(2, 30, dtype=torch.int64), [30, 3])
    lm.append(torch.tensor([3, 3]), [False, True])
    assert lm._slots.write.bucket == 8
    lm.append(torch.tensor([3, 3]))
    assert lm._slots.write.bucket == 32
    lm.prefill([0, 1], torch.zeros(2, 39, dtype=torch.int64), [39, 1])
    lm.append(torch.tensor([3, 3]))
    assert lm._slots.write.bucket == L


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("mamba", "linear_attention"),
        ("bloom", "too many values"),
        ("llama", "cached states differ"),
    ],
)
def test_a_model_that_cannot_be_cached_warns_once_and_works(name, error, monkeypatch):
    model = fakes.causal_lm(name)
    if name == "llama":  # a model that ignores the positions it is given
        forward = type(model.model.rotary_emb).forward
        monkeypatch.setattr(
            model.model.rotary_emb,
            "forward",
            lambda x, position_ids: forward(
                model.model.rotary_emb, x, torch.arange(x.shape[1])[None]
            ),
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lm = CachedLM(model, 4, L)
        Schedule(lm, 0).run(20)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message.startswith(f"{type(lm.trunk).__name__} cannot be cached per slot (")
    assert error in message
    assert "n*n/2 token forwards instead of n" in message
    assert caught[0].filename == __file__


def test_a_wrong_sliding_window_is_noticed():
    model = fakes.causal_lm("mistral", sliding_window=20)
    windows = slot_cache.attention_windows(model.config, L)
    assert windows == {"sliding_attention": 20}
    assert probing.why_uncached(model.model, L) is None
    original, slot_cache.attention_windows = (
        slot_cache.attention_windows,
        lambda *_: {"sliding_attention": 21},
    )
    try:
        assert "differ" in probing.why_uncached(model.model, L)
    finally:
        slot_cache.attention_windows = original


@pytest.mark.parametrize(("max_length", "rows"), [(256, KVSlots), (300, TextSlots)])
def test_a_window_that_is_not_in_the_config_is_noticed_beside_a_full_row(max_length, rows):
    lm = cached(
        fakes.causal_lm("gpt_neo", window_size=256, max_position_embeddings=512), 2, max_length
    )
    assert isinstance(lm._slots, rows)
    texts = np.random.default_rng(0).integers(0, fakes.VOCAB_SIZE, (2, max_length)).tolist()
    lm.prefill([0, 1], torch.tensor(texts), [max_length - 1, 5])
    states = lm.append(torch.tensor([7, 8]))
    assert_states(lm, states, [[*texts[0][:-1], 7], [*texts[1][:5], 8]], [0, 1])


@pytest.mark.parametrize("architecture", ["llava", "gemma3"])
def test_models_that_see_are_cached_by_their_language_model(architecture):
    lm = CachedLM(fakes.seeing_lm(architecture), 4, L)
    assert isinstance(lm._slots, KVSlots)
    Schedule(lm, 0).run(20)


def test_what_was_tried_out_is_tried_once_for_a_model_and_its_copies(monkeypatch):
    tried = []
    original = probing.why_uncached
    monkeypatch.setattr(
        probing,
        "why_uncached",
        lambda trunk, length: tried.append(length) or original(trunk, length),
    )
    model = fakes.causal_lm("bloom")
    for length in (20, 20, 30):
        assert isinstance(cached(model, 2, length)._slots, TextSlots)
        model = copy.deepcopy(model)
    assert tried == [20, 30]


def test_a_long_trial_is_announced(monkeypatch, caplog):
    monkeypatch.setattr(probing, "LONG", 32)
    cached(fakes.causal_lm("llama"), 2, 31)
    assert caplog.messages == []
    cached(fakes.causal_lm("llama"), 2, 32)
    assert caplog.messages == [
        "trying out a cache reads a text of 32 tokens twice, once with a mask of 0 MiB: LlamaModel"
    ]


def test_a_text_of_any_length_is_tried_out_in_little_time(monkeypatch):
    monkeypatch.setattr(probing, "LONG", 8)
    monkeypatch.setattr(probing, "BEHIND", 4)
    read, original = [], probing._probe
    monkeypatch.setattr(
        probing, "_probe", lambda trunk, length: read.append(length) or original(trunk, length)
    )
    assert isinstance(cached(fakes.causal_lm("llama"), 2, 100_000)._slots, slot_cache.KVSlots)
    cached(fakes.causal_lm("llama"), 2, 10)
    model = fakes.causal_lm("llama")
    model.config.sliding_window = 20
    cached(model, 2, 100_000)
    assert read == [12, 10, 24]


def test_windows_that_differ_give_one_mask_each_and_equal_ones_a_single_mask():
    def windows(name, max_length=L):
        return slot_cache.attention_windows(fakes.config(name), max_length)

    assert windows("gemma3") == {"full_attention": L, "sliding_attention": 5}
    assert list(windows("llama").values()) == [L]
    assert list(windows("qwen2_sliding").values()) == [5]
    assert list(windows("gemma3", 5).values()) == [5]  # no row outgrows the window
    with pytest.raises(slot_cache.Uncacheable, match="chunked_attention"):
        slot_cache.attention_windows(
            fakes.config("qwen3", layer_types=["chunked_attention", "full_attention"]), L
        )


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_construction_leaves_no_trace(name):
    model = fakes.causal_lm(name)
    model.train()
    model.get_input_embeddings().eval()
    model.get_input_embeddings().weight.requires_grad_(True)
    modes = [module.training for module in model.modules()]
    weights = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    lm = cached(model)
    lm.prefill([0], torch.tensor([[3, 4]]), [2])
    lm.append(torch.tensor([5, 5, 5, 5]))
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight
    ]
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_acting_ignores_training_mode_and_gradients():
    model = fakes.causal_lm("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).requires_grad_(True)
    lm = cached(model)
    expected = alone(lm, [3, 4, 5])
    model.train()
    lm.prefill([0], torch.tensor([[3, 4]]), [2])
    state = lm.append(torch.tensor([5, 0, 0, 0]))[0]
    assert model.training
    assert not state.requires_grad
    torch.testing.assert_close(state, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.* is deprecated")
def test_gradient_checkpointing_does_not_lose_the_cache():
    model = fakes.causal_lm("llama")
    lm = cached(model)
    model.gradient_checkpointing_enable()
    model.train()
    Schedule(lm, 0).run(5)


def test_states_follow_the_ambient_grad_mode():
    lm = cached(fakes.causal_lm("llama").requires_grad_(True))
    tokens = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]])
    states = lm.states(tokens, [4, 2])
    assert states.shape == (2, 4, 32)
    states[1, 1].sum().backward()
    assert lm.trunk.embed_tokens.weight.grad[[7, 8]].abs().sum() > 0
    assert lm.trunk.embed_tokens.weight.grad[[0, 3, 4]].abs().sum() == 0
    with torch.no_grad():
        assert not lm.states(tokens, [4, 2]).requires_grad
    torch.testing.assert_close(states[1, 1].detach(), alone(lm, [7, 8]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama_mha", "gemma3", "gpt2", "mamba", "bloom"])
def test_memory_is_known_before_it_is_taken(name):
    model = fakes.causal_lm(name)
    assert cache_bytes(model, 4, L) == cached(model).cache_bytes
    if name == "llama":  # layers * (keys + values) * rows * places * heads * size * float32
        assert cache_bytes(model, 4, L) == 2 * 2 * 4 * L * 2 * 8 * 4


def test_half_precision_is_cached():
    lm = cached(fakes.causal_lm("llama").to(torch.bfloat16))
    assert isinstance(lm._slots, KVSlots)
    assert lm.dtype == torch.bfloat16
    assert lm.prefill([0], torch.tensor([[3, 4]]), [2]).dtype == torch.bfloat16
    assert lm.cache_bytes == 2 * 2 * 4 * L * 2 * 8 * 2


def test_a_head_or_a_peft_model_gives_its_trunk():
    peft = pytest.importorskip("peft")
    model = fakes.causal_lm("llama")
    base = model.model
    assert trunk_of(model) is base
    assert trunk_of(base) is base
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert trunk_of(adapted) is base
    Schedule(CachedLM(adapted, 3, L), 0).run(10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: CachedLM(m, 0, L), "num_slots=0 must be at least 1"),
        (lambda m: CachedLM(m, 2, 0), "max_length=0 must be at least 1"),
        (lambda m: CachedLM(m, 2, L, max_batch_tokens=0), "max_batch_tokens=0"),
        (
            lambda m: CachedLM(m, 2, L).prefill([2], torch.tensor([[1]]), [1]),
            r"slots=\[2\]; allowed: slots 0..1",
        ),
        (
            lambda m: CachedLM(m, 2, L).prefill([0, 0], torch.tensor([[1], [1]]), [1, 1]),
            r"slots=\[0, 0\].*each once",
        ),
        (
            lambda m: CachedLM(m, 2, L).prefill([0], torch.tensor([[1]]), [0]),
            r"lengths=\[0\]; allowed: .* 1..1",
        ),
        (
            lambda m: CachedLM(m, 2, L).prefill([0], torch.ones(1, 50).long(), [41]),
            r"lengths=\[41\]; .* 1..40",
        ),
        (
            lambda m: CachedLM(m, 2, L).prefill([0], torch.tensor([[1], [2]]), [1]),
            "1 slots, 2 texts",
        ),
        (
            lambda m: CachedLM(m, 2, L).append(torch.tensor([1])),
            r"tokens of shape \(1,\); allowed: \(2,\)",
        ),
        (
            lambda m: CachedLM(m, 2, L).append(torch.tensor([1, 1]), [True]),
            r"active of shape \(1,\); allowed: \(2,\)",
        ),
        (lambda m: CachedLM(m, 2, L).fork([0, 1], [1, 1]), r"targets=\[1, 1\]"),
        (lambda m: CachedLM(m, 2, L).fork([0, 1], [1]), "2 sources and 1 targets"),
    ],
)
def test_bad_calls_say_what_is_allowed(call, message):
    with pytest.raises(InvalidArgument, match=message):
        call(fakes.causal_lm("llama"))


@pytest.mark.parametrize(("name", "trunk"), [("gpt2", "GPT2Model"), ("opt", "OPTModel")])
def test_learned_positions_bound_the_length(name, trunk):
    """OPT's table begins with two rows that no position uses."""
    assert isinstance(cached(fakes.causal_lm(name), 1, 64)._slots, KVSlots)
    with pytest.raises(ModelError, match=f"max_length=65: {trunk} has 64 positions"):
        CachedLM(fakes.causal_lm(name), 1, 65)


def test_very_short_capacities_are_cached():
    for max_length in (1, 2, 3):
        lm = cached(fakes.causal_lm("llama"), num_slots=1, max_length=max_length)
        assert isinstance(lm._slots, KVSlots)
        states = lm.prefill([0], torch.tensor([[3]]), [1])
        for _ in range(max_length - 1):
            states = lm.append(torch.tensor([3]))
        torch.testing.assert_close(states[0], alone(lm, [3] * max_length), atol=1e-5, rtol=1e-5)


class Reads(TorchDispatchMode):
    """Collects the operations by which the host reads a tensor's value, and so waits for the
    device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(
            name in str(func)
            for name in ("_local_scalar_dense", "nonzero", "equal.", "unique", "masked_select")
        ):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", fakes.CACHED)
def test_the_host_never_reads_a_tensor(name):
    lm = cached(fakes.causal_lm(name))
    with Reads() as reads:
        lm.prefill([0, 2], torch.tensor([[3, 4, 0], [5, 6, 7]]), [2, 3])
        lm.append(torch.tensor([5, 5, 5, 5]), [True, False, True, True])
        lm.fork([0, 2], [2, 3])
    assert reads.seen == []


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")
@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("llama", {"num_hidden_layers": 1}),
        ("qwen2_mixed", {"num_hidden_layers": 2, "layer_types": fakes.MIXED[:2]}),
    ],
)
def test_a_compiled_step_equals_each_row_alone_with_one_graph_per_bucket(name, layers, monkeypatch):
    graphs = []
    compile = torch.compile

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda trunk, **kwargs: compile(trunk, backend=counting, **kwargs)
    )
    torch._dynamo.reset()
    lm = cached(fakes.causal_lm(name, **layers), max_length=24, compile=True)
    lm.prefill([0, 1, 2, 3], torch.tensor([[3, 4], [5, 0], [6, 0], [7, 0]]), [2, 1, 1, 1])
    for token in range(22):
        states = lm.append(torch.full((4,), token))
    torch.testing.assert_close(states[0], alone(lm, [3, 4, *range(22)]), atol=1e-5, rtol=1e-5)
    assert len(graphs) == 3  # of 8, 16 and all 24 places
    Schedule(lm, 0).run(20)
    assert len(graphs) == 3
    assert torch._dynamo.config.recompile_limit >= slot_cache.MAX_GRAPHS
