"""The segment reward: where it cuts, what it adds up to, and what it is in an env."""

import math

import numpy as np
import pytest
import torch
from fakes import VOCAB_SIZE
from hypothesis import given
from hypothesis import strategies as st
from tasks import assert_equal, copied, make_vec, play, random_actions, reference

from tokenenv.errors import InvalidArgument
from tokenenv.models.heads import lm_head
from tokenenv.models.trunks import text_states
from tokenenv.rewards.seen import States, Transitions
from tokenenv.rewards.segment import Segment
from tokenenv.rewards.shaping import Delta
from tokenenv.rewards.term import Context
from tokenenv.rewards.terminal import Terminal
from tokenenv.types import Scorer, Task, TokenSpec

V = 4
TOY_THRESHOLD = 3.4


class Logits:
    """A reference whose states are its logits."""

    slots = None

    @staticmethod
    def head(states):
        return states


REFERENCE = Logits()
numbers = st.floats(-5, 5, width=32)
texts = st.lists(
    st.tuples(numbers, st.lists(numbers, min_size=V, max_size=V)), min_size=2, max_size=8
)
"""The score and the reference's logits after the prompt, and after each token."""


def parts(*, reference=REFERENCE, causal=True):
    scorer = Scorer(REFERENCE, lambda states: states[:, 0], False) if causal else None
    task = Task(
        tokenizer=None,
        reference=reference,
        prompts=[],
        max_prompt_tokens=1,
        max_new_tokens=8,
        stop_token_ids=(1,),
        scorer=scorer,
    )
    return Context(TokenSpec(None, V, 0, (1,), 1, 8), task, torch.device("cpu"), 0.1)


def bound(threshold):
    term = Segment(threshold)
    term.bind(parts())
    return term


def walked(term, text, scored=True):
    """The transitions of one text whose end is scored or not, with the memories carried along
    it."""
    score, logits = torch.tensor([s for s, _ in text]), torch.tensor([row for _, row in text])
    steps = torch.arange(len(text))
    states = States({REFERENCE: logits}, steps, score)
    memory = [term.remember(None, steps[:1], states.at(steps[:1]))]
    for t in range(1, len(text)):
        memory.append(term.remember(memory[-1], steps[t : t + 1], states.at(steps[t : t + 1])))
    states.memory = {term.name: torch.cat(memory)}
    before, after = states.at(steps[:-1]), states.at(steps[1:])
    last = steps[1:] == len(text) - 1
    return Transitions(steps[1:], before, after, last & scored, last & (not scored), last & scored)


def entropies(text):
    return torch.distributions.Categorical(logits=torch.tensor([row for _, row in text])).entropy()


@given(texts, st.floats(0, math.log(V)))
def test_it_adds_up_to_the_score_less_the_prompts_and_pays_at_cuts_alone(text, threshold):
    batch = walked(bound(threshold), text)
    paid = bound(threshold).reward(batch)
    torch.testing.assert_close(
        paid.sum(), batch.after.score[-1] - batch.before.score[0], atol=1e-4, rtol=0
    )
    inside = (entropies(text)[1:] < threshold - 1e-5) & ~batch.scored
    assert (paid[inside] == 0).all()


@given(texts, st.floats(0, math.log(V)))
def test_each_segment_is_paid_for_what_it_added(text, threshold):
    """The sum up to a cut is the score there less the prompt's."""
    batch = walked(bound(threshold), text)
    sums = bound(threshold).reward(batch).cumsum(0)
    cuts = (entropies(text)[1:] > threshold + 1e-5) | batch.scored
    torch.testing.assert_close(
        sums[cuts], (batch.after.score - batch.before.score[0])[cuts], atol=1e-4, rtol=0
    )


@given(texts)
def test_threshold_0_is_delta_and_inf_is_terminal_less_the_prompts_score(text):
    batch = walked(bound(0), text)
    torch.testing.assert_close(bound(0).reward(batch), Delta().reward(batch), atol=1e-6, rtol=0)
    batch = walked(bound(math.inf), text)
    paid = bound(math.inf).reward(batch)
    expected = Terminal().reward(batch) - torch.where(batch.scored, batch.before.score[0], 0.0)
    torch.testing.assert_close(paid, expected, atol=1e-6, rtol=0)


