"""A vLLM server by URL: the local models' numbers, bounded retries, and runs that outlive it.
Against a stand-in."""

import copy

import fakes
import gymnasium as gym
import numpy as np
import pytest
import tasks
import torch
from fake_vllm import FakeServer

import tokenenv  # noqa: F401
from tokenenv.agents import PPO, LMPolicy
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning.learner import token_logprobs
from tokenenv.cli import main
from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.errors import InvalidArgument, ServerError
from tokenenv.models.vllm_models import VLLMReference, VLLMRewardModel
from tokenenv.models.vllm_server import TEXTS, VLLMServer
from tokenenv.rollout.server import VLLMServerEngine

STOPS = [fakes.EOS, 7, 9, 11, 20]
PROMPTS = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [5, 15]]


def language_model():
    return fakes.causal_lm(num_hidden_layers=1)


def reward_model(kind="token"):
    return fakes.reward_model(kind, num_hidden_layers=1)


@pytest.fixture
def serve():
    """Starts servers that end with the test."""
    started = []

    def serve(*args, **options):
        started.append(FakeServer(*args, **options))
        return started[-1]

    yield serve
    for server in started:
        server.stop()


def make(num_envs=4, **models):
    options = {
        "max_prompt_tokens": 4,
        "max_new_tokens": 8,
        "kl_coef": 0.3,
        "autoreset_mode": "SameStep",
        **models,
    }
    options.setdefault("model", language_model())
    return gym.make_vec(
        "tokenenv/TextGen-v0", num_envs=num_envs, prompts=PROMPTS, stop_token_ids=STOPS, **options
    )


def some_texts(count=20):
    rng = np.random.default_rng(0)
    return [PROMPTS[i % 5] for i in range(count)], [
        rng.integers(12, 19, rng.integers(1, 8)).tolist() for _ in range(count)
    ]


def quick(server, **options):
    return VLLMServer(server.url, **{"timeout": 5.0, "retries": 0, **options})


# ---------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("kind", ["token", "sequence"])
@pytest.mark.parametrize("reward", ["token", "terminal"])
def test_a_served_reward_model_and_reference_give_the_local_numbers(kind, reward, serve):
    if (kind, reward) == ("sequence", "token"):
        return
    server = serve(language_model(), reward_model(kind))
    client = quick(server)
    served = VLLMRewardModel(client, per_token=kind == "token")
    local = make(reward_model=reward_model(kind), reward=reward)
    remote = make(reward_model=served, reference=VLLMReference(client), reward=reward)
    texts = some_texts(TEXTS + 6)  # so that it takes more than one request
    wanted, found = local.unwrapped.score_episodes(*texts), remote.unwrapped.score_episodes(*texts)
    for name in ("token_rewards", "score", "ref_logprobs", "lengths"):
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), atol=1e-5)
    np.testing.assert_allclose(found.terms["kl"], wanted.terms["kl"], atol=1e-5)
    np.testing.assert_allclose(found.step_rewards.sum(1), wanted.step_rewards.sum(1), atol=1e-4)
    assert remote.unwrapped.biased_terms == ()
    sizes = [len(body["input"]) for path, body, _ in server.asked if path == "/pooling"]
    assert max(sizes) <= TEXTS
    assert sum(sizes) == TEXTS + 6


def test_urls_will_do(serve):
    server = serve(language_model(), reward_model())
    local, remote = (
        make(reward_model=reward_model()),
        make(reward_model=server.url, reference=server.url),
    )
    wanted, found = (
        local.unwrapped.score_episodes(*some_texts()),
        remote.unwrapped.score_episodes(*some_texts()),
    )
    np.testing.assert_allclose(found.token_rewards, wanted.token_rewards, atol=1e-5)


def test_a_served_implicit_model_pays_its_log_ratio(serve):
    other = fakes.causal_lm(num_hidden_layers=1, seed=5)
    options = {"reward": "implicit", "reward_model": reward_model()}
    local = make(implicit_model=other, **options).unwrapped.score_episodes(*some_texts())
    remote = make(implicit_model=serve(other).url, **options).unwrapped.score_episodes(
        *some_texts()
    )
    np.testing.assert_allclose(remote.token_rewards, local.token_rewards, atol=1e-5)
    assert np.abs(local.terms["implicit"]).max() > 0.01


