"""The implicit reward, on every text of a small world whose optimum is computed, and in an env."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from fakes import causal_lm
from hypothesis import given
from hypothesis import strategies as st
from tasks import play, toy

from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.errors import InvalidArgument
from tokenenv.rewards.implicit import Implicit
from tokenenv.rewards.seen import States, Transitions
from tokenenv.rewards.term import Context
from tokenenv.types import Scorer, Task, TokenSpec

V, T, STOP, BETA = 3, 3, 0, 0.3
NODES = (V ** (T + 1) - 1) // (V - 1)
INNER = (NODES - 1) // V


class Tree:
    """A language model with logits of its own in each of the texts there are; text c goes on with
    token y to V c + 1 + y."""

    slots = None

    def __init__(self, logits):
        self.logits = logits

    def head(self, states):
        return self.logits[states]


class TreeWithLogprob(Tree):
    """Reads log-probs without making (K, V) of them."""

    head = None

    def logprob(self, states, tokens):
        return self.logits.log_softmax(-1)[states, tokens]


class World:
    """A random reference, a random score of every text, V* and the optimal policy, by the soft
    Bellman equation."""

    def __init__(self, seed, kind=Tree):
        generator = torch.Generator().manual_seed(seed)
        self.reference = Tree(torch.randn(INNER, V, generator=generator, dtype=torch.float64))
        self.score = torch.randn(NODES, generator=generator, dtype=torch.float64)
        self.value = self.score.clone()
        optimal = self.reference.logits.log_softmax(-1)
        for node in reversed(range(INNER)):
            optimal[node] += self.value[V * node + 1 : V * node + 1 + V] / BETA
            if node == 0 or (node - 1) % V != STOP:
                self.value[node] = BETA * optimal[node].logsumexp(0)
        self.optimum = kind(optimal)

    def texts(self):
        """Every text: tokens until a stop token or T."""
        for tokens in itertools.product(range(V), repeat=T):
            end = tokens.index(STOP) + 1 if STOP in tokens else T
            if not any(tokens[end:]):
                yield list(tokens[:end])

    def transitions(self, tokens, scored=True):
        nodes = [0]
        for token in tokens:
            nodes.append(V * nodes[-1] + 1 + token)
        before, after = (
            self.states(nodes[part], first) for part, first in ((slice(-1), 0), (slice(1, None), 1))
        )
        last = torch.arange(len(tokens)) == len(tokens) - 1
        reference = self.reference.logits.log_softmax(-1)[
            torch.tensor(nodes[:-1]), torch.tensor(tokens)
        ]
        return Transitions(
            torch.tensor(tokens),
            before,
            after,
            last,
            torch.zeros_like(last),
            last & scored,
            reference,
        )

    def states(self, nodes, first):
        at = torch.tensor(nodes)
        hidden = dict.fromkeys((self.reference, self.optimum), at)
        return States(hidden, torch.arange(first, first + len(nodes)), self.score[at])

    def parts(self, *, implicit=True, scorer=True, beta=BETA):
        task = Task(
            tokenizer=None,
            reference=self.reference,
            prompts=[],
            max_prompt_tokens=1,
            max_new_tokens=T,
            stop_token_ids=(STOP,),
            scorer=Scorer(self.reference, lambda states: self.score[states], False)
            if scorer
            else None,
            implicit_model=self.optimum if implicit else None,
        )
        return Context(TokenSpec(None, V, STOP, (STOP,), 1, T), task, torch.device("cpu"), beta)

    def bound(self, **options):
        term = Implicit(**options)
        term.bind(self.parts())
        return term


@pytest.mark.parametrize("kind", [Tree, TreeWithLogprob])
def test_the_exact_optimum_pays_each_token_its_advantage(kind):
    """r_t = V*(s_{t+1}) - V*(s_t), and so the sum is score - V*(prompt): on every text."""
    world = World(0, kind)
    texts = list(world.texts())
    assert len(texts) == 1 + 2 + 4 * V
    for tokens in texts:
        batch = world.transitions(tokens)
        paid = world.bound().reward(batch)
        values = [world.value[s.of(world.reference)] for s in (batch.before, batch.after)]
        torch.testing.assert_close(paid, values[1] - values[0], atol=1e-12, rtol=0)
        torch.testing.assert_close(
            paid.sum(), batch.after.score[-1] - world.value[0], atol=1e-12, rtol=0
        )


@given(
    coef=st.floats(-2, 2), clip=st.floats(0.01, 3), mix=st.floats(-2, 2), seed=st.integers(0, 99)
)
def test_clip_bounds_each_token_and_mix_adds_the_score_where_it_is_due(coef, clip, mix, seed):
    world = World(seed)
    for scored in (True, False):
        batch = world.transitions([1, 2, STOP], scored)
        logprob = world.optimum.logits.log_softmax(-1)[batch.before.of(world.optimum), batch.tokens]
        expected = np.clip(coef * (logprob - batch.ref_logprob).numpy(), -clip, clip)
        expected[-1] += float(mix * scored * batch.after.score[-1].float())
        np.testing.assert_allclose(
            world.bound(coef=coef, clip=clip, mix=mix).reward(batch), expected, atol=1e-12
        )


def test_coef_is_beta_unless_it_is_given():
    world = World(1)
    batch = world.transitions([1, 1, 1])
    given_model = Implicit(world.optimum)
    given_model.bind(world.parts(implicit=False))
    torch.testing.assert_close(
        world.bound(coef=2 * BETA).reward(batch), 2 * world.bound().reward(batch)
    )
    torch.testing.assert_close(given_model.reward(batch), world.bound().reward(batch))


def test_a_token_that_neither_model_has_is_worth_nothing():
    world = World(2)
    world.optimum.logits[0, 2] = world.reference.logits[0, 2] = -torch.inf
    paid = world.bound().reward(world.transitions([2, 1, STOP]))
    assert paid[0] == 0
    assert paid.isfinite().all()


@pytest.mark.parametrize(
    ("options", "parts", "message"),
    [
        (
            {},
            {"implicit": False},
            r"reward='implicit' needs a preference-tuned language model \(implicit_model=\)",
        ),
        ({"mix": 1.0}, {"scorer": False}, "reward='implicit' needs a reward model"),
        (
            {},
            {"beta": 0.0},
            r"reward='implicit' takes this env's beta, which is 0; give Implicit\(coef=",
        ),
        ({"clip": 0.0}, {}, r"clip=0.0 is not allowed; it must be more than 0"),
        ({"clip": math.nan}, {}, "clip=nan is not allowed"),
    ],
)
def test_what_is_missing_is_named(options, parts, message):
    with pytest.raises(InvalidArgument, match=message):
        Implicit(**options).bind(World(0).parts(**parts))


def test_a_score_is_needed_only_where_it_is_mixed_in():
    Implicit().bind(World(0).parts(scorer=False))
    Implicit(coef=0.0, mix=1.0).bind(World(0).parts())


def test_the_optimal_policy_of_the_reward_is_the_model_itself():
    """At the optimum the implicit reward less the KL penalty is 0 for every text, so nothing is
    left to gain."""
    world = World(4)
    for tokens in world.texts():
        batch = world.transitions(tokens)
        logprob = world.optimum.logits.log_softmax(-1)[batch.before.of(world.optimum), batch.tokens]
        penalty = BETA * (logprob - batch.ref_logprob)
        torch.testing.assert_close(
            world.bound().reward(batch) - penalty, torch.zeros(len(tokens), dtype=torch.float64)
        )


@pytest.fixture(scope="module")
def tuned():
    return causal_lm(num_hidden_layers=1, seed=5)


def test_stepping_pays_what_scoring_says_with_the_tasks_model(tuned):
    task = dataclasses.replace(toy(scorer="sequence"), implicit_model=tuned)
    envs = TokenVectorEnv(
        4, task=task, reward=Implicit(clip=0.2, mix=0.5), autoreset_mode="SameStep"
    )
    episodes = play(envs)
    assert len(episodes) > 10
    scores = envs.score_episodes([e.prompt for e in episodes], [e.response for e in episodes])
    for row, episode in enumerate(episodes):
        np.testing.assert_allclose(
            scores.step_rewards[row, : len(episode.rewards)], episode.rewards, atol=1e-5, rtol=1e-5
        )
    paid = np.concatenate(
        [[info["reward_terms"]["implicit"] for info in e.infos[:-1]] for e in episodes]
    )
    assert 0 < (np.abs(paid) == np.float32(0.2)).mean() < 1


def test_the_reference_itself_pays_nothing_and_costs_no_second_trunk():
    task = toy()
    plain = TokenVectorEnv(2, task=task)
    envs = TokenVectorEnv(
        2, task=task, reward=Implicit(task.reference, coef=1.0), autoreset_mode="SameStep"
    )
    assert envs.cache_bytes == plain.cache_bytes
    terms = [info["reward_terms"]["implicit"] for e in play(envs, steps=10) for info in e.infos]
    np.testing.assert_allclose(terms, 0.0, atol=1e-6)
