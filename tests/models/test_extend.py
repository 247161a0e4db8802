"""Several tokens behind the texts of some slots: a ragged extension equals single steps and a
reading of the whole text, whatever the other slots hold."""

import warnings

import fakes
import numpy as np
import pytest
import torch
from test_cached_lm import Reads, Schedule, cached

from tokenenv.envs.language.adder import Adder
from tokenenv.errors import InvalidArgument
from tokenenv.models import slot_cache
from tokenenv.models.automaton import Automaton
from tokenenv.models.bigram import Bigram
from tokenenv.models.cached_lm import CachedLM
from tokenenv.models.residual_lm import ResidualLM
from tokenenv.models.slot_cache import KVSlots
from tokenenv.models.trunks import Trunks, extend_slots, text_states
from tokenenv.models.vllm_models import WholeTextsOnly

N, L = 4, 40
EIGHT = ("llama", "gpt2", "qwen2_mixed", "mistral", "gemma3", "phi3_longrope", "gpt_neox", "mamba")
"""Architectures with learned, rotary and length-dependent positions, with one sliding window, with
layers of two kinds, and one that cannot be cached."""


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    monkeypatch.setattr(slot_cache, "BUCKET", 8)


class Extensions(Schedule):
    """A `Schedule` with ragged extensions, of which every state is checked."""

    def extend(self):
        room = np.array([self.lm.max_length - len(text) for text in self.texts])
        able = np.flatnonzero(room)
        slots = self.random.permutation(able)[: self.random.integers(1, N + 1)]
        if not len(slots):
            return
        # Now and then a slot is filled to its last place.
        lengths = np.minimum(self.random.choice([1, 2, 3, 7, L], len(slots)), room[slots])
        tokens = self.ids(len(slots), int(lengths.max()) + self.random.integers(2))
        states = self.lm.extend(slots, torch.from_numpy(tokens), lengths)
        assert states.shape[:2] == tokens.shape
        assert states.isfinite().all()
        for row, slot in enumerate(slots):
            start, length = len(self.texts[slot]), int(lengths[row])
            self.texts[slot] += tokens[row, :length].tolist()
            check(self.lm, states[row, :length], self.texts[slot], start)

    def run(self, steps):
        self.prefill(everyone=True)
        for _ in range(steps):
            getattr(self, self.random.choice(["append", "extend", "extend", "prefill", "fork"]))()
            assert self.lm.positions.tolist() == [len(text) for text in self.texts]


def check(lm, states, text, start):
    """Compare states with those that transformers gives the text alone, without a cache."""
    with torch.no_grad():
        ids = torch.tensor([text], device=lm.device)
        expected = lm.trunk(input_ids=ids, use_cache=False)[0][0, start:]
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", EIGHT)
@pytest.mark.parametrize("max_batch_tokens", [9, 16384])
def test_any_schedule_of_extensions_equals_each_text_alone(name, max_batch_tokens):
    lm = cached(fakes.causal_lm(name), max_batch_tokens=max_batch_tokens)
    assert isinstance(lm._slots, KVSlots) == (name in fakes.CACHED)
    Extensions(lm, 0).run(25)


@pytest.mark.parametrize("name", sorted(set(fakes.ARCHITECTURES) - set(EIGHT)))
def test_the_other_architectures_extend_too(name):
    Extensions(cached(fakes.causal_lm(name)), 1).run(12)


def test_eager_attention_and_compiled_steps_beside_extensions(monkeypatch):
    Extensions(cached(fakes.causal_lm("qwen2_mixed", attn_implementation="eager")), 2).run(20)
    monkeypatch.setattr(torch, "compile", lambda trunk, **_: trunk)
    Extensions(cached(fakes.causal_lm("gemma3"), compile=True), 2).run(20)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", sorted(fakes.CACHED))
