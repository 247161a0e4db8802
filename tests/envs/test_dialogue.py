"""Dialogue-v0: what the other answers, and the exact optimum against all texts of a small one."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from dialogues import NOISES, Said, Small, mood, replies, score, small, turn_rewards

from tokenenv.envs.automata.source import Source
from tokenenv.envs.tasks import dialogue
from tokenenv.errors import InvalidArgument
from tokenenv.models.automaton import Automaton
from tokenenv.turns import TextSoFar, segments_of

BETAS = (0.05, 0.5)
each_kind = pytest.mark.parametrize("kind", NOISES)
each_beta = pytest.mark.parametrize("beta", BETAS)


def every(s: Small) -> list[tuple[int, list[Said]]]:
    return [(steps, list(s.beginnings(steps))) for steps in range(s.T + 1)]


def text_so_far(s: Small, said: Said, seed: int = 0) -> TextSoFar:
    segments = segments_of(s.ids(said), np.array(said.own))
    return TextSoFar([0], segments, s.task.tokenizer, seed=seed)


# ----------------------------------------------------------------- what is written


@each_kind
def test_replies_are_drawn_as_the_words_say(kind: str) -> None:
    """The source's probabilities, in every text that ends a turn."""
    s = small(kind)
    source, automaton = s.oracle.source, s.oracle.automaton
    asked = [b.plus(".") for t in range(s.T) for b in s.beginnings(t)]
    seen = set()
    for said in asked:
        ids = np.array([[0, *s.ids(said)]])
        state = automaton.read(ids, np.array([ids.shape[1]]))[0]
        found = {
            tuple(s.task.tokenizer.convert_ids_to_tokens(list(reply))): prob
            for reply, prob in zip(source.replies, source.probs[state], strict=True)
            if prob > 0
        }
        assert found == pytest.approx(replies(said, s.noise))
        seen |= set(found)
    # A raised mood cannot be kept within three words, but by chance.
    by_chance = {("mood2",)} if s.noise else set()
    assert seen == {("mood1",), ("oh", "mood1"), ("oh", "mood2")} | by_chance


@each_kind
def test_a_reply_is_a_function_of_the_text_and_its_seed(kind: str) -> None:
    s = small(kind)
    said = Said().plus("kind1").plus(".")
    drawn = [s.task.respond(text_so_far(s, said, seed)).tokens for seed in range(400)]
    again = [s.task.respond(text_so_far(s, said, seed)).tokens for seed in range(400)]
    assert drawn == again
    raised = tuple(s.ids(Said(("oh", "mood2"))))
    assert np.mean([tuple(reply) == raised for reply in drawn]) == pytest.approx(
        1 - s.noise / 2, abs=4 * 0.36 / 20
    )
    assert (set(drawn) == {raised}) == (s.noise == 0)


@each_kind
def test_turn_rewards_add_up_to_the_score(kind: str) -> None:
    s, rng = small(kind, max_new_tokens=12), np.random.default_rng(0)
    scores = set()
    for seed in range(200):
        said, earned = Said(), 0.0
        for word in rng.choice([".", "kind1", "kind2", "w1"], s.T):
            said = said.plus(word)
            if word == ".":
                reply = s.task.respond(text_so_far(s, said, seed))
                written = s.task.tokenizer.convert_ids_to_tokens(list(reply.tokens))
                said = Said(said.words[:-1], said.own[:-1]).plus(word, tuple(written))
                earned += reply.reward
                assert not reply.ends
        assert earned == pytest.approx(score(said))
        scores.add(score(said))
    assert scores == {0.0, 1.0}


