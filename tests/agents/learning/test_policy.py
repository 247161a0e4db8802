"""The policy: acting from caches, learning forwards, generation, LoRA."""

import builtins
import copy

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toy_env import GOOD, STOP, P, T, ToyEnv, V, tiny_lm

from tokenenv.agents import LMPolicy
from tokenenv.agents.learning.learner import (
    FrozenLM,
    Outputs,
    accumulate_gradient,
    outputs,
    state_values,
)
from tokenenv.agents.learning.losses import token_weights
from tokenenv.agents.rollout import actor as module
from tokenenv.agents.rollout.actor import Actor, sample
from tokenenv.agents.rollout.generate import generate, keep_likely
from tokenenv.agents.run.evaluate import next_token_probs
from tokenenv.errors import InvalidArgument, MissingDependency
from tokenenv.models.adapters import with_lora


def uncached_logprobs(policy, obs, tokens, temperature=1.0):
    """log pi of each row's next token by the model's plain forward, one text at a time."""
    rows = []
    for text, length, token in zip(obs["tokens"], obs["length"], tokens, strict=True):
        logits = policy.model(input_ids=torch.as_tensor(text[None, :length])).logits[0, -1]
        rows.append(torch.log_softmax(logits / temperature, -1)[token])
    return torch.stack(rows).detach()


class CountingSlots:
    """Wraps a `SlotModel` and records what is read from the start."""

    def __init__(self, slots):
        self.slots, self.prefilled = slots, []

    def prefill(self, slots, tokens, lengths):
        self.prefilled.append(sorted(slots))
        return self.slots.prefill(slots, tokens, lengths)

    def append(self, tokens, active=None):
        return self.slots.append(tokens, active)

    def fork(self, sources, targets):
        self.slots.fork(sources, targets)


def make_actor(seed=0, **options):
    policy = LMPolicy(tiny_lm(seed=3))
    actor = Actor(policy, seed=seed, **options)
    make, made = policy.slots, []

    def slots(num_rows, max_length):
        made.append(CountingSlots(make(num_rows, max_length)))
        return made[-1]

    policy.slots = slots
    return policy, actor, made


def text_obs(texts, array=np.asarray):
    tokens = np.zeros((len(texts), P + T), np.int64)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    lengths = np.array([len(text) for text in texts])
    return {
        "tokens": array(tokens),
        "length": array(lengths),
        "prompt_length": array(np.ones_like(lengths)),
    }


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_next_token_probs_are_the_plain_forwards(temperature):
    policy, obs = LMPolicy(tiny_lm(seed=3)), text_obs([[2, 3], [4], [5, 6, 7]])
    probs = next_token_probs(policy, temperature)(obs)
    assert probs.shape == (3, V)
    for token in range(V):
        expected = uncached_logprobs(policy, obs, [token] * 3, temperature).exp()
        np.testing.assert_allclose(probs[:, token], expected, atol=1e-6)


@pytest.mark.parametrize("array", [np.asarray, torch.as_tensor])
def test_acting_finds_out_what_changed(array):
    policy, actor, made = make_actor(temperature=0.7)
    texts = [[2, 3], [4], [5, 6, 7]]

    def act():
        obs = text_obs(texts)
        tokens, logprobs = actor.act(text_obs(texts, array))
        torch.testing.assert_close(
            logprobs, uncached_logprobs(policy, obs, tokens, 0.7), rtol=0, atol=1e-5
        )
        return tokens.tolist()

    def grow(tokens):
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)

    grow(act())
    grow(act())
    tokens = act()
    assert made[0].prefilled == [[0, 1, 2]]
    grow(tokens)
    texts[1] = [9, 9]  # a reset row
    grow(act())
    assert made[0].prefilled[1:] == [[1]]
    texts[0] = list(texts[2])  # a forked row
    grow(act())
    assert made[0].prefilled[2:] == [[0]]
    texts[1] = [8] * len(texts[1])  # another text of the length that was expected
    grow(act())
    assert made[0].prefilled[3:] == [[1]]
    texts[2] = texts[2][
        :-1
    ]  # as before the last token: a row whose token was ignored, or a restored one
    act()
    assert made[0].prefilled[4:] == [[2]]
    actor.refresh()
    act()
    assert made[0].prefilled[-1] == [0, 1, 2]


