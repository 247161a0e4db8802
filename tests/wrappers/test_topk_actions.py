"""`TopKActions`: choice i is the reference's i-th likeliest next token, whatever the env's mode,
arrays and observation."""

from typing import Any

import fakes
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers.vector import ArrayConversion, RecordEpisodeStatistics
from hypothesis import given
from hypothesis import strategies as st
from tasks import MODES, STOPS, TOYS, T, assert_equal, copied, make_vec, reference, row_of

from tokenenv.errors import FinishedRow, InvalidAction, InvalidArgument, NotReset
from tokenenv.wrappers.action_spaces import ActionMask, TopKActions, likeliest

V, N, K = fakes.VOCAB_SIZE, 3, 6
NEXT_STEP, SAME_STEP, DISABLED = (
    AutoresetMode.NEXT_STEP,
    AutoresetMode.SAME_STEP,
    AutoresetMode.DISABLED,
)


def naive_choices(obs: Any) -> np.ndarray:
    """By a forward of the reference over every whole text, and a sort."""
    rows = []
    for tokens, length in zip(obs["tokens"], obs["length"], strict=True):
        with torch.no_grad():
            logits = reference()(input_ids=torch.as_tensor(tokens[:length])[None]).logits[0, -1]
        rows.append(sorted(range(V), key=lambda i: (-float(logits[i]), i)))
    return np.array(rows)


def follow(envs: Any, mode: AutoresetMode, ended: np.ndarray, step: tuple[Any, ...]) -> Any:
    """The observation to act on: under DISABLED, of ended rows begun anew."""
    if mode == DISABLED and ended.any():
        return envs.reset(options={"reset_mask": ended})[0]
    return step[0]


@pytest.mark.parametrize("observation", ["tokens", "features"])
@pytest.mark.parametrize("array", ["numpy", "torch"])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
def test_a_choice_is_the_ith_likeliest_token(
    mode: AutoresetMode, array: str, observation: str
) -> None:
    options = {**TOYS["mixture"], "array": array, "observation": observation}
    envs, plain = TopKActions(make_vec(N, mode, **options), K), make_vec(N, mode, **TOYS["mixture"])
    rng, ends = np.random.default_rng(0), 0
    envs.reset(seed=4)
    obs, _ = plain.reset(seed=4)
    for _ in range(2 * T + 4):
        picks, naive = rng.integers(0, K, N), naive_choices(obs)
        np.testing.assert_array_equal(envs.choices(), naive[:, :K])
        mine = envs.step(torch.as_tensor(picks) if array == "torch" else picks)
        theirs = plain.step(np.take_along_axis(naive, picks[:, None], 1)[:, 0])
        assert isinstance(mine[1], torch.Tensor) == (array == "torch")
        assert_equal(copied(mine[1:4]), copied(theirs[1:4]), 1e-5)
        ended = theirs[2] | theirs[3]
        ends += ended.sum()
        follow(envs, mode, ended, mine)
        obs = follow(plain, mode, ended, theirs)
    assert ends >= N


@given(
    st.integers(1, 7),
    st.lists(st.lists(st.integers(0, 3), min_size=7, max_size=7), min_size=1, max_size=4),
)
def test_equal_scores_are_ordered_by_id(k: int, rows: list[list[int]]) -> None:
    scores = np.array(rows, np.float32)
    np.testing.assert_array_equal(
        likeliest(torch.as_tensor(scores), k).numpy(), np.argsort(-scores, 1, kind="stable")[:, :k]
    )


def test_all_tokens_can_be_on_offer_and_a_stop_token_ends_a_text() -> None:
    envs = TopKActions(make_vec(N, SAME_STEP), V)
    envs.reset(seed=0)
    choices = envs.choices()
    np.testing.assert_array_equal(np.sort(choices, 1), [np.arange(V)] * N)
    _, _, terminated, truncated, _ = envs.step(
        np.array([list(row).index(STOPS[0]) for row in choices])
    )
    assert terminated.all()
    assert not truncated.any()


def test_a_text_is_cut_unless_a_stop_token_is_on_offer_and_chosen() -> None:
    envs = TopKActions(make_vec(8, SAME_STEP, stops=(STOPS[0],)), 1)
    envs.reset(seed=0)
    cuts = 0
    for _ in range(4 * T):
        offered = envs.choices()[:, 0]
        *_, info = envs.step(np.zeros(8, int))
        cut, ended = info.get("cut", np.zeros(8, bool)), info.get("_cut", np.zeros(8, bool))
        np.testing.assert_array_equal(ended & ~cut, offered == STOPS[0])
        cuts += cut.sum()
    assert cuts >= 8


def test_spaces_and_kl_of_a_choice() -> None:
    envs = TopKActions(make_vec(N, SAME_STEP, kl="policy", kl_coef=0.3), K)
    assert envs.single_action_space["token"] == gym.spaces.Discrete(K)
    assert envs.action_space.contains(envs.action_space.sample())
    envs.reset(seed=0)
    logprob = np.array([-0.1, -1.0, -2.0], np.float32)
    *_, info = envs.step({"token": np.array([0, 1, 2]), "logprob": logprob})
    np.testing.assert_allclose(
        info["reward_terms"]["kl"], -0.3 * (logprob - info["ref_logprob"]), rtol=1e-5
    )
    plain = TopKActions(make_vec(N, SAME_STEP), K)
    assert plain.single_action_space == gym.spaces.Discrete(K)
    assert plain.action_space == gym.spaces.MultiDiscrete([K] * N)
    plain.reset(seed=0)
    assert plain.action_masks().tolist() == [[True] * K] * N


