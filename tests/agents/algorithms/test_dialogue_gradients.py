"""Every algorithm's expected gradient on a small Dialogue-v0 is the exact one of J, where the
environment writes into the texts: as a function of them, and at random."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import gradients
import gymnasium as gym
import numpy as np
import pytest
import torch
from dialogue_world import DialogueWorld
from dialogues import NOISES
from gradients import CASES, Case, cosine, exact_gradient, found_gradient, grpo_gradient
from tabular import to_go
from torch import Tensor

from tokenenv.agents import ALGORITHMS, LMPolicy, VinePPO
from tokenenv.agents.episodes import Episode, EpisodeBatch
from tokenenv.agents.rollout.actor import Actor
from tokenenv.agents.rollout.collector import Collector, Prefix
from tokenenv.models.residual_lm import ResidualLM
from tokenenv.rewards.kl import ReferenceKL

EXACT, BETA, TEXTS = 0.999, 0.3, 8_000
TURNS = {
    "ppo, lambda_turn 1": Case("ppo", {"lambda_actor": 1.0, "lambda_turn": 1.0}),
    "rloo, baseline turn": Case("rloo", {"baseline": "turn"}),
}
EVERY = {name: replace(case, texts=TEXTS) for name, case in (CASES | TURNS).items()}
PPO = EVERY["ppo, lambda 1"]
each_kind = pytest.mark.parametrize("kind", NOISES)


@cache
def world_of(kind: str) -> DialogueWorld:
    return DialogueWorld(kind)


def of_case(case: Case, world: DialogueWorld, design: str, beta: float = BETA) -> float:
    """The cosine of what an update follows and of what it should follow."""
    wanted = exact_gradient(world, beta)
    if case.own:
        terms = torch.from_numpy(world.paid(reward=design).token_rewards).double()
        wanted = grpo_gradient(world, terms, beta)
    return cosine(found_gradient(case, world, design, beta), wanted)


@pytest.mark.parametrize("case", EVERY.values(), ids=EVERY)
@each_kind
def test_the_expected_gradient_is_exact(case: Case, kind: str) -> None:
    assert of_case(case, world_of(kind), "turn") > EXACT


@pytest.mark.parametrize("design", ["terminal", "delta", "oracle"])
@each_kind
def test_it_is_the_same_for_every_design_that_preserves_the_return(design: str, kind: str) -> None:
    assert of_case(PPO, world_of(kind), design) > EXACT


def test_no_algorithm_is_left_out() -> None:
    assert {case.algorithm for case in EVERY.values()} == set(ALGORITHMS) - {
        "best-of-n",
        "reference",
    }


def full_kl(world: DialogueWorld, logits: Tensor) -> Tensor:
    """KL(pi || pi_ref) over all words (B, T), in the states in which the policy acts."""
    own, other = logits.log_softmax(-1)[world.before], world.reference.logprobs[world.before]
    return (own.exp() * (own - other)).sum(2)


def k3(world: DialogueWorld, logits: Tensor) -> Tensor:
    """The estimate (B, T) of that by the policy's words, bounded as the loss bounds it."""
    log_ratio = world.logprob(world.reference.logprobs) - world.logprob(logits)
    return (torch.expm1(log_ratio) - log_ratio).clamp(max=10.0)


@pytest.mark.parametrize(("setting", "kl"), [("full_kl_coef", full_kl), ("k3_coef", k3)])
@each_kind
def test_the_kl_as_a_loss_is_that_of_the_policys_words(setting: str, kl: Any, kind: str) -> None:
    """It is differentiated in the states in which the policy acts; as ever, it does not see which
    states its words lead to."""
    world = world_of(kind)
    plain = {"lambda_actor": 1.0, "whiten": False, "scale_rewards": False}
    case = replace(PPO, settings=plain | {setting: BETA})
    found = found_gradient(case, world, "terminal", 0.0)

    def own(logits: Tensor) -> Tensor:
        return -BETA * kl(world, logits).sum(1)

    credit = to_go(world.rewards())
    assert cosine(found, world.policy_gradient(credit, own)) > EXACT
    assert cosine(found, world.policy_gradient(credit)) < EXACT - 0.05


# ----------------------------------------------------------- versions that are wrong


