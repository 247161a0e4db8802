"""`ActionMask`: what may follow each text, by the reference's nucleus, a regular expression or a
grammar."""

import copy
import re
import sys
from dataclasses import replace
from typing import Any

import fakes
import gymnasium as gym
import numpy as np
import pytest
import tasks
import torch
from gymnasium.vector import AutoresetMode
from tasks import MODES, STOPS, TOYS, T, assert_equal, copied, make_vec

from tokenenv.agents import PPO
from tokenenv.check import check_vector_env
from tokenenv.errors import FinishedRow, InvalidAction, InvalidArgument, MissingDependency, NotReset
from tokenenv.turns import Reply
from tokenenv.wrappers.action_spaces import ActionMask, TopKActions, nucleus

V, N = fakes.VOCAB_SIZE, 4
NEXT_STEP, SAME_STEP, DISABLED = (
    AutoresetMode.NEXT_STEP,
    AutoresetMode.SAME_STEP,
    AutoresetMode.DISABLED,
)
SENTENCE = "(the|a) (cat|dog|bird) (is|was) (very )*(good|bad)"
GRAMMAR = """
start: " "? subject " " verb (" and " subject " " verb)*
subject: "the cat" | "a dog"
verb: "is" | "was"
"""
GRAMMAR_AS_REGEX = "(the cat|a dog) (is|was)( and (the cat|a dog) (is|was))*"


def wordy(mode: Any = SAME_STEP, num_envs: int = N, **options: Any) -> Any:
    """The toy env with a stop token that has no text."""
    return make_vec(num_envs, mode, stops=(fakes.EOS,), **options)


