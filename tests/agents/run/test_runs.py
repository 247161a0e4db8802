"""Run folders: no run destroys another, a run goes on to where it would have ended, and damage is
said in one line."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml
from runs import same
from safetensors import SafetensorError
from toy_env import ToyEnv

from tokenenv.agents import PPO
from tokenenv.agents.run import checkpoint, files, tracking
from tokenenv.agents.run.checkpoint import read_checkpoint
from tokenenv.agents.run.files import (
    RUN_FILES,
    locked,
    new_folder,
    previous_of,
    refuse_run,
    replace_file,
)
from tokenenv.agents.run.tracking import RunFolder, cut_episodes
from tokenenv.cli import load_config, main
from tokenenv.errors import InvalidArgument, RunFolderError

SMALL = [
    "--num-envs",
    "8",
    "--options",
    "max_new_tokens",
    "4",
    "--agent.batch-tokens",
    "40",
    "--agent.epochs",
    "1",
]
FLAGS = [*SMALL, "--total-tokens", "150", "--checkpoint-every", "1"]


def train(*argv):
    main(["train", *map(str, argv)])


def refused(capsys, *argv):
    """What a command that is refused says, on one line."""
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, argv)))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return " ".join(error.split("error:", 1)[1].split())


def contents(folder):
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and path.name != "lock"
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(*FLAGS, "--run-dir", folder)
    return folder


@pytest.fixture
def run(whole, tmp_path):
    """A copy of it."""
    return shutil.copytree(whole, tmp_path / "x")


def is_equal(folder, whole):
    """Whether two runs ended alike."""
    states = [read_checkpoint(one / "checkpoint") for one in (folder, whole)]
    return (
        same(*states)
        and (folder / "episodes.jsonl").read_bytes() == (whole / "episodes.jsonl").read_bytes()
    )


# ---------------------------------------------------------------- one run a folder


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(run, capsys):
    before = contents(run)
    said = refused(capsys, "train", *FLAGS, "--run-dir", run)
    assert "holds a run (config.yaml, checkpoint, checkpoint.previous, episodes.jsonl)" in said
    assert f"tokenenv train --resume {run}" in said
    assert contents(run) == before


@pytest.mark.parametrize("name", RUN_FILES)
def test_each_file_of_a_run_tells_one(tmp_path, name):
    refuse_run(tmp_path)
    refuse_run(tmp_path / "none")
    (tmp_path / name).touch()
    with pytest.raises(InvalidArgument, match=rf"holds a run \({name}\)"):
        refuse_run(tmp_path)


def test_a_new_agent_does_not_empty_a_run_and_one_that_goes_on_does(run):
    before = (run / "episodes.jsonl").read_bytes()
    with pytest.raises(InvalidArgument, match="holds a run"):
        PPO(ToyEnv(4), run_dir=run, batch_tokens=40).learn(80)
    assert (run / "episodes.jsonl").read_bytes() == before


def test_an_agent_learns_twice_in_its_folder_and_so_does_one_that_is_loaded(tmp_path):
    agent = PPO(ToyEnv(4), run_dir=tmp_path / "x", batch_tokens=40)
    agent.save(tmp_path / "first")
    agent.learn(80).learn(160)
    lines = (tmp_path / "x" / "episodes.jsonl").read_bytes()
    PPO.load(tmp_path / "first", ToyEnv(4), run_dir=tmp_path / "x").learn(160)
    seen = [json.loads(line)["tokens_seen"] for line in lines.splitlines()]
    again = [
        json.loads(line)["tokens_seen"]
        for line in (tmp_path / "x" / "episodes.jsonl").read_bytes().splitlines()
    ]
    assert seen[0] == again[0]
    assert again == sorted(again)


def test_folders_are_made_for_one_run_each(tmp_path):
    made = []
    threads = [
        threading.Thread(target=lambda: made.append(new_folder(tmp_path / "deep" / "x")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.name for path in made) == sorted(
        ["x", *(f"x-{number}" for number in range(2, 9))]
    )


def test_runs_that_start_in_the_same_second_get_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "now")
    for _ in range(2):
        train(*SMALL, "--total-tokens", "40")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        "reviews-v0-ppo-0-now",
        "reviews-v0-ppo-0-now-2",
    ]


HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.truncate(0)
print("4321", file=file, flush=True)
print("held", flush=True)
time.sleep(10000)
"""


