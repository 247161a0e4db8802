"""What belongs to a prompt: a text keeps the columns of its row from its first to its last token,
and functions are given what they name."""

import copy
import json
import pickle
from dataclasses import replace

import fakes
import numpy as np
import pytest
import torch
from tasks import MODES, P, T, assert_equal, copied, random_actions, toy

from tokenenv.check import check_vector_env
from tokenenv.env.single_env import TokenEnv
from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.errors import CheckpointError, InvalidArgument
from tokenenv.models.chats import Chats
from tokenenv.rewards import Clipped, RewardTerm, Rule, TokenRule
from tokenenv.tables import by_name, read_columns

PROMPTS = [[20], [20], [21, 22], [23, 24], [25]]
"""The first two are the same prompt, with different answers."""
TABLE = [{"answer": 10 * (i + 1), "level": f"level {i}"} for i in range(len(PROMPTS))]


def right(prompt, response, answer):
    """A number that the prompt, every token of the response and the answer change."""
    return answer * (len(prompt) / 8 + sum(response) / 100)


def each(prompt, response, answer):
    return [answer + token / 1000 for token in response]


DENSE = Rule(right, "tokens", dense=True)
REWARDS = {
    "rule": Rule(right, "tokens"),
    "dense": DENSE,
    "each": TokenRule(each, "tokens"),
    "clipped": Clipped(DENSE, -1000, 1000),
}


def task_of(**changes):
    table = {"prompts": PROMPTS, "columns": TABLE}
    return replace(toy(scorer=None, gold=False), **{**table, **changes})


def make(num_envs=4, mode="SameStep", changes=None, **options):
    task = task_of(**(changes or {}))
    return TokenVectorEnv(num_envs, task=task, kl="none", autoreset_mode=mode, **options)


def rows(envs):
    """The answer of each slot's text."""
    return [row["answer"] for row in envs._texts.columns]


# -------------------------------------------------- a text and its row


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
@pytest.mark.parametrize("name", REWARDS)
def test_each_text_is_paid_for_its_own_row(name, mode):
    options = {"group_size": 2, "array": "torch"} if name == "rule" else {}
    gold = Rule(right, "tokens")
    envs = make(4, mode, {"gold": gold}, reward=REWARDS[name], watch={"w": gold}, **options)
    rng, ended = np.random.default_rng(0), np.zeros(4, bool)
    _, info = envs.reset(seed=1)
    seen = set()
    for _ in range(25):
        if mode.value == "Disabled" and ended.any():
            _, info = envs.reset(options={"reset_mask": ended})
        own = np.array([TABLE[i]["answer"] for i in np.asarray(envs._prompt_id)])
        assert rows(envs) == own.tolist()
        before = envs.responses()
        prompts = [envs.prompts[i] for i in envs._prompt_id]
        lost = ended & (mode.value == "NextStep")
        actions = random_actions(rng, envs)
        given = torch.tensor(actions) if options else actions
        _, _, terminated, truncated, info = envs.step(given)
        ended = np.asarray(terminated | truncated) & ~lost
        for slot in np.flatnonzero(ended):
            text = [*before[slot], int(actions[slot])]
            whole, empty = (right(prompts[slot], r, own[slot]) for r in (text, []))
            assert info["gold"][slot] == pytest.approx(whole)
            placed = np.asarray(info["token_rewards"][slot])
            if name == "each":
                np.testing.assert_allclose(placed[: len(text)], each(None, text, own[slot]), 1e-6)
            else:
                total = whole - (0 if name == "rule" else empty)
                assert placed.sum() == pytest.approx(total, abs=1e-4)
                assert info["score"][slot] == pytest.approx(whole)
            assert float(info["token_watched"]["w"][slot][len(text) - 1]) == pytest.approx(whole)
            seen.add((tuple(prompts[slot]), int(own[slot])))
    assert {((20,), 10), ((20,), 20)} <= seen


def test_stepping_pays_what_scoring_pays_and_the_contract_holds():
    check_vector_env(make(3, reward=DENSE, watch={"each": REWARDS["each"]}), steps=10)
    check_vector_env(make(3, "NextStep", reward=right_text, score_truncated=False), steps=10)


