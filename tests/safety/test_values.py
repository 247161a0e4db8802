"""Numbers are numbers wherever they are typed; words stay words; YAML files hold plain values
alone."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from tokenenv.cli import load_config, main
from tokenenv.cli.train import Train, option_values, save_config
from tokenenv.errors import InvalidArgument
from tokenenv.safety.values import fit, from_yaml, scalar, to_yaml

TYPED = {
    "1e-3": 0.001,
    "1E5": 1e5,
    "-1.5e+2": -150.0,
    ".5": 0.5,
    "5.": 5.0,
    "1_000": 1000,
    "0x1f": 31,
    "0o17": 15,
    "007": 7,
    "inf": math.inf,
    "-.inf": -math.inf,
    "true": True,
    "False": False,
    "null": None,
    "~": None,
    "no": "no",
    "1:30": "1:30",
    "2024-01-01": "2024-01-01",
    "1_": "1_",
    "e3": "e3",
    "9" * 5000: "9" * 5000,
}


@pytest.mark.parametrize("text", TYPED, ids=lambda text: text[:12])
def test_a_word_is_read_by_yaml_1_2(text):
    assert scalar(text) == TYPED[text]
    assert type(scalar(text)) is type(TYPED[text])
    if len(text) < 100:
        assert from_yaml(f"k: {text}") == {"k": TYPED[text]}
    assert from_yaml(to_yaml({text: text})) == {text: text}


def test_nan_is_a_number():
    assert math.isnan(scalar("nan"))
    assert math.isnan(from_yaml("- .NaN")[0])


@pytest.mark.parametrize(
    ("value", "wanted", "found"),
    [
        ("1e-3", float | None, 0.001),
        ("3", float, 3.0),
        ("1e5", int, 100_000),
        ("null", float | None, None),
        ("null", str, "null"),
        ("1e5", str, "1e5"),
        (100, str, "100"),
        ("1e5", Any, "1e5"),
        ("true", bool, True),
        ("[1, 2]", Sequence[int] | None, [1, 2]),
        ("5", Sequence[int], 5),
        ("[INST]", str, "[INST]"),
        ("{a: token}", Any, {"a": "token"}),
        ("float32", str | torch.dtype | None, "float32"),
        ("x:y", Callable[[str, str], float] | None, "x:y"),
    ],
)
def test_a_value_is_what_the_option_wants(value, wanted, found):
    assert fit("x", value, wanted) == found
    assert type(fit("x", value, wanted)) is type(found)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [("1.5", int), ("nan", int), ("yes", bool), ("a", float | None), ([1], str)],
)
def test_what_does_not_fit_is_named(value, wanted):
    with pytest.raises(InvalidArgument, match=r"x=.* is not allowed; it must be of type"):
        fit("x", value, wanted)


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]"
CODE = "a: !!python/object/apply:os.system [ls]"


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        CODE,
        "a: 1\na: 2",
        "[" * 5000,
        "\x00",
        "k: " + "9" * 5000,
        "? [a]\n: b",
        "a: !!binary aGk=",
    ],
)
def test_what_is_no_plain_value_is_refused(text):
    with pytest.raises(InvalidArgument, match="cannot be read as YAML"):
        from_yaml(text)


def test_options_are_what_the_env_and_its_task_want():
    typed = {
        "kl_coef": "1e-3",
        "model": "1e-3",
        "prompts": "123",
        "stop_token_ids": "[7]",
        "compile": "false",
        "reward": "null",
    }
    assert option_values("tokenenv/TextGen-v0", typed) == {
        "kl_coef": 0.001,
        "model": "1e-3",
        "prompts": "123",
        "stop_token_ids": [7],
        "compile": False,
        "reward": None,
    }


def test_numbers_on_the_command_line_and_in_the_config(tmp_path):
    run = tmp_path / "x"
    flags = [
        "--num-envs",
        "0x4",
        "--total-tokens",
        "1e2",
        "--agent.batch-tokens",
        "5e1",
        "--agent.lr",
        "1e-3",
    ]
    main(
        [
            "train",
            *flags,
            "--env",
            "tokenenv/Negation-v0",
            "--options",
            "kl_coef",
            "1e-3",
            "max_new_tokens",
            "5",
            "--run-dir",
            str(run),
        ]
    )
    config = load_config(run / "config.yaml")
    assert (config.num_envs, config.total_tokens, config.agent.batch_tokens, config.agent.lr) == (
        4,
        100,
        50,
        0.001,
    )
    assert config.make_envs().kl_coef == 0.001
    path = run / "config.yaml"
    path.write_text(
        path.read_text().replace("lr: 0.001", "lr: 2e-3").replace("kl_coef: 0.001", "kl_coef: 1e-2")
    )
    config = load_config(path)
    assert (config.agent.lr, config.make_envs().kl_coef) == (0.002, 0.01)


def test_a_config_is_read_as_it_was_written(tmp_path):
    for options in ({"kl_coef": "1e-3", "prompts": "no"}, {"prompts": "\x1b[1m é \U000e0041"}):
        made = Train(options=options)
        save_config(made, tmp_path / "c.yaml")
        assert load_config(tmp_path / "c.yaml") == made
