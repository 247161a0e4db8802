"""Whatever is thrown at it: an error of ours (or Gymnasium's) or an answer, and an env that steps
afterwards.

400 cases, the same ones each time; `make fuzz` draws 10,000 at random and prints how many of each
target were refused.
"""

import copy
import functools
import json
import os
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fakes
import gymnasium as gym
import numpy as np
import pytest
import tasks
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import episode

from tokenenv.agents import PPO
from tokenenv.agents.run.checkpoint import read_checkpoint, write_checkpoint
from tokenenv.agents.run.export import read_episodes
from tokenenv.agents.run.show import write_page
from tokenenv.cli import Train, load_config, save_config
from tokenenv.errors import TokenEnvError
from tokenenv.prompts import load_prompts
from tokenenv.safety.values import from_yaml, to_yaml

CASES = int(os.environ.get("FUZZ_CASES", 400))
RANDOM = "FUZZ_CASES" in os.environ
OURS = (TokenEnvError, gym.error.Error)
AUTOMATA = [
    "tokenenv/Negation-v0",
    "tokenenv/PlantedPhrase-v0",
    "tokenenv/Brackets-v0",
    "tokenenv/DelayedKey-v0",
]
MODES = ["NextStep", "SameStep", "Disabled"]
pytestmark = pytest.mark.filterwarnings("ignore")
counts: dict[str, Counter[str]] = {}


def fuzz(share: float, **strategies: Any) -> Callable[[Callable[..., Any]], Any]:
    """Runs a function on so large a share of the cases. It may raise our errors, which are counted,
    and no other."""

    def wrap(check: Callable[..., Any]) -> Any:
        name = check.__name__.removeprefix("test_")
        counted = counts.setdefault(name, Counter())

        @functools.wraps(check)
        def run(**drawn: Any) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                counted["cases"] += 1
                counted["refused"] += bool(check(**drawn))

        del run.__wrapped__  # whose arguments pytest would take for fixtures
        limits = settings(
            max_examples=max(1, round(share * CASES)),
            derandomize=not RANDOM,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        return limits(given(**strategies)(run))

    return wrap


@pytest.fixture(scope="module", autouse=True)
def print_counts():
    yield
    total: Counter[str] = sum(counts.values(), Counter())
    print(f"\n{'target':<28}{'cases':>8}{'refused':>9}")
    for name, found in [*counts.items(), ("all", total)]:
        print(f"{name.replace('_', ' '):<28}{found['cases']:>8}{found['refused']:>9}")


def refused(call: Callable[[], Any]) -> bool:
    """Whether a call was refused with an error of ours; any other error is raised."""
    try:
        call()
    except OURS as error:
        str(error).encode("utf-8", "backslashreplace")
        return True
    return False


# ---------------------------------------------------------------- what is drawn

CHARACTERS = st.characters(exclude_categories=())  # all planes, lone surrogates and NUL among them
TEXTS = st.text(CHARACTERS, max_size=40) | st.sampled_from(
    [
        "",
        "\x00",
        "\ud800",
        "\udfff\ud800",
        "a" * 100_000,
        "\U0010ffff",
        "é" * 10_000,
        "[INST]",
        "\x1b[2J",
        "\u202e",
        "1e-3",
        " ",
    ]
)
INTEGERS = st.integers(-3, 70) | st.sampled_from([2**31, -(2**31), 2**63 - 1, 2**63, 2**64, 10**30])
NUMBERS = INTEGERS | st.floats(allow_nan=True, allow_infinity=True)
PLAIN = st.none() | st.booleans() | NUMBERS | TEXTS
JUNK = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
)
OBJECTS = JUNK | st.sampled_from(
    [
        object(),
        np.float32("nan"),
        np.int64(3),
        np.zeros(2),
        torch.zeros(2),
        b"\xff",
        (1, 2),
        {1},
        print,
    ]
)


def mostly(usual: Any, otherwise: Any) -> Any:
    """Four cases of five as they should be."""
    return st.integers(0, 4).flatmap(lambda number: otherwise if number == 0 else usual)