def right_text(prompt, response, answer, messages, **row):
    assert row == {"level": row["level"]}
    assert messages == [{"role": "user", "content": prompt}]
    return answer + len(response)


def test_copies_saved_and_forked_texts_keep_their_rows():
    envs, rng = make(4, "Disabled", reward=DENSE), np.random.default_rng(0)
    given = {"prompts": [[20], None, None, [20]], "columns": {"answer": [7, 0, 0, 9]}}
    envs.reset(seed=0, options=given)
    for _ in range(2):
        envs.step(random_actions(rng, envs, stop=0.0))
    envs.fork([0, 3], [1, 0])
    assert [rows(envs)[i] for i in (0, 1, 3)] == [9, 7, 9]
    saved = envs.save_state()
    saved["texts"]["columns"] = json.loads(json.dumps(saved["texts"]["columns"]))
    other = make(4, "Disabled", reward=DENSE)
    other.load_state(saved)
    saved["texts"]["columns"][0]["answer"] = -1
    twins = [envs, other, copy.deepcopy(envs), pickle.loads(pickle.dumps(envs))]
    actions = np.arange(30, 34)
    steps = [dict(enumerate(each.step(actions))) for each in twins]
    for each, step in zip(twins, steps, strict=True):
        assert rows(each) == rows(envs)
        assert_equal(copied(step), copied(steps[0]), 1e-6)
    part = envs.save_state([1])
    envs.reset(seed=3, options={"reset_mask": np.array([False, True, False, False])})
    envs.load_state(part)
    assert rows(envs)[1] == 7


def test_a_state_without_the_columns_is_refused_and_changes_nothing():
    envs = make(2, reward=REWARDS["rule"])
    envs.reset(seed=0)
    plain = make(2, changes={"columns": ()}, reward=lambda p, r: 0.0)
    plain.reset(seed=0)
    with pytest.raises(CheckpointError, match=r"weights|'answer', which the saved texts do not"):
        envs.load_state(plain.save_state() | {"engine": envs.save_state()["engine"]})
    for bad in (None, [{}], [{}, {1: 2}], [{}, 3], {}):
        saved = envs.save_state()
        saved["texts"]["columns"] = bad
        with pytest.raises(CheckpointError, match="columns"):
            envs.load_state(saved)
    assert set(rows(envs)) <= {row["answer"] for row in TABLE}


def test_one_text_at_a_time_and_given_prompts():
    env = TokenEnv(task=task_of(), reward=Rule(right, "tokens"), kl="none")
    env.reset(seed=0, options={"prompts": [[21]], "columns": {"answer": [np.int64(5)]}})
    _, reward, terminated, *_, info = env.step(fakes.EOS)
    assert terminated
    assert reward == info["score"] == pytest.approx(right([21], [fakes.EOS], 5))


def test_whole_texts_are_scored_with_the_columns_they_are_given():
    envs = make(2, changes={"gold": Rule(right, "tokens")}, reward=REWARDS["rule"])
    scores = envs.score_episodes([[20], [20]], [[30], [30]], columns={"answer": np.array([3, 4])})
    expected = [right([20], [30], answer) for answer in (3, 4)]
    np.testing.assert_allclose(scores.score, expected, rtol=1e-6)
    np.testing.assert_allclose(scores.gold, expected, rtol=1e-6)
    np.testing.assert_allclose(scores.token_rewards[:, 0], expected, rtol=1e-6)


def test_a_dense_rule_reads_the_row_of_each_of_many_texts():
    """Of which one with a longer response may be shorter, so that they end in no order."""
    prompts, answers = [[20, 21, 22], [20], [20, 21]], [1, 20, 300]
    responses = [[30], [30, 31], [30, 31, 32, 33]]
    given = {"columns": {"answer": answers}}
    scores = make(2, reward=DENSE).score_episodes(prompts, responses, **given)
    expected = [
        right(prompt, response, answer) - right(prompt, [], answer)
        for prompt, response, answer in zip(prompts, responses, answers, strict=True)
    ]
    np.testing.assert_allclose(scores.token_rewards.sum(1), expected, rtol=1e-5)


