"""A run folder is data: nothing in one imports, runs, connects, or is sent a key, unless the
command line says so again."""

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys

import fakes
import gymnasium as gym
import pytest
import torch
import yaml
from runs import FakeWandb
from safetensors.torch import save_file
from tasks import make_vec

from tokenenv.agents import PPO
from tokenenv.agents.run.checkpoint import read_checkpoint, read_newest, write_checkpoint
from tokenenv.agents.run.failures import write_failures
from tokenenv.cli import Train, load_config, main, said_in, save_config
from tokenenv.errors import (
    CheckpointError,
    InvalidArgument,
    ModelError,
    NotFinite,
    RunFolderError,
    ServerError,
)
from tokenenv.models.vllm_server import VLLMServer
from tokenenv.safety.trust import check_from_file

SMALL = [
    "--num-envs",
    "4",
    "--total-tokens",
    "40",
    "--agent.batch-tokens",
    "20",
    "--agent.epochs",
    "1",
]
TOKENS = ["--env", "tokenenv/Negation-v0", "--options", "max_new_tokens", "4"]
URL = "http://127.0.0.1:9"

HOSTILE = {
    "a task": {"options": {"task": "subprocess:Popen", "args": "touch PWNED"}},
    "a task of the standard library": {"options": {"task": "os:system"}},
    "remote code": {
        "env": "tokenenv/TextGen-v0",
        "options": {"model": "x", "prompts": "y", "trust_remote_code": "true"},
    },
    "remote code, a bool": {
        "env": "tokenenv/TextGen-v0",
        "options": {"model": "x", "prompts": "y", "trust_remote_code": True},
    },
    "a reward server": {
        "env": "tokenenv/TextGen-v0",
        "options": {"model": "x", "prompts": "y", "reward_model": URL},
    },
    "a reference server": {
        "env": "tokenenv/TextGen-v0",
        "options": {"model": "x", "prompts": "y", "reference": URL},
    },
    "a share": {
        "env": "tokenenv/TextGen-v0",
        "options": {"model": r"\\host\share", "prompts": "y"},
    },
    "prompts by URL": {
        "env": "tokenenv/TextGen-v0",
        "options": {"model": "x", "prompts": "https://host/p"},
    },
    "a URL in a list": {
        "env": "tokenenv/TextGen-v0",
        "options": {"model": ["a", "file:///etc"], "prompts": "y"},
    },
    "prompts to evaluate by URL": {"eval_prompts": "https://host/p"},
    "gold by module": {"gold": "os:system"},
    "a kernel from the hub": {
        "env": "tokenenv/TextGen-v0",
        "options": {"model": "x", "prompts": "y", "attn_implementation": "someone/kernel"},
    },
    "gold by name": {
        "env": "tokenenv/TextGen-v0",
        "options": {"model": "x", "prompts": "y", "gold": "os:system"},
    },
    "a reward by module": {"reward": "os:system"},
    "a reward in the options": {"options": {"reward": "os:system"}},
    "a part of a reward": {"options": {"reward": "{a: 'os:system'}"}},
    "an unknown reward": {"options": {"reward": "{a: mine}"}},
    "an id by module": {"env": "os:tokenenv/Reviews-v0"},
    "an id of others": {"env": "CartPole-v1"},
    "an algorithm by module": {"algo": "os:system"},
    "texts by a server": {"agent": {"rollout": URL}},
    "an engine's classes": {
        "agent": {"rollout": "vllm", "rollout_options": {"worker_cls": "os.system"}}
    },
    "an engine's remote code": {
        "agent": {"rollout": "vllm", "rollout_options": {"trust_remote_code": True}}
    },
    "a folder to write to": {
        "agent": {"rollout": "vllm", "rollout_options": {"weights_dir": "elsewhere"}}
    },
    "a tracker": {"track": "wandb"},
    "another run folder": {"run_dir": "elsewhere"},
    "Gymnasium's keywords": {"options": {"vector_kwargs": "{}"}},
}
"""What a stranger's config.yaml may try, laid over a harmless one."""


@pytest.fixture
def no_code(monkeypatch):
    """Nothing is started or connected to."""
    calls = []
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: calls.append(args))
    monkeypatch.setattr("os.system", lambda *args: calls.append(args))
    monkeypatch.setattr("socket.socket.connect", lambda *args: calls.append(args))
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    yield
    assert calls == []


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "x"
    main(["train", *SMALL, *TOKENS, "--run-dir", str(folder)])
    return folder


