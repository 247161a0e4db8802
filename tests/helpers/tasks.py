"""The tasks that env tests run on: toy ones, registered as tests/Toy-v0, and every id of the
package.

`CASES` are (id, options) pairs for `gym.make` and `gym.make_vec`; texts are kept short with
`max_new_tokens`.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import fakes
import gymnasium as gym
import numpy as np
import pytest
import torch
import turn_tasks
from gymnasium.vector import AutoresetMode
from memories import Drift, LastTokens

from tokenenv.models.heads import make_scorer
from tokenenv.registration import TASKS
from tokenenv.rewards.distill import Distill
from tokenenv.rewards.rule import Rule, TokenRule
from tokenenv.rewards.scaling import Clipped
from tokenenv.rewards.turn import Turn
from tokenenv.types import Scorer, Task

MODES = tuple(AutoresetMode)
TOY = "tests/Toy-v0"
P, T = 5, 7
STOPS = (fakes.EOS, 7, 9)

reference = cache(lambda: fakes.causal_lm(num_hidden_layers=1))
teacher = cache(lambda: fakes.causal_lm(seed=6, num_hidden_layers=1))
reward_model = cache(lambda kind: fakes.reward_model(kind, num_hidden_layers=1))
tokenizer = cache(fakes.tokenizer)


@cache
def scorer_of(kind: str) -> Scorer:
    return make_scorer(reward_model(kind))


@cache
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(10, fakes.VOCAB_SIZE, rng.integers(1, P + 1)).tolist() for _ in range(40)]


def toy(
    *,
    scorer: str | None = "token",
    stops: tuple[int, ...] = STOPS,
    gold: bool = True,
    step_ends: tuple[int, ...] = (),
    turns: str | None = None,
    max_new_tokens: int = T,
) -> Task:
    """Tiny random models; `gold` is the number of words in the response; `turns` names what writes
    into texts, in `turn_tasks`."""
    return Task(
        tokenizer=tokenizer(),
        reference=reference(),
        prompts=prompts(),
        max_prompt_tokens=P,
        max_new_tokens=max_new_tokens,
        stop_token_ids=stops,
        **turn_tasks.options_of(turns, P + max_new_tokens),
        scorer=scorer_of(scorer) if scorer else None,
        teacher=teacher(),
        step_end_token_ids=step_ends,
        gold=(lambda prompt, response: float(len(response.split()))) if gold else None,
    )


def device_task(device: str) -> Task:
    """As `toy`, with models of its own on a device."""
    return Task(
        tokenizer=tokenizer(),
        reference=fakes.causal_lm(num_hidden_layers=1).to(device),
        prompts=prompts(),
        max_prompt_tokens=P,
        max_new_tokens=T,
        stop_token_ids=STOPS,
        scorer=make_scorer(fakes.reward_model("token", num_hidden_layers=1).to(device)),
        gold=lambda prompt, response: float(len(response)),
        implicit_model=fakes.causal_lm(seed=5, num_hidden_layers=1).to(device),
        teacher=fakes.causal_lm(seed=6, num_hidden_layers=1).to(device),
    )


if TOY not in gym.registry:
    gym.register(
        TOY,
        entry_point="tokenenv.env.single_env:TokenEnv",
        vector_entry_point="tokenenv.env.vector_env:TokenVectorEnv",
        kwargs={"task": "tasks:toy"},
    )

LENGTH_RULE = Rule(lambda prompt, response: len(prompt) - 0.5 * len(response), on="tokens")
TEXT_RULE = TokenRule(
    lambda prompt, response: [0.1 * (token % 5) for token in response], on="tokens"
)

TOYS: dict[str, dict[str, Any]] = {
    "token": {"reward": "token"},
    "delta": {"reward": "delta", "scorer": "sequence"},
    "token delta": {"reward": "delta"},
    "terminal": {
        "reward": "terminal",
        "scorer": "sequence",
        "missing_eos_penalty": 0.7,
        "cut": "truncated",
    },
    "uniform": {"reward": "uniform", "kl": "none"},
    "mixture": {
        "reward": {"dense": ("token", 0.3), "shares": ("uniform", 0.7), "shaped": "delta"},
        "kl_coef": 0.2,
    },
    "k1": {"reward": "token", "kl": "policy", "kl_coef": 0.3},
    "k3 clamped": {"reward": "terminal", "kl": "policy", "kl_estimator": "k3", "kl_clamp": 2.0},
    "unscored": {
        "reward": {"a": "terminal", "b": "uniform", "c": "delta"},
        "score_truncated": False,
    },
    "features": {"reward": "delta", "observation": "features"},
    "no scorer": {
        "reward": {"rule": LENGTH_RULE, "each": TEXT_RULE},
        "scorer": None,
        "gold": False,
    },
    "memories": {
        "reward": {"tokens": LastTokens(), "mean": Drift(), "cut": Clipped(Drift(), 0, 1)}
    },
    "watched": {
        "reward": "uniform",
        "watch": {
            "dense": "token",
            "end": "terminal",
            "placed": TEXT_RULE,
            "tokens": LastTokens(),
            "moves": "delta",
        },
        "score_truncated": False,
    },
    "no stops": {"reward": "delta", "stops": ()},
    "distilled": {
        "reward": {
            "all": ("distill", 0.5),
            "ends": Distill(coef=0.3, first=0.3, last=0.3),
            "end": "terminal",
        },
        "score_truncated": False,
    },
    "turns": {"reward": {"dense": "token", "moves": "delta"}, "turns": "fixed"},
    "turns of a text score": {
        "reward": {"moves": "delta", "end": "terminal", "shares": "uniform", "m": LastTokens()},
        "turns": "fixed",
        "scorer": "sequence",
        "score_truncated": False,
    },
    "random turns": {
        "reward": {"mean": Drift(), "rule": LENGTH_RULE},
        "turns": "random",
        "scorer": None,
        "kl": "policy",
    },
    "turn designs": {
        "reward": {
            "task": Turn(gamma=0.5),
            "gains": (Turn("differences"), 0.5),
            "moves": Turn("score"),
        },
        "turns": "random",
        "scorer": "sequence",
        "score_truncated": False,
    },
    "no reward": {"reward": {}, "kl": "none", "scorer": None},
}


def textgen_options() -> dict[str, Any]:
    """TextGen needs models; the others bring their own."""
    return {
        "model": reference(),
        "tokenizer": tokenizer(),
        "reward_model": reward_model("token"),
        "prompts": ["the cat is", "a good film", "rain"],
        "max_prompt_tokens": P,
    }


def chatgen_options() -> dict[str, Any]:
    """A chat template that closes every message with the stop token, and someone who answers."""
    chats = copy.deepcopy(tokenizer())
    chats.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    return textgen_options() | {"tokenizer": chats, "respond": _talk}


def _talk(messages: list[dict[str, str]], rng: np.random.Generator) -> Any:
    if rng.random() < 0.3:
        return None, 0.5
    return ("rain", "the cat is")[rng.integers(2)], float(len(messages))


def registered(env_id: str) -> dict[str, Any]:
    """Options that make a registered id small and complete."""
    needed = {"tokenenv/TextGen-v0": textgen_options, "tokenenv/ChatGen-v0": chatgen_options}
    return {"max_new_tokens": T, **needed.get(env_id, dict)()}


def id_cases() -> list[Any]:
    """One parameter for each registered id."""
    return [pytest.param(env_id, registered(env_id), id=env_id.split("/")[1]) for env_id in TASKS]


def toy_cases(*names: str) -> list[Any]:
    """One parameter for each toy, or for those named."""
    return [pytest.param(TOY, TOYS[name], id=name) for name in names or TOYS]


CASES = toy_cases() + id_cases()


def in_modes(cases: list[Any], *modes: AutoresetMode) -> list[Any]:
    """Each case in every autoreset mode, or in those given."""
    return [_with_mode(case, mode) for case in cases for mode in modes or MODES]


def in_turn(cases: list[Any], *modes: AutoresetMode) -> list[Any]:
    """Each case in one autoreset mode: the first case in the first mode, and so on."""
    return [_with_mode(case, modes[i % len(modes)]) for i, case in enumerate(cases)]


def some_modes(*modes: AutoresetMode) -> list[Any]:
    """Each toy and each registered id in one autoreset mode (or one of those given); ids begin with
    the second, so that they are not in the mode that `in_turn` begins with."""
    modes = modes or MODES
    return in_turn(toy_cases(), *modes) + in_turn(id_cases(), *modes[1:], modes[0])


def _with_mode(case: Any, mode: AutoresetMode) -> Any:
    return pytest.param(*case.values, mode, id=f"{case.id}-{mode.value}", marks=case.marks)


def make_vec(
    num_envs: int = 4, mode: Any = AutoresetMode.NEXT_STEP, env_id: str = TOY, **options: Any
) -> Any:
    """The batched env."""
    return gym.make_vec(env_id, num_envs=num_envs, autoreset_mode=mode, **options)


def random_actions(rng: np.random.Generator, envs: Any, stop: float = 0.15) -> Any:
    """Uniform tokens, stop tokens with probability `stop`; with log-probs where the env takes
    them."""
    spec, count = envs.unwrapped.token_spec, envs.num_envs
    tokens = rng.choice(np.setdiff1d(np.arange(spec.vocab_size), spec.stop_token_ids), count)
    if spec.stop_token_ids:
        tokens = np.where(rng.random(count) < stop, rng.choice(spec.stop_token_ids, count), tokens)
    if isinstance(envs.single_action_space, gym.spaces.Dict):
        return {"token": tokens, "logprob": -rng.exponential(2.0, count).astype(np.float32)}
    return tokens


def tokens_of(actions: Any) -> np.ndarray:
    return actions["token"] if isinstance(actions, dict) else actions


def copied(value: Any) -> Any:
    """The same nest of arrays, as NumPy copies."""
    if isinstance(value, Mapping):
        return {key: copied(entry) for key, entry in value.items()}
    return value.numpy().copy() if isinstance(value, torch.Tensor) else np.array(value)


def assert_equal(a: Any, b: Any, tolerance: float = 0.0) -> None:
    """Nests of arrays with the same keys, shapes and dtypes, whose values differ by `tolerance` at
    most."""
    if isinstance(a, Mapping):
        assert isinstance(b, Mapping)
        assert set(a) == set(b)
        for key in a:
            assert_equal(a[key], b[key], tolerance)
        return
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    if tolerance and a.dtype.kind == "f":
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)
    else:
        np.testing.assert_array_equal(a, b)


def row_of(info: Mapping[str, Any], row: int) -> dict[str, Any]:
    """What one row has of a batched info, without Gymnasium's `final_obs` and `final_info`."""
    present = [key for key in info if not key.startswith(("_", "final_")) and info[f"_{key}"][row]]
    return {
        key: row_of(info[key], row) if isinstance(info[key], Mapping) else info[key][row]
        for key in present
    }


