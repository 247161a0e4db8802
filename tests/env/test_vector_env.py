"""The batched env: what reset and step do to the texts, and what bad input does not do."""

from typing import Any

import fakes
import gymnasium as gym
import numpy as np
import pytest
import tasks
import torch
from gymnasium.vector import AutoresetMode
from tasks import (
    MODES,
    STOPS,
    TOY,
    TOYS,
    P,
    T,
    assert_equal,
    copied,
    make_vec,
    play,
    random_actions,
)

from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.errors import EnvClosed, FinishedRow, InvalidAction, InvalidArgument, NotReset
from tokenenv.types import Task

NEXT_STEP, SAME_STEP, DISABLED = (
    AutoresetMode.NEXT_STEP,
    AutoresetMode.SAME_STEP,
    AutoresetMode.DISABLED,
)


def started(
    num_envs: int = 3, mode: Any = SAME_STEP, seed: Any = 0, reset: Any = None, **options: Any
) -> Any:
    envs = make_vec(num_envs, mode, **options)
    envs.reset(seed=seed, options=reset)
    return envs


def prompt_ids(envs: Any, episodes: int) -> np.ndarray:
    """The prompt ids (episodes, N) of one-token episodes."""
    return np.array(
        [envs.step(np.full(envs.num_envs, STOPS[0]))[4]["prompt_id"] for _ in range(episodes)]
    )


# ---------------------------------------------------------------- texts by hand


def test_a_text_by_hand() -> None:
    envs = make_vec(2, DISABLED)
    obs, info = envs.reset(options={"prompts": [[11, 12], [13]]})
    np.testing.assert_array_equal(info["prompt_id"], [-1, -1])
    np.testing.assert_array_equal(obs["tokens"], [[11, 12] + [0] * 10, [13] + [0] * 11])
    obs, first, terminated, truncated, info = envs.step(np.array([21, 0]))
    np.testing.assert_array_equal(obs["tokens"], [[11, 12, 21] + [0] * 9, [13] + [0] * 11])
    np.testing.assert_array_equal(
        obs["length"], [3, 2]
    )  # the pad id is a token like any other: the length decides
    np.testing.assert_array_equal(obs["prompt_length"], [2, 1])
    assert not terminated.any()
    assert not truncated.any()
    assert "score" not in info
    _, second, terminated, _, info = envs.step(np.array([STOPS[2], 22]))
    np.testing.assert_array_equal(terminated, [True, False])
    np.testing.assert_array_equal(info["_gold"], [True, False])
    np.testing.assert_array_equal(info["gold"], [2, 0])  # words of the response
    np.testing.assert_array_equal(info["token_rewards"][1], np.zeros(T))
    np.testing.assert_allclose(info["token_rewards"][0], [first[0], second[0]] + [0.0] * (T - 2))


@pytest.mark.parametrize("array", ["numpy", "torch"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "terminated"),
        ({"cut": "truncated"}, "truncated"),
        ({"score_truncated": False}, "truncated"),
        ({"score_truncated": False, "cut": "truncated"}, "truncated"),
    ],
)
def test_a_text_is_cut_after_max_new_tokens_and_a_stop_there_terminates(
    options: dict[str, Any], expected: str, array: str
) -> None:
    """Nothing is paid after a scored cut, so by default it is a termination; a cut without a score
    is a truncation."""
    for mode in MODES:
        envs = make_vec(3, mode, max_new_tokens=3, array=array, **options)
        envs.reset(options={"prompts": [[11], [11], [11]], "prefixes": [None, None, [20]]})
        *_, terminated, truncated, info = envs.step([20, 20, 20])
        assert not (terminated | truncated).any()
        assert "cut" not in info
        *_, terminated, truncated, info = envs.step([20, 20, STOPS[0]])
        np.testing.assert_array_equal(terminated, [False, False, True])
        np.testing.assert_array_equal(info["cut"], [False, False, False])
        np.testing.assert_array_equal(info["_cut"], [False, False, True])
        if mode == DISABLED:
            envs.reset(options={"reset_mask": np.array([False, False, True])})
        obs, _, terminated, truncated, info = envs.step([20, STOPS[0], 20])
        np.testing.assert_array_equal(truncated, [expected == "truncated", False, False])
        np.testing.assert_array_equal(terminated, [expected == "terminated", True, False])
        np.testing.assert_array_equal(info["cut"], [True, False, False])
        np.testing.assert_array_equal(info["_cut"], [True, True, False])
        last = info["final_obs"] if mode == SAME_STEP else obs
        np.testing.assert_array_equal(info.get("final_info", info)["cut"], info["cut"])
        np.testing.assert_array_equal(last["length"][:2], [4, 4])
        np.testing.assert_array_equal(last["tokens"][:2, 3], [20, STOPS[0]])


