"""Checkpoints survive crashes, refuse what is not one, and resume exactly."""

import os
import signal
import sys
from functools import partial

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from processes import forked, wait
from runs import SETTINGS, learn_until, same
from safetensors.torch import save as serialized
from safetensors.torch import save_file
from toy_env import ToyEnv, tiny_lm

from tokenenv.agents import PPO, LMPolicy, load_policy
from tokenenv.agents.run import checkpoint as module
from tokenenv.agents.run import files
from tokenenv.agents.run.checkpoint import read_checkpoint, write_checkpoint
from tokenenv.env.identity import digest
from tokenenv.errors import CheckpointError

STATE = {
    "weights": {"a": torch.randn(3, 2), "b": torch.arange(4), "empty": torch.zeros(0)},
    "arrays": [np.arange(3, dtype=np.int64), np.array([True, False]), np.zeros((0, 2), np.float32)],
    "rng": np.random.default_rng(3).bit_generator.state,
    "numbers": {
        0: 1.5,
        "none": None,
        "flag": True,
        "betas": (0.9, 0.999),
        "big": 2**100,
        "inf": float("-inf"),
    },
}


def test_what_is_written_is_read(tmp_path):
    write_checkpoint(tmp_path / "new" / "c", STATE)
    assert same(read_checkpoint(tmp_path / "new" / "c"), STATE)
    assert os.listdir(tmp_path / "new") == ["c"]


def test_tied_weights_are_written(tmp_path):
    weight = torch.randn(2, 2)
    write_checkpoint(tmp_path / "c", {"a": weight, "b": weight, "view": weight[:, :1]})
    assert same(
        read_checkpoint(tmp_path / "c"),
        {"a": weight, "b": weight, "view": weight[:, :1].contiguous()},
    )


def test_what_cannot_be_written_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"state\.deep\.1 is a set"):
        write_checkpoint(tmp_path / "c", {"deep": [0, {1}]})
    assert os.listdir(tmp_path) == []


def flip_byte(data):
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


BROKEN = {
    "truncated": (lambda data: data[: len(data) // 2], "cannot be read as a checkpoint"),
    "empty": (lambda data: b"", "cannot be read as a checkpoint"),
    "text": (
        lambda data: b"a text of some length, not a checkpoint at all",
        "cannot be read as a checkpoint",
    ),
    "flipped tensor": (flip_byte, "is corrupt"),
    "flipped header": (lambda data: data.replace(b"0.999", b"0.998"), "is corrupt"),
    "version": (
        lambda data: data.replace(b'"version":"8"', b'"version":"9"'),
        "has checkpoint version 9; .* reads 8",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused(tmp_path, name):
    breaking, message = BROKEN[name]
    write_checkpoint(tmp_path / "c", STATE)
    data = (tmp_path / "c").read_bytes()
    assert breaking(data) != data
    (tmp_path / "c").write_bytes(breaking(data))
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "c")


def test_foreign_and_missing_files_are_refused(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a checkpoint of this package"):
        read_checkpoint(tmp_path / "model.safetensors")
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
            read_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("joined"),
            r"of its state, \['joined'\] is missing or unknown",
        ),
        (
            lambda state: state["ranks"][0].pop("identity"),
            r"of its first rank, \['identity'\] is missing or unknown",
        ),
        (lambda state: state.update(ranks=[]), "of its first rank, no mapping"),
        (lambda state: state.update(more=1), r"of its state, \['more'\] is missing"),
        (lambda state: state["config"].pop("lr"), r"of its config, \['lr'\] is missing"),
        (lambda state: state.update(config=3), "of its config, no mapping"),
        (lambda state: state.update(agent=None), "was saved by None, not by PPO"),
    ],
)
def test_what_somebody_else_wrote_is_refused(tmp_path, change, message):
    """With a right checksum: the file is whole, and not what this package writes."""
    PPO(ToyEnv(2)).save(tmp_path / "c")
    state = read_checkpoint(tmp_path / "c")
    change(state)
    write_checkpoint(tmp_path / "other", state)
    with pytest.raises(CheckpointError, match=message):
        PPO.load(tmp_path / "other", ToyEnv(2))


@pytest.mark.parametrize(
    "text", ["", "[", '{"tensor": "none"}', '{"dict": 3}', '{"a": 1, "b": 2}', "[" * 100_000]
)
def test_a_state_that_cannot_be_read_is_corrupt(tmp_path, text):
    metadata = {
        "format": module.FORMAT,
        "version": module.VERSION,
        "state": text,
        "checksum": str(module._checksum(text, {})),
    }
    save_file({}, tmp_path / "c", metadata)
    with pytest.raises(CheckpointError, match=r"is corrupt: its state cannot be read"):
        read_checkpoint(tmp_path / "c")


@pytest.mark.parametrize("where", ["save_file", "_sync", "replace"])
def test_a_crash_while_writing_keeps_the_previous_checkpoint(tmp_path, monkeypatch, where):
    write_checkpoint(tmp_path / "c", {"turn": 1})

    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            {"save_file": module, "_sync": files, "replace": files.os}[where], where, crash
        )
        with pytest.raises(KeyboardInterrupt):
            write_checkpoint(tmp_path / "c", {"turn": 2})
    assert read_checkpoint(tmp_path / "c") == {"turn": 1}
    write_checkpoint(tmp_path / "c", {"turn": 3})
    assert read_checkpoint(tmp_path / "c") == {"turn": 3}
    assert read_checkpoint(tmp_path / "c.previous") == {"turn": 1}
    assert sorted(os.listdir(tmp_path)) == ["c", "c.previous"]