@given(texts, st.floats(0, math.log(V)))
def test_an_unscored_truncation_cuts_nothing_and_keeps_the_potential(text, threshold):
    term = bound(threshold)
    batch = walked(term, text, scored=False)
    kept = term.potential(batch.after)[-1] - term.potential(batch.before)[0]
    torch.testing.assert_close(term.reward(batch).sum(), kept, atol=1e-4, rtol=0)
    expected = float(batch.before.score[0])
    for value, entropy in zip(batch.after.score, entropies(text)[1:], strict=True):
        if abs(entropy - threshold) < 1e-5:
            return
        expected = float(value) if entropy > threshold else expected
    assert float(term.potential(batch.after)[-1]) == expected


def test_a_certain_reference_has_no_entropy_and_is_still_cut_at_threshold_0():
    certain = [[0.0, -torch.inf, -torch.inf, -torch.inf], [1000.0, 0.0, 0.0, 0.0]]
    text = [(float(t), certain[t % 2]) for t in range(5)]
    assert bound(0).reward(walked(bound(0), text)).tolist() == [1.0, 1.0, 1.0, 1.0]
    assert bound(1e-9).reward(walked(bound(1e-9), text)).tolist() == [0.0, 0.0, 0.0, 4.0]


@pytest.mark.parametrize(
    ("threshold", "lacking", "message"),
    [
        (-0.1, {}, r"threshold=-0.1 is not allowed; it must be 0 or more \(nats\)"),
        (math.nan, {}, "threshold=nan is not allowed"),
        (1.0, {"causal": False}, "reward='segment' needs a reward model that scores prefixes"),
        (1.0, {"reference": None}, "reward='segment' needs a reference"),
    ],
)
def test_what_is_wrong_is_named(threshold, lacking, message):
    with pytest.raises(InvalidArgument, match=message):
        Segment(threshold).bind(parts(**lacking))


# ------------------------------------------------------------------ in an env


def make(threshold, num_envs=4, **options):
    return make_vec(
        num_envs, "SameStep", reward=Segment(threshold), kl="none", scorer="sequence", **options
    )


@pytest.mark.parametrize("score_truncated", [True, False])
def test_stepping_pays_what_scoring_says(score_truncated):
    envs = make(TOY_THRESHOLD, score_truncated=score_truncated)
    episodes = play(envs, steps=40)
    ended = {"truncated": [e.truncated for e in episodes]}
    scores = envs.unwrapped.score_episodes(
        [e.prompt for e in episodes], [e.response for e in episodes], **ended
    )
    for row, episode in enumerate(episodes):
        np.testing.assert_allclose(
            scores.step_rewards[row, : len(episode.rewards)], episode.rewards, atol=1e-5, rtol=1e-5
        )
    paid = np.concatenate([e.rewards for e in episodes])
    assert 0.2 < (paid == 0).mean() < 0.8


def test_an_env_cuts_where_the_references_entropy_says():
    head = lm_head(reference())
    for episode in play(make(TOY_THRESHOLD), steps=20):
        text = [*episode.prompt, *episode.response]
        with torch.no_grad():
            states = text_states(reference(), torch.tensor([text]), [len(text)])[
                0, len(episode.prompt) :
            ]
            entropy = torch.distributions.Categorical(logits=head(states)).entropy()
        np.testing.assert_array_equal(
            np.array(episode.rewards[:-1]) != 0, entropy[:-1] > TOY_THRESHOLD
        )


def test_the_extreme_thresholds_are_delta_and_a_terminal_reward():
    delta = make_vec(4, "SameStep", reward="delta", kl="none", scorer="sequence")
    for each, late, other in zip(
        play(make(0.0)), play(make(math.log(VOCAB_SIZE) + 1)), play(delta), strict=True
    ):
        np.testing.assert_allclose(each.rewards, other.rewards, atol=1e-6)
        assert not any(late.rewards[:-1])
        np.testing.assert_allclose(late.rewards[-1], sum(other.rewards), atol=1e-5)


def test_saved_texts_go_on_from_their_last_cut():
    envs, rng = make(TOY_THRESHOLD), np.random.default_rng(1)
    envs.reset(seed=3)
    for _ in range(3):
        envs.step(random_actions(rng, envs, stop=0.0))
    other = make(TOY_THRESHOLD)
    other.unwrapped.load_state(envs.unwrapped.save_state())
    for _ in range(8):
        actions = random_actions(rng, envs)
        assert_equal(
            *(copied(dict(enumerate(env.step(actions)[:4]))) for env in (envs, other)),
            tolerance=1e-5,
        )