def test_stepping_pays_a_served_reward_at_the_end_and_places_it_where_it_belongs(serve):
    local, remote = (
        make(reward_model=reward_model()),
        make(reward_model=serve(None, reward_model()).url),
    )
    for envs in (local, remote):
        envs.reset(seed=0, options={"prompts": PROMPTS[:4]})
    for token in [12, 13, 14, 15, 16, 17, 18, 12]:
        one, other = (envs.step(np.full(4, token)) for envs in (local, remote))
    np.testing.assert_allclose(other[4]["token_rewards"], one[4]["token_rewards"], atol=1e-5)
    np.testing.assert_allclose(other[4]["score"], one[4]["score"], atol=1e-5)
    np.testing.assert_allclose(other[4]["reward_terms"]["token"], other[4]["score"], atol=1e-5)


def test_a_served_reference_cannot_step_and_says_so(serve):
    envs = make(reward_model=reward_model(), reference=serve(language_model()).url)
    with pytest.raises(
        InvalidArgument, match=r"whole texts only.*rollout='vllm' and score_episodes"
    ):
        envs.reset(seed=0)
    assert np.isfinite(envs.unwrapped.score_episodes(*some_texts()).token_rewards).all()


# ---------------------------------------------------------------- what does not answer


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_so_often_and_no_more(status, serve):
    server = serve(None, reward_model())
    client = quick(server, retries=2)
    assert client.model
    server.asked.clear()
    server.fail = [status, status]
    assert len(client.token_scores([[5, 6]])[0]) == 2
    assert len(server.asked) == 3
    server.asked.clear()
    server.fail = [status] * 10
    with pytest.raises(ServerError, match=rf"{server.url} did not answer /pooling in 3 tries"):
        client.token_scores([[5, 6]])
    assert len(server.asked) == 3


@pytest.mark.parametrize("status", [400, 401, 404, 500])
def test_a_refusal_is_not_argued_with(status, serve):
    server = serve(None, reward_model())
    client = quick(server, retries=2)
    assert client.model
    server.fail = [status]
    with pytest.raises(ServerError, match=rf"refused /pooling \({status}\): something is wrong"):
        client.token_scores([[5, 6]])
    assert server.paths().count("/pooling") == 1


def test_a_dead_and_a_slow_server_are_said(serve):
    server = serve(None, reward_model())
    client = quick(server, timeout=0.2, retries=1)
    assert client.model
    server.delay = 1.0
    with pytest.raises(
        ServerError, match=r"in 2 tries of 0.2 s each at most \(.*timed out.*\)\. Is it running"
    ):
        client.token_scores([[5, 6]])
    assert server.paths().count("/pooling") == 2
    server.stop()
    with pytest.raises(ServerError, match=r"in 2 tries.*refused"):
        client.token_scores([[5, 6]])
    server.delay = 0.0
    server.start()
    assert client.token_scores([[5, 6]])


def test_the_key_is_sent_and_never_shown(serve, monkeypatch):
    server = serve(None, reward_model(), key="a-secret")
    with pytest.raises(ServerError, match="401") as raised:
        quick(server, api_key="wrong-secret").token_scores([[5]])
    assert "secret" not in str(raised.value)
    assert quick(server, api_key="a-secret").token_scores([[5]])
    monkeypatch.setenv("VLLM_API_KEY", "a-secret")
    assert quick(server).token_scores([[5]])


SPOILED = {
    "too few": lambda answer: {"data": answer["data"][1:]},
    "too short": lambda answer: {
        "data": [{**one, "data": one["data"][1:]} for one in answer["data"]]
    },
    "no data": lambda answer: {"nothing": 1},
    "text": lambda answer: "hello",
}


@pytest.mark.parametrize("how", SPOILED)
def test_nonsense_is_an_error_of_the_server(how, serve):
    server = serve(None, reward_model())
    client = quick(server)
    assert client.model
    server.spoil = SPOILED[how]
    with pytest.raises(ServerError, match="/pooling"):
        client.token_scores([[5, 6], [7, 8, 9]])


