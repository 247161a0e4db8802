"""Copying, saving and loading running texts: what was copied goes on as the original does."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from tasks import (
    TOY,
    TOYS,
    P,
    T,
    assert_equal,
    copied,
    make_vec,
    random_actions,
    row_of,
    some_modes,
    toy_cases,
)

from tokenenv.errors import CheckpointError, InvalidArgument, NotReset
from tokenenv.rewards import PositionScaled, Scaled, Segment

N = 4
SAME_STEP = AutoresetMode.SAME_STEP
TOLERANCE = 1e-5


def plan_of(envs: Any, steps: int, seed: int = 3, stop: float = 0.15) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [random_actions(rng, envs, stop) for _ in range(steps)]


def follow(envs: Any, plan: list[Any]) -> list[Any]:
    return [copied(dict(enumerate(envs.step(copied(actions))))) for actions in plan]


def running(
    settings: dict[str, Any], mode: Any = SAME_STEP, seed: int = 1, env_id: str = TOY, **reset: Any
) -> Any:
    """An env whose texts all hold two response tokens."""
    envs = make_vec(N, mode, env_id, **settings)
    envs.reset(seed=seed, **reset)
    follow(envs, plan_of(envs, 2, stop=0.0))
    return envs


def rows(step: dict[int, Any], row: int) -> list[Any]:
    """One row of a step's return."""
    obs, reward, terminated, truncated, info = step.values()
    obs = {key: value[row] for key, value in obs.items()} if isinstance(obs, dict) else obs[row]
    return [obs, reward[row], terminated[row], truncated[row], row_of(info, row)]


def assert_same_row(a: dict[int, Any], i: int, b: dict[int, Any], j: int) -> None:
    for one, other in zip(rows(a, i), rows(b, j), strict=True):
        assert_equal(one, other, TOLERANCE)


def swapped(actions: Any) -> Any:
    swap = [1, 0, 2, 3]
    return (
        {key: value[swap] for key, value in actions.items()}
        if isinstance(actions, dict)
        else actions[swap]
    )


@pytest.mark.parametrize(
    ("env_id", "options"), toy_cases("mixture", "k1", "features", "no scorer", "unscored")
)
def test_forked_rows_go_on_as_their_sources_which_may_be_targets_too(
    env_id: str, options: dict[str, Any]
) -> None:
    envs, twin = running(options, AutoresetMode.DISABLED), running(options, AutoresetMode.DISABLED)
    before = copied(twin.unwrapped.fork([0], [0])[0])
    obs, info = envs.unwrapped.fork([0, 1], [1, 0])
    if isinstance(obs, dict):
        assert_equal({key: value[[1, 0, 2, 3]] for key, value in obs.items()}, before)
    np.testing.assert_array_equal(info["_prompt_id"], [True, True, False, False])
    ended = np.zeros(N, bool)
    for actions in plan_of(envs, T - 2, stop=0.0):
        if ended.any():
            break
        forked, plain = follow(envs, [swapped(actions)])[0], follow(twin, [actions])[0]
        for i, j in enumerate([1, 0, 2, 3]):
            assert_same_row(forked, i, plain, j)
        ended = forked[2] | forked[3]
    assert ended.all()


def test_a_copy_keeps_its_prefix_weights_and_prompt_but_draws_from_its_own_stream() -> None:
    options = {"prefixes": [[11, 12], None, None, None]}
    envs, twin = (running({"reward": "uniform", "kl_coef": 0.1}, options=options) for _ in range(2))
    for env in (envs, twin):
        env.unwrapped.kl_coef = 0.9
        env.reset(options={"reset_mask": np.array([False, False, False, True])})
    envs.unwrapped.fork([0, 0], [2, 3])
    stop = np.full(N, 1)
    step, plain = envs.step(stop), twin.step(stop)
    info, final = step[-1], step[-1]["final_info"]
    for row in (2, 3):
        assert_equal(row_of(final, row), row_of(final, 0))
        assert final["kl_coef"][row] == np.float32(0.1)
        assert not final["token_rewards"][row, :2].any()
    assert plain[-1]["final_info"]["kl_coef"][3] == np.float32(0.9)
    np.testing.assert_array_equal(info["prompt_id"], plain[-1]["prompt_id"])
    assert_equal(step[0], plain[0])


