"""Texts that the environment writes into: what it is asked, what it may do, and what counts."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tasks
import torch
import turn_tasks
from gymnasium.vector import AutoresetMode
from tasks import MODES, P, T, make_vec

from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.errors import InvalidArgument
from tokenenv.models.batching import hidden_states
from tokenenv.rewards.term import RewardTerm
from tokenenv.turns import Reply, Segment, TextSoFar, readable, segments_of, turn_numbers

SAME_STEP = AutoresetMode.SAME_STEP
STOP, END, WORD = 7, 12, 11
"""A stop token that also ends a turn, a token that ends a turn, and a word."""


def env_of(
    respond: Callable[[TextSoFar], Reply | None],
    num_envs: int = 1,
    mode: Any = SAME_STEP,
    **more: Any,
) -> Any:
    """The toy task with an environment of one's own."""
    task = tasks.toy(turns="silent", scorer=more.pop("scorer", "token"))
    changes = {"respond": respond, "max_context_tokens": P + T + 6} | {
        key: more.pop(key)
        for key in ("turn_end_token_ids", "max_context_tokens", "max_new_tokens")
        if key in more
    }
    task = dataclasses.replace(task, **changes)
    return TokenVectorEnv(num_envs, task=task, autoreset_mode=mode, **{"cut": "truncated"} | more)


def begin(envs: Any, prompt: tuple[int, ...] = (20, 21), **options: Any) -> Any:
    return envs.reset(seed=0, options={"prompts": [list(prompt)] * envs.num_envs, **options})[0]


def step(envs: Any, token: int) -> tuple[Any, float, bool, bool, Any]:
    obs, rewards, terminated, truncated, infos = envs.step(np.full(envs.num_envs, token))
    return obs, float(rewards[0]), bool(terminated[0]), bool(truncated[0]), infos


def text_of(obs: Any, row: int = 0) -> list[int]:
    return obs["tokens"][row, : obs["length"][row]].tolist()


# ---------------------------------------------------------------- what it is asked


def test_it_is_asked_after_the_policys_turn_ends_and_is_told_the_whole_text() -> None:
    asked: list[TextSoFar] = []

    def respond(text: TextSoFar) -> Reply:
        asked.append(text)
        return Reply([30, 31])

    envs = env_of(respond)
    begin(envs)
    for token in (WORD, END, WORD, END):
        obs = step(envs, token)[0]
    assert [text.prompt for text in asked] == [[20, 21]] * 2
    assert asked[1].segments == [(True, [WORD, END]), (False, [30, 31]), (True, [WORD, END])]
    assert asked[1].turn == [WORD, END]
    assert [text.turns_before for text in asked] == [0, 1]
    assert asked[0].seed == asked[1].seed
    assert text_of(obs) == [20, 21, WORD, END, 30, 31, WORD, END, 30, 31]
    assert obs["own_mask"][0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 0, 0] + [0] * (P + T + 6 - 10)
    assert obs["own_mask"] in envs.observation_space["own_mask"]


def test_without_turn_ends_it_is_asked_after_every_token() -> None:
    asked: list[TextSoFar] = []
    envs = env_of(asked.append, turn_end_token_ids=None)  # type: ignore[arg-type]
    begin(envs)
    step(envs, WORD)
    step(envs, WORD)
    assert [text.response for text in asked] == [[WORD], [WORD, WORD]]


def test_what_it_does_to_a_text_changes_nothing_but_its_own_copy() -> None:
    def respond(text: TextSoFar) -> Reply:
        columns: Any = text.columns
        said = float(columns["said"].pop())
        columns.clear()
        text.prompt.clear()
        text.segments.clear()
        return Reply([30], reward=said)

    envs = env_of(respond)
    row = {"said": [1, 2]}
    begin(envs, columns={"said": [row["said"]]})
    obs = step(envs, END)[0]
    obs, *_, infos = step(envs, END)
    assert infos["turn_reward"][0] == 2.0
    assert text_of(obs) == [20, 21, END, 30, END, 30]
    for _ in range(2):
        assert envs.reply([20], [END], [True], columns=row).reward == 2.0
    assert row == {"said": [1, 2]}