def test_gold_may_have_no_number_for_a_text():
    """It is paid to nobody, so nothing is wrong."""
    envs = make(2, changes={"gold": lambda prompt, response: float("nan")}, reward={})
    envs.reset(seed=0)
    assert np.isnan(envs.step(np.full(2, fakes.EOS))[-1]["gold"]).all()
    assert np.isnan(envs.score_episodes([[20]], [[30]]).gold).all()


# ------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [[20], None]}, r"asks for the column 'answer', which the given prompts"),
        ({"prompts": [[20], None], "columns": {"level": ["a", "b"]}}, "beside the prompt: level"),
        (
            {"prompts": [[20], None], "columns": {"answer": [1]}},
            r"\['answer'\] must be a list of 2",
        ),
        ({"prompts": [[20], None], "columns": {"answer": "12"}}, "must be a list of 2"),
        ({"prompts": [[20], None], "columns": [1, 2]}, "must map names of columns to lists"),
        (
            {"prompts": [[20], None], "columns": {"answer": [{1}, 2]}},
            r"\[0\] is of type set; a col",
        ),
        ({"columns": {"answer": [1, 2]}}, r"belong to options\['prompts'\], which are missing"),
    ],
)
def test_columns_that_cannot_be_used_are_named_and_nothing_changes(options, message):
    envs = make(2, reward=REWARDS["rule"])
    envs.reset(seed=0)
    before = envs.save_state()
    with pytest.raises(InvalidArgument, match=message):
        envs.reset(options=options)
    with pytest.raises(InvalidArgument, match=r"asks for the column 'answer'.*prompts to score"):
        envs.score_episodes([[20]], [[30]])
    assert envs.save_state()["texts"]["columns"] == before["texts"]["columns"]


def other(prompt, response, result, answer=0):
    return 0.0


class Own(RewardTerm):
    name = "own"
    columns = ("result",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"reward": other},
            r"reward='rule' asks for the column 'result', which the prompts do not ",
        ),
        ({"reward": {"mine": (other, 0.5)}}, "reward='mine' asks .* prompt: answer, level"),
        ({"reward": Clipped(other, 0, 1)}, "asks for the column 'result'"),
        ({"reward": Own()}, "reward='own' asks for the column 'result'"),
        ({"reward": {}, "watch": TokenRule(other)}, "watch='token_rule' asks for the column"),
        ({"reward": {}, "changes": {"gold": other}}, "gold= asks for the column 'result'"),
        ({"reward": {}, "changes": {"gold": other, "columns": ()}}, "beside the prompt: none"),
        (
            {"reward": right, "changes": {"columns": [*TABLE[:3], {}, {"answer": 1}]}},
            "'answer', which row 3 of the prompts does not have",
        ),
        ({"reward": right, "changes": {"columns": TABLE[:3]}}, "5 prompts and 3 rows of columns"),
        ({"reward": lambda text, level: 0.0}, "has its parameter 'level' where the prompt and"),
    ],
)
def test_a_column_that_is_missing_is_named_when_the_env_is_made(options, message):
    with pytest.raises(InvalidArgument, match=message):
        make(**options)


# ------------------------------------------------------ what functions get


def test_defaults_hold_where_there_is_no_such_column():
    seen = []

    def function(prompt, response, *, level, weight=3, answer="none", **others):
        seen.append((level, weight, answer, others))
        return 0.0

    changes = {"columns": [{"level": "a", "response": "kept back", "an odd name": 1}] * 5}
    envs = make(2, changes=changes, reward=function)
    envs.reset(seed=0)
    envs.step(np.array([fakes.EOS, 30]))
    assert seen == [("a", 3, "none", {"an odd name": 1})]


def light(prompt, response, weight=3):
    return weight * len(response)


def test_a_column_that_only_some_rows_have_is_no_column_of_the_others():
    """None was given for it, in place of the default, where texts are scored or reset."""
    table = [{"weight": 5}, {}, {}, {}, {"weight": None, "level": "a"}]
    some = {"prompts": PROMPTS[:4], "columns": table[:4]}
    check_vector_env(make(4, changes=some, reward=Rule(light, "tokens", dense=True)), steps=10)
    assert read_columns(by_name(table), range(5), 5, "columns") == table