def test_a_folder_in_use_is_refused_until_its_process_is_dead(run, capsys):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run / "lock")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        before = contents(run)
        for argv in (["--resume", run, "--total-tokens", "250"], [*FLAGS, "--run-dir", run]):
            assert ("in use: process 4321 trains there" in refused(capsys, "train", *argv)) == (
                "--resume" in argv
            )
        with pytest.raises(RunFolderError, match="in use"):
            PPO.load(
                run / "checkpoint", load_config(run / "config.yaml").make_envs(), run_dir=run
            ).learn(250)
        assert contents(run) == before
        main(["show", str(run)])
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    train("--resume", run, "--total-tokens", "160")


def test_another_thread_is_refused_and_the_same_one_is_not(tmp_path):
    said = []

    def other():
        try:
            with locked(tmp_path):
                said.append("in")
        except RunFolderError as error:
            said.append(str(error))

    with locked(tmp_path), locked(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    other()
    assert "in use" in said[0]
    assert said[1] == "in"


# ---------------------------------------------------------------- going on


def stop_after(monkeypatch, updates):
    """Sends this process SIGTERM in the midst of an update's records."""
    write = RunFolder._write_episodes

    def writing(folder, step, episodes):
        write(folder, step, episodes)
        writing.left -= 1
        if writing.left == 0:
            signal.raise_signal(signal.SIGTERM)

    writing.left = updates
    monkeypatch.setattr(RunFolder, "_write_episodes", writing)


def test_a_run_that_was_stopped_ends_where_it_would_have(whole, tmp_path, monkeypatch):
    """As many tokens, at the same learning rates: equal to a run that nobody stopped, bit for
    bit."""
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(SystemExit) as stop:
            train(*FLAGS, "--run-dir", tmp_path / "x")
    assert stop.value.code == 128 + signal.SIGTERM
    assert not is_equal(tmp_path / "x", whole)
    train("--resume", tmp_path / "x")
    assert is_equal(tmp_path / "x", whole)


def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_anew(whole, tmp_path):
    (tmp_path / "x").mkdir()
    shutil.copy(whole / "config.yaml", tmp_path / "x")
    train("--resume", tmp_path / "x")
    assert is_equal(tmp_path / "x", whole)


def test_the_first_checkpoint_comes_before_the_first_update(tmp_path, monkeypatch):
    def failing(*_):
        raise OSError("stop here")

    monkeypatch.setattr(PPO, "update", failing)
    with pytest.raises(SystemExit):
        train(*FLAGS, "--run-dir", tmp_path / "x")
    assert read_checkpoint(tmp_path / "x" / "checkpoint")["updates"] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--agent.lr", "0.5"], "lr is 0.0003 there and 0.5 here"),
        (["--agent.temperature", "0.7"], "temperature is 1.0 there and 0.7 here"),
        (["--options", "max_new_tokens", "9"], "options.max_new_tokens is 4 there and 9 here"),
        (["--options", "kl_coef", "0.25"], "options.kl_coef is 0.2 there and 0.25 here"),
        (["--reward", "terminal"], "terms.terminal.class is 'absent' there and 'Terminal' here"),
        (["--num-envs", "4"], "num_envs is 8 there and 4 here"),
        (
            ["--env", "tokenenv/PyDocs-v0"],
            "id is 'tokenenv/Reviews-v0' there and 'tokenenv/PyDocs-v0' here",
        ),
        (["--algo", "a2c"], "--algo a2c does not fit"),
        (["--total-tokens", "100"], "--total-tokens 100 is less than the run's own 150"),
        (["--config", "config.yaml"], "leave out --config and --run-dir"),
        (["--run-dir", "other"], "leave out --config and --run-dir"),
    ],
)
def test_flags_that_contradict_the_run_are_refused(whole, capsys, flags, message):
    before = contents(whole)
    assert message in refused(capsys, "train", "--resume", whole, *flags)
    assert contents(whole) == before


