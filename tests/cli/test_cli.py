"""The command line, as a user types it."""

import json
from importlib.resources import files
from pathlib import Path

import gymnasium as gym
import pytest
import yaml

from tokenenv import __version__
from tokenenv.cli import Train, load_config, main, save_config
from tokenenv.registration import TASKS
from tokenenv.rewards.designs import DESIGNS

ASSETS = Path(str(files("tokenenv.envs"))) / "assets"
SMALL = [
    "--num-envs",
    "8",
    "--total-tokens",
    "300",
    "--agent.batch-tokens",
    "100",
    "--agent.epochs",
    "1",
]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run folder that `tokenenv train` made."""
    folder = tmp_path_factory.mktemp("runs") / "x"
    main(
        [
            "train",
            *SMALL,
            "--reward",
            "delta",
            "--options",
            "max_new_tokens",
            "6",
            "--run-dir",
            str(folder),
        ]
    )
    return folder


def episodes_of(folder):
    return [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]


def test_a_run_folder_holds_everything(run_dir):
    names = {path.name.split(".")[0] for path in run_dir.iterdir()}
    assert {"config", "checkpoint", "episodes", "events"} <= names
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["reward"] == "delta"
    assert config["agent"]["batch_tokens"] == 100
    assert all(episode["length"] <= 6 for episode in episodes_of(run_dir))


def test_a_config_reruns_its_run(run_dir, tmp_path):
    main(["train", "--config", str(run_dir / "config.yaml"), "--run-dir", str(tmp_path / "again")])
    assert episodes_of(tmp_path / "again") == episodes_of(run_dir)


def test_flags_override_the_config(run_dir, tmp_path):
    flags = ["--total-tokens", "100", "--agent.seed", "3"]
    main(
        [
            "train",
            "--config",
            str(run_dir / "config.yaml"),
            "--run-dir",
            str(tmp_path / "other"),
            *flags,
        ]
    )
    config = load_config(tmp_path / "other" / "config.yaml")
    assert (config.total_tokens, config.agent.seed, config.reward) == (100, 3, "delta")


def test_resuming_goes_on_from_the_checkpoint(tmp_path):
    main(["train", *SMALL, "--run-dir", str(tmp_path / "x")])
    before = episodes_of(tmp_path / "x")
    main(["train", "--resume", str(tmp_path / "x"), "--total-tokens", "600"])
    after = episodes_of(tmp_path / "x")
    assert after[: len(before)] == before
    assert after[-1]["tokens_seen"] >= 600


def test_evaluate_compares_with_the_reference(run_dir, capsys):
    main(["evaluate", str(run_dir), "--num-texts", "8", "--examples", "1"])
    printed = capsys.readouterr().out
    for word in ("before", "after", "gold", "KL, nats per text", "distinct bigrams"):
        assert word in printed


def test_evaluate_watches_what_the_run_did_not(run_dir, capsys):
    """The checkpoint holds running texts, which only the run's own `watch=` fits."""
    watch = ["--options", "watch", "{even: uniform}"]
    main(["evaluate", str(run_dir), "--num-texts", "4", "--examples", "0", *watch])
    assert "watch: even, per token" in capsys.readouterr().out


def asked_first(folder, capsys, *options):
    """The first prompt that `tokenenv evaluate` prints."""
    capsys.readouterr()
    main(["evaluate", str(folder), "--num-texts", "2", "--examples", "1", "--options", *options])
    return next(line for line in capsys.readouterr().out.splitlines() if line.endswith(" …"))


def test_evaluate_asks_for_the_split_that_it_is_told(run_dir, capsys):
    train = asked_first(run_dir, capsys, "split", "train")
    assert train != asked_first(run_dir, capsys, "split", "test")


