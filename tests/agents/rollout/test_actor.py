"""Acting in texts that an environment writes into: what was written is read behind the own token,
and the rest of the text is not read again."""

import copy

import fakes
import numpy as np
import pytest
import tasks
import torch

from tokenenv.agents import LMPolicy
from tokenenv.agents.rollout.actor import Actor, invert
from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.models import batching
from tokenenv.models.cached_lm import CachedLM, trunk_of

N, L = 4, 30
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


class Texts:
    """Four running texts of at most L tokens, as observations show them."""

    def __init__(self, seed=0):
        self.random = np.random.default_rng(seed)
        self.rows = [self.ids(self.random.integers(1, 4)) for _ in range(N)]

    def ids(self, n):
        return self.random.integers(3, fakes.VOCAB_SIZE, n).tolist()

    def obs(self, array=np.asarray):
        tokens = np.full((N, L), fakes.PAD)
        for line, row in zip(tokens, self.rows, strict=True):
            line[: len(row)] = row
        return {"tokens": array(tokens), "length": array(np.array([len(row) for row in self.rows]))}

    def step(self, own, written):
        """Put a token and a reply of `written` (N,) tokens behind each text. A text that they do
        not leave room for another token begins anew: so it is with autoreset in the same step."""
        for slot, (token, count) in enumerate(zip(own, written, strict=True)):
            self.rows[slot] = [*self.rows[slot], int(token), *self.ids(count)]
            if len(self.rows[slot]) >= L:
                self.rows[slot] = self.ids(self.random.integers(1, 4))


def policy_of(name="llama"):
    return LMPolicy(fakes.causal_lm(name))


def plain_logprobs(policy, rows, tokens):
    """log pi of each text's next token by transformers alone, one text at a time."""
    with torch.no_grad():
        logits = [policy.model(input_ids=torch.tensor([row])).logits[0, -1] for row in rows]
    return torch.log_softmax(torch.stack(logits), -1).gather(1, tokens[:, None])[:, 0]


def forwards(policy):
    """The shapes of all tokens that the policy's trunk is given from now on."""
    shapes = []
    trunk_of(policy.model).register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    return shapes


@pytest.mark.parametrize("name", EIGHT)
def test_logprobs_after_replies_are_those_of_an_uncached_forward(name):
    policy, texts = policy_of(name), Texts()
    actor = Actor(policy, seed=1)
    for _ in range(12):
        tokens, logprobs = actor.act(texts.obs())
        torch.testing.assert_close(
            logprobs, plain_logprobs(policy, texts.rows, tokens), atol=1e-5, rtol=0
        )
        texts.step(tokens, texts.random.choice([0, 0, 1, 2, 5], N))


@pytest.mark.parametrize("array", [np.asarray, torch.as_tensor])
def test_what_was_written_is_read_and_nothing_twice(array):
    policy, texts = policy_of(), Texts()
    actor = Actor(policy, seed=1)
    tokens, _ = actor.act(texts.obs(array))
    shapes = forwards(policy)

    def step(*written):
        nonlocal tokens
        texts.step(tokens, written)
        shapes.clear()
        tokens, _ = actor.act(texts.obs(array))
        return shapes

    assert step(0, 0, 0, 0) == [(N, 1)]
    assert step(0, 3, 0, 1) == [(2, 4), (N, 1)]  # own tokens included; the append is of one shape
    assert step(2, 2, 2, 2) == [(N, 3)]
    assert step(0, 0, 0, 9) == [(1, 10), (N, 1)]
    texts.rows[0] = [7, 8]  # a reset row among the others
    tokens[0] = 9
    before = [list(row) for row in texts.rows]
    assert step(0, 4, 0, 0) == [(1, 3), (1, 5), (N, 1)]
    texts.rows = before  # restored: shorter than was expected
    shapes.clear()
    tokens, logprobs = actor.act(texts.obs(array))
    assert shapes == [(N, max(map(len, before)))]
    torch.testing.assert_close(logprobs, plain_logprobs(policy, before, tokens), atol=1e-5, rtol=0)


