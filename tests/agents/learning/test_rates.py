"""The learning rate where none is given: by what is trained, resolved once, and kept."""

import dataclasses
import logging

import pytest
import yaml
from toy_env import ToyEnv, tiny_lm

from tokenenv.agents import ALGORITHMS, PPO, AgentConfig, LMPolicy
from tokenenv.agents.learning import rates
from tokenenv.agents.run.checkpoint import read_checkpoint
from tokenenv.cli import load_config, main
from tokenenv.errors import InvalidArgument

TRAIN = ["train", "--num-envs", "4", "--options", "max_new_tokens", "4", "--agent.batch-tokens"]
TRAIN += ["16", "--agent.epochs", "1", "--agent.minibatches", "1", "--total-tokens", "20"]


def test_it_is_chosen_by_what_is_trained(monkeypatch, caplog):
    """A small model keeps the rate of the published figures, under LoRA too."""
    pytest.importorskip("peft")

    def policies():
        return LMPolicy(tiny_lm()), LMPolicy(tiny_lm(), lora_rank=2)

    assert [rates.default_lr(policy) for policy in policies()] == [3e-4, 3e-4]
    assert not caplog.records
    monkeypatch.setattr(rates, "SMALL", 1000)
    with caplog.at_level(logging.WARNING):
        assert [rates.default_lr(policy) for policy in policies()] == [1e-5, 2e-4]
    whole, adapters = (record.getMessage() for record in caplog.records)
    assert "lr=None is 1e-05 here: all weights of" in whole
    assert "lr=None is 0.0002 here: adapters of" in adapters


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_algorithm_leaves_the_choice_open(name):
    assert ALGORITHMS[name].config_class().lr is None


def test_the_agent_says_the_number_and_checkpoints_keep_it(tmp_path, monkeypatch):
    """A checkpoint that is loaded after the default has changed goes on at its own rate."""
    config = AgentConfig()
    agent = PPO(ToyEnv(2), batch_tokens=10)
    assert agent.config.lr == agent.optimizer.param_groups[0]["lr"] == 3e-4
    assert config.lr is None
    agent.save(tmp_path / "c")
    assert read_checkpoint(tmp_path / "c")["config"]["lr"] == 3e-4
    monkeypatch.setattr(rates, "SMALL", 1000)
    assert PPO.load(tmp_path / "c", ToyEnv(2)).config.lr == 3e-4
    assert PPO.load(tmp_path / "c", ToyEnv(2), lr=None).config.lr == 1e-5
    assert PPO(ToyEnv(2)).config.lr == 1e-5
    assert PPO(ToyEnv(2), lr=0.5).config.lr == 0.5


def test_a_run_on_the_command_line_goes_on_at_the_rate_that_it_began_with(tmp_path, monkeypatch):
    """Its config leaves open what it was not told, and records the number. A flag that says None
    asks for no other rate."""
    main([*TRAIN, "--run-dir", str(tmp_path / "x")])
    path = tmp_path / "x" / "config.yaml"
    assert load_config(path).agent.lr is None
    monkeypatch.setattr(rates, "SMALL", 1000)
    main(["train", "--resume", str(tmp_path / "x"), "--total-tokens", "40"])
    assert yaml.safe_load(path.read_text())["made_with"]["lr"] == 3e-4
    main(["train", "--resume", str(tmp_path / "x"), "--agent.lr", "None"])
    assert read_checkpoint(tmp_path / "x" / "checkpoint")["config"]["lr"] == 3e-4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("learning_rate", "PPOConfig has no field 'learning_rate': it is called 'lr' here"),
        ("gae_lambda", "it is called 'lambda_actor' here"),
        ("num_generations", "it is group_size= of the env"),
        ("clip_rnge", "is not known. Did you mean 'clip_range'"),
    ],
)
def test_a_setting_under_another_name_is_answered_with_the_name_here(name, message):
    with pytest.raises(InvalidArgument, match=message) as error:
        PPO(ToyEnv(2), **{name: 1})
    assert len(str(error.value)) < 120


def test_names_of_elsewhere_are_no_fields():
    """And each stands for one that some algorithm has."""
    from tokenenv.agents.config import CALLED, ELSEWHERE

    kinds = [agent.config_class for agent in ALGORITHMS.values()]
    fields = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    assert set(CALLED) <= fields
    assert not set(ELSEWHERE) & fields
    others = [name for names in CALLED.values() for name in names]
    assert len(set(others)) == len(others)
    assert set(others) & fields <= {"scale_rewards"}  # PPO's own, and TRL's name for GRPO's scale