@pytest.mark.parametrize(
    ("sources", "targets", "message"),
    [
        ([0], [4], "slots=[4] must hold numbers from 0 to 3"),
        ([-1], [0], "slots=[-1] must hold"),
        ([], [], "at least one"),
        ([0.5], [1], "slots=[0.5] must hold"),
        ([0], 1, "slots=1 must hold"),
        ([[0], [1, 2]], [1], "slots=[[0], [1, 2]] must hold"),
        ([0], {1}, "slots={1} must hold"),
        ([0, 1], [2], "one distinct target a source; got [0, 1] and [2]"),
        ([0, 1], [2, 2], "one distinct target a source"),
        ([0, 3], [1, 2], "sources=[0, 3] holds finished episodes"),
    ],
)
def test_what_cannot_be_forked(sources: list[int], targets: list[int], message: str) -> None:
    envs, twin = (
        running(TOYS["token"], AutoresetMode.NEXT_STEP),
        running(TOYS["token"], AutoresetMode.NEXT_STEP),
    )
    last = np.array([20, 20, 20, 1])
    follow(envs, [last]), follow(twin, [last])
    with pytest.raises(InvalidArgument) as error:
        envs.unwrapped.fork(sources, targets)
    assert message in str(error.value)
    plan = plan_of(envs, 4)
    assert_equal(dict(enumerate(follow(envs, plan))), dict(enumerate(follow(twin, plan))))


def test_a_finished_slot_can_be_a_target() -> None:
    envs = running(TOYS["token"], AutoresetMode.NEXT_STEP)
    follow(envs, [np.array([20, 20, 20, 1])])
    envs.unwrapped.fork([0], [3])
    step = follow(envs, [np.full(N, 22)])[0]
    assert_same_row(step, 0, step, 3)


@pytest.mark.parametrize(
    ("env_id", "options", "mode"), some_modes(AutoresetMode.NEXT_STEP, SAME_STEP)
)
def test_a_fresh_env_continues_a_saved_one(
    env_id: str, options: dict[str, Any], mode: AutoresetMode
) -> None:
    envs = running(options, mode, env_id=env_id)
    envs.unwrapped.kl_coef = 0.4
    follow(envs, [plan_of(envs, 1, stop=0.5)[0]])
    seen = envs.unwrapped.tokens_seen
    saved = pickle.loads(pickle.dumps(envs.unwrapped.save_state()))
    plan = plan_of(envs, 12)
    expected = follow(envs, plan)
    fresh, again = (make_vec(N, mode, env_id, **options) for _ in range(2))
    loaded, _ = fresh.unwrapped.load_state(saved)
    assert fresh.unwrapped.kl_coef == 0.4
    assert fresh.unwrapped.tokens_seen == seen > N
    again.unwrapped.load_state(saved)
    assert (
        set(loaded) == set(fresh.single_observation_space.spaces)
        if isinstance(loaded, dict)
        else loaded.dtype == np.float32
    )
    first, second = follow(fresh, plan), follow(again, plan)
    for one, other, original in zip(first, second, expected, strict=True):
        assert_equal(one, other)  # bit for bit: both were loaded
        assert_equal(one, original, TOLERANCE)


def test_some_slots_alone() -> None:
    envs, other = running(TOYS["mixture"]), running(TOYS["mixture"], seed=8)
    untouched = running(TOYS["mixture"], seed=8)
    saved = envs.unwrapped.save_state([2, 0, 2])
    np.testing.assert_array_equal(saved["slots"], [0, 2])
    _, info = other.unwrapped.load_state(saved)
    np.testing.assert_array_equal(info["_prompt_id"], [True, False, True, False])
    plan = plan_of(envs, 9)
    for a, b, c in zip(
        follow(envs, plan), follow(other, plan), follow(untouched, plan), strict=True
    ):
        for row in range(N):
            assert_same_row(b, row, a if row in (0, 2) else c, row)


REMEMBERING = {"reward": {"a": Scaled(Segment(1.0)), "b": PositionScaled("uniform"), "c": "token"}}


@pytest.mark.parametrize("array", ["numpy", "torch"])
@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, SAME_STEP])
def test_a_state_may_be_loaded_again_and_again(mode: Any, array: str) -> None:
    """Into fresh envs and used ones, whatever is done after: forks, partial resets, steps in which
    terms learn."""
    envs = running({**REMEMBERING, "array": array}, mode)
    follow(envs, plan_of(envs, 2, stop=0.5))
    saved = envs.unwrapped.save_state()
    kept, futures = pickle.dumps(saved), []
    for fresh in (True, True, False, False):
        other = make_vec(N, mode, **REMEMBERING, array=array) if fresh else envs
        other.unwrapped.load_state(saved)
        seen = follow(other, plan_of(envs, 3, seed=1))
        running_rows = np.flatnonzero(~(seen[-1][2] | seen[-1][3]))
        other.unwrapped.fork(running_rows[:1], [N - 1])
        other.reset(options={"reset_mask": np.arange(N) == 1, "prefixes": [None, [11], None, None]})
        futures.append(dict(enumerate([*seen, *follow(other, plan_of(envs, 9))])))
        assert pickle.dumps(saved) == kept
    for future in futures[1:]:
        assert_equal(future, futures[0])


