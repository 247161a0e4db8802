"""Python functions as rewards: what they may return, where they may be given, and their dense
form."""

import copy
import functools
import pickle
from fractions import Fraction

import fakes
import numpy as np
import pytest
import torch
from tasks import MODES, T, assert_equal, copied, make_vec, play, random_actions, tokenizer

from tokenenv.errors import InvalidArgument
from tokenenv.rewards import (
    Clipped,
    PositionScaled,
    RewardTerm,
    Rule,
    Scaled,
    TokenRule,
    progressive,
)
from tokenenv.rewards.designs import make_terms
from tokenenv.rewards.seen import FinishedTexts, RunningTexts


def worth(prompt, response):
    """A number that every token of the response and the prompt change."""
    return 0.1 * len(prompt) + sum(((i + 3) * token) % 11 for i, token in enumerate(response)) / 7


def vowels(prompt, response):
    return sum(map(response.count, "aeiou")) - 0.1 * len(prompt + response)


def returns(value):
    def function(prompt, response):
        return value

    return function


class Judge:
    def __call__(self, prompt, response):
        return None

    def verdict(self, prompt, response):
        return None


def one_text(length=3):
    ids = [np.array([7, *range(5, 5 + length)])]
    return FinishedTexts(
        tokens=torch.tensor(np.stack(ids)),
        length=np.array([1 + length]),
        prompt_length=np.array([1]),
        prefix_length=np.array([0]),
        score=None,
        ids=ids,
    )


def paid_to(rule, texts):
    return rule.numbers(texts, torch.device("cpu")).tolist()


# ------------------------------------------------------- what a rule returns


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (2, 2.0),
        (-0.5, -0.5),
        (True, 1.0),
        (np.float16(0.5), 0.5),
        (Fraction(1, 2), 0.5),
        (np.int64(3), 3.0),
        (np.bool_(True), 1.0),
        (np.array(0.25), 0.25),
        (torch.tensor([[4.0]], requires_grad=True), 4.0),
    ],
)
def test_numbers_of_every_kind_are_taken(value, number):
    assert paid_to(Rule(returns(value), on="tokens"), one_text()) == [number]
    placed = TokenRule(returns([value] * 3), on="tokens").place(one_text(), 4)
    assert placed.tolist() == [[number] * 3 + [0.0]]


@pytest.mark.parametrize(
    "value",
    [
        None,
        "0.5",
        np.str_("2"),
        float("nan"),
        -np.inf,
        1e39,
        10**400,
        1j,
        [1.0],
        np.ones(2),
        np.float32("nan"),
    ],
    ids=str,
)
def test_what_is_no_number_is_named_with_the_function_and_the_text(value):
    message = r"the rule 'function' returned .* for the response \[5, 6, 7\]; it must return"
    with pytest.raises(InvalidArgument, match=message) as error:
        paid_to(Rule(returns(value), on="tokens"), one_text())
    assert repr(value)[:20] in str(error.value)
    with pytest.raises(InvalidArgument, match=message):
        TokenRule(returns([0.0, value, 0.0]), on="tokens").place(one_text(), 4)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (functools.partial(functools.partial(returns, 1), value=2), "returns"),
        (Judge(), "Judge"),
        (Judge().verdict, "verdict"),
    ],
)
def test_functions_of_every_kind_have_a_name(function, name):
    with pytest.raises((InvalidArgument, TypeError)) as error:
        paid_to(Rule(function, on="tokens"), one_text())
    if name != "returns":
        assert f"the rule {name!r} returned None" in str(error.value)


def test_a_long_text_is_shortened():
    with pytest.raises(InvalidArgument) as error:
        paid_to(Rule(returns(None), on="tokens"), one_text(400))
    assert "for the response [5, 6, 7," in str(error.value)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("value", [[1.0], [1.0] * 4, 1.0, None])
def test_a_token_rule_returns_one_number_a_token(value):
    message = r"the rule 'function' returned .* for the response \[5, 6, 7\]; it must return 3"
    with pytest.raises(InvalidArgument, match=message):
        TokenRule(returns(value), on="tokens").place(one_text(), 4)


@pytest.mark.parametrize("function", [3, "vowels", Judge])
def test_what_is_no_function_is_refused_when_the_rule_is_made(function):
    with pytest.raises(
        InvalidArgument, match=r"Rule takes a function of \(prompt, response\), not"
    ):
        Rule(function)


# ------------------------------------------------------ what a rule asks for