def draw(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """A token of each row's mask."""
    return np.array([rng.choice(np.flatnonzero(row)) for row in mask])


def finished_texts(envs: ActionMask, steps: int, seed: int = 0) -> list[str]:
    """The responses that ended by a stop token within some random steps of a SAME_STEP env."""
    rng, texts = np.random.default_rng(seed), []
    tokenizer = envs.unwrapped.token_spec.tokenizer
    envs.reset(seed=seed)
    for _ in range(steps):
        mask = envs.action_masks()
        assert mask.any(1).all()
        responses = envs.unwrapped.responses()
        _, _, terminated, _, _ = envs.step(draw(rng, mask))
        texts += [tokenizer.decode(responses[row]) for row in np.flatnonzero(terminated)]
    return texts


BUNDLED = {
    "Reviews-v0": "the (food|service) (was|is) (very |really )*(good|bad|great)(, but i (liked|hated) the (fish|curry))?",
    "Arithmetic-v0": "[1-9][0-9]*",
    "PyDocs-v0": "(The|A|Any) [a-z]{1,5}( [a-z]{1,5})? (is|returns) ([0-9]{1,3}|None|'[a-z]{0,3}')\\.",
}


@pytest.mark.parametrize("env_id", list(BUNDLED))
def test_every_finished_text_matches_the_expression(env_id: str) -> None:
    envs = ActionMask(
        gym.make_vec(f"tokenenv/{env_id}", num_envs=16, autoreset_mode=SAME_STEP),
        regex=BUNDLED[env_id],
    )
    texts = finished_texts(envs, 60)
    assert len(set(texts)) >= 10
    assert [
        text for text in texts if not re.fullmatch(BUNDLED[env_id], text.removeprefix(" "))
    ] == []


@pytest.mark.parametrize(
    "option", [{"regex": GRAMMAR_AS_REGEX}, {"grammar": GRAMMAR}], ids=["regex", "grammar"]
)
def test_a_grammar_says_what_the_same_expression_says(option: dict[str, str]) -> None:
    texts = finished_texts(ActionMask(wordy(max_new_tokens=12), **option), 60)
    assert len(set(texts)) >= 6
    assert [text for text in texts if not re.fullmatch(GRAMMAR_AS_REGEX, text)] == []
    grammar, regex = (
        ActionMask(wordy(), grammar=GRAMMAR),
        ActionMask(wordy(), regex=GRAMMAR_AS_REGEX),
    )
    rng = np.random.default_rng(1)
    for envs in (grammar, regex):
        envs.reset(seed=0)
    for _ in range(12):
        np.testing.assert_array_equal(grammar.action_masks(), regex.action_masks())
        actions = draw(rng, grammar.action_masks())
        grammar.step(actions)
        regex.step(actions)


def test_the_first_words_are_exactly_those_of_the_expression() -> None:
    envs = ActionMask(wordy(), regex=SENTENCE)
    envs.reset(seed=0)
    words = envs.unwrapped.token_spec.tokenizer.convert_ids_to_tokens
    assert [set(words(np.flatnonzero(row).tolist())) for row in envs.action_masks()] == [
        {"the", "a"}
    ] * N
    envs.step(np.array([row.argmax() for row in envs.action_masks()]))
    assert [set(words(np.flatnonzero(row).tolist())) for row in envs.action_masks()] == [
        {"cat", "dog", "bird"}
    ] * N


def test_a_stop_token_is_allowed_exactly_where_the_text_matches() -> None:
    envs = ActionMask(make_vec(N, SAME_STEP), regex=SENTENCE)
    rng, tokenizer, seen = np.random.default_rng(0), envs.unwrapped.token_spec.tokenizer, 0
    envs.reset(seed=0)
    for _ in range(40):
        mask, responses = envs.action_masks(), envs.unwrapped.responses()
        for row, response in zip(mask, responses, strict=True):
            matches = bool(re.fullmatch(SENTENCE, tokenizer.decode(response)))
            assert set(row[list(STOPS)]) == {matches}
            seen += matches
        envs.step(draw(rng, mask))
    assert seen >= N


def test_a_word_that_is_the_beginning_of_another_does_not_lead_astray() -> None:
    """The tokens "a" and "an" both begin "an old": one of them leads nowhere, as tokens are
    words."""
    envs = ActionMask(wordy(), regex="an (old|on) (cat|film)")
    envs.reset(seed=0)
    words = envs.unwrapped.token_spec.tokenizer.convert_ids_to_tokens
    assert words(np.flatnonzero(envs.action_masks()[0]).tolist()) == ["an"]
    assert set(finished_texts(envs, 30)) == {
        f"an {middle} {end}" for middle in ("old", "on") for end in ("cat", "film")
    }


def test_where_no_token_goes_on_to_a_match_the_text_ends() -> None:
    envs = ActionMask(make_vec(N, SAME_STEP), regex="zebra")
    envs.reset(seed=0)
    assert [np.flatnonzero(row).tolist() for row in envs.action_masks()] == [sorted(STOPS)] * N
    envs = ActionMask(wordy(), regex="the cat")
    envs.reset(seed=0, options={"prefixes": ["the dog", "the", None, "the cat"]})
    assert [np.flatnonzero(row).tolist() == [fakes.EOS] for row in envs.action_masks()] == [
        True,
        False,
        False,
        True,
    ]


# ------------------------------------------------------------------------------------------------------- the nucleus


def naive_nucleus(logprobs: np.ndarray, top_p: float) -> np.ndarray:
    """Token by token, in double precision."""
    kept = np.zeros(len(logprobs), bool)
    total = 0.0
    for token in sorted(range(len(logprobs)), key=lambda i: (-logprobs[i], i)):
        if total >= top_p:
            break
        kept[token] = True
        total += float(np.exp(np.float64(logprobs[token])))
    return kept


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("env_id", ["Reviews-v0", "Negation-v0"])
def test_the_nucleus_is_a_naive_one(env_id: str, top_p: float) -> None:
    envs = ActionMask(
        gym.make_vec(f"tokenenv/{env_id}", num_envs=8, autoreset_mode=SAME_STEP), top_p=top_p
    )
    rng = np.random.default_rng(0)
    envs.reset(seed=0)
    for _ in range(20):
        naive = np.stack([naive_nucleus(row, top_p) for row in envs.unwrapped.ref_logprobs()])
        np.testing.assert_array_equal(envs.action_masks(), naive)
        envs.step(draw(rng, naive))


def test_the_nucleus_of_equal_tokens_is_the_first_of_them() -> None:
    kept = nucleus(torch.log(torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.1, 0.2, 0.3, 0.4]])), 0.5)
    assert kept.tolist() == [[True, True, False, False], [False, False, True, True]]