def test_another_text_that_is_longer_is_read_from_its_start():
    """It differs from the expected one in its first token, in the own token, or in all of it."""
    policy, texts = policy_of(), Texts()
    actor = Actor(policy, seed=1)
    for change in ("none", "first", "own", "all", "refreshed"):
        texts.rows = [[3, 4, 5], [6, 7], [8, 9, 10, 11], [12]]
        actor.refresh()
        tokens, _ = actor.act(texts.obs())
        texts.step(tokens, [2, 2, 2, 2])
        place = {"first": 0, "own": -3}.get(change)
        if place is not None:
            texts.rows[1][place] ^= 1
        if change == "all":
            texts.rows[1] = [20, 21, 22, 23, 24, 25, 26]
        if change == "refreshed":
            actor.refresh()
        shapes = forwards(policy)
        tokens, logprobs = actor.act(texts.obs())
        torch.testing.assert_close(
            logprobs, plain_logprobs(policy, texts.rows, tokens), atol=1e-5, rtol=0
        )
        read = {"none": [(N, 3)], "refreshed": [(N, 7)]}
        others = [(1, len(texts.rows[1])), (N - 1, 3)]
        assert shapes[: 2 - (change in read)] == read.get(change, others)


def test_a_text_that_begins_with_the_expected_one_is_the_expected_one():
    """Padding decides nothing: the written tokens may be the pad id, and the text may be full."""
    policy, texts = policy_of(), Texts()
    actor = Actor(policy, seed=1)
    tokens, _ = actor.act(texts.obs())
    for slot, row in enumerate(texts.rows):
        texts.rows[slot] = [*row, int(tokens[slot]), fakes.PAD, fakes.PAD]
    texts.rows[3] += [fakes.PAD] * (L - len(texts.rows[3]))
    shapes = forwards(policy)
    tokens, logprobs = actor.act(texts.obs())
    assert len(shapes) == 1
    torch.testing.assert_close(
        logprobs, plain_logprobs(policy, texts.rows, tokens), atol=1e-5, rtol=0
    )
    # After a text that is full nothing is expected, and a text without its own token is another.
    shapes.clear()
    actor.act(texts.obs())
    assert shapes == [(N, L)]


def test_texts_grow_alike_whether_the_policys_slots_extend_or_step():
    """A policy of the user's own may have slots without `extend`."""

    class Stepping:
        def __init__(self, slots):
            self.prefill, self.append, self.fork = slots.prefill, slots.append, slots.fork

    found = []
    for wrap in (lambda slots: slots, Stepping):
        policy, texts = policy_of(), Texts()
        make = policy.slots
        policy.slots = lambda n, length, make=make, wrap=wrap: wrap(make(n, length))
        actor = Actor(policy, seed=1)
        for _ in range(8):
            tokens, logprobs = actor.act(texts.obs())
            texts.step(tokens, texts.random.choice([0, 1, 3], N))
        found.append((copy.deepcopy(texts.rows), logprobs))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-5, rtol=0)


def test_an_extension_that_is_interrupted_has_all_texts_read_again(monkeypatch):
    policy, texts = policy_of(), Texts()
    actor = Actor(policy, seed=1)
    tokens, _ = actor.act(texts.obs())
    texts.step(tokens, [2, 0, 1, 0])
    with monkeypatch.context() as patch:
        patch.setattr(actor._slots, "append", lambda *args: 1 / 0)  # after the extension
        with pytest.raises(ZeroDivisionError):
            actor.act(texts.obs())
    tokens, logprobs = actor.act(texts.obs())
    torch.testing.assert_close(
        logprobs, plain_logprobs(policy, texts.rows, tokens), atol=1e-5, rtol=0
    )


def test_one_small_copy_a_step_tells_what_was_written(monkeypatch):
    from tokenenv.agents.rollout import actor as module

    policy, texts, copied = policy_of(), Texts(), []
    monkeypatch.setattr(module, "to_host", lambda x: (copied.append(x.numel()), x.numpy())[1])
    actor = Actor(policy, seed=1)
    for written in ([0] * N, [2, 0, 3, 0], [1] * N):
        tokens, _ = actor.act(texts.obs())
        texts.step(tokens, written)
    actor.act(texts.obs())
    assert copied == [2 * N] * 4