def test_nothing_that_the_env_keeps_is_the_callers() -> None:
    """What was given may be overwritten, and so may what was got."""
    envs, twin = running(REMEMBERING), running(REMEMBERING)

    def spoil(value: Any) -> None:
        for array in value.values() if isinstance(value, dict) else [value]:
            spoil(array) if isinstance(array, dict) else array.fill(7) if isinstance(
                array, np.ndarray
            ) else None

    for spoilt in (True, False):
        core = (envs if spoilt else twin).unwrapped
        given = [core.save_state(), core.save_state([0, 2]), core.save_statistics()]
        core.load_state(given[0])
        core.load_state(given[1])
        core.load_statistics(given[2])
        mask, prompts, actions = np.arange(N) == 1, [np.array([11, 12])] * N, np.full(N, 20)
        given += [core.reset(options={"reset_mask": mask, "prompts": prompts})[1], mask, prompts[0]]
        given += [actions, *core.step(actions)[1:]]
        scores = core.score_episodes([prompts[0].copy()], [[20, 21]], played=True)
        given += [
            scores.score,
            scores.token_rewards,
            scores.ref_logprobs,
            core.ref_logprobs(),
            core.save_statistics(),
        ]
        if spoilt:
            for value in given:
                spoil(value)
    for one, other in zip(
        follow(envs, plan_of(envs, 9)), follow(twin, plan_of(twin, 9)), strict=True
    ):
        assert_equal(one, other)


def test_a_score_that_is_the_gold_is_given_twice() -> None:
    scores = make_vec(
        1, SAME_STEP, "tokenenv/Brackets-v0", max_new_tokens=4
    ).unwrapped.score_episodes([[0]], [[1, 2, 3, 4]])
    scores.gold[:] = 7
    assert scores.score[0] != 7


def test_some_slots_leave_alone_what_belongs_to_all() -> None:
    envs = running(REMEMBERING)
    core = envs.unwrapped
    some, every = core.save_state([0, 3]), core.save_state()
    learned = core.save_statistics()
    follow(envs, plan_of(envs, 6))
    core.kl_coef = 0.5
    seen, now = core.tokens_seen, core.save_statistics()
    assert not np.array_equal(now["a"], learned["a"])
    core.load_state(some)
    assert (core.tokens_seen, core.kl_coef) == (seen, 0.5)
    assert_equal(core.save_statistics(), now)
    obs, _ = core.load_state(every)
    assert (core.tokens_seen, core.kl_coef) == (every["tokens_seen"], every["kl_coef"])
    assert_equal(core.save_statistics(), learned)
    np.testing.assert_array_equal(obs["tokens"], every["texts"]["tokens"])


def test_some_slots_of_an_env_are_not_all_of_a_larger_one() -> None:
    small = make_vec(2, SAME_STEP, **REMEMBERING)
    small.reset(seed=0)
    follow(small, plan_of(small, 5))
    saved, envs = small.unwrapped.save_state(), running(REMEMBERING)
    seen = envs.unwrapped.tokens_seen
    envs.unwrapped.load_state(saved)
    assert envs.unwrapped.tokens_seen == seen


def test_a_groups_prompts_are_taken_up_with_the_whole_group() -> None:
    options = {"group_size": 2}
    envs, other = running(options), running(options)
    saved = envs.unwrapped.save_state([0, 1, 2])
    for env in (envs, other):
        env.reset(seed=8)
    envs.unwrapped.load_state(saved)
    stops = [np.full(N, 1)] * 3
    for actual, plain in zip(follow(envs, stops), follow(other, stops), strict=True):
        np.testing.assert_array_equal(actual[4]["prompt_id"][2:], plain[4]["prompt_id"][2:])
    twin = running(options)
    twin.unwrapped.load_state(twin.unwrapped.save_state())
    envs.unwrapped.load_state(saved)
    for actual, plain in zip(follow(envs, stops), follow(twin, stops), strict=True):
        np.testing.assert_array_equal(actual[4]["prompt_id"][:2], plain[4]["prompt_id"][:2])