def test_ref_logprobs_are_of_the_text_as_it_stands() -> None:
    envs = make_vec(N, SAME_STEP)
    obs, _ = envs.reset(seed=0)
    for _ in range(9):
        logprobs = envs.unwrapped.ref_logprobs()
        for row, (tokens, length) in enumerate(zip(obs["tokens"], obs["length"], strict=True)):
            with torch.no_grad():
                logits = envs.unwrapped.reference(
                    input_ids=torch.as_tensor(tokens[:length])[None]
                ).logits[0, -1]
            np.testing.assert_allclose(logprobs[row], torch.log_softmax(logits, -1), atol=1e-5)
        obs, _, _, _, info = envs.step(actions := np.arange(20, 20 + N))
        np.testing.assert_allclose(logprobs[np.arange(N), actions], info["ref_logprob"], atol=1e-6)


def test_the_nucleus_and_an_expression_intersect_and_the_expression_wins() -> None:
    both, expression = (
        ActionMask(wordy(), regex=SENTENCE, top_p=0.5),
        ActionMask(wordy(), regex=SENTENCE),
    )
    rng, won = np.random.default_rng(0), []
    for envs in (both, expression):
        envs.reset(seed=0)
    for _ in range(30):
        logprobs = both.unwrapped.ref_logprobs()
        for mask, allowed, row in zip(
            both.action_masks(), expression.action_masks(), logprobs, strict=True
        ):
            meet = allowed & naive_nucleus(row, 0.5)
            won.append(not meet.any())
            np.testing.assert_array_equal(mask, allowed if won[-1] else meet)
        actions = draw(rng, both.action_masks())
        both.step(actions)
        expression.step(actions)
    assert 10 <= sum(won) <= len(won) - 10


# ---------------------------------------------------------------------------------------------
# keeping up with the env


def fresh_masks(envs: ActionMask, **options: Any) -> np.ndarray:
    """The masks of these texts, read from their start by another env."""
    saved = envs.unwrapped.save_state()["texts"]
    rows = zip(saved["tokens"], saved["prompt_length"], saved["length"], strict=True)
    parts = [(tokens[:start].tolist(), tokens[start:end].tolist()) for tokens, start, end in rows]
    other = ActionMask(wordy(), **options)
    other.reset(
        options={
            "prompts": [prompt for prompt, _ in parts],
            "prefixes": [response for _, response in parts],
        }
    )
    return other.action_masks()


@pytest.mark.parametrize(
    "options", [{"regex": SENTENCE}, {"top_p": 0.7, "grammar": GRAMMAR}], ids=["regex", "both"]
)
def test_masks_are_of_the_text_alone_however_it_came_about(options: dict[str, Any]) -> None:
    envs, rng = ActionMask(wordy(DISABLED), **options), np.random.default_rng(2)

    def check(obs: Any) -> None:
        np.testing.assert_array_equal(envs.action_masks(), fresh_masks(envs, **options))
        np.testing.assert_array_equal(obs["action_mask"], envs.action_masks())

    check(envs.reset(seed=1)[0])
    check(envs.step(draw(rng, envs.action_masks()))[0])
    saved = envs.unwrapped.save_state()
    check(envs.step(draw(rng, envs.action_masks()))[0])
    check(envs.fork([0, 1], [2, 3])[0])
    check(envs.step(draw(rng, envs.action_masks()))[0])
    check(envs.reset(options={"reset_mask": np.arange(N) % 2 == 0})[0])
    check(envs.load_state(saved)[0])
    check(envs.step(draw(rng, envs.action_masks()))[0])
    check(envs.reset(options={"prefixes": ["the cat", None, "a dog is", "a"]})[0])