@each_kind
def test_a_kl_that_is_paid_on_what_is_written_is_found(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be a price on being answered."""
    world, right = world_of(kind), ReferenceKL.reward
    reference = world.small.task.reference

    def wrong(term: Any, batch: Any) -> Tensor:
        own = right(term, batch)
        for k, ((prompt, response), segments) in enumerate(
            zip(
                batch.next.texts.prompt_and_response_ids(), batch.next.texts.segments(), strict=True
            )
        ):
            written = 0 if segments[-1].own else len(segments[-1].tokens)
            text = [*prompt, *response]
            for place in range(len(text) - written, len(text)):
                own[k] += float(np.log(reference.probs[text[place - 1], text[place]]))
        return own

    monkeypatch.setattr(ReferenceKL, "reward", wrong)
    assert of_case(PPO, world, "turn") < EXACT - 0.05


@each_kind
def test_a_mask_that_counts_what_is_written_is_found(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss would move the policy in states in which it does not act."""
    world, right = world_of(kind), gradients.batch_of

    def wrong(*args: Any) -> EpisodeBatch:
        batch = right(*args)
        following = batch.tokens_BL[:, 1:]
        place_BT = batch.position_BT1[:, :-1] - 1

        def counted(values_BT: Tensor) -> Tensor:
            return torch.zeros(following.shape).scatter(1, place_BT, values_BT)

        at = world.states(batch.tokens_BL)[:, :-1], following
        return replace(
            batch,
            position_BT1=None,
            response_length_B=batch.length_B - 1,
            logprob_BT=world.policy.log_softmax(-1)[at].float(),
            ref_logprob_BT=world.reference.logprobs[at].float(),
            reward_BT=counted(batch.reward_BT),
            drawn_value_BT=None,
            potential_BT1=torch.zeros(len(following), following.shape[1] + 1),
            terms={name: counted(values) for name, values in batch.terms.items()},
        )

    assert of_case(PPO, world, "turn", 0.0) > EXACT
    monkeypatch.setattr(gradients, "batch_of", wrong)
    assert of_case(PPO, world, "turn", 0.0) < EXACT - 0.02


# ---------------------------------------------------- what stepping and agents find


@each_kind
def test_texts_that_are_stepped_are_those_that_were_enumerated(kind: str) -> None:
    """Their words, their places, who wrote them, and what is paid for each."""
    world = world_of(kind)
    options = {"reward": "turn", "kl_coef": BETA}
    scores = world.score(world.env(**options))
    envs = gym.make_vec(
        "tokenenv/Dialogue-v0",
        num_envs=32,
        autoreset_mode="SameStep",
        **world.small.options,
        **options,
    )
    collector = Collector(
        envs, Actor(LMPolicy(ResidualLM(envs.unwrapped.reference)), seed=0), seed=0
    )
    episodes = collector.collect(900)
    assert sum(len(e.written) > 0 for e in episodes) > 50
    for e in episodes:
        row = world.texts.index(e.after_prompt.tolist())
        assert e.own.tolist() == world.own[row]
        assert e.places.tolist() == world.places[row, :-1].tolist()
        assert e.score == scores.score[row]
        for found, wanted in (
            (e.reward, scores.token_rewards[row]),
            (e.ref_logprob, scores.ref_logprobs[row]),
            (e.terms["turn"], scores.token_reward_terms["turn"][row]),
        ):
            np.testing.assert_allclose(found, wanted, atol=1e-6)


def vine(**options: Any) -> VinePPO:
    envs = gym.make_vec(
        "tokenenv/Dialogue-v0",
        num_envs=300,
        autoreset_mode="SameStep",
        reward="terminal",
        kl="none",
        **options,
    )
    return VinePPO(envs, rollouts=100)


def beginnings(episodes: list[Episode], steps: Callable[[int], int]) -> list[Prefix]:
    """Each text up to the word before one of the policy's."""
    found = []
    for i, e in enumerate(episodes):
        end = e.places[steps(i)] - len(e.prompt)
        found.append(Prefix(e.prompt, e.after_prompt[:end], e.own[:end]))
    return found


def test_vine_ppos_values_are_the_exact_ones() -> None:
    """The policy is the reference, so the exact value is the oracle's where beta is so large that
    nothing but pi_ref counts."""
    agent = vine(noise=0.6)
    episodes = [e for e in agent.collector.collect(4000) if len(e.written)][:9]
    states = beginnings(episodes, lambda i: (0, 8, 15)[i % 3])
    oracle = agent.core.oracle
    obs = {key: np.zeros((9, oracle.max_length), np.int64) for key in ("tokens", "own_mask")}
    for row, state in enumerate(states):
        end = 1 + len(state.response)
        obs["tokens"][row, 1:end], obs["own_mask"][row, 1:end] = state.response, state.own
    obs["length"] = np.array([1 + len(state.response) for state in states])
    exact = oracle.value(obs | {"prompt_length": np.ones(9, np.int64)}, 1e5)
    assert np.ptp(exact) > 0.2
    errors = (np.array(agent.values(states)) - exact) * np.sqrt(100) / 0.35
    assert np.abs(errors).max() < 4
    assert np.mean(errors**2) < 2.5


def test_the_continuations_of_vine_ppo_are_answered_independently() -> None:
    """The policy says "." alone, and every answer is any mood. If continuations of one state shared
    their answers, all of them would end in the same mood."""
    agent = vine(noise=1.0, pause_mass=0.5)
    episodes = agent.collector.collect(200)[:3]
    agent.actor.temperature = 1e-6
    drawn, play_on = [], agent.collector.play_on
    agent.collector.play_on = lambda *group: drawn.extend(found := play_on(*group)) or found
    values = agent.values(beginnings(episodes, lambda i: 5 * i))
    shares = [np.mean([e.score == s for e in drawn]) for s in np.float32([0, 1 / 3, 2 / 3, 1])]
    np.testing.assert_allclose(shares, 0.25, atol=4 * (0.25 * 0.75 / 300) ** 0.5)
    np.testing.assert_allclose(values, 0.5, atol=4 * 0.373 / 10)