def test_a_stop_token_that_is_the_pad_token_is_still_a_token():
    _, actor, made = make_actor()
    texts = [[2, 3]]
    while actor.act(text_obs(texts))[0].item() != 0:
        actor.refresh()
    reads = len(made[0].prefilled)
    actor.act(text_obs([[2, 3]]))  # as padded it is what was expected, but shorter
    assert len(made[0].prefilled) == reads + 1


WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")


class NoWaiting(TorchDispatchMode):
    """Fails on operations that would make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in WAITING, func
        return func(*args, **(kwargs or {}))


def test_acting_copies_one_small_array_to_the_host(monkeypatch):
    """On CPU by the operations it uses; on CUDA see `test_on_cuda`."""
    _, actor, _ = make_actor()
    copied = []
    monkeypatch.setattr(module, "to_host", lambda x: (copied.append(x.numel()), x.numpy())[1])
    texts = [[2, 3], [4], [5, 6, 7]]
    actor.act(text_obs(texts))  # makes the caches
    for turn in range(3):
        obs = text_obs(texts, torch.as_tensor)
        with NoWaiting():
            tokens, _ = actor.act(obs)
        texts = [[*text, token] for text, token in zip(texts, tokens.tolist(), strict=True)]
        if turn == 1:
            texts[0] = [9]
    assert copied == [6] * 4  # two numbers for each slot


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda(monkeypatch):
    policy = LMPolicy(tiny_lm(seed=3).cuda(), precision="float32")
    actor = Actor(policy, temperature=0.7)
    texts = [[2, 3], [4], [5, 6, 7]]
    copy_to_host = module.to_host

    def exempt(values):
        torch.cuda.set_sync_debug_mode("default")
        host = copy_to_host(values)
        torch.cuda.set_sync_debug_mode("error")
        return host

    actor.act(
        text_obs(texts, lambda x: torch.as_tensor(x, device="cuda"))
    )  # makes the caches, which waits
    monkeypatch.setattr(module, "to_host", exempt)
    for _ in range(3):
        obs = text_obs(texts, lambda x: torch.as_tensor(x, device="cuda"))
        torch.cuda.set_sync_debug_mode("error")
        try:
            tokens, logprobs = actor.act(obs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for text, token, logprob in zip(texts, tokens.tolist(), logprobs.tolist(), strict=True):
            logits = policy.model(input_ids=torch.tensor([text], device="cuda")).logits[0, -1] / 0.7
            assert logprob == pytest.approx(torch.log_softmax(logits, -1)[token].item(), abs=1e-4)
            text.append(token)


def test_same_seed_same_tokens_and_other_sizes_start_anew():
    draws = []
    for seed in (1, 1, 2):
        _, actor, _ = make_actor(seed=seed)
        draws.append(
            [
                actor.act(text_obs([[2, 3]] * 20))[0].tolist(),
                actor.act(text_obs([[2]] * 5))[0].tolist(),
            ]
        )
    assert draws[0] == draws[1] != draws[2]


def test_sampling_follows_the_distribution():
    logits = torch.tensor([1.0, -torch.inf, 0.0, 3.0, -torch.inf]).expand(40_000, 5)
    tokens, logprobs = sample(logits, 2.0, torch.Generator().manual_seed(0))
    probs = torch.softmax(logits[0] / 2.0, -1)
    frequencies = torch.bincount(tokens, minlength=5) / 40_000
    assert frequencies[1] == frequencies[4] == 0
    torch.testing.assert_close(frequencies, probs, rtol=0, atol=0.01)
    torch.testing.assert_close(logprobs, probs[tokens].log())


def test_sampling_never_picks_an_impossible_token_at_the_edges(monkeypatch):
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).repeat(2, 1)
    edges = torch.tensor([[0.0], [1.0 - 2.0**-24]])
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: edges)
    assert sample(logits, 1.0, torch.Generator())[0].tolist() == [1, 2]


def episodes_batch(kl_coef=0.0, num_envs=5, tokens=60, policy=None):
    from tokenenv.agents.episodes import EpisodeBatch
    from tokenenv.agents.rollout.collector import Collector

    policy = policy or LMPolicy(tiny_lm(seed=3))
    collector = Collector(ToyEnv(num_envs, kl_coef=kl_coef), Actor(policy, seed=1), seed=1)
    return policy, EpisodeBatch.stack(collector.collect(tokens))


@pytest.mark.parametrize("separate_value", [False, True])
def test_learning_forward_equals_the_models_own(separate_value):
    policy = LMPolicy(tiny_lm(seed=3), separate_value=separate_value)
    torch.nn.init.normal_(policy.value_head.weight)
    _, batch = episodes_batch(policy=policy)
    out = outputs(
        policy, batch, np.arange(len(batch))[::-1].copy(), reference=FrozenLM(tiny_lm(), V)
    )
    values = state_values(policy, batch, 40)
    torch.testing.assert_close(out.logprob, out.pick(batch.logprob_BT), rtol=0, atol=1e-5)
    torch.testing.assert_close(out.value, out.pick(values[:, :-1]))
    assert len(out.logprob) == int(batch.response_length_B.sum())
    ref = tiny_lm()
    for b in range(3):
        length, width = int(batch.length_B[b]), int(batch.response_length_B[b])
        with torch.no_grad():
            text = batch.tokens_BL[b : b + 1, :length]
            trunk = policy.value_trunk or policy.model.model
            expected = policy.value(trunk(input_ids=text)[0][0, length - width - 1 :])
            full = torch.log_softmax(
                policy.model(input_ids=text).logits[0, length - width - 1 : -1], -1
            )
            ref_full = torch.log_softmax(ref(input_ids=text).logits[0, length - width - 1 : -1], -1)
        torch.testing.assert_close(values[b, : width + 1], expected, rtol=0, atol=1e-5)
        assert values[b, width + 1 :].abs().sum() == 0
        mine = out.rows == b
        torch.testing.assert_close(
            out.entropy[mine], -(full.exp() * full).sum(-1), rtol=0, atol=1e-5
        )
        torch.testing.assert_close(
            out.ref_kl[mine], (full.exp() * (full - ref_full)).sum(-1), rtol=0, atol=1e-5
        )


def test_dropout_is_off():
    policy = LMPolicy(tiny_lm(seed=3, attention_dropout=0.5).train())
    _, batch = episodes_batch(policy=policy)
    out = outputs(policy, batch, np.arange(len(batch)))
    torch.testing.assert_close(out.logprob, out.pick(batch.logprob_BT), rtol=0, atol=1e-5)


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean"])
@pytest.mark.parametrize("max_batch_tokens", [1, 25, 10_000])
def test_gradient_equals_the_unbatched_one(aggregation, max_batch_tokens):
    policy, batch = episodes_batch()
    torch.nn.init.normal_(policy.value_head.weight, std=0.1)
    rows = np.array([4, 1, 5, 2])
    weights = torch.zeros(len(batch))
    weights[rows] = token_weights(batch.response_length_B[rows], aggregation)

    def loss(out: Outputs):
        w = out.pick(weights)
        total = (w * (out.logprob * out.pick(batch.logprob_BT) + out.value**2 + out.entropy)).sum()
        return total, {"loss": total}

    metrics = accumulate_gradient(policy, batch, rows, loss, max_batch_tokens)
    grads = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()
    total = torch.zeros(())
    for b in rows:
        length, width = int(batch.length_B[b]), int(batch.response_length_B[b])
        result = policy.model(
            input_ids=batch.tokens_BL[b : b + 1, :length], output_hidden_states=True
        )
        logprobs = torch.log_softmax(result.logits[0, length - width - 1 : -1], -1)
        chosen = logprobs.gather(1, batch.tokens_BL[b, length - width : length, None])[:, 0]
        value = policy.value(result.hidden_states[-1][0, length - width - 1 : -1])
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        total = (
            total + (weights[b] * (chosen * batch.logprob_BT[b, :width] + value**2 + entropy)).sum()
        )
    total.backward()
    assert metrics["loss"] == pytest.approx(total.item(), rel=1e-6)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=0, atol=1e-6)


def test_greedy_generation_equals_the_models_own_loop():
    policy, prompts = LMPolicy(tiny_lm(seed=3)), [[2, 3, 4], [5], [6, 7], [8]]
    expected = []
    for prompt in prompts:
        text = list(prompt)
        while len(text) < len(prompt) + 6 and (len(text) == len(prompt) or text[-1] != STOP):
            text.append(int(policy.model(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
        expected.append(text[len(prompt) :])
    for rows in (1, 3, 64):
        assert (
            generate(
                policy, prompts, max_new_tokens=6, stop_token_ids=[STOP], greedy=True, num_rows=rows
            )
            == expected
        )


def test_generation_stops_and_repeats_with_its_seed():
    policy = LMPolicy(tiny_lm(seed=3))
    texts = generate(
        policy, [[2, 3]] * 40, max_new_tokens=12, stop_token_ids=[STOP, GOOD], seed=4, num_rows=7
    )
    assert texts == generate(
        policy, [[2, 3]] * 40, max_new_tokens=12, stop_token_ids=[STOP, GOOD], seed=4, num_rows=7
    )
    assert all(not {STOP, GOOD} & set(text[:-1]) for text in texts)
    assert all(len(text) == 12 or text[-1] in (STOP, GOOD) for text in texts)
    assert len({tuple(text) for text in texts}) > 20


def test_top_k_and_top_p_by_hand():
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    assert keep_likely(logits, 2, 1.0).isfinite().tolist() == [[False, True, False, True]]
    assert keep_likely(logits, 0, 0.5).isfinite().tolist() == [[False, True, False, False]]
    assert keep_likely(logits, 0, 0.6).isfinite().tolist() == [[False, True, False, True]]
    assert keep_likely(logits, 3, 0.99).isfinite().tolist() == [[False, True, True, True]]
    assert keep_likely(logits, 9, 1.0).isfinite().all()


def test_generation_of_texts():
    fakes = pytest.importorskip("fakes")
    tokenizer, policy = fakes.tokenizer(), LMPolicy(fakes.causal_lm())
    ids = tokenizer.encode("the cat")
    options = {"max_new_tokens": 5, "tokenizer": tokenizer, "seed": 1}
    assert generate(policy, ["the cat"], **options) == generate(policy, [ids], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [[]]}, "a prompt is empty"),
        ({"prompts": ["text"]}, "there is no tokenizer"),
        ({"temperature": "hot"}, "temperature=hot must be finite and 0 or more"),
        ({"temperature": -0.5}, "temperature=-0.5 must be finite and 0 or more"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        (
            {"prompts": [[2], [2] * 62]},
            r"prompts\[1\] has 62 tokens, and with max_new_tokens=3 more the text would not fit the "
            "policy's 64 positions; give max_new_tokens=2 or less",
        ),
        ({"prompts": [[2] * 64]}, "the policy's 64 positions; give a shorter prompt"),
    ],
)
def test_generation_refuses_what_it_cannot_do(options, message):
    with pytest.raises(InvalidArgument, match=message):
        generate(LMPolicy(tiny_lm()), **({"prompts": [[2]], "max_new_tokens": 3} | options))


def test_generation_fills_the_positions():
    assert len(generate(LMPolicy(tiny_lm()), [[2] * 61], max_new_tokens=3)[0]) == 3


def test_lora_trains_adapters_only_and_starts_as_the_model():
    pytest.importorskip("peft")
    model = tiny_lm(seed=3)
    policy = LMPolicy(copy.deepcopy(model), lora_rank=2, separate_value=True)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("value_head") for name in trained)
    assert any(name.startswith("value_trunk") for name in trained)
    tokens = torch.tensor([[2, 3, 4]])
    torch.testing.assert_close(
        policy.model(input_ids=tokens).logits, model(input_ids=tokens).logits
    )
    _, batch = episodes_batch(policy=policy)
    out = outputs(policy, batch, np.arange(len(batch)))
    torch.testing.assert_close(out.logprob, out.pick(batch.logprob_BT), rtol=0, atol=1e-5)


def with_adapter(model, name="default", **options):
    """The model in a peft wrapper, with an adapter that changes what it says."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        **{"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    )
    config.init_lora_weights = False
    return peft.get_peft_model(model, config, name)