def test_spaces_spec_and_metadata() -> None:
    envs = make_vec(3, SAME_STEP, kl="policy")
    assert envs.metadata["autoreset_mode"] == SAME_STEP
    assert make_vec(1, "NextStep").metadata["autoreset_mode"] == NEXT_STEP
    assert TokenVectorEnv.metadata is not envs.metadata
    assert envs.single_action_space["token"] == gym.spaces.Discrete(fakes.VOCAB_SIZE)
    assert envs.single_observation_space["tokens"] == gym.spaces.Box(0, 60, (P + T,), np.int64)
    assert envs.single_observation_space["length"] == gym.spaces.Discrete(P + T + 1)
    spec = envs.unwrapped.token_spec
    assert (spec.vocab_size, spec.pad_token_id, spec.stop_token_ids) == (61, 0, STOPS)
    assert (spec.max_prompt_tokens, spec.max_new_tokens, spec.score_truncated) == (P, T, True)
    assert envs.unwrapped.model is envs.unwrapped.reference is tasks.reference()
    assert envs.unwrapped.device == torch.device("cpu")
    features = make_vec(3, observation="features")
    assert features.single_observation_space == gym.spaces.Box(-np.inf, np.inf, (32,), np.float32)


def test_features_are_the_references_last_state() -> None:
    envs = started(1, reset={"prompts": [[11, 12]]}, observation="features")
    obs, *_ = envs.step([20])
    expected = tasks.reference().model(torch.tensor([[11, 12, 20]]))[0][0, -1]
    np.testing.assert_allclose(obs[0], expected, atol=1e-5)


def test_a_tokenizer_without_a_pad_id_gets_a_stop_id_as_pad() -> None:
    tokenizer = fakes.tokenizer()
    tokenizer.pad_token = None
    base = tasks.toy()
    changed = {name: getattr(base, name) for name in Task.__slots__} | {"tokenizer": tokenizer}
    for stops, pad in (((9, 7), 9), ((), 0)):
        envs = TokenVectorEnv(1, task=Task(**{**changed, "stop_token_ids": stops}))
        assert envs.token_spec.pad_token_id == pad
        obs, _ = envs.reset(seed=0)
        assert (obs["tokens"][0, int(obs["length"][0]) :] == pad).all()


def test_models_that_are_not_frozen_make_no_graph() -> None:
    task = tasks.device_task("cpu")
    task.reference.requires_grad_(True)
    envs = TokenVectorEnv(2, task=task, array="torch", reward="delta")
    envs.reset(seed=0)
    _, reward, _, _, info = envs.step([20, STOPS[0]])
    assert not any(
        x.requires_grad for x in (reward, info["potential"], info["ref_logprob"], info["score"])
    )
    assert TokenVectorEnv(2, task=task).reset(seed=0)


# ---------------------------------------------------------- seeds and prompts


def test_slots_are_seeded_as_gymnasium_seeds_them() -> None:
    same = [prompt_ids(started(3, seed=seed), 5) for seed in (7, [7, 8, 9], np.int64(7))]
    np.testing.assert_array_equal(same[0], same[1])
    np.testing.assert_array_equal(same[0], same[2])
    one = prompt_ids(started(1, seed=8), 5)
    np.testing.assert_array_equal(same[0][:, 1:2], one)
    assert len(np.unique(same[0])) > 5


