"""Whole texts by the policy's own cache: the tokens, log-probs, rewards and episodes of stepping."""

from dataclasses import fields

import numpy as np
import pytest
import tasks
import torch
from gymnasium.vector import AutoresetMode
from test_text_collector import RESUMED, make, numbers, run
from test_text_turns import answer_seed
from test_text_turns import check_against_stepping as check_turns
from test_text_turns import make as make_turns
from test_text_turns import replayed as replayed_turns

from tokenenv.agents import ALGORITHMS, GRPO, PPO, VinePPO
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning.learner import token_logprobs
from tokenenv.agents.rollout import actor as actor_module
from tokenenv.agents.rollout.actor import Actor, invert
from tokenenv.agents.rollout.collector import Collector
from tokenenv.agents.rollout.episode_engine import EpisodeEngine
from tokenenv.agents.rollout.text import Text
from tokenenv.agents.rollout.text_scores import episode_of, score_texts
from tokenenv.errors import InvalidArgument


def agent_of(envs, algorithm=PPO, **options):
    return algorithm(
        envs, **{"rollout": "episode", "batch_tokens": 60, "lr": 1e-2, "minibatches": 2, **options}
    )


def random_of(seed, count):
    return np.random.default_rng(seed).random(count, np.float32)


def check_same(one, other, *, but=()):
    """Two episodes are the same but for some fields."""
    for field in fields(one):
        if field.name in but:
            continue
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, dict):
            assert a.keys() == b.keys()
            b = {key: b[key] for key in a}
        a, b = ((*x.values(),) if isinstance(x, dict) else (x,) for x in (a, b))
        for x, y in zip(a, b, strict=True):
            if x is None:
                assert y is None
            else:
                np.testing.assert_allclose(x, y, atol=1e-5, rtol=0, err_msg=field.name)


# ---------------------------------------------------------------- the engine alone


@torch.no_grad()
def by_full_forwards(policy, prompt, max_tokens, seed, stops, temperature):
    """A text and its log-probs by one forward of the whole prefix for each token."""
    tokens, logprobs = [], []
    for random in random_of(seed, max_tokens):
        logits = policy.model(torch.tensor([[*prompt, *tokens]])).logits[:, -1]
        token, logprob = invert(logits, temperature, torch.tensor([random]))
        tokens.append(token.item())
        logprobs.append(logprob.item())
        if tokens[-1] in stops:
            break
    return tokens, logprobs


ASKED = [
    ([5, 6, 7], 8), ([8], 8), ([9, 10], 3), ([5, 6, 7], 8), ([11, 12, 13, 14], 1), ([5, 6, 7], 8),
    ([8, 20, 21], 6), ([30], 8), ([31, 32], 8), ([40], 8), ([41], 8), ([42, 43, 44, 45], 8),
]  # fmt: skip


@pytest.mark.parametrize("num_texts", [1, 5, 16])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_text_follows_from_its_seed_alone(temperature, num_texts):
    """However many slots there are, and whichever text it follows in one."""
    policy, spec = agent_of(make()).policy, make().token_spec
    engine = EpisodeEngine(policy, spec, temperature=temperature, num_texts=num_texts)
    found = {}
    for key, (prompt, limit) in enumerate(ASKED):
        engine.begin(key, prompt, limit, 100 + key)
    while len(found) < len(ASKED):
        found |= {text.key: text for text in engine.ended()}
    for key, (prompt, limit) in enumerate(ASKED):
        tokens, logprobs = by_full_forwards(
            policy, prompt, limit, 100 + key, spec.stop_token_ids, temperature
        )
        assert list(found[key].tokens) == tokens
        np.testing.assert_allclose(found[key].logprobs, logprobs, atol=1e-5)
    assert len({len(text.tokens) for text in found.values()}) > 2


def test_new_weights_draw_the_next_token_of_every_text():
    """Texts that are under way are read again; their earlier log-probs stay."""
    agent = agent_of(make(long=True))
    engine = EpisodeEngine(agent.policy, make(long=True).token_spec, num_texts=4)
    for key, limit in enumerate([5, 12, 12, 12]):
        engine.begin(key, [5, 6, 7], limit, key)
    texts = {text.key: text for text in engine.ended()}
    cut = int(engine._written.max())
    before = {name: weight.clone() for name, weight in agent.policy.state_dict().items()}
    with torch.no_grad():
        for weight in agent.policy.parameters():
            weight.add_(
                0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
            )
    engine.sync()
    while len(texts) < 4:
        texts |= {text.key: text for text in engine.ended()}
    long = [text for text in texts.values() if len(text.tokens) > cut]
    assert long
    by_new = [logprobs_of(agent.policy, text.tokens)[cut:] for text in long]
    agent.policy.load_state_dict(before)
    for text, new in zip(long, by_new, strict=True):
        old = logprobs_of(agent.policy, text.tokens)
        np.testing.assert_allclose(text.logprobs[:cut], old[:cut], atol=1e-5)
        np.testing.assert_allclose(text.logprobs[cut:], new, atol=1e-5)
        assert np.abs(new - old[cut:]).max() > 1e-3