def test_bad_picks_are_errors_and_change_nothing() -> None:
    envs = TopKActions(make_vec(N, SAME_STEP), K)
    with pytest.raises(NotReset):
        envs.step(np.zeros(N, int))
    envs.reset(seed=0)
    saved = envs.unwrapped.save_state()
    for bad in ([0, K, 0], [0, -1, 0]):
        with pytest.raises(
            InvalidAction, match=rf"actions\[1\]={bad[1]} is no choice; allowed: 0 to {K - 1}"
        ):
            envs.step(np.array(bad))
    for bad in (np.zeros(N), np.zeros(N + 1, int), 3):
        with pytest.raises(InvalidAction, match=f"{N} integers, 0 to {K - 1}"):
            envs.step(bad)
    assert_equal(copied(envs.unwrapped.save_state()["texts"]), copied(saved["texts"]))


def test_rows_that_wait_for_their_reset_take_any_pick() -> None:
    for mode in (NEXT_STEP, DISABLED):
        envs = TopKActions(make_vec(N, mode), V)
        envs.reset(seed=0)
        picks = np.zeros(N, int)
        picks[1] = list(envs.choices()[1]).index(STOPS[0])
        envs.step(picks)
        with pytest.raises(InvalidAction):
            envs.step(np.array([-1, 0, 0]))
        if mode == DISABLED:
            with pytest.raises(FinishedRow):
                envs.step(np.array([0, 999, 0]))
        else:
            obs = envs.step(np.array([0, 999, 0]))[0]
            np.testing.assert_array_equal(obs["length"] - obs["prompt_length"], [2, 0, 2])


@pytest.mark.parametrize("between", [False, True], ids=["directly", "with a wrapper between"])
def test_over_a_mask_the_choices_are_the_likeliest_allowed_tokens(between: bool) -> None:
    masked = ActionMask(make_vec(N, SAME_STEP), regex="(the|a) (cat|dog|bird) is (very )*good")
    envs = TopKActions(RecordEpisodeStatistics(masked) if between else masked, 3)
    obs, _ = envs.reset(seed=1)
    rng = np.random.default_rng(0)
    for _ in range(15):
        naive = naive_choices(obs)
        for row, mask in enumerate(masked.action_masks()):
            likely = [token for token in naive[row] if mask[token]][:3]
            np.testing.assert_array_equal(
                envs.choices()[row], likely + likely[:1] * (3 - len(likely))
            )
            np.testing.assert_array_equal(envs.action_masks()[row], np.arange(3) < len(likely))
        obs = envs.step(rng.integers(0, 3, N))[0]


def test_what_the_reference_never_says_is_on_offer_where_nothing_else_is_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    masked = ActionMask(make_vec(1, SAME_STEP), regex="cat")
    envs = TopKActions(masked, 2)
    envs.reset(seed=0)
    cat = masked.action_masks()[0].argmax()
    never = np.where(np.arange(V) == cat, -np.inf, -np.log(V - 1)).astype(np.float32)[None]
    monkeypatch.setattr(type(envs.unwrapped), "ref_logprobs", lambda self: never)
    np.testing.assert_array_equal(envs.choices(), [[cat, cat]])
    np.testing.assert_array_equal(envs.action_masks(), [[True, False]])


def test_features_of_an_automaton() -> None:
    envs = TopKActions(
        gym.make_vec("tokenenv/Negation-v0", num_envs=N, observation="features", max_new_tokens=3),
        4,
    )
    obs, _ = envs.reset(seed=0)
    assert envs.observation_space.contains(obs)
    assert envs.step(np.array([0, 1, 3]))[0].shape == obs.shape


def test_above_array_conversion() -> None:
    envs = TopKActions(
        ArrayConversion(make_vec(N, SAME_STEP, array="torch"), env_xp=torch, target_xp=np), K
    )
    plain = TopKActions(make_vec(N, SAME_STEP), K)
    envs.reset(seed=2)
    plain.reset(seed=2)
    for pick in range(5):
        mine, theirs = (wrapped.step(np.full(N, pick)) for wrapped in (envs, plain))
        assert_equal(dict(enumerate(mine[:4])), dict(enumerate(theirs[:4])))
        assert_equal(row_of(mine[4], 0), row_of(theirs[4], 0))


class Foreign(VectorEnv):
    num_envs = 1
    single_action_space = gym.spaces.Discrete(5)


def test_bad_arguments() -> None:
    envs = make_vec(N)
    for k in (0, V + 1):
        with pytest.raises(
            InvalidArgument, match=rf"k={k} is not allowed; it must lie between 1 and {V}"
        ):
            TopKActions(envs, k)
    for wrap in (
        lambda: TopKActions(TopKActions(envs, 4), 2),
        lambda: ActionMask(TopKActions(envs, 4), top_p=0.9),
    ):
        with pytest.raises(
            InvalidArgument, match="has a TopKActions already, which must be the outermost wrapper"
        ):
            wrap()
    with pytest.raises(InvalidArgument, match="envs=Foreign is no vector env of this package"):
        TopKActions(Foreign(), 2)


@pytest.mark.parametrize(
    "wrap", [lambda envs: TopKActions(envs, 2), lambda e: ActionMask(e, top_p=0.9)]
)
@pytest.mark.parametrize("given", ["tests/Toy-v0", "a single env"])
def test_what_is_no_vector_env_is_refused_with_the_call_to_make(wrap: Any, given: str) -> None:
    envs: Any = given if given.startswith("tests/") else gym.make("tests/Toy-v0")
    name = "'tests/Toy-v0'" if given.startswith("tests/") else "TokenEnv"
    with pytest.raises(
        InvalidArgument,
        match=rf"envs={name} is no vector env of this package; give \w+\(gym\.make_vec\(",
    ):
        wrap(envs)