def test_extensions_on_cuda_stand_beside_graphs_of_steps(name):
    lm = cached(fakes.causal_lm(name).cuda())
    for seed in range(2):
        Extensions(lm, seed).run(30)
    assert lm._slots.graphs._graphs
    assert not lm._slots.graphs._refused


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_an_extension_on_cuda_never_waits_for_the_device():
    lm = cached(fakes.causal_lm("gemma3").cuda())
    lm.prefill(range(N), torch.ones(N, 3, dtype=torch.int64), [3] * N)
    tokens = torch.ones(2, 5, dtype=torch.int64, device="cuda")
    lm.extend([0, 1], tokens, [2, 3])
    torch.cuda.set_sync_debug_mode("error")
    try:
        lm.extend([2, 0], tokens, [5, 1])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_host_never_reads_a_tensor():
    lm = cached(fakes.causal_lm("gemma3"))
    lm.prefill([0, 2], torch.tensor([[3, 4, 0], [5, 6, 7]]), [2, 3])
    with Reads() as reads:
        lm.extend([2, 0], torch.tensor([[5, 5], [6, 0]]), [2, 1])
    assert reads.seen == []


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "mamba"])
def test_what_other_slots_hold_and_are_given_does_not_matter(name):
    """Slot 1 is given [9, 8, 7]: alone, beside slots that are full at once, and beside others."""
    lm = cached(fakes.causal_lm(name))
    random = np.random.default_rng(0)
    found = []
    for lengths, given in (
        ((1, 4, 1, 1), None),
        ((39, 4, 2, 20), (1, 3, 38, 2)),
        ((9, 4, 9, 9),) * 2,
    ):
        texts = random.integers(0, fakes.VOCAB_SIZE, (N, L))
        texts[1, :4] = [3, 4, 5, 6]
        lm.prefill(range(N), torch.from_numpy(texts), lengths)
        slots = [1] if given is None else [3, 1, 0, 2]
        counts = np.array([3 if given is None or slot == 1 else given[slot] for slot in slots])
        tokens = random.integers(0, fakes.VOCAB_SIZE, (len(slots), int(counts.max())))
        tokens[slots.index(1), :3] = [9, 8, 7]
        found.append(lm.extend(slots, torch.from_numpy(tokens), counts)[slots.index(1), :3])
        found[-1] = torch.cat([found[-1], lm.append(torch.full((N,), 5), np.arange(N) == 1)[[1]]])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