def swapped(response, prompt):
    return 0.0


def of_messages(messages, response):
    return 0.0


def of_turns(prompt, turns):
    return 0.0


def by_place(prompt, response, answer, /):
    return 0.0


@pytest.mark.parametrize(
    "function",
    [lambda: 0, lambda response: 0, swapped, of_messages, of_turns, by_place, len],
)
@pytest.mark.parametrize("kind", [Rule, TokenRule, make_terms])
def test_a_function_that_does_not_take_prompt_and_response_is_refused_at_once(function, kind):
    message = r"has the parameters \(.*\); it must take prompt and response, in this order"
    with pytest.raises(InvalidArgument, match=message):
        kind(function)


@pytest.mark.parametrize(
    "function",
    [
        max,  # without a signature
        lambda *texts: 0,
        lambda prompt, *rest: 0,
        lambda prompt, response, scale=1, **row: 0,
        functools.partial(lambda rest, prompt, response: 0, "first"),
        Judge(),
        Judge().verdict,
    ],
)
def test_functions_of_every_kind_are_taken(function):
    assert Rule(function).columns == ()
    assert Rule(lambda p, r, answer, messages, level=0, *, key: 0).columns == ("answer", "key")


def two_texts():
    ids = [np.array([7, 5]), np.array([7, 8, 9])]
    lengths = {"length": np.array([2, 3]), "prompt_length": np.array([1, 1])}
    padded = torch.tensor([[7, 5, 0], [7, 8, 9]])
    return FinishedTexts(
        tokens=padded, ids=ids, prefix_length=np.array([0, 0]), score=None, **lengths
    )


@pytest.mark.parametrize("values", [[1, 2.5], (1, 2.5), np.array([1, 2.5]), torch.tensor([1, 2.5])])
def test_a_batched_rule_returns_a_list_of_numbers(values):
    asked = []

    def function(prompts, responses):
        asked.append((prompts, responses))
        return values

    assert paid_to(Rule(function, "tokens", batched=True), two_texts()) == [1.0, 2.5]
    assert asked == [([[7], [7]], [[5], [8, 9]])]
    each = TokenRule(lambda ps, rs: rs, "tokens", batched=True).place(two_texts(), 3)
    assert each.tolist() == [[5.0, 0.0, 0.0], [8.0, 9.0, 0.0]]


@pytest.mark.parametrize(
    "values", [[1.0], [1.0] * 3, 1.0, None, "12", {1: 2, 3: 4}, {1, 2}, np.array(1.0), iter([1, 2])]
)
def test_a_batched_rule_returns_one_number_a_text(values):
    message = r"the rule 'function' returned .* for 2 texts; it must return 2, one for each text"
    with pytest.raises(InvalidArgument, match=message):
        paid_to(Rule(returns(values), "tokens", batched=True), two_texts())


def test_what_a_batched_rule_returns_is_named_with_its_own_text():
    with pytest.raises(InvalidArgument, match=r"returned nan for the response \[8, 9\]; it must"):
        paid_to(Rule(returns([1.0, float("nan")]), "tokens", batched=True), two_texts())
    with pytest.raises(
        InvalidArgument, match=r"returned 2 numbers for the response \[5\]; .* 1, one"
    ):
        TokenRule(returns([[1, 2], [3, 4]]), "tokens", batched=True).place(two_texts(), 3)


# ---------------------------------------------------- wherever a design goes


def test_a_plain_function_is_a_rule_anywhere_a_design_is():
    assert [type(term) for term in make_terms(vowels).values()] == [Rule]
    terms = make_terms({"a": vowels, "b": (vowels, 0.5), "c": {"d": vowels}, "e": "token"})
    assert list(terms) == ["a", "b", "c.d", "e"]
    assert [type(terms[name]).__name__ for name in ("a", "b", "c.d")] == ["Rule"] * 3
    assert terms["b"].weight == 0.5
    assert type(Scaled(vowels).term) is Rule
    assert list(make_terms(progressive(vowels, "delta"))) == ["rule", "delta"]
    assert make_terms(Judge())["rule"].function.__class__ is Judge


