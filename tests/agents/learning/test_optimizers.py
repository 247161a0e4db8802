"""The optimizers by name: fused AdamW is AdamW, and the 8-bit one trains, is saved and goes on."""

import builtins
from typing import Any

import pytest
import torch
from runs import same
from torch import nn
from toy_env import ToyEnv, tiny_lm

from tokenenv.agents import PPO
from tokenenv.agents.learning.optimizers import make_optimizer
from tokenenv.errors import CheckpointError, InvalidArgument, MissingDependency


def test_fused_steps_are_those_of_plain_adamw() -> None:
    torch.manual_seed(0)
    ours, plain = (nn.Parameter(torch.ones(5, 7)) for _ in range(2))
    fused = make_optimizer("adamw", [ours], 1e-2)
    single = torch.optim.AdamW([plain], lr=1e-2, weight_decay=0.0, foreach=False, fused=False)
    for _ in range(5):
        ours.grad = torch.randn(5, 7)
        plain.grad = ours.grad.clone()
        fused.step()
        single.step()
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)
    assert (ours - 1).abs().mean() > 1e-2


def test_another_name_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="optimizer='adam' is not known"):
        PPO(ToyEnv(2), optimizer="adam")


def test_without_bitsandbytes_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("bitsandbytes"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependency, match="pip install bitsandbytes"):
        make_optimizer("adamw8bit", [nn.Parameter(torch.ones(2))], 1e-2)


def test_moments_in_8_bits_are_saved_and_gone_on_with(tmp_path: Any) -> None:
    pytest.importorskip("bitsandbytes")
    # Tensors of fewer than 4,096 numbers keep their moments in 32 bits.
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    envs = [ToyEnv(4, kl_coef=0.1, reference=tiny_lm(**sizes)) for _ in range(2)]
    settings = {"optimizer": "adamw8bit", "batch_tokens": 40, "lr": 1e-2, "epochs": 1}
    straight = PPO(envs[0], **settings).learn(60)
    moments = [state["state1"].dtype for state in straight.optimizer.state.values()]
    assert {torch.uint8, torch.float32} == set(moments)
    straight.save(tmp_path / "c")
    resumed = PPO.load(tmp_path / "c", envs[1])
    assert same(straight.optimizer.state_dict(), resumed.optimizer.state_dict())
    for agent in (straight, resumed):
        agent.learn(agent.tokens_seen + 60)
    for one, other in zip(straight.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_keeps_its_optimizer(tmp_path: Any) -> None:
    PPO(ToyEnv(2)).save(tmp_path / "c")
    with pytest.raises(CheckpointError, match="holds the moments of optimizer='adamw'"):
        PPO.load(tmp_path / "c", ToyEnv(2), optimizer="adamw8bit")
