"""The small transformer on top of a bigram: a policy that starts as the reference and can leave
it."""

import copy

import numpy as np
import pytest
import torch
from naive_scores import make_task

from tokenenv.agents import LMPolicy
from tokenenv.agents.rollout.actor import Actor
from tokenenv.models.residual_lm import ResidualLM
from tokenenv.models.trunks import trunk_of

TOKENS = torch.tensor([[0, 5, 9, 63, 5], [0, 63, 2, 0, 0]])
LENGTHS = [5, 3]


def make(seed: int = 0, vocab_size: int = 64) -> ResidualLM:
    return ResidualLM(make_task("DelayedKey", vocab_size=vocab_size).reference, seed=seed)


def moved(seed: int = 0, vocab_size: int = 64) -> ResidualLM:
    """As after some training."""
    model = make(seed, vocab_size)
    torch.nn.init.normal_(model.output.weight, generator=torch.Generator().manual_seed(1))
    return model


def logprobs(model: ResidualLM) -> torch.Tensor:
    """(2, 5, V)."""
    states = model.states(TOKENS, LENGTHS)
    return model.head(states.flatten(0, 1)).log_softmax(-1).view(2, 5, -1)


def weights(model: ResidualLM) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def test_it_starts_exactly_as_the_reference():
    model = make()
    reference = model.reference
    expected = reference.head(reference.states(TOKENS, LENGTHS))
    states = model.states(TOKENS, LENGTHS)
    assert torch.equal(model.head(states.flatten(0, 1)).view(2, 5, -1), expected)
    assert not torch.allclose(logprobs(moved()), expected, atol=0.1)


def test_its_logits_are_the_sum_of_two():
    model = moved()
    hidden = model.trunk(input_ids=TOKENS[:1], use_cache=False)[0][0]
    rows = torch.tensor([64, 5, 9, 63, 5])
    expected = hidden @ model.output.weight.T + model.reference.logprobs[rows]
    torch.testing.assert_close(
        model.head(model.states(TOKENS, LENGTHS)[0]), expected, atol=1e-4, rtol=1e-5
    )


def test_it_sees_more_than_the_last_token():
    model = moved()
    other = model.states(torch.tensor([[0, 7, 9, 63, 5]]), [5])
    same_last = model.states(TOKENS[:1], [5])
    assert not torch.allclose(model.head(other[:, -1]), model.head(same_last[:, -1]), atol=1e-2)


def test_sizes():
    model = make()
    assert 60_000 < sum(p.numel() for p in model.parameters()) < 80_000
    assert (model.vocab_size, model.hidden_size, model.device.type) == (64, 48, "cpu")
    assert model.states(TOKENS, LENGTHS).shape == (2, 5, 49)
    assert trunk_of(model) is model
    assert model.trunk.config.max_position_embeddings >= 1 + 128


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, again, other = weights(make()), weights(make()), weights(make(seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["trunk.embed_tokens.weight"], other["trunk.embed_tokens.weight"])


def test_copies_share_nothing_that_is_trained():
    model = make().requires_grad_(False)
    clone = copy.deepcopy(model).float().requires_grad_(True)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.normal_()
    assert not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(logprobs(model), logprobs(make()), atol=0, rtol=0)
    assert not torch.allclose(logprobs(clone), logprobs(model), atol=1e-2)
    np.testing.assert_array_equal(clone.reference.probs, model.reference.probs)


def test_a_state_dict_holds_what_is_trained_and_nothing_else():
    trained = moved()
    assert set(trained.state_dict()) == set(weights(trained))
    fresh = make(seed=3)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(logprobs(fresh), logprobs(trained))


def test_gradients_reach_every_weight_but_padding_none():
    model = moved()
    logprobs(model)[1, 2, 7].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    embedded = model.trunk.embed_tokens.weight.grad.abs().sum(1)
    assert set(embedded.nonzero().flatten().tolist()) == {0, 63, 2}
    with torch.no_grad():
        assert not model.states(TOKENS, LENGTHS).requires_grad


def test_a_first_step_of_learning_is_possible_from_zero():
    model = make()
    logprobs(model)[0, 4, 7].backward()
    assert model.output.weight.grad.abs().sum() > 0


def test_ids_the_model_lacks_are_read_as_the_last():
    model = moved()
    wild = torch.where(TOKENS == 63, 10_000, TOKENS)
    assert torch.equal(model.states(wild, LENGTHS), model.states(TOKENS, LENGTHS))


@pytest.mark.parametrize("vocab_size", [64, 500])
def test_half_precision_does_not_touch_the_reference(vocab_size):
    """Row numbers above 256 would be rounded."""
    model = make(vocab_size=vocab_size)
    tokens = torch.tensor([[0, vocab_size - 1, vocab_size - 3]])
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.head(model.states(tokens, [3])[0])
    assert logits.dtype == torch.float32
    assert torch.equal(
        logits, model.reference.logprobs[[vocab_size, vocab_size - 1, vocab_size - 3]]
    )


def test_an_agent_can_act_and_learn_with_it():
    policy = LMPolicy(copy.deepcopy(moved().requires_grad_(False)))
    assert all(p.requires_grad for p in policy.model.parameters())
    assert policy.value_head.in_features == 48
    counts = {"length": np.array([5, 3]), "prompt_length": np.array([1, 1])}
    tokens, logprob = Actor(policy, seed=0).act({"tokens": TOKENS.numpy(), **counts})
    expected = logprobs(policy.model)[[0, 1], [4, 2], tokens]
    torch.testing.assert_close(logprob, expected.detach(), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        policy.value_head.weight.fill_(1.0)
    states, value_states = policy.states(TOKENS, np.array(LENGTHS))
    torch.testing.assert_close(
        policy.value(value_states[:, 2]), states[:, 2, :-1].sum(1), atol=1e-4, rtol=1e-5
    )