OPTIONS: dict[str, Any] = {
    "reward": st.sampled_from(
        [
            "terminal",
            "token",
            "delta",
            "oracle",
            "uniform",
            "segment",
            {},
            {"a": "delta", "b": ("token", 0.5)},
        ]
    ),
    "kl": st.sampled_from(["reference", "policy", "none"]),
    "kl_coef": st.floats(0, 1) | st.none(),
    "kl_estimator": st.sampled_from(["k1", "k2", "k3"]),
    "kl_clamp": st.floats(0.1, 5) | st.none(),
    "autoreset_mode": st.sampled_from(MODES),
    "array": st.sampled_from(["numpy", "torch"]),
    "observation": st.sampled_from(["tokens", "features"]),
    "group_size": st.integers(1, 3),
    "max_new_tokens": st.integers(1, 9),
    "score_truncated": st.booleans(),
    "missing_eos_penalty": st.floats(0, 2),
    "max_batch_tokens": st.integers(1, 100),
    "cut": st.sampled_from(["terminated", "truncated"]),
    "watch": st.sampled_from([{}, {"w": "delta"}]),
    "render_mode": st.sampled_from([None, "ansi", "rgb_array"]),
    "vocab_size": st.integers(20, 40),
    "task_seed": st.integers(0, 5),
    "limit": st.integers(1, 5),
    "types": st.integers(1, 3),
    "depth": st.integers(1, 4),
    "pairs": st.integers(0, 3),
    "phrase_length": st.integers(1, 4),
    "num_decoys": st.integers(0, 4),
    "num_keys": st.integers(2, 6),
    "door_mass": st.floats(0.01, 0.5),
    "device": st.sampled_from(["cpu", "meta", "cuda:99", "nowhere"]),
}


OF_ONE_TASK = [
    "limit",
    "types",
    "depth",
    "pairs",
    "phrase_length",
    "num_decoys",
    "num_keys",
    "door_mass",
    "device",
]


@st.composite
def options(draw: Any) -> dict[str, Any]:
    """A few options, in half of the cases all of them allowed."""
    names = draw(
        st.lists(st.sampled_from(sorted(set(OPTIONS) - set(OF_ONE_TASK))), unique=True, max_size=4)
    )
    found = {name: draw(OPTIONS[name]) for name in names}
    if draw(st.booleans()):
        return found
    for name in draw(
        st.lists(
            st.sampled_from([*sorted(OPTIONS), "unknown"]), unique=True, min_size=1, max_size=2
        )
    ):
        found[name] = draw(st.one_of(OPTIONS.get(name, OBJECTS), OBJECTS))
    return found


@functools.cache
def env(env_id: str, mode: str, kl: str, array: str = "numpy") -> Any:
    """One env of each kind, kept: what a case leaves behind is what the next one finds."""
    small = {"max_new_tokens": 6} | ({} if "Toy" in env_id else {"vocab_size": 24})
    return gym.make_vec(env_id, num_envs=3, autoreset_mode=mode, kl=kl, array=array, **small)


ENVS = st.builds(
    env, st.sampled_from([*AUTOMATA[:2], tasks.TOY]), st.sampled_from(MODES), st.sampled_from(["reference", "policy"]),
    st.sampled_from(["numpy", "torch"]),
)  # fmt: skip


def valid_actions(envs: Any, token: int = 5) -> Any:
    tokens = np.full(envs.num_envs, token)
    with_logprob = isinstance(envs.single_action_space, gym.spaces.Dict)
    return (
        {"token": tokens, "logprob": np.full(envs.num_envs, -1.0, np.float32)}
        if with_logprob
        else tokens
    )


def steps(envs: Any, reset: bool = True) -> None:
    """The env takes steps, and pays finite numbers."""
    stops = envs.metadata["autoreset_mode"].value == "Disabled"
    for number in range(2):
        if stops or (reset and number == 0):
            envs.reset(seed=0)
        _, rewards, *_ = envs.step(valid_actions(envs))
        assert np.isfinite(np.asarray(rewards)).all()


# ---------------------------------------------------------------- targets


