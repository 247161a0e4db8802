"""`check_vector_env`: passes on every env of the package, and names what a broken one breaks."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Discrete
from gymnasium.vector import AutoresetMode, VectorWrapper
from gymnasium.wrappers.vector import ArrayConversion, RecordEpisodeStatistics
from tasks import MODES, TOYS, assert_equal, make_vec, some_modes, toy

from tokenenv.check import check_vector_env
from tokenenv.check.driver import close
from tokenenv.env.single_env import TokenEnv
from tokenenv.errors import ContractError
from tokenenv.rewards import PositionScaled, Scaled, Segment, Token, progressive


@pytest.mark.parametrize(("env_id", "options", "mode"), some_modes())
def test_every_env_keeps_the_contract(
    env_id: str, options: dict[str, Any], mode: AutoresetMode
) -> None:
    envs = make_vec(3, mode, env_id, **options)
    check_vector_env(envs, steps=8)
    envs.step(
        np.zeros(3, int)
        if envs.unwrapped.config.kl != "policy"
        else {"token": np.zeros(3, int), "logprob": np.zeros(3)}
    )


@pytest.mark.parametrize("mode", MODES)
def test_wrapped_and_torch_envs_keep_it_too(mode: AutoresetMode) -> None:
    tensors = make_vec(2, mode, array="torch", **TOYS["unscored"])
    check_vector_env(tensors, steps=6)
    check_vector_env(
        RecordEpisodeStatistics(ArrayConversion(tensors, env_xp=torch, target_xp=np)), steps=6
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "reward",
    [
        Scaled("token"),
        PositionScaled("delta"),
        {"a": Scaled(PositionScaled("uniform")), "b": Scaled(Segment(1.0))},
    ],
    ids=["scaled", "by position", "both"],
)
def test_terms_that_learn_keep_it_and_are_left_as_they_were(
    reward: Any, mode: AutoresetMode
) -> None:
    envs = make_vec(3, mode, reward=reward)
    envs.reset(seed=0)
    for token in (20, 30, 40):
        envs.step(np.full(3, token))
    learned = envs.unwrapped.save_statistics()
    check_vector_env(envs, steps=10)
    assert_equal(envs.unwrapped.save_statistics(), learned)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options",
    [
        {"group_size": 2},
        {"group_size": 4},
        {"reward": progressive("terminal", "delta", tokens=60)},
        {"reward": {"token": (Token(), lambda seen: 1.0 + seen)}, "kl_coef": 0.5},
    ],
    ids=["pairs", "one group", "progressive", "schedule"],
)
def test_groups_and_scheduled_weights_keep_it(options: dict[str, Any], mode: AutoresetMode) -> None:
    """Texts are short, so that slots of a group take its prompts in an order of their own."""
    envs = make_vec(4, mode, **options)
    envs.reset(seed=0)
    envs.step(np.full(4, 20))
    check_vector_env(envs, steps=12)
    assert envs.unwrapped.tokens_seen == 4


def test_one_env_alone() -> None:
    check_vector_env(make_vec(1), steps=8)
    with pytest.raises(ContractError, match="TokenEnv is no VectorEnv"):
        check_vector_env(TokenEnv(task="tasks:toy"))


def test_texts_of_one_token() -> None:
    for mode in MODES:
        check_vector_env(make_vec(2, mode, max_new_tokens=1), steps=4)


class Changed(VectorWrapper):
    """An env whose steps return something else."""

    def __init__(self, envs: Any, change: Callable[..., Any]) -> None:
        super().__init__(envs)
        self.change = change

    def step(self, actions: Any) -> Any:
        obs, reward, terminated, truncated, info = self.env.step(actions)
        names = ("obs", "reward", "terminated", "truncated", "info")
        now = dict(zip(names, (obs, reward, terminated, truncated, info), strict=True))
        self.change(now)
        return tuple(now.values())


def without(key: str) -> Callable[[Any], Any]:
    return lambda now: (now["info"].pop(key, None), now["info"].pop(f"_{key}", None))


def changed(name: str, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda now: now.update({name: change(now[name])})


def info_value(key: str, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda now: (
        now["info"].update({key: change(now["info"][key])}) if key in now["info"] else None
    )


def swap(now: Any, rows: np.ndarray) -> None:
    """The other flag, where these rows end."""
    now["terminated"], now["truncated"] = (
        np.where(rows, one, other)
        for one, other in (
            (now["truncated"], now["terminated"]),
            (now["terminated"], now["truncated"]),
        )
    )


def without_flag_where_cut(name: str) -> Callable[[Any], Any]:
    return lambda now: now.update({name: now[name] & ~now["info"].get("cut", ~ALL)})


ALL, FIRST = np.ones(3, bool), np.array([True, False, False])
NEXT, SAME, DISABLED = AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED
RETURNED = {
    "kinds": (
        NEXT,
        changed("reward", torch.from_numpy),
        "mixes kinds of arrays: ['Tensor', 'ndarray']",
    ),
    "obs": (
        NEXT,
        lambda now: now["obs"].update(length=now["obs"]["length"] - 99),
        "not in observation_space",
    ),
    "dtype": (NEXT, changed("reward", np.float64), "rewards are (3,) float64, not (3,) float32"),
    "shape": (
        NEXT,
        changed("truncated", lambda flag: flag[:2]),
        "truncations are (2,) bool, not (3,) bool",
    ),
    "both": (
        NEXT,
        lambda now: now.update(truncated=now["truncated"] | now["terminated"]),
        "terminated and truncated at once",
    ),
    "unended": (NEXT, changed("terminated", np.zeros_like), "goes on after a stop token"),
    "stopped": (
        NEXT,
        lambda now: swap(now, ~now["info"].get("cut", ALL)),
        "after a stop token, or is truncated there",
    ),
    "uncut": (NEXT, without_flag_where_cut("terminated"), "goes on after max_new_tokens"),
    "early": (
        NEXT,
        lambda now: now.update(truncated=now["info"]["_kl_coef"] & ~now["terminated"]),
        "before max_new_tokens",
    ),
    "no cut": (NEXT, without("cut"), "infos['cut'] is not there exactly where texts end"),
    "cut": (
        NEXT,
        info_value("cut", np.zeros_like),
        "infos['cut'] is not True exactly where max_new_tokens ends a text",
    ),
    "either": (
        NEXT,
        lambda now: swap(now, now["info"].get("cut", ~ALL) & FIRST),
        "in one place and truncated in another",
    ),
    "sum": (
        NEXT,
        changed("reward", lambda reward: reward * 1.001),
        "not the sum of infos['reward_terms']",
    ),
    "reset reward": (
        NEXT,
        lambda now: now["reward"].__iadd__(~now["info"]["_kl_coef"]),
        "only reset (NEXT_STEP) is paid",
    ),
    "placed": (
        NEXT,
        info_value("token_rewards", lambda values: values * 1.001),
        "do not sum to what step() paid",
    ),
    "no placed": (NEXT, without("token_rewards"), "not there exactly where texts end"),
    "no mask": (
        NEXT,
        lambda now: now["info"].pop("_ref_logprob", None),
        "no mask infos['_ref_logprob'] of 3 bools",
    ),
    "masked": (
        SAME,
        info_value("score", lambda values: values + 1),
        "infos['score'] is not zero where infos['_score'] is False",
    ),
    "list": (NEXT, changed("info", lambda info: [info]), "infos are of type list, not dict"),
    "final": (SAME, without("final_obs"), "final_obs and final_info belong"),
    "final twice": (
        SAME,
        info_value("score", lambda values: values * 2),
        "final_info and the infos at top level differ",
    ),
    "gold": (NEXT, without("gold"), "infos['gold'] is given by one of"),
    "score": (
        NEXT,
        info_value("score", lambda values: values * 1.001),
        "infos['score'] is not what score_episodes() says",
    ),
}


@pytest.mark.parametrize(("mode", "change", "message"), RETURNED.values(), ids=RETURNED)
def test_names_what_is_wrong_in_what_step_returns(
    mode: AutoresetMode, change: Callable[[Any], Any], message: str
) -> None:
    with pytest.raises(ContractError) as error:
        check_vector_env(Changed(make_vec(3, mode), change), steps=9)
    assert message in str(error.value)


class Watched(Changed):
    """An env that watches what each token was paid, and `score_episodes` with it."""

    def __init__(self, envs: Any, patch: pytest.MonkeyPatch, change: Callable[..., Any]) -> None:
        super().__init__(envs, lambda now: (self.watch(now["info"], now["reward"]), change(now)))
        score = envs.unwrapped.score_episodes
        patch.setattr(envs.unwrapped, "score_episodes", lambda *a, **k: self.said(score(*a, **k)))

    def watch(self, info: Any, reward: np.ndarray) -> None:
        active = info["_kl_coef"]
        info |= {"watched": {"paid": reward.copy(), "_paid": active}, "_watched": active}
        if "token_rewards" in info:
            ended, placed = info["_token_rewards"], info["token_rewards"].copy()
            info |= {"token_watched": {"paid": placed, "_paid": ended}, "_token_watched": ended}

    def said(self, scores: Any) -> Any:
        names = ("step_rewards", "score", "gold", "token_rewards")
        fields = {name: getattr(scores, name) for name in names}
        return SimpleNamespace(**fields, watched={"paid": scores.token_rewards})


def watched_value(key: str, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda now: (
        now["info"]
        .get(key, {"paid": 0})
        .update(paid=change(now["info"].get(key, {"paid": np.zeros(3)})["paid"]))
    )


WATCHED = {
    "shifted": (
        watched_value("token_watched", lambda values: np.roll(values, 1, axis=-1)),
        "infos['token_watched']['paid'] is not what infos['watched'] was token by token",
    ),
    "mask": (
        lambda now: now["info"]["watched"].pop("_paid"),
        "infos['paid'] has no mask infos['_paid'] of 3 bools",
    ),
    "missing": (without("token_watched"), "infos['token_watched'] has no 'paid'"),
}


@pytest.mark.parametrize("mode", MODES)
def test_what_is_watched_is_checked_too(
    mode: AutoresetMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_vector_env(Watched(make_vec(3, mode), monkeypatch, nothing), steps=9)


def test_numbers_are_compared_relative_to_their_size_and_nan_is_nan() -> None:
    assert close([1e6, np.nan], [1e6 + 1, np.nan], 1e-5)
    assert not close([1.0], [1.0 + 1e-4], 1e-5)
    assert not close([np.nan], [1.0], 1e-5)
    assert not close([1.0], [np.nan], 1e-5)


@pytest.mark.parametrize(("change", "message"), WATCHED.values(), ids=WATCHED)
def test_names_what_is_wrong_in_what_is_watched(
    change: Callable[[Any], Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ContractError) as error:
        check_vector_env(Watched(make_vec(3), monkeypatch, change), steps=9)
    assert message in str(error.value)


def test_what_is_watched_must_be_what_score_episodes_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watched, "said", lambda self, scores: scores)
    with pytest.raises(ContractError, match=r"\['paid'\] is given by one of"):
        check_vector_env(Watched(make_vec(3), monkeypatch, nothing), steps=9)


def test_a_cut_without_a_score_that_terminates_is_named() -> None:
    envs = Changed(
        make_vec(3, score_truncated=False), lambda now: swap(now, now["info"].get("cut", ~ALL))
    )
    with pytest.raises(
        ContractError, match="a cut that is not scored is a termination: learners must bootstrap"
    ):
        check_vector_env(envs, steps=9)


def same_buffers(envs: Any, patch: pytest.MonkeyPatch) -> None:
    observe = envs._observation
    patch.setattr(envs, "_observation", lambda: observe() | {"tokens": envs._texts.tokens})


def shared_numbers(envs: Any, patch: pytest.MonkeyPatch) -> None:
    """A reward that looks at the whole batch."""
    term = envs._engine.rewards.terms["token"]
    own = term.reward
    patch.setattr(term, "reward", lambda batch: own(batch) - own(batch).mean())


def eager(envs: Any, patch: pytest.MonkeyPatch) -> None:
    """Takes a token before it looks at it."""
    check = envs._check_actions

    def checked(*args: Any) -> Any:
        envs._texts.append(np.full(3, 12), np.ones(3, bool))
        host = check(*args)
        envs._texts.length -= 1
        return host

    patch.setattr(envs, "_check_actions", checked)


def generous(envs: Any, patch: pytest.MonkeyPatch) -> None:
    score = envs.score_episodes

    def scored(*args: Any, **kwargs: Any) -> Any:
        said = score(*args, **kwargs)
        said.step_rewards[:, 0] += 0.01
        return said

    patch.setattr(envs, "score_episodes", scored)


def tireless(envs: Any, patch: pytest.MonkeyPatch) -> None:
    """Texts that have ended are not known to have."""
    step = envs.step

    def stepped(actions: Any) -> Any:
        envs._ended[:] = False
        return step(actions)

    patch.setattr(envs, "step", stepped)


def attribute(name: str, value: Any) -> Callable[[Any, pytest.MonkeyPatch], None]:
    def put(envs: Any, patch: pytest.MonkeyPatch) -> None:
        *path, last = name.split(".")
        for part in path:
            envs = getattr(envs, part)
        patch.setattr(envs, last, value)

    return put


def nothing(*args: Any, **kwargs: Any) -> None:
    return None


INSIDE = {
    "not reset": (NEXT, attribute("step", nothing), "step() before reset() does not raise"),
    "mode": (NEXT, attribute("metadata", {"autoreset_mode": "NextStep"}), "is no AutoresetMode"),
    "batched": (
        NEXT,
        attribute("num_envs", 4),
        "observation_space is not 4 of single_observation_space",
    ),
    "token": (
        NEXT,
        attribute("single_action_space", Discrete(9)),
        "action_space is not 3 of single_action_space",
    ),
    "alias": (NEXT, same_buffers, "aliases the env's own"),
    "seed": (
        NEXT,
        attribute("_streams.reseed", nothing),
        "reset(seed=0) and the same actions do not give the same run",
    ),
    "slots": (NEXT, shared_numbers, "depends on the other slots' actions"),
    "scores": (NEXT, generous, "step() does not pay what score_episodes() says"),
    "state": (
        NEXT,
        attribute("_texts.load", nothing),
        "load_state() does not show the texts that were saved",
    ),
    "fork": (SAME, attribute("_engine.fork", nothing), "after fork([0], [1]) the slots differ"),
    "eager": (NEXT, eager, "an action that was refused has changed the env"),
    "closed": (NEXT, attribute("_require_open", nothing), "after close() does not raise"),
    "finished": (
        DISABLED,
        tireless,
        "a finished slot can be stepped under DISABLED",
    ),
}


@pytest.mark.parametrize(("mode", "put", "message"), INSIDE.values(), ids=INSIDE)
def test_names_what_is_wrong_inside(
    mode: Any, put: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    envs = make_vec(3, mode)
    put(envs.unwrapped, monkeypatch)
    with pytest.raises(ContractError) as error:
        check_vector_env(envs, steps=9)
    assert message in str(error.value)


def test_bad_tokens_must_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def lenient(tokens: torch.Tensor, logprob: Any, vocab_size: int) -> torch.Tensor:
        return tokens.clamp(0, vocab_size - 1)

    monkeypatch.setattr("tokenenv.env.vector_env.token_codes", lenient)
    with pytest.raises(ContractError, match="does not raise ValueError on an action with token -1"):
        check_vector_env(make_vec(3), steps=8)


def test_bad_log_probs_must_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenenv.env.actions.LOGPROB_SLACK", 9.0)
    with pytest.raises(
        ContractError, match=r"does not raise ValueError on an action with logprob 1\.0"
    ):
        check_vector_env(make_vec(3, **TOYS["k1"]), steps=8)


def test_a_prefix_must_earn_nothing() -> None:
    envs = make_vec(3)
    begin = envs.unwrapped._engine.start

    def start(slots: Any, texts: Any, weights: Any) -> None:
        begin(slots, texts, weights)
        envs.unwrapped._engine.token_terms[slots, 0, :2] = torch.tensor([1.0, -1.0]) * float(
            texts.prefix_length.any()
        )

    envs.unwrapped._engine.start = start
    with pytest.raises(ContractError, match="a prefix earns rewards"):
        check_vector_env(envs, steps=8)


@pytest.mark.parametrize("mode", MODES)
def test_an_env_that_watches_keeps_the_contract(mode: AutoresetMode) -> None:
    envs = make_vec(3, mode, watch={"change": "delta", "share": "uniform"})
    check_vector_env(envs, steps=8)
    assert "token_watched" in envs.step(np.full(3, envs.unwrapped.token_spec.stop_token_ids[0]))[-1]


# ------------------------------------------------- texts that others write into


@pytest.mark.parametrize("mode", MODES)
def test_features_and_answers_after_every_token_keep_the_contract(mode: AutoresetMode) -> None:
    check_vector_env(make_vec(3, mode, observation="features", **TOYS["turns"]), steps=9)
    envs = make_vec(2, mode, array="torch", **TOYS["random turns"] | {"task": always})
    check_vector_env(envs, steps=9)


def always(*, scorer: str | None = "token", turns: str | None = None) -> Any:
    """The toy whose environment is asked after every token."""
    return replace(toy(scorer=scorer, turns=turns), turn_end_token_ids=None)


def told(key: str, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Another value in the observation, and in that of texts that have ended."""

    def put(now: Any) -> None:
        for obs in (now["obs"], now["info"].get("final_obs", now["obs"])):
            obs[key] = change(obs)

    return put