def test_in_an_env_that_answers_each_text_is_read_from_its_start_once(monkeypatch):
    """By the actor, the reference and the reward model. The policy is the reference here, so the
    log-probs that the env pays are the actor's."""
    read, prefill = [], CachedLM.prefill

    def counted(cache, slots, *args):
        read.append((cache, len(slots)))
        return prefill(cache, slots, *args)

    task = tasks.toy(turns="fixed", stops=(7,), max_new_tokens=12)
    envs = TokenVectorEnv(N, task=task, autoreset_mode="SameStep", kl_coef=0.1)
    policy = LMPolicy(tasks.reference())
    actor, obs, begun, written = Actor(policy, seed=1), envs.reset(seed=0)[0], N, 0
    # Equal prompts that begin together are read once, which is not what is counted here.
    monkeypatch.setattr(
        "tokenenv.agents.rollout.actor.prefill_once", lambda m, s, t, n, _: m.prefill(s, t, n)
    )
    monkeypatch.setattr(CachedLM, "prefill", counted)
    for _ in range(40):
        rows = [t[:n].tolist() for t, n in zip(obs["tokens"], obs["length"], strict=True)]
        tokens, logprobs = actor.act(obs)
        plain = plain_logprobs(policy, rows, tokens)
        torch.testing.assert_close(logprobs, plain, atol=1e-5, rtol=0)
        before = obs["length"]
        obs, _, terminated, truncated, infos = envs.step(tokens.numpy())
        np.testing.assert_allclose(infos["ref_logprob"], plain, atol=1e-5)
        ended = terminated | truncated
        begun += ended.sum()
        written += (obs["length"] - before - 1)[~ended].sum()
    assert written > 20
    assert begun > N
    rows_of = dict.fromkeys((cache for cache, _ in read), 0)
    for cache, n in read:
        rows_of[cache] += n
    # The texts that began with the last step have been read by the env alone.
    assert rows_of.pop(actor._slots) == begun - ended.sum()
    assert len(rows_of) == 2
    assert max(rows_of.values()) <= begun - N


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_the_host_waits_for_that_copy_alone(monkeypatch):
    from tokenenv.agents.rollout import actor as module

    policy, texts = policy_of().cuda(), Texts()
    actor = Actor(policy, seed=1)
    upload = lambda x: torch.as_tensor(x).cuda()  # noqa: E731
    copy_out = module.to_host

    def to_host(x):
        torch.cuda.set_sync_debug_mode("default")
        try:
            return copy_out(x)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    for step in range(12):
        obs = texts.obs(upload)
        # The first steps make caches and graphs.
        if step >= 6:
            monkeypatch.setattr(module, "to_host", to_host)
            torch.cuda.set_sync_debug_mode("error")
        try:
            tokens, logprobs = actor.act(obs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        with torch.no_grad():
            logits = [policy.model(input_ids=upload([row])).logits[0, -1] for row in texts.rows]
        expected = torch.log_softmax(torch.stack(logits), -1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(
            logprobs, expected, atol=0.2 if policy.uses_bfloat16 else 1e-5, rtol=0
        )
        texts.step(tokens.tolist(), texts.random.choice([0, 0, 2, 4], N))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tokens_and_log_probs_are_the_same_a_few_rows_at_a_time(temperature, monkeypatch):
    torch.manual_seed(0)
    logits = 3 * torch.randn(9, 50)
    logits[:, 7] = -torch.inf
    random = torch.rand(9)
    tokens, logprobs = invert(logits, temperature, random)
    monkeypatch.setattr(batching, "BLOCK_ELEMENTS", 100)
    again = invert(logits, temperature, random)
    assert torch.equal(again[0], tokens)
    assert torch.equal(again[1], logprobs)
    wanted = torch.log_softmax(logits / temperature, -1)
    torch.testing.assert_close(logprobs, wanted[torch.arange(9), tokens])
    below = wanted.exp().cumsum(-1) <= random[:, None]
    assert torch.equal(tokens, below.sum(-1))