# ---------------------------------------------------------------- what it may do


def test_a_stop_token_ends_the_text_only_where_nothing_is_answered() -> None:
    envs = env_of(lambda text: Reply([30]) if text.turns_before == 0 else None)
    begin(envs)
    obs, _, terminated, truncated, _ = step(envs, STOP)
    assert (terminated, truncated) == (False, False)
    assert text_of(obs) == [20, 21, STOP, 30]
    _, _, terminated, truncated, infos = step(envs, STOP)
    assert (terminated, truncated) == (True, False)
    assert text_of(infos["final_obs"]) == [20, 21, STOP, 30, STOP]


def test_it_may_end_the_text_after_writing() -> None:
    envs = env_of(lambda text: Reply([30, 31], ends=True))
    begin(envs)
    _, _, terminated, truncated, infos = step(envs, END)
    assert (terminated, truncated) == (True, False)
    assert text_of(infos["final_obs"]) == [20, 21, END, 30, 31]
    assert infos["own_mask"][0, :5].tolist() == [0, 0, 1, 0, 0]


def test_own_tokens_use_up_the_budget_and_written_ones_do_not() -> None:
    envs = env_of(lambda text: Reply([30, 31]), max_context_tokens=100)
    begin(envs)
    for t in range(T):
        *_, truncated, infos = step(envs, END)
        assert truncated == (t == T - 1)
    # The answer to the last token is written, too.
    assert len(text_of(infos["final_obs"])) == 2 + 3 * T
    assert envs.tokens_seen == T


@pytest.mark.parametrize(("room", "cut_at", "length"), [(6, 2, 6), (7, 2, 6), (8, 2, 8), (9, 3, 9)])
def test_the_contexts_end_is_a_truncation(room: int, cut_at: int, length: int) -> None:
    """A reply that has no room is not written, and what fills the context ends the text; the reward
    of the turn is given in any case."""
    envs = env_of(lambda text: Reply([30, 31], reward=2.0), max_context_tokens=room)
    begin(envs)
    for t in range(1, cut_at + 1):
        *_, terminated, truncated, infos = step(envs, END)
        assert infos["turn_reward"][0] == 2.0
        assert (terminated, truncated) == (False, t == cut_at)
    assert len(text_of(infos["final_obs"])) == length


def test_a_turn_without_words_pays_its_reward_alone() -> None:
    envs = env_of(lambda text: Reply(reward=0.5))
    begin(envs)
    obs, *_, infos = step(envs, END)
    assert text_of(obs) == [20, 21, END]
    assert infos["turn_reward"].tolist() == [0.5]
    assert infos["turn_reward"].dtype == np.float32


def test_a_text_is_tokenised() -> None:
    envs = env_of(lambda text: Reply("the cat"))
    begin(envs)
    obs = step(envs, END)[0]
    ids = envs.token_spec.tokenizer("the cat", add_special_tokens=False)["input_ids"]
    assert text_of(obs) == [20, 21, END, *ids]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply([61]), "token id 61 is out of range; allowed: 0 to 60"),
        (Reply([-1]), "token id -1 is out of range"),
        (Reply([1.5]), "respond()'s Reply"),
        (Reply([1], reward=float("nan")), "reward=nan; it must be a finite number"),
        (Reply([1], reward="much"), "reward='much'; it must be a finite number"),
        (Reply([1], ends="no"), "ends='no'; it must be True or False"),
        ([30], "respond() returned [30]; it must return a tokenenv.Reply, or None"),
    ],
)
def test_a_bad_reply_says_what_is_wrong_and_the_env_asks_for_a_reset(
    reply: Any, message: str
) -> None:
    envs = env_of(lambda text: reply)
    begin(envs)
    step(envs, WORD)
    with pytest.raises(InvalidArgument) as error:
        step(envs, END)
    assert message in str(error.value)
    with pytest.raises(Exception, match=r"interrupted half-way.*call reset\(\)"):
        step(envs, WORD)
    begin(envs)
    step(envs, WORD)


