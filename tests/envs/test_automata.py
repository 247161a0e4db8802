"""The automaton tasks: scores, references, slots, options, and the envs made of them."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_scores import SMALL, TASKS, make_task, score_of

from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.envs.tasks.delayed_key import good_key
from tokenenv.envs.tasks.planted_phrase import phrases
from tokenenv.errors import InvalidArgument
from tokenenv.models.automaton import Automaton, explore
from tokenenv.models.bigram import Bigram
from tokenenv.models.residual_lm import ResidualLM

DENSE: dict[str, dict[str, Any]] = {
    "PlantedPhrase": {"vocab_size": 5, "phrase_length": 3, "num_decoys": 8},
    "DelayedKey": {"vocab_size": 5, "num_keys": 2},
    "Brackets": {"vocab_size": 10, "types": 4, "depth": 2, "pairs": 3},
    "Negation": {"vocab_size": 22, "limit": 3},
}
"""Options under which random tokens score now and then."""


def scores(task: Any, texts: list[list[int]]) -> list[float]:
    """(B,) by the task's scorer, on whole texts."""
    tokens = torch.tensor([[0, *text] for text in texts])
    states = task.scorer.model.states(tokens, [tokens.shape[1]] * len(texts))
    return task.scorer.head(states[:, -1]).tolist()


# ------------------------------------------------------------------- scores


