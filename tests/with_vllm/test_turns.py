"""Texts that an environment writes into, by vLLM in this process and on a server: turn by turn what
stepping makes of the same tokens."""

import gymnasium as gym
import numpy as np
import pytest
from running import KEY, Server, mismatch

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents import PPO

CALCULATOR, N = "tokenenv/Calculator-v0", 16


def make(num_envs=N, mode="SameStep", **options):
    """The reference calls the calculator in one text of eight; a call is asked for here."""
    return gym.make_vec(CALCULATOR, num_envs=num_envs, autoreset_mode=mode, **options)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    server = Server(
        "calculator-lm",
        tmp_path_factory.mktemp("logs") / "log",
        "--logprobs-mode",
        "processed_logprobs",
    )
    server.start()
    try:
        server.wait()
        yield server.url
    finally:
        server.kill()


def stepped(envs, e):
    """The own tokens of an episode, one step each: the last observation and info, and the rewards."""
    paid = []
    obs, _ = envs.reset(options={"prompts": [e.prompt]})
    for t, token in enumerate(e.response):
        obs, rewards, terminated, truncated, info = envs.step(np.array([token]))
        paid.append(rewards[0])
        assert (terminated | truncated)[0] == (t == len(e.response) - 1)
    return obs, info, paid


@pytest.mark.parametrize("where", ["process", "server"])
def test_texts_are_what_stepping_makes_of_them(where, request, monkeypatch):
    """Before and after an update; log-probs are the policy's at every token of every turn."""
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    rollout = "vllm" if where == "process" else request.getfixturevalue("url")
    reward = {"reward": {"score": "terminal", "turns": "turn"}}
    agent = PPO(make(**reward), rollout=rollout, max_staleness=0, lr=1e-3, temperature=0.9)
    other, several = make(1, "Disabled", **reward), 0
    for _ in range(2):
        found, batch = mismatch(agent, 1500)
        assert found < 1e-4
        episodes = batch.unstack()
        called = [e for e in episodes if e.turns > 1]
        for e in [*called, *episodes[:10]]:
            obs, info, paid = stepped(other, e)
            assert obs["tokens"][0, : int(obs["length"][0])].tolist() == e.text.tolist()
            assert np.flatnonzero(obs["own_mask"][0]).tolist() == e.places.tolist()
            assert e.reward.sum() == pytest.approx(sum(paid), abs=1e-4)
            np.testing.assert_allclose(
                e.reward, info["token_rewards"][0][: len(e.response)], atol=1e-5
            )
            assert (e.score, e.truncated) == (info["score"][0], bool(info["cut"][0]))
        several += len(called)
        assert all(len(e.written) for e in called)
        agent.update(batch)
        agent.collector.refresh()
    assert several > 5