# ---------------------------------------------------------------- what counts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("array", ["numpy", "torch"])
def test_an_environment_that_says_nothing_changes_nothing(mode: Any, array: str) -> None:
    """To the bit, but for the key that it adds."""
    reward = {"dense": "token", "moves": "delta", "shares": "uniform"}
    plain, silent = (
        make_vec(3, mode, reward=reward, array=array, **more) for more in ({}, {"turns": "silent"})
    )
    rng = np.random.default_rng(1)
    ours, theirs = (envs.reset(seed=2) for envs in (plain, silent))
    for _ in range(25):
        for obs, info in (ours[:: len(ours) - 1], theirs[:: len(theirs) - 1]):
            for one in (obs, info.get("final_obs", {})):
                one.pop("own_mask", None)
            for one in (info, info.get("final_info", {})):
                for key in ("turn_reward", "own_mask"):
                    one.pop(key, None)
                    one.pop(f"_{key}", None)
        tasks.assert_equal(tasks.copied(_listed(ours)), tasks.copied(_listed(theirs)))
        ended = np.asarray(ours[2] | ours[3]) if len(ours) == 5 else np.zeros(3, bool)
        if mode == AutoresetMode.DISABLED and ended.any():
            ours, theirs = (
                envs.reset(options={"reset_mask": ended.copy()}) for envs in (plain, silent)
            )
            continue
        tokens = tasks.random_actions(rng, plain)
        tokens = torch.as_tensor(tokens) if array == "torch" else tokens
        ours, theirs = plain.step(tokens), silent.step(tokens)


def _listed(result: tuple[Any, ...]) -> dict[str, Any]:
    return {str(i): value for i, value in enumerate(result)}


class Reads(RewardTerm):
    """Remembers the sum of all tokens of the response, and pays nothing."""

    name, has_memory, memory_dtype = "reads", True, torch.int64

    def remember(self, memory: Any, tokens: Any, states: Any) -> Any:
        return torch.zeros_like(tokens) if memory is None else memory + tokens

    def reward(self, batch: Any) -> Any:
        return (batch.next.memory[self.name] - batch.before.memory[self.name]).float()


def test_memories_read_what_is_written_and_kl_is_the_policys_own() -> None:
    envs = env_of(lambda text: Reply([30, 31]), reward={"reads": Reads()}, kl_coef=0.5)
    begin(envs)
    texts: list[Any] = []
    for token in (WORD, END, WORD):
        obs, reward, *_, infos = step(envs, token)
        texts.append((text_of(obs), reward, infos))
    reads = [infos["reward_terms"]["reads"][0] for *_, infos in texts]
    assert reads == [WORD, END + 30 + 31, WORD]
    model = tasks.reference()
    whole = torch.tensor([texts[-1][0]])
    logits = model(whole).logits[0].log_softmax(-1)
    places = [2, 3, 6]
    for place, (_, reward, infos), read in zip(places, texts, reads, strict=True):
        expected = float(logits[place - 1, whole[0, place]])
        assert float(infos["ref_logprob"][0]) == pytest.approx(expected, abs=1e-5)
        assert reward == pytest.approx(read + 0.5 * expected, abs=1e-5)