def test_no_text_is_longer_than_the_context() -> None:
    task = dialogue.task(max_new_tokens=5)
    assert task.oracle.max_length == task.max_context_tokens == 1 + 5 * 3
    assert task.turn_end_token_ids == tuple(task.tokenizer.convert_tokens_to_ids(["."]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 65}, "max_new_tokens=65 .* between 2 and 64"),
        ({"num_moods": 1}, "num_moods=1"),
        ({"num_moods": 9}, "num_moods=9"),
        ({"noise": 1.5}, "noise=1.5"),
        ({"pause_mass": 0.0}, "pause_mass=0.0"),
        ({"vocab_size": 7, "num_moods": 2}, "vocab_size=7 .* between 8 and 512"),
        ({"task_seed": -1}, "task_seed=-1"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        dialogue.task(**options)


@pytest.mark.parametrize(
    ("replies", "probs", "message"),
    [
        ([[1]], np.ones((2, 1)), r"probs of shape \(2, 1\)"),
        ([[1], []], np.ones((1, 2)) / 2, "no empty reply"),
        ([[1]], np.full((1, 1), 0.5), "sum to 1"),
    ],
)
def test_sources_that_make_no_sense_are_refused(
    replies: Any, probs: np.ndarray, message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Source(Automaton(np.zeros((1, 3)), np.zeros(1)), replies, probs, [0])


# --------------------------------------------------------- against all texts


@each_kind
@each_beta
def test_values_and_policy_equal_a_recursion_over_all_texts(kind: str, beta: float) -> None:
    s = small(kind)
    value = s.values(beta)
    for steps, some in every(s):
        obs = s.observed(some)
        np.testing.assert_allclose(
            s.oracle.value(obs, beta), [value(said) for said in some], atol=1e-10
        )
        if steps == s.T:
            continue
        q = np.array([s.q(said, value) for said in some])
        np.testing.assert_allclose(s.oracle.q(obs, beta), q, atol=1e-10)
        ref = np.array([s.reference(said) for said in some])
        tilted = ref * np.exp((q - s.oracle.value(obs, beta)[:, None]) / beta)
        np.testing.assert_allclose(tilted.sum(1), 1, atol=1e-10)
        np.testing.assert_allclose(s.oracle.policy(obs, beta), tilted, atol=1e-10)
    assert s.oracle.optimal_objective(beta) == pytest.approx(value(Said()), abs=1e-12)
    start = s.objective(s.reference, beta)
    assert start[2] == pytest.approx(0.0, abs=1e-12)
    assert s.oracle.reference_objective() == pytest.approx(start[0], abs=1e-12)


@each_kind
def test_without_a_penalty_the_best_words_count(kind: str) -> None:
    s = small(kind)
    value = s.values(0.0)
    for _, some in every(s):
        found = s.oracle.value(s.observed(some), 0.0)
        np.testing.assert_allclose(found, [value(said) for said in some], atol=1e-12)
    # Two answers may raise the mood, and the second is not asked for after a good first one: the
    # first is left to chance, as there is no time to please twice.
    lucky = s.noise / 2
    assert s.oracle.optimal_objective(0.0) == pytest.approx(lucky + (1 - lucky) ** 2)


def any_policy(s: Small, seed: int) -> Any:
    """A random function of the whole text."""

    def policy(said: Said) -> np.ndarray:
        return np.random.default_rng([seed, *s.ids(said)]).dirichlet(np.ones(s.V))

    return policy


def markov_policy(s: Small, seed: int) -> Any:
    """A random function of step, automaton state and last word; some words are ruled out."""
    automaton, rng = s.oracle.automaton, np.random.default_rng(seed)
    table = rng.dirichlet(np.ones(s.V), (s.T, automaton.num_states, s.V + 1))
    table *= rng.random(table.shape) > 0.3
    table[..., 1] += 1e-3
    table /= table.sum(-1, keepdims=True)

    def policy(said: Said) -> np.ndarray:
        ids = s.ids(said)
        state = automaton.read(np.array([[0, *ids]]), np.array([1 + len(ids)]))[0]
        return table[sum(said.own), state, ids[-1] if ids else s.V]

    return policy


def of_observations(s: Small, policy: Any) -> Any:
    return lambda obs: np.stack([policy(s.said(obs, row)) for row in range(len(obs["length"]))])


@each_kind
@each_beta
def test_a_markov_policy_is_evaluated_exactly(kind: str, beta: float) -> None:
    s = small(kind)
    policy = markov_policy(s, 1)
    result = s.oracle.evaluate(of_observations(s, policy), beta, markov=True)
    exact = s.objective(policy, beta)
    np.testing.assert_allclose((result.objective, result.score, result.kl), exact, atol=1e-10)
    assert result.error == 0.0
    assert result.regret == pytest.approx(s.values(beta)(Said()) - exact[0], abs=1e-10)
    assert result.regret > 0.01


@each_kind
@each_beta
def test_any_policy_is_evaluated_by_sampling(kind: str, beta: float) -> None:
    """The words are drawn from the policy, and the answers from the source."""
    s = small(kind)
    policy = any_policy(s, 2)
    exact, mean, kl = s.objective(policy, beta)
    result = s.oracle.evaluate(of_observations(s, policy), beta, num_texts=800, seed=3)
    assert 0 < result.error < 0.1
    assert abs(result.objective - exact) < 4 * result.error
    assert abs(result.score - mean) < 4 * 0.5 / 800**0.5
    assert result.kl == pytest.approx(kl, abs=0.1)


@each_kind
@each_beta
def test_the_optimum_has_no_regret(kind: str, beta: float) -> None:
    s = small(kind)
    for options in ({"markov": True}, {"num_texts": 50}):
        best = s.oracle.evaluate(lambda obs: s.oracle.policy(obs, beta), beta, **options)
        assert best.regret == pytest.approx(0.0, abs=1e-12)
    exact = s.objective(lambda said: s.oracle.policy(s.observed([said]), beta)[0], beta)
    assert exact[0] == pytest.approx(s.oracle.optimal_objective(beta), abs=1e-10)


def test_chance_costs_and_paying_for_what_is_written_would_change_the_optimum() -> None:
    """The KL is that of the policy's words: with the reference's log-probs of the answers counted
    as well, another policy would be the best."""
    s, beta = small("stochastic"), 0.5

    def counted(said: Said) -> float:
        if sum(said.own) == s.T:
            return score(said)
        paid = []
        for word in s.words:
            total = 0.0
            for then, chance in s.after(said, word).items():
                written = len(then.words) - len(said.words) - 1
                so_far, price = said.plus(word), 0.0
                for extra in then.words[len(then.words) - written :]:
                    price += np.log(
                        s.reference(so_far)[s.task.tokenizer.convert_tokens_to_ids(extra)]
                    )
                    so_far = Said((*so_far.words, extra), (*so_far.own, False))
                total += chance * (counted(then) + beta * price)
            paid.append(total)
        return float(beta * np.log(s.reference(said) @ np.exp(np.array(paid) / beta)))

    assert counted(Said()) < s.oracle.optimal_objective(beta) - 0.05


# --------------------------------------------------------- what is observed


@each_kind
def test_state_values_are_values(kind: str) -> None:
    s, beta = small(kind), 0.1
    models = (s.oracle.automaton, s.oracle.reference)
    for steps, some in every(s):
        obs = s.observed(some)
        tokens = torch.from_numpy(obs["tokens"])
        last = torch.from_numpy(obs["length"] - 1)
        rows = torch.arange(len(some))
        states = {m: m.states(tokens, obs["length"])[rows, last] for m in models}
        found = s.oracle.state_value(states, torch.full((len(some),), steps), beta)
        np.testing.assert_allclose(found, s.oracle.value(obs, beta), rtol=1e-6, atol=1e-7)


def test_words_of_a_prefix_count_as_the_policys() -> None:
    """As `reset` takes them by default. `own_mask` does not mark them."""
    s = small("stochastic")
    said = Said().plus("kind1").plus(".", ("oh", "mood2"))
    obs = s.observed([said])
    first = obs | {"own_mask": obs["own_mask"] * (np.arange(s.oracle.max_length) > 1)}
    np.testing.assert_array_equal(s.oracle.q(first, 0.1), s.oracle.q(obs, 0.1))
    with pytest.raises(InvalidArgument, match=r"texts with \[4\] tokens of the policy's"):
        s.oracle.value(obs | {"own_mask": obs["own_mask"] * 0}, 0.1)


def test_observations_that_make_no_sense_are_refused() -> None:
    s = small("stochastic")
    obs = s.observed([Said().plus("kind1")])
    del obs["own_mask"]
    with pytest.raises(InvalidArgument, match="tokens, length, prompt_length and own_mask"):
        s.oracle.value(obs, 0.1)


# ------------------------------------------------------------------------ envs


def play(kind: str, words: np.ndarray, seed: int = 3, **options: Any) -> dict[str, Any]:
    """An episode a row with `words` (N, T) of the policy's, and what stepping gave, (N, T) each."""
    s = small(kind, max_new_tokens=words.shape[1])
    envs = gym.make_vec(
        "tokenenv/Dialogue-v0",
        num_envs=len(words),
        autoreset_mode="Disabled",
        **s.options | options,
    )
    obs, _ = envs.reset(seed=seed)
    found: dict[str, Any] = {"s": s, "envs": envs.unwrapped, "rewards": [], "turns": []}
    ids = np.vectorize(s.words.index)(words)
    for column in ids.T:
        obs, reward, terminated, truncated, infos = envs.step(column)
        found["rewards"].append(reward)
        found["turns"].append(infos["turn_reward"])
    assert terminated.all()
    assert not truncated.any()
    found["rewards"], found["turns"] = (np.stack(found[k], 1) for k in ("rewards", "turns"))
    found["said"] = [s.said(obs, row) for row in range(len(words))]
    return found | {"infos": infos, "obs": obs, "words": ids}


def random_words(count: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).choice([".", "kind1", "kind2", "w1"], (count, length))


@each_kind
def test_an_env_pays_what_the_words_say(kind: str) -> None:
    played = play(kind, random_words(40, 9), kl_coef=0.1)
    s, said = played["s"], played["said"]
    np.testing.assert_allclose(played["infos"]["score"], [score(one) for one in said])
    np.testing.assert_allclose(played["turns"], [turn_rewards(one) for one in said])
    for one, words, paid in zip(said, played["words"], played["rewards"], strict=True):
        ids, places = s.ids(one), np.flatnonzero(one.own)
        assert [ids[place] for place in places] == words.tolist()
        before = [s.reference(Said(one.words[:place], one.own[:place])) for place in places]
        expected = 0.1 * np.log(
            [row[ids[place]] for row, place in zip(before, places, strict=True)]
        )
        expected[-1] += score(one)
        np.testing.assert_allclose(paid, expected, atol=1e-5)


@each_kind
@pytest.mark.parametrize("reward", ["terminal", "turn", "delta", "oracle"])
def test_every_design_pays_the_score_up_to_a_constant(kind: str, reward: str) -> None:
    played = play(kind, random_words(40, 9), reward=reward, kl="none", kl_coef=0.1)
    start = played["envs"].oracle.optimal_objective(0.0) if reward == "oracle" else 0.0
    total = played["rewards"].sum(1)
    np.testing.assert_allclose(total, played["infos"]["score"] - start, atol=1e-5)


@each_kind
def test_scoring_pays_what_stepping_paid(kind: str) -> None:
    played = play(kind, random_words(40, 9), reward="oracle", kl_coef=0.1)
    s, said = played["s"], played["said"]
    own = [one.own for one in said]
    responses = [s.ids(one) for one in said]
    found = played["envs"].score_episodes([[0]] * 40, responses, own=own)
    np.testing.assert_allclose(found.token_rewards, played["rewards"], atol=1e-5)
    np.testing.assert_allclose(found.score, played["infos"]["score"])


def test_answers_are_drawn_anew_in_every_slot_and_again_with_the_seed() -> None:
    words = np.array([["kind1", ".", "kind2", "."]] * 600)
    first, again, other = (play("stochastic", words, seed)["said"] for seed in (3, 3, 4))
    assert first == again
    assert first != other
    raised = np.array([one.words[2] == "oh" for one in first])
    kept = np.array([mood(one) == 2 for one in first])
    deviations = 4 * (0.15 * 0.85 / 600) ** 0.5
    assert raised.mean() == pytest.approx(0.85, abs=deviations)
    # A second word pleases only where the first answer was the good one.
    assert kept[raised].mean() == pytest.approx(0.85, abs=deviations / 0.9)
    assert kept[~raised].mean() == pytest.approx(0.15, abs=4 * (0.15 * 0.85 / 60) ** 0.5)


def test_answers_of_a_fork_are_its_own() -> None:
    s = small("stochastic", max_new_tokens=9)
    envs: Any = gym.make_vec("tokenenv/Dialogue-v0", num_envs=200, **s.options).unwrapped
    envs.reset(seed=0)
    envs.fork(np.zeros(199, int), np.arange(1, 200))
    envs.step(np.full(200, s.words.index("kind1")))
    obs, *_ = envs.step(np.full(200, s.words.index(".")))
    raised = np.mean([s.said(obs, row).words[-1] == "mood2" for row in range(200)])
    assert raised == pytest.approx(0.85, abs=4 * (0.15 * 0.85 / 200) ** 0.5)


@each_kind
def test_a_text_in_which_every_word_is_answered_fits(kind: str) -> None:
    """The mood changes with each answer where every turn is answered with noise, so that answers
    have up to two words."""
    played = play(kind, np.full((30, 12), "."), noise=1.0)
    lengths = played["obs"]["length"]
    assert (played["obs"]["own_mask"].sum(1) == 12).all()
    assert 1 + 12 * 2 < lengths.max() <= played["envs"].token_spec.max_length == 1 + 12 * 3


def test_features_are_three_one_hots_of_the_state_after_the_answer() -> None:
    s = small("stochastic", max_new_tokens=6)
    envs: Any = gym.make_vec(
        "tokenenv/Dialogue-v0", num_envs=20, observation="features", **s.options
    ).unwrapped
    envs.reset(seed=0)
    for word in ("kind1", "."):
        features, *_ = envs.step(np.full(20, s.words.index(word)))
    states = s.oracle.automaton.num_states
    state, last, step = np.split(features, [states, states + s.V + 1], axis=1)
    assert (step.argmax(1) == 2).all()
    moods = {s.words.index(word) for word in ("mood1", "mood2")}
    assert set(last.argmax(1)) == moods
    payoff = s.oracle.automaton.payoff[state.argmax(1)]
    assert ((last.argmax(1) == s.words.index("mood2")) == (payoff == 1.0)).all()
