"""KLQ: no error at the optimum on any text, the policy gradient away from it, and a replay that
forgets the oldest."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from runs import collected
from toy_env import T, ToyEnv, V, tiny_lm

import tokenenv  # noqa: F401
from tokenenv.agents import KLQ, LMPolicy
from tokenenv.agents.algorithms import klq
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning.learner import token_logprobs
from tokenenv.agents.rollout.replay import Replay
from tokenenv.agents.run.evaluate import evaluate
from tokenenv.errors import InvalidArgument

BETA = 0.2


def optimum(envs, batch):
    """log pi* (B, T) of the tokens of a batch and V* (B, T + 1), by the oracle."""
    oracle, width = envs.unwrapped.oracle, batch.reward_BT.shape[1]
    logprob, values = torch.zeros(len(batch), width), torch.zeros(len(batch), width + 1)
    room = envs.unwrapped.single_observation_space["tokens"].shape[0]
    for b, e in enumerate(batch.unstack()):
        text = np.concatenate([e.prompt, e.response])
        starts = [len(e.prompt) + t for t in range(len(e.response))]
        obs = {
            "tokens": np.stack([np.pad(text[:end], (0, room - end)) for end in starts]),
            "length": np.array(starts),
            "prompt_length": np.full(len(starts), len(e.prompt)),
        }
        probs = np.asarray(oracle.policy(obs, BETA))
        logprob[b, : len(starts)] = torch.as_tensor(np.log(probs[range(len(starts)), e.response]))
        values[b, : len(starts)] = torch.as_tensor(np.asarray(oracle.value(obs, BETA)))
    return logprob, values


@pytest.mark.parametrize("lambda_", [0.0, 0.6, 1.0])
def test_there_is_no_error_at_the_optimum_on_any_text(monkeypatch, lambda_):
    """The texts are the reference's own, so off the optimum's policy: old texts are as good as new
    ones."""
    envs = gym.make_vec(
        "tokenenv/Negation-v0",
        num_envs=16,
        autoreset_mode="SameStep",
        reward="terminal",
        kl_coef=BETA,
    )
    agent = KLQ(envs, lambda_=lambda_)
    batch = EpisodeBatch.stack(agent.collector.collect(300))
    logprob, values = optimum(envs, batch)
    assert (logprob - batch.logprob_BT)[batch.mask_BT].abs().max() > 1.0
    agent.estimate(batch)
    assert batch.learned["advantage"].abs().max() > 0.3
    monkeypatch.setattr(klq, "logprobs_and_values", lambda *args: (logprob, values))
    agent.estimate(batch)
    assert batch.learned["advantage"].abs().max() < 1e-4


def test_it_finds_the_kl_regularised_optimum():
    beta, best = 0.3, 0.0
    for _ in range(T):
        good, other = math.exp((1 + best) / beta), math.exp(best / beta)
        best = beta * math.log((good + 1.0 + (V - 2) * other) / V)
    agent = KLQ(ToyEnv(64), batch_tokens=800, lr=6e-3, kl_coef=beta)
    start = evaluate(agent, ToyEnv(64), num_texts=256)
    agent.learn(10_000)
    found = evaluate(agent, ToyEnv(64), num_texts=256)
    assert start.score - beta * start.kl < 0.3 * best
    assert 0.93 * best < found.score - beta * found.kl < 1.05 * best


def test_the_first_gradient_follows_the_errors(monkeypatch):
    """-A grad log pi, and vf_coef times -A grad V, token-mean, computed text by text."""
    settings = {
        "epochs": 1,
        "minibatches": 1,
        "vf_coef": 0.3,
        "max_grad_norm": 1e9,
        "replay_ratio": 1.0,
    }
    agent = KLQ(
        ToyEnv(4, kl_coef=0.2), policy=LMPolicy(tiny_lm(seed=3, initializer_range=0.2)), **settings
    )
    agent.updates = 1
    torch.nn.init.normal_(agent.policy.value_head.weight, std=0.1)
    episodes, batch = collected(agent)
    grads = {}
    monkeypatch.setattr(agent.statistics["replay"], "sample", lambda tokens, rng: episodes)
    monkeypatch.setattr(
        agent.optimizer,
        "step",
        lambda: grads.update({n: p.grad.clone() for n, p in agent.policy.named_parameters()}),
    )
    agent.update(batch)
    agent.policy.zero_grad()
    agent.estimate(batch)
    total, count = torch.zeros(()), int(batch.response_length_B.sum())
    for b, e in enumerate(episodes):
        text, start = torch.as_tensor(np.concatenate([e.prompt, e.response]))[None], len(e.prompt)
        result = agent.policy.model(input_ids=text, output_hidden_states=True)
        chosen = torch.log_softmax(result.logits[0, start - 1 : -1], -1).gather(
            1, text[0, start:, None]
        )[:, 0]
        value = agent.policy.value(result.hidden_states[-1][0, start - 1 : -1])
        error = batch.learned["advantage"][b, : len(e.response)]
        total = total - (error * (chosen + 0.3 * value)).sum() / count
    total.backward()
    for name, parameter in agent.policy.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=2e-6)


def test_the_critic_starts_at_the_mean_return():
    agent = KLQ(ToyEnv(8, kl_coef=0.2), batch_tokens=100)
    _, batch = collected(agent, 100)
    agent.centre_critic(batch)
    assert float(agent.policy.value_head.bias.detach()) == pytest.approx(
        float(agent.rewards(batch).sum(1).mean()), rel=1e-5
    )


def test_a_small_share_of_the_new_tokens_is_still_a_text():
    agent, seen = KLQ(ToyEnv(4, kl_coef=0.2), batch_tokens=20, replay_ratio=0.01), []
    agent.learn(60, on_update=lambda metrics, episodes: seen.append(metrics))
    assert all(1 <= m["replay/sampled"] <= T for m in seen)


def test_old_texts_are_learnt_from(monkeypatch):
    """What is sampled comes from all that is kept, and each token's error is of the present
    policy."""
    agent = KLQ(ToyEnv(8, kl_coef=0.2), batch_tokens=60, replay_ratio=0.5, lr=1e-2)
    drawn, estimate = [], agent.estimate

    def spy(batch):
        estimate(batch)
        expected = token_logprobs(agent.policy, batch, 10_000)
        torch.testing.assert_close(batch.learned["old_logprob"], expected)
        drawn.append({(e.slot, e.index) for e in batch.unstack()})

    monkeypatch.setattr(agent, "estimate", spy)
    agent.learn(500)
    fresh, sampled = drawn[::2], drawn[1::2]
    assert all(not texts <= new for new, texts in zip(fresh[2:], sampled[2:], strict=True))
    seen = set()
    for new, texts in zip(fresh, sampled, strict=True):
        seen |= new
        assert texts <= seen


def test_the_replay_keeps_the_latest_tokens():
    _, batch = collected(KLQ(ToyEnv(4, kl_coef=0.2)), 200)
    episodes, replay = batch.unstack(), Replay(60)
    replay.add(episodes)
    kept = list(replay.episodes)
    assert kept == episodes[-len(kept) :]
    assert replay.tokens == sum(len(e.response) for e in kept) <= 60
    assert replay.tokens + len(episodes[-len(kept) - 1].response) > 60
    sampled = replay.sample(30, np.random.default_rng(0))
    assert 30 <= sum(len(e.response) for e in sampled) < 30 + 8
    assert len({id(e) for e in sampled}) == len(sampled)
    assert len(replay.sample(10**6, np.random.default_rng(0))) == len(kept)
    again = Replay(60)
    again.load_state_dict(replay.state_dict())
    assert again.tokens == replay.tokens
    for one, other in zip(again.episodes, kept, strict=True):
        np.testing.assert_equal(
            (one.response, one.logprob, one.terms), (other.response, other.logprob, other.terms)
        )
    empty = Replay(5)
    empty.load_state_dict(Replay(5).state_dict())
    assert not empty.episodes


def test_what_it_cannot_use_is_refused():
    with pytest.raises(InvalidArgument, match="KLQ needs kl_coef above 0"):
        KLQ(ToyEnv(4), batch_tokens=20).learn(20)
    options = {"num_envs": 4, "autoreset_mode": "SameStep", "kl": "policy"}
    with pytest.raises(InvalidArgument, match="give it an env with kl='reference'"):
        KLQ(gym.make_vec("tokenenv/Reviews-v0", **options))