@torch.no_grad()
def logprobs_of(policy, tokens):
    logits = policy.model(torch.tensor([[5, 6, 7, *tokens]])).logits[0, 2:-1]
    return logits.log_softmax(-1)[range(len(tokens)), list(tokens)].numpy()


def test_slots_are_filled_again_and_a_prompt_of_a_group_is_read_once(monkeypatch):
    agent = agent_of(make(8, group_size=4), GRPO)
    agent.collector.collect(1)  # makes the cache
    slots, read, forked = agent.collector.engine._slots, [], []
    prefill, fork = slots.prefill, slots.fork
    monkeypatch.setattr(
        slots, "prefill", lambda at, *rest: read.append(len(at)) or prefill(at, *rest)
    )
    monkeypatch.setattr(slots, "fork", lambda of, to: forked.append(len(to)) or fork(of, to))
    begun = agent.collector._begun
    agent.collector.collect(200)
    begun = agent.collector._begun - begun
    assert begun > 30
    assert (sum(read), sum(forked)) == (begun // 4, begun * 3 // 4)


# ---------------------------------------------------------------- stepping

DESIGNS = {
    "token": {"reward": "token"},
    "penalty in the env": {"reward": "terminal", "kl": "policy", "kl_coef": 0.3},
    "potential, unscored cuts": {
        "reward": {"dense": ("token", 0.5), "shaped": "delta"},
        "score_truncated": False,
    },
    "placed, no penalty": {"reward": "uniform", "kl": "none"},
    "torch": {"reward": "delta", "array": "torch"},
    "watched": {"reward": "token", "watch": {"even": "uniform"}},
}


@pytest.mark.parametrize("name", DESIGNS)
def test_stepping_with_the_same_random_numbers_gives_the_same_batch(name, monkeypatch):
    agent = agent_of(make(**DESIGNS[name]), temperature=0.9)
    written = dict(zip(*(lambda e: (numbers(e), e))(agent.collector.collect(90)), strict=True))
    order = sorted(written)
    options = {"prompts": [written[n].prompt.tolist() for n in order]}
    seeds = [agent.collector._seed_of(Text(n, 0, [], 0, {})) for n in order]
    random = torch.from_numpy(np.stack([random_of(seed, 8) for seed in seeds]))
    steps = iter(random.T)
    monkeypatch.setattr(
        actor_module,
        "sample",
        lambda logits, temperature, _: invert(logits, temperature, next(steps)),
    )
    envs = make(len(order), AutoresetMode.DISABLED, **DESIGNS[name])
    collector = Collector(envs, Actor(agent.policy, temperature=0.9, reads_values=True))
    collector.reset(options)
    stepped = {}
    for _ in range(8):
        stepped = {e.slot: e for e in collector.step()} | stepped
    for slot, number in enumerate(order):
        check_same(written[number], stepped[slot], but=("slot", "index", "prompt_id"))
    assert {e.truncated for e in stepped.values()} == {True, False}


@pytest.mark.parametrize("name", DESIGNS)
def test_scoring_what_stepping_wrote_gives_the_batch_of_stepping(name):
    envs = make(**DESIGNS[name])
    stepped = PPO(envs, rollout="step").collector.collect(90)
    texts = [
        Text(
            row, 0, e.prompt.tolist(), e.prompt_id, {**envs.weights}, tokens=e.response.tolist(),
            own=[True] * len(e.response), logprob=e.logprob.tolist(),
            value=e.drawn_value.tolist(), terminated=e.terminated, truncated=e.truncated,
        )
        for row, e in enumerate(stepped)
    ]  # fmt: skip
    other = make(1, **DESIGNS[name])
    scores = score_texts(other, texts, pays_logprob=DESIGNS[name].get("kl") == "policy")
    for row, (text, e) in enumerate(zip(texts, stepped, strict=True)):
        check_same(e, episode_of(text, scores, row, envs.token_spec, 6), but=("slot", "index"))


def test_every_text_that_was_begun_comes_out_however_long_it_gets():
    """Lengths and prompts of the texts of a run are those of the texts that were begun: what ended
    first is not favoured."""
    agent, found = agent_of(make(long=True), lr=1e-9), []
    agent.learn(700, on_update=lambda metrics, episodes: found.extend(episodes))
    by_number = dict(zip(numbers(found), found, strict=True))
    collector = agent.collector
    left = [text.number for text in [*collector._unfinished(), *collector._ready]]
    assert sorted([*by_number, *left]) == list(range(collector._begun))
    for number in range(20):
        seed = collector._seed_of(Text(number, 0, [], 0, {}))
        prompt = make().prompts[collector._draw(number)]
        tokens, _ = by_full_forwards(agent.policy, prompt, 24, seed, (1,), 1.0)
        assert by_number[number].response.tolist() == tokens


# ---------------------------------------------------------------- agents


@pytest.mark.parametrize("algo", sorted(ALGORITHMS))
def test_every_algorithm_learns(algo):
    agent, seen = agent_of(make(group_size=3), ALGORITHMS[algo]), []
    while len(seen) < 2:
        agent.learn(agent.tokens_seen + 1, on_update=lambda metrics, _: seen.append(metrics))
    assert np.isfinite([m["objective/reward"] for m in seen]).all()
    # The log-probs are the policy's own: no forward is spent on how far the two are apart.
    assert "rollout/mismatch" not in seen[0]


@pytest.mark.parametrize("options", [{"lora_rank": 2}, {"separate_value": True}])
def test_log_probs_are_the_policys(options):
    agent = agent_of(make(), **options)
    for _ in range(2):
        agent.learn(agent.tokens_seen + 1)
        batch = EpisodeBatch.stack(agent.collector.collect(60))
        own_BT = token_logprobs(agent.policy, batch, 1000)
        fresh_B = batch.version_B == agent.updates
        assert fresh_B.any()
        torch.testing.assert_close(
            (own_BT * batch.mask_BT)[fresh_B], batch.logprob_BT[fresh_B], atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_is_exact(name, tmp_path):
    algorithm, env_options, options = RESUMED[name]
    options = {"lr_schedule": "constant", **options}
    straight = agent_of(make(**env_options), algorithm, **options)
    whole = run(straight, 4, 2, tmp_path / "c")[2:]
    resumed = algorithm.load(tmp_path / "c", make(**env_options))
    assert resumed.config.rollout == "episode"
    for (one, some), (other, others) in zip(whole, run(resumed, 4), strict=True):
        del one["time/tokens_per_second"], other["time/tokens_per_second"]
        np.testing.assert_equal(one, other)
        assert numbers(some) == numbers(others)
    for a, b in zip(straight.policy.parameters(), resumed.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_continuations_begin_with_their_state():
    agent = agent_of(make(), VinePPO)
    states = [
        (np.array([5, 6, 7]), np.array([], np.int64)),
        (np.array([8]), np.array([12, 13, 14])),
    ]
    agent.collector.collect(20)
    running = set(agent.collector._running)
    episodes = agent.collector.play_on(states, 20)
    assert len(episodes) == 40
    assert len({tuple(e.response) for e in episodes}) > 20
    for i, e in enumerate(episodes):
        prompt, prefix = states[i // 20]
        np.testing.assert_array_equal(e.prompt, [*prompt, *prefix])
    batch = EpisodeBatch.stack(episodes)
    own_BT = token_logprobs(agent.policy, batch, 1000) * batch.mask_BT
    torch.testing.assert_close(own_BT, batch.logprob_BT, atol=1e-5, rtol=0)
    # Those that were running go on beside them.
    ended = [text.number for text in agent.collector._ready]
    assert running <= {*agent.collector._running, *ended}


@pytest.mark.parametrize("name", ["turns", "random turns"])
def test_texts_that_the_environment_writes_into_are_those_of_stepping(name):
    agent, other = agent_of(make_turns(name)), make_turns(name, 1, AutoresetMode.DISABLED)
    episodes = agent.collector.collect(60)
    for e, number in zip(episodes, numbers(episodes), strict=True):
        seed = answer_seed(agent.collector, number)
        check_turns(e, *replayed_turns(other, e.prompt.tolist(), e.response, e.logprob, seed))
    assert any(len(e.written) for e in episodes)


def test_an_n_gram_policy_writes_too():
    envs = tasks.make_vec(6, AutoresetMode.SAME_STEP, "tokenenv/DelayedKey-v0")
    agent = agent_of(envs, rollout_options={"num_texts": 3})
    batch = EpisodeBatch.stack(agent.collector.collect(200))
    own_BT = token_logprobs(agent.policy, batch, 1000) * batch.mask_BT
    torch.testing.assert_close(own_BT, batch.logprob_BT, atol=1e-5, rtol=0)


def test_what_is_not_allowed_is_named():
    with pytest.raises(InvalidArgument, match=r"rollout_options='dtype'.*num_texts"):
        agent_of(make(), rollout_options={"dtype": "bfloat16"})
    with pytest.raises(InvalidArgument, match="num_texts=0"):
        agent_of(make(), rollout_options={"num_texts": 0})
