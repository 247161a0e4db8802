"""A run that Python made is one of the command line's: its folder says how to make it again, and
what of it has no name."""

import copy
import json
import sys
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import yaml
from toy_env import ToyEnv

from tokenenv import plugins
from tokenenv.agents import GRPO, PPO, LMPolicy, agent
from tokenenv.cli import load_config, main
from tokenenv.errors import InvalidArgument
from tokenenv.plugins import name_of
from tokenenv.rewards import Rule

MODEL = str(files("tokenenv.envs") / "assets" / "reviews-lm")
SMALL = {"batch_tokens": 20, "epochs": 1, "minibatches": 1}
MINE = """
def brief(prompt, response):
    return -len(response) / 10


def words(prompt, response):
    return float(len(response.split()))


def nothing(prompt, response):
    pass


asked = []


def later_nothing(prompt, response):
    asked.append(response)
    return 1.0 if len(asked) < 30 else None


class Holder:
    @staticmethod
    def inner(prompt, response):
        return 1.0


mixture = {"a": (brief, 0.5)}
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's in the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "mine.py").write_text(MINE)
    import mine

    yield mine
    del sys.modules["mine"]


def negation(**options):
    return gym.make_vec("tokenenv/Negation-v0", num_envs=4, max_new_tokens=4, **options)


def textgen(**options):
    given = {"model": MODEL, "prompts": ["the pizza", "the waiter"], "max_new_tokens": 4}
    return gym.make_vec("tokenenv/TextGen-v0", num_envs=4, **given | options)


def config(folder="x"):
    return yaml.safe_load((Path(folder) / "config.yaml").read_text())


def error_of(capsys, *argv):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return " ".join(error.split())


def test_a_run_of_python_is_made_again_evaluated_shown_and_gone_on_with(mine, capsys):
    envs = negation(kl_coef=0.1, reward={"a": ("delta", 0.5), "b": "terminal"})
    PPO(envs, run_dir="x", **SMALL).learn(40)
    assert config()["reward"] == "{a: [delta, 0.5], b: terminal}"
    assert {"config.yaml", "checkpoint", "episodes.jsonl"} <= {p.name for p in Path("x").iterdir()}
    main(["train", "--config", "x/config.yaml", "--run-dir", "y"])
    assert Path("y/episodes.jsonl").read_text() == Path("x/episodes.jsonl").read_text()
    main(["evaluate", "x", "--num-texts", "4"])
    main(["show", "x"])
    main(["train", "--resume", "x", "--total-tokens", "80"])
    assert json.loads(Path("x/episodes.jsonl").read_text().splitlines()[-1])["tokens_seen"] >= 80


LATE = ["--env", "tokenenv/Reviews-v0", "--num-envs", "4", "--total-tokens", "400"]
LATE += ["--agent.batch-tokens", "40", "--options", "max_new_tokens", "4"]


def test_a_run_that_fails_before_it_has_learned_leaves_nothing_behind(mine, capsys):
    Path("kept").mkdir()
    Path("kept/notes.txt").write_text("mine")
    for folder in ("x", "kept"):
        run = ["train", *LATE, "--reward", "mine:nothing", "--run-dir", folder]
        assert "returned None" in error_of(capsys, *run)
    assert not Path("x").exists()
    assert [path.name for path in Path("kept").iterdir()] == ["notes.txt"]
    assert "returned None" in error_of(capsys, "train", *LATE, "--reward", "mine:nothing")
    assert not list(Path("runs").iterdir())


def test_a_run_that_fails_later_keeps_what_it_has(mine, capsys):
    run = ["train", *LATE, "--reward", "mine:later_nothing", "--run-dir", "x"]
    assert "returned None" in error_of(capsys, *run)
    assert {"config.yaml", "checkpoint", "episodes.jsonl"} <= {p.name for p in Path("x").iterdir()}


def test_a_learning_rate_that_was_chosen_is_chosen_anew(mine, monkeypatch):
    """Another run from the same config may train other weights."""
    rates = iter([5e-4, 2e-4, 1e-4, 5e-5])
    monkeypatch.setattr(agent, "default_lr", lambda policy: next(rates))
    PPO(negation(), run_dir="x", **SMALL).learn(20)
    main(["train", "--config", "x/config.yaml", "--run-dir", "y"])
    PPO.load("y/checkpoint", negation(), run_dir="y").learn(40)
    main(["train", "--resume", "y", "--total-tokens", "60"])
    main(["train", "--config", "y/config.yaml", "--run-dir", "z", "--agent.lr", "3e-4"])
    for folder, lr, chosen in (("x", None, 5e-4), ("y", None, 2e-4), ("z", 3e-4, 3e-4)):
        assert config(folder)["agent"]["lr"] == lr
        assert config(folder)["made_with"]["lr"] == chosen


def test_functions_are_named_by_their_module_and_have_to_be_said_again(mine, capsys):
    given = {"reward": {"mine": (mine.brief, 2.0)}, "gold": Rule(mine.words)}
    envs = textgen(**given, watch={"w": mine.words})
    PPO(envs, run_dir="x", **SMALL).learn(20)
    assert config()["reward"] == "{mine: ['mine:brief', 2.0]}"
    assert config()["gold"] == "mine:words"
    assert config()["options"]["watch"] == "{w: 'mine:words'}"
    assert config()["options"]["prompts"] == ["the pizza", "the waiter"]
    error = error_of(capsys, "evaluate", "x", "--num-texts", "4")
    for flag in ("--reward '{mine:", "--gold mine:words", "--options watch '{w:"):
        assert flag in error
    again = ["--reward", config()["reward"], "--gold", "mine:words"]
    again += ["--options", "watch", config()["options"]["watch"]]
    main(["evaluate", "x", "--num-texts", "4", *again])
    printed = capsys.readouterr().out
    assert "gold" in printed
    assert "watch: w, per token" in printed
    main(["train", "--resume", "x", "--total-tokens", "40", *again])
    printed = capsys.readouterr().out
    assert "tokenenv evaluate x --reward '{mine: " in printed
    assert "--gold mine:words" in printed


NAMELESS = {
    "a lambda": lambda mine: ({"reward": lambda p, r: 0.0}, "reward is the function", "--reward"),
    "a rule with options": lambda mine: (
        {"reward": Rule(mine.brief, dense=True)},
        "reward is a Rule of the function brief with options",
        "--reward",
    ),
    "a mixture": lambda mine: (
        {"reward": {"a": (mine.brief, lambda seen: 1.0)}},
        "reward is the function",
        "--reward",
    ),
    "a tokenizer": lambda mine: (
        {"tokenizer": textgen(reward=mine.brief).unwrapped.token_spec.tokenizer},
        f"(from '{MODEL}')",
        "--options tokenizer",
    ),
    "many prompts": lambda mine: (
        {"prompts": ["the pizza"] * 1001},
        "options.prompts is a list of 1001, which has no name on the command line",
        "--options prompts FILE",
    ),
}


@pytest.mark.parametrize("make", NAMELESS.values(), ids=NAMELESS)
def test_what_has_no_name_is_said_in_the_file_and_by_the_command_that_needs_it(make, mine, capsys):
    options, what, flag = make(mine)
    PPO(textgen(**{"reward": mine.brief} | options), run_dir="x", **SMALL).learn(20)
    [(name, sentence)] = config()["no_name"].items()
    assert what in f"{name} is {sentence}"
    assert f"name one: {flag}" in sentence
    for argv in (["evaluate", "x"], ["train", "--resume", "x"]):
        assert f"x/config.yaml: {name} is {sentence}." in error_of(capsys, *argv)
    main(["show", "x"])


def test_a_part_without_a_name_may_be_named_where_a_run_is_evaluated(mine, capsys):
    envs = textgen(reward=lambda p, r: 0.0, gold=lambda p, r: 0.0, prompts=["the pizza"] * 1001)
    PPO(envs, run_dir="x", **SMALL).learn(20)
    Path("other.txt").write_text("the bread\n")
    named = ["--reward", "mine:brief", "--eval-prompts", "other.txt", "--num-texts", "4"]
    main(["evaluate", "x", *named])
    done = capsys.readouterr()
    assert "prompts: other.txt" in done.out
    assert "gold" not in done.out
    assert "gold is the function" in done.err  # which is left out: nothing depends on it
    assert "it is left out" in done.err


def test_the_env_and_the_policy_may_have_no_name(mine, capsys):
    PPO(gym.vector.VectorWrapper(negation()), run_dir="a", **SMALL).learn(20)
    assert "env is a VectorWrapper, which the command line cannot make" in error_of(
        capsys, "evaluate", "a"
    )
    PPO(ToyEnv(4), run_dir="b", **SMALL).learn(20)
    assert "env is a ToyEnv" in error_of(capsys, "train", "--resume", "b")
    envs = textgen(reward=mine.brief)
    again = ["--reward", "mine:brief"]
    frozen = LMPolicy(copy.deepcopy(envs.unwrapped.model))
    frozen.value_head.requires_grad_(False)
    PPO(envs, run_dir="c", policy=frozen, **SMALL).learn(20)
    for argv in (["evaluate", "c"], ["train", "--resume", "c"]):
        assert "The run trained a policy of one's own" in error_of(capsys, *argv, *again)
    whole = LMPolicy(
        copy.deepcopy(envs.unwrapped.model)
    )  # which is what the command line makes, too
    PPO(envs, run_dir="d", policy=whole, **SMALL).learn(20)
    main(["evaluate", "d", "--num-texts", "4", *again])
    assert "policy" not in capsys.readouterr().err


def test_a_run_that_python_goes_on_with_keeps_its_words(mine):
    names = ["--env", "tokenenv/Negation-v0", "--reward", "mine:mixture", "--num-envs", "4"]
    small = ["--agent.batch-tokens", "20", "--options", "max_new_tokens", "4"]
    main(["train", *names, *small, "--total-tokens", "20", "--run-dir", "x"])
    envs = load_config(Path("x/config.yaml"), reward="mine:mixture").make_envs()
    PPO.load("x/checkpoint", envs, run_dir="x", max_batch_tokens=999).learn(60)
    after = config()
    assert after["reward"] == "mine:mixture"
    assert (after["total_tokens"], after["agent"]["max_batch_tokens"]) == (60, 999)
    main(["train", "--resume", "x", "--reward", "mine:mixture", "--total-tokens", "80"])


def test_groups_and_modes_are_those_of_the_env(mine):
    GRPO(negation(group_size=2, kl="none"), run_dir="x", **SMALL).learn(20)
    assert config()["algo"] == "grpo"
    wanted = {"group_size": 2, "autoreset_mode": "NextStep", "kl": "none"}
    assert config()["options"] | wanted == config()["options"]
    assert "kl_coef" not in config()["options"]
    main(["train", "--resume", "x", "--total-tokens", "40"])


def test_checkpoints_are_written_at_the_end_and_as_often_as_is_asked(mine, monkeypatch):
    saved = []
    save = PPO.save
    monkeypatch.setattr(
        PPO, "save", lambda agent, path: (saved.append(agent.updates), save(agent, path))
    )
    PPO(ToyEnv(4), run_dir="x", **SMALL).learn(60)
    assert len(saved) == 1
    assert saved[0] > 1
    del saved[:]
    agent = PPO(ToyEnv(4), run_dir="y", **SMALL).learn(60, checkpoint_every=1)
    assert saved == list(range(agent.updates + 1))
    PPO(ToyEnv(4), **SMALL).learn(20, checkpoint_every=1)
    assert len(saved) == agent.updates + 1  # nowhere to write

    def failing(metrics, episodes):
        raise KeyboardInterrupt

    del saved[:]
    with pytest.raises(KeyboardInterrupt):
        PPO(ToyEnv(4), run_dir="z", **SMALL).learn(60, on_update=failing)
    assert saved == []


def test_a_run_that_has_ended_leaves_no_empty_events(mine):
    PPO(negation(), run_dir="x", **SMALL).learn(20)
    before = sorted(path.name for path in Path("x").iterdir())
    main(["train", "--resume", "x"])
    assert sorted(path.name for path in Path("x").iterdir()) == before


# ---------------------------------------------------------------- names


def test_names_lead_back_to_what_they_name(mine, monkeypatch):
    for found in (mine.brief, mine.Holder.inner, mine.Holder, np.dot, PPO):
        name = name_of(found)
        assert name is None or plugins.load_name(name, "x") is found
    assert name_of(mine.Holder.inner) == "mine:Holder.inner"
    for nameless in (lambda: 0, mine.Holder().__repr__, 3, "mine:brief", Rule(mine.brief)):
        assert name_of(nameless) is None
    mine.brief.__qualname__ = "words"  # as a decorator may leave it
    assert name_of(mine.brief) is None


def test_a_function_of_a_script_has_the_name_of_its_file(monkeypatch):
    def reward(prompt, response):
        return 0.0

    reward.__module__, reward.__qualname__ = "__main__", "reward"
    for made, wanted in {
        ("/home/me/train.py", None): "train:reward",
        ("/home/me/train-it.py", None): None,
        (None, None): None,
        ("/x/pkg/run.py", "pkg.run"): "pkg.run:reward",
    }.items():
        script = SimpleNamespace(reward=reward)
        script.__spec__ = made[1] and SimpleNamespace(name=made[1])
        if made[0] is not None:
            script.__file__ = made[0]
        monkeypatch.setitem(sys.modules, "__main__", script)
        assert name_of(reward) == wanted, made


def test_an_id_of_ones_own_is_named_by_the_module_of_its_task(mine, monkeypatch):
    import tokenenv
    from tokenenv.envs.tasks.negation import task

    def own(**options):
        return task(max_new_tokens=4, **options)

    monkeypatch.setitem(gym.registry, "mine/Own-v0", None)
    del gym.registry["mine/Own-v0"]
    tokenenv.register("mine/Own-v0", own)
    envs = gym.make_vec("mine/Own-v0", num_envs=2)
    assert "env" in envs.as_typed.no_name
    own.__module__, own.__qualname__ = "mine", "own"
    mine.own = own
    assert envs.as_typed.values["env"] == "mine:mine/Own-v0"
    again = gym.make_vec("tokenenv/Negation-v0", num_envs=2, task=own)
    assert again.as_typed.values["options"]["task"] == "mine:own"
    direct = type(envs)(2, task=own)
    assert "gym.make_vec did not make" in direct.as_typed.no_name["env"]
    del gym.registry["mine/Own-v0"]


def test_sentences_are_data(mine, capsys):
    PPO(negation(), run_dir="x", **SMALL).learn(20)
    path = Path("x/config.yaml")
    path.write_text(path.read_text() + "no_name: [reward]\n")
    with pytest.raises(InvalidArgument, match="is no mapping of names to values"):
        load_config(path)