@pytest.mark.parametrize("frozen", [False, True])
def test_of_a_model_with_an_adapter_the_adapter_is_trained_and_nothing_else(frozen):
    adapted = with_adapter(tiny_lm(seed=3), "mine").requires_grad_(not frozen)
    before = adapted(input_ids=torch.tensor([[2, 3, 4]])).logits
    policy = LMPolicy(adapted)
    torch.testing.assert_close(
        policy.head(policy.states(torch.tensor([[2, 3, 4]]), np.array([3]))[0][0]), before[0]
    )
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    adapters = {name for name, _ in policy.named_parameters() if "lora_" in name}
    assert adapters
    assert trained == adapters | {"value_head.weight", "value_head.bias"}


def test_an_adapter_beside_another_one_is_refused_and_so_are_those_that_do_nothing():
    adapted = with_adapter(tiny_lm(seed=3))
    for model in (adapted, adapted.get_base_model()):  # as injected, too
        with pytest.raises(
            InvalidArgument, match=r"lora_rank=2: \w+ has an adapter already.*merge_and_unload"
        ):
            LMPolicy(model, lora_rank=2)
    adapted.merge_adapter()
    with pytest.raises(
        InvalidArgument, match="the adapter of LlamaForCausalLM is switched off or merged"
    ):
        LMPolicy(adapted)
    adapted.unmerge_adapter()
    adapted.base_model.disable_adapter_layers()
    with pytest.raises(InvalidArgument, match="switched off or merged"):
        LMPolicy(adapted)
    adapted.base_model.enable_adapter_layers()
    merged = LMPolicy(copy.deepcopy(adapted).merge_and_unload(), lora_rank=2)
    tokens = torch.tensor([[2, 3, 4]])
    torch.testing.assert_close(
        merged.model(input_ids=tokens).logits, adapted(input_ids=tokens).logits
    )


def test_lora_without_peft_gives_the_install_line(monkeypatch):
    real = builtins.__import__

    def without_peft(name, *args, **kwargs):
        if name.startswith("peft"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(MissingDependency, match=r"needs peft: pip install peft$"):
        with_lora(tiny_lm(), 2, 0)


def test_bfloat16_acts_and_learns_close_to_float32():
    """Autocast: the same weights in lower precision."""
    full, half = LMPolicy(tiny_lm(seed=3)), LMPolicy(tiny_lm(seed=3), precision="bfloat16")
    obs = text_obs([[2, 3], [4]])
    for policy in (full, half):
        actor = Actor(policy)
        tokens, logprobs = actor.act(obs)
        grown = text_obs([[2, 3, int(tokens[0])], [4, int(tokens[1])]])
        tokens, logprobs = actor.act(grown)
        torch.testing.assert_close(
            logprobs, uncached_logprobs(full, grown, tokens), rtol=0, atol=0.02
        )
        assert logprobs.dtype == torch.float32
    _, batch = episodes_batch(policy=full)
    rows = np.arange(len(batch))
    torch.testing.assert_close(
        outputs(half, batch, rows).logprob, outputs(full, batch, rows).logprob, rtol=0, atol=0.02
    )
