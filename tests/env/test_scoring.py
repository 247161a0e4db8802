"""Whole texts: `score_episodes` pays what stepping pays, and both say what the models say."""

from typing import Any

import fakes
import gymnasium as gym
import numpy as np
import pytest
import tasks
import torch
from gymnasium.vector import AutoresetMode
from tasks import CASES, STOPS, TOY, TOYS, T, make_vec, play

from tokenenv.env import scoring
from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.errors import InvalidArgument
from tokenenv.models.automaton import Automaton
from tokenenv.models.bigram import Bigram
from tokenenv.models.heads import make_scorer
from tokenenv.types import EpisodeScores, Scorer, Task

SAME_STEP = AutoresetMode.SAME_STEP
TOKEN_CASES = [case for case in CASES if case.values[1].get("observation") != "features"]


def close(actual: Any, expected: Any) -> None:
    expected = np.asarray(expected)
    np.testing.assert_allclose(
        actual, expected, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(expected).max(initial=0.0))
    )


def scored(envs: Any, episodes: list[tasks.Played], **options: Any) -> EpisodeScores:
    logprobs = [e.logprobs for e in episodes] if envs.unwrapped.config.kl == "policy" else None
    if envs.unwrapped.token_spec.responds:
        options["own"] = [e.own for e in episodes]
        options["turn_rewards"] = [[i["turn_reward"] for i in e.infos] for e in episodes]
        options["truncated"] = [e.truncated for e in episodes]
    return envs.unwrapped.score_episodes(
        [e.prompt for e in episodes], [e.response for e in episodes], logprobs=logprobs, **options
    )


@pytest.mark.parametrize(("env_id", "options"), TOKEN_CASES)
def test_stepping_equals_scoring(env_id: str, options: dict[str, Any]) -> None:
    envs = make_vec(5, SAME_STEP, env_id, max_batch_tokens=40, **options)
    episodes = play(envs)
    assert len({len(e.response) for e in episodes}) > (3 if envs.token_spec.stop_token_ids else 0)
    whole = scored(envs, episodes)
    limit = envs.unwrapped.token_spec.max_new_tokens
    close(whole.step_rewards, np.stack([e.padded(e.rewards, limit) for e in episodes]))
    for name, values in whole.terms.items():
        paid = [[info["reward_terms"][name] for info in e.infos] for e in episodes]
        close(
            values, np.stack([e.padded(row, limit) for e, row in zip(episodes, paid, strict=True)])
        )
    close(whole.token_rewards, np.stack([e.infos[-1]["token_rewards"] for e in episodes]))
    for name, values in whole.token_reward_terms.items():
        close(values, np.stack([e.infos[-1]["token_reward_terms"][name] for e in episodes]))
    assert set(whole.watched) == set(envs.unwrapped._engine.rewards.watched)
    for name, values in whole.watched.items():
        close(values, np.stack([e.infos[-1]["token_watched"][name] for e in episodes]))
    close(sum(whole.token_reward_terms.values()), whole.token_rewards)
    close(whole.token_rewards.sum(1), [sum(e.rewards) for e in episodes])
    for key in ("score", "gold"):
        if getattr(whole, key) is None:
            assert key not in episodes[0].infos[-1]
        else:
            close(getattr(whole, key), [e.infos[-1][key] for e in episodes])


@pytest.mark.parametrize("name", ["token", "terminal", "uniform", "delta"])
@pytest.mark.parametrize("scorer", ["token", "sequence"])
def test_each_design_sums_to_the_score(name: str, scorer: str) -> None:
    if (name, scorer) == ("token", "sequence"):
        pytest.skip("needs token scores")
    envs = make_vec(4, SAME_STEP, reward=name, scorer=scorer, kl="none")
    episodes = play(envs)
    before = [first_score(e.prompt, scorer) if name == "delta" else 0.0 for e in episodes]
    close(
        [sum(e.rewards) + start for e, start in zip(episodes, before, strict=True)],
        scored(envs, episodes).score,
    )


def first_score(prompt: list[int], scorer: str) -> float:
    return 0.0 if scorer == "token" else model_score(prompt, [], scorer)


def model_score(prompt: list[int], response: list[int], kind: str) -> float:
    """The reward model's own word, by its own forward."""
    logits = tasks.reward_model(kind)(torch.tensor([prompt + response])).logits[0]
    return float(logits[len(prompt) :].sum() if kind == "token" else logits)


