import json

import fakes
import pytest
import torch
from safetensors.torch import load_file, save_file

from tokenenv.errors import InvalidArgument, ModelError
from tokenenv.models.loading import (
    check_same_tokens,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mamba"])
def test_a_saved_model_comes_back_frozen_and_equal(name, tmp_path):
    model = fakes.causal_lm(name)
    loaded = load_causal_lm(fakes.saved(model, tmp_path))
    tokens = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.dtype == torch.float32


def test_device_dtype_and_attention_are_passed_on(tmp_path):
    source = fakes.saved(fakes.causal_lm("llama"), tmp_path)
    loaded = load_causal_lm(source, device="cpu", dtype=torch.bfloat16, attn_implementation="eager")
    assert loaded.dtype == torch.bfloat16
    assert loaded.config._attn_implementation == "eager"


def test_a_model_object_is_returned_itself_and_moved_only_on_request():
    model = fakes.causal_lm("llama").requires_grad_(True).to(torch.bfloat16)
    assert load_causal_lm(model) is model
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.requires_grad
    assert load_causal_lm(model, dtype=torch.float32) is model
    assert model.dtype == torch.float32
    reward = fakes.reward_model("token")
    assert load_reward_model(reward) is reward


@pytest.mark.parametrize("kind", ["token", "sequence"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_saved_reward_model_comes_back_as_what_it_is(kind, architecture, tmp_path):
    model = fakes.reward_model(kind, architecture)
    loaded = load_reward_model(fakes.saved(model, tmp_path))
    assert type(loaded) is type(model)
    tokens = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)
    assert not loaded.training


def rewrite(directory, change):
    """Lets `change` edit the saved weights, a dict of tensors."""
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def test_a_head_without_trained_weights_is_an_error_not_a_random_head(tmp_path):
    fakes.saved(fakes.reward_model("token"), tmp_path)
    rewrite(tmp_path, lambda weights: [weights.pop(key) for key in ("score.weight", "score.bias")])
    with pytest.raises(
        ModelError,
        match=r"lacks trained weights for LlamaForTokenClassification: score.bias, score.w",
    ):
        load_reward_model(str(tmp_path))


def test_weights_of_the_wrong_shape_are_an_error(tmp_path):
    fakes.saved(fakes.causal_lm("llama"), tmp_path)
    rewrite(tmp_path, lambda weights: weights.update({"lm_head.weight": torch.zeros(7, 32)}))
    with pytest.raises(ModelError, match=r"model='.*'.*lm_head.weight"):
        load_causal_lm(str(tmp_path))


def test_a_trunk_alone_is_no_causal_lm(tmp_path):
    fakes.saved(fakes.causal_lm("llama").base_model, tmp_path)
    with pytest.raises(
        ModelError, match=r"lacks trained weights for LlamaForCausalLM: lm_head.weight"
    ):
        load_causal_lm(str(tmp_path))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: fakes.causal_lm("llama"),
            r"is \['LlamaForCausalLM'\]; allowed: sequence- or token-classification",
        ),
        (
            lambda: fakes.reward_model("token", num_labels=2),
            "has 2 labels; allowed: .* with one label",
        ),
        (lambda: fakes.reward_model("sequence", num_labels=5), "has 5 labels"),
        (lambda: fakes.bidirectional_reward_model(), "looks ahead .*; allowed: causal models"),
    ],
)
def test_what_is_no_scalar_causal_reward_model_is_refused(model, message, tmp_path):
    source = fakes.saved(model(), tmp_path)
    with pytest.raises(ModelError, match=message) as error:
        load_reward_model(source)
    assert source in str(error.value)


def test_a_bidirectional_reward_model_object_is_refused_by_class():
    with pytest.raises(ModelError, match=r"BertForTokenClassification.* looks ahead"):
        load_reward_model(fakes.bidirectional_reward_model())


def test_a_causal_lm_object_is_no_reward_model():
    with pytest.raises(ModelError, match=r"LlamaForCausalLM .* no scalar head"):
        load_reward_model(fakes.causal_lm("llama"))