def test_another_text_of_the_same_length_or_one_longer_is_read_from_its_start() -> None:
    envs = ActionMask(wordy(num_envs=1), regex="the cat is|a dog was")
    words = envs.unwrapped.token_spec.tokenizer.convert_ids_to_tokens
    for prefix, following in (
        ("the", "cat"),
        ("a", "dog"),
        ("the cat", "is"),
        ("a dog", "was"),
        ("the", "cat"),
    ):
        envs.reset(options={"prefixes": [prefix]})
        assert words(np.flatnonzero(envs.action_masks()[0]).tolist()) == [following]


def test_masks_follow_texts_that_begin_anew() -> None:
    envs, rng, ends = ActionMask(wordy(), regex=SENTENCE), np.random.default_rng(3), 0
    envs.reset(seed=1)
    for _ in range(15):
        _, _, terminated, truncated, _ = envs.step(draw(rng, envs.action_masks()))
        np.testing.assert_array_equal(envs.action_masks(), fresh_masks(envs, regex=SENTENCE))
        ends += (terminated | truncated).sum()
    assert ends >= N


@pytest.mark.parametrize("observation", ["tokens", "features"])
@pytest.mark.parametrize("array", ["numpy", "torch"])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
def test_the_env_beneath_is_unchanged(mode: AutoresetMode, array: str, observation: str) -> None:
    options = {**TOYS["mixture"], "array": array, "observation": observation}
    envs, plain = (
        ActionMask(make_vec(N, mode, **options), regex=SENTENCE, top_p=0.9),
        make_vec(N, mode, **options),
    )
    rng, obs, ends = np.random.default_rng(0), envs.reset(seed=3)[0], 0
    _ = plain.reset(seed=3)
    for _ in range(2 * T):
        if observation == "tokens":
            assert isinstance(obs["action_mask"], torch.Tensor) == (array == "torch")
            assert envs.observation_space.contains(copied(obs))
            np.testing.assert_array_equal(copied(obs["action_mask"]), envs.action_masks())
        actions = draw(rng, envs.action_masks())
        mine, theirs = (
            one.step(torch.as_tensor(actions) if array == "torch" else actions)
            for one in (envs, plain)
        )
        assert_equal(without_mask(copied(mine[0])), copied(theirs[0]))
        assert_equal(
            dict(enumerate(map(copied, mine[1:4]))), dict(enumerate(map(copied, theirs[1:4])))
        )
        final = (
            without_mask(copied(mine[4].get("final_obs", {}))),
            copied(theirs[4].get("final_obs", {})),
        )
        assert_equal(*final)
        obs, ended = mine[0], copied(theirs[2]) | copied(theirs[3])
        ends += ended.sum()
        if mode == DISABLED and ended.any():
            obs, _ = envs.reset(options={"reset_mask": ended})
            plain.reset(options={"reset_mask": ended})
    assert ends >= N


def without_mask(obs: Any) -> Any:
    return (
        {key: value for key, value in obs.items() if key != "action_mask"}
        if isinstance(obs, dict)
        else obs
    )


def test_the_mask_at_the_end_of_a_text_allows_everything() -> None:
    envs = ActionMask(wordy(), regex=SENTENCE)
    envs.reset(seed=0)
    rng, infos = np.random.default_rng(0), {}
    while "final_obs" not in infos:
        *_, infos = envs.step(draw(rng, envs.action_masks()))
    assert envs.observation_space.contains(infos["final_obs"])
    assert infos["final_obs"]["action_mask"].all()


def test_returned_masks_are_the_callers_own() -> None:
    envs = ActionMask(wordy(), regex=SENTENCE)
    obs, _ = envs.reset(seed=0)
    expected = envs.action_masks()
    envs.action_masks()[:] = True
    obs["action_mask"][:] = 1
    np.testing.assert_array_equal(envs.action_masks(), expected)
    with pytest.raises(InvalidAction):
        envs.step(np.full(N, fakes.UNK))