def test_scores_and_log_probs_are_the_models_own() -> None:
    for kind in ("token", "sequence"):
        for episode in play(make_vec(3, SAME_STEP, reward="terminal", scorer=kind), steps=12):
            close(episode.infos[-1]["score"], model_score(episode.prompt, episode.response, kind))
            logits = tasks.reference()(torch.tensor([episode.prompt + episode.response])).logits[0]
            taken = logits[len(episode.prompt) - 1 : -1].log_softmax(-1)[
                range(len(episode.response)), episode.response
            ]
            close([info["ref_logprob"] for info in episode.infos], taken)


def test_micro_batches_change_nothing() -> None:
    envs, small = (
        make_vec(4, SAME_STEP, **TOYS["mixture"]),
        make_vec(4, max_batch_tokens=1, **TOYS["mixture"]),
    )
    episodes = play(envs)
    close(scored(small, episodes).token_rewards, scored(envs, episodes).token_rewards)


def test_policy_kl_is_the_log_ratio_and_clamps() -> None:
    envs = make_vec(4, SAME_STEP, reward={}, kl="policy", kl_coef=0.5, kl_clamp=1.5)
    for episode in play(envs):
        ratio = np.array(episode.logprobs) - [info["ref_logprob"] for info in episode.infos]
        close(episode.rewards, -0.5 * ratio.clip(-1.5, 1.5))


def test_reference_and_learner_halves_make_k1() -> None:
    half, whole = (
        make_vec(4, SAME_STEP, reward="token", kl=kl, kl_coef=0.3) for kl in ("reference", "policy")
    )
    episodes = play(whole)
    again = half.unwrapped.score_episodes(
        [e.prompt for e in episodes], [e.response for e in episodes]
    )
    for episode, rewards in zip(episodes, again.token_rewards, strict=True):
        close(
            episode.rewards,
            rewards[: len(episode.response)] - 0.3 * np.array(episode.logprobs, np.float32),
        )


def test_unscored_truncation_withholds_the_score_and_keeps_the_potential() -> None:
    envs = make_vec(5, SAME_STEP, **TOYS["unscored"])
    episodes = play(envs)
    assert {e.truncated for e in episodes} == {True, False}
    for episode in episodes:
        *before, last = episode.infos
        paid, score = last["reward_terms"], last["score"]
        close([paid["a"], paid["b"]], [0.0, 0.0] if episode.truncated else [score, score])
        assert paid["c"] != 0
        close(episode.infos[-1]["token_rewards"].sum(), sum(episode.rewards))
        assert all(info["potential"] != 0 for info in before)
    finals = final_potentials(envs)
    assert all((phi == 0) == (not truncated) for phi, truncated in finals)
    close([phi for phi, truncated in final_potentials(make_vec(5, SAME_STEP, reward="delta"))], 0.0)


def final_potentials(envs: Any) -> list[tuple[float, bool]]:
    """The potential at each end, and whether it was a truncation."""
    rng, out = np.random.default_rng(0), []
    envs.reset(seed=0)
    for _ in range(20):
        final = envs.step(tasks.random_actions(rng, envs))[4].get("final_info", {"_cut": []})
        out += [
            (final["potential"][row], bool(final["cut"][row]))
            for row in np.flatnonzero(final["_cut"])
        ]
    return out


def test_missing_eos_is_paid_where_a_text_is_cut() -> None:
    for episode in play(make_vec(5, SAME_STEP, **TOYS["terminal"])):
        *before, last = [info["reward_terms"]["missing_eos"] for info in episode.infos]
        assert not any(before)
        close(last, -0.7 if episode.truncated else 0.0)


def test_weights_and_kl_coef_of_each_episode() -> None:
    envs = make_vec(4, SAME_STEP, reward={"a": ("token", 0.5), "b": ("terminal", 2.0)}, kl_coef=0.1)
    episodes = play(envs)[:3]
    plain = scored(envs, episodes).terms
    beta, weight = [0.0, 0.2, 0.4], [1.0, 2.0, 3.0]
    changed = scored(envs, episodes, kl_coef=beta, weights={"a": weight}).terms
    close(changed["kl"], plain["kl"] * np.array(beta)[:, None] / 0.1)
    close(changed["a"], plain["a"] * np.array(weight)[:, None] / 0.5)
    close(changed["b"], plain["b"])
    envs.unwrapped.kl_coef = 0.3
    close(scored(envs, episodes).terms["kl"], plain["kl"] * 3)