def test_without_a_seed_the_streams_go_on_and_a_none_in_a_list_leaves_its_slot() -> None:
    envs, again = started(2, seed=3), started(2, seed=3)
    expected = prompt_ids(again, 4)
    first = envs.reset()[1]["prompt_id"]
    np.testing.assert_array_equal(first, expected[0])
    mixed = envs.reset(seed=[3, None])[1]["prompt_id"]
    np.testing.assert_array_equal(mixed, [started_ids(3)[0], expected[1][1]])


def started_ids(seed: int) -> np.ndarray:
    return make_vec(2, SAME_STEP).reset(seed=seed)[1]["prompt_id"]


def test_unseeded_envs_differ() -> None:
    draws = [tuple(make_vec(12, SAME_STEP).reset()[1]["prompt_id"]) for _ in range(2)]
    assert draws[0] != draws[1]


@pytest.mark.parametrize("mode", [NEXT_STEP, SAME_STEP, DISABLED])
def test_the_texts_of_a_group_take_its_prompts_in_the_order_in_which_they_begin(mode: Any) -> None:
    """The m-th text of a group has its prompt number m // G, which is what a slot of that seed
    alone begins with."""
    envs = make_vec(6, mode, group_size=3)
    begun: list[list[int]] = [[], []]

    def note(info: Any, rows: np.ndarray) -> None:
        for row in np.flatnonzero(rows):
            begun[row // 3].append(int(info["prompt_id"][row]))

    note(envs.reset(seed=1)[1], np.ones(6, bool))
    rng, ended = np.random.default_rng(0), np.zeros(6, bool)
    for _ in range(40):
        resting, (*_, terminated, truncated, info) = (
            ended,
            envs.step(random_actions(rng, envs, stop=0.4)),
        )
        ended = terminated | truncated
        if mode == DISABLED and ended.any():
            note(envs.reset(options={"reset_mask": ended})[1], ended)
        elif mode != DISABLED:
            note(info, resting if mode == NEXT_STEP else ended)
    assert min(map(len, begun)) > 30
    alone = make_vec(2, SAME_STEP)
    expected = [alone.reset(seed=[1, 4])[1]["prompt_id"], *prompt_ids(alone, 30)]
    for group, prompts in enumerate(begun):
        shared = np.array(prompts[: len(prompts) // 3 * 3]).reshape(-1, 3)
        assert (shared == shared[:, :1]).all()
        np.testing.assert_array_equal(shared[:30, 0], np.array(expected)[: len(shared), group][:30])


def test_a_reset_gives_each_group_one_prompt_whatever_was_missing() -> None:
    envs = started(4, SAME_STEP, seed=0, group_size=2)
    rng, seen = np.random.default_rng(0), 0
    for _ in range(30):
        *_, terminated, truncated, _ = envs.step(random_actions(rng, envs, stop=0.4))
        if (terminated | truncated).sum() % 2:
            ids = envs.reset()[1]["prompt_id"]
            np.testing.assert_array_equal(ids[::2], ids[1::2])
            seen += 1
    assert seen > 5


def test_a_masked_reset_goes_on_with_the_oldest_prompt_that_lacks_a_text() -> None:
    envs = started(4, DISABLED, seed=3, group_size=2)
    ids = [
        envs.reset(options={"reset_mask": np.arange(4) == row})[1]["prompt_id"][row]
        for row in (0, 0, 1, 0)
    ]
    assert ids[0] == ids[1]
    assert ids[2] == ids[3] != ids[0]
    given = [None, [11], None, None]
    pair = envs.reset(options={"prompts": given, "reset_mask": np.arange(4) < 2})[1]["prompt_id"]
    fourth = prompt_ids(started(1, seed=3), 3)[2, 0]
    np.testing.assert_array_equal(
        pair[:2], [fourth, -1]
    )  # a given prompt takes the place of the one that was due


def test_a_seed_takes_whole_groups() -> None:
    envs, twin = (started(4, DISABLED, seed=3, group_size=2) for _ in range(2))
    envs.reset(seed=5)
    second = envs.reset(seed=9, options={"reset_mask": np.arange(4) < 2})[1]["prompt_id"]
    np.testing.assert_array_equal(second[:2], envs.reset(seed=9)[1]["prompt_id"][:2])
    envs.reset(seed=3)
    with pytest.raises(InvalidArgument, match=r"holds a part of a group, .* seed= takes all of it"):
        envs.reset(seed=9, options={"reset_mask": np.arange(4) < 3})
    for env in (envs, twin):
        env.reset(options={"reset_mask": np.arange(4) < 3})
    assert_goes_on(envs, twin, 1)
    ids = envs.reset(seed=[None, 1, 7, None])[1]["prompt_id"]  # a group takes its first slot's
    np.testing.assert_array_equal(ids[2:], envs.reset(seed=5)[1]["prompt_id"][2:])


@pytest.mark.parametrize("seed", [-1, [3, -1], [1], [1, 2, 3], 1.5, [0, 1.5], "12", {0: 1}])
def test_bad_seeds_change_nothing(seed: Any) -> None:
    envs, twin = started(2), started(2)
    with pytest.raises(InvalidArgument, match=r"^seed"):
        envs.reset(seed=seed)
    assert_goes_on(envs, twin)


def test_a_seed_is_the_one_that_gymnasium_tells() -> None:
    envs = make_vec(2, NEXT_STEP)
    envs.reset(seed=np.int64(12))
    assert envs.np_random_seed == 12
    assert type(envs.np_random_seed) is int
    assert envs.unwrapped.np_random.random() == gym.utils.seeding.np_random(12)[0].random()
    envs.reset()
    envs.reset(seed=[3, 4])
    assert envs.np_random_seed == 12


def test_given_prompts_may_be_texts_or_ids_and_the_rest_is_drawn() -> None:
    envs = make_vec(4, DISABLED)
    given = ["the cat", [11, 12], np.array([13]), None]
    obs, info = envs.reset(seed=5, options={"prompts": given})
    np.testing.assert_array_equal(info["prompt_id"][:3], [-1, -1, -1])
    assert (
        list(tasks.prompts()[info["prompt_id"][3]]) == obs["tokens"][3, : obs["length"][3]].tolist()
    )
    assert envs.unwrapped.decode(obs)[0] == "the cat"
    np.testing.assert_array_equal(obs["tokens"][1, :3], [11, 12, 0])
    mask = np.array([False, True, False, False])
    obs, info = envs.reset(options={"prompts": [[99999], [14], None, None], "reset_mask": mask})
    np.testing.assert_array_equal(info["_prompt_id"], mask)
    np.testing.assert_array_equal(
        obs["tokens"][:2, 0], [tasks.tokenizer()("the")["input_ids"][0], 14]
    )


def test_prefixes_earn_nothing_use_up_tokens_and_are_scored() -> None:
    for kind in ("token", "sequence"):
        reward = {"a": "delta", "b": "uniform", "c": "terminal"}
        envs = make_vec(2, SAME_STEP, reward=reward, scorer=kind, kl="none")
        prefix = [20, 21, 22]
        obs, start = envs.reset(seed=0, options={"prompts": [[11]] * 2, "prefixes": [prefix, None]})
        np.testing.assert_array_equal(obs["length"], [4, 1])
        np.testing.assert_array_equal(obs["prompt_length"], [1, 1])
        plain = envs.unwrapped.score_episodes([[11]], [prefix])
        first = float(start["potential"][0])
        np.testing.assert_allclose(first, plain.score[0], atol=1e-5)
        total = np.zeros(2)
        for step in range(T - 3):
            _, rewards, terminated, _, info = envs.step([30 + step] * 2)
            total += rewards
        np.testing.assert_array_equal(terminated, [True, False])
        np.testing.assert_array_equal(info["final_info"]["cut"], [True, False])
        whole = envs.unwrapped.score_episodes(
            [[11]], [prefix + [30 + step for step in range(T - 3)]]
        )
        np.testing.assert_allclose(info["score"][0], whole.score[0], atol=1e-5)
        np.testing.assert_allclose(total[0], 3 * whole.score[0] - first, atol=1e-4)
        placed = info["final_info"]["token_rewards"][0]
        assert not placed[:3].any()
        assert placed[3:].all()
        np.testing.assert_allclose(placed.sum(), total[0], atol=1e-5)
        assert info["final_info"]["potential"][0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"prompts": [[11] * (P + 1), None]},
            f"options['prompts'][0] has {P + 1} tokens and max_prompt_tokens={P}",
        ),
        ({"prompts": [None, []]}, "options['prompts'][1] is empty"),
        (
            {"prompts": [[11], [61]]},
            "options['prompts'][1]: token id 61 is out of range; allowed: 0 to 60",
        ),
        ({"prompts": [[11]]}, "options['prompts'] must be a list with one entry an env (2)"),
        ({"prompts": "ab"}, "options['prompts'] must be a list with one entry an env (2)"),
        (
            {"prefixes": [[11] * T, None]},
            f"options['prefixes'][0] has {T} tokens; allowed: fewer than max_new_tokens={T}",
        ),
        ({"prefixes": [None, [11, STOPS[1]]]}, "options['prefixes'][1] holds a stop token"),
        (
            {"prompt": [[11]] * 2},
            "options key='prompt' is not known; allowed: columns, prefix_own, prefixes, prompts, reset_mask. "
            "Did you mean 'prompts'",
        ),
        (
            {"reset_mask": [True, False]},
            "options['reset_mask']=[True, False] must be a bool array of shape (2,)",
        ),
        ({"reset_mask": np.array([1, 0])}, "must be a bool array of shape (2,)"),
        ({"reset_mask": np.ones(3, bool)}, "must be a bool array of shape (2,)"),
        ({"reset_mask": np.zeros(2, bool)}, "must have at least one True"),
    ],
)
def test_bad_reset_options_change_nothing(options: Any, message: str) -> None:
    envs, twin = started(2), started(2)
    with pytest.raises(InvalidArgument) as error:
        envs.reset(seed=9, options=options)
    assert message in str(error.value)
    assert_goes_on(envs, twin)