TURNS = {
    "all own": (
        told("own_mask", lambda obs: (obs["tokens"] > 0).astype(np.int8)),
        "'own_mask' is not that of the text before with the action appended",
    ),
    "reward": (
        info_value("turn_reward", lambda values: values + 1),
        "infos['turn_reward'] is not 0 where the environment was not asked",
    ),
    "no reward": (
        without("turn_reward"),
        "infos['turn_reward'] is not a finite number exactly where a token was taken",
    ),
    "no mask": (without("own_mask"), "infos['own_mask'] is not there exactly where texts end"),
    "mask": (
        info_value("own_mask", lambda mask: mask[:, ::-1] * now_ended(mask)),
        "infos['own_mask'] is not that of the last observation",
    ),
    "ended": (
        lambda now: now.update(terminated=now["terminated"] | ~now["truncated"]),
        "a slot ends without a stop token, before max_new_tokens tokens",
    ),
}


def now_ended(mask: np.ndarray) -> np.ndarray:
    return mask.any(1, keepdims=True)


@pytest.mark.parametrize(("change", "message"), TURNS.values(), ids=TURNS)
def test_names_what_is_wrong_in_texts_that_others_write_into(
    change: Callable[[Any], Any], message: str
) -> None:
    with pytest.raises(ContractError) as error:
        check_vector_env(Changed(make_vec(3, SAME, **TOYS["turns"]), change), steps=9)
    assert message in str(error.value)


