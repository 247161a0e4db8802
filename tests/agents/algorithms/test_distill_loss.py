"""KL(pi_T || pi) over the vocabulary as a loss: its gradient against the exact one, by enumeration
and in texts that others write into; whatever writes the texts; and what is refused."""

import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import tasks
import torch
from dialogue_world import DialogueWorld
from dialogues import NOISES
from fake_vllm import FakeServer
from gradients import Case, cosine, found_gradient
from gymnasium.vector import AutoresetMode
from tabular import STOP, World, to_go
from torch import Tensor
from toy_env import ToyEnv, tiny_lm

from tokenenv.agents import GRPO, KLQ, PPO, RLOO, LMPolicy
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning.token_stats import token_stats
from tokenenv.agents.rollout import text_collector
from tokenenv.envs.automata.teacher import OptimalPolicy
from tokenenv.errors import InvalidArgument

COEF, EXACT = 0.7, 0.999
PLAIN = {"lambda_actor": 1.0, "whiten": False, "scale_rewards": False}
ALONE: dict[str, Any] = {"reward": {}, "kl": "none"}
"""An env that pays nothing: the teacher is all there is to learn from."""


# ------------------------------------------------------------------------ the number


def forward_kl(teacher: Tensor, logits: Tensor) -> Tensor:
    """KL(pi_T || pi) (K,) of logits (K, V)."""
    return token_stats(
        logits,
        torch.zeros(len(logits), dtype=torch.int64),
        lambda x: x,
        logits.shape[1],
        teacher_states_KH=teacher,
        teacher_head=lambda x: x,
    ).teacher_kl


def test_the_forward_kl_and_its_gradient_by_hand() -> None:
    """At logits 0 the policy is uniform over three; the teacher has (1/2, 1/4, 1/4). The gradient
    by the logits is pi - pi_T."""
    logits = torch.zeros(1, 3, requires_grad=True)
    teacher = torch.tensor([[math.log(2.0), 0.0, 0.0]], requires_grad=True)
    kl = forward_kl(teacher, logits)
    torch.testing.assert_close(kl, torch.tensor([math.log(3.0) - 1.5 * math.log(2.0)]))
    kl.sum().backward()
    expected = torch.tensor([[1 / 3 - 1 / 2, 1 / 3 - 1 / 4, 1 / 3 - 1 / 4]])
    torch.testing.assert_close(logits.grad, expected)
    assert teacher.grad is None


def test_tokens_that_the_policy_cannot_emit_are_ruled_out_for_the_teacher_too() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf]], requires_grad=True)
    kl = forward_kl(torch.tensor([[0.0, 1.0, 5.0]]), logits)
    torch.testing.assert_close(kl, torch.zeros(1))
    kl.sum().backward()
    assert logits.grad.isfinite().all()
    lacking = forward_kl(torch.tensor([[0.0, -torch.inf, 0.0]]), torch.zeros(1, 3))
    torch.testing.assert_close(lacking, torch.tensor([math.log(1.5)]))


