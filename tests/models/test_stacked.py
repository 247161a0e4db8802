"""Models that are one base and adapters of their own: one forward a token, and the same states."""

import copy
import pickle

import fakes
import numpy as np
import pytest
import torch

from tokenenv.models.adapters import adapter_layers, with_lora
from tokenenv.models.cached_lm import CachedLM, trunk_of
from tokenenv.models.stacked import Stack, share_base
from tokenenv.models.trunks import Trunks, text_states

pytest.importorskip("peft")

N, L = 3, 20
EIGHT = (
    "llama",
    "gpt2",
    "qwen2_mixed",
    "mistral",
    "gemma3",
    "phi3_longrope",
    "gpt_neox",
    "granite",
)


def stirred(model, seed):
    """The model, with adapters that add something; at first they do not."""
    torch.manual_seed(seed)
    for layer in adapter_layers(model):
        for up in layer.lora_B.values():
            torch.nn.init.normal_(up.weight, std=0.3)
    return model


def adapted(base, seed=1):
    return stirred(with_lora(base, 2, seed), seed)


def spoilt(model, change):
    """An adapted copy of a model with one difference."""
    made = adapted(model)
    change(made)
    return made


class Rows:
    """What N texts should be: lists of ids, read without a cache by each model."""

    def __init__(self, seed=0):
        self.random = np.random.default_rng(seed)
        self.texts = [[] for _ in range(N)]

    def ids(self, count):
        return self.random.integers(3, fakes.VOCAB_SIZE, count).tolist()

    def state(self, model, slot):
        ids = torch.tensor([self.texts[slot]])
        with torch.no_grad():
            return text_states(model, ids, [ids.shape[1]])[0, -1]

    def check(self, model, states, slots):
        for slot in slots:
            torch.testing.assert_close(states[slot], self.state(model, slot), atol=1e-5, rtol=1e-5)


@pytest.fixture
def forwards(monkeypatch):
    """The rows of every cached forward of one token, from now on."""
    from tokenenv.models.slot_cache import KVSlots

    rows, step = [], KVSlots._step

    def counted(self, tokens, *args, **kwargs):
        rows.append(len(tokens))
        return step(self, tokens, *args, **kwargs)

    monkeypatch.setattr(KVSlots, "_step", counted)
    return rows


@pytest.mark.parametrize("name", EIGHT)
def test_reference_and_adapters_step_in_one_forward(name, forwards):
    base = fakes.causal_lm(name)
    models = [base, adapted(base, 1), adapted(base, 2)]
    trunks, rows = Trunks(models, N, L), Rows()
    rows.texts = [rows.ids(n) for n in (2, 4, 3)]
    padded = torch.zeros(N, 4, dtype=torch.int64)
    for line, text in zip(padded, rows.texts, strict=True):
        line[: len(text)] = torch.tensor(text)
    trunks.prefill(range(N), padded, [2, 4, 3], np.arange(N))
    forwards.clear()
    for step in range(6):
        if step == 3:
            trunks.fork([0], [2])
            rows.texts[2] = list(rows.texts[0])
            trunks.extend([1], torch.tensor([[5, 9]]), [2])
            rows.texts[1] += [5, 9]
        tokens, active = rows.ids(N), np.array([True, step % 2 == 0, True])
        states = trunks.append(torch.tensor(tokens), active)
        for slot in np.flatnonzero(active):
            rows.texts[slot].append(tokens[slot])
        for model in models:
            rows.check(model, states[trunk_of(model)], np.flatnonzero(active))
    assert forwards == [3 * N] * 6
    apart = [rows.state(model, 0) for model in models]
    assert (apart[0] - apart[1]).abs().max() > 0.1 < (apart[1] - apart[2]).abs().max()


def test_a_base_in_half_precision_is_rounded_once_as_by_peft():
    base, tokens = fakes.causal_lm().to(torch.bfloat16), torch.tensor([5, 6, 7])
    model = adapted(base)
    assert {w.dtype for w in model.parameters()} == {torch.bfloat16, torch.float32}
    trunks, alone = Trunks([base, model], N, L), CachedLM(model, N, L)
    assert len(trunks._stacks) == 1
    trunks.prefill(range(N), tokens[:, None], [1] * N, np.arange(N))
    alone.prefill(range(N), tokens[:, None], [1] * N)
    states = trunks.append(tokens, np.ones(N, bool))[trunk_of(model)]
    torch.testing.assert_close(states, alone.append(tokens), atol=2**-7, rtol=2**-7)


