"""Folders of models: plain transformers and plain peft load exactly what was saved."""

import copy
import json
import os
from pathlib import Path

import fakes
import numpy as np
import pytest
import torch
import transformers
from toy_env import tiny_lm

from tokenenv.agents import LMPolicy
from tokenenv.errors import InvalidArgument, RunFolderError
from tokenenv.models import saving
from tokenenv.models.bigram import Bigram
from tokenenv.models.residual_lm import ResidualLM
from tokenenv.models.saving import MARK, source_of, whole_folder

TOKENS = torch.tensor([[3, 4, 5, 6, 7, 8]])


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def moved(policy):
    """The policy, with trained weights that are not those it began with."""
    generator = torch.Generator().manual_seed(0)
    for weight in policy.parameters():
        if weight.requires_grad:
            weight.data.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return policy


def loaded(folder):
    """What plain transformers makes of a folder, and nothing is missing or left over."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), info
    return model


def with_peft(base, folder):
    """What plain peft makes of a base and a folder, without a warning about keys."""
    peft = pytest.importorskip("peft")
    with pytest.warns() as caught:
        model = peft.PeftModel.from_pretrained(base, folder)
    assert not [one for one in caught if "key" in str(one.message)]
    return model


TIED = ("llama", "gpt2", "gemma3", "opt", "mamba")


@pytest.mark.parametrize(
    ("architecture", "tied"),
    [*((name, False) for name in fakes.ARCHITECTURES), *((name, True) for name in TIED)],
)
def test_what_was_saved_is_loaded_exactly(architecture, tied, tmp_path):
    base = fakes.causal_lm(architecture, tie_word_embeddings=tied)
    full = moved(LMPolicy(copy.deepcopy(base)))
    full.save_pretrained(tmp_path / "full")
    assert torch.equal(logits(loaded(tmp_path / "full")), logits(full.model))
    if architecture == "mamba":  # which peft does not adapt
        return
    pytest.importorskip("peft")
    adapted = moved(LMPolicy(base, lora_rank=2))
    expected = logits(adapted.model)
    adapted.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(with_peft(copy.deepcopy(base), tmp_path / "adapter")), expected)
    adapted.save_pretrained(tmp_path / "merged", merge=True)
    merged = logits(loaded(tmp_path / "merged"))
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=5e-5)
    assert not torch.allclose(logits(base), expected, atol=1e-2)
    assert torch.equal(logits(adapted.model), expected)  # as it was before the saving


OWN = {
    "rank-stabilised, by a name": ({"use_rslora": True}, "mine"),
    "dora": ({"use_dora": True}, "default"),
    "a whole module": ({"modules_to_save": ["lm_head"]}, "default"),
    "no task": ({"task_type": None}, "default"),
}


@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_an_adapter_of_ones_own_is_saved_whatever_it_is(name, injected, tmp_path):
    peft = pytest.importorskip("peft")
    options, adapter = OWN[name]
    config = peft.LoraConfig(
        **{"r": 2, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", **options}
    )
    base, model = fakes.causal_lm(), fakes.causal_lm()
    fakes.saved(base, tmp_path / "base")
    model.config._name_or_path = str(tmp_path / "base")
    model = (
        peft.inject_adapter_in_model(config, model, adapter)
        if injected
        else peft.get_peft_model(model, config, adapter)
    )
    policy = moved(LMPolicy(model))
    expected = logits(policy.model)
    policy.save_pretrained(tmp_path / "out", tokenizer=fakes.tokenizer())
    assert torch.equal(logits(with_peft(base, tmp_path / "out")), expected)
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(auto), expected)
    policy.save_pretrained(tmp_path / "merged", merge=True)
    torch.testing.assert_close(logits(loaded(tmp_path / "merged")), expected, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("end", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("how", ["target_modules", "modules_to_save"])
def test_an_adapter_of_one_end_of_tied_embeddings_is_merged_into_that_end_alone(how, end, tmp_path):
    peft = pytest.importorskip("peft")
    base = fakes.causal_lm(tie_word_embeddings=True)
    options = {"r": 2, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], how: [end]}
    policy = moved(LMPolicy(peft.get_peft_model(base, peft.LoraConfig(**options))))
    policy.save_pretrained(tmp_path / "merged", merge=True)
    merged = loaded(tmp_path / "merged")
    assert not merged.config.tie_word_embeddings
    torch.testing.assert_close(logits(merged), logits(policy.model), rtol=1e-5, atol=5e-5)
    assert base.config.tie_word_embeddings


def test_an_adapter_does_not_replace_its_own_base(tmp_path):
    pytest.importorskip("peft")
    LMPolicy(fakes.causal_lm()).save_pretrained(tmp_path / "base")
    policy = moved(LMPolicy(loaded(tmp_path / "base"), lora_rank=2))
    with pytest.raises(InvalidArgument, match="holds the base model of this adapter"):
        policy.save_pretrained(tmp_path / "base")
    loaded(tmp_path / "base")  # which is still there
    policy.save_pretrained(tmp_path / "base", merge=True)
    assert not torch.allclose(logits(loaded(tmp_path / "base")), logits(fakes.causal_lm()))


def test_the_model_of_a_lora_policy_saves_its_adapter_by_itself(tmp_path):
    pytest.importorskip("peft")
    base = fakes.causal_lm()
    policy = moved(LMPolicy(base, lora_rank=2))
    policy.model.save_pretrained(tmp_path)
    assert torch.equal(logits(with_peft(base, tmp_path)), logits(policy.model))


def test_a_bfloat16_base_keeps_its_dtype_and_full_training_writes_float32(tmp_path):
    pytest.importorskip("peft")
    fakes.saved(fakes.causal_lm().bfloat16(), tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    policy = moved(LMPolicy(base, lora_rank=2))
    policy.save_pretrained(tmp_path / "adapter")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(with_peft(again, tmp_path / "adapter")), logits(policy.model))
    policy.save_pretrained(tmp_path / "merged", merge=True)
    merged = loaded(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(logits(merged), logits(policy.model), rtol=0, atol=0.3)
    full = LMPolicy(copy.deepcopy(base))
    full.save_pretrained(tmp_path / "full")
    assert loaded(tmp_path / "full").dtype == torch.float32


def test_a_base_is_named_so_that_it_is_found_again(tmp_path, monkeypatch):
    fakes.saved(fakes.causal_lm(), tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained("base")
    assert source_of(model) == (str(tmp_path / "base"), None)
    assert source_of(fakes.causal_lm()) == (None, None)
    model.config._name_or_path, model.config._commit_hash = "some/model", "0" * 40
    assert source_of(model) == ("some/model", "0" * 40)
    pytest.importorskip("peft")
    LMPolicy(model, lora_rank=2).save_pretrained("out")
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/model"
    assert config["revision"] == "0" * 40


def test_generation_settings_that_transformers_warns_of_are_saved_too(tmp_path):
    policy = LMPolicy(fakes.causal_lm())
    policy.model.generation_config.temperature = 0.6
    policy.model.generation_config.do_sample = False
    policy.save_pretrained(tmp_path)
    assert loaded(tmp_path).generation_config.temperature == 0.6


def test_what_is_no_model_of_transformers_is_refused_in_a_sentence(tmp_path):
    reference = Bigram(np.full((8, 7), 1 / 7))
    with pytest.raises(InvalidArgument, match=r"this policy is a ResidualLM; agent\.save\(path\)"):
        LMPolicy(ResidualLM(reference)).save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_several_active_adapters_are_saved_merged_alone(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(fakes.causal_lm(), config, "a")
    model.add_adapter("b", config)
    model.base_model.set_adapter(["a", "b"])
    policy = moved(LMPolicy(model))
    with pytest.raises(InvalidArgument, match=r"has 2 active adapters \(a, b\).*merge=True"):
        policy.save_pretrained(tmp_path / "out")
    policy.save_pretrained(tmp_path / "out", merge=True)
    found = logits(loaded(tmp_path / "out"))
    torch.testing.assert_close(found, logits(policy.model), rtol=1e-5, atol=5e-5)


# ---------------------------------------------------------------- the folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write(folder, **files):
    with whole_folder(folder) as new:
        for name, text in files.items():
            (new / name).write_text(text)


def test_a_save_replaces_an_earlier_one_and_nothing_else(tmp_path):
    out = tmp_path / "deep" / "out"
    write(out, a="1", b="2")
    write(out, a="3")
    assert sorted(contents(out)) == ["a", MARK]
    assert (out / "a").read_text() == "3"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    (out / "notes").write_text("mine")
    with pytest.raises(InvalidArgument, match="holds 'notes', which save_pretrained has not"):
        write(out, a="4")
    (out / MARK).write_text("[1, {")
    (out / "notes").unlink()
    with pytest.raises(InvalidArgument, match="holds 'a'"):
        write(out, a="4")
    assert (out / "a").read_text() == "3"
    with pytest.raises(InvalidArgument, match="is a file; it must be a folder"):
        write(out / "a", a="4")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", a="5")
    (tmp_path / "link").symlink_to(out.parent)
    write(tmp_path / "link" / "new", a="6")
    assert (out.parent / "new" / "a").read_text() == "6"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_is_interrupted_leaves_the_earlier_folder(error, tmp_path):
    write(tmp_path / "out", a="1")
    before = contents(tmp_path / "out")

    def interrupted():
        with whole_folder(tmp_path / "out") as new:
            (new / "a").write_text("half")
            assert contents(tmp_path / "out") == before
            raise error

    with pytest.raises(RunFolderError if isinstance(error, OSError) else error):
        interrupted()
    assert contents(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_new_folder_is_whole_on_disk_before_the_old_one_goes(tmp_path, monkeypatch):
    """And where the new one cannot take its place, the old one is put back."""
    write(tmp_path / "out", a="1")
    (tmp_path / "out.partial").mkdir()  # a folder of the user's, which no save touches
    synced, rename = [], Path.rename
    monkeypatch.setattr(saving, "_sync", lambda folder: synced.append(set(os.listdir(folder))))

    def killed(path, target):
        assert synced == [{"a", MARK}]
        if path.name == "new":
            raise SystemExit
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(SystemExit):
        write(tmp_path / "out", a="2")
    monkeypatch.undo()
    assert (tmp_path / "out" / "a").read_text() == "1"
    write(tmp_path / "out", a="3")
    assert (tmp_path / "out" / "a").read_text() == "3"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.partial"]


def test_models_are_saved_into_a_folder_that_is_swapped(tmp_path):
    policy = LMPolicy(tiny_lm())
    policy.save_pretrained(tmp_path / "out", tokenizer=fakes.tokenizer(), card="# A card")
    assert (tmp_path / "out" / "README.md").read_text() == "# A card"
    vocabulary = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert vocabulary == fakes.tokenizer().get_vocab()
    policy.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "README.md").exists()