def assert_goes_on(envs: Any, twin: Any, steps: int = 4) -> None:
    rng = np.random.default_rng(4)
    for _ in range(steps):
        actions = random_actions(rng, envs, stop=0.3)
        a, b = envs.step(actions), twin.step(actions)
        assert_equal(
            {str(i): copied(a[i]) for i in range(5)}, {str(i): copied(b[i]) for i in range(5)}
        )


# ------------------------------------------------- weights, coefficients, counts


def test_kl_coef_changes_new_episodes_only() -> None:
    envs = started(2, reward={}, kl_coef=0.1)
    envs.unwrapped.kl_coef = 0.5
    _, reward, *_, info = envs.step([20, STOPS[0]])
    np.testing.assert_allclose(reward, 0.1 * info["ref_logprob"], rtol=1e-6)
    np.testing.assert_array_equal(info["kl_coef"], np.float32([0.1, 0.1]))
    _, reward, *_, info = envs.step([20, 20])
    np.testing.assert_allclose(reward, [0.1, 0.5] * info["ref_logprob"], rtol=1e-6)
    np.testing.assert_array_equal(info["kl_coef"], np.float32([0.1, 0.5]))
    for value in (-0.1, float("nan"), float("inf")):
        with pytest.raises(InvalidArgument, match=r"kl_coef=.* must be finite and 0 or more"):
            envs.unwrapped.kl_coef = value
    assert envs.unwrapped.kl_coef == 0.5