@pytest.mark.parametrize("scorer", ["token", "sequence"])
def test_the_score_is_of_own_tokens_one_by_one_or_of_the_whole_text(scorer: str) -> None:
    envs = env_of(
        lambda text: Reply([30, 31], ends=text.turns_before == 1), scorer=scorer, reward="terminal"
    )
    begin(envs)
    for token in (WORD, END, WORD, END):
        *_, infos = step(envs, token)
    model, ids = tasks.reward_model(scorer), text_of(infos["final_obs"])
    states = hidden_states(model.base_model, torch.tensor([ids]), [len(ids)])
    scores = model.score(states)[0, :, 0].tolist()
    own = [scores[place] for place in (2, 3, 6, 7)]
    expected = sum(own) if scorer == "token" else scores[-1]
    assert float(infos["score"][0]) == pytest.approx(expected, abs=1e-5)


def test_a_text_whose_written_tokens_are_a_prefix_earns_the_same() -> None:
    """The second turn alone, with all before it given at reset."""
    envs = env_of(lambda text: Reply([30, 31]) if text.turns_before == 0 else None, kl_coef=0.3)
    begin(envs)
    paid = [step(envs, token)[1] for token in (WORD, END, WORD, WORD)]
    prefix = {"prefixes": [[WORD, END, 30, 31]], "prefix_own": [[True, True, False, False]]}
    obs = begin(envs, **prefix)
    assert not obs["own_mask"].any()
    again = [step(envs, token)[1] for token in (WORD, WORD)]
    np.testing.assert_allclose(again, paid[2:], atol=1e-6)
    for _ in range(T - 4):
        *_, truncated, infos = step(envs, WORD)
    assert truncated
    assert np.flatnonzero(infos["token_rewards"][0]).tolist() == list(range(2, T))


def test_a_prefix_without_a_mask_is_all_the_policys() -> None:
    envs = env_of(lambda text: None)
    begin(envs, prefixes=[[WORD, 30, 31]])
    for t in range(T - 3):
        assert step(envs, WORD)[3] == (t == T - 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"respond": "hello"}, "respond='hello' must be a function"),
        ({"turn_end_token_ids": (1, 61)}, "turn_end_token_ids=(1, 61) must be token ids, 0 to 60"),
        ({"turn_end_token_ids": ()}, "turn_end_token_ids=() must be token ids"),
        ({"max_context_tokens": P}, f"max_context_tokens={P} must be more than max_prompt_tokens"),
        ({"respond": None}, "turn_end_token_ids and max_context_tokens are of no use"),
    ],
)
def test_a_task_that_does_not_fit(changes: Any, message: str) -> None:
    task = dataclasses.replace(tasks.toy(turns="silent"), **changes)
    with pytest.raises(InvalidArgument) as error:
        TokenVectorEnv(1, task=task)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefixes": [[1, 2]], "prefix_own": [[1]]}, "must hold 2 entries, one a token"),
        ({"prefixes": [[1, 2]], "prefix_own": [[1, 2]]}, "must hold 2 entries"),
        ({"prefixes": [[1] * T]}, f"has {T} tokens; allowed: fewer than max_new_tokens={T}"),
        (
            {"prefixes": [[1] * 20], "prefix_own": [[0] * 20]},
            "has 20 tokens; allowed: fewer than 13, which is what the context",
        ),
    ],
)
def test_a_bad_prefix(options: Any, message: str) -> None:
    envs = env_of(lambda text: None)
    with pytest.raises(InvalidArgument) as error:
        envs.reset(options=options)
    assert message in str(error.value)


def test_masks_are_for_envs_that_write() -> None:
    envs = make_vec(1, SAME_STEP)
    with pytest.raises(InvalidArgument, match=r"'prefix_own'.*policy alone writes"):
        envs.reset(options={"prefixes": [[1]], "prefix_own": [[True]]})
    for name in ("own", "turn_rewards"):
        with pytest.raises(InvalidArgument, match=rf"{name}=.*policy alone writes"):
            envs.unwrapped.score_episodes([[1]], [[2]], **{name: [[True]]})


# ---------------------------------------------------------------- seeds


def random_reply(text: TextSoFar) -> Reply:
    return Reply(text.rng().integers(10, 60, 2).tolist())


