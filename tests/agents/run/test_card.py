"""`agent.save_pretrained`: the folder, its card, and that training does not notice."""

import math

import fakes
import gymnasium as gym
import pytest
import torch
import yaml

from tokenenv.agents import GRPO, PPO
from tokenenv.agents.run.card import is_hub_id
from tokenenv.errors import InvalidArgument
from tokenenv.models.adapters import active_adapters
from tokenenv.rollout.weights import named_weights

TOKENS = torch.tensor([[3, 4, 5, 6]])


def praise(prompt, response):
    return response.count("a")


def make(model, **options):
    options = {"prompts": ["the cat", "a dog saw"], "reward": praise, **options}
    return gym.make_vec("tokenenv/TextGen-v0", num_envs=4, model=model, max_new_tokens=6, **options)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def header(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


@pytest.fixture
def base(tmp_path):
    return fakes.saved(fakes.causal_lm(), tmp_path / "base")


def test_an_adapter_is_gone_on_with_from_its_folder(base, tmp_path):
    """Saved, loaded by plain peft, taken as `model=`, trained on, and saved as an adapter of the
    same base."""
    peft = pytest.importorskip("peft")
    options = {"batch_tokens": 24, "lr": 1e-2}
    agent = PPO(make(base), lora_rank=2, **options).learn(48)
    agent.save_pretrained(tmp_path / "one")
    one = logits(agent.policy.model)
    assert not torch.equal(one, logits(agent.core.reference))
    envs = make(str(tmp_path / "one"))  # with the tokenizer in it
    assert torch.equal(logits(envs.unwrapped.reference), one)
    with pytest.raises(InvalidArgument, match=r"has an adapter already.*lora_rank at 0.*merge"):
        PPO(envs, lora_rank=2)
    further = PPO(envs, **options).learn(48)
    further.save_pretrained(tmp_path / "two")
    two = logits(further.policy.model)
    assert not torch.equal(one, two)
    assert torch.equal(logits(envs.unwrapped.reference), one)
    for folder, expected in (("one", one), ("two", two)):
        config = peft.PeftConfig.from_pretrained(tmp_path / folder)
        assert config.base_model_name_or_path == base
        auto = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(logits(auto), expected)
    # Nor do engines get names of the base that the adapter's file has.
    assert named_weights(further.policy.model).keys() == agent.core.reference.state_dict().keys()
    further.save_pretrained(tmp_path / "three", merge=True)
    merged = make(str(tmp_path / "three")).unwrapped.reference
    assert active_adapters(merged) == []
    torch.testing.assert_close(logits(merged), two, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_training_does_not_notice_that_its_policy_is_saved(lora_rank, base, tmp_path):
    def weights(save):
        def on_update(metrics, episodes):
            if save:
                agent.save_pretrained(tmp_path / "out", merge=True)

        agent = PPO(make(base), lora_rank=lora_rank, lr=1e-3, batch_tokens=24)
        return list(agent.learn(60, on_update=on_update).policy.parameters())

    pytest.importorskip("peft")
    for one, other in zip(weights(False), weights(True), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_a_card_says_what_a_policy_was_made_from_and_with(base, tmp_path):
    pytest.importorskip("peft")
    envs = make(base, group_size=2, kl_coef=0.2)
    agent = GRPO(envs, lora_rank=2, batch_tokens=24, seed=7, run_dir=tmp_path / "run")
    agent.save_pretrained(tmp_path / "new")
    assert "objective/" not in (tmp_path / "new" / "README.md").read_text()
    agent.learn(30)
    agent.save_pretrained(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert header(tmp_path / "out") == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["tokenenv", "reinforcement-learning", "grpo", "lora"],
    }
    seen = f"- Tokens: {agent.tokens_seen} in {agent.updates} updates\n"
    kl = f"- `objective/kl` of the last update: {agent.metrics['objective/kl']:.4g}\n"
    for line in (
        "# GRPO on tokenenv/TextGen-v0\n",
        f"- Base model: {base}\n",
        "- Reward: rule (Rule of praise, weight 1.0), kl (ReferenceKL, weight 1.0)\n",
        seen,
        kl,
        "import AutoPeftModelForCausalLM as Model\n",
        "\nseed: 7\n",
    ):
        assert line in card
    assert math.isfinite(agent.metrics["objective/kl"])
    agent.save_pretrained(tmp_path / "out", merge=True)
    assert header(tmp_path / "out")["library_name"] == "transformers"
    assert "import AutoModelForCausalLM as Model" in (tmp_path / "out" / "README.md").read_text()


def test_a_hub_id_is_the_base_model_of_the_header(base, tmp_path):
    """A hub refuses a card with a path there."""
    agent = PPO(make(base))
    agent.policy.model.config._name_or_path = "some-one/Model-1.5B"
    agent.save_pretrained(tmp_path / "out")
    assert header(tmp_path / "out")["base_model"] == "some-one/Model-1.5B"
    names = ("gpt2", "a/b", "/a/b", "./a", "~/a", "a/b/c", "a b", "", None)
    assert [is_hub_id(name) for name in names] == [True, True] + [False] * 7


def test_a_policy_that_is_no_transformers_model_says_where_it_is_kept(tmp_path):
    agent = PPO(gym.make_vec("tokenenv/Brackets-v0", num_envs=4))
    with pytest.raises(InvalidArgument, match=r"this policy is a ResidualLM; agent\.save\(path\)"):
        agent.save_pretrained(tmp_path / "out")


def test_a_bundled_model_is_saved_with_its_tokenizer(tmp_path):
    envs = gym.make_vec("tokenenv/Reviews-v0", num_envs=2)
    PPO(envs).save_pretrained(tmp_path / "out")
    again = make(str(tmp_path / "out"), prompts=["the soup was"])
    assert again.unwrapped.token_spec.tokenizer.get_vocab()
