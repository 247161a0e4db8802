"""What no step of an update changes is computed once: the states of frozen models, and those below
the first adapted layer. An update is the one that computes them in every epoch."""

from typing import Any

import fakes
import numpy as np
import pytest
import tasks
import torch
from gymnasium.vector import AutoresetMode
from torch import nn
from toy_env import ToyEnv, V, tiny_lm

from tokenenv.agents import PPO, LMPolicy
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning import kept as kept_module
from tokenenv.agents.learning import optimise
from tokenenv.agents.learning.kept import KeptStates, frozen_layers
from tokenenv.agents.learning.learner import outputs
from tokenenv.agents.learning.recomputing import layers_in
from tokenenv.models.trunks import trunk_of

EIGHT = ("llama", "gpt2", "qwen2_mixed", "mistral", "gemma3", "phi3_longrope", "gpt_neox", "opt")
LAYERS = 3
SAME_STEP = AutoresetMode.SAME_STEP
SETTINGS = {"batch_tokens": 60, "minibatches": 2, "epochs": 3, "lr": 1e-2, "max_batch_tokens": 40}


def adapted(model: Any, layers: list[int]) -> Any:
    """The model with adapters that change it, in these of its layers."""
    peft = pytest.importorskip("peft")
    kinds = {name.rpartition(".")[2]: type(part).__name__ for name, part in model.named_modules()}
    linear = {name for name, kind in kinds.items() if kind in ("Linear", "Conv1D")}
    config = peft.LoraConfig(
        r=2,
        target_modules=sorted(linear - {"lm_head", "embed_out"}),
        layers_to_transform=layers,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return peft.get_peft_model(model, config)


def policy_of(layers: list[int], **options: Any) -> LMPolicy:
    model = adapted(tiny_lm(num_hidden_layers=LAYERS, initializer_range=0.2), layers)
    policy = LMPolicy(model, **options)
    torch.manual_seed(0)
    nn.init.normal_(policy.value_head.weight, std=0.1)
    return policy


def calls(layer: nn.Module) -> list[int]:
    """The texts of each call of a layer from now on."""
    seen: list[int] = []
    forward = layer.forward

    def counted(states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(states))
        return forward(states, *args, **kwargs)

    layer.forward = counted
    return seen


@pytest.mark.parametrize(
    "options", [{}, {"separate_value": True}, {"gradient_checkpointing": True}], ids=str
)
def test_an_update_is_the_one_that_reads_all_layers_in_every_epoch(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def updated() -> tuple[LMPolicy, int, int]:
        policy = policy_of([2], **options)
        agent = PPO(ToyEnv(4, kl_coef=0.1), policy=policy, **SETTINGS)
        batch = EpisodeBatch.stack(agent.collector.collect(60))
        lowest = calls(layers_in(trunk_of(policy.model))[0])
        agent.update(batch)
        return policy, sum(lowest), len(batch)

    kept, few, texts = updated()
    monkeypatch.setattr(kept_module, "frozen_layers", lambda trunk: [])
    plain, many, _ = updated()
    for a, b in zip(kept.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert few < many - texts


@pytest.mark.parametrize("name", EIGHT)
def test_outputs_and_gradients_are_those_of_the_whole_trunk(name: str) -> None:
    names = {"gpt2": "n_layer", "phi3_longrope": "num_hidden_layers"}
    model = fakes.causal_lm(name, **{names.get(name, "num_hidden_layers"): LAYERS})
    policy = LMPolicy(adapted(model, [1, 2]))
    batch = EpisodeBatch.stack(PPO(tasks.make_vec(4, SAME_STEP)).collector.collect(30))
    kept, rows = KeptStates(policy), np.arange(len(batch))
    assert len(kept._frozen) == 1
    found = []
    for states, order in ((None, rows), (kept, rows), (kept, rows[::-1].copy())):
        out = outputs(policy, batch, order, kept=states)
        out.logprob.mean().backward()
        sorting = np.lexsort((out.steps, out.rows))
        found.append(
            [out.logprob[sorting], *(w.grad for w in policy.parameters() if w.grad is not None)]
        )
        policy.zero_grad()
    lowest = calls(layers_in(trunk_of(policy.model))[0])
    outputs(policy, batch, rows[: len(rows) // 2], kept=kept)
    assert lowest == []
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_frozen_model_is_read_once_an_update() -> None:
    options = {"full_kl_coef": 0.2, "distill_coef": 0.1, **SETTINGS}

    def updated(epochs_kept: bool) -> tuple[list[torch.Tensor], list[int]]:
        env = ToyEnv(4, kl_coef=0.1, reference=tiny_lm(seed=1))
        env.teacher = tiny_lm(seed=2)
        agent = PPO(env, policy=LMPolicy(tiny_lm(seed=3, initializer_range=0.2)), **options)
        batch = EpisodeBatch.stack(agent.collector.collect(60))
        assert agent.teacher is not None
        seen = calls(layers_in(trunk_of(env.teacher))[0])
        with pytest.MonkeyPatch.context() as patch:
            if not epochs_kept:
                patch.setattr(optimise, "KeptStates", lambda policy: None)
            agent.update(batch)
        return list(agent.policy.parameters()), [sum(seen), len(batch)]

    once, (texts, size) = updated(True)
    plain, (all_texts, _) = updated(False)
    assert (texts, all_texts) == (size, SETTINGS["epochs"] * size)
    for a, b in zip(once, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_what_is_below_must_be_frozen_and_enough() -> None:
    def found(layers: list[int], change: Any = None) -> int:
        trunk = trunk_of(LMPolicy(adapted(tiny_lm(num_hidden_layers=LAYERS), layers)).model)
        if change is not None:
            change(trunk)
        return len(frozen_layers(trunk))

    assert [found([2]), found([1]), found([1, 2]), found([0, 2])] == [3, 2, 2, 0]
    assert found([2], lambda trunk: trunk.train()) == 0
    assert found([2], lambda trunk: trunk.norm.weight.requires_grad_()) == 0
    assert found([2], lambda trunk: trunk.embed_tokens.weight.requires_grad_()) == 0
    assert frozen_layers(trunk_of(LMPolicy(tiny_lm(num_hidden_layers=LAYERS)).model)) == []

    def remember(trunk: Any) -> None:
        """The uppermost layer adds what the lowest one has left for it."""
        layers, left = layers_in(trunk), []
        layers[0].register_forward_hook(lambda *_: left.append(1.0))
        layers[-1].register_forward_hook(lambda module, args, states: states + len(left))

    assert found([2], remember) == 0


def test_a_forward_that_fails_leaves_the_layers_as_they_were() -> None:
    policy = policy_of([2])
    layers = layers_in(trunk_of(policy.model))
    kept, rows = KeptStates(policy), np.arange(2)
    tokens, lengths = torch.randint(2, V, (2, 5)), np.array([5, 4])
    with kept.below(rows, lengths):
        plain = policy.states(tokens, lengths)[0]
    with pytest.raises(RuntimeError), kept.below(rows, lengths):
        raise RuntimeError
    assert not any("forward" in vars(layer) for layer in layers)
    assert not any(layer._forward_pre_hooks for layer in layers)
    with kept.below(rows, lengths):
        again = policy.states(tokens, lengths)[0]
    for length, a, b in zip(lengths, plain, again, strict=True):
        torch.testing.assert_close(a[:length], b[:length])