def test_texts_and_ids_are_scored_alike_and_truncation_is_read_off_the_stop_token() -> None:
    envs = make_vec(1, SAME_STEP, **TOYS["terminal"])
    stop = tasks.tokenizer().convert_ids_to_tokens(STOPS[1])
    texts = envs.unwrapped.score_episodes(["the cat"], [f"is good {stop}"])
    prompt, response = (
        tasks.tokenizer()(text)["input_ids"] for text in ("the cat", f"is good {stop}")
    )
    close(
        texts.token_rewards,
        envs.unwrapped.score_episodes([np.array(prompt)], [torch.tensor(response)]).token_rewards,
    )
    assert texts.terms["missing_eos"].sum() == 0
    cut = envs.unwrapped.score_episodes([prompt], [response[:-1]])
    assert cut.terms["missing_eos"][0, len(response) - 2] == np.float32(-0.7)
    assert (
        envs.unwrapped.score_episodes([prompt], [response[:-1]], truncated=[False])
        .terms["missing_eos"]
        .sum()
        == 0
    )


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([[3]], []), {}, "got 1 prompts and 0 responses"),
        (([], []), {}, "at least one"),
        (([[3]], [[]]), {}, f"responses[0] has 0 tokens; allowed: 1 to max_new_tokens={T}"),
        (([[3]], [[3] * (T + 1)]), {}, f"responses[0] has {T + 1} tokens"),
        (([[3] * 9], [[3]]), {}, "prompts[0] has 9 tokens and max_prompt_tokens=5"),
        (([[3]], [[61]]), {}, "responses[0]: token id 61 is out of range; allowed: 0 to 60"),
        (([[3]], [[3]]), {"truncated": [True, False]}, "truncated has 2 entries"),
        (
            ([[3]], [[3]]),
            {"weights": {"token": float("nan")}},
            "the weight of 'token' is nan; it (weights=) must be finite",
        ),
        (([[3]], [[3]]), {"weights": {"token": [np.inf]}}, "the weight of 'token' is [inf]"),
        (
            ([[3]], [[3]]),
            {"weights": {"token": "much"}},
            "the weight of 'token' is 'much'; allowed: a number, or one a text",
        ),
        (([[3]], [[3]]), {"kl_coef": -0.1}, "(kl_coef=) must be finite and 0 or more"),
        (([[3]], [[3]]), {"kl_coef": float("nan")}, "the weight of 'kl' is nan"),
        (
            ([[3], [3]], [[3], [4, 7, 5]]),
            {},
            "responses[1] holds the stop token 7 as number 2 of its 3 tokens",
        ),
        (([[3]], [[1, 1]]), {}, "responses[0] holds the stop token 1 as number 1 of its 2 tokens"),
        (
            ([[3], [3]], [[3], [4, 7]]),
            {"truncated": [True, True]},
            "truncated[1]=True, but responses[1] ends by itself",
        ),
        (
            ([[3]], [[3]]),
            {"weights": {"tokn": 1.0}},
            "weights key='tokn' is not known; allowed: kl, token",
        ),
        (("the cat", "is good"), {}, "prompts='the cat' is one text; give a list"),
        ((5, [[3]]), {}, "prompts=5 is not allowed; it must be a list."),
        (([[3]], None), {}, "responses=None is not allowed"),
        (([[3]], [[3]]), {"truncated": True}, "truncated=True is not allowed; it must be a list."),
        (([[3]], [[3]]), {"weights": [1.0]}, "weights=[1.0] is not allowed; it must map names"),
    ],
)
def test_bad_texts_give_one_clear_error(
    arguments: Any, options: dict[str, Any], message: str
) -> None:
    envs = make_vec(1)
    with pytest.raises(InvalidArgument) as error:
        envs.unwrapped.score_episodes(*arguments, **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("logprobs", "message"),
    [
        (None, "logprobs is missing"),
        ([[-1.0]], "one number for every response token"),
        (-1.0, r"logprobs=-1.0 is not allowed; it must be a list"),
        ([-1.0], "one number for every response token"),
        ([["a", "b"]], "it must hold numbers"),
        ([[-1.0, float("nan")]], "not finite"),
        ([[-1.0, float("-inf")]], "not finite"),
        (
            [[-1.0, 0.5]],
            r"logprobs\[0\] holds a number that is not finite or above 0; allowed: 0 or less",
        ),
    ],
)
def test_policy_terms_need_a_log_prob_for_every_token(logprobs: Any, message: str) -> None:
    envs = make_vec(1, kl="policy")
    with pytest.raises(InvalidArgument, match=message):
        envs.unwrapped.score_episodes([[3]], [[4, 5]], logprobs=logprobs)