@fuzz(
    0.14,
    env_id=st.sampled_from(AUTOMATA),
    given_options=options(),
    num_envs=mostly(st.integers(1, 6), OBJECTS),
)
def test_constructor_options(env_id, given_options, num_envs):
    made: list[Any] = []
    size = num_envs if not isinstance(num_envs, int) or num_envs < 100 else -num_envs
    if refused(lambda: made.append(gym.make_vec(env_id, num_envs=size, **given_options))):
        return True
    steps(made[0])
    made[0].render()
    made[0].close()
    return False


ACTIONS = mostly(
    st.lists(st.integers(0, 23), min_size=3, max_size=3).map(np.array),
    st.one_of(
        OBJECTS,
        st.lists(INTEGERS, min_size=3, max_size=3),
        st.lists(st.integers(0, 23), min_size=3, max_size=3).map(np.array),
        st.lists(NUMBERS, min_size=0, max_size=4),
        st.builds(
            lambda values, kind: np.array(values).astype(kind),
            st.lists(st.integers(-300, 300), min_size=3, max_size=3),
            st.sampled_from(
                [
                    "int8",
                    "uint8",
                    "int32",
                    "uint64",
                    "float32",
                    "float16",
                    "bool",
                    "complex64",
                    "U5",
                    "O",
                    "M8[s]",
                ]
            ),
        ),
        st.sampled_from(
            [
                np.zeros((3, 1), int),
                np.zeros(0),
                torch.zeros(3),
                torch.zeros(3, dtype=torch.bool),
                torch.zeros((1, 3)).long(),
            ]
        ),
    ),
)
BAD_LOGPROBS = (
    st.lists(
        st.floats(-5, 0) | st.sampled_from([np.nan, np.inf, -np.inf, 1.0]), min_size=3, max_size=3
    )
    | OBJECTS
)
LOGPROBS = mostly(st.lists(st.floats(-5, 0), min_size=3, max_size=3).map(np.array), BAD_LOGPROBS)


@fuzz(
    0.22,
    envs=ENVS,
    actions=st.lists(ACTIONS, min_size=1, max_size=4),
    logprobs=LOGPROBS,
    swapped=st.integers(0, 7),
)
def test_actions(envs, actions, logprobs, swapped):
    envs.reset(seed=1)
    found, paired = False, isinstance(envs.single_action_space, gym.spaces.Dict) != (swapped == 0)
    for one in actions:
        action = {"token": one, "logprob": logprobs} if paired else one
        found |= refused(lambda action=action: envs.step(action))
    steps(envs, reset=False)
    steps(envs)
    return found


GOOD_TEXT = st.lists(st.integers(3, 23), min_size=1, max_size=4)


def rows(usual: Any) -> Any:
    """One entry for each of three envs, or something else."""
    entry = mostly(usual, TEXTS | st.lists(INTEGERS, max_size=6) | OBJECTS)
    return mostly(st.lists(entry, min_size=3, max_size=3), OBJECTS)


RESETS = st.fixed_dictionaries(
    {},
    optional={
        "reset_mask": mostly(
            st.lists(st.booleans(), min_size=3, max_size=3).map(np.array), OBJECTS
        ),
        "prompts": rows(GOOD_TEXT),
        "prefixes": rows(GOOD_TEXT),
    },
)
SEEDS = st.none() | st.integers(0, 2**31) | st.lists(st.integers(0, 2**31), min_size=3, max_size=3)


@fuzz(0.15, envs=ENVS, given_options=mostly(RESETS, OBJECTS), seeds=mostly(SEEDS, OBJECTS))
def test_reset_options(envs, given_options, seeds):
    envs.reset(seed=1)
    found = refused(lambda: envs.reset(seed=seeds, options=given_options))
    steps(envs, reset=False)
    steps(envs)
    return found


TOKENIZERS = functools.cache(
    lambda name: (
        fakes.tokenizer() if name == "toy" else gym.make(name).unwrapped.token_spec.tokenizer
    )
)