def test_schedules_are_read_where_an_episode_begins() -> None:
    asked: list[int] = []

    def schedule(tokens_seen: int) -> float:
        asked.append(tokens_seen)
        return 1.0 + tokens_seen

    envs = started(2, reward={"x": ("token", schedule), "y": "token"}, kl="none")
    ratios = []
    for tokens in ([20, 20], [20, STOPS[0]], [STOPS[0], 20], [20, 20]):
        terms = envs.step(tokens)[4]["reward_terms"]
        ratios.append(terms["x"] / terms["y"])
    np.testing.assert_allclose(ratios, [[1, 1], [1, 1], [1, 5], [7, 5]], rtol=1e-5)
    assert asked == [0, 4, 6]
    assert envs.unwrapped.tokens_seen == 8


def test_rows_that_are_only_reset_see_no_token() -> None:
    envs = started(2, NEXT_STEP)
    envs.step([20, STOPS[0]])
    _, reward, *_, info = envs.step([20, 10**9])  # whatever the action is
    assert envs.unwrapped.tokens_seen == 3
    assert reward[1] == 0
    np.testing.assert_array_equal(info["_ref_logprob"], [True, False])


def test_potentials_vanish_exactly_where_learners_do_not_bootstrap() -> None:
    for scored in (True, False):
        envs = started(
            3,
            reset={"prompts": [[11]] * 3},
            reward="delta",
            scorer="sequence",
            score_truncated=scored,
        )
        for _ in range(T - 1):
            envs.step([20, 21, 22])
        final = envs.step([STOPS[0], 21, 22])[4]["final_info"]["potential"]
        assert final[0] == 0
        np.testing.assert_array_equal(final[1:] == 0, [scored, scored])