def strange(folder, changes, path):
    """A run folder whose config has been changed by hand."""
    path.mkdir()
    (path / "checkpoint").write_bytes((folder / "checkpoint").read_bytes())
    values = yaml.safe_load((folder / "config.yaml").read_text())
    agent = values["agent"] | changes.get("agent", {})
    options = (
        changes.get("options", {})
        if "env" in changes
        else values["options"] | changes.get("options", {})
    )
    (path / "config.yaml").write_text(
        yaml.safe_dump(values | changes | {"agent": agent, "options": options})
    )
    return path


def refused(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE)
def test_a_strangers_config_runs_nothing(changes, run_dir, tmp_path, capsys, no_code, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = strange(run_dir, changes, tmp_path / "x")
    evaluated = ["evaluate", str(folder), "--num-texts", "2", "--examples", "0"]
    commands = [
        ["train", "--config", str(folder / "config.yaml"), "--run-dir", "new"],
        ["train", "--resume", str(folder)],
    ]
    for argv in (
        commands if "agent" in changes else [*commands, evaluated]
    ):  # evaluating steps, whatever wrote the texts
        error = refused(argv, capsys)
        assert str(folder / "config.yaml") in error or "option=" in error
    assert {path.name for path in tmp_path.iterdir()} == {"x"}


def test_prompts_in_a_file_are_texts_whatever_they_look_like():
    prompts = ["mine:brief", "see https://host/p", [{"role": "user", "content": "//host"}]]
    check_from_file({"options.prompts": prompts}, "x")
    for name in ("options.model", "options.stop_token_ids", "eval_prompts"):
        with pytest.raises(InvalidArgument, match=r"imports code|opens a connection"):
            check_from_file({name: prompts}, "x")


@pytest.mark.parametrize(
    "name", ["lock", "episodes.html", "episodes.jsonl", "config.yaml.tmp", "checkpoint.tmp"]
)
def test_a_link_in_a_strangers_folder_does_not_lead_what_is_written_out_of_it(
    name, run_dir, tmp_path, capsys
):
    folder, mine = tmp_path / "x", tmp_path / "mine"
    shutil.copytree(run_dir, folder)
    kept = (folder / name).read_bytes() if name == "episodes.jsonl" else b"precious"
    mine.write_bytes(kept)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(mine)
    for argv in (["show", str(folder)], ["train", "--resume", str(folder), "--total-tokens", "80"]):
        with contextlib.suppress(SystemExit):
            main(argv)
    assert mine.read_bytes() == kept
    assert (
        name.endswith(".tmp") or f"{folder / name} is a link to '{mine}'" in capsys.readouterr().err
    )


def test_texts_at_fault_are_not_written_through_a_link(tmp_path):
    (tmp_path / "failed_episodes.jsonl").symlink_to(tmp_path / "mine")
    with pytest.raises(RunFolderError, match="is a link"):
        write_failures(tmp_path, NotFinite("nan"), None, 0, 0)


def test_a_file_does_not_steer_the_terminal_through_errors_and_warnings(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "x")
    newest = tmp_path / "x" / "checkpoint"
    save_file({}, newest, {"format": "tokenenv-checkpoint", "version": "\x1b]0;title\x07\u202e"})
    with pytest.warns(UserWarning, match="checkpoint version ·]0;title··; this package reads"):
        read_newest(newest)
    write_checkpoint(newest, {"agent": "\x1b[2J"})
    with pytest.raises(CheckpointError, match=r"was saved by ·\[2J, not by PPO"):
        PPO.load(newest, make_vec())


@pytest.mark.parametrize(
    "name", ["remote code", "a reward server", "texts by a server", "an engine's classes", "a task"]
)
def test_the_error_says_how_the_command_line_says_it_again(name, run_dir, tmp_path, capsys):
    folder = strange(run_dir, HOSTILE[name], tmp_path / "x")
    config = str(folder / "config.yaml")
    flags = refused(["train", "--config", config], capsys).partition("say it again: ")[2].split()
    said = said_in(
        {"options": [], "rollout": [], "rollout_options": []}
        | {flags[0].split(".")[-1].strip("-").replace("-", "_"): flags[1:]}
    )
    assert len(said) == 1
    assert "say it again" not in raised_by(lambda: load_config(folder / "config.yaml", said))


def raised_by(call):
    try:
        call()
    except InvalidArgument as error:
        return str(error)
    return ""


def test_what_the_command_line_says_again_is_taken(run_dir, tmp_path):
    path = strange(
        run_dir,
        {
            "env": "tokenenv/TextGen-v0",
            "options": {"reward_model": URL, "model": "m", "prompts": "p"},
        },
        tmp_path / "x",
    )
    made = load_config(path / "config.yaml", {"options.reward_model"})
    assert made.options["reward_model"] == URL
    with pytest.raises(
        InvalidArgument,
        match=f"reward_model='{URL}' opens a connection.*--options reward_model {URL}",
    ):
        load_config(path / "config.yaml", {"options.reference"})
    path = strange(
        run_dir, {"agent": {"rollout": URL, "rollout_options": {"num_texts": 3}}}, tmp_path / "y"
    )
    assert load_config(path / "config.yaml", {"agent.rollout"}).agent.rollout_options == {
        "num_texts": 3
    }


def test_a_local_model_and_prompts_are_data(tmp_path, capsys):
    model, reward_model = (
        fakes.saved(fakes.causal_lm(num_hidden_layers=1), tmp_path / "m"),
        fakes.saved(fakes.reward_model("token", num_hidden_layers=1), tmp_path / "r"),
    )
    (tmp_path / "p.txt").write_text("the cat is\na good film\n")
    options = ["model", model, "reward_model", reward_model, "prompts", str(tmp_path / "p.txt")]
    options += ["max_new_tokens", "4", "max_prompt_tokens", "8"]
    run = tmp_path / "x"
    main(
        [
            "train",
            *SMALL,
            "--env",
            "tokenenv/TextGen-v0",
            "--options",
            *options,
            "--run-dir",
            str(run),
        ]
    )
    main(["evaluate", str(run), "--num-texts", "4", "--examples", "0"])
    assert "distinct bigrams" in capsys.readouterr().out


def test_flags_add_to_the_options_of_a_config(run_dir, tmp_path):
    config = ["--config", str(run_dir / "config.yaml"), "--run-dir", str(tmp_path / "y")]
    main(["train", *config, "--options", "vocab_size", "3e1", "max_new_tokens", "3"])
    options = load_config(tmp_path / "y" / "config.yaml").options
    assert (options["max_new_tokens"], options["vocab_size"]) == (3, "3e1")


@pytest.mark.parametrize("cut", ["num_envs", "agent", "options", "lr"])
def test_a_config_that_lacks_a_field_is_refused(cut, run_dir, tmp_path, capsys):
    values = yaml.safe_load((run_dir / "config.yaml").read_text())
    del (values if cut in values else values["agent"])[cut]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert f"lacks the field '{cut}'" in refused(
        ["train", "--config", str(tmp_path / "config.yaml")], capsys
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"num_envs": "many"},
        {"num_envs": -1},
        {"agent": {"lr": [1]}},
        {"agent": {"rollout_options": "x"}},
        {"options": {1: 2}},
    ],
    ids=str,
)
def test_a_config_with_another_type_is_named(changes, run_dir, tmp_path, capsys):
    folder = strange(run_dir, changes, tmp_path / "x")
    assert str(folder / "config.yaml") in refused(
        ["train", "--config", str(folder / "config.yaml")], capsys
    )


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    "config",
    [{"rollout": URL}, {"rollout": "vllm", "rollout_options": {"worker_cls": "os.system"}}],
    ids=str,
)
def test_a_strangers_checkpoint_connects_to_nothing(config, run_dir, tmp_path, no_code):
    state = read_checkpoint(run_dir / "checkpoint")
    state["config"] |= config
    write_checkpoint(tmp_path / "c", state)
    made = load_config(run_dir / "config.yaml")
    with pytest.raises(InvalidArgument, match="no file can ask for"):
        PPO.load(tmp_path / "c", made.make_envs())
    assert (
        PPO.load(
            tmp_path / "c", made.make_envs(), rollout="step", rollout_options={}
        ).config.rollout
        == "step"
    )


