"""Models that are loaded apart and hold the same numbers are in memory once, and run once."""

import copy

import fakes
import gymnasium as gym
import numpy as np
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import tokenenv  # noqa: F401
from tokenenv.agents import GRPO, KLQ, PPO, BestOfN, Reference, VinePPO
from tokenenv.agents.run.checkpoint import agent_state, flat
from tokenenv.agents.run.evaluate import evaluate
from tokenenv.agents.run.load_policy import load_policy
from tokenenv.models.adapters import merged, with_lora
from tokenenv.models.sharing import share_equal

pytest.importorskip("peft")


def places(*models):
    """Bytes of each memory that weights lie in, once."""
    weights = [w for model in models for w in model.parameters()]
    return {w.data_ptr(): w.untyped_storage().nbytes() for w in weights}


def on_trunk_of(model, **changes):
    """A reward model of the same shape whose trunk has the same numbers."""
    reward = fakes.reward_model("token", **changes)
    reward.model.load_state_dict(model.model.state_dict())
    return reward


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy, the same again, and reward models: a head on its trunk, and one with a trunk that
    adapters were merged into."""
    root, model = tmp_path_factory.mktemp("models"), fakes.causal_lm()
    adapted = with_lora(model, 2, 0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            weight += 0.1 * ("lora_B" in name)
    made = {
        "policy": model,
        "again": model,
        "other": fakes.causal_lm(seed=5),
        "head": on_trunk_of(model),
        "merged": on_trunk_of(merged(adapted)),
    }
    return {name: fakes.saved(one, root / name) for name, one in made.items()}


def make(folders, num_envs=2, **options):
    options = {"max_new_tokens": 4, "autoreset_mode": "SameStep", **options}
    given = {"model": folders["policy"], "prompts": ["the cat", "a dog is"]} | options
    return gym.make_vec("tokenenv/TextGen-v0", num_envs=num_envs, **given)


def core_models(envs):
    task = envs.unwrapped._engine.context.task
    return [m for m in (task.reference, task.model, task.implicit_model, task.teacher) if m]


def test_a_head_on_the_policys_trunk_is_one_forward(folders):
    envs = make(folders, reward_model=folders["head"])
    engine = envs.unwrapped._engine
    trunk, head = engine.context.scorer.model, engine.context.scorer.head.linear
    assert trunk is engine.context.reference.model
    assert len(engine.trunks._slots) == 1
    sizes = sum(places(engine.context.reference).values())
    assert sum(places(engine.context.reference, trunk, head).values()) - sizes == sum(
        weight.nbytes for weight in head.parameters()
    )
    # The same rewards as where the model is an object, which is left as it is.
    apart = make(folders, reward_model=on_trunk_of(fakes.causal_lm()), reward_tokenizer=None)
    assert len(apart.unwrapped._engine.trunks._slots) == 2
    texts = {"prompts": ["the cat"] * 2, "responses": [[5, 9, 7], [8, 1]]}
    one, other = (e.unwrapped.score_episodes(**texts) for e in (envs, apart))
    np.testing.assert_allclose(one.token_rewards, other.token_rewards, rtol=0, atol=1e-5)
    assert np.abs(one.token_rewards).max() > 0.1


def test_what_adapters_were_merged_into_shares_what_they_left(folders):
    context = make(folders, reward_model=folders["merged"]).unwrapped._engine.context
    policy, reward = context.reference.model, context.scorer.model
    assert reward is not policy
    assert reward.embed_tokens.weight is policy.embed_tokens.weight
    assert reward.layers[0].mlp.up_proj.weight is not policy.layers[0].mlp.up_proj.weight


def adapter_of(folder, kind, path):
    """A folder of peft's: an adapter on the policy's model, which brings a head if it scores."""
    from peft import LoraConfig, get_peft_model

    task = {"reward_model": "TOKEN_CLS"}.get(kind, "CAUSAL_LM")
    auto = {"TOKEN_CLS": "AutoModelForTokenClassification"}.get(task, "AutoModelForCausalLM")
    labels = {"num_labels": 1} if task == "TOKEN_CLS" else {}
    model = getattr(transformers, auto).from_pretrained(folder, **labels)
    config = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type=task)
    adapted, generator = get_peft_model(model, config), torch.Generator().manual_seed(0)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3, generator=generator)
    adapted.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("named", ["reward_model", "implicit_model", "teacher"])
def test_an_adapter_on_the_policys_model_is_one_base_and_one_forward(folders, named, tmp_path):
    reward = {"reward_model": "token", "implicit_model": "implicit", "teacher": "distill"}[named]
    source = adapter_of(folders["policy"], named, tmp_path / "adapter")
    own = {"reward_tokenizer": fakes.tokenizer()} if named == "reward_model" else {}
    envs = make(folders, reward=reward, tokenizer=fakes.tokenizer(), **{named: source}, **own)
    engine = envs.unwrapped._engine
    trunks = list(engine.trunks._slots)
    assert len(trunks) == 2
    shared, alone = sum(places(*trunks).values()), sum(places(trunks[0]).values())
    adapters = [w for name, w in trunks[1].named_parameters() if "lora_" in name]
    assert shared - alone == sum(w.nbytes for w in adapters)
    assert [len(stack.models) for stack in engine.trunks._stacks] == [2]
    # Stepping in one forward pays what scoring pays, model by model.
    infos = envs.reset(seed=0)[1]
    tokens = [np.array([5, 9]), np.array([7, 4]), np.array([6, 8]), np.array([9, 9])]
    paid = np.stack([envs.step(token)[1] for token in tokens], 1)
    prompts = [envs.unwrapped.prompts[i] for i in infos["prompt_id"]]
    scores = envs.unwrapped.score_episodes(prompts, np.stack(tokens, 1).tolist())
    np.testing.assert_allclose(paid, scores.token_rewards, rtol=0, atol=1e-5)
    assert np.abs(paid).max() > 0.1


@pytest.mark.parametrize("named", ["reference", "implicit_model", "teacher"])
def test_the_same_language_model_in_another_folder_is_in_memory_once(folders, named):
    reward = {"reward": "distill"} if named == "teacher" else {}
    envs = make(folders, **{named: folders["again"]}, **reward)
    models = core_models(envs)
    assert sum(places(*models).values()) == sum(places(models[0]).values())
    assert len(envs.unwrapped._engine.trunks._slots) == 1
    other = make(folders, **{named: folders["other"]}, **reward)
    assert sum(places(*core_models(other)).values()) == 2 * sum(places(models[0]).values())


def test_one_folder_named_twice_is_loaded_once(folders):
    """Also where the env is given the models in place of its task's."""
    options = {"implicit_model": folders["other"], "teacher": folders["other"]}
    task = make(folders, **options).unwrapped._engine.context.task
    assert places(task.implicit_model) == places(task.teacher)
    assert task.implicit_model.model is task.teacher.model


