"""Reward designs written outside the package: a class each, nothing else touched."""

import dataclasses

import numpy as np
import pytest
import torch
from fakes import causal_lm
from tasks import toy

from tokenenv import FinishedTexts, RewardTerm, States, Transitions
from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.errors import InvalidArgument
from tokenenv.models.heads import lm_head, token_logprobs


class LogRatio(RewardTerm):
    """A causal term with a model of its own: log p_other - log pi_ref of each token."""

    name = "log_ratio"
    needs = frozenset({"reference"})

    def __init__(self, model):
        self.models = (model,)
        self._head = lm_head(model)

    def reward(self, batch: Transitions):
        logprob = token_logprobs(batch.before.of(self.models[0]), batch.tokens, self._head)
        return logprob - batch.ref_logprob


class Shaping(RewardTerm):
    """A potential-based term on the reference's own states: no second trunk is run for it."""

    name = "shaping"
    has_potential = True

    def bind(self, context):
        super().bind(context)
        self.models = (context.reference,)

    def potential(self, states: States):
        return states.of(self.models[0]).mean(-1)

    def reward(self, batch: Transitions):
        after = torch.where(batch.scored, 0.0, self.potential(batch.after))
        return after - self.potential(batch.before)


class LastThird(RewardTerm):
    """A hindsight term: the score on the last third of the tokens."""

    name = "last_third"
    kind = "hindsight"
    needs = frozenset({"scorer"})
    pays_score = True

    def place(self, texts: FinishedTexts, max_new_tokens):
        late = torch.zeros(len(texts.ids), max_new_tokens)
        for row, count in enumerate(texts.length - texts.prompt_length):
            late[row, count - -(-count // 3) : count] = 1.0
        return late * (texts.score / late.sum(1))[:, None]


def roll_out(env, steps=40):
    """Finished episodes as (prompt, response, step rewards, token rewards)."""
    obs, _ = env.reset(seed=1)
    rng, running, episodes = np.random.default_rng(0), [([], []) for _ in range(env.num_envs)], []
    for _ in range(steps):
        actions, before = rng.integers(0, env.token_spec.vocab_size, env.num_envs), obs
        obs, rewards, terminations, truncations, infos = env.step(actions)
        for i, (tokens, paid) in enumerate(running):
            tokens.append(int(actions[i]))
            paid.append(float(rewards[i]))
            if terminations[i] or truncations[i]:
                prompt = before["tokens"][i, : before["prompt_length"][i]]
                episodes.append((prompt, tokens, paid, infos["token_rewards"][i]))
                running[i] = ([], [])
    return episodes


@pytest.mark.parametrize("make", [lambda: LogRatio(causal_lm(seed=5)), Shaping, LastThird])
def test_stepping_pays_what_scoring_says(make):
    env = TokenVectorEnv(6, task=toy(), reward=make(), kl_coef=0.1, autoreset_mode="SameStep")
    episodes = roll_out(env)
    assert len(episodes) > 10
    scores = env.score_episodes([e[0] for e in episodes], [e[1] for e in episodes])
    for row, (_, tokens, paid, placed) in enumerate(episodes):
        np.testing.assert_allclose(scores.step_rewards[row, : len(tokens)], paid, atol=1e-4)
        np.testing.assert_allclose(scores.token_rewards[row], placed, atol=1e-4)
        np.testing.assert_allclose(placed.sum(), sum(paid), atol=1e-4)


def test_a_term_on_the_references_trunk_costs_no_second_forward():
    plain = TokenVectorEnv(2, task=toy())
    shaped = TokenVectorEnv(2, task=toy(), reward={"token": "token", "shaping": Shaping()})
    assert shaped.cache_bytes == plain.cache_bytes


def test_the_potential_is_reported_and_zero_where_learners_do_not_bootstrap():
    env = TokenVectorEnv(4, task=toy(), reward=Shaping(), autoreset_mode="Disabled")
    _, info = env.reset(seed=0)
    assert (info["potential"] != 0).all()
    stop = env.token_spec.stop_token_ids[0]
    _, _, terminations, _, info = env.step(np.array([stop, 3, stop, 3]))
    assert terminations.tolist() == [True, False, True, False]
    assert ((info["potential"] == 0) == terminations).all()


class Mistaken(RewardTerm):
    """Pays what it is told to, with attributes as it is told."""

    name = "mistaken"

    def __init__(self, pay=None, **attributes):
        self._pay = pay
        vars(self).update(attributes)

    def remember(self, memory, tokens, states):
        return torch.zeros(len(tokens))

    def reward(self, batch: Transitions):
        return self._pay(batch)

    def place(self, texts, max_new_tokens):
        return self._pay(texts)


@pytest.mark.parametrize("option", ["reward", "watch"])
@pytest.mark.parametrize(
    ("term", "message"),
    [
        (Mistaken(kind="causual"), "the term 'mine': kind='causual' is not known.*'causal'"),
        (
            Mistaken(needs=frozenset({"tokeniser"})),
            "the term 'mine': needs='tokeniser' is not known.*'tokenizer'",
        ),
        (
            Mistaken(lambda batch: batch.before.memory["mine"]),
            r"the term 'mine' defines remember\(\) and has_memory is False",
        ),
        (Mistaken(lambda batch: 1.0), r"reward\(\) of the term 'mine' returned 1.0"),
        (
            Mistaken(lambda batch: torch.zeros(len(batch.tokens), 2)),
            r"'mine' returned shape \(2, 2\); it must return a tensor of shape \(2,\)",
        ),
        (
            Mistaken(lambda texts: torch.zeros(3), kind="hindsight"),
            r"place\(\) of the term 'mine' returned shape \(3,\)",
        ),
    ],
    ids=["kind", "needs", "memory", "a number", "a shape", "a place"],
)
def test_a_mistake_in_a_term_is_said_with_its_name(option, term, message):
    def end_two_texts():
        env = TokenVectorEnv(2, task=toy(), **{"reward": {}, option: {"mine": term}})
        env.reset(seed=0)
        env.step(np.full(2, env.token_spec.stop_token_ids[0]))

    with pytest.raises(InvalidArgument, match=message):
        end_two_texts()


def test_a_key_that_a_term_lacks_itself_stays_a_key_error():
    env = TokenVectorEnv(2, task=toy(), reward=Mistaken(lambda batch: {}["other"]))
    env.reset(seed=0)
    with pytest.raises(KeyError, match="other"):
        env.step(np.zeros(2, dtype=np.int64))


def test_a_gold_that_cannot_be_called_is_refused_before_a_text_ends():
    with pytest.raises(InvalidArgument, match="gold='mine:gold' must be a function"):
        TokenVectorEnv(2, task=dataclasses.replace(toy(), gold="mine:gold"))