# ---------------------------------------------------------------- keys

SECRET = "s3cr3t-k3y"


def test_no_file_of_a_run_holds_a_key(tmp_path):
    agent = dataclasses.replace(
        PPO.config_class(), rollout_options={"api_key": SECRET, "timeout": 3}
    )
    config = Train(
        agent=agent, options={"reward_model": f"http://me:{SECRET}@host:1", "max_new_tokens": "4"}
    )
    save_config(config, tmp_path / "config.yaml")
    made = PPO(make_vec(2), agent)
    made.save(tmp_path / "checkpoint")
    for path in tmp_path.iterdir():
        assert SECRET.encode() not in path.read_bytes()
    assert "http://host:1" in (tmp_path / "config.yaml").read_text()
    assert read_checkpoint(tmp_path / "checkpoint")["config"]["rollout_options"] == {"timeout": 3}


def test_a_tracker_is_told_no_key(tmp_path, monkeypatch, capsys):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for secret in (
        ["--agent.rollout-options", "api_key", SECRET],
        ["--options", "reward_model", f"http://me:{SECRET}@h"],
    ):
        error = refused(
            ["train", *SMALL, *secret, "--track", "wandb", "--run-dir", str(tmp_path / "x")], capsys
        )
        assert "VLLM_API_KEY" in error
        assert SECRET not in error
    assert SECRET not in json.dumps(vars(wandb), default=str)