def test_rows_that_ended_under_another_mode_begin_anew() -> None:
    envs, fresh = (
        running(TOYS["token"], AutoresetMode.NEXT_STEP),
        make_vec(N, SAME_STEP, **TOYS["token"]),
    )
    follow(envs, [np.array([20, 1, 20, 20])])
    obs, _ = fresh.unwrapped.load_state(envs.unwrapped.save_state())
    np.testing.assert_array_equal(obs["length"] - obs["prompt_length"], [3, 0, 3, 3])
    expected, step = follow(envs, [np.full(N, 20)])[0], follow(fresh, [np.full(N, 20)])[0]
    np.testing.assert_array_equal(expected[4]["prompt_id"], step[4]["prompt_id"])


def test_a_state_holds_arrays_and_numbers_of_its_own() -> None:
    envs = running(TOYS["token"])
    saved = envs.unwrapped.save_state()
    kept = copy.deepcopy(saved)
    follow(envs, plan_of(envs, 5))

    def check(a: Any, b: Any) -> None:
        if isinstance(a, dict):
            for key in a:
                check(a[key], b[key])
        elif isinstance(a, list):
            for one, other in zip(a, b, strict=True):
                check(one, other)
        else:
            assert isinstance(a, (np.ndarray, int, float, str))
            np.testing.assert_array_equal(a, b)

    check(saved, kept)


def test_nothing_to_save_before_the_first_reset_and_parts_need_one() -> None:
    saved = running(TOYS["token"]).unwrapped.save_state([0])
    fresh = make_vec(N, SAME_STEP)
    for call in (
        fresh.unwrapped.save_state,
        lambda: fresh.unwrapped.load_state(saved),
        lambda: fresh.unwrapped.fork([0], [1]),
    ):
        with pytest.raises(NotReset, match="call reset"):
            call()


def put(path: str, value: Any) -> Any:
    """A change of a saved state: the entry at `path`, by a value or a function of the old one."""

    def change(saved: dict[str, Any]) -> Any:
        *parents, last = path.split(".")
        part = saved
        for key in parents:
            part = part[key]
        part[last] = value(part[last]) if callable(value) else value
        return saved

    return change


def entry(index: Any, value: Any) -> Any:
    def change(array: np.ndarray) -> np.ndarray:
        array[index] = value
        return array

    return change


CORRUPT = {
    "nothing": (lambda saved: None, "this is no state of a tokenenv env"),
    "format": (put("format", 0), "this is no state"),
    "missing": (lambda saved: saved.pop("streams") and saved, "this is no state"),
    "empty slots": (put("slots", np.zeros(0, np.int64)), "slots are not numbers in order"),
    "twice": (put("slots", np.array([0, 1, 1, 2])), "slots are not numbers in order"),
    "negative": (put("slots", np.array([-1, 0, 1, 2])), "slots are not numbers in order"),
    "too many": (
        put("slots", np.array([0, 1, 2, 9])),
        "the state holds slot 9; this env has num_envs=4",
    ),
    "fewer": (put("slots", np.array([0, 1, 2])), "tokens is (4, 12) int64"),
    "other task": (
        put("texts.tokens", np.zeros((N, 30), np.int64)),
        "(4, 30) int64 and this env's (4, 12) int64",
    ),
    "dtype": (
        put("ended", lambda ended: ended.astype(int)),
        "ended is (4,) int64 and this env's (4,) bool",
    ),
    "no array": (put("prompt_id", 3), "prompt_id is 3"),
    "no texts": (put("texts", None), "the state's texts are NoneType"),
    "terms": (
        lambda saved: saved["engine"]["weights"].update(extra=np.zeros(N, np.float32)) or saved,
        "extra",
    ),
    "fewer terms": (
        lambda saved: saved["engine"]["weights"].popitem() and saved,
        "use the same task, reward= and watch=",
    ),
    "scorer": (put("engine.score", None), "score is None"),
    "vocabulary": (put("texts.tokens", entry((0, 0), 61)), "its texts do not fit this env"),
    "no prompt": (put("texts.prompt_length", entry(1, 0)), "its texts do not fit this env"),
    "long prompt": (put("texts.prompt_length", entry(1, P + 1)), "its texts do not fit this env"),
    "long text": (put("texts.length", entry(1, P + T + 1)), "its texts do not fit this env"),
    "full": (put("texts.length", lambda old: old + T), "its texts do not fit this env"),
    "prefix": (put("texts.prefix_length", entry(2, T)), "its texts do not fit this env"),
    "no stream": (put("streams", None), "group_size=None and this env group_size=1"),
    "groups": (
        put("streams.group_size", 2),
        "the state has group_size=2 and this env group_size=1",
    ),
    "no seed": (
        put("streams.seeds", lambda seeds: seeds[:-1]),
        "the seeds of its streams are not 4 whole numbers, 0 or more",
    ),
    "seed": (
        put("streams.seeds", lambda seeds: [*seeds[:-1], -1]),
        "the seeds of its streams are not 4 whole numbers",
    ),
    "count": (
        put("streams.begun", lambda begun: [*begun[:-1], 0.5]),
        "the begun of its streams are not 4 whole numbers",
    ),
    "kl_coef": (put("kl_coef", float("nan")), "kl_coef=nan"),
    "tokens_seen": (put("tokens_seen", None), "the state is corrupt"),
}


