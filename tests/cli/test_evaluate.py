"""`tokenenv evaluate`: which prompts are asked, what is printed of them, and what it costs."""

import json
import re
import shutil
import sys
import time
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from tokenenv.agents import PPO, load_policy
from tokenenv.agents.run.evaluate import summarise
from tokenenv.cli import console as printing
from tokenenv.cli import evaluate as command
from tokenenv.cli import load_config, main
from tokenenv.cli.evaluate import comparison, show_examples
from tokenenv.envs import textgen

MODEL = str(files("tokenenv.envs") / "assets" / "reviews-lm")
REWARD_MODEL = str(files("tokenenv.envs") / "assets" / "reviews-reward")
MINE = """
calls = []


def words(prompt, response):
    calls.append(prompt)
    return float(len(response.split()))


number = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current directory with the run of `trained` in x, a module and two files of prompts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setenv("COLUMNS", "200")
    Path("mine.py").write_text(MINE)
    Path("own.txt").write_text("the pizza\nthe soup\n")
    Path("held.jsonl").write_text('{"question": "the waiter said"}\n')
    yield tmp_path
    for name in ("mine", "answers"):
        sys.modules.pop(name, None)


def trained(*more, options=()):
    given = ["model", MODEL, "reward_model", REWARD_MODEL, "prompts", "own.txt", *options]
    small = ["--num-envs", "4", "--total-tokens", "20", "--agent.batch-tokens", "10"]
    small += ["--agent.epochs", "1", "--run-dir", "x"]
    env = ["--env", "tokenenv/TextGen-v0", "--options", *given, "max_new_tokens", "4"]
    main(["train", *small, *env, *more])


def evaluated(capsys, *argv):
    """What `tokenenv evaluate x` prints, in words, and its first prompts."""
    capsys.readouterr()
    main(["evaluate", "x", "--num-texts", "8", "--examples", "2", *argv])
    printed = capsys.readouterr().out
    prompts = [line.removesuffix(" …") for line in printed.splitlines() if line.endswith(" …")]
    return " ".join(printed.replace("│", " ").split()), prompts


def error_of(capsys, *argv):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_prompts_of_the_training_are_not_called_held_out(here, capsys):
    trained()
    printed, prompts = evaluated(capsys)
    assert "prompts: those of the training (none is held out)" in printed
    assert sorted(prompts) == ["the pizza", "the soup"]  # and not one of them twice
    held_out = ["--options", "prompt_column", "question"]
    printed, prompts = evaluated(capsys, "--eval-prompts", "held.jsonl", *held_out)
    assert "prompts: held.jsonl" in printed
    assert prompts == ["the waiter said"] * 2
    again = ["--eval-prompts", "held.jsonl", "--options", "prompts", "own.txt"]
    assert "two sets of prompts" in error_of(capsys, "evaluate", "x", *again)


def test_a_run_keeps_its_gold_and_the_prompts_to_evaluate(here, capsys):
    Path("eval.txt").write_text("the bread was\n")
    trained("--gold", "mine:words", "--eval-prompts", "eval.txt")
    values = yaml.safe_load(Path("x/config.yaml").read_text())
    assert (values["gold"], values["eval_prompts"]) == ("mine:words", "eval.txt")
    asked = set(sys.modules["mine"].calls)
    assert asked == {"the pizza", "the soup"}
    assert "--gold mine:words" in error_of(capsys, "evaluate", "x")
    printed, prompts = evaluated(capsys, "--gold", "mine:words")
    assert "prompts: eval.txt" in printed
    assert prompts[0] == "the bread was"
    assert "gold" in printed
    main(["train", "--resume", "x", "--gold", "mine:words", "--total-tokens", "40"])
    values = yaml.safe_load(Path("x/config.yaml").read_text())
    assert (values["gold"], values["eval_prompts"]) == ("mine:words", "eval.txt")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gold", "mine:number"], "gold='mine:number' must be a function"),
        (["--gold", "words"], "gold='words' is not of the form module:Name"),
        (["--eval-prompts", "nowhere.txt"], "eval_prompts='nowhere.txt' is not a file"),
        (["--eval-prompts", "held.jsonl"], "held.jsonl:1 holds no 'prompt'"),
        (["--reward", "words"], "A function of yours is module:function."),
        (["--agent.learning-rate", "1"], "it is called 'lr' here"),
        (["--env", "tokenenv/Negation-v0", "--gold", "mine:words"], "--gold is for envs with"),
        (["--env", "tokenenv/Negation-v0", "--eval-prompts", "own.txt"], "--eval-prompts is for"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_sentence(flags, message, here, capsys):
    options = ["model", MODEL, "prompts", "own.txt"] if "--env" not in flags else []
    env = [] if "--env" in flags else ["--env", "tokenenv/TextGen-v0"]
    argv = ["train", *env, *flags, "--options", *options, "--run-dir", "new"]
    assert message in error_of(capsys, *argv)
    assert not Path("new").exists()


def test_each_model_is_loaded_once_and_paid_as_is_asked(here, capsys, monkeypatch):
    trained()
    loaded = []
    load = textgen.load_causal_lm
    monkeypatch.setattr(
        textgen, "load_causal_lm", lambda model, **k: loaded.append(model) or load(model, **k)
    )
    printed, _ = evaluated(capsys, "--reward", "mine:words")
    assert loaded == [MODEL]
    assert "reward: rule, per text" in printed
    assert "reward: token, per text" not in printed
    assert evaluated(capsys)[0].count("reward: token, per text") == 1


def test_a_split_is_held_out_only_if_the_run_had_another(here, capsys):
    flags = ["--num-envs", "4", "--total-tokens", "20", "--agent.batch-tokens", "10"]
    options = ["--options", "max_new_tokens", "4"]
    main(["train", *flags, *options, "--run-dir", "x"])
    assert "prompts: held out by the task (split=test)" in evaluated(capsys)[0]
    train = evaluated(capsys, "--options", "split", "train")[0]
    assert "prompts: those of the training (none is held out)" in train


def test_answers_from_a_column_are_paid_and_measured(here, capsys):
    """A verifiable reward: the prompts' file has the answers, those to evaluate have theirs, and the
    single rule is the score. The same run from Python is the same run."""
    examples = Path(__file__).parents[2] / "examples"
    for name in ("answers.py", "sums.jsonl", "sums_held_out.jsonl"):
        shutil.copy(examples / name, name)
    named = ["--reward", "answers:right", "--gold", "answers:right"]
    options = ["model", MODEL.replace("reviews", "arithmetic"), "prompts", "sums.jsonl"]
    small = ["--num-envs", "8", "--total-tokens", "60", "--agent.batch-tokens", "30"]
    train = ["train", *small, "--env", "tokenenv/TextGen-v0", "--options", *options]
    train += ["max_new_tokens", "4", "--eval-prompts", "sums_held_out.jsonl"]
    main([*train, *named, "--run-dir", "x"])
    texts = [json.loads(line) for line in Path("x/episodes.jsonl").read_text().splitlines()]
    for text in texts:
        right = text["response"].removesuffix("<eos>").strip() == text["columns"]["answer"]
        assert text["score"] == text["gold"] == float(right)
    assert {text["score"] for text in texts} == {0.0, 1.0}
    printed, prompts = evaluated(capsys, *named)
    assert "prompts: sums_held_out.jsonl" in printed
    gold, score = (re.search(rf"{name} (\S+) ± \S+ (\S+) ±", printed) for name in ("gold", "score"))
    assert gold.groups() == score.groups()
    held_out = Path("sums_held_out.jsonl").read_text()
    assert all(f'"{prompt}"' in held_out for prompt in prompts)
    made = load_config(Path("x/config.yaml"), reward=named[1], gold=named[3])
    PPO(made.make_envs(), made.agent, run_dir="y").learn(60)
    assert Path("y/episodes.jsonl").read_text() == Path("x/episodes.jsonl").read_text()
    values = yaml.safe_load(Path("y/config.yaml").read_text())
    assert (values["reward"], values["gold"]) == ("answers:right", "answers:right")


def test_a_figure_that_does_not_exist_has_no_row():
    texts = [SimpleNamespace(gold=np.nan, score=np.nan, kl=np.nan, terms={}, watched={})] * 2
    for text in texts:
        text.response = text.places = np.arange(3)
        text.terminated = True
    one = summarise(texts)
    with Console(width=200, record=True, file=open("/dev/null", "w")) as out:
        out.print(comparison({"before": one, "after": one}, "[red]prompts"))
    printed = out.export_text()
    assert "[red]prompts" in printed
    for name in ("gold", "score", "KL", "nan"):
        assert name not in printed
    assert "mean length" in printed


class Words:
    """A tokenizer whose tokens are words."""

    words = ("<s>user", "one", "two", "<s>assistant")

    def decode(self, tokens, skip_special_tokens=True):
        return " ".join(self.words[token] for token in tokens)


def test_examples_show_different_prompts_and_the_last_message_alone(capsys):
    chats = {(0, 1, 3): [{"role": "user", "content": "no"}, {"role": "user", "content": "one"}]}
    spec = SimpleNamespace(tokenizer=Words(), chats=SimpleNamespace(messages=chats.get))
    spec.chats.messages = lambda ids: chats.get(tuple(ids))

    def text(*prompt):
        ids = np.array(prompt)
        return SimpleNamespace(prompt=ids, after_prompt=np.array([1]), gold=np.nan, score=np.nan)

    one = SimpleNamespace(episodes=[text(0, 1, 3), text(0, 1, 3), text(1, 2), text(0, 1, 3)])
    for count, wanted in {2: ["one …", "one two …"], 3: ["one …", "one two …", "one …"]}.items():
        show_examples({"after": one}, spec, count)
        lines = capsys.readouterr().out.splitlines()
        assert lines[1::3] == wanted
        assert lines[2] == "  after: one"  # and no figure that is not known


def test_what_takes_long_says_how_far_it_is(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with printing.counting("after") as on_text:
        for second in (1, 2, 3, 11, 12):
            now[0] = second
            on_text(second, 12)
    done = capsys.readouterr()
    assert done.err == "after: 2 of 12 texts\nafter: 12 of 12 texts\n"
    assert done.out == ""


def test_both_policies_are_counted(here, capsys, monkeypatch):
    trained()
    counted = []
    counting = command.counting

    def recording(label):
        counted.append([label])
        return counting(label)

    monkeypatch.setattr(command, "counting", recording)
    evaluated(capsys)
    assert counted == [["before"], ["after"]]


def test_a_policy_is_taken_into_an_env_with_another_reward(here):
    def make(num_envs, **options):
        return gym.make_vec("tokenenv/Negation-v0", num_envs=num_envs, max_new_tokens=4, **options)

    agent = PPO(make(4, reward="delta"), batch_tokens=20, lr=0.1).learn(20)
    agent.save("c")
    policy = load_policy("c", make(3, reward="terminal", kl="none"))
    assert torch.equal(policy.value_head.weight, agent.policy.value_head.weight)
    assert all(
        torch.equal(a, b)
        for a, b in zip(policy.parameters(), agent.policy.parameters(), strict=True)
    )
    again = PPO(make(2), policy=policy, batch_tokens=20).learn(20)
    assert again.updates == 1
