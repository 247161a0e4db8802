"""`tokenenv plan`: what it says beside what a run really has in memory."""

from functools import partial

import fakes
import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tokenenv.agents import PPO
from tokenenv.agents.algorithms.ppo import PPOConfig
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning import learner
from tokenenv.agents.learning.learner import outputs
from tokenenv.agents.learning.peak import learning_peak, longest
from tokenenv.agents.rollout.make import default_policy
from tokenenv.cli import main
from tokenenv.cli.plan import LIBRARIES, Plan, parts, plan, share
from tokenenv.cli.train import Train
from tokenenv.errors import InvalidArgument
from tokenenv.models.memory import LiveMemory, Places
from tokenenv.models.shapes import shapes_only

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
N, T = 3, 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    made = {
        "policy": fakes.causal_lm(**sizes),
        "gemma": fakes.causal_lm("gemma2"),
        "other": fakes.causal_lm(seed=5, num_hidden_layers=1),
        "reward": fakes.reward_model("token"),
    }
    (root / "prompts.txt").write_text("the cat\na good dog\n")
    named = {name: fakes.saved(one, root / name) for name, one in made.items()}
    return named | {"prompts": str(root / "prompts.txt")}


def run_of(folders, agent=None, reward=None, **options):
    given = {"model": folders["policy"], "prompts": folders["prompts"], "max_new_tokens": str(T)}
    given |= {key: folders[value] for key, value in options.items()}
    return Train(
        env="tokenenv/TextGen-v0",
        num_envs=N,
        options=given,
        reward=reward,
        agent=PPOConfig(**{"lora_rank": 2, "batch_tokens": 20 * T} | (agent or {})),
    )


CASES = {
    "lora": ({}, {}),
    "all weights": ({"agent": {"lora_rank": 0}}, {}),
    "a trunk for the critic": ({"agent": {"separate_value": True}}, {}),
    "a reward model": ({}, {"reward_model": "reward"}),
    "a reference of its own": ({}, {"reference": "other"}),
    "a teacher": ({"agent": {"distill_coef": 0.1}, "reward": "distill"}, {"teacher": "other"}),
    "soft caps and windows": ({"agent": {"full_kl_coef": 0.1}}, {"model": "gemma"}),
    "attention": ({"reward": "attention"}, {"reward_model": "reward"}),
    "gradient": ({"reward": "gradient"}, {"reward_model": "reward"}),
}


@pytest.mark.parametrize("name", CASES)
def test_weights_and_caches_are_planned_exactly(name, folders):
    settings, options = CASES[name]
    run = run_of(folders, **settings, **options)
    planned = plan(run)
    assert planned.pop(LIBRARIES) > 2**20
    envs = run.make_envs()
    agent = PPO(envs, run.agent)
    agent.collector.reset()
    agent.collector.step()
    every = [*envs.unwrapped.frozen_models.values(), envs.unwrapped.model, agent.policy]
    if envs.unwrapped._task.scorer is not None:
        every.append(envs.unwrapped._task.scorer.head.linear)
    weights = sum(size for part, size in planned.items() if part.startswith("weights"))
    assert weights == Places().new_bytes(*every)
    assert planned["caches: env"] == envs.unwrapped.cache_bytes
    assert planned["caches: policy"] == agent.actor._slots.cache_bytes
    agent.learn(N * T)
    state = agent.optimizer.state.values()
    moments = sum(one[key].nbytes for one in state for key in ("exp_avg", "exp_avg_sq"))
    assert planned["optimizer"] == moments == 2 * planned["gradients"]


