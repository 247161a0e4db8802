"""Adapters beside a frozen model: what they share with it, what they leave alone."""

import copy

import fakes
import gymnasium as gym
import numpy as np
import pytest
import torch
from toy_env import P, T, ToyEnv, tiny_lm

from tokenenv.agents import GRPO, KLQ, PPO, LMPolicy, Reference
from tokenenv.agents.rollout.actor import Actor
from tokenenv.agents.run.checkpoint import trained_weights
from tokenenv.agents.run.evaluate import evaluate
from tokenenv.agents.run.load_policy import load_policy
from tokenenv.errors import InvalidArgument
from tokenenv.models.adapters import adapter_layers, beside, in_own_dtype

peft = pytest.importorskip("peft")
TOKENS = torch.tensor([[2, 3, 4]])


def with_adapter(model, **options):
    config = peft.LoraConfig(
        r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, **options
    )
    return peft.get_peft_model(model, config)


def places(*modules):
    """Bytes of each memory that the weights of the modules lie in, once."""
    weights = [weight for module in modules for weight in module.parameters()]
    return {w.data_ptr(): w.untyped_storage().nbytes() for w in weights}


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


HALF = torch.bfloat16
CASES = {
    "ppo": (PPO, {}, torch.float32),
    "on bfloat16": (PPO, {}, HALF),
    "of an adapter on bfloat16": (PPO, {"lora_rank": 0, "separate_value": True}, HALF),
    "a critic with a trunk of its own": (KLQ, {"separate_value": True}, torch.float32),
    "a KL over the whole vocabulary": (GRPO, {"full_kl_coef": 0.1}, torch.float32),
    "bfloat16 forwards": (PPO, {"precision": "bfloat16"}, torch.float32),
    "the reference": (Reference, {"lora_rank": 0}, HALF),
}


@pytest.mark.parametrize("name", CASES)
def test_one_base_is_in_memory_and_stays_as_it_was(name):
    algorithm, options, dtype = CASES[name]
    model = tiny_lm(initializer_range=0.3, max_position_embeddings=P + T).to(dtype)
    if "adapter" in name:
        model = with_adapter(model).requires_grad_(False)
    envs = ToyEnv(4, kl_coef=0.1, reference=model, group_size=2 if algorithm is GRPO else 1)
    before, sizes = copy.deepcopy(model.state_dict()), places(model)
    agent = algorithm(envs, **{"lora_rank": 2, "lr": 1e-2, "batch_tokens": 20, **options})
    assert torch.equal(logits(agent.policy.model), logits(model))  # bit for bit, before learning
    trained = trained_weights(agent.policy)
    assert {w.dtype for w in trained.values()} == {torch.float32}
    assert all("lora_" in key or key.startswith("value_head") for key in trained)
    together = sum(places(model, agent.policy).values())
    assert together == sum(sizes.values()) + sum(4 * w.numel() for w in trained.values())

    agent.learn(40)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not any(weight.requires_grad for weight in model.parameters())
    base = [w for w in agent.policy.model.parameters() if not w.requires_grad]
    assert {weight.dtype for weight in base} == {dtype}
    assert sum(places(model, agent.policy).values()) == together
    if algorithm is not Reference:
        assert not torch.equal(logits(agent.policy.model), logits(model))
        state = [one["exp_avg"] for one in agent.optimizer.state.values()]
        assert {one.dtype for one in state} == {torch.float32}


@pytest.mark.parametrize("env", ["toy", "automaton"])
def test_a_reference_that_was_saved_goes_on_and_is_read_by_itself(env, tmp_path):
    def make():
        if env == "automaton":
            return gym.make_vec("tokenenv/Brackets-v0", num_envs=2, max_new_tokens=6)
        return ToyEnv(2, kl_coef=0.1, reference=tiny_lm().bfloat16())

    agent = Reference(make(), batch_tokens=12).learn(12)
    agent.save(tmp_path / "c")
    further = Reference.load(tmp_path / "c", make())
    one, other = agent.learn(24).metrics, further.learn(24).metrics
    del one["time/tokens_per_second"], other["time/tokens_per_second"]
    np.testing.assert_equal(one, other)
    policy = load_policy(tmp_path / "c", make())
    texts = [evaluate(one, make(), num_texts=4).episodes for one in (policy, agent)]
    assert [e.response.tolist() for e in texts[0]] == [e.response.tolist() for e in texts[1]]
    with pytest.raises(InvalidArgument, match="policy's model has no weight to train"):
        PPO(make(), policy=policy)


def test_a_copy_of_an_agent_has_one_base_too():
    agent = PPO(ToyEnv(4), lora_rank=2, separate_value=True, batch_tokens=20)
    twin = copy.deepcopy(agent)
    shared = places(agent.core.reference)
    own = places(twin.core.reference)
    assert sum(places(twin.core.reference, twin.policy).values()) == sum(
        places(agent.core.reference, agent.policy).values()
    )
    assert not own.keys() & shared.keys()
    mine, others = agent.learn(40).policy.parameters(), twin.learn(40).policy.parameters()
    assert all(map(torch.equal, mine, others))