@pytest.mark.parametrize("batched", [False, True])
def test_what_a_function_does_to_its_row_stays_with_it(batched):
    def greedy(prompt, response, tags, **row):
        for one in tags if batched else [tags]:
            one.pop()
        return [0.0] * len(tags) if batched else 0.0

    table = [{"tags": ["a"]} for _ in PROMPTS]
    envs = make(2, changes={"columns": table}, reward=Rule(greedy, dense=True, batched=batched))
    envs.reset(seed=0)
    envs.step(np.array([fakes.EOS, 30]))
    envs.step(np.array([30, 30]))
    assert list(envs.columns) == [{"tags": ["a"]}] * len(PROMPTS)


@pytest.mark.parametrize("dense", [False, True])
def test_a_batched_function_gets_lists_and_is_called_once_a_step(dense):
    calls = []

    def batched(prompts, responses, answer, level, missing=0):
        calls.append(len(prompts))
        assert missing == 0
        assert level == [f"level {one // 10 - 1}" for one in answer]
        return np.array([right(*one) for one in zip(prompts, responses, answer, strict=True)])

    whole, single = (
        make(4, "Disabled", reward=Rule(f, "tokens", dense=dense, batched=f is batched))
        for f in (batched, right)
    )
    rng = np.random.default_rng(2)
    for envs in (whole, single):
        envs.reset(seed=0)
    for _ in range(T):
        actions = random_actions(rng, whole, stop=0.0)
        pairs = [copied(dict(enumerate(envs.step(actions)))) for envs in (whole, single)]
        assert_equal(*pairs, 1e-6)
    assert calls == ([4] * (T + 1) if dense else [4])
    given = {"answer": [10, 20], "level": ["level 0", "level 1"]}
    scores = whole.score_episodes([[20], [20]], [[30], [31]], columns=given)
    assert scores.step_rewards.sum(1) == pytest.approx(
        [
            right([20], [30 + i], answer) - (right([20], [], answer) if dense else 0)
            for i, answer in enumerate(given["answer"])
        ],
        rel=1e-5,
    )


