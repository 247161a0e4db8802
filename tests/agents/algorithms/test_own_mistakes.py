"""What whoever writes an algorithm forgets first is an error that names the method at fault."""

from dataclasses import dataclass

import pytest
import torch
from toy_env import ToyEnv, tiny_lm

from tokenenv.agents import PPO, Agent, AgentConfig, LMPolicy, PolicyGradient, PPOConfig
from tokenenv.agents.learning.advantages import returns_to_go
from tokenenv.errors import InvalidArgument, NotFinite


class Plain(PolicyGradient):
    """REINFORCE."""

    def advantages(self, batch):
        return returns_to_go(self.rewards(batch), batch.response_length_B, 1.0)


def learn(parent, **members):
    """Let a class `Own` with these members learn from a batch of a small env; its metrics."""
    agent = type("Own", (parent,), members)(ToyEnv(4), policy=LMPolicy(tiny_lm()), batch_tokens=20)
    seen = []
    agent.learn(20, on_update=lambda metrics, episodes: seen.append(metrics))
    return seen


@pytest.mark.parametrize(("parent", "method"), [(PolicyGradient, "advantages"), (Agent, "update")])
def test_a_method_that_has_to_be_written_is_named(parent, method):
    with pytest.raises(NotImplementedError, match=rf"Own must define {method}\(batch\)"):
        learn(parent)


@pytest.mark.parametrize("method", ["advantages", "reshape"])
@pytest.mark.parametrize(
    ("value", "found"),
    [(None, "None"), (torch.ones(2, 2).numpy(), "an object of type ndarray")],
    ids=["nothing", "an array"],
)
def test_tokens_without_a_tensor(method, value, found):
    with pytest.raises(InvalidArgument, match=rf"Own\.{method} returned {found}; .* \(B, T\)"):
        learn(Plain, **{method: lambda self, *args: value})


@pytest.mark.parametrize("method", ["advantages", "reshape"])
def test_an_advantage_that_is_not_finite(method):
    def wrong(self, *args):
        values_BT = torch.zeros(args[-1].mask_BT.shape)
        values_BT[1, 0] = torch.nan
        return values_BT

    with pytest.raises(NotFinite, match=rf"Own\.{method} returned nan for token 0 of text 1") as e:
        learn(Plain, **{method: wrong})
    assert len(e.value.texts) == 1


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda out: None, "None"),
        (lambda out: 0.0, "an object of type float"),
        (lambda out: -out.logprob, r"a tensor of shape \(\d+,\)"),
    ],
    ids=["nothing", "a float", "one for each token"],
)
def test_a_loss_that_is_no_number(make, found):
    with pytest.raises(InvalidArgument, match=rf"Own\.policy_loss returned {found}; .*\.sum\(\)"):
        learn(Plain, policy_loss=lambda self, out, batch, weights_K: make(out))


@pytest.mark.parametrize("value", [0.5, torch.ones(2, 3)], ids=["a float", "another shape"])
def test_a_metric_that_is_not_one_for_each_token(value):
    def policy_loss(self, out, batch, weights_K):
        out.logged["policy/own"] = value
        return -(weights_K * out.logprob).sum()

    with pytest.raises(InvalidArgument, match=r"in out\.logged\['policy/own'\]; .* \(K,\)"):
        learn(Plain, policy_loss=policy_loss)


def test_a_metric_may_be_one_number():
    def policy_loss(self, out, batch, weights_K):
        out.logged["policy/own"] = torch.tensor(0.25)
        return -(weights_K * out.logprob).sum()

    assert [metrics["policy/own"] for metrics in learn(Plain, policy_loss=policy_loss)] == [
        pytest.approx(0.25)
    ]


def test_an_update_without_metrics():
    with pytest.raises(InvalidArgument, match=r"Own\.update returned None; .*metrics"):
        learn(Agent, update=lambda self, batch: None)


def test_a_statistic_that_no_checkpoint_could_hold():
    with pytest.raises(InvalidArgument, match=r"running_statistics\(\) has .* float under 'mean'"):
        learn(Plain, running_statistics=lambda self: {"mean": 0.0})


def test_settings_that_lack_those_of_the_parent():
    @dataclass(kw_only=True, slots=True)
    class OwnConfig(AgentConfig):
        keep: float = 0.5

    with pytest.raises(InvalidArgument, match=r"OwnConfig must be derived from PPOConfig"):
        type("Own", (PPO,), {"config_class": OwnConfig})


def test_settings_without_the_decorator():
    class OwnConfig(PPOConfig):
        keep: float = 0.5

    with pytest.raises(InvalidArgument, match=r"has no setting 'keep'; write @dataclass"):
        type("Own", (PPO,), {"config_class": OwnConfig})