def test_arguments_are_checked():
    for options in ({"url": "localhost:8000"}, {"timeout": 0}, {"retries": -1}):
        with pytest.raises(InvalidArgument, match=next(iter(options))):
            VLLMServer(**{"url": "http://127.0.0.1:1", **options})


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("rollout", ["step", "server"])
@pytest.mark.parametrize("trouble", ["dead", "slow"])
def test_a_run_outlives_its_reward_server(rollout, trouble, serve, tmp_path):
    """An error after bounded tries; an intact checkpoint; and both a new process and the same agent
    go on."""
    server, path = serve(None, reward_model()), tmp_path / "c"
    how = "step" if rollout == "step" else serve(language_model()).url

    def envs():
        return make(6, reward_model=VLLMRewardModel(quick(server, timeout=0.5, retries=1)))

    agent = PPO(envs(), rollout=how, batch_tokens=60)
    agent.learn(130, on_update=lambda metrics, episodes: agent.save(path))
    saved, updates = path.read_bytes(), agent.updates
    if trouble == "dead":
        server.stop()
    else:
        server.delay = 1.5
    with pytest.raises(ServerError, match="in 2 tries"):
        agent.learn(2000)
    assert path.read_bytes() == saved
    assert agent.updates == updates
    server.delay = 0.0
    if trouble == "dead":
        server.start()
    resumed = PPO.load(path, envs(), rollout=how)
    resumed.learn(400)
    assert resumed.updates > updates
    agent.learn(agent.tokens_seen + 200)
    assert agent.updates > updates


def test_the_command_says_it_in_a_line_and_resumes(serve, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "400")
    server = serve(None, reward_model())
    model, run = fakes.saved(language_model(), tmp_path / "m"), tmp_path / "run"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(" ".join(fakes.WORDS[3:6]) for _ in range(2)))
    options = [
        "model",
        model,
        "prompts",
        str(prompts),
        "reward_model",
        server.url,
        "max_new_tokens",
        "6",
        "max_prompt_tokens",
        "4",
    ]
    args = [
        "train",
        "--env",
        "tokenenv/TextGen-v0",
        "--num-envs",
        "4",
        "--total-tokens",
        "200",
        "--run-dir",
        str(run),
    ]
    args += ["--agent.batch-tokens", "40", "--checkpoint-every", "1", "--options", *options]

    stop_at = 6
    asked = FakeServer._pooling

    def dies(self, body):
        if self.paths().count("/pooling") == stop_at:
            self.fail = [500] * 100
        return asked(self, body)

    monkeypatch.setattr(FakeServer, "_pooling", dies)
    with pytest.raises(SystemExit) as raised:
        main(args)
    assert raised.value.code == 2
    error = capsys.readouterr().err
    assert "refused /pooling (500)" in error
    assert "Traceback" not in error
    server.fail, stop_at = [], -1
    resume = ["train", "--resume", str(run), "--total-tokens", "200"]
    with pytest.raises(SystemExit):
        main(resume)
    assert f"say it again: --options reward_model {server.url}" in capsys.readouterr().err
    main([*resume, "--options", "reward_model", server.url])
    assert "run folder" in capsys.readouterr().out


# ---------------------------------------------------------------- texts by a server


