"""vLLM servers: the same numbers, new weights, and what happens when one dies in the middle of a
run."""

import signal

import gymnasium as gym
import numpy as np
import pytest
from running import ASSETS, KEY, Server, mismatch

from tokenenv.agents import PPO
from tokenenv.errors import InvalidArgument, ServerError
from tokenenv.models.vllm_models import VLLMRewardModel
from tokenenv.models.vllm_server import VLLMServer
from tokenenv.rollout.server import VLLMServerEngine

POLICY = ["--logprobs-mode", "processed_logprobs"]


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Policy, policy with adapters, and reward model: started side by side."""
    logs = tmp_path_factory.mktemp("logs")
    made = {
        "policy": Server("reviews-lm", logs / "policy", *POLICY),
        "lora": Server(
            "reviews-lm", logs / "lora", *POLICY, "--enable-lora", "--max-lora-rank", "8"
        ),
        "reward": Server("reviews-reward", logs / "reward", "--runner", "pooling"),
    }
    for server in made.values():
        server.start()
    for server in made.values():
        server.wait()
    yield made
    for server in made.values():
        server.kill()


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)


def textgen(prompts, reward_model, num_envs=2, **options):
    lengths = {"max_prompt_tokens": 10, "max_new_tokens": 40, "kl_coef": 0.2}
    models = {"model": str(ASSETS / "reviews-lm"), "reward_model": reward_model, **options}
    return gym.make_vec(
        "tokenenv/TextGen-v0",
        num_envs=num_envs,
        prompts=prompts,
        autoreset_mode="SameStep",
        **models,
        **lengths,
    )


def test_rewards_and_reference_of_servers_are_those_of_the_local_models(servers, make, texts):
    """First of all: the policy's server still has the reference's weights."""
    prompts, responses = texts
    local = make(2).unwrapped.score_episodes(prompts, responses)
    envs = textgen(prompts, servers["reward"].url, reference=servers["policy"].url)
    found = envs.unwrapped.score_episodes(prompts, responses)
    for name in ("token_rewards", "score", "ref_logprobs"):
        np.testing.assert_allclose(getattr(found, name), getattr(local, name), atol=1e-4)
    # A scorer of finished texts is paid at the end.
    np.testing.assert_allclose(found.step_rewards.sum(1), local.step_rewards.sum(1), atol=1e-3)


def test_a_wrong_key_is_said(servers):
    with pytest.raises(ServerError, match="401"):
        VLLMServer(servers["reward"].url, api_key="another").token_scores([[1, 2]])


@pytest.mark.parametrize(("name", "options"), [("policy", {}), ("lora", {"lora_rank": 4})])
def test_log_probs_are_the_policys_before_and_after_updates(name, options, servers, make):
    agent = PPO(
        make(), rollout=servers[name].url, max_staleness=0, lr=3e-3, temperature=0.7, **options
    )
    found, batch = mismatch(agent)
    assert found < 1e-4
    for _ in range(2):
        agent.update(batch)
        assert mismatch(agent)[0] > 0.02
        agent.collector.refresh()
        found, batch = mismatch(agent)
        assert found < 1e-4
        assert batch.terminated_B.any()
    agent.learn(agent.tokens_seen + 1500)
    assert agent.updates


def test_a_server_with_raw_log_probs_is_refused(make, tmp_path):
    server = Server("reviews-lm", tmp_path / "log")
    server.start()
    try:
        server.wait()
        envs = make(1)
        spec, model = envs.unwrapped.token_spec, envs.unwrapped.model
        with pytest.raises(InvalidArgument, match="processed_logprobs"):
            VLLMServerEngine(model, spec, url=server.url, temperature=0.7)
        VLLMServerEngine(model, spec, url=server.url, temperature=1.0)
    finally:
        server.kill()


@pytest.mark.parametrize("rollout", ["step", "vllm"])
def test_a_run_survives_a_reward_server_that_is_slow_or_dead(rollout, servers, texts, tmp_path):
    """An error after bounded tries, an intact checkpoint, and the run goes on when the server is
    back."""
    server, path = servers["reward"], tmp_path / "checkpoint"
    prompts = texts[0]

    def envs():
        reward_model = VLLMRewardModel(VLLMServer(server.url, timeout=2.0, retries=1))
        return textgen(prompts, reward_model, num_envs=16)

    agent = PPO(envs(), rollout=rollout, batch_tokens=300)
    agent.learn(800, on_update=lambda metrics, episodes: agent.save(path))
    saved = path.read_bytes()
    server.send(signal.SIGSTOP)
    try:
        with pytest.raises(ServerError, match="in 2 tries of 2 s each"):
            agent.learn(5000)
    finally:
        server.send(signal.SIGCONT)
    server.kill()
    try:
        with pytest.raises(ServerError, match="Is it running"):
            agent.learn(5000)
        assert path.read_bytes() == saved
    finally:
        server.start()
        server.wait()
    resumed = PPO.load(path, envs())
    before = resumed.updates
    resumed.learn(2000)
    assert resumed.tokens_seen >= 2000
    assert resumed.updates > before
    agent.learn(agent.tokens_seen + 600)
