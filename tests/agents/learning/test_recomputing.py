"""Gradient checkpointing: the same gradients from less that is kept, in eval mode."""

from typing import Any

import numpy as np
import pytest
import torch
from runs import SETTINGS
from toy_env import ToyEnv, V, tiny_lm

from tokenenv.agents import PPO, LMPolicy
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning.learner import outputs
from tokenenv.errors import InvalidArgument

SIZES = {"num_hidden_layers": 3, "hidden_size": 32, "attention_dropout": 0.5}


def gradients(batch: EpisodeBatch, **options: Any) -> tuple[dict[str, torch.Tensor], int]:
    """The gradients of a sum over a batch, and how many numbers were kept for them."""
    policy = LMPolicy(tiny_lm(**SIZES), **options)
    torch.nn.init.normal_(policy.value_head.weight)
    kept = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = outputs(policy, batch, np.arange(len(batch)))
    (out.logprob + out.value).sum().backward()
    assert not policy.training
    return {
        name: weight.grad for name, weight in policy.named_parameters() if weight.grad is not None
    }, kept


@pytest.fixture(scope="module")
def batch() -> EpisodeBatch:
    agent = PPO(ToyEnv(4), batch_tokens=30)
    return EpisodeBatch.stack(agent.collector.collect(30))


@pytest.mark.parametrize("options", [{}, {"separate_value": True}, {"lora_rank": 2}], ids=str)
def test_gradients_are_equal_and_less_is_kept(batch: EpisodeBatch, options: dict[str, Any]) -> None:
    if "lora_rank" in options:
        pytest.importorskip("peft")
    torch.manual_seed(0)
    plain, much = gradients(batch, **options)
    torch.manual_seed(0)
    again, little = gradients(batch, gradient_checkpointing=True, **options)
    assert plain.keys() == again.keys()
    for name, grad in plain.items():
        assert grad.abs().sum() > 0 or name.endswith("lora_A.default.weight")
        torch.testing.assert_close(again[name], grad, rtol=1e-5, atol=1e-6)
    assert little < 0.6 * much


def test_a_run_is_what_it_is_without(tmp_path: Any) -> None:
    """Saved and loaded in the middle, too; acting and values are not touched."""
    model = tiny_lm(**SIZES)
    plain = PPO(ToyEnv(4, kl_coef=0.1, reference=model), **SETTINGS)
    other = PPO(ToyEnv(4, kl_coef=0.1, reference=model), gradient_checkpointing=True, **SETTINGS)
    for agent in (plain, other):
        agent.learn(60).save(tmp_path / "c")
    loaded = PPO.load(tmp_path / "c", ToyEnv(4, kl_coef=0.1, reference=model))
    assert loaded.policy.gradient_checkpointing
    for agent in (plain, other, loaded):
        agent.learn(agent.tokens_seen + 60)
    for a, b, c in zip(*(x.policy.parameters() for x in (plain, other, loaded)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert torch.equal(b, c)
    assert "forward" not in vars(other.policy.model.model.layers[0])


def test_a_model_without_such_layers_is_refused() -> None:
    class Table(torch.nn.Module):
        slots = head = None
        vocab_size, hidden_size = V, 4

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(V, 4))

    with pytest.raises(InvalidArgument, match="gradient_checkpointing=True needs a transformers"):
        LMPolicy(Table(), gradient_checkpointing=True)