# -------------------------------------------------------------------------------------------------------------- errors


def test_a_masked_token_is_an_error_and_changes_nothing() -> None:
    envs = ActionMask(wordy(), regex=SENTENCE)
    with pytest.raises(NotReset):
        envs.step(np.full(N, 5))
    envs.reset(seed=0)
    saved, good = envs.unwrapped.save_state(), draw(np.random.default_rng(0), envs.action_masks())
    bad = good.copy()
    bad[2] = np.flatnonzero(~envs.action_masks()[2])[5]
    with pytest.raises(
        InvalidAction, match=rf"actions\[2\]={bad[2]} is ruled out by the action mask"
    ):
        envs.step(bad)
    assert_equal(copied(envs.unwrapped.save_state()["texts"]), copied(saved["texts"]))
    with pytest.raises(InvalidAction, match=rf"actions\[1\]={V} is no token id"):
        envs.step(np.where(np.arange(N) == 1, V, good))
    with pytest.raises(InvalidAction, match="has shape"):
        envs.step(good[:-1])
    envs.step(good)


def test_rows_that_wait_for_their_reset_take_any_token_and_no_others_do() -> None:
    for mode in (NEXT_STEP, DISABLED):
        envs = ActionMask(wordy(mode), regex="(very )*good")
        envs.reset(seed=0, options={"prefixes": [None, "good", None, None]})
        good, very = envs.unwrapped.token_spec.tokenizer.convert_tokens_to_ids(["good", "very"])
        envs.step(np.array([good, fakes.EOS, very, very]))
        with pytest.raises(InvalidAction, match=r"actions\[0\]"):
            envs.step(np.array([very, fakes.UNK, good, good]))
        if mode == DISABLED:
            with pytest.raises(FinishedRow):
                envs.step(np.array([fakes.EOS, fakes.UNK, good, good]))
        # A reset by the caller, rather than by NEXT_STEP: the row's own mask counts again.
        envs.reset(options={"reset_mask": np.arange(N) == 1})
        with pytest.raises(InvalidAction, match=r"actions\[1\]"):
            envs.step(np.array([fakes.EOS, fakes.UNK, good, good]))
        obs = envs.step(np.array([fakes.EOS, very, good, good]))[0]
        assert obs["length"][1] - obs["prompt_length"][1] == 1


def test_under_kl_policy() -> None:
    envs = ActionMask(wordy(kl="policy"), regex=SENTENCE)
    envs.reset(seed=0)
    tokens = draw(np.random.default_rng(0), envs.action_masks())
    envs.step({"token": tokens, "logprob": np.full(N, -0.5, np.float32)})
    with pytest.raises(InvalidAction, match=r"actions\[0\]=2 is ruled out"):
        envs.step({"token": np.full(N, fakes.UNK), "logprob": np.full(N, -0.5, np.float32)})


def test_bad_arguments() -> None:
    envs = wordy()
    wrong: dict[str, Any] = {
        "rules nothing out; give top_p=, regex= or grammar=": {},
        "give regex= or grammar=, not both": {"regex": "a", "grammar": "start: /a/"},
        r"top_p=1.0 is not allowed; it must lie above 0 and below 1": {"top_p": 1.0},
        r"top_p=0 is not allowed": {"top_p": 0},
        r"regex='\(a' cannot be used": {"regex": "(a"},
        r"grammar='start: nothing' cannot be used": {"grammar": "start: nothing"},
    }
    for message, options in wrong.items():
        with pytest.raises(InvalidArgument, match=message):
            ActionMask(envs, **options)
    with pytest.raises(InvalidArgument, match="envs has an ActionMask already"):
        ActionMask(ActionMask(envs, top_p=0.5), regex="a")
    with pytest.raises(
        InvalidArgument, match="a task whose tokens have text, and that has a stop token"
    ):
        ActionMask(make_vec(N, stops=()), regex="a")
    ActionMask(make_vec(N, stops=()), top_p=0.5).reset()