def test_weights_that_are_trained_and_adapters_that_are_switched_are_seen():
    base = fakes.causal_lm()
    model, rows = adapted(base), Rows()
    trunks = Trunks([base, model], N, L)
    rows.texts = [rows.ids(1) for _ in range(N)]
    trunks.prefill(range(N), torch.tensor(rows.texts), [1] * N, np.arange(N))

    def last():
        states = trunks.append(torch.tensor(rows.ids(N)), np.ones(N, bool))
        for slots in trunks._slots.values():
            slots.positions -= 1
        rows.random = np.random.default_rng(0)
        return states[trunk_of(model)], states[trunk_of(base)]

    rows.random = np.random.default_rng(0)
    before, plain = last()
    with torch.no_grad():
        for layer in adapter_layers(model):
            layer.lora_A["default"].weight *= 2
    after = last()[0]
    assert (before - after).abs().max() > 0.1
    model.disable_adapters()
    # The first token was read under the adapter by one of them.
    assert not torch.equal(last()[0], after)
    torch.testing.assert_close(last()[1], plain)


def embedding_adapter(base):
    from peft import LoraConfig

    model = copy.deepcopy(base, {id(w): w for w in base.parameters()})
    model.add_adapter(LoraConfig(r=2, target_modules=["embed_tokens"], task_type="CAUSAL_LM"))
    return model


def dora(base):
    from peft import LoraConfig

    model = copy.deepcopy(base, {id(w): w for w in base.parameters()})
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    return model


NOT_SHARED = {
    "weights of its own": lambda base: adapted(copy.deepcopy(base)),
    "an equal full copy": copy.deepcopy,
    "another setting": lambda base: spoilt(
        base, lambda m: setattr(trunk_of(m).config, "attention_dropout", 0.5)
    ),
    "a hook": lambda base: spoilt(
        base, lambda m: trunk_of(m).norm.register_forward_hook(lambda *a: a[-1] + 1)
    ),
    "another layer": lambda base: spoilt(
        base, lambda m: setattr(trunk_of(m).layers[0].mlp, "act_fn", torch.nn.ReLU())
    ),
    "an adapter of the embeddings": embedding_adapter,
    "weights that are decomposed": dora,
    "the very trunk": lambda base: base,
}


@pytest.mark.parametrize("name", NOT_SHARED)
def test_what_is_not_one_base_is_not_stacked(name):
    base = fakes.causal_lm()
    other = NOT_SHARED[name](base)
    assert not share_base(trunk_of(base), trunk_of(other))
    assert not Trunks([base, other], N, L)._stacks
    assert share_base(trunk_of(base), trunk_of(adapted(base)))


def test_compiled_and_recomputed_models_are_not_stacked():
    base = fakes.causal_lm()
    assert not Trunks([base, adapted(base)], N, L, compile=True)._stacks
    bloom = fakes.causal_lm("bloom")
    with pytest.warns(RuntimeWarning, match="cannot be cached"):
        assert not Trunks([bloom, adapted(bloom)], N, L)._stacks


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_has_memory_of_its_own(copied):
    base = fakes.causal_lm()
    trunks, tokens = Trunks([base, adapted(base)], N, L), torch.tensor([5, 6, 7])
    trunks.prefill(range(N), tokens[:, None], [1] * N, np.arange(N))
    twin, active = copied(trunks), np.ones(N, bool)
    states = [*trunks.append(tokens, active).values()]
    trunks.append(tokens, active)
    assert len(twin._stacks) == 1
    for mine, its in zip(states, twin.append(tokens, active).values(), strict=True):
        torch.testing.assert_close(mine, its)


# ------------------------------------------------------------- a policy is read along


class Together:
    """An env's reference, and a policy that reads along: both against uncached forwards."""

    def __init__(self, seed):
        self.base = fakes.causal_lm()
        self.policy = adapted(self.base)
        self.trunks = Trunks([self.base], N, L)
        self.slots = self.trunks.read_along(CachedLM(self.policy, N, L))
        self.env, self.own = Rows(seed), Rows(seed + 100)
        self.random = np.random.default_rng(seed)
        self.last = None

    def begin(self, slots):
        texts = [self.env.ids(self.random.integers(1, 3)) for _ in slots]
        self.prefill(self.trunks.prefill, self.env, slots, texts, np.arange(len(slots)))

    def begin_own(self, slots):
        """The policy reads the env's texts from their start."""
        texts = [list(self.env.texts[slot]) for slot in slots]
        self.prefill(self.slots.prefill, self.own, slots, texts)

    def prefill(self, read, rows, slots, texts, *more):
        padded = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
        for line, text in zip(padded, texts, strict=True):
            line[: len(text)] = torch.tensor(text)
        read(slots, padded, [len(text) for text in texts], *more)
        for slot, text in zip(slots, texts, strict=True):
            rows.texts[slot] = text

    def step(self, active):
        """The env's step."""
        self.last = self.env.ids(N)
        states = self.trunks.append(torch.tensor(self.last), active)[trunk_of(self.base)]
        for slot in np.flatnonzero(active):
            self.env.texts[slot].append(self.last[slot])
        self.env.check(self.base, states, np.flatnonzero(active))

    def act(self, active, tokens):
        states = self.slots.append(torch.tensor(tokens), active)
        for slot in np.flatnonzero(active):
            self.own.texts[slot].append(tokens[slot])
        self.own.check(self.policy, states, np.flatnonzero(active))