@dataclass
class Played:
    """One episode as stepping showed it; `logprobs` are the action's where it carries them.
    `response` holds all tokens, and `own` says which the policy emitted."""

    prompt: list[int]
    response: list[int] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    infos: list[dict[str, Any]] = field(default_factory=list)
    truncated: bool = False

    def padded(self, values: list[float], length: int) -> np.ndarray:
        return np.array(values + [0.0] * (length - len(values)), np.float32)


def play(
    envs: Any, *, seed: int = 0, steps: int = 30, stop: float = 0.15, options: Any = None
) -> list[Played]:
    """The episodes that end within `steps` random steps of a SAME_STEP env that observes NumPy
    tokens."""
    rng, done = np.random.default_rng(seed), []
    obs, _ = envs.reset(seed=seed, options=options)
    running = _begun(obs)
    for _ in range(steps):
        actions = random_actions(rng, envs, stop)
        obs, rewards, terminated, truncated, info = envs.step(actions)
        fresh = _begun(obs)
        for row, episode in enumerate(running):
            episode.logprobs.append(
                float(actions["logprob"][row]) if isinstance(actions, dict) else 0.0
            )
            episode.rewards.append(float(rewards[row]))
            episode.infos.append(row_of(info, row))
            if terminated[row] or truncated[row]:
                episode.truncated = bool(info["cut"][row])
                end = info["final_obs"]
                episode.response, episode.own = turn_tasks.response_of(end, row)
                assert len(episode.rewards) == sum(episode.own)
                done.append(episode)
                running[row] = fresh[row]
    return done


def _begun(obs: Any) -> list[Played]:
    return [
        Played(row[:length].tolist())
        for row, length in zip(obs["tokens"], obs["prompt_length"], strict=True)
    ]