def own_adapter(**changes):
    """A policy whose model has an adapter of another name than ours, beside one that is not
    active."""
    peft = pytest.importorskip("peft")
    options = {
        "r": 3,
        "target_modules": ["q_proj", "up_proj"],
        "task_type": "CAUSAL_LM",
        "init_lora_weights": False,
    }
    config = peft.LoraConfig(**{**options, **changes})
    model = peft.get_peft_model(language_model(), config, "mine")
    model.add_adapter(
        "mine2", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    return LMPolicy(model)


def test_adapters_that_vllm_does_not_take_are_refused(serve):
    server = serve(language_model())
    spec = make(1, reward_model=reward_model()).unwrapped.token_spec
    for changes in ({"use_dora": True}, {"rank_pattern": {"q_proj": 1}}):
        with pytest.raises(
            InvalidArgument,
            match=r"plain LoRA of one rank, and LlamaForCausalLM has 'mine' \(LORA\)",
        ):
            VLLMServerEngine(own_adapter(**changes).model, spec, url=server.url)
    several = own_adapter().model
    several.base_model.set_adapter(["mine", "mine2"])
    with pytest.raises(InvalidArgument, match=r"'mine' \(LORA\), 'mine2' \(LORA\); merge"):
        VLLMServerEngine(several, spec, url=server.url)


@pytest.mark.parametrize(
    "options",
    [{}, {"lora_rank": 2}, {"policy": own_adapter}],
    ids=["weights", "adapters", "own adapter"],
)
def test_log_probs_are_the_policys_before_and_after_updates(options, serve):
    server = serve(language_model(), key="k")
    options = {name: value() if name == "policy" else value for name, value in options.items()}
    agent = PPO(
        make(6, reward_model=reward_model()),
        rollout=server.url,
        rollout_options={"api_key": "k"},
        temperature=0.7,
        max_staleness=0,
        lr=3e-2,
        **options,
    )
    for update in range(3):
        batch = EpisodeBatch.stack(agent.collector.collect(60))
        own = token_logprobs(agent.policy, batch, 1000, 0.7) * batch.mask_BT
        torch.testing.assert_close(own, batch.logprob_BT, atol=1e-5, rtol=0)
        last = batch.tokens_BL.gather(1, batch.length_B[:, None] - 1)[:, 0]
        assert (torch.isin(last, torch.tensor(STOPS)) == batch.terminated_B).all()
        assert (batch.version_B == update).all()
        agent.update(batch)
        moved = token_logprobs(agent.policy, batch, 1000, 0.7) * batch.mask_BT
        assert (moved - batch.logprob_BT).abs().max() > 1e-2
        agent.collector.refresh()
        agent.updates += 1
    load = "/v1/load_lora_adapter" if options else "/collective_rpc"
    assert server.paths()[-4:] == ["/pause", load, "/reset_prefix_cache", "/resume"]
    assert server.asked[-4][2] == {"mode": "keep"}
    assert server.asked[-2][2] == {"reset_running_requests": "true"}


def test_the_server_goes_on_where_weights_could_not_be_handed_over(serve):
    server = serve(language_model())
    envs = make(2, reward_model=reward_model())
    engine = VLLMServerEngine(
        language_model(), envs.unwrapped.token_spec, url=server.url, retries=0
    )
    server._collective_rpc = lambda body: "no"
    server.fail = [200, 500]
    with pytest.raises(ServerError, match="/collective_rpc"):
        engine.sync()
    assert server.paths()[-1] == "/resume"


def test_raw_log_probs_are_refused_where_there_is_a_temperature(serve):
    server = serve(language_model(), raw_logprobs=True)
    spec = make(1, reward_model=reward_model()).unwrapped.token_spec
    with pytest.raises(InvalidArgument, match="--logprobs-mode processed_logprobs"):
        VLLMServerEngine(language_model(), spec, url=server.url, temperature=0.7)
    VLLMServerEngine(copy.deepcopy(language_model()), spec, url=server.url, temperature=1.0)


def test_a_server_writes_a_turn_at_a_time(serve):
    """Up to a stop token or to the end of a turn, with the room that is left."""
    server = serve(language_model())
    task = tasks.toy(turns="fixed", max_new_tokens=12)
    envs = TokenVectorEnv(4, task=task, reward="turn", autoreset_mode="SameStep")
    agent = PPO(envs, rollout=server.url, max_staleness=0)
    episodes = agent.collector.collect(100)
    batch = EpisodeBatch.stack(episodes)
    own_BT = token_logprobs(agent.policy, batch, 1000) * batch.mask_BT
    torch.testing.assert_close(own_BT, batch.logprob_BT, atol=1e-5, rtol=0)
    asked = [body for path, body, _ in server.asked if path == "/v1/completions"]
    assert {*task.stop_token_ids, *task.turn_end_token_ids} == {*asked[0]["stop_token_ids"]}
    begun = {tuple(body["prompt"]): body["max_tokens"] for body in asked}
    for e in (e for e in episodes if e.turns > 1):
        later = int(e.places[np.flatnonzero(np.diff(e.places) > 1)[-1] + 1])
        left = min(12 - int((e.places < later).sum()), envs.token_spec.max_length - later)
        assert begun[tuple(e.text[:later].tolist())] == left
    assert any(e.turns > 1 for e in episodes)