@pytest.mark.parametrize("name", TASKS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_scores_equal_a_naive_reading_of_the_words(name, data):
    options = DENSE[name] | {"task_seed": data.draw(st.integers(0, 3))}
    task = make_task(name, **options)
    token = st.integers(0, options["vocab_size"] - 1)
    text = data.draw(st.lists(token, min_size=1, max_size=16))
    assert scores(task, [text]) == pytest.approx([score_of(name, task, text, **options)], abs=1e-7)


@pytest.mark.parametrize("name", TASKS)
def test_random_texts_reach_every_kind_of_score(name):
    """Or else the test above would say little."""
    task = make_task(name, **DENSE[name])
    texts = np.random.default_rng(0).integers(0, DENSE[name]["vocab_size"], (4000, 6))
    if name == "DelayedKey":
        texts[::2, -1] = 3
    assert set(np.float32(scores(task, texts.tolist()))) == set(
        np.float32(task.scorer.model.payoff)
    )


@pytest.mark.parametrize(
    ("words", "score"),
    [
        ("( )", 0.5),
        ("( w1 [ ] w2 )", 1.0),
        ("( ) ( ) [ ]", 1.0),
        ("( [ ) ]", 0.0),
        ("( ) )", 0.0),
        ("( ) (", 0.0),
        ("( ( ( ( ) ) ) )", 0.0),
        ("( ( ( ) ) )", 1.0),
        ("w1 w2", 0.0),
    ],
)
def test_brackets_by_hand(words, score):
    task = make_task("Brackets")
    assert scores(task, [task.tokenizer(words)["input_ids"]]) == [score]


@pytest.mark.parametrize(
    ("words", "score"),
    [
        ("good1", 0.25),
        ("good1 good2 good3 good4 good5 bad1", 0.75),
        ("not1 bad1", 0.25),
        ("not1 w1 bad1", -0.25),
        ("not1 not2 good1", 0.25),
        ("not1", 0.0),
        ("bad1 bad2 bad3 bad4 bad5 not1 good1 good2", -0.75),
    ],
)
def test_negation_by_hand(words, score):
    task = make_task("Negation")
    assert scores(task, [task.tokenizer(words)["input_ids"]]) == [score]


def test_phrases_overlap_and_differ():
    planted, *decoys = phrases(vocab_size=4, phrase_length=2, num_decoys=5)
    assert len({planted, *decoys}) == 6  # all there are of three words
    assert phrases(task_seed=1) != phrases(task_seed=0) == phrases()


def test_the_good_key_depends_on_the_seed():
    assert {good_key(8, seed) for seed in range(60)} == set(range(1, 9))


# --------------------------------------------------------------- references


def test_a_task_object_keeps_the_length_that_its_oracle_was_made_for():
    task = make_task("DelayedKey", max_new_tokens=16)
    with pytest.raises(
        InvalidArgument,
        match="max_new_tokens=8: this task has an oracle, which was made for 16 tokens",
    ):
        TokenVectorEnv(2, task=task, max_new_tokens=8)
    envs = TokenVectorEnv(2, task=TASKS["DelayedKey"].task, max_new_tokens=8)
    assert envs.oracle.max_new_tokens == 8
    assert TokenVectorEnv(2, task=task, max_new_tokens=16).oracle is task.oracle


@pytest.mark.parametrize("max_new_tokens", [2, 3, 16, 37, 128])
@pytest.mark.parametrize("num_keys", [2, 8])
def test_success_by_chance_does_not_depend_on_the_delay(max_new_tokens, num_keys):
    task = make_task("DelayedKey", max_new_tokens=max_new_tokens, num_keys=num_keys)
    assert task.oracle.reference_objective() == pytest.approx(1 / num_keys / 32, rel=1e-12)
    probs = task.reference.probs
    assert probs[-1, good_key(num_keys, 0)] == 1 / num_keys
    assert (probs[:-1, num_keys + 1] == 1 / 32).all()
    assert probs[-1, 1 : num_keys + 1].sum() == pytest.approx(1 - 1e-4, abs=1e-12)


@pytest.mark.parametrize("name", TASKS)
def test_references_are_positive_normalised_and_seeded(name):
    task, again, other = (make_task(name, task_seed=seed) for seed in (3, 3, 4))
    probs = task.reference.probs
    assert probs.shape == (65, 64)
    assert (probs > 1e-7).all()
    np.testing.assert_allclose(probs.sum(1), 1, atol=1e-12)
    assert (again.reference.probs == probs).all()
    assert (other.reference.probs != probs).any()
    states, tokens = torch.tensor([0, 64, 63]), torch.tensor([5, 0, 63])
    picked = task.reference.head(states)[range(3), tokens]
    assert torch.equal(task.reference.logprob(states, tokens), picked)
    np.testing.assert_allclose(picked, np.log(probs[states, tokens]), rtol=1e-6)


@pytest.mark.parametrize("name", TASKS)
def test_words_are_read_and_written(name):
    task = make_task(name)
    ids = list(range(1, 64))
    text = task.tokenizer.decode(ids)
    assert len(set(text.split())) == 63
    assert task.tokenizer(text)["input_ids"] == ids
    assert task.tokenizer("<s>")["input_ids"] == [0]
    assert len(task.tokenizer) == 64


# -------------------------------------------------------------------- slots


def models() -> dict[str, Any]:
    task = make_task("Brackets", **SMALL["Brackets"])
    residual = ResidualLM(task.reference)
    torch.nn.init.normal_(residual.output.weight, generator=torch.Generator().manual_seed(1))
    return {"bigram": task.reference, "automaton": task.scorer.model, "residual": residual}


@pytest.mark.parametrize("name", ["bigram", "automaton", "residual"])
@pytest.mark.parametrize("seed", range(3))
def test_slots_equal_the_uncached_states(name, seed):
    model, rng = models()[name], np.random.default_rng(seed)
    num_rows, width = 5, 30
    rows = model.slots(num_rows, width)
    rows.append(torch.tensor([1, -1, 10_000, 2, 3]))  # rows never prefilled are harmless
    texts: list[list[int]] = [[] for _ in range(num_rows)]

    def check(states, which):
        for i, row in enumerate(which):
            alone = model.states(torch.tensor([texts[row]]), [len(texts[row])])[0, -1]
            torch.testing.assert_close(states[i], alone, atol=2e-5, rtol=1e-5)

    with torch.no_grad():
        for _ in range(40):
            move = rng.choice(["append"] * 6 + ["prefill", "fork"])
            if move == "prefill":
                slots = rng.permutation(num_rows)[: rng.integers(1, num_rows + 1)]
                lengths = rng.integers(1, 6, len(slots))
                tokens = rng.integers(0, 6, (len(slots), 6))
                for slot, text, length in zip(slots, tokens, lengths, strict=True):
                    texts[slot] = text[:length].tolist()
                check(
                    rows.prefill(slots.tolist(), torch.from_numpy(tokens), lengths.tolist()), slots
                )
            elif move == "append":
                active = (rng.random(num_rows) < 0.7) & [0 < len(text) < width for text in texts]
                tokens = rng.integers(0, 6, num_rows)
                states = rows.append(torch.from_numpy(tokens), active)
                for row in np.flatnonzero(active):
                    texts[row].append(int(tokens[row]))
                check(states[np.flatnonzero(active)], np.flatnonzero(active))
                states.zero_()  # the caller's own
            else:
                sources, targets = rng.permutation(num_rows)[:2], rng.permutation(num_rows)[:2]
                rows.fork(sources, targets)
                for target, text in zip(
                    targets, [list(texts[source]) for source in sources], strict=True
                ):
                    texts[target] = text


def test_the_first_token_says_nothing_and_the_same_token_later_does():
    for name, model in models().items():
        states = model.states(torch.tensor([[0, 0], [3, 3]]), [2, 2])
        if name != "residual":
            assert torch.equal(states[0, 0], states[1, 0])
    task = make_task("Brackets")
    assert task.reference.states(torch.tensor([[0, 0]]), [2]).tolist() == [[64, 0]]


# ------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "DelayedKey",
            {"max_new_tokens": 1},
            "max_new_tokens=1 is not allowed; it must lie between 2 and 128",
        ),
        ("DelayedKey", {"max_new_tokens": 129}, "max_new_tokens=129"),
        ("DelayedKey", {"num_keys": 1}, "num_keys=1"),
        ("DelayedKey", {"door_mass": 0.0}, "door_mass=0.0"),
        (
            "DelayedKey",
            {"vocab_size": 10},
            "vocab_size=10 is not allowed; it must lie between 11 and 512",
        ),
        ("DelayedKey", {"vocab_size": 64.0}, "vocab_size=64.0 must be a whole number"),
        ("DelayedKey", {"task_seed": -1}, "task_seed=-1"),
        ("Negation", {"vocab_size": 21}, "vocab_size=21"),
        ("Negation", {"limit": 0}, "limit=0"),
        ("Negation", {"max_new_tokens": 0}, "max_new_tokens=0"),
        ("PlantedPhrase", {"phrase_length": 5}, "phrase_length=5"),
        (
            "PlantedPhrase",
            {"phrase_length": 3, "max_new_tokens": 2},
            "max_new_tokens=2 .* between 3 and 128",
        ),
        ("PlantedPhrase", {"num_decoys": 6, "vocab_size": 4}, "num_decoys=6 .* between 0 and 5"),
        ("PlantedPhrase", {"num_decoys": -1}, "num_decoys=-1"),
        ("PlantedPhrase", {"vocab_size": 513}, "vocab_size=513"),
        ("PlantedPhrase", {"vocab_size": 3}, "vocab_size=3"),
        ("PlantedPhrase", {"task_seed": -1}, "task_seed=-1"),
        ("Brackets", {"types": 5}, "types=5"),
        ("Brackets", {"depth": 0}, "depth=0"),
        ("Brackets", {"pairs": 9}, "pairs=9"),
        ("Brackets", {"pairs": 4, "max_new_tokens": 7}, "max_new_tokens=7 .* between 8 and 128"),
        ("Brackets", {"types": 4, "vocab_size": 9}, "vocab_size=9"),
    ],
)
def test_options_out_of_range_are_named(name, options, message):
    with pytest.raises(InvalidArgument, match=message):
        make_task(name, **options)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("seed", range(8))