def test_a_run_that_is_made_longer_says_what_its_learning_rate_does(run, capsys):
    seen = read_checkpoint(run / "checkpoint")["ranks"][0]["collector"]["tokens_seen"]
    train("--resume", run)
    assert (
        f"the run has ended at {seen} tokens; --total-tokens makes it longer"
        in capsys.readouterr().out
    )
    flags = ["--total-tokens", "300", "--agent.max-batch-tokens", "4000", "--checkpoint-every", "5"]
    train("--resume", run, *flags)
    printed = capsys.readouterr().out
    assert "was to end at 150 tokens and goes on to 300" in printed
    assert f"(linear; {3e-4 * (1 - seen / 300):.3g} at {seen} tokens, where it was 0)" in printed
    made = load_config(run / "config.yaml")
    assert (made.total_tokens, made.agent.max_batch_tokens, made.checkpoint_every) == (300, 4000, 5)
    lines = [
        json.loads(line)["tokens_seen"]
        for line in (run / "episodes.jsonl").read_text().splitlines()
    ]
    assert lines == sorted(lines)
    assert lines[-1] >= 300


def test_the_config_says_what_was_run(whole, tmp_path):
    values = yaml.safe_load((whole / "config.yaml").read_text())
    wanted = {
        "max_new_tokens": 4,
        "kl_coef": 0.2,
        "kl": "reference",
        "autoreset_mode": "SameStep",
        "group_size": 1,
    }
    assert values["options"] | wanted == values["options"]
    assert values["made_with"]["env"]["id"] == "tokenenv/Reviews-v0"
    assert {"tokenenv", "torch", "python"} <= set(values["made_with"]["versions"])
    train("--algo", "grpo", *SMALL, "--total-tokens", "40", "--run-dir", tmp_path / "x")
    assert (
        yaml.safe_load((tmp_path / "x" / "config.yaml").read_text())["options"]["group_size"] == 4
    )


# ---------------------------------------------------------------- damage