def test_without_llguidance_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingDependency, match=r"needs llguidance: pip install llguidance$"):
        ActionMask(wordy(), regex="a")
    ActionMask(wordy(), top_p=0.5)


# -------------------------------------------------------------------------------------------------------------- agents


def test_ppo_learns_from_texts_that_match() -> None:
    regex = BUNDLED["Reviews-v0"]
    envs = ActionMask(
        gym.make_vec("tokenenv/Reviews-v0", num_envs=16, autoreset_mode=SAME_STEP),
        regex=regex,
        top_p=0.99,
    )
    agent, episodes = PPO(envs, batch_tokens=300), []
    agent.learn(600, on_update=lambda metrics, batch: episodes.extend(batch))
    ended = [e for e in episodes if e.terminated]
    assert len(ended) >= 20
    decode = envs.unwrapped.token_spec.tokenizer.decode
    assert [
        e for e in ended if not re.fullmatch(regex, decode(e.response, skip_special_tokens=True))
    ] == []
    assert agent.updates >= 1


@pytest.mark.parametrize("options", [{"regex": SENTENCE}, {"top_p": 0.5}], ids=["regex", "nucleus"])
def test_masks_keep_up_with_what_happens_beneath_and_with_what_was_interrupted(
    options: dict[str, Any],
) -> None:
    """A step that was taken and whose masks were not made; a fork and a state of the env itself; a
    wrapper made late."""
    envs, twin = (ActionMask(wordy(), **options) for _ in range(2))
    rng = np.random.default_rng(0)
    for one in (envs, twin):
        one.reset(seed=0)
    stopped = 0
    for at in range(14):
        tokens, core, before = (
            draw(rng, twin.action_masks()),
            envs.unwrapped,
            envs.unwrapped.changes,
        )
        twin.step(tokens)
        calls: list[str] = []

        def stop(frame: Any, event: str, argument: Any) -> None:
            """At the at-th call of the wrapper's own after the env has taken the tokens."""
            done = core.changes > before and core._interrupted is None  # noqa: B023
            ours = frame.f_code.co_name in (
                "_masked",
                "_keep_up",
                "_allowed",
                "follow",
                "allowed",
                "_fitting",
                "nucleus",
            )
            if event == "call" and done and ours:
                calls.append(frame.f_code.co_name)  # noqa: B023
                if len(calls) > at:  # noqa: B023
                    raise KeyboardInterrupt

        try:
            sys.setprofile(stop)
            envs.step(tokens)
        except KeyboardInterrupt:
            stopped += 1
        finally:
            sys.setprofile(None)
        np.testing.assert_array_equal(envs.action_masks(), twin.action_masks())
    assert stopped > 2
    envs.unwrapped.fork([0], [2])
    twin.fork([0], [2])
    np.testing.assert_array_equal(envs.action_masks(), twin.action_masks())
    np.testing.assert_array_equal(
        ActionMask(envs.env, **options).action_masks(), twin.action_masks()
    )


# ------------------------------------------------- texts that others write into

TURN = "(the|a) (cat|dog)( is (good|bad))?"
ASK = 9
"""A token that ends a turn: one that has a text, or, by `asking`, one that has none."""


def asking(*, textless: bool = True) -> Any:
    """A task whose environment answers with what no turn matches, and pays alone now and then."""
    toy = tasks.toy(stops=(fakes.EOS,), turns="fixed", max_new_tokens=12)
    words = copy.deepcopy(toy.tokenizer)
    if textless:
        words.add_special_tokens({"additional_special_tokens": [words.convert_ids_to_tokens(ASK)]})

    def respond(text: Any) -> Any:
        number = len(text.response) + len(text.prompt)
        return [None, Reply(), Reply([30, 31]), Reply([40], ends=text.turns_before > 1)][number % 4]

    return replace(toy, tokenizer=words, respond=respond, turn_end_token_ids=(ASK, fakes.EOS))