def test_the_full_score_can_be_reached(name, seed):
    shortest = {"PlantedPhrase": 2, "DelayedKey": 2, "Brackets": 4, "Negation": 4}[name]
    assert (
        make_task(name, max_new_tokens=shortest, task_seed=seed).oracle.optimal_objective(0.0)
        == 1.0
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Bigram(np.ones((2, 2)) / 2), r"probs of shape \(2, 2\); allowed: \(V \+ 1, V\)"),
        (lambda: Bigram(np.array([[0.0, 1.0]] * 3)), "probs must be positive"),
        (lambda: Bigram(np.ones((3, 2))), "rows sum to 1"),
        (lambda: Automaton(np.zeros((2, 3)), np.zeros(3)), "transitions"),
        (lambda: Automaton(np.full((2, 3), 2), np.zeros(2)), r"lead out of the states 0\.\.1"),
    ],
)
def test_tables_that_make_no_sense_are_refused(make, message):
    with pytest.raises(InvalidArgument, match=message):
        make()


def test_exploring_finds_the_states_that_can_be_reached_and_no_others():
    automaton = explore(10, lambda state, token: (state + 2 * token) % 20, float, 3)
    assert sorted(automaton.payoff) == list(range(0, 20, 2))
    assert automaton.payoff[0] == 10
    assert (
        automaton.payoff[automaton.transitions] == (automaton.payoff[:, None] + [0, 2, 4]) % 20
    ).all()


# --------------------------------------------------------------------- envs