def test_models_that_compute_something_else_from_the_same_weights_stay_two_modules():
    model = fakes.causal_lm()
    other_rope = {"rope_type": "default", "rope_theta": 50.0}
    reward, tokens = on_trunk_of(model, rope_parameters=other_rope), torch.tensor([[4, 5, 6, 7]])
    scores = reward(input_ids=tokens).logits
    share_equal(reward, model)
    assert reward.model is not model.model
    assert reward.model.embed_tokens.weight is model.model.embed_tokens.weight
    assert torch.equal(reward(input_ids=tokens).logits, scores)


class Copies(TorchDispatchMode):
    """Notes every operation that makes another tensor out of one of these weights' numbers."""

    def __init__(self, weights):
        super().__init__()
        self.weights, self.found = {w.data_ptr(): w for w in weights}, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.data_ptr() not in self.weights:
            same = [w for w in self.weights.values() if w.shape == result.shape]
            if any(torch.equal(w, result) for w in same):
                self.found.append(str(function))
        return result


CASES = {
    "ppo": (PPO, {}),
    "a critic with a trunk of its own": (KLQ, {"separate_value": True}),
    "a KL over the whole vocabulary": (GRPO, {"full_kl_coef": 0.1, "distill_coef": 0.1}),
    "continuations": (VinePPO, {"segments": 2, "rollouts": 2}),
    "best of n": (BestOfN, {"lora_rank": 0}),
    "the reference": (Reference, {"lora_rank": 0}),
}


@pytest.mark.parametrize("name", CASES)
def test_no_second_copy_of_a_frozen_model_is_made_anywhere(name, folders, tmp_path):
    algorithm, options = CASES[name]
    group = {"group_size": 2} if algorithm in (GRPO, BestOfN) else {}
    teacher = {"teacher": folders["other"]} if "distill_coef" in options else {}
    envs = make(folders, reward_model=folders["head"], kl_coef=0.1, **group, **teacher)
    frozen = [w for model in core_models(envs) for w in model.parameters()]
    before = copy.deepcopy(frozen)
    with Copies(frozen) as copies:
        settings = {"lora_rank": 2, "lr": 1e-2, "batch_tokens": 12, **options}
        agent = algorithm(envs, **settings).learn(24)
        agent.save(tmp_path / "checkpoint")
        evaluate(agent, envs, num_texts=2)
        loaded = load_policy(tmp_path / "checkpoint", envs)
        evaluate(loaded, envs, num_texts=2)
        algorithm.load(tmp_path / "checkpoint", envs).learn(36)
    assert copies.found == []
    assert all(map(torch.equal, frozen, before))
    held = {value.data_ptr() for _, value in flat(agent_state(agent)) if torch.is_tensor(value)}
    assert not held & {weight.data_ptr() for weight in frozen}


def test_a_copy_would_be_noticed():
    model = fakes.causal_lm()
    with Copies(list(model.parameters())) as copies:
        copy.deepcopy(model)
    assert copies.found
    assert set(copies.found) == {"aten.clone.default"}


def test_a_checkpoint_has_the_size_of_what_is_trained(folders, tmp_path):
    agent = PPO(make(folders), lora_rank=2, batch_tokens=12).learn(12)
    agent.save(tmp_path / "checkpoint")
    trained = sum(w.nbytes for w in agent.policy.parameters() if w.requires_grad)
    frozen = sum(places(core_models(agent.envs)[0]).values())
    # The weights, two moments, and less than one frozen model of everything else.
    assert (tmp_path / "checkpoint").stat().st_size < 3 * trained + frozen