def test_a_teacher_that_emits_nothing_of_what_is_allowed_says_nothing() -> None:
    """A mask may leave only tokens of which the teacher has none; other rows are as ever."""
    logits = torch.tensor([[0.0, 2.0, -torch.inf], [0.0, 0.0, -torch.inf]], requires_grad=True)
    teacher = torch.tensor([[-torch.inf, -torch.inf, 0.0], [math.log(3.0), 0.0, 0.0]])
    kl = forward_kl(teacher, logits)
    wanted = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    torch.testing.assert_close(kl, torch.tensor([0.0, wanted]))
    kl.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, 0, 0], [-0.25, 0.25, 0]]))


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_neither_value_nor_gradient_depends_on_the_chunk(chunk: int) -> None:
    torch.manual_seed(0)
    states, weight, teacher = torch.randn(7, 4), torch.randn(5, 4), torch.randn(5, 6)
    theirs, tokens, found = torch.randn(7, 6), torch.zeros(7, dtype=torch.int64), []
    for elements in (10**6, chunk * 5):
        s, w = states.clone().requires_grad_(), weight.clone().requires_grad_()
        stats = token_stats(
            s,
            tokens,
            lambda x, w=w: x @ w.T,
            5,
            temperature=0.7,
            teacher_states_KH=theirs,
            teacher_head=lambda x: x @ teacher.T,
            chunk_elements=elements,
        )
        (stats.teacher_kl * torch.arange(7)).sum().backward()
        found.append((stats.teacher_kl, s.grad, w.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    own = (states @ weight.T / 0.7).log_softmax(-1)
    other = (theirs @ teacher.T).log_softmax(-1)
    torch.testing.assert_close(found[0][0].detach(), (other.exp() * (other - own)).sum(-1))


# ------------------------------------------------------------------------ the update


def kl_from(teacher: Tensor, world: Any, logits: Tensor) -> Tensor:
    """KL(pi_T || pi) (B, T) over the vocabulary, in the states in which the policy acts."""
    own, theirs = logits.log_softmax(-1)[world.before], teacher[world.before]
    return (theirs.exp() * (theirs - own)).sum(2) * world.mask


@pytest.mark.parametrize("stops", [(), (STOP,)])
@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_an_update_follows_the_exact_forward_kl_at_the_visited_states(
    algorithm: str, stops: tuple[int, ...]
) -> None:
    """By enumeration: beside the policy gradient, E_pi[sum_t grad KL(pi_T || pi)(s_t)]. Which
    states are visited is not differentiated."""
    world = World(1, stops)
    plain = PLAIN if algorithm == "ppo" else {"whiten": False}
    case = Case(algorithm, plain | {"distill_coef": COEF}, texts=16_000)

    def own(logits: Tensor) -> Tensor:
        return -COEF * kl_from(world.other.logprobs, world, logits).sum(1)

    without = found_gradient(Case(algorithm, plain, texts=16_000), world, "terminal", 0.0)
    found = found_gradient(case, world, "terminal", 0.0)
    nothing = torch.zeros(world.mask.shape, dtype=torch.float64)
    assert cosine((found - without).double(), world.policy_gradient(nothing, own)) > EXACT
    credit = to_go(world.rewards(per_token=False))
    if algorithm == "ppo":
        assert cosine(found.double(), world.policy_gradient(credit, own)) > EXACT


@pytest.mark.parametrize("kind", NOISES)
def test_where_somebody_answers_it_is_that_of_the_policys_words(kind: str) -> None:
    world = DialogueWorld(kind)
    teacher = OptimalPolicy(world.small.oracle, 0.3)
    world.other = teacher  # type: ignore[assignment]
    states = teacher.states(world.whole, None)
    acts = torch.arange(len(states))[:, None], world.places[:, :-1] - 1
    logprobs = torch.zeros_like(world.policy)
    logprobs[world.before] = (
        teacher.head(states[acts].flatten(0, 1)).view(*world.before.shape, -1).double()
    )

    def own(logits: Tensor) -> Tensor:
        return -COEF * kl_from(logprobs, world, logits).sum(1)

    case = Case("ppo", PLAIN | {"distill_coef": COEF}, texts=8_000)
    found = found_gradient(case, world, "terminal", 0.0).double()
    credit = to_go(world.rewards())
    assert cosine(found, world.policy_gradient(credit, own)) > EXACT
    assert cosine(found, world.policy_gradient(credit)) < EXACT - 0.05


def automaton(**options: Any) -> Any:
    given = {"max_new_tokens": 6, "autoreset_mode": "SameStep"} | ALONE | options
    return gym.make_vec("tokenenv/Negation-v0", num_envs=16, **given)


@pytest.mark.parametrize("rollout", ["step", "vllm"])
def test_with_no_reward_the_policy_goes_to_the_teacher(
    rollout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever writes the texts."""
    monkeypatch.setitem(text_collector.ENGINES, "vllm", "local_engine:LocalEngine")
    seen: list[float] = []
    envs = tasks.make_vec(6, AutoresetMode.SAME_STEP, **ALONE)
    agent = PPO(envs, distill_coef=1.0, lr=1e-2, batch_tokens=60, rollout=rollout)
    agent.learn(180, on_update=lambda metrics, _: seen.append(metrics["loss/distill"]))
    assert seen[-1] < 0.9 * seen[0]


def test_the_metric_is_the_mean_over_the_batchs_tokens() -> None:
    settings = {"epochs": 1, "minibatches": 1, "batch_tokens": 100, "max_batch_tokens": 30}
    agent = PPO(automaton(), distill_coef=0.5, **settings)
    batch = EpisodeBatch.stack(agent.collector.collect(100))
    teacher, policy = agent.envs.unwrapped.teacher, agent.policy
    theirs = teacher.states(batch.tokens_BL, None)[:, :-1].flatten(0, 1)
    own = policy.states(batch.tokens_BL, batch.length_B.numpy())[0][:, :-1].flatten(0, 1)
    with torch.no_grad():
        wanted = forward_kl(teacher.head(theirs), policy.head(own)).mean()
    assert agent.update(batch)["loss/distill"] == pytest.approx(float(wanted), rel=1e-4)


def test_under_adapters_the_frozen_base_may_be_taught_by_another_model() -> None:
    envs = ToyEnv(8, reference=tiny_lm(initializer_range=0.3), group_size=4)
    envs.teacher = tiny_lm(seed=5, initializer_range=0.3)
    before = [weight.clone() for weight in envs.teacher.parameters()]
    seen: list[float] = []
    agent = GRPO(envs, distill_coef=3.0, lora_rank=4, lr=1e-2, batch_tokens=100)
    agent.learn(800, on_update=lambda metrics, _: seen.append(metrics["loss/distill"]))
    assert seen[-1] < 0.8 * seen[0]
    assert all(map(torch.equal, before, envs.teacher.parameters()))


# ------------------------------------------------------------------------ what is refused


def test_without_a_teacher_it_is_refused_and_no_model_is_read() -> None:
    with pytest.raises(InvalidArgument, match=r"distill_coef needs a teacher, and ToyEnv has none"):
        PPO(ToyEnv(4), policy=LMPolicy(tiny_lm()), distill_coef=0.1)
    with pytest.raises(InvalidArgument, match=r"distill_coef=-0.1 is not allowed"):
        RLOO(ToyEnv(4, group_size=2), distill_coef=-0.1)
    with pytest.raises(InvalidArgument, match="KLQConfig field"):
        KLQ(automaton(), distill_coef=0.1)


def test_a_served_teacher_is_refused() -> None:
    server = FakeServer(tiny_lm())
    try:
        with pytest.raises(
            InvalidArgument, match=r"distill_coef reads .* of all tokens, and a vLLM"
        ):
            PPO(automaton(teacher=server.url), distill_coef=0.1)
    finally:
        server.stop()


def test_without_it_nothing_changes_to_the_bit() -> None:
    """The teacher is not read, and what is drawn and learned stays the same."""
    found = []
    for teacher in (None, tiny_lm(vocab_size=64)):
        agent = PPO(automaton(teacher=teacher), batch_tokens=100, distill_coef=0.0).learn(200)
        found.append(np.concatenate([w.detach().flatten() for w in agent.policy.parameters()]))
    assert (found[0] == found[1]).all()