def test_scoring_leaves_running_episodes_alone() -> None:
    def run(scores: bool) -> list[tasks.Played]:
        envs = make_vec(3, SAME_STEP, **TOYS["mixture"])
        if scores:
            step = envs.step
            envs.step = lambda actions: (
                envs.unwrapped.score_episodes([[3]] * 9, [[4, 5]] * 9),
                step(actions),
            )[1]
        return play(envs)

    assert [e.rewards for e in run(True)] == [e.rewards for e in run(False)]
    assert TOY in tasks.gym.registry


def test_weights_are_numbers_or_one_a_text() -> None:
    envs = make_vec(2, reward="terminal")
    message = r"the weight of 'terminal' has shape \(3,\); allowed: a number, or one a text \(2\)"
    with pytest.raises(InvalidArgument, match=message):
        envs.unwrapped.score_episodes([[3], [4]], [[5], [6]], weights={"terminal": [1.0, 2.0, 3.0]})


def test_rounding_above_0_is_a_log_prob() -> None:
    envs = make_vec(1, kl="policy")
    assert np.isfinite(
        envs.unwrapped.score_episodes([[3]], [[4, 5]], logprobs=[[-1.0, 1e-4]]).step_rewards
    ).all()


def test_a_kl_coef_without_a_kl_term_is_refused() -> None:
    envs = make_vec(1, kl="none")
    with pytest.raises(
        InvalidArgument, match=r"kl_coef=0.1 has no term to weigh: this env was made with kl='none'"
    ):
        envs.unwrapped.score_episodes([[3]], [[4]], kl_coef=0.1)
    envs.unwrapped.score_episodes([[3]], [[4]])


def test_a_short_text_without_a_stop_token_counts_as_cut_where_it_ends() -> None:
    envs = make_vec(1, **TOYS["terminal"])
    for options in ({}, {"truncated": [True]}):
        paid = envs.unwrapped.score_episodes([[3]], [[4, 5]], **options).terms
        close(paid["missing_eos"][0], [0, -0.7, 0, 0, 0, 0, 0])
        assert paid["terminal"][0, 1] != 0
    withheld = make_vec(1, **TOYS["unscored"]).unwrapped.score_episodes([[3]], [[4, 5]])
    assert not withheld.terms["a"].any()


def dropping() -> Any:
    """A task whose models drop a half of everything in train mode."""
    drop = {"attention_dropout": 0.5}
    reference = fakes.causal_lm(num_hidden_layers=1, **drop)
    classifier = fakes.reward_model("sequence", num_hidden_layers=1, **drop)
    classifier.score = torch.nn.Sequential(torch.nn.Dropout(0.5), classifier.score).eval()
    task = Task(
        tokenizer=tasks.tokenizer(),
        reference=reference,
        prompts=tasks.prompts(),
        max_prompt_tokens=tasks.P,
        max_new_tokens=T,
        stop_token_ids=STOPS,
        scorer=make_scorer(classifier),
        implicit_model=fakes.causal_lm(seed=3, num_hidden_layers=1, **drop),
    )
    return task, [reference, classifier, task.implicit_model]