@fuzz(
    0.1,
    source=mostly(
        st.lists(TEXTS, min_size=1, max_size=3),
        st.lists(OBJECTS | st.lists(INTEGERS, max_size=5)) | OBJECTS,
    ),
    name=st.sampled_from(["toy", "tokenenv/Reviews-v0", "tokenenv/Arithmetic-v0"]),
    long_prompts=mostly(st.just("truncate"), st.just("refuse") | PLAIN),
    chat=mostly(st.just(False), OBJECTS),
)
def test_prompts(source, name, long_prompts, chat):
    found: list[list[int]] = []
    tokenizer = TOKENIZERS(name)
    limits = {"vocab_size": len(tokenizer), "max_prompt_tokens": 5}
    if refused(
        lambda: found.extend(
            load_prompts(source, tokenizer, long_prompts=long_prompts, chat_template=chat, **limits)
        )
    ):
        return True
    assert all(
        1 <= len(ids) <= 5 and all(0 <= token < len(tokenizer) for token in ids) for ids in found
    )
    return False


LINES = st.one_of(
    TEXTS,
    JUNK.map(json.dumps),
    st.dictionaries(st.sampled_from(["prompt", "tokens", "score", "x"]), JUNK, max_size=3).map(
        json.dumps
    ),
    st.builds(
        lambda key, value: json.dumps(episode() | {key: value}),
        st.sampled_from(sorted(episode())),
        JUNK,
    ),
    st.sampled_from(
        [
            "[" * 100_000,
            '{"prompt":' * 5000,
            '{"prompt": "' + "a" * 100_000 + '"}',
            "1" * 5000,
            "NaN",
            "{}",
            "\ufeff",
        ]
    ),
    st.just(json.dumps(episode())),
    st.just('{"prompt": "the cat"}'),
)


@fuzz(
    0.11,
    lines=st.lists(LINES, max_size=4),
    damage=mostly(st.just(b""), st.binary(max_size=4)),
    end=st.sampled_from(["", "\n", "\r\n", "\x00"]),
)
def test_jsonl_files(lines, damage, end):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "episodes.jsonl"
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass") + damage + end.encode())
        limits = {"vocab_size": 61, "max_prompt_tokens": 5, "long_prompts": "truncate"}
        readers = (
            lambda: load_prompts(path, fakes.tokenizer(), **limits),
            lambda: read_episodes(path),
            lambda: write_page(Path(folder)),
        )
        outcomes = [refused(reader) for reader in readers]
        return all(outcomes)


@functools.cache
def model_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tokenenv-fuzz-"))
    fakes.saved(fakes.causal_lm(num_hidden_layers=1), folder / "lm")
    fakes.saved(fakes.reward_model("token", num_hidden_layers=1), folder / "reward")
    return folder


@st.composite
def damages(draw: Any) -> Callable[[bytes], bytes]:
    """What a disk, or a hand, does to a file."""
    kind, place, junk = (
        draw(st.sampled_from(["cut", "flip", "insert", "replace", "key"])),
        draw(st.floats(0, 1)),
        draw(JUNK),
    )
    data = draw(st.binary(min_size=1, max_size=8))

    def damage(content: bytes) -> bytes:
        at = int(place * len(content))
        if kind == "cut":
            return content[:at]
        if kind == "flip":
            return (
                content[:at]
                + bytes(byte ^ data[0] or 1 for byte in content[at : at + 1])
                + content[at + 1 :]
            )
        if kind == "insert":
            return content[:at] + data + content[at:]
        return json.dumps(junk).encode() if kind == "replace" else _with_key(content, place, junk)

    return damage


def _with_key(content: bytes, place: float, junk: Any) -> bytes:
    """JSON with one value exchanged; anything else as it is."""
    try:
        found = json.loads(content)
        key = sorted(found)[int(place * (len(found) - 1))]
    except (ValueError, TypeError):
        return content
    huge = isinstance(junk, int | float) and not -1000 < junk < 1000  # no gigabytes
    return json.dumps({**found, key: 3 if huge else junk}).encode()


FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]