def test_an_env_pays_a_plain_function_at_the_end():
    envs = make_vec(4, "SameStep", reward=vowels, kl="none")
    assert (
        envs.unwrapped.identity
        == make_vec(4, "SameStep", reward=Rule(vowels), kl="none").unwrapped.identity
    )
    for episode in play(envs, steps=20):
        whole, start = (
            tokenizer().decode(ids, skip_special_tokens=True)
            for ids in (episode.prompt + episode.response, episode.prompt)
        )
        assert whole.startswith(start)
        assert not np.any(episode.rewards[:-1])
        np.testing.assert_allclose(
            episode.rewards[-1], vowels(start, whole[len(start) :]), rtol=1e-6
        )


# ------------------------------------------------------------ the dense form


def dense(**options):
    return Rule(worth, on="tokens", dense=True, **options)


def expected(prompt, response, start=0):
    numbers = [worth(prompt, response[:t]) for t in range(start, len(response) + 1)]
    return np.diff(numbers)


@pytest.mark.parametrize("on", ["text", "tokens"])
def test_each_token_is_paid_what_it_changes_and_stepping_equals_scoring(on):
    function = vowels if on == "text" else worth
    envs = make_vec(4, "SameStep", reward=Rule(function, on, dense=True), kl="none")
    plain = make_vec(4, "SameStep", reward=Rule(function, on), kl="none")
    episodes = play(envs, steps=30)
    texts = [e.prompt for e in episodes], [e.response for e in episodes]
    scores, whole = (each.unwrapped.score_episodes(*texts) for each in (envs, plain))
    for row, episode in enumerate(episodes):
        paid = episode.padded(episode.rewards, T)
        np.testing.assert_allclose(scores.step_rewards[row], paid, atol=1e-6)
        np.testing.assert_allclose(scores.token_rewards[row], paid, atol=1e-6)
        if on == "tokens":
            changes = expected(episode.prompt, episode.response)
            np.testing.assert_allclose(episode.rewards, changes, atol=1e-6)
            empty = worth(episode.prompt, [])
        else:
            empty = vowels(tokenizer().decode(episode.prompt, skip_special_tokens=True), "")
        total = whole.token_rewards[row].sum()
        np.testing.assert_allclose(sum(episode.rewards), total - empty, atol=1e-5)
        assert np.count_nonzero(episode.rewards) > 1 or len(episode.rewards) < 4


def test_the_function_is_called_once_a_token_and_once_where_a_text_begins():
    calls = []

    def counted(prompt, response):
        calls.append(len(response))
        return 0.0

    envs = make_vec(3, "Disabled", reward=Rule(counted, "tokens", dense=True), stops=())
    envs.reset(seed=0)
    for _ in range(T):
        envs.step(np.full(3, 20))
    assert sorted(calls) == sorted([*range(T + 1)] * 3)
    calls.clear()
    envs.unwrapped.score_episodes([[5], [6, 6]], [[8, 8, 8], [9] * T], truncated=[True, True])
    assert sorted(calls) == sorted([*range(4), *range(T + 1)])


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
@pytest.mark.parametrize("array", ["numpy", "torch"])
def test_rows_are_paid_for_their_own_texts_in_every_autoreset_mode(mode, array):
    options = {"reward": dense(), "kl": "none", "array": array, "group_size": 2}
    envs, rng = make_vec(4, mode, **options), np.random.default_rng(0)
    envs.reset(seed=0)
    ended, seen = np.zeros(4, bool), 0
    for _ in range(30):
        if mode.value == "Disabled" and ended.any():
            envs.reset(options={"reset_mask": ended})
        lost = ended & (mode.value == "NextStep")
        prompts, before = prompts_of(envs), envs.unwrapped.responses()
        actions = random_actions(rng, envs)
        _, rewards, terminated, truncated, _ = envs.step(
            torch.tensor(actions) if array == "torch" else actions
        )
        for row in range(4):
            now = [*before[row], int(actions[row])]
            change = 0.0 if lost[row] else expected(prompts[row], now, len(before[row]))[0]
            np.testing.assert_allclose(float(rewards[row]), change, atol=1e-6)
            seen += change != 0
        ended = np.asarray(terminated | truncated)
    assert seen > 60


def prompts_of(envs):
    texts = envs.unwrapped._texts
    return [
        ids[:length].tolist() for ids, length in zip(texts.tokens, texts.prompt_length, strict=True)
    ]


