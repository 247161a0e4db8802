"""pi* of the automaton tasks as a language model: it says what the oracle says, whoever writes."""

import copy
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import tasks
import torch
from dialogues import NOISES, small

import tokenenv  # noqa: F401
from tokenenv.envs.automata.source import Source
from tokenenv.envs.automata.teacher import OptimalPolicy, turns_of
from tokenenv.errors import InvalidArgument
from tokenenv.models.trunks import slot_model

IDS = ("Brackets", "DelayedKey", "Dialogue", "Negation", "PlantedPhrase", "Twenty")
ANSWER = ("Dialogue", "Twenty")
T = 7
each_id = pytest.mark.parametrize("name", IDS)


def make(name: str, num_envs: int = 6, **options: Any) -> Any:
    given = {"max_new_tokens": T, "reward": "distill", "autoreset_mode": "SameStep"} | options
    return gym.make_vec(f"tokenenv/{name}-v0", num_envs=num_envs, **given)


def wanted(envs: Any, obs: Any) -> np.ndarray:
    """log pi* (N, V) by the oracle."""
    return np.log(envs.unwrapped.oracle.policy(obs, envs.unwrapped.kl_coef))


def read(teacher: Any, obs: Any) -> np.ndarray:
    """log pi* (N, V) by the teacher, which sees the texts alone."""
    tokens, lengths = torch.from_numpy(obs["tokens"]), obs["length"]
    states = teacher.states(tokens, lengths)[torch.arange(len(tokens)), lengths - 1]
    return teacher.head(states).numpy()


def play(envs: Any, steps: int, options: Any = None) -> Any:
    """Yield observations, tokens, and the infos after them. Half of the tokens are the optimum's,
    so that turns are ended and answered."""
    rng, (obs, _) = np.random.default_rng(0), envs.reset(seed=0, options=options)
    for step in range(steps):
        probs = np.exp(wanted(envs, obs))
        if step % 2:
            probs = np.full_like(probs, 1 / probs.shape[1])
        tokens = np.array([rng.choice(len(p), p=p / p.sum()) for p in probs])
        before = copy.deepcopy(obs)
        obs, *_, infos = envs.step(tokens)
        yield before, tokens, infos


@each_id
@pytest.mark.parametrize("kl_coef", [None, 0.5])
def test_its_log_probs_are_the_oracles_and_what_is_paid_follows(name: str, kl_coef: Any) -> None:
    envs = make(name, kl_coef=kl_coef)
    beta, answered = envs.unwrapped.kl_coef, 0
    for obs, tokens, infos in play(envs, 3 * T):
        expected = wanted(envs, obs)
        np.testing.assert_allclose(
            read(envs.unwrapped.teacher, obs), expected, atol=1e-6, rtol=1e-6
        )
        ratio = expected[np.arange(len(tokens)), tokens] - infos["ref_logprob"]
        np.testing.assert_allclose(infos["reward_terms"]["distill"], beta * ratio, atol=1e-5)
        answered += (obs["length"] - obs["prompt_length"] > T).any()
    assert (answered > 0) == (name in ANSWER)


@pytest.mark.parametrize("kind", NOISES)
def test_it_is_the_optimum_of_every_text_of_a_small_dialogue(kind: str) -> None:
    s = small(kind)
    texts = [text for steps in range(s.T) for text in s.beginnings(steps)]
    obs = s.observed(texts)
    found = read(OptimalPolicy(s.oracle, 0.3), obs)
    np.testing.assert_allclose(np.exp(found), s.oracle.policy(obs, 0.3), atol=1e-6)
    assert len(texts) > 50