@fuzz(
    0.06,
    which=st.sampled_from(["lm", "reward"]),
    name=st.sampled_from(FILES),
    damage=damages(),
    missing=st.integers(0, 9),
)
def test_model_folders(which, name, damage, missing):
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(model_folder(), folder, dirs_exist_ok=True)
        path = Path(folder) / which / name
        if missing == 0:
            path.unlink(missing_ok=True)
        elif path.exists():
            path.write_bytes(damage(path.read_bytes()))
        made: list[Any] = []
        models = {"model": str(Path(folder) / "lm"), "reward_model": str(Path(folder) / "reward")}
        sizes = {"max_new_tokens": 4, "max_prompt_tokens": 5, "prompts": [[4, 5]]}
        if refused(
            lambda: made.append(gym.make_vec("tokenenv/TextGen-v0", num_envs=2, **models, **sizes))
        ):
            return True
        made[0].reset(seed=0)
        made[0].step(valid_actions(made[0]))
    return False


@functools.cache
def config_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        save_config(
            Train(env=AUTOMATA[0], num_envs=4, options={"max_new_tokens": "4", "kl_coef": "1e-3"}),
            path,
        )
        return path.read_bytes()


@st.composite
def configs(draw: Any) -> bytes:
    """A run's config with one entry exchanged, or damaged as a file."""
    values = from_yaml(config_bytes().decode())
    part = draw(st.sampled_from([values, values["agent"], values["options"]]))
    key = draw(st.sampled_from([*sorted(part), "unknown"]))
    if draw(st.booleans()):
        return draw(damages())(config_bytes())
    if draw(st.booleans()):
        part.pop(key, None)
    else:
        part[key] = draw(JUNK)
    return to_yaml(values).encode("utf-8", "surrogatepass")


@fuzz(0.1, content=configs())
def test_configs(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_bytes(content)
        made: list[Any] = []
        if refused(lambda: made.append(load_config(path))):
            return True
        made[0].num_envs = min(made[0].num_envs, 8)
        if refused(lambda: made.append(made[0].make_envs())):
            return True
        steps(made[1])
    return False


@functools.cache
def checkpoint() -> tuple[bytes, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        agent = PPO(env(AUTOMATA[0], "SameStep", "reference"), batch_tokens=10, epochs=1)
        agent.learn(20)
        agent.save(Path(folder) / "c")
        return (Path(folder) / "c").read_bytes(), read_checkpoint(Path(folder) / "c")


def exchanged(draw: Any, state: Any, junk: Any) -> Any:
    """A nest with one of its entries dropped or exchanged for junk, at any depth."""
    if isinstance(state, dict) and state and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(state, key=str)))
        if draw(st.integers(0, 4)) == 0:
            return {other: value for other, value in state.items() if other != key}
        return {**state, key: exchanged(draw, state[key], junk)}
    if isinstance(state, list | tuple) and state and draw(st.integers(0, 3)):
        at = draw(st.integers(0, len(state) - 1))
        return type(state)([*state[:at], exchanged(draw, state[at], junk), *state[at + 1 :]])
    return junk


STATE_JUNK = JUNK | st.sampled_from(
    [
        np.zeros(3),
        np.zeros((3, 8), np.int64),
        torch.zeros(3),
        torch.full((3,), -7),
        np.full(3, np.nan),
    ]
)


@fuzz(0.06, data=st.data(), damage=damages(), by_hand=st.booleans())
def test_checkpoints(data, damage, by_hand):
    content, state = checkpoint()
    envs = env(AUTOMATA[0], "SameStep", "reference")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c"
        if by_hand:
            write_checkpoint(
                path, exchanged(data.draw, copy.deepcopy(state), data.draw(STATE_JUNK))
            )
        else:
            path.write_bytes(damage(content))
        found = refused(lambda: PPO.load(path, envs))
    steps(envs)
    return found


@fuzz(0.06, envs=ENVS, data=st.data())
def test_saved_states(envs, data):
    envs.reset(seed=1)
    envs.step(valid_actions(envs))
    state = exchanged(data.draw, copy.deepcopy(envs.unwrapped.save_state()), data.draw(STATE_JUNK))
    found = refused(lambda: envs.unwrapped.load_state(state))
    refused(lambda: envs.step(valid_actions(envs)))
    steps(envs)
    return found