def written_by(envs: Any, steps: int = 4) -> list[list[int]]:
    for _ in range(steps):
        obs, *_ = envs.step(np.full(envs.num_envs, END))
    return [text_of(obs, row) for row in range(envs.num_envs)]


def test_answers_are_drawn_from_the_seed_the_slot_and_the_number_of_the_text() -> None:
    envs = env_of(random_reply, 3, max_context_tokens=60)
    begin(envs)
    first = written_by(envs)
    assert len({tuple(text) for text in first}) == 3
    begin(envs)
    assert written_by(envs) == first
    prompts = {"prompts": [[20, 21]] * 3}
    envs.reset(options=prompts)
    later = written_by(envs)
    assert all(ours != theirs for ours, theirs in zip(first, later, strict=True))


def test_the_texts_of_a_group_are_answered_each_by_its_own_numbers() -> None:
    envs = env_of(random_reply, 4, group_size=4, max_context_tokens=60)
    begin(envs)
    assert len({tuple(text) for text in written_by(envs)}) == 4


def test_a_fork_is_answered_anew_and_a_saved_text_as_before() -> None:
    envs = env_of(random_reply, 3, max_context_tokens=60)
    begin(envs)
    written_by(envs, 2)
    saved = envs.save_state()
    after = written_by(envs, 2)
    obs, _ = envs.load_state(saved)
    assert written_by(envs, 2) == after
    envs.load_state(saved)
    obs, _ = envs.fork([0, 0], [1, 2])
    begun = [text_of(obs, row) for row in range(3)]
    assert begun[0] == begun[1] == begun[2]
    np.testing.assert_array_equal(obs["own_mask"][0], obs["own_mask"][2])
    forked = written_by(envs, 2)
    assert forked[0] == after[0]
    assert len({tuple(text) for text in forked}) == 3
    # A second fork from the same state has the same two parts, and draws the same.
    envs.load_state(saved)
    envs.fork([0, 0], [1, 2])
    assert written_by(envs, 2) == forked


# ---------------------------------------------------------------- whole texts elsewhere


def test_the_env_answers_texts_that_are_written_elsewhere() -> None:
    envs = env_of(random_reply, 1, max_context_tokens=60)
    core = envs.unwrapped
    assert core.reply([20], [WORD], [True]) is None
    reply = core.reply([20], [WORD, END], [True, True], seed=5)
    assert reply == core.reply([20], [WORD, END], [True, True], seed=5)
    assert reply != core.reply([20], [WORD, END], [True, True], seed=6)
    begin(envs)
    obs = step(envs, END)[0]
    seed = int(core._texts.seed[0])
    assert text_of(obs)[3:] == core.reply([20, 21], [END], [True], seed=seed).tokens


@pytest.mark.parametrize(
    ("response", "own"), [([], []), ([END], [True, True]), ([END, 30], [True, False])]
)
def test_only_a_text_that_ends_in_a_token_of_the_policys_is_answered(
    response: list[int], own: list[bool]
) -> None:
    with pytest.raises(InvalidArgument, match="own="):
        env_of(lambda text: Reply([30])).reply([20], response, own)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"own": [[True]]}, "own[0]=[True] must hold 3 entries"),
        ({"own": []}, "own has 0 entries; allowed: one a text (1)"),
        ({"own": [[False] * 3]}, "responses[0] has 0 tokens of the policy; allowed: 1 to"),
        ({"turn_rewards": [[1.0]]}, "turn_rewards must hold one number for every response token"),
        (
            {"turn_rewards": [[1.0, np.inf, 0.0]]},
            "turn_rewards[0] holds a number that is not finite",
        ),
        ({"responses": [[WORD] * 30]}, "30 tokens of the policy; allowed: 1 to"),
        (
            {"responses": [[WORD] * 30], "own": [[True] + [False] * 29]},
            "have 32 tokens together; allowed: at most 18",
        ),
    ],
)
def test_bad_texts_to_score(changes: dict[str, Any], message: str) -> None:
    envs = env_of(random_reply)
    given: dict[str, Any] = {"prompts": [[20, 21]], "responses": [[WORD, END, 30]]} | changes
    with pytest.raises(InvalidArgument) as error:
        envs.unwrapped.score_episodes(**given)
    assert message in str(error.value)