def test_a_file_is_on_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    """fsync of the file, then rename, then fsync of the directory."""
    calls = []
    sync, replace = files._sync, os.replace
    monkeypatch.setattr(files, "_sync", lambda path: (calls.append(path.name), sync(path)))
    monkeypatch.setattr(files.os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    write_checkpoint(tmp_path / "c", {"turn": 1})
    assert calls == ["c.tmp", "replace", tmp_path.name]


def in_halves(tensors, path, metadata, between=lambda: None):
    """As `save_file`, but in two writes to the file of that name. safetensors may write a file of
    another name and rename it, which would hide that a writer of ours writes in place."""
    data = serialized(tensors, metadata)
    with open(path, "wb", buffering=0) as file:
        file.write(data[: len(data) // 2])
        between()
        file.write(data[len(data) // 2 :])


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


KILLED_AT = {
    "half a file": (module, "save_file", partial(in_halves, between=die)),
    "fsync": (files, "_sync", die),
    "link": (files.os, "link", die),
    "replace": (files.os, "replace", die),
}


@pytest.mark.parametrize("where", KILLED_AT)
def test_killing_a_writing_process_never_costs_the_previous_checkpoint(tmp_path, where):
    """No `finally` is run by then, and what it had begun lies about."""
    write_checkpoint(tmp_path / "c", {"turn": 1})

    def writes():
        setattr(*KILLED_AT[where])
        write_checkpoint(tmp_path / "c", {"turn": 2})

    assert wait(forked(writes)) == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) > 1
    assert read_checkpoint(tmp_path / "c") == {"turn": 1}
    write_checkpoint(tmp_path / "c", {"turn": 3})
    assert read_checkpoint(tmp_path / "c") == {"turn": 3}
    assert read_checkpoint(tmp_path / "c.previous") == {"turn": 1}
    assert sorted(os.listdir(tmp_path)) == ["c", "c.previous"]


def test_at_no_moment_is_there_less_than_a_whole_checkpoint(tmp_path, monkeypatch):
    """What is on disk before and after every call that writing makes is what a kill at that moment
    would leave."""
    names = ("c", "c.previous", "c.tmp")
    for turn in (1, 2):
        write_checkpoint(tmp_path / "c", {"turn": turn})
    monkeypatch.setattr(module, "save_file", in_halves)
    moments = []

    def look(frame, event, arg):
        found = [
            path.read_bytes() if path.exists() else None for path in map(tmp_path.joinpath, names)
        ]
        if found not in moments:
            moments.append(found)

    before = [(tmp_path / name).read_bytes() for name in names[:2]]
    sys.setprofile(look)
    try:
        write_checkpoint(tmp_path / "c", {"turn": 3})
    finally:
        sys.setprofile(None)
    new = (tmp_path / "c").read_bytes()
    seen = [list(dict.fromkeys(column)) for column in zip(*moments, strict=True)]
    assert seen == [
        [before[0], new],
        [before[1], before[0]],
        [None, b"", new[: len(new) // 2], new],
    ]


def token_env(mode=AutoresetMode.SAME_STEP, **options):
    """The real env around tiny random models."""
    import fakes

    from tokenenv.env.vector_env import TokenVectorEnv
    from tokenenv.models.heads import make_scorer
    from tokenenv.types import Task

    reference = fakes.causal_lm(num_hidden_layers=1)
    task = Task(
        tokenizer=fakes.tokenizer(),
        reference=reference,
        prompts=[[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]],
        max_prompt_tokens=4,
        max_new_tokens=7,
        stop_token_ids=(fakes.EOS,),
        scorer=make_scorer(fakes.reward_model("token", num_hidden_layers=1)),
        gold=lambda prompt, response: float(len(response)),
    )
    return TokenVectorEnv(5, task=task, autoreset_mode=mode, **options)


ENVS = {
    "toy-same-step": lambda: ToyEnv(5, AutoresetMode.SAME_STEP, kl_coef=0.1),
    "toy-next-step": lambda: ToyEnv(5, AutoresetMode.NEXT_STEP, kl_coef=0.1),
    "toy-disabled": lambda: ToyEnv(5, AutoresetMode.DISABLED, kl_coef=0.1),
    "same-step": lambda: token_env(AutoresetMode.SAME_STEP),
    "next-step": lambda: token_env(AutoresetMode.NEXT_STEP),
    "torch": lambda: token_env(AutoresetMode.SAME_STEP, array="torch", kl="policy"),
}


@pytest.mark.parametrize("name", ENVS)
def test_resuming_is_exact(tmp_path, name):
    """Two updates, a checkpoint, a new process' agent and env, two updates: equal to four updates
    bit for bit."""
    path = tmp_path / "c"
    straight = PPO(ENVS[name](), **SETTINGS)
    whole = learn_until(straight, 4, save_to=path)
    resumed = PPO.load(path, ENVS[name]())
    rest = learn_until(resumed, 4)
    first = len(whole.episodes) - len(rest.episodes)
    assert first > 0
    assert any(a.index and len(a.response) > 1 for a in rest.episodes)
    for a, b in zip(whole.episodes[first:], rest.episodes, strict=True):
        for field in a.__dataclass_fields__:
            np.testing.assert_equal(getattr(a, field), getattr(b, field))
    np.testing.assert_equal(whole.metrics[2:], rest.metrics)
    for (key, a), b in zip(
        straight.policy.state_dict().items(), resumed.policy.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), key
    assert straight.kl_coef == resumed.kl_coef != ENVS[name]().kl_coef
    assert straight.tokens_seen == resumed.tokens_seen
    assert same(straight.optimizer.state_dict(), resumed.optimizer.state_dict())


def test_an_env_without_a_saved_state_begins_anew(tmp_path):
    class Forgetful(ToyEnv):
        save_state = load_state = property(
            lambda self: (_ for _ in ()).throw(AttributeError("no state"))
        )

    agent = PPO(Forgetful(4), **(SETTINGS | {"kl_target": None}))
    agent.learn(100).save(tmp_path / "c")
    resumed = PPO.load(tmp_path / "c", Forgetful(4))
    assert resumed.tokens_seen == agent.tokens_seen
    assert resumed.learn(agent.tokens_seen + 100).updates > agent.updates


def test_a_bad_load_leaves_everything_as_it_was(tmp_path):
    envs = ToyEnv(4, kl_coef=0.1)
    agent = PPO(envs, batch_tokens=40)
    agent.learn(80).save(tmp_path / "c")
    weights = {name: value.clone() for name, value in agent.policy.state_dict().items()}
    state, generator = envs.save_state(), agent.actor.generator.get_state()
    (tmp_path / "bad").write_bytes((tmp_path / "c").read_bytes()[:-100])
    other = LMPolicy(tiny_lm(hidden_size=16))
    for path, policy, message in [
        (tmp_path / "bad", None, "cannot be read as a checkpoint"),
        (tmp_path / "c", other, "belongs to another model"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            PPO.load(path, envs, policy=policy, kl_coef=0.7)
    assert same(envs.save_state(), state)
    assert torch.equal(agent.actor.generator.get_state(), generator)
    assert all(
        torch.equal(weights[name], value) for name, value in agent.policy.state_dict().items()
    )
    agent.learn(200)


def test_another_algorithms_checkpoint_is_refused(tmp_path):
    class Other(PPO):
        pass

    Other(ToyEnv(2)).save(tmp_path / "c")
    with pytest.raises(CheckpointError, match="was saved by Other, not by PPO"):
        PPO.load(tmp_path / "c", ToyEnv(2))


def test_settings_can_be_changed_at_load(tmp_path):
    PPO(ToyEnv(2), lr=0.5, kl_coef=0.3).save(tmp_path / "c")
    agent = PPO.load(tmp_path / "c", ToyEnv(2), batch_tokens=7, kl_coef=0.4)
    assert (agent.config.lr, agent.config.batch_tokens, agent.kl_coef) == (0.5, 7, 0.4)


@pytest.mark.parametrize("options", [{"lora_rank": 2}, {"separate_value": True}])
def test_only_trained_weights_are_saved(tmp_path, options):
    if "lora_rank" in options:
        pytest.importorskip("peft")
    agent = PPO(ToyEnv(4), batch_tokens=40, **options).learn(60)
    agent.save(tmp_path / "c")
    saved = read_checkpoint(tmp_path / "c")["weights"]
    assert set(saved) == {name for name, p in agent.policy.named_parameters() if p.requires_grad}
    resumed = PPO.load(tmp_path / "c", ToyEnv(4))
    for (name, a), b in zip(
        agent.policy.state_dict().items(), resumed.policy.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


# ---------------------------------------------------------------- the policy alone


def test_a_policy_is_loaded_without_its_run(tmp_path):
    """Into an env with another number of slots, whoever trained it; damage is said as for a run."""
    agent = PPO(ToyEnv(4), batch_tokens=60, lr=1e-2).learn(60)
    agent.save(tmp_path / "c")
    policy = load_policy(tmp_path / "c", ToyEnv(3))
    assert same(policy.state_dict(), agent.policy.state_dict())
    with pytest.raises(CheckpointError, match="belongs to another model"):
        load_policy(tmp_path / "c", ToyEnv(3, reference=tiny_lm(hidden_size=24)))
    write_checkpoint(tmp_path / "d", {"config": {"lr": 1}, "weights": {}})
    with pytest.raises(CheckpointError, match="does not hold what a checkpoint"):
        load_policy(tmp_path / "d", ToyEnv(3))


def test_adapters_are_loaded_onto_the_model_that_they_were_trained_on(tmp_path):
    pytest.importorskip("peft")

    def make(seed):
        return TextEnv(tiny_lm(seed=seed))

    agent = PPO(make(0), lora_rank=2, batch_tokens=60, lr=1e-2).learn(60)
    agent.save(tmp_path / "c")
    assert same(load_policy(tmp_path / "c", make(0)).state_dict(), agent.policy.state_dict())
    with pytest.raises(CheckpointError, match="its adapters were trained on LlamaForCausalLM"):
        load_policy(tmp_path / "c", make(1))


class TextEnv(ToyEnv):
    """An env that says which model it has."""

    def __init__(self, model):
        super().__init__(4, reference=model)

    @property
    def identity(self):
        return {"models": {"reference": digest(self.reference)}}