def test_a_prefix_earns_nothing_and_is_read():
    envs = make_vec(3, "SameStep", reward=dense(), kl="none")
    prefixes = [[20, 21], None, [22]]
    _, info = envs.reset(seed=0, options={"prefixes": prefixes})
    prompts = prompts_of(envs)
    np.testing.assert_allclose(
        info["potential"],
        [worth(p, prefix or []) for p, prefix in zip(prompts, prefixes, strict=True)],
        rtol=1e-6,
    )
    _, rewards, *_ = envs.step(np.array([30, 31, 32]))
    for row, (prompt, prefix) in enumerate(zip(prompts, prefixes, strict=True)):
        start = prefix or []
        change = expected(prompt, [*start, 30 + row], len(start))
        np.testing.assert_allclose(rewards[row], change[0], atol=1e-6)


def test_forked_and_loaded_texts_go_on_with_the_number_they_had():
    envs, rng = make_vec(4, "Disabled", reward=dense(), kl="none"), np.random.default_rng(0)
    envs.reset(seed=0)
    for _ in range(2):
        envs.step(random_actions(rng, envs, stop=0.0))
    envs.unwrapped.fork([0, 1], [1, 2])
    other = make_vec(4, "Disabled", reward=dense(), kl="none")
    other.unwrapped.load_state(envs.unwrapped.save_state())
    for each in (envs, other):
        prompts, before = prompts_of(each), each.unwrapped.responses()
        _, rewards, *_ = each.step(np.arange(30, 34))
        for row in range(4):
            change = expected(prompts[row], [*before[row], 30 + row], len(before[row]))
            np.testing.assert_allclose(rewards[row], change[0], atol=1e-6)


def test_an_unscored_truncation_keeps_the_potential_and_a_scored_end_does_not():
    assert not dense().pays_score
    for score_truncated in (False, True):
        options = {"score_truncated": score_truncated, "stops": (7,)}
        envs = make_vec(2, "Disabled", reward=dense(), kl="none", **options)
        envs.reset(seed=0)
        prompts = prompts_of(envs)
        total = np.zeros(2)
        for t in range(T):
            actions = np.array([20, 7 if t == T - 1 else 21])
            _, rewards, _, truncated, info = envs.step(actions)
            total += rewards
        responses = envs.unwrapped.responses()
        numbers = [worth(p, r) for p, r in zip(prompts, responses, strict=True)]
        begun = [worth(p, []) for p in prompts]
        np.testing.assert_allclose(total, np.subtract(numbers, begun), atol=1e-5)
        kept = numbers[0] if not score_truncated else 0.0
        np.testing.assert_allclose(info["potential"], [kept, 0.0], rtol=1e-6)
        assert truncated.tolist() == [not score_truncated, False]


def test_at_an_unscored_truncation_the_rule_itself_pays_nothing():
    options = {"score_truncated": False, "stops": (), "kl": "none"}
    envs = make_vec(2, "SameStep", reward=Rule(worth, on="tokens"), **options)
    assert not any(np.any(episode.rewards) for episode in play(envs, steps=2 * T))


def test_the_critic_takes_the_dense_forms_potential():
    from tokenenv.agents import PPO

    envs = make_vec(2, "SameStep", reward=dense())
    agent = PPO(envs, batch_tokens=8, critic_offset="potential").learn(16)
    assert agent.updates >= 1


