"""A call that is interrupted, at whatever inner call, leaves an env that refuses to go on until all
texts begin anew."""

import gc
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tasks
from gymnasium.vector import AutoresetMode
from tasks import TOY, T, assert_equal, copied, make_vec

import tokenenv
from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.errors import EnvClosed, Interrupted, NotReset
from tokenenv.rewards import PositionScaled, Rule, Scaled, Segment, TokenRule

N, SEED = 3, 5
OURS = tuple(
    str(Path(path).resolve()) for path in (tokenenv.__path__[0], Path(tasks.__file__).parent)
)
"""Where the functions live that are stopped: this package's, and the tests' own models and
rules."""
KINDS = (RuntimeError, KeyboardInterrupt)
TEXT_RULE = {
    "words": Rule(lambda prompt, response: 0.1 * len(response.split())),
    "each": TokenRule(lambda prompt, response: [0.1] * len(response), on="tokens"),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "automaton": {
        "reward": {
            "a": "oracle",
            "b": Scaled(Segment(1.0)),
            "c": PositionScaled("uniform"),
            **TEXT_RULE,
        },
        "env_id": "tokenenv/Negation-v0",
        "max_new_tokens": T,
    },
    "learned": {"reward": {"a": Scaled(Segment(1.0)), "b": PositionScaled("uniform"), **TEXT_RULE}},
    "k1 torch": {
        "reward": "delta",
        "kl": "policy",
        "array": "torch",
        "missing_eos_penalty": 0.3,
        "group_size": 3,
    },
    "features": {
        "reward": "process",
        "observation": "features",
        "step_ends": (12, 13),
        "render_mode": "human",
    },
}


class Stop:
    """Raises at one of the calls of this package's functions, and notes where they are called
    from."""

    def __init__(self, at: int | None = None, kind: type[BaseException] = RuntimeError) -> None:
        self.at, self.kind, self.places = at, kind, list[Any]()

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        code = frame.f_code
        # What is raised while a generator is thrown away is lost, and is not the env's.
        ours = (
            code.co_filename.startswith(OURS)
            and code.co_filename != __file__
            and code.co_name != "<genexpr>"
        )
        if event == "call" and ours:
            self.places.append((code, frame.f_back.f_code, frame.f_back.f_lineno))
            if len(self.places) - 1 == self.at:
                raise self.kind("stopped by the test")

    def during(self, call: Callable[[], Any]) -> None:
        gc.disable()  # an env that is thrown away now would be closed in the middle of the call, and its errors are lost
        sys.setprofile(self)
        try:
            call()
        finally:
            sys.setprofile(None)
            gc.enable()


def actions_of(envs: Any, tokens: Any) -> Any:
    tokens = np.array(tokens)
    return (
        {"token": tokens, "logprob": np.full(N, -1.5, np.float32)}
        if envs.config.kl == "policy"
        else tokens
    )


def make(name: str, mode: Any = AutoresetMode.SAME_STEP) -> TokenVectorEnv:
    return make_vec(N, mode, **{"env_id": TOY, **SETTINGS[name]}).unwrapped


def ends(envs: Any) -> list[int]:
    """One row ends by itself, and the others do not."""
    stops = envs.token_spec.stop_token_ids
    return [stops[0] if stops else 5, 20, 21] if envs.token_spec.vocab_size > 21 else [1, 2, 3]


def midway(envs: Any) -> Any:
    """Texts of two tokens but for the row that has begun anew; on the automata all are one token
    short of their end."""
    envs.reset(seed=SEED)
    steps = T - 1 if not envs.token_spec.stop_token_ids else 2
    for _ in range(steps):
        envs.step(actions_of(envs, [min(12, envs.token_spec.vocab_size - 1)] * N))
    return envs


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "step": lambda envs, saved: envs.step(actions_of(envs, ends(envs))),
    "reset": lambda envs, saved: envs.reset(seed=8),
    "partial reset": lambda envs, saved: envs.reset(
        options={"reset_mask": np.arange(N) == 1, "prefixes": [None, [4], None]}
    ),
    "fork": lambda envs, saved: envs.fork([0], [2]),
    "load_state": lambda envs, saved: envs.load_state(saved),
}
REFUSED: dict[str, Callable[[Any, Any], Any]] = {
    "step": CALLS["step"],
    "partial reset": CALLS["partial reset"],
    "fork": CALLS["fork"],
    "save_state": lambda envs, saved: envs.save_state(),
    "ref_logprobs": lambda envs, saved: envs.ref_logprobs(),
    "responses": lambda envs, saved: envs.responses(),
}


def follow(envs: Any) -> dict[int, Any]:
    """What the same steps show everywhere, in which texts end."""
    plan = [*(np.arange(N) % 3 + 2 + number for number in (0, 1)), ends(envs), np.arange(N) + 1]
    return dict(
        enumerate(copied(dict(enumerate(envs.step(actions_of(envs, tokens))))) for tokens in plan)
    )


def contents(saved: Any) -> Any:
    """A saved state, to compare."""
    if isinstance(saved, dict):
        return {key: contents(value) for key, value in saved.items()}
    return saved.tolist() if isinstance(saved, np.ndarray) else saved


def scored(envs: Any) -> Any:
    """What a whole text earns: it needs no running texts, and an interrupted call has taught its
    terms nothing."""
    logprobs = [[-1.0]] if envs.config.kl == "policy" else None
    return envs.score_episodes([[0]], [[3]], logprobs=logprobs).token_rewards


def numbers_of(envs: Any) -> dict[str, Any]:
    """What is the env's as a whole."""
    return {"tokens": envs.tokens_seen, "kl_coef": envs.kl_coef, **envs.save_statistics()}