def allocated(run):
    """The most bytes that torch's allocator gives out at a time while this runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([event.nbytes() for event in events]).max())


@pytest.mark.parametrize("name", ["lora", "all weights", "a trunk for the critic"])
def test_what_a_micro_batch_takes_is_planned_within_a_bound(name, folders):
    """On a model of three layers; docs/your-model.md has the figures of a real one."""
    settings, options = CASES[name]
    run = run_of(folders, **settings, **options)
    with shapes_only():
        envs = run.make_envs()
        shapes = default_policy(envs, run.agent)
    length = envs.unwrapped.token_spec.max_length
    planned = learning_peak(shapes, run.agent, length, T)
    assert all(weight.is_meta for weight in shapes.model.model.embed_tokens.parameters())

    policy = default_policy(run.make_envs(), run.agent)
    batch = EpisodeBatch.stack([longest(length, T)] * 5)  # a quarter of the 20 texts

    def learn():
        out = outputs(policy, batch, np.arange(5))
        (out.logprob + out.entropy + out.value).sum().backward()

    learn()
    measured = allocated(learn)
    assert measured / 1.3 <= planned <= 1.3 * measured


def test_more_tokens_at_once_take_more_and_a_limit_bounds_them(folders):
    runs = [
        {"batch_tokens": 20 * T},
        {"batch_tokens": 40 * T},
        {"batch_tokens": 40 * T, "max_batch_tokens": 100},
    ]
    few, many, bounded = (plan(run_of(folders, one))["forwards and backward"] for one in runs)
    assert bounded < few < many


def test_a_vocabulary_in_chunks_is_planned(folders, monkeypatch):
    """The logits of an update do not fit into one chunk, as those of a real vocabulary."""
    run, stats = run_of(folders), learner.token_stats
    whole = plan(run)["forwards and backward"]
    monkeypatch.setattr(learner, "token_stats", partial(stats, chunk_elements=512))
    assert 0 < plan(run)["forwards and backward"] <= whole


def test_nothing_is_loaded_and_nothing_is_left_switched_on(folders, monkeypatch):
    import transformers

    read = []
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: read.append(a)
    )
    plan(run_of(folders))
    assert read == []
    monkeypatch.undo()
    weight = run_of(folders).make_envs().unwrapped.reference.model.embed_tokens.weight
    assert weight.device.type == "cpu"


def test_a_policy_with_weights_has_the_same_parts(folders):
    """Its forwards really run, through the attention that it has."""
    run = run_of(folders)
    envs = run.make_envs()
    real = parts(envs, default_policy(envs, run.agent), run.agent, learns=True)
    planned = plan(run)
    ratio = real.pop("forwards and backward") / planned.pop("forwards and backward")
    assert 1 / 1.3 < ratio < 1.3
    del planned[LIBRARIES]
    assert real == planned


def test_the_command_prints_every_part(folders, capsys):
    options = [word for pair in run_of(folders).options.items() for word in pair]
    main(["plan", "--env", "tokenenv/TextGen-v0", "--algo", "grpo", "--options", *options])
    out = capsys.readouterr().out
    assert "weights: reference" in out
    assert "optimizer" in out
    assert "together" in out
    main(["plan", "--algo", "reference", "--num-envs", "2"])
    out = capsys.readouterr().out
    assert "gradients" not in out
    assert "caches: policy" in out


def test_memory_is_counted_while_it_lives():
    before = torch.zeros(10)
    with LiveMemory() as memory:
        before.add_(1)
        view = before[:5]
        first = torch.zeros(100)
        del first
        second = view + 1
        assert (memory.live, memory.peak) == (20, 400)
        del second
    assert memory.live == 0


@pytest.mark.parametrize("command", ["plan", "train"])
def test_an_unknown_dtype_is_an_error_of_one_sentence(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([command, "--num-envs", "2", "--options", "dtype", "float8"])
    assert stop.value.code == 2
    assert "dtype='float8' is not known; allowed: bfloat16," in capsys.readouterr().err


def test_a_rank_has_its_slots_and_its_part_of_the_batch(folders):
    whole = Plan(**vars(run_of(folders)) | {"num_envs": 4})
    half, alone = (plan(share(whole, ranks)) for ranks in (2, 1))
    assert half["caches: policy"] * 2 == alone["caches: policy"]
    for name in ("gradients", "optimizer", "weights: policy, beyond those"):
        assert half[name] == alone[name]
    assert share(whole, 2).agent.batch_tokens == whole.agent.batch_tokens // 2
    with pytest.raises(InvalidArgument, match="--num-envs 4 must be a multiple of --ranks 3"):
        share(whole, 3)


def test_the_plan_of_ranks_says_what_crosses(capsys):
    main(["plan", "--env", "tokenenv/Negation-v0", "--ranks", "2", "--num-envs", "8"])
    printed = capsys.readouterr().out
    assert "MiB of each rank" in printed
    assert "a message between ranks" in printed
    with pytest.raises(SystemExit):
        main(["plan", "--env", "tokenenv/Negation-v0", "--ranks", "0"])
    assert "ranks=0 must be a whole number" in capsys.readouterr().err