TOKENS = TokenRule(lambda prompt, response: response, on="tokens")
WRAPPED = {
    "scaled": lambda: Scaled(dense()),
    "clipped": lambda: Clipped(dense(), -0.2, 0.2),
    "by position": lambda: Scaled(PositionScaled(dense())),
    "fading": lambda: progressive(Rule(worth, on="tokens"), Scaled("delta"), tokens=50),
    "mixed": lambda: {"a": (dense(), 0.3), "b": (Rule(vowels, dense=True), 0.5), "c": "uniform"},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_it_wraps_mixes_and_is_loaded_as_any_other_term(name):
    envs, other = (make_vec(4, "SameStep", reward=WRAPPED[name](), kl="none") for _ in range(2))
    rng = np.random.default_rng(1)
    envs.reset(seed=3)
    for _ in range(9):
        envs.step(random_actions(rng, envs))
    other.unwrapped.load_state(envs.unwrapped.save_state())
    for _ in range(12):
        actions = random_actions(rng, envs)
        assert_equal(
            *(copied(dict(enumerate(env.step(actions)))) for env in (envs, other)), tolerance=2e-5
        )


def test_the_clipped_form_clips_each_change():
    envs = make_vec(4, "SameStep", reward=Clipped(dense(), -0.2, 0.2), kl="none")
    for episode in play(envs, steps=20):
        changes = expected(episode.prompt, episode.response).clip(-0.2, 0.2)
        np.testing.assert_allclose(episode.rewards, changes, atol=1e-6)


def test_functions_and_their_dense_forms_are_watched_as_terms_are():
    watched = {"end": lambda p, r: float(len(r)), "dense": Scaled(dense()), "each": TOKENS}
    envs = make_vec(4, "SameStep", reward="token", kl="none", watch=watched, gold=False)
    for episode in play(envs, steps=20):
        seen, count = episode.infos[-1]["token_watched"], len(episode.response)
        assert not seen["end"][: count - 1].any()
        np.testing.assert_array_equal(seen["each"][:count], episode.response)
        changes = expected(episode.prompt, episode.response)
        scale = np.abs(changes).sum() / np.abs(seen["dense"]).sum()
        np.testing.assert_allclose(seen["dense"][:count] * scale, changes, atol=1e-4)


def test_a_function_that_raises_leaves_an_env_that_begins_anew():
    fails = [False]

    def sometimes(prompt, response):
        if fails[0]:
            raise RuntimeError("the judge is out")
        return worth(prompt, response)

    envs = make_vec(2, "SameStep", reward=Rule(sometimes, "tokens", dense=True), kl="none")
    envs.reset(seed=0)
    envs.step(np.array([20, 21]))
    fails[0] = True
    with pytest.raises(RuntimeError, match="the judge is out"):
        envs.step(np.array([22, 23]))
    fails[0] = False
    envs.reset(seed=0)
    prompts = prompts_of(envs)
    _, rewards, *_ = envs.step(np.array([22, 23]))
    changes = [expected(prompt, [22 + row])[0] for row, prompt in enumerate(prompts)]
    np.testing.assert_allclose(rewards, changes, atol=1e-6)


# ------------------------------------------------- the texts that terms read


class Reader(RewardTerm):
    """Pays nothing; keeps the texts of the last batch."""

    name = "reader"
    read = None

    def reward(self, batch):
        self.read = [
            states.texts.prompt_and_response_ids() for states in (batch.before, batch.after)
        ]
        return torch.zeros(len(batch.tokens))


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_a_term_reads_the_texts_before_and_after_each_token(copy_of):
    # A task's gold metric is a lambda here, which cannot be pickled.
    envs = make_vec(3, "SameStep", reward=Reader(), kl="none", gold=False)
    rng = np.random.default_rng(0)
    envs.reset(seed=0)
    for step in range(25):
        if step == 10:
            envs = copy_of(envs)
        if step == 15:
            envs.unwrapped.fork([0], [2])
        prompts, before = prompts_of(envs), envs.unwrapped.responses()
        actions = random_actions(rng, envs)
        envs.step(actions)
        read = envs.unwrapped._engine.rewards.terms["reader"].read
        now = [[*r, int(a)] for r, a in zip(before, actions, strict=True)]
        assert read[0] == list(zip(prompts, before, strict=True))
        assert read[1] == list(zip(prompts, now, strict=True))


def test_chosen_texts_are_those_of_a_mask_or_of_numbers():
    ids = np.array([[1, 2, 3, 0], [4, 5, 6, 7]])
    texts = RunningTexts(ids, np.array([1, 0, 1]), np.array([1, 2, 1]), np.array([2, 3, 4]))
    whole = [([4], [5]), ([1, 2], [3]), ([4], [5, 6, 7])]
    assert texts.prompt_and_response_ids() == whole
    assert texts.at(torch.tensor([True, False, True])).prompt_and_response_ids() == whole[::2]
    assert texts.at(torch.tensor([2, 1])).prompt_and_response_ids() == [whole[2], whole[1]]


def test_special_tokens_are_no_text():
    """A stop token is no word, so it changes nothing in the text that a rule reads."""
    seen = []

    def noted(prompt, response):
        seen.append((prompt, response))
        return len(response)

    envs = make_vec(1, "SameStep", reward=Rule(noted, dense=True), kl="none")
    envs.reset(seed=0)
    prompt = tokenizer().decode(prompts_of(envs)[0], skip_special_tokens=True)
    envs.step(np.array([20]))
    _, rewards, terminated, *_ = envs.step(np.array([fakes.EOS]))
    assert terminated[0]
    assert rewards[0] == 0.0
    word = tokenizer().decode([20])
    assert [p for p, _ in seen[:3]] == [prompt] * 3
    assert [r.strip() for _, r in seen[:3]] == ["", word, word]