def turn_of(segments: Any, *ends: int) -> list[int]:
    """The policy's tokens since the environment wrote, or since one of `ends`."""
    tokens: list[int] = []
    for segment in segments:
        for token in segment.tokens:
            tokens = [] if not segment.own or token in ends else [*tokens, token]
    return tokens


@pytest.mark.parametrize("mode", MODES)
def test_an_expression_begins_anew_with_each_turn(mode: Any) -> None:
    envs = ActionMask(make_vec(N, mode, task=asking), regex=TURN)
    rng, tokenizer = np.random.default_rng(0), envs.unwrapped.token_spec.tokenizer
    obs, _ = envs.reset(seed=0)
    turns: list[str] = []
    answered = 0
    for _ in range(40):
        mask, ended = envs.action_masks(), envs.unwrapped.ended
        np.testing.assert_array_equal(obs["action_mask"], mask)
        assert obs["own_mask"].shape == obs["tokens"].shape
        for row in np.flatnonzero(~ended):
            segments = envs.unwrapped.segments()[row]
            text = tokenizer.decode(turn_of(segments, ASK, fakes.EOS))
            # What ends a turn is allowed exactly where a turn is finished.
            assert set(mask[row, [ASK, fakes.EOS]]) == {bool(re.fullmatch(TURN, text))}
            answered += len(segments) > 1 and not segments[-1].own
            turns.append(text)
        if mode == DISABLED and ended.any():
            obs, _ = envs.reset(options={"reset_mask": ended})
        else:
            obs, *_ = envs.step(draw(rng, mask))
    assert answered >= 10
    assert {"", "the", "the cat"} <= set(turns)
    assert any(re.fullmatch(TURN, turn) and " is " in turn for turn in turns)


def test_a_turn_end_that_has_a_text_is_matched_by_it() -> None:
    envs = make_vec(N, SAME_STEP, task=asking, textless=False)
    word = envs.unwrapped.token_spec.tokenizer.convert_ids_to_tokens(ASK)
    envs, rng = ActionMask(envs, regex=f"the cat {word}( is)?"), np.random.default_rng(0)
    envs.reset(seed=0)
    begun = 0
    for _ in range(30):
        mask = envs.action_masks()
        for row, segments in enumerate(envs.unwrapped.segments()):
            turn = turn_of(segments, fakes.EOS)
            assert mask[row, ASK] == (len(turn) == 2)
            begun += bool(segments) and not segments[-1].own
        envs.step(draw(rng, mask))
    assert begun >= 8


def test_slots_that_rest_take_any_choice_and_others_none_that_is_ruled_out() -> None:
    """A text that the environment ended does not show it by its last token."""
    envs = TopKActions(ActionMask(make_vec(N, NEXT_STEP, task=asking), regex=TURN), k=3)
    rng, seen = np.random.default_rng(0), 0
    envs.reset(seed=0)
    for _ in range(40):
        ended, allowed = envs.unwrapped.ended, envs.action_masks()
        picks = np.where(ended, 99, draw(rng, allowed))
        written = [bool(s) and not s[-1].own for s in envs.unwrapped.segments()]
        seen += sum(ended & written)
        envs.step(picks)
        if not ended.all():
            bad = np.where(envs.unwrapped.ended, 0, 99)
            if bad.any():
                with pytest.raises(InvalidAction, match="is no choice"):
                    envs.step(bad)
    assert seen >= 2


def test_the_mask_travels_beside_the_own_tokens() -> None:
    envs = ActionMask(make_vec(N, SAME_STEP, task=asking), regex=TURN)
    assert set(envs.single_observation_space.spaces) == {
        "tokens",
        "length",
        "prompt_length",
        "own_mask",
        "action_mask",
    }
    rng = np.random.default_rng(0)
    envs.reset(seed=0)
    for _ in range(14):
        obs, *_, infos = envs.step(draw(rng, envs.action_masks()))
        assert obs in envs.observation_space
        if "final_obs" in infos:
            assert infos["final_obs"] in envs.observation_space
    check_vector_env(make_vec(N, SAME_STEP, task=asking), steps=9)