def test_evaluate_asks_for_other_prompts_and_finds_the_runs_own_where_they_have_gone(
    tmp_path, capsys
):
    own, other = tmp_path / "own.txt", tmp_path / "other.txt"
    own.write_text("the pizza")
    other.write_text("the waiter")
    models = ["model", str(ASSETS / "reviews-lm"), "reward_model", str(ASSETS / "reviews-reward")]
    options = [*models, "prompts", str(own), "max_new_tokens", "6", "max_prompt_tokens", "8"]
    main(
        [
            "train",
            *SMALL,
            "--env",
            "tokenenv/TextGen-v0",
            "--options",
            *options,
            "--run-dir",
            str(tmp_path / "x"),
        ]
    )
    assert asked_first(tmp_path / "x", capsys, "prompts", str(other)) == "the waiter …"
    own.rename(tmp_path / "moved.txt")
    assert (
        asked_first(tmp_path / "x", capsys, "prompts", str(tmp_path / "moved.txt")) == "the pizza …"
    )


def test_a_run_writes_how_long_its_prompts_may_be_and_goes_on_with_that(tmp_path, capsys):
    """The spaces of a run that goes on are those it began with, whatever its options left open."""
    prompts, other, folder = tmp_path / "p.txt", tmp_path / "other.txt", tmp_path / "x"
    prompts.write_text("the pizza\nthe waiter said\n")
    other.write_text("the waiter said good morning to my sister\n")
    models = ["model", str(ASSETS / "reviews-lm"), "reward_model", str(ASSETS / "reviews-reward")]
    options = [*models, "prompts", str(prompts), "max_new_tokens", "6"]
    env = ["--env", "tokenenv/TextGen-v0", "--options", *options]
    main(["train", *SMALL, *env, "--run-dir", str(folder)])
    saved = load_config(folder / "config.yaml")
    assert saved.options["max_prompt_tokens"] == 3
    assert load_config(folder / "config.yaml").make_envs().token_spec.max_prompt_tokens == 3
    main(["train", "--resume", str(folder), "--total-tokens", "400"])
    assert saved.options == load_config(folder / "config.yaml").options

    # Prompts to evaluate may be longer than those of the run, unless a number says otherwise.
    long = other.read_text().strip() + " …"
    assert asked_first(folder, capsys, "prompts", str(other)) == long
    with pytest.raises(SystemExit):
        asked_first(folder, capsys, "prompts", str(other), "max_prompt_tokens", "3")
    assert "max_prompt_tokens=3" in capsys.readouterr().err
    cut = ["max_prompt_tokens", "3", "long_prompts", "truncate"]
    assert asked_first(folder, capsys, "prompts", str(other), *cut) == "to my sister …"


def test_evaluate_says_how_far_the_optimum_is_where_it_is_known(tmp_path, capsys):
    env = ["--env", "tokenenv/Negation-v0", "--options", "max_new_tokens", "5"]
    main(["train", *SMALL, *env, "--run-dir", str(tmp_path / "x")])
    main(["evaluate", str(tmp_path / "x"), "--num-texts", "8"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "J = score - 0.05 KL: " in printed
    assert "at the optimum" in printed


def test_envs_rewards_and_version(capsys):
    main(["envs"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in TASKS)
    flat = " ".join(printed.replace("│", " ").split())
    prompts = gym.make_vec("tokenenv/PyDocs-v0", num_envs=1).unwrapped.identity["prompts"]
    assert len(prompts) > 8
    assert all(word in flat for word in prompts.split())  # the number and the digest
    main(["rewards"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in DESIGNS)
    assert "Rule(f, dense=True)" in printed
    main(["version"])
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--env", "tokenenv/Review-v0"], "Did you mean 'tokenenv/Reviews-v0'"),
        (["train", "--config", "nowhere.yaml"], "config='nowhere.yaml' is not a file"),
        (["train", "--reward", "tokne"], "Did you mean 'token'"),
        (["train", "--agent.lr", "-1"], "lr=-1"),
        (["evaluate", "nowhere"], "is not a file"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing_behind(
    argv, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.split())
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_an_unknown_key_in_a_config_is_named(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    save_config(Train(), path)
    path.write_text(path.read_text() + "totl_tokens: 3\n")
    with pytest.raises(SystemExit):
        main(["train", "--config", str(path)])
    assert "Did you mean 'total_tokens'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "command", [[], ["train"], ["evaluate"], ["show"], ["envs"], ["rewards"], ["version"]]
)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert "usage: tokenenv" in capsys.readouterr().out
