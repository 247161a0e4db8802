"""The bundled models: size, plain folders, and scripts that make the same text every time."""

import importlib
import json
import math
import random
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tokenenv.envs.language.bundled import ASSETS

SCRIPTS = Path(__file__).parents[2] / "scripts"
MODELS = (
    "arithmetic-lm",
    "calculator-lm",
    "pydocs-lm",
    "pydocs-reward",
    "reviews-lm",
    "reviews-reward",
)


def test_all_models_together_stay_below_ten_megabytes() -> None:
    assert sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file()) < 10_000_000


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_a_plain_folder_with_a_card(name: str) -> None:
    assert {file.name for file in (ASSETS / name).iterdir()} >= {
        *(
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "README.md",
        )
    }
    card = (ASSETS / name / "README.md").read_text()
    assert all(
        word in card
        for word in (
            "Data:",
            "parameters",
            "loss" if name.endswith("lm") else "score",
            "Size:",
            "scripts/",
        )
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_model_loads_with_the_auto_classes(name: str) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

    auto = AutoModelForCausalLM if name.endswith("lm") else AutoModelForTokenClassification
    model = auto.from_pretrained(ASSETS / name)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / name)
    config = json.loads((ASSETS / name / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]
    assert model.dtype == torch.bfloat16
    assert (config["head_dim"], config["num_key_value_heads"]) == (32, 1)
    assert config["attention_dropout"] == 0.0
    assert (config["vocab_size"], config["pad_token_id"]) == (
        len(tokenizer),
        tokenizer.pad_token_id,
    )
    assert config["eos_token_id"] == tokenizer.eos_token_id
    assert model.config.num_labels == 1 or name.endswith("lm")


@pytest.mark.parametrize("task", ["pydocs", "reviews"])
def test_both_models_of_a_task_have_one_tokenizer(task: str) -> None:
    first, second = (
        (ASSETS / f"{task}-{part}" / "tokenizer.json").read_bytes() for part in ("lm", "reward")
    )
    assert first == second


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module(request.param)


@pytest.mark.parametrize("script", ["make_reviews"], indirect=True)
def test_review_texts_depend_on_the_seed_alone(script: ModuleType) -> None:
    first, again, other = (script.make_texts(50, random.Random(seed)) for seed in (1, 1, 2))
    assert first == again != other
    tokenizer = script.make_tokenizer()
    saved = json.loads((ASSETS / "reviews-lm" / "tokenizer.json").read_text())
    assert tokenizer.get_vocab() == saved["model"]["vocab"]


@pytest.mark.parametrize("script", ["make_reviews"], indirect=True)
def test_targets_of_the_sentiment(script: ModuleType) -> None:
    words = script.split_words("a waiter said good morning. the tea was very nice.")
    one, two = 4 * math.tanh(0.5), 4 * math.tanh(1.0)
    assert script.running_score(words) == pytest.approx([0, 0, 0, one, 0, 0, 0, 0, 0, 0, two, two])


@pytest.mark.parametrize("script", ["make_arithmetic"], indirect=True)
def test_sums_depend_on_the_seed_alone_and_are_often_wrong(script: ModuleType) -> None:
    tokenizer = script.make_tokenizer()
    first, again, other = (
        script.make_texts("train", 400, random.Random(seed), tokenizer) for seed in (1, 1, 2)
    )
    assert first == again != other
    saved = json.loads((ASSETS / "arithmetic-lm" / "tokenizer.json").read_text())
    assert tokenizer.get_vocab() == saved["model"]["vocab"]
    questions = [tokenizer.decode(text, skip_special_tokens=True).split("=") for text in first]
    right = [sum(map(int, question.split("+"))) == int(answer) for question, answer in questions]
    assert 0.6 < sum(right) / len(right) < 0.85


@pytest.mark.parametrize("script", ["make_calculator"], indirect=True)
def test_pupils_call_the_calculator_and_copy_what_it_writes(script: ModuleType) -> None:
    tokenizer = script.make_tokenizer()
    first, again, other = (
        script.make_texts("train", 400, 0.5, random.Random(seed), tokenizer) for seed in (1, 1, 2)
    )
    assert first == again != other
    saved = json.loads((ASSETS / "calculator-lm" / "tokenizer.json").read_text())
    assert tokenizer.get_vocab() == saved["model"]["vocab"]
    calling = [segments for _, segments in first if len(segments) == 3]
    assert 0.4 < len(calling) / len(first) < 0.6
    for call, written, answer in calling:
        assert [call.own, written.own, answer.own] == [True, False, True]
        result = tokenizer.decode(written.tokens)
        assert result == "?" or result == f"{{{tokenizer.decode(answer.tokens[:-1])}}}"


@pytest.mark.parametrize("script", ["make_calculator"], indirect=True)
def test_no_loss_is_taken_of_what_the_calculator_writes(script: ModuleType) -> None:
    """A model that never expects the characters which it alone writes loses nothing by that."""
    tokenizer, never = script.make_tokenizer(), [*"{}?"]

    def model(input_ids: torch.Tensor, use_cache: bool) -> Any:
        assert any(tokenizer.convert_tokens_to_ids(one) in input_ids for one in never)
        logits = torch.zeros(*input_ids.shape, len(tokenizer))
        logits[..., tokenizer.convert_tokens_to_ids(never)] = -100.0
        return SimpleNamespace(logits=logits)

    texts = script.make_texts("train", 80, 1.0, random.Random(1), tokenizer)
    assert float(script.own_loss(model, texts)) == pytest.approx(math.log(len(tokenizer) - 3))


@pytest.mark.parametrize("script", ["make_pydocs"], indirect=True)
def test_targets_of_the_reading_ease(script: ModuleType) -> None:
    twelve = "The cat sat on the mat and it saw a big dog."
    easy = 206.835 - 1.015 * 12 - 84.6
    assert script.ease_so_far(twelve, False, 50.0) == pytest.approx(min(100.0, easy))
    assert script.ease_so_far("The cat sat", True, 50.0) == 0.0
    assert script.ease_so_far("", False, 50.0) == 50.0
    assert script.ease_so_far("The cat sat", False, 50.0) == pytest.approx(50 + 50 * 3 / 12)


@pytest.mark.parametrize("script", ["training"], indirect=True)
def test_batches_hold_every_text_once(script: ModuleType) -> None:
    lengths = [random.Random(0).randint(1, 40) for _ in range(50)]
    plan = script.batches(lengths, 8, random.Random(3))
    assert plan == script.batches(lengths, 8, random.Random(3))
    assert sorted(i for group in plan for i in group) == list(range(50))
    assert script.pad([[1], [2, 3]], 0).tolist() == [[1, 0], [2, 3]]