def spoil(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def test_where_the_newest_checkpoint_is_damaged_the_one_before_it_is_taken(run, whole):
    """Episodes that it does not know are written again, and the good one stays until there are two
    again."""
    older = read_checkpoint(run / "checkpoint.previous")
    spoil(run / "checkpoint")
    with pytest.warns(
        UserWarning,
        match=r"checkpoint is corrupt.* The one before it is taken: .*checkpoint\.previous",
    ):
        train("--resume", run)
    assert is_equal(run, whole)
    assert same(read_checkpoint(run / "checkpoint.previous"), older)
    assert (run / "checkpoint.damaged").exists()


def test_evaluate_takes_the_one_before_it_too_and_changes_nothing(run):
    spoil(run / "checkpoint")
    before = contents(run)
    with pytest.warns(UserWarning, match="is taken"):
        main(["evaluate", str(run), "--num-texts", "8", "--examples", "0"])
    assert contents(run) == before


@pytest.mark.parametrize("command", ["evaluate", "train"])
def test_where_both_are_damaged_the_first_is_named(run, capsys, command):
    spoil(run / "checkpoint")
    (run / "checkpoint.previous").write_bytes(b"")
    before = contents(run)
    argv = ["evaluate", run] if command == "evaluate" else ["train", "--resume", run]
    assert f"{run / 'checkpoint'} is corrupt" in refused(capsys, *argv)
    assert contents(run) == before


def test_a_checkpoint_that_is_gone_is_no_run_that_has_not_begun(run, capsys):
    for name in ("checkpoint", "checkpoint.previous"):
        (run / name).unlink()
    before = contents(run)
    assert "cannot be read as a checkpoint" in refused(capsys, "train", "--resume", run)
    assert contents(run) == before


def test_episodes_are_cut_where_the_checkpoint_was_made(tmp_path):
    def line(seen):
        return json.dumps({"tokens_seen": seen}).encode() + b"\n"

    path = tmp_path / "episodes.jsonl"
    cut_episodes(path, 5)
    assert not path.exists()
    kept = line(5) + b"\xff\xfe damaged\n" + line(10)
    for rest in (
        b"",
        line(15),
        b"{}\n" + line(15),
        b'{"tokens_seen": 10, "ha',
        b"damaged\n",
        b"[" * 100_000 + b"\n" + line(15),
    ):
        path.write_bytes(kept + rest)
        cut_episodes(path, 10)
        assert path.read_bytes() == kept, rest[:20]
    cut_episodes(path, 0)
    assert path.read_bytes() == b""


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_too(*_, **__):
    raise SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


FAILING = {
    "config": (files, "_sync", full, "config.yaml cannot be written"),
    "checkpoint": (checkpoint, "save_file", full_too, "checkpoint cannot be written"),
    "episodes": (tracking.RunFolder, "_write_episodes", full, "cannot take this update"),
    "events": (tracking.RunFolder, "_write_events", full, "cannot take this update"),
}


@pytest.mark.parametrize("what", FAILING)
def test_a_full_disk_is_said_in_one_line_and_the_run_goes_on_when_there_is_room(
    whole, tmp_path, monkeypatch, capsys, what
):
    owner, name, failing, message = FAILING[what]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        said = refused(capsys, "train", *FLAGS, "--run-dir", tmp_path / "x")
    assert message in said
    assert "No space left on device" in said
    assert str(tmp_path / "x") in said
    assert not list((tmp_path / "x").glob("*.tmp"))
    train(*([*FLAGS, "--run-dir"] if what == "config" else ["--resume"]), tmp_path / "x")
    assert is_equal(tmp_path / "x", whole)


def test_a_file_in_place_of_a_folder_is_said(run, capsys, tmp_path):
    """What a folder that cannot be written looks like, also to root."""
    (tmp_path / "file").touch()
    inside = tmp_path / "file" / "x"
    assert "is a file" in refused(capsys, "train", *FLAGS, "--run-dir", tmp_path / "file")
    assert f"{inside} cannot be used: Not a directory" in refused(
        capsys, "train", *FLAGS, "--run-dir", inside
    )
    assert "Not a directory" in refused(capsys, "show", run, "--output", inside / "page.html")
    for argv in (["train", "--resume", inside], ["evaluate", inside], ["show", inside]):
        assert str(inside) in refused(capsys, *argv)


@pytest.mark.parametrize("where", ["_sync", "replace"])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, where):
    path = tmp_path / "config.yaml"
    replace_file(path, lambda temporary: temporary.write_text("old"))
    with monkeypatch.context() as patch:
        patch.setattr(files if where == "_sync" else files.os, where, full)
        with pytest.raises(RunFolderError, match=r"config\.yaml cannot be written: No space left"):
            replace_file(path, lambda temporary: temporary.write_text("new"), keep_previous=True)
    assert path.read_text() == "old"
    replace_file(path, lambda temporary: temporary.write_text("new"), keep_previous=True)
    assert (path.read_text(), previous_of(path).read_text()) == ("new", "old")
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "config.yaml.previous"]


def test_the_previous_file_is_kept_where_there_are_no_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "link", full)
    for turn in "abc":
        replace_file(
            tmp_path / "c",
            lambda temporary, turn=turn: temporary.write_text(turn),
            keep_previous=True,
        )
    assert ((tmp_path / "c").read_text(), (tmp_path / "c.previous").read_text()) == ("c", "b")