@pytest.mark.parametrize("separate_value", [False, True])
def test_a_run_on_a_bfloat16_base_goes_on_exactly(separate_value, tmp_path):
    def make():
        return ToyEnv(4, kl_coef=0.1, reference=tiny_lm(initializer_range=0.3).bfloat16())

    options = {"lora_rank": 2, "separate_value": separate_value, "batch_tokens": 20, "lr": 1e-2}
    agent = PPO(make(), lr_schedule="constant", **options).learn(30)
    agent.save(tmp_path / "c")
    resumed = PPO.load(tmp_path / "c", make()).learn(60)
    mine, others = agent.learn(60).policy.parameters(), resumed.policy.parameters()
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(mine, others, strict=True))


def test_full_weights_are_a_copy_in_float32():
    """Small steps would be lost on bfloat16 weights."""
    model = tiny_lm().bfloat16()
    agent = PPO(ToyEnv(4, reference=model), batch_tokens=20, lr=1e-5, separate_value=True)
    assert not places(model).keys() & places(agent.policy).keys()
    assert {weight.dtype for weight in agent.policy.parameters()} == {torch.float32}
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    before = copy.deepcopy(agent.policy.state_dict())
    agent.learn(40)
    moved = [
        key for key, value in agent.policy.state_dict().items() if not before[key].equal(value)
    ]
    assert len(moved) == len(before)


@pytest.mark.parametrize("what", ["float16", "modules_to_save", "modules_to_save, float32"])
def test_weights_that_adapters_cannot_be_trained_on_become_float32_in_a_copy(what):
    model, whole = tiny_lm(initializer_range=0.3), {"modules_to_save": ["lm_head"]}
    if what == "float16":
        model, options = model.half(), {"lora_rank": 2}
    else:
        model = model if "float32" in what else model.bfloat16()
        model, options = with_adapter(model, **whole).requires_grad_(False), {}
    before = copy.deepcopy(model.state_dict())
    shares = what == "modules_to_save, float32"
    assert in_own_dtype(model) == shares
    agent = PPO(ToyEnv(4, reference=model), lr=1e-2, batch_tokens=20, **options).learn(40)
    assert {weight.dtype for weight in agent.policy.parameters()} == {torch.float32}
    assert bool(places(model).keys() & places(agent.policy).keys()) == shares
    assert ("lm_head" in " ".join(trained_weights(agent.policy))) == ("modules" in what)
    for key, value in model.state_dict().items():
        assert value.dtype == before[key].dtype, key
        assert torch.equal(value, before[key]), key


def test_acting_and_learning_agree_on_a_bfloat16_base():
    policy = LMPolicy(tiny_lm(initializer_range=0.3).bfloat16(), lora_rank=2)
    for weight in trained_weights(policy.model).values():
        torch.nn.init.normal_(weight, std=0.1)
    actor, text = Actor(policy), [2, 3]
    for _ in range(4):
        obs = {
            "tokens": np.array([text + [0] * (P + T - len(text))]),
            "length": np.array([len(text)]),
            "prompt_length": np.array([2]),
        }
        token, logprob = actor.act(obs)
        assert logprob.dtype == torch.float32
        with torch.no_grad():
            full = policy.model(input_ids=torch.tensor([text])).logits[0, -1].float()
        expected = torch.log_softmax(full, -1)[token]
        torch.testing.assert_close(logprob, expected, rtol=0, atol=0.02)
        text.append(int(token))


def test_a_policy_of_a_given_model_shares_it_and_freezes_it():
    model = tiny_lm().requires_grad_(True)
    policy = LMPolicy(model, lora_rank=2)
    assert places(model).keys() < places(policy).keys()
    assert adapter_layers(model) == []
    assert not any(weight.requires_grad for weight in model.parameters())
    envs = ToyEnv(4, reference=model)
    PPO(envs, policy=policy, batch_tokens=20).learn(20)
    assert torch.equal(logits(model), logits(tiny_lm()))


def test_buffers_are_copies():
    """Fixing a RoPE writes to one of them, at a length that may be the policy's alone."""
    model = fakes.causal_lm("llama_dynamic")
    mine, theirs = dict(beside(model).named_buffers()), dict(model.named_buffers())
    assert mine.keys() == theirs.keys() != set()
    assert all(mine[name] is not theirs[name] for name in mine)


def test_a_model_that_peft_does_not_adapt_is_refused_in_a_sentence():
    with pytest.raises(InvalidArgument, match="lora_rank=2: peft cannot adapt MambaForCausalLM"):
        LMPolicy(fakes.causal_lm("mamba"), lora_rank=2)