def test_whose_last_token_it_is_decides_whether_a_text_was_cut() -> None:
    envs = env_of(random_reply, score_truncated=False, reward="terminal")
    score = envs.unwrapped.score_episodes(
        [[20]] * 4,
        [[WORD, STOP], [WORD, STOP], [WORD, STOP], [WORD, END, 30]],
        own=[[True, True], [True, False], [True, True], [True, True, False]],
        truncated=None,
    )
    paid = score.terms["terminal"].any(1)
    assert paid.tolist() == [True, False, True, False]
    ended = envs.unwrapped.score_episodes(
        [[20]] * 2,
        [[WORD, STOP], [WORD, END, 30]],
        own=[[True, True], [True, True, False]],
        truncated=[True, False],
    )
    assert ended.terms["terminal"].any(1).tolist() == [False, True]


# ---------------------------------------------------------------- segments


def test_segments_and_turns() -> None:
    own = np.array([True, True, False, True, False, False])
    segments = segments_of([1, 2, 3, 4, 5, 6], own)
    assert segments == [(True, [1, 2]), (False, [3]), (True, [4]), (False, [5, 6])]
    assert segments_of([], own[:0]) == []
    assert segments_of([1, 2], None) == [(True, [1, 2])]
    assert readable(segments[:1], None) == [{"own": True, "tokens": [1, 2]}]
    assert turn_numbers(np.array([3, 4, 7, 9, 10])).tolist() == [0, 0, 1, 2, 2]
    assert turn_numbers(np.zeros(0, np.int64)).tolist() == []


def test_turn_toys_are_written_into_in_every_way() -> None:
    """The toys that other tests run on have all that may happen."""
    envs = make_vec(5, SAME_STEP, **tasks.TOYS["turns"])
    played = tasks.play(envs, steps=60)
    spec = envs.token_spec
    written = [[t for t, own in zip(e.response, e.own, strict=True) if not own] for e in played]
    assert sum(map(bool, written)) > 10
    assert any(set(some) & set(spec.stop_token_ids) for some in written)
    full = [len(e.prompt) + len(e.response) for e in played if e.truncated]
    assert any(sum(e.own) < T for e in played if e.truncated)
    assert max(full) <= spec.max_length
    ended = [e for e in played if not e.truncated]
    assert any(not e.own[-1] or e.response[-1] not in spec.stop_token_ids for e in ended)
    asked = [TextSoFar([1], [Segment(True, [number])]) for number in range(5)]
    assert any(turn_tasks.answers(text) is None for text in asked)


@pytest.mark.parametrize("scored", [True, False])
def test_a_text_that_waits_for_its_reset_has_the_potential_of_its_end(scored: bool) -> None:
    """Whether a text counts as scored is what ended it, not its last token: the first is ended by
    the environment, the second is cut behind a stop token that had no room for its answer."""
    envs = env_of(
        lambda text: Reply([30], ends=True) if text.turn[-1] == END else Reply([31, 32]),
        2,
        AutoresetMode.DISABLED,
        reward="delta",
        score_truncated=scored,
        max_context_tokens=P + 1,
    )
    envs.reset(options={"prompts": [[20, 21], [20, 21, 22, 23]]})
    *_, infos = envs.step(np.array([END, STOP]))
    assert infos["cut"].tolist() == [False, True]
    assert (infos["potential"] == 0).tolist() == [True, scored]
    loaded = envs.load_state(envs.save_state())[1]
    np.testing.assert_allclose(loaded["potential"], infos["potential"], atol=1e-6)