def test_decode_reads_up_to_the_length() -> None:
    for array in ("numpy", "torch"):
        envs = make_vec(2, DISABLED, array=array)
        envs.reset(options={"prompts": ["the cat", "a dog"]})
        tokens = tasks.tokenizer()("is good")["input_ids"]
        obs = envs.step([tokens[0], tokens[1]])[0]
        assert envs.unwrapped.decode(obs) == ["the cat is", "a dog good"]


def test_slots_do_not_share_anything() -> None:
    """The same texts, alone and among others that start and end elsewhere."""
    alone = play(make_vec(1, SAME_STEP, **TOYS["mixture"]), stop=0.3)
    for episode in alone[:4]:
        envs = started(3, seed=8, **TOYS["mixture"])
        envs.step([STOPS[0], 20, 21])
        envs.reset(
            options={
                "prompts": [None, episode.prompt, None],
                "reset_mask": np.array([False, True, False]),
            }
        )
        rewards = []
        for token in episode.response:
            rewards.append(envs.step([12, token, STOPS[0]])[1][1])
        np.testing.assert_allclose(rewards, episode.rewards, atol=1e-5)


# ------------------------------------------------------------------- bad input

TWO = np.array([20, 21])
BAD_ACTIONS = {
    "above": ({}, np.array([20, 61]), "actions[1]=61 is no token id; allowed: 0 to 60"),
    "below": ({}, [-1, 3], "actions[0]=-1 is no token id"),
    "huge": ({}, np.array([2**63 + 5, 3], np.uint64), "is no token id"),
    "too many": ({}, [1, 2, 3], "actions has shape (3,); allowed: (2,)"),
    "scalar": ({}, 3, "actions has shape (); allowed: (2,)"),
    "matrix": ({}, np.ones((2, 1), int), "actions has shape (2, 1)"),
    "float": ({}, np.ones(2), "actions has dtype torch.float64; allowed: an integer dtype"),
    "bool": ({}, np.ones(2, bool), "actions has dtype torch.bool"),
    "complex": ({}, np.ones(2, complex), "actions has dtype torch.complex128"),
    "text": ({}, ["a", "b"], "actions is no array of numbers"),
    "none": ({}, None, "actions is no array of numbers"),
    "ragged": ({}, [[1], [2, 3]], "actions is no array of numbers"),
    "dict": (
        {},
        {"token": TWO, "logprob": -np.ones(2)},
        "a dict with a logprob is for kl='policy'",
    ),
    "missing": ({"kl": "policy"}, {"token": TWO}, "a dict of 'token' and 'logprob', got ['token']"),
    "no dict": ({"kl": "policy"}, TWO, "a dict of 'token' and 'logprob', got ndarray"),
    "nan": (
        {"kl": "policy"},
        {"token": TWO, "logprob": [-1.0, np.nan]},
        "actions['logprob'][1]=nan; kl='policy' needs a finite",
    ),
    "infinite": (
        {"kl": "policy"},
        {"token": TWO, "logprob": [-np.inf, -1.0]},
        "actions['logprob'][0]=-inf",
    ),
    "positive": (
        {"kl": "policy"},
        {"token": TWO, "logprob": [-1.0, 0.5]},
        "actions['logprob'][1]=0.5",
    ),
    "short": (
        {"kl": "policy"},
        {"token": TWO, "logprob": [-1.0]},
        "actions['logprob'] has shape (1,)",
    ),
    "token": (
        {"kl": "policy"},
        {"token": [3, 61], "logprob": [-1.0, -1.0]},
        "actions['token'][1]=61 is no token id",
    ),
}