def test_messages_are_the_conversation_behind_the_prompt():
    tokenizer = fakes.tokenizer(["user", "it", "hello", "rain"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}it"
    chats = Chats(tokenizer)
    told = [{"role": "user", "content": "hello"}, {"role": "it", "content": "rain"}]
    prompts = [chats.encode(told, "p"), [5]]
    seen = []

    def noted(prompt, response, messages):
        seen.append((prompt.strip(), [dict(message) for message in messages]))
        messages[0]["content"] = "changed"
        return 0.0

    def make_chat(**options):
        changes = {"tokenizer": tokenizer, "chats": chats, "prompts": prompts, "columns": ()}
        return make(2, "Disabled", {**changes, "max_prompt_tokens": 8}, **options)

    for batched in (False, True):
        many = lambda ps, rs, messages: list(map(noted, ps, rs, messages))  # noqa: E731
        envs = make_chat(reward=Rule(many if batched else noted, batched=batched))
        envs.reset(options={"prompts": [told, [5]]})
        envs.step(np.array([fakes.EOS, fakes.EOS]))
    plain = tokenizer.decode([5]).strip()
    expected = [("user hello it rain it", told), (plain, [{"role": "user", "content": plain}])]
    assert seen == expected * 2
    on_tokens = Rule(lambda p, r, messages: len(messages) + len(p), "tokens")
    envs = make_chat(reward=on_tokens)
    envs.reset(options={"prompts": [told, [5]]})
    assert envs.step(np.full(2, fakes.EOS))[1].tolist() == [2 + len(prompts[0]), 2]
    with pytest.raises(InvalidArgument, match="needs a tokenizer"):
        make(changes={"tokenizer": None}, reward=on_tokens)


# ------------------------------------------------------- a rule is the score


MIXES = {"two": {"a": right, "b": right}, "with a design": {"a": right, "b": Own()}}


@pytest.mark.parametrize("reward", [right_text, Rule(right_text, dense=True)], ids=["end", "dense"])
@pytest.mark.parametrize("score_truncated", [True, False])
def test_a_single_rule_is_the_score_whatever_its_weight(reward, score_truncated):
    options = {"score_truncated": score_truncated, "missing_eos_penalty": 0.5 * score_truncated}
    calls = []

    def counted(prompt, response, answer, messages, **row):
        calls.append(response)
        return right_text(prompt, response, answer, messages, **row)

    weighed = {"mine": (Rule(counted, dense=getattr(reward, "dense", False)), 0.25)}
    changes = {"gold": "score", "stop_token_ids": (fakes.EOS,)}
    task = task_of(**changes)
    envs = TokenVectorEnv(2, task=task, reward=weighed, autoreset_mode="Disabled", **options)
    envs.reset(seed=0)
    prompts = [TABLE[i] for i in envs._prompt_id]
    for t in range(T):
        *_, info = envs.step(np.array([30, fakes.EOS if t == T - 1 else 31]))
    texts = envs.responses()
    words = envs.token_spec.tokenizer.batch_decode(texts, skip_special_tokens=True)
    assert info["cut"].tolist() == [True, False]
    # Response texts begin with a space where a prompt stands before them.
    expected = [row["answer"] + len(" " + word) for row, word in zip(prompts, words, strict=True)]
    np.testing.assert_allclose(info["score"], expected)
    np.testing.assert_allclose(info["gold"], expected)
    assert len(calls) == (2 * (T + 1) if reward is not right_text else 2)
    own = [envs._task.prompts[i] for i in envs._prompt_id]
    columns = {name: [row[name] for row in prompts] for name in ("answer", "level")}
    scores = envs.score_episodes(own, texts, columns=columns)
    np.testing.assert_allclose(scores.score, expected)
    np.testing.assert_allclose(scores.gold, expected)
    empty = [row["answer"] if reward is not right_text else 0 for row in prompts]
    paid = 0.25 * (np.array(expected) - empty)
    if not score_truncated and reward is right_text:
        paid[0] = 0.0
    np.testing.assert_allclose(scores.terms["mine"].sum(1), paid, rtol=1e-5)
    np.testing.assert_allclose(info["token_reward_terms"]["mine"].sum(1), paid, rtol=1e-5)


def test_a_wrapped_rule_is_the_score_and_a_mixture_or_a_watched_rule_is_not():
    def after(envs):
        envs.reset(seed=0)
        return envs.step(np.full(envs.num_envs, fakes.EOS))[-1]

    constant = lambda prompt, response: 5.0  # noqa: E731
    assert after(make(reward=Clipped(constant, 0, 1)))["score"].tolist() == [5.0] * 4
    watching = after(make(reward=constant, watch={"other": lambda p, r: 7.0}))
    assert watching["score"].tolist() == [5.0] * 4
    assert watching["watched"]["other"].tolist() == [7.0] * 4
    for envs in (
        make(reward={"a": constant, "b": constant}),
        make(reward={}, watch={"a": constant}),
        make(reward=TokenRule(each, "tokens")),
    ):
        assert "score" not in after(envs)
        given = {"columns": {"answer": [1]}} if "token_rule" in envs.weights else {}
        assert envs.score_episodes([[20]], [[30]], **given).score is None
    scored = TokenVectorEnv(2, task=toy(), reward=constant, autoreset_mode="SameStep")
    by_model = TokenVectorEnv(2, task=toy(), reward="token", autoreset_mode="SameStep")
    assert after(scored)["score"].tolist() == after(by_model)["score"].tolist()
    assert after(scored)["reward_terms"]["rule"].tolist() == [5.0] * 2


def test_the_identity_tells_tables_apart():
    other = [{**TABLE[0], "answer": 11}, *TABLE[1:]]
    one, same, another, none = (
        make(changes={"columns": table}, reward={}).identity
        for table in (TABLE, copy.deepcopy(TABLE), other, ())
    )
    assert one == same
    assert one["columns"] != another["columns"]
    assert "columns" not in none
    assert max(map(len, PROMPTS)) <= P
