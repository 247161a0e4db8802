"""Whole texts: `score_episodes` pays what stepping pays, and both say what the models say."""

from typing import Any

import fakes
import numpy as np
import pytest
import tasks
import torch
from gymnasium.vector import AutoresetMode
from tasks import CASES, STOPS, TOY, TOYS, T, make_vec, play

from tokenenv.errors import InvalidArgument
from tokenenv.types import EpisodeScores

SAME_STEP = AutoresetMode.SAME_STEP
TOKEN_CASES = [case for case in CASES if case.values[1].get("observation") != "features"]


def close(actual: Any, expected: Any) -> None:
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(expected).max(initial=0.0)))


def scored(envs: Any, episodes: list[tasks.Played], **options: Any) -> EpisodeScores:
    logprobs = [e.logprobs for e in episodes] if envs.unwrapped.config.kl == "policy" else None
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
        close(values, np.stack([e.padded(row, limit) for e, row in zip(episodes, paid, strict=True)]))
    close(whole.token_rewards, np.stack([e.infos[-1]["token_rewards"] for e in episodes]))
    for name, values in whole.token_reward_terms.items():
        close(values, np.stack([e.infos[-1]["token_reward_terms"][name] for e in episodes]))
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
    close([sum(e.rewards) + start for e, start in zip(episodes, before, strict=True)], scored(envs, episodes).score)


def first_score(prompt: list[int], scorer: str) -> float:
    return 0.0 if scorer == "token" else model_score(prompt, [], scorer)


def model_score(prompt: list[int], response: list[int], kind: str) -> float:
    """The reward model's own word, by its own forward."""
    logits = tasks.reward_model(kind)(torch.tensor([prompt + response])).logits[0]
    return float(logits[len(prompt) :].sum() if kind == "token" else logits)


def test_scores_and_log_probs_are_the_models_own() -> None:
    for kind in ("token", "sequence"):
        for episode in play(make_vec(3, SAME_STEP, reward="terminal", scorer=kind), steps=12):
            # A sequence classifier's own forward looks for the pad id to find the last token.
            text = [token if token != fakes.PAD else 3 for token in episode.response]
            if text == episode.response:
                close(episode.infos[-1]["score"], model_score(episode.prompt, text, kind))
            logits = tasks.reference()(torch.tensor([episode.prompt + episode.response])).logits[0]
            taken = logits[len(episode.prompt) - 1 : -1].log_softmax(-1)[range(len(episode.response)), episode.response]
            close([info["ref_logprob"] for info in episode.infos], taken)


def test_micro_batches_change_nothing() -> None:
    envs, small = make_vec(4, SAME_STEP, **TOYS["mixture"]), make_vec(4, max_batch_tokens=1, **TOYS["mixture"])
    episodes = play(envs)
    close(scored(small, episodes).token_rewards, scored(envs, episodes).token_rewards)


def test_policy_kl_is_the_log_ratio_and_clamps() -> None:
    envs = make_vec(4, SAME_STEP, reward={}, kl="policy", kl_coef=0.5, kl_clamp=1.5)
    for episode in play(envs):
        ratio = np.array(episode.logprobs) - [info["ref_logprob"] for info in episode.infos]
        close(episode.rewards, -0.5 * ratio.clip(-1.5, 1.5))


def test_reference_and_learner_halves_make_k1() -> None:
    half, whole = (make_vec(4, SAME_STEP, reward="token", kl=kl, kl_coef=0.3) for kl in ("reference", "policy"))
    episodes = play(whole)
    again = half.unwrapped.score_episodes([e.prompt for e in episodes], [e.response for e in episodes])
    for episode, rewards in zip(episodes, again.token_rewards, strict=True):
        close(episode.rewards, rewards[: len(episode.response)] - 0.3 * np.array(episode.logprobs, np.float32))


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
        out += [(final["potential"][row], bool(final["cut"][row])) for row in np.flatnonzero(final["_cut"])]
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
    prompt, response = (tasks.tokenizer()(text)["input_ids"] for text in ("the cat", f"is good {stop}"))
    close(texts.token_rewards, envs.unwrapped.score_episodes([np.array(prompt)], [torch.tensor(response)]).token_rewards)
    assert texts.terms["missing_eos"].sum() == 0
    cut = envs.unwrapped.score_episodes([prompt], [response[:-1]])
    assert cut.terms["missing_eos"][0, len(response) - 2] == np.float32(-0.7)
    assert envs.unwrapped.score_episodes([prompt], [response[:-1]], truncated=[False]).terms["missing_eos"].sum() == 0


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
        (([[3]], [[3]]), {"weights": {"tokn": 1.0}}, "weights key='tokn' is not known; allowed: kl, token"),
        (("the cat", "is good"), {}, "prompts='the cat' is one text; give a list"),
    ],
)
def test_bad_texts_give_one_clear_error(arguments: Any, options: dict[str, Any], message: str) -> None:
    envs = make_vec(1)
    with pytest.raises(InvalidArgument) as error:
        envs.unwrapped.score_episodes(*arguments, **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("logprobs", "message"),
    [
        (None, "logprobs is missing"),
        ([[-1.0]], "one number for every response token"),
        ([[-1.0, float("nan")]], "not finite"),
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
            envs.step = lambda actions: (envs.unwrapped.score_episodes([[3]] * 9, [[4, 5]] * 9), step(actions))[1]
        return play(envs)

    assert [e.rewards for e in run(True)] == [e.rewards for e in run(False)]
    assert TOY in tasks.gym.registry


def test_weights_are_numbers_or_one_a_text() -> None:
    envs = make_vec(2, reward="terminal")
    message = r"the weight of 'terminal' has shape \(3,\); allowed: a number, or one a text \(2\)"
    with pytest.raises(InvalidArgument, match=message):
        envs.unwrapped.score_episodes([[3], [4]], [[5], [6]], weights={"terminal": [1.0, 2.0, 3.0]})