def test_errors_do_not_tell_a_key():
    server = VLLMServer(f"http://me:{SECRET}@127.0.0.1:9", timeout=0.2, retries=0)
    assert server._session.auth == ("me", SECRET)
    with pytest.raises(ServerError) as raised:
        server.ask("/v1/models", method="GET")
    texts = [str(raised.value)]
    for make in (
        lambda: VLLMServer(f"ftp://me:{SECRET}@host"),
        lambda: PPO.config_class(rollout=f"htp://me:{SECRET}@host"),
        lambda: PPO(make_vec(2), f"http://me:{SECRET}@host"),
        lambda: Train(algo="grpo", agent=PPO.config_class(rollout_options={"api_key": SECRET})),
        lambda: check_from_file({"options.reward_model": f"http://me:{SECRET}@host"}, "x"),
    ):
        with pytest.raises(InvalidArgument) as refused_:
            make()
        texts.append(str(refused_.value))
    assert not [text for text in texts if SECRET in text]


def test_a_server_that_repeats_the_key_is_not_quoted(monkeypatch):
    class Answer:
        ok, status_code, headers = False, 401, {"Content-Type": "application/json"}

        @staticmethod
        def json():
            return {"error": {"message": f"{SECRET} is wrong"}}

    server = VLLMServer("http://127.0.0.1:9", api_key=SECRET)
    monkeypatch.setattr(server._session, "request", lambda *args, **kwargs: Answer())
    with pytest.raises(ServerError, match=r"\*\*\* is wrong"):
        server.ask("/x")


# ---------------------------------------------------------------- model folders


def test_a_model_folders_own_code_is_not_run(tmp_path):
    model, proof = tmp_path / "m", tmp_path / "ran"
    fakes.saved(fakes.causal_lm(num_hidden_layers=1), model)
    for name in ("config.json", "tokenizer_config.json"):
        values = json.loads((model / name).read_text())
        values["auto_map"] = {
            "AutoConfig": "own.Own",
            "AutoModelForCausalLM": "own.Own",
            "AutoTokenizer": ["own.Own", "own.Own"],
        }
        (model / name).write_text(
            json.dumps(values | ({"model_type": "own"} if name == "config.json" else {}))
        )
    (model / "own.py").write_text(f"open({str(proof)!r}, 'w')\n")
    with pytest.raises(ModelError, match="cannot be loaded"):
        gym.make_vec("tokenenv/TextGen-v0", num_envs=2, model=str(model), prompts=[[4]], reward={})
    assert not proof.exists()


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_pickled_weights_are_not_read(tmp_path):
    model, proof = tmp_path / "m", tmp_path / "ran"
    fakes.saved(fakes.causal_lm(num_hidden_layers=1), model)
    (model / "model.safetensors").unlink()
    torch.save({"weight": Evil(str(proof))}, model / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        gym.make_vec("tokenenv/TextGen-v0", num_envs=2, model=str(model), prompts=[[4]], reward={})
    assert not proof.exists()