@pytest.mark.parametrize("load", [load_causal_lm, load_reward_model, load_tokenizer])
def test_an_empty_directory_is_one_clear_error(load, tmp_path):
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(str(tmp_path))


def test_pickled_weights_are_refused(tmp_path):
    model = fakes.causal_lm("llama")
    fakes.saved(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"cannot be loaded .*safetensors"):
        load_causal_lm(str(tmp_path))


def test_code_that_comes_with_a_model_runs_only_on_request(tmp_path):
    fakes.saved(fakes.causal_lm("llama"), tmp_path)
    (tmp_path / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnLM"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_causal_lm(str(tmp_path))
    assert type(load_causal_lm(str(tmp_path), trust_remote_code=True)).__name__ == "OwnLM"


def test_a_saved_tokenizer_comes_back_and_an_object_is_returned_itself(tmp_path):
    tokenizer = fakes.tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert load_tokenizer(tokenizer) is tokenizer


def test_tokenizers_are_compared_token_by_token():
    policy = fakes.tokenizer()
    check_same_tokens(policy, fakes.tokenizer(), "reference")
    check_same_tokens(
        policy, fakes.tokenizer([*fakes.WORDS, "more"]), "reference"
    )  # ids nobody sends
    swapped = [fakes.WORDS[1], fakes.WORDS[0], *fakes.WORDS[2:]]
    with pytest.raises(ModelError, match=r"tokenizer of the reward model .* id 3 is 'an', not 'a'"):
        check_same_tokens(policy, fakes.tokenizer(swapped), "reward model")
    with pytest.raises(ModelError, match=r"tokenizer of the reference .* id 60 is None, not 'of'"):
        check_same_tokens(policy, fakes.tokenizer(list(fakes.WORDS[:-1])), "reference")


def test_the_fake_tokenizer_fits_the_fake_models():
    tokenizer = fakes.tokenizer()
    assert len(tokenizer) == fakes.VOCAB_SIZE
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (fakes.PAD, fakes.EOS)
    ids = tokenizer("the cat was good")["input_ids"]
    assert tokenizer.decode(ids) == "the cat was good"


TASKS = {"token": "TOKEN_CLS", "sequence": "SEQ_CLS"}


def saved_adapter(model, directory, kind, **options):
    """A folder of peft's with an adapter that adds something."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type=TASKS.get(kind), **options)
    adapted = get_peft_model(model, config).eval()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    adapted.save_pretrained(directory)
    return adapted


@pytest.mark.parametrize("base", ["a language model", "a reward model"])
@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_an_adapter_is_loaded_with_its_base_and_a_trained_head(kind, base, tmp_path):
    pytest.importorskip("peft")
    reward = fakes.reward_model(kind)
    made = reward if base == "a reward model" else fakes.causal_lm()
    path = fakes.saved(made, tmp_path / "base")
    torch.manual_seed(1)  # a head that the base does not have is drawn here
    model = type(reward).from_pretrained(path, num_labels=1, pad_token_id=fakes.PAD)
    adapted = saved_adapter(model, tmp_path / "adapter", kind)
    loaded, tokens = load_reward_model(str(tmp_path / "adapter")), torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(loaded(tokens).logits, adapted(tokens).logits)
    with adapted.disable_adapter():
        assert not torch.allclose(loaded(tokens).logits, adapted(tokens).logits, atol=1e-2)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("kind", ["token", None])
def test_an_adapter_of_a_language_model_that_brings_no_head_is_no_reward_model(kind, tmp_path):
    pytest.importorskip("peft")
    path = fakes.saved(fakes.causal_lm(), tmp_path / "base")
    model = type(fakes.causal_lm()).from_pretrained(path)
    saved_adapter(model, tmp_path / "adapter", None)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["task_type"] = TASKS.get(kind)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"an adapter of .*base', which has no scalar head"):
        load_reward_model(str(tmp_path / "adapter"))


@pytest.mark.parametrize("source", [torch.nn.ModuleList([torch.nn.ReLU()] * 99), "x" * 5000])
def test_what_is_no_name_of_a_folder_is_refused_in_words(source):
    with pytest.raises((ModelError, InvalidArgument), match="reward_model="):
        load_reward_model(source, argument="reward_model")
