"""Every design on texts that an environment writes into: nothing is paid for what it wrote, all of
it is read, and stepping equals scoring."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import fakes
import numpy as np
import pytest
import tasks
import torch
from gymnasium.vector import AutoresetMode
from memories import LastTokens
from tasks import Played, T, assert_equal, make_vec
from torch import Tensor

from tokenenv.models.heads import make_scorer
from tokenenv.models.prefix_scores import score_texts
from tokenenv.rewards import Clipped, PositionScaled, Rule, Scaled, TokenRule
from tokenenv.rewards.designs import DESIGNS
from tokenenv.rewards.distill import Distill
from tokenenv.rewards.implicit import Implicit
from tokenenv.rewards.process import FORMS, Process
from tokenenv.types import Task, TextIds

SAME_STEP = AutoresetMode.SAME_STEP
STEP_ENDS = tuple(range(3, 61, 4))


def worth(prompt: list[int], response: list[int]) -> float:
    """A number that every token of the text changes."""
    return 0.1 * len(prompt) + sum(((i + 3) * token) % 11 for i, token in enumerate(response)) / 7


class Spread:
    """A reward model that reads finished texts: a number for each token, or one for the text."""

    looks_ahead = True

    def __init__(self, per_token: bool) -> None:
        self.per_token = per_token

    def token_scores(self, texts: Sequence[TextIds], width: int) -> Tensor:
        out = torch.zeros(len(texts), width)
        for row, (prompt, response) in enumerate(texts):
            numbers = [worth(prompt, response[t:]) for t in range(len(response))]
            if self.per_token:
                out[row, : len(numbers)] = torch.tensor(numbers)
            else:
                out[row, len(numbers) - 1] = sum(numbers)
        return out


@cache
def scorers() -> dict[str, Any]:
    return {
        "token": make_scorer(fakes.reward_model("token", num_hidden_layers=1)),
        "sequence": make_scorer(fakes.reward_model("sequence", num_hidden_layers=1)),
        "finished tokens": Spread(True),
        "finished texts": Spread(False),
    }


def task(*, scores: str = "token", turns: str = "random", gold: Any = None) -> Task:
    """The toy that is answered, with all that designs need but an oracle."""
    toy = tasks.toy(turns=turns, step_ends=STEP_ENDS)
    model = fakes.causal_lm(seed=5, num_hidden_layers=1)
    return replace(toy, scorer=scorers()[scores], implicit_model=model, teacher=model, gold=gold)


def make(reward: Any, **options: Any) -> Any:
    return make_vec(4, SAME_STEP, task=task, reward=reward, **options)


@cache
def played(turns: str = "random", **options: Any) -> list[Played]:
    """Texts that were written into, with what the KL was paid for them."""
    return tasks.play(make({}, turns=turns, **options), steps=24, stop=0.1)


def scored(envs: Any, episodes: list[Played]) -> Any:
    return envs.unwrapped.score_episodes(
        [e.prompt for e in episodes],
        [e.response for e in episodes],
        own=[e.own for e in episodes],
        truncated=[e.truncated for e in episodes],
        turn_rewards=[[info["turn_reward"] for info in e.infos] for e in episodes],
    )


def stacked(episodes: list[Played]) -> tuple[np.ndarray, np.ndarray]:
    """What was placed on the columns of each text, and what was paid."""
    placed = np.stack([e.infos[-1]["token_rewards"] for e in episodes])
    return placed, np.stack([e.padded(e.rewards, T) for e in episodes])


def test_the_texts_are_written_into_everywhere() -> None:
    """What the other tests rely on: replies in the middle, at the end, two in one text, and stop
    tokens among them."""
    episodes = played()
    replies = [np.diff([1, *e.own, 1]) for e in episodes]
    assert sum((cuts == -1).sum() > 1 for cuts in replies) >= 3
    assert sum(not e.own[-1] for e in episodes) >= 2
    assert sum(all(e.own) for e in episodes) >= 1
    stops = [token in tasks.STOPS for e in episodes for token in e.response[:-1]]
    assert sum(stops) >= 2


REWARDS: dict[str, Any] = {name: name for name in DESIGNS if name not in ("oracle", "progressive")}
REWARDS |= {f"process {form}": Process(form) for form in FORMS}
REWARDS |= {
    "implicit": Implicit(coef=0.1),
    "distill": Distill(coef=0.1, first=0.5, last=0.2),
    "scaled": Scaled("uniform"),
    "by position": PositionScaled("token"),
    "clipped": Clipped("occlusion", -0.1, 0.1),
    "rule": Rule(worth, on="tokens"),
    "dense rule": Rule(worth, on="tokens", dense=True),
    "token rule": TokenRule(lambda p, r: [float(token % 5) for token in r], on="tokens"),
    "memory": LastTokens(),
    "mixture": {"dense": ("token", 0.3), "shares": ("uniform", 0.7), "shaped": "delta"},
}
READ_TEXTS = ("uniform", "occlusion", "shapley", "delta", "segment", "process min", "turn")
CASES = [
    *((name, "token") for name in REWARDS),
    *((name, "sequence") for name in READ_TEXTS),
    *((name, "finished tokens") for name in ("token", "occlusion", "terminal")),
    *((name, "finished texts") for name in ("uniform", "shapley", "terminal")),
]


@pytest.mark.filterwarnings("ignore:reward='gradient':RuntimeWarning")
@pytest.mark.parametrize(("reward", "scores"), CASES)
def test_a_design_steps_as_it_scores_and_pays_own_tokens_alone(reward: str, scores: str) -> None:
    envs = make(REWARDS[reward], scores=scores, kl="none")
    episodes = tasks.play(envs, steps=24, stop=0.1)
    placed, paid = stacked(episodes)
    columns = np.arange(T) < np.array([[sum(e.own)] for e in episodes])
    assert not placed[~columns].any()
    assert np.abs(placed).max() > 0
    assert_equal(placed.sum(1), paid.sum(1), 1e-5)
    if envs.unwrapped.save_statistics():
        return  # later texts are scored with what was learned from earlier ones
    said = scored(envs, episodes)
    # An integral adds up slopes of both signs: its rounding is relative to them.
    size = np.abs(placed).sum(1, keepdims=True).clip(1.0) if reward == "gradient" else 1.0
    assert_equal(said.token_rewards / size, placed / size, 1e-5)
    assert_equal(said.step_rewards / size, paid / size, 1e-5)


@pytest.mark.parametrize(("reward", "name"), [("scaled", "uniform"), ("by position", "token")])
def test_statistics_are_learned_from_own_tokens_alone(reward: str, name: str) -> None:
    envs = make(REWARDS[reward], kl="none")
    episodes = tasks.play(envs, steps=24, stop=0.1)
    count = envs.unwrapped.save_statistics()[name][0].sum()
    # A hindsight term learns where texts end, a causal one with every step.
    assert count == (sum(len(e.rewards) for e in episodes) if reward == "scaled" else 24 * 4)


SUMS = {
    "uniform": ("token", "sequence", "finished tokens", "finished texts"),
    "attention": ("token", "sequence"),
    "gradient": ("token", "sequence"),
    "occlusion": ("token", "sequence", "finished tokens", "finished texts"),
    "terminal": ("token", "sequence", "finished tokens", "finished texts"),
    "token": ("token", "finished tokens"),
}


@pytest.mark.filterwarnings("ignore:reward='gradient':RuntimeWarning")
@pytest.mark.parametrize(("reward", "scores"), [(r, s) for r in SUMS for s in SUMS[r]])
def test_what_is_placed_adds_up_to_the_score_of_the_text(reward: str, scores: str) -> None:
    episodes, envs = played(), make(reward, scores=scores, kl="none")
    said = scored(envs, episodes)
    expected = [score_of(scores, e) for e in episodes]
    np.testing.assert_allclose(said.score, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(said.token_rewards.sum(1), expected, rtol=1e-4, atol=1e-4)


def score_of(scores: str, episode: Played) -> float:
    """The score of one text, from one forward of all of it."""
    scorer, own = scorers()[scores], np.array(episode.own)
    if scores.startswith("finished"):
        numbers = scorer.token_scores([(episode.prompt, episode.response)], len(own))[0].numpy()
        return float(numbers[own].sum() if scorer.per_token else numbers.sum())
    ids = torch.tensor([episode.prompt + episode.response])
    values = scorer.head(scorer.model(input_ids=ids)[0][0, len(episode.prompt) :]).numpy()
    return float(values[own].sum() if scorer.per_token else values[-1])


# -------------------------------------------------------------------- the KL


def test_the_kl_is_of_own_tokens_alone() -> None:
    """Each is paid beta log pi_ref, given all that stands before it, whoever wrote that."""
    beta = 0.05
    for episode in played(kl_coef=beta):
        ids = torch.tensor([episode.prompt + episode.response])
        logprobs = tasks.reference()(input_ids=ids).logits[0].log_softmax(-1)
        given = logprobs[len(episode.prompt) - 1 : -1]
        each = given.gather(1, ids[0, len(episode.prompt) :, None])[:, 0].numpy()
        expected = beta * each[np.array(episode.own)]
        np.testing.assert_allclose(episode.rewards, expected, atol=1e-5)
        for name in ("ref_logprob", "kl_coef"):
            values = [info[name] for info in episode.infos]
            wanted = expected / beta if name == "ref_logprob" else [beta] * len(values)
            np.testing.assert_allclose(values, wanted, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(
            episode.infos[-1]["token_rewards"][: len(expected)], expected, atol=1e-5
        )


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_every_estimator_is_of_own_tokens_alone(estimator: str) -> None:
    envs = make({}, kl="policy", kl_coef=0.1, kl_estimator=estimator)
    episodes = tasks.play(envs, steps=24, stop=0.1)
    for episode in episodes:
        ratio = np.array([info["ref_logprob"] for info in episode.infos]) - episode.logprobs
        each = {"k1": -ratio, "k2": ratio**2 / 2, "k3": np.exp(ratio) - 1 - ratio}[estimator]
        np.testing.assert_allclose(episode.rewards, -0.1 * each, rtol=1e-4, atol=1e-5)
    said = envs.unwrapped.score_episodes(
        [e.prompt for e in episodes],
        [e.response for e in episodes],
        own=[e.own for e in episodes],
        logprobs=[e.logprobs for e in episodes],
        truncated=[e.truncated for e in episodes],
    )
    assert_equal(said.step_rewards, stacked(episodes)[1], 1e-4)


# ------------------------------------------------- what is read of the replies


@pytest.mark.parametrize("kind", ["sequence", "rule"])
def test_a_potential_is_that_of_the_text_with_the_reply(kind: str) -> None:
    def phi(prompt: list[int], response: list[int]) -> float:
        if kind == "rule":
            return worth(prompt, response)
        return float(score_texts(scorers()["sequence"], [(prompt, response)]))

    reward = Rule(worth, on="tokens", dense=True) if kind == "rule" else "delta"
    envs = make(reward, scores="sequence", kl="none")
    rng = np.random.default_rng(0)
    envs.reset(seed=0)
    replied = 0
    before = [phi(p, []) for p in prompts_of(envs)]
    for _ in range(16):
        _, rewards, terminated, truncated, infos = envs.step(tasks.random_actions(rng, envs, 0.1))
        ended = terminated | truncated
        now = [
            phi(prompt, [token for segment in segments for token in segment.tokens])
            for prompt, segments in zip(prompts_of(envs), envs.unwrapped.segments(), strict=True)
        ]
        np.testing.assert_allclose(infos["potential"], now, rtol=1e-5, atol=1e-5)
        change = np.subtract(now, before)
        np.testing.assert_allclose(rewards[~ended], change[~ended], rtol=1e-4, atol=1e-5)
        replied += sum(bool(s) and not s[-1].own for s in envs.unwrapped.segments())
        before = now
    assert replied >= 8


def prompts_of(envs: Any) -> list[list[int]]:
    texts = envs.unwrapped._texts
    spans = zip(texts.tokens, texts.prompt_length, strict=True)
    return [row[:length].tolist() for row, length in spans]


@pytest.mark.parametrize("reward", ["uniform", "occlusion", "shapley", "delta", "dense rule"])
def test_a_prefix_earns_nothing_whoever_wrote_it(reward: str) -> None:
    envs = make(REWARDS[reward], kl="none")
    prefixes, own = [[20, 21, 22], [23, 24]], [[True, False, True], [False, False]]
    given = {"prefixes": [*prefixes, None, None], "prefix_own": [*own, None, None]}
    envs.reset(seed=0, options=given)
    taken, total = np.array([2, 0, 0, 0]), np.zeros(4)
    rng, going = np.random.default_rng(0), np.ones(4, bool)
    for _ in range(T):
        _, rewards, terminated, truncated, infos = envs.step(tasks.random_actions(rng, envs, 0.0))
        total += rewards
        for row in np.flatnonzero((terminated | truncated) & going):
            placed = infos["token_rewards"][row]
            assert not placed[: taken[row]].any()
            np.testing.assert_allclose(placed.sum(), total[row], atol=1e-5)
        going &= ~(terminated | truncated)
    assert not going.any()