CASES = [("automaton", call) for call in CALLS]
CASES += [
    ("learned", "step"),
    ("learned", "load_state"),
    ("k1 torch", "step"),
    ("features", "step"),
]


@pytest.mark.usefixtures("capsys")
@pytest.mark.parametrize(("name", "call"), CASES, ids=[f"{name}-{call}" for name, call in CASES])
def test_whatever_interrupts_a_call_is_said_and_the_next_reset_is_as_good_as_new(
    name: str, call: str
) -> None:
    envs, fresh, every = midway(make(name)), make(name), name == "automaton"
    saved = envs.save_state()
    before = numbers_of(envs)
    fresh.load_statistics(envs.save_statistics())
    fresh.tokens_seen = envs.tokens_seen
    obs = copied(fresh.reset(seed=SEED)[0])
    shown = follow(fresh)
    paid = scored(envs)
    CALLS[call](envs, saved)  # what is made at the first call of all is there
    done = contents(envs.save_state())
    envs.load_state(saved)
    seen = Stop()
    seen.during(lambda: CALLS[call](envs, saved))
    # With a transformer, each place in the code once; with an automaton, which is quick, each time
    # that it is passed.
    places = (
        range(len(seen.places))
        if every
        else [seen.places.index(place) for place in dict.fromkeys(seen.places)]
    )
    wanted = places if name in ("automaton", "learned") else places[::3]
    marked = 0
    for number, (at, kind) in enumerate(zip(wanted, itertools.cycle(KINDS), strict=False)):
        envs.load_state(saved)
        with pytest.raises(kind, match="stopped by the test"):
            Stop(at, kind).during(lambda: CALLS[call](envs, saved))
        if envs._interrupted is None:  # nothing had been changed yet, or all of it was done
            assert contents(envs.save_state()) in (contents(saved), done)
            continue
        marked += 1
        for refused in REFUSED.values() if number % 25 == 0 else (REFUSED["step"],):
            with pytest.raises(
                Interrupted,
                match=rf"^{call.split()[-1]}\(\) was interrupted half-way, .* call reset\(\) for all",
            ):
                refused(envs, saved)
        if number % 25 == 0:
            assert_equal(scored(envs), paid)
            assert_equal(numbers_of(envs) | {"kl_coef": 0}, before | {"kl_coef": 0})
        assert_equal(copied(envs.reset(seed=SEED)[0]), obs)
        assert_equal(numbers_of(envs), before)
        if number % 10 == 0:  # it is the steps that take time
            assert_equal(follow(envs), shown)
    assert marked > 30


def test_an_interrupted_env_takes_up_a_saved_state_or_closes() -> None:
    envs = midway(make("learned"))
    saved = envs.save_state()
    envs.load_state(saved)
    shown = follow(envs)
    for kind in KINDS:
        with pytest.raises(kind):
            Stop(100, kind).during(lambda: CALLS["step"](envs, saved))
        with pytest.raises(Interrupted):
            envs.load_state({**midway(make("learned")).save_state([0])})
        envs.load_state(saved)
        assert_equal(follow(envs), shown)
    with pytest.raises(RuntimeError):
        Stop(100).during(lambda: CALLS["step"](envs, saved))
    envs.close()
    with pytest.raises(EnvClosed):
        envs.reset()


def test_a_reset_that_is_interrupted_twice_counts_for_nothing() -> None:
    envs = midway(make("learned"))
    before = numbers_of(envs)
    for call, at in (("step", 150), ("reset", 60), ("reset", 90)):
        with pytest.raises(KeyboardInterrupt):
            Stop(at, KeyboardInterrupt).during(lambda call=call: CALLS[call](envs, None))
        with pytest.raises(Interrupted, match=r"^step\(\) was interrupted"):
            envs.save_state()
    envs.kl_coef = 0.7  # a learner may go on setting it
    envs.reset(seed=SEED)
    assert_equal(numbers_of(envs), {**before, "kl_coef": 0.7})


def test_a_gold_that_raises_once_leaves_no_row_beyond_its_stop_token() -> None:
    task = tasks.toy()
    asked: list[str] = []

    def gold(prompt: str, response: str) -> float:
        asked.append(response)
        if len(asked) == 1:
            raise ZeroDivisionError
        return 1.0

    changed = {name: getattr(task, name) for name in type(task).__slots__}
    envs = TokenVectorEnv(
        2, task=type(task)(**{**changed, "gold": gold}), autoreset_mode="SameStep"
    )
    envs.reset(seed=0)
    with pytest.raises(ZeroDivisionError):
        envs.step([tasks.STOPS[0], 20])
    with pytest.raises(NotReset, match="interrupted"):
        envs.step([20, 20])
    envs.reset(seed=0)
    envs.step([tasks.STOPS[0], 20])
    np.testing.assert_array_equal(list(map(len, envs.responses())), [0, 1])


def test_whole_texts_whose_scoring_is_interrupted_teach_nothing() -> None:
    envs = make("learned")
    envs.reset(seed=0)
    before = numbers_of(envs)
    texts = [[11]] * 3, [[20, 21], [22], [23, 24, 25]]
    envs.score_episodes(*texts)
    seen = Stop()
    seen.during(lambda: envs.score_episodes(*texts, played=True))
    envs.load_statistics({name: before[name] for name in ("a", "b")})
    envs.tokens_seen = 0
    for at in range(0, len(seen.places), 7):
        with pytest.raises(KeyboardInterrupt):
            Stop(at, KeyboardInterrupt).during(lambda: envs.score_episodes(*texts, played=True))
        assert_equal(numbers_of(envs), before)
    envs.step(np.array([20, 20, 20]))