def test_models_in_train_mode_are_run_in_eval_mode_and_keep_their_mode() -> None:
    """Whoever trains a model between steps: its rewards are those of eval mode, by every way."""
    reward = {
        "a": "terminal",
        "b": "delta",
        "c": "implicit",
        "d": "occlusion",
        "e": "gradient",
        "f": "segment",
    }
    texts = [[3, 4]] * 3, [[5, 6, 7], [8, 9], [10] * T]

    def run(training: bool) -> tuple[Any, ...]:
        task, models = dropping()
        for model in models:
            model.train(training)
        envs = gym.make_vec("tests/Toy-v0", num_envs=3, task=task, reward=reward)
        envs.reset(seed=0)
        for model in models:
            model.train(training)
        stepped = [envs.step(np.array([5 + t, 9, 10]))[1] for t in range(4)]
        scored = envs.unwrapped.score_episodes(*texts)
        assert all(module.training == training for model in models for module in model.modules())
        return np.stack(stepped), scored.token_rewards, scored.ref_logprobs, scored.potentials

    for mine, theirs in zip(run(True), run(False), strict=True):
        close(mine, theirs)


def test_the_sums_of_thousands_of_token_scores_do_not_drift() -> None:
    """Scores that float32 rounds at every addition: by stepping, by scoring, and exactly."""
    length, payoff = 4096, np.array([0.1, 0.37, 1.03])
    automaton = Automaton(np.array([[0, 1, 2], [2, 0, 1], [1, 2, 0]]), payoff)
    task = Task(
        tokenizer=None,
        reference=Bigram(np.full((4, 3), 1 / 3)),
        prompts=[[0]],
        max_prompt_tokens=1,
        max_new_tokens=length,
        stop_token_ids=(),
        scorer=Scorer(automaton, automaton.score, per_token=True),
    )
    envs = TokenVectorEnv(
        1,
        task=task,
        autoreset_mode=SAME_STEP,
        kl="none",
        reward={"a": "token", "b": "delta", "c": "terminal"},
    )
    envs.reset(seed=0)
    texts = np.random.default_rng(0).integers(3, size=(length, 1))
    steps = [envs.step(tokens) for tokens in texts]
    whole = envs.score_episodes([[0]], [texts[:, 0].tolist()])
    assert whole.score is not None
    state, each = 0, []
    for token in texts[:, 0]:
        state = automaton.transitions[state, token]
        each.append(np.float32(payoff[state]).astype(float))
    np.testing.assert_allclose([steps[-1][4]["score"][0], whole.score[0]], sum(each), rtol=1e-7)
    for name, values in whole.terms.items():
        stepped = np.array([info["reward_terms"][name][0] for *_, info in steps])
        np.testing.assert_allclose(stepped, values[0], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(values[0, :-1], 0.0 if name == "c" else each[:-1], atol=1e-6)


@pytest.mark.parametrize(("at_once", "forwards"), [(10_000, 1), (12, 4)])
def test_a_forward_on_a_cpu_stays_small(at_once, forwards, monkeypatch):
    """Whatever `max_batch_tokens` allows, and the rewards are the same."""
    monkeypatch.setattr(scoring, "CPU_TOKENS", at_once)
    walked, walk = [], scoring.walk_texts
    monkeypatch.setattr(
        scoring, "walk_texts", lambda *args: walked.append(len(args[1].ids)) or walk(*args)
    )
    envs = make_vec(1, reward="token")
    scores = envs.unwrapped.score_episodes([[5, 6]] * 8, [[8, 8, 8, 8]] * 8)
    assert walked == [8 // forwards] * forwards
    close(scores.token_rewards, np.tile(scores.token_rewards[0], (8, 1)))


@pytest.mark.parametrize(("forward_tokens", "expected"), [(2, [4, 4]), (100, [8])])
def test_short_texts_are_not_padded_to_long_ones_on_a_cpu(forward_tokens, expected, monkeypatch):
    """Where that spares more than another forward costs, and the rewards are the same."""
    monkeypatch.setattr(scoring, "CPU_FORWARD_TOKENS", forward_tokens)
    walked, walk = [], scoring.walk_texts
    monkeypatch.setattr(
        scoring, "walk_texts", lambda *args: walked.append(len(args[1].ids)) or walk(*args)
    )
    envs = make_vec(1, reward="token")
    scores = envs.unwrapped.score_episodes([[5, 6]] * 8, [[8], [8, 8, 8, 8]] * 4)
    assert walked == expected
    close(scores.token_rewards[::2], np.tile(scores.token_rewards[0], (4, 1)))
    close(scores.token_rewards[1::2], np.tile(scores.token_rewards[1], (4, 1)))
    close(scores.token_rewards[0, 0], scores.token_rewards[1, 0])