@pytest.mark.parametrize("array", ["numpy", "torch"])
@pytest.mark.parametrize(("options", "actions", "message"), BAD_ACTIONS.values(), ids=BAD_ACTIONS)
def test_bad_actions_change_nothing(options: Any, actions: Any, message: str, array: str) -> None:
    envs, twin = started(2, array=array, **options), started(2, array=array, **options)
    if array == "torch" and isinstance(actions, np.ndarray) and actions.dtype != np.uint64:
        actions = torch.from_numpy(actions)
        message = message.replace("ndarray", "Tensor")
    with pytest.raises(InvalidAction) as error:
        envs.step(actions)
    assert message in str(error.value)
    assert_goes_on(envs, twin)


def test_an_ignored_rows_action_may_be_anything() -> None:
    envs = started(2, NEXT_STEP, kl="policy")
    envs.step({"token": [20, STOPS[0]], "logprob": [-1.0, -1.0]})
    _, reward, *_, info = envs.step({"token": [20, -7], "logprob": [-1.0, np.nan]})
    assert np.isfinite(reward).all()
    assert not info["_ref_logprob"][1]


def test_steps_need_a_reset_an_open_env_and_running_rows() -> None:
    envs = make_vec(2, DISABLED)
    with pytest.raises(NotReset, match=r"call reset\(\) first"):
        envs.step(TWO)
    with pytest.raises(NotReset):
        envs.reset(options={"reset_mask": np.array([True, False])})
    envs.reset(seed=0)
    twin = started(2, DISABLED)
    for env in (envs, twin):
        env.step([20, STOPS[0]])
    with pytest.raises(
        FinishedRow,
        match=r"rows \[1\] have finished; reset them first, with options=\{'reset_mask'",
    ):
        envs.step(TWO)
    for env in (envs, twin):
        env.reset(options={"reset_mask": np.array([False, True])})
    assert_goes_on(envs, twin, 1)
    envs.close()
    envs.close()
    core = envs.unwrapped
    for call in (
        lambda: envs.step(TWO),
        envs.reset,
        core.save_state,
        lambda: core.score_episodes([[3]], [[3]]),
        lambda: core.fork([0], [1]),
    ):
        with pytest.raises(EnvClosed, match="this env is closed; make a new one"):
            call()
    with pytest.raises(EnvClosed):
        core.load_state(started(2).unwrapped.save_state())