def room(rows):
    """The slots (N,) that take another token."""
    return np.array([len(text) < L for text in rows.texts])


@pytest.mark.parametrize("seed", range(8))
def test_whatever_env_and_policy_do_their_states_are_those_of_their_texts(seed):
    both = Together(seed)
    both.begin(list(range(N)))
    both.begin_own(list(range(N)))
    for _ in range(30):
        kind = both.random.choice(["step"] * 4 + ["act"] * 4 + ["begin", "own", "fork", "extend"])
        some = both.random.random(N) < 0.8
        slot = int(both.random.integers(N))
        if kind == "step":
            both.step(some & room(both.env))
        elif kind == "act":
            # Mostly the token that the env has read, sometimes another one.
            tokens = both.last if both.last and both.random.random() < 0.7 else both.own.ids(N)
            both.act(some & room(both.own), tokens)
        elif kind == "begin":
            both.begin([slot])
        elif kind == "own":
            both.begin_own([slot])
        elif kind == "fork":
            both.slots.fork([slot], [(slot + 1) % N])
            both.own.texts[(slot + 1) % N] = list(both.own.texts[slot])
        elif len(both.own.texts[slot]) < L - 2:
            both.slots.extend([slot], torch.tensor([[7, 8]]), [2])
            both.own.texts[slot] += [7, 8]


def other_text(both):
    both.prefill(both.slots.prefill, both.own, [1], [list(both.own.texts[0])])


def longer_text(both):
    both.slots.extend([1], torch.tensor([[7, 8]]), [2])
    both.own.texts[1] += [7, 8]


def anothers_text(both):
    both.slots.fork([0], [1])
    both.own.texts[1] = list(both.own.texts[0])


@pytest.mark.parametrize("change", [other_text, longer_text, anothers_text])
def test_what_was_read_ahead_is_void_where_the_policys_text_has_changed(change):
    both = Together(0)
    both.begin(list(range(N)))
    both.begin_own(list(range(N)))
    both.step(np.ones(N, bool))
    change(both)
    both.act(np.ones(N, bool), both.last)


def test_a_full_text_of_the_policys_does_not_stop_the_env():
    both = Together(0)
    both.begin(list(range(N)))
    both.begin_own(list(range(N)))
    both.prefill(both.slots.prefill, both.own, [1], [both.own.ids(L)])
    both.step(np.ones(N, bool))
    both.act(np.array([True, False, True]), both.last)


def test_a_token_is_read_once_for_env_and_policy(forwards):
    both = Together(0)
    both.begin(list(range(N)))
    both.begin_own(list(range(N)))
    forwards.clear()
    everywhere = np.ones(N, bool)
    for _ in range(4):
        both.step(everywhere)
        both.act(everywhere, both.last)
    assert forwards == [2 * N] * 4
    # Nobody asks for what the policy would say: another one acts.
    forwards.clear()
    for _ in range(3):
        both.step(everywhere)
    assert forwards == [2 * N, N, N]


def test_what_was_read_by_weights_that_have_changed_since_is_read_again(forwards):
    both = Together(0)
    both.begin(list(range(N)))
    both.begin_own(list(range(N)))
    everywhere = np.ones(N, bool)
    both.step(everywhere)
    with torch.no_grad():
        for weight in both.policy.parameters():
            if weight.requires_grad:
                weight.add_(0.0)
    forwards.clear()
    both.act(everywhere, both.last)
    assert forwards == [N]


def test_texts_of_other_sizes_or_of_another_base_are_left_alone():
    base = fakes.causal_lm()
    trunks, policy = Trunks([base], N, L), adapted(base)
    for slots in (
        CachedLM(policy, N + 1, L),
        CachedLM(policy, N, L - 1),
        CachedLM(policy, N, L, compile=True),
        CachedLM(adapted(fakes.causal_lm(seed=5)), N, L),
        object(),
    ):
        assert trunks.read_along(slots) is slots
    assert not trunks._stacks


def test_models_keep_what_they_hold_when_they_are_stacked():
    base, rows = fakes.causal_lm(), Rows()
    models, tokens = [base, adapted(base)], torch.tensor([5, 6, 7])
    slots = [CachedLM(model, N, L) for model in models]
    rows.texts = [[4], [8], [9]]
    for one in slots:
        one.prefill(range(N), torch.tensor(rows.texts), [1] * N)
    stack = Stack(slots)
    states = stack.append(tokens, np.ones(N, bool))
    rows.texts = [[4, 5], [8, 6], [9, 7]]
    for model in models:
        rows.check(model, states[trunk_of(model)], range(N))
    # One by one they go on, too.
    after = slots[1].append(tokens)
    rows.texts = [[4, 5, 5], [8, 6, 6], [9, 7, 7]]
    rows.check(models[1], after, range(N))