@each_id
def test_slots_say_what_whole_texts_say(name: str) -> None:
    """Token by token, after a fork, and where several tokens are read at once."""
    teacher = make(name).unwrapped.teacher
    tokens = torch.randint(
        teacher.vocab_size, (4, 2 * T), generator=torch.Generator().manual_seed(3)
    )
    whole = teacher.states(tokens, [2 * T] * 4)
    slots = slot_model(teacher, 4, 2 * T)
    after = slots.prefill(np.arange(4), tokens[:, :3], [3] * 4)
    assert torch.equal(after, whole[:, 2])
    slots.fork([1], [0])
    tokens[0], whole[0] = tokens[1], whole[1]
    assert torch.equal(slots.append(tokens[:, 3]), whole[:, 3])
    some = slots.extend([2, 0], tokens[[2, 0], 4:6], [2, 2])
    assert torch.equal(some, whole[[2, 0], 4:6])
    logprob = teacher.logprob(whole[:, 5], tokens[:, 6])
    expected = teacher.head(whole[:, 5]).gather(1, tokens[:, 6, None])[:, 0]
    torch.testing.assert_close(logprob, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(teacher.head(whole[:, 5]).exp().sum(1), torch.ones(4))


def test_a_prefix_that_ends_a_turn_is_paid_as_the_env_counts_it() -> None:
    """Nobody answers a prefix, so in "kind1 . mood2" all three words are the policy's, though the
    text reads like a turn and its answer."""
    envs = make("Dialogue", 2)
    words = envs.unwrapped.token_spec.tokenizer.convert_tokens_to_ids(["kind1", ".", "mood2"])
    options = {"prompts": [[0]] * 2, "prefixes": [words, words[:2]]}
    first = None
    for obs, tokens, infos in play(envs, 3, options):
        expected = wanted(envs, obs)[np.arange(2), tokens] - infos["ref_logprob"]
        np.testing.assert_allclose(infos["reward_terms"]["distill"], 0.05 * expected, atol=1e-5)
        first = obs if first is None else first
    assert np.abs(read(envs.unwrapped.teacher, first) - wanted(envs, first))[0].max() > 1e-3


@pytest.mark.parametrize("name", [name for name in IDS if name not in ANSWER])
def test_where_nobody_answers_it_pays_what_the_oracle_pays(name: str) -> None:
    """beta log(pi* / pi_ref) = V*(s') - V*(s), token by token."""
    distilled, oracle = (
        make(name, reward=reward).unwrapped.score_episodes([[0]] * 8, texts(name)).terms
        for reward in ("distill", "oracle")
    )
    np.testing.assert_allclose(distilled["distill"], oracle["oracle"], atol=1e-5)


def texts(name: str) -> list[list[int]]:
    size = make(name).unwrapped.token_spec.vocab_size
    return np.random.default_rng(1).integers(0, size, (8, T)).tolist()


def test_it_is_made_for_the_envs_beta_when_it_is_first_read() -> None:
    envs = make("Negation", reward="terminal", kl_coef=0.2)
    teacher = envs.unwrapped.teacher
    envs.reset(seed=0)
    envs.step(np.zeros(6, np.int64))
    assert teacher.beta == 0.2
    assert "_tables" not in vars(teacher)
    assert make("Negation", reward={}, kl="none", kl_coef=0.2).unwrapped.teacher.beta == 0.2
    other = make("Negation", teacher=envs.unwrapped.reference).unwrapped
    assert other.teacher is other._task.teacher is envs.unwrapped.reference


def test_at_beta_zero_only_the_best_words_are_left() -> None:
    envs = make("DelayedKey", reward="terminal", kl_coef=0.0)
    obs, _ = envs.reset(seed=0)
    probs = np.exp(read(envs.unwrapped.teacher, obs))
    np.testing.assert_allclose(probs, envs.unwrapped.oracle.policy(obs, 0.0), atol=1e-6)
    assert (probs == 0).any()


def test_copies_and_saved_states_go_on_alike() -> None:
    envs = make("Dialogue")
    list(play(envs, 4))
    twin, other = copy.deepcopy(envs), make("Dialogue")
    other.reset(seed=5)
    other.unwrapped.load_state(envs.unwrapped.save_state())
    tokens = np.full(6, 1)
    first, *others = (one.step(tokens)[1] for one in (envs, twin, other))
    for one in others:
        tasks.assert_equal(one, first)


def test_replies_that_begin_alike_have_no_teacher() -> None:
    automaton = small("deterministic").oracle.automaton
    probs = np.full((automaton.num_states, 2), 0.5)
    source = Source(automaton, [[3], [3, 4]], probs, [1])
    with pytest.raises(InvalidArgument, match=r"a reply begins with another one, \(3,\)"):
        turns_of(source, automaton.vocab_size)