def test_a_closed_env_has_no_attribute_errors() -> None:
    """What needs the models says that they are gone; what does not, is there still."""
    envs = started(2, render_mode="ansi").unwrapped
    saved, texts = envs.save_state(), envs.reset(seed=0)[0]
    envs.close()
    gone = ("weights", "device", "cache_bytes", "biased_terms", "frozen_models", "identity")
    gone += ("as_typed", "reward_terms", "reward_version", "why_step", "learns_from_texts")
    calls = [
        (name, ())
        for name in (
            "reset",
            "render",
            "save_state",
            "ref_logprobs",
            "responses",
            "save_statistics",
        )
    ]
    calls += [
        ("step", (TWO,)),
        ("fork", ([0], [1])),
        ("load_state", (saved,)),
        ("load_statistics", ({},)),
    ]
    for call in [lambda name=name: getattr(envs, name) for name in gone] + [
        lambda c=c: getattr(envs, c[0])(*c[1]) for c in calls
    ]:
        with pytest.raises(EnvClosed, match="this env is closed; make a new one"):
            call()
    names = {name for name in dir(type(envs)) if not name.startswith("_")} - {
        *gone,
        *(name for name, _ in calls),
    }
    assert all(hasattr(envs, name) for name in names)
    assert envs.decode(texts)
    envs.kl_coef = 0.1
    envs.close()


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_numpys_numbers_are_sizes_too(kind: Any) -> None:
    sizes = {
        "group_size": kind(2),
        "max_new_tokens": kind(4),
        "max_batch_tokens": kind(200),
        "kl_coef": np.float32(0.5),
    }
    envs = make_vec(kind(4), SAME_STEP, **sizes)
    assert type(envs.unwrapped.num_envs) is type(envs.unwrapped.group_size) is int
    assert envs.reset(seed=kind(3))[0]["tokens"].shape == (4, P + 4)
    phrase = make_vec(
        kind(2), SAME_STEP, "tokenenv/PlantedPhrase-v0", vocab_size=kind(8), max_new_tokens=kind(8)
    )
    assert phrase.reset()[0]["tokens"].shape == (2, 9)
    given = {**tasks.textgen_options(), "max_prompt_tokens": kind(5), "stop_token_ids": [kind(1)]}
    assert make_vec(
        kind(2), SAME_STEP, "tokenenv/TextGen-v0", **given, max_new_tokens=kind(3)
    ).reset()[0]["tokens"].shape == (
        2,
        8,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_episode_steps": 9}, "max_episode_steps=9 is not taken: .* Use max_new_tokens"),
        ({"render_mode": "rgb"}, "render_mode='rgb' is not known; .* Did you mean 'rgb_array'"),
        ({"kl_coeff": 0.1}, "option='kl_coeff' is not known. Did you mean 'kl_coef'"),
        ({"scorrer": "token"}, "option='scorrer' is not known. Did you mean 'scorer'"),
        (
            {"reward": "tokn"},
            "reward='tokn' is not known. Did you mean 'token' or 'turn'",
        ),
        ({"reward": 3}, "reward=3 must be a design's name, a RewardTerm, a function"),
        ({"reward": {"kl": "token"}}, "the term name 'kl' is taken; use kl= and kl_coef= instead"),
        (
            {"reward": "token", "scorer": "sequence"},
            "reward='token' needs a token-classification reward model",
        ),
        (
            {"reward": "terminal", "scorer": None},
            "reward='terminal' needs a reward model .*, which this env does not have",
        ),
        (
            {"kl": "policies"},
            "kl='policies' is not known; allowed: none, policy, reference. Did you mean 'policy'",
        ),
        ({"kl_coef": -0.1}, "kl_coef=-0.1 must be finite and 0 or more"),
        ({"kl_estimator": "k3"}, "kl_estimator='k3' .* need kl='policy'"),
        ({"kl": "policy", "kl_clamp": 0.0}, "kl_clamp=0.0 must be above 0"),
        ({"array": "jax"}, "array='jax' is not known; allowed: numpy, torch"),
        ({"cut": "scored"}, "cut='scored' is not known; allowed: terminated, truncated"),
        ({"observation": "text"}, "observation='text' is not known"),
        (
            {"autoreset_mode": "Same"},
            "autoreset_mode='Same' is not known; allowed: Disabled, NextStep, SameStep",
        ),
        ({"group_size": 2}, "group_size=2 must divide num_envs=3"),
        ({"group_size": 0}, "group_size=0 must be a whole number, 1 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number, 1 or more"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty=-1.0 must be finite and 0 or more"),
        ({"missing_eos_penalty": 1.0, "score_truncated": False}, "needs score_truncated=True"),
        ({"num_envs": 0}, "num_envs=0 must be a whole number, 1 or more"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        gym.make_vec(TOY, **{"num_envs": 3, **options})


def test_gymnasium_registers_no_time_limit_and_keeps_specs_plain() -> None:
    for env_id in tasks.TASKS:
        spec = gym.spec(env_id)
        assert spec.max_episode_steps is None
        assert "tokenenv" in spec.to_json()


@pytest.mark.parametrize(
    "observation", [{}, {"tokens": [[3]], "length": [1, 1]}, {"tokens": [3], "length": 0.5}]
)
def test_decode_of_anything_else_is_refused(observation: Any) -> None:
    with pytest.raises(
        InvalidArgument, match="decode needs the tokens and length of an observation"
    ):
        started(2).unwrapped.decode(observation)


def test_decode_of_features_is_refused() -> None:
    envs = TokenVectorEnv(2, task=tasks.toy(), observation="features")
    with pytest.raises(InvalidArgument, match="decode needs a token observation"):
        envs.decode(envs.reset(seed=0)[0])