def test_a_row_fills_its_last_place_while_padding_has_none(name):
    lm = cached(fakes.causal_lm(name), num_slots=2, max_length=6)
    lm.prefill([0, 1], torch.tensor([[3, 4, 5, 6, 7], [3, 0, 0, 0, 0]]), [5, 1])
    states = lm.extend([0, 1], torch.tensor([[8, 50, 50, 50, 50], [4, 5, 6, 7, 8]]), [1, 5])
    assert lm.positions.tolist() == [6, 6]
    check(lm, states[0, :1], [3, 4, 5, 6, 7, 8], 5)
    torch.testing.assert_close(states[0, 0], states[1, 4], atol=1e-6, rtol=1e-6)
    # What stands at the last place is the token, and not the padding: a fork reads it.
    lm.positions[0] = 5
    torch.testing.assert_close(
        lm.append(torch.tensor([8, 0]), [True, False])[0], states[0, 0], atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_an_extension_that_fails_leaves_the_texts_as_they_were(name, monkeypatch):
    """The second of two micro-batches fails, after the first one has been stored."""
    lm = cached(fakes.causal_lm(name), max_batch_tokens=4)
    lm.prefill([0, 1, 2], torch.tensor([[3, 4], [5, 6], [7, 0]]), [2, 2, 1])
    before, calls, inner = lm.positions.copy(), [], lm._slots.extend

    def fails(*args):
        calls.append(args)
        return inner(*args) if len(calls) < 2 else 1 / 0

    with monkeypatch.context() as patch:
        patch.setattr(lm._slots, "extend", fails)
        with pytest.raises(ZeroDivisionError):
            lm.extend([0, 1], torch.tensor([[9, 9, 9], [8, 8, 0]]), [3, 2])
    assert len(calls) == 2
    assert (lm.positions == before).all()
    states = lm.extend([0, 2], torch.tensor([[20, 21], [22, 0]]), [2, 1])
    check(lm, states[0], [3, 4, 20, 21], 2)
    check(lm, states[1, :1], [7, 22], 1)


def test_micro_batches_bound_the_new_tokens_of_a_forward(monkeypatch):
    lm = cached(fakes.causal_lm("llama"), max_batch_tokens=12)
    lm.prefill(range(N), torch.zeros(N, 9, dtype=torch.int64), [6, 2, 9, 3])
    sizes, inner = [], lm._slots.extend
    monkeypatch.setattr(
        lm._slots, "extend", lambda *args: sizes.append(args[1].shape) or inner(*args)
    )
    lm.extend([0, 1, 2, 3], torch.zeros(N, 9, dtype=torch.int64), [6, 2, 9, 3])
    assert sizes == [(1, 9), (2, 6), (1, 2)]
    assert lm._slots.write.bucket == 8  # the last group ends at place 4


@pytest.mark.parametrize(
    ("slots", "tokens", "lengths", "message"),
    [
        ([N], [[1]], [1], rf"slots=\[{N}\]; allowed: slots 0..{N - 1}"),
        ([0, 0], [[1], [1]], [1, 1], r"slots=\[0, 0\].*each once"),
        ([0], [[1], [2]], [1], "extend: 1 slots, 2 texts"),
        ([0], [[1]], [0], r"extend: lengths=\[0\]; allowed: one or more, each 1..1"),
        ([0], [[1, 2]], [3], r"lengths=\[3\]; .* 1..2"),
        ([], np.zeros((0, 1)), [], r"lengths=\[\]; allowed: one or more"),
        ([0, 3], [[1], [2]], [1, 1], r"slots \[3\] hold no text; prefill begins one"),
        (
            [0, 1, 2],
            [[1, 2, 3]] * 3,
            [2, 1, 3],
            rf"slots \[0, 2\] would hold more than max_length={L} tokens",
        ),
    ],
)
def test_bad_calls_say_what_is_allowed_and_change_nothing(slots, tokens, lengths, message):
    lm = cached(fakes.causal_lm("llama"))
    lm.prefill([0, 1, 2], torch.ones(3, L, dtype=torch.int64), [L - 1, L - 1, L - 2])
    before = lm.positions.copy()
    with pytest.raises(InvalidArgument, match=message):
        lm.extend(slots, torch.as_tensor(tokens).long(), lengths)
    assert (lm.positions == before).all()


def test_a_model_that_extends_wrongly_is_noticed(monkeypatch):
    model = fakes.causal_lm("llama")
    forward = model.model.layers[0].forward

    def wrong(hidden, **kwargs):
        if kwargs["past_key_values"] is not None and hidden.shape[1] == 2:
            hidden = hidden.flip(1)
        return forward(hidden, **kwargs)

    monkeypatch.setattr(model.model.layers[0], "forward", wrong)
    with pytest.warns(RuntimeWarning, match="cached states differ"):
        lm = CachedLM(model, 2, L)
    assert not isinstance(lm._slots, KVSlots)


def models():
    """Every kind of model of ours, by name, as something that has V = 12 tokens."""
    probs = np.random.default_rng(0).dirichlet(np.ones(12), 13)
    bigram = Bigram(probs)
    transitions = np.random.default_rng(1).integers(0, 5, (5, 12))
    return {
        "transformer": fakes.causal_lm(),
        "bigram": bigram,
        "automaton": Automaton(transitions, np.zeros(5)),
        "adder": Adder(),
        "residual": ResidualLM(bigram),
    }


class NoExtend:
    """Slots of a user's model, which has no `extend`."""

    def __init__(self, slots):
        self.prefill, self.append, self.fork = slots.prefill, slots.append, slots.fork


@pytest.mark.parametrize("by_steps", [False, True])
def test_every_kind_of_model_extends_as_it_reads_whole_texts(by_steps):
    """By its own method, and by the single steps that stand in where a model has none."""
    random = np.random.default_rng(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trunks = Trunks(models().values(), N, 12)
    lengths, slots, counts = np.array([1, 4, 2, 3]), np.array([3, 0, 1]), np.array([2, 5, 1])
    tokens = random.integers(0, 12, (N, 14))
    trunks.prefill(range(N), torch.from_numpy(tokens[:, :4]), lengths, np.arange(N))
    if by_steps:
        trunks._slots = {trunk: NoExtend(slots) for trunk, slots in trunks._slots.items()}
    new = np.zeros((3, 6), dtype=np.int64)
    for row, (slot, count) in enumerate(zip(slots, counts, strict=True)):
        new[row, :count] = tokens[slot, lengths[slot] : lengths[slot] + count]
    found = trunks.extend(slots, torch.from_numpy(new), counts)
    ends = lengths.copy()
    ends[slots] += counts
    after = trunks.append(torch.from_numpy(tokens[np.arange(N), ends]), np.arange(N) != 1)
    for trunk, states in found.items():
        with torch.no_grad():
            whole = text_states(trunk, torch.from_numpy(tokens), ends + 1)
        for row, slot in enumerate(slots):
            expected = whole[slot, lengths[slot] : ends[slot]]
            torch.testing.assert_close(states[row, : counts[row]], expected, atol=1e-5, rtol=1e-5)
        for slot in (0, 2, 3):  # 2 was not extended, and stands where it stood
            torch.testing.assert_close(
                after[trunk][slot], whole[slot, ends[slot]], atol=1e-5, rtol=1e-5
            )


def test_whole_texts_only_means_no_extension():
    with pytest.raises(InvalidArgument, match="on whole texts only"):
        extend_slots(WholeTextsOnly(Adder()), N, [0], torch.tensor([[1]]), [1])