@pytest.mark.parametrize(("change", "message"), CORRUPT.values(), ids=CORRUPT)
def test_a_corrupt_state_is_refused_and_changes_nothing(
    change: Any, message: str, pair: Any
) -> None:
    envs, twin = pair
    with pytest.raises(CheckpointError) as error:
        envs.unwrapped.load_state(change(copy.deepcopy(running_state())))
    assert message in str(error.value)
    plan = plan_of(envs, 1)
    assert_equal(dict(enumerate(follow(envs, plan))), dict(enumerate(follow(twin, plan))))


def running_state() -> Any:
    if not _SAVED:
        _SAVED.append(running(TOYS["token"], seed=9).unwrapped.save_state())
    return _SAVED[0]


_SAVED: list[Any] = []


@pytest.fixture(scope="module")
def pair() -> Any:
    """Two envs in the same state, for all refused states: a difference stays and is seen by the
    next test too."""
    return running(TOYS["token"]), running(TOYS["token"])


def test_states_of_other_rewards_and_tasks_are_refused() -> None:
    saved = running_state()
    for options, message in (
        (TOYS["uniform"], "use the same task, reward= and watch="),
        ({"max_new_tokens": T + 1}, "other task options"),
        (
            {"scorer": None, "reward": {"token": TOYS["no scorer"]["reward"]["rule"]}},
            "which this env does not have",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            make_vec(N, SAME_STEP, **options).unwrapped.load_state(saved)


@pytest.mark.parametrize("reward", [Segment(100.0), "delta"], ids=["segment", "delta"])
def test_a_state_loads_into_an_env_that_has_been_reset(reward: Any) -> None:
    """A term may carry the very scores, as `segment` does at first: writing one must not write the
    other."""
    settings = {"reward": reward, "kl": "none"}
    envs, other = running(settings), make_vec(N, SAME_STEP, TOY, **settings)
    other.reset(seed=7)
    other.unwrapped.load_state(envs.unwrapped.save_state())
    for actions in plan_of(envs, 6):
        assert_equal(
            *(copied(dict(enumerate(env.step(copied(actions))))) for env in (envs, other)),
            tolerance=TOLERANCE,
        )


@pytest.mark.parametrize("score_truncated", [True, False])
@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_loaded_texts_have_the_potential_that_their_last_step_reported(
    mode: AutoresetMode, score_truncated: bool
) -> None:
    """Zero where they have ended and were scored."""
    envs = make_vec(N, mode, TOY, reward="delta", score_truncated=score_truncated)
    envs.reset(seed=1)
    for stop in [0.0] * (T - 1) + [0.5]:
        *_, info = envs.step(plan_of(envs, 1, stop=stop)[0])
    assert info["_cut"].all()
    assert set(info["cut"].tolist()) == {True, False}
    loaded = envs.unwrapped.load_state(envs.unwrapped.save_state())[1]
    assert_equal(loaded["potential"], info["potential"], TOLERANCE)
    assert (info["potential"] == 0).tolist() == (~info["cut"] | score_truncated).tolist()


@pytest.mark.parametrize(
    "saved", [None, 3, {"else": np.zeros(3)}, {"token": 1.0}, {"token": np.zeros(2)}]
)
def test_statistics_of_other_terms_are_refused(saved: Any) -> None:
    envs = running({"reward": Scaled("token")}, SAME_STEP).unwrapped
    before = envs.save_statistics()
    with pytest.raises(CheckpointError, match="the state's "):
        envs.load_statistics(saved)
    assert_equal(envs.save_statistics(), before)