def talkative(envs: Any, patch: pytest.MonkeyPatch) -> None:
    """Writes after every token, and says that it is asked after some."""
    patch.setattr("tokenenv.env.replies.is_asked", lambda spec, token: True)


def all_own(envs: Any, patch: pytest.MonkeyPatch) -> None:
    """Counts every token of a prefix as the policy's."""
    restart = envs._texts.restart
    patch.setattr(
        envs._texts,
        "restart",
        lambda *given: restart(*given[:5], {}, *given[6:]),
    )


INSIDE_TURNS = {
    "talkative": (talkative, "is not that of the text before with the action appended"),
    "all own": (all_own, "a slot ends without a stop token, before max_new_tokens tokens"),
    "fork": (attribute("_engine.fork", nothing), "after fork([0], [1]) the slots differ"),
    "seed": (
        attribute(
            "_streams.text_seeds", lambda slots, _: np.random.randint(2**31, size=len(slots))
        ),
        "reset(seed=0) and the same actions do not give the same run",
    ),
    "state": (
        attribute("_texts.load", nothing),
        "load_state() does not show the texts that were saved",
    ),
}


@pytest.mark.parametrize(("put", "message"), INSIDE_TURNS.values(), ids=INSIDE_TURNS)
def test_names_what_is_wrong_inside_an_env_that_writes(
    put: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    envs = make_vec(3, SAME, **TOYS["turns"] | {"turns": "random"})
    put(envs.unwrapped, monkeypatch)
    with pytest.raises(ContractError) as error:
        check_vector_env(envs, steps=9)
    assert message in str(error.value)