def play(
    envs: Any, seed: int, on_step: Any = lambda *step: None
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """One episode a row with random tokens: tokens (N, T), rewards (N, T) and the last infos."""
    rng, spec = np.random.default_rng(seed), envs.unwrapped.token_spec
    on_step(envs.reset(seed=seed)[0], np.zeros((envs.num_envs, 0), int))
    tokens, rewards = [], []
    for _ in range(spec.max_new_tokens):
        tokens.append(rng.integers(0, spec.vocab_size, envs.num_envs))
        obs, reward, terminated, _, infos = envs.step(tokens[-1])
        rewards.append(reward)
        on_step(obs, np.stack(tokens, axis=1))
    assert terminated.all()
    assert infos["cut"].all()
    return np.stack(tokens, axis=1), np.stack(rewards, axis=1), infos


def make_envs(name: str, **options: Any) -> Any:
    return gym.make_vec(
        f"tokenenv/{name}-v0", num_envs=64, autoreset_mode=AutoresetMode.DISABLED, **options
    )


@pytest.mark.parametrize("name", TASKS)
def test_an_env_pays_the_naive_score_at_the_end(name):
    options = DENSE[name] | {"task_seed": 2, "max_new_tokens": 8}
    envs = make_envs(name, **options)
    task = make_task(name, **options)
    tokens, rewards, infos = play(envs, seed=1)
    expected = np.array([score_of(name, task, text, **options) for text in tokens.tolist()])
    np.testing.assert_allclose(infos["score"], expected, atol=1e-7)
    np.testing.assert_allclose(infos["gold"], expected, atol=1e-7)
    rows = np.column_stack([np.full(64, options["vocab_size"]), tokens[:, :-1]])
    paid = 0.05 * np.log(task.reference.probs[rows, tokens])
    paid[:, -1] += expected
    np.testing.assert_allclose(rewards, paid, atol=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_the_oracle_reward_adds_up_to_what_is_above_the_optimum(name):
    envs = make_envs(name, reward="oracle", kl="none", kl_coef=0.1)
    oracle = envs.unwrapped.oracle
    _, rewards, infos = play(envs, seed=2)
    np.testing.assert_allclose(
        rewards.sum(1), infos["score"] - oracle.optimal_objective(0.0), atol=1e-5
    )


@pytest.mark.parametrize("name", TASKS)
def test_features_are_three_one_hots(name):
    envs = make_envs(name, observation="features", max_new_tokens=9)
    automaton, vocab_size = envs.unwrapped.oracle.automaton, 64

    def check(obs, tokens):
        assert obs.shape == (64, automaton.num_states + vocab_size + 1 + 10)
        state, last, step = np.split(
            obs, [automaton.num_states, automaton.num_states + vocab_size + 1], axis=1
        )
        for part in (state, last, step):
            assert (part.sum(1) == 1).all()
        taken = tokens.shape[1]
        assert (
            state.argmax(1)
            == automaton.read(np.pad(tokens, ((0, 0), (1, 0))), np.full(64, taken + 1))
        ).all()
        assert (last.argmax(1) == (tokens[:, -1] if taken else vocab_size)).all()
        assert (step.argmax(1) == taken).all()

    play(envs, seed=3, on_step=check)
    assert envs.single_observation_space.shape == envs.reset()[0].shape[1:]


def test_the_optimum_is_looked_up_once_a_step_and_anew_where_texts_are_written_over(monkeypatch):
    envs = gym.make_vec(
        "tokenenv/DelayedKey-v0",
        num_envs=6,
        reward="oracle",
        vocab_size=8,
        num_keys=2,
        max_new_tokens=6,
        autoreset_mode=AutoresetMode.SAME_STEP,
    )
    env, asked = envs.unwrapped, []
    look = type(env.oracle).state_value

    def looked(oracle: Any, *args: Any) -> Any:
        asked.append(args)
        return look(oracle, *args)

    def check(obs: Any, infos: Any, rows: Any) -> None:
        np.testing.assert_allclose(
            infos["potential"][rows], env.oracle.value(obs, env.kl_coef)[rows], atol=1e-6
        )

    monkeypatch.setattr(type(env.oracle), "state_value", looked)
    obs, infos = envs.reset(seed=0)
    check(obs, infos, slice(None))
    keys = np.arange(6)
    for _ in range(8):  # over the end of every text
        asked.clear()
        obs, _, _, _, infos = envs.step(keys + 1)
        check(obs, infos, slice(None))
        assert len(asked) == (2 if "_score" in infos else 1)
    value = env.oracle.value(obs, env.kl_coef)
    best, worst = int(value.argmax()), int(value.argmin())
    assert value[best] > value[worst]
    check(*env.fork([best], [worst]), [worst])
    obs, infos = envs.reset(options={"reset_mask": keys < 3})
    check(obs, infos, slice(0, 3))
    check(*env.load_state(env.save_state()), slice(None))
