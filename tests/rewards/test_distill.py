"""Distillation of a teacher as a reward: with both halves of the KL term it is the reverse KL to
the teacher, on every text of a small world; and what bounds, masks and refuses."""

import copy
import dataclasses
import math
from typing import Any

import fakes
import gymnasium as gym
import numpy as np
import pytest
import tasks
import torch
from fake_vllm import FakeServer
from gymnasium.vector import AutoresetMode
from tabular import BETA, NUM_HISTORIES, Tabular, V, World, relative_error, to_go, worlds
from torch import Tensor

from tokenenv.agents.learning.advantages import kl_penalised
from tokenenv.errors import InvalidArgument, ModelError
from tokenenv.rewards.distill import CLIP, Distill, share_of

HOLDS, BROKEN = 1e-5, 0.1
each_world = pytest.mark.parametrize("world", worlds(), ids=lambda world: f"seed{world.seed}")


def paid_by_env(world: World, term: Any = None, kl: str = "reference", **options: Any) -> Tensor:
    """What an env with beta = `BETA` pays for each token of all texts, (B, T) float64."""
    envs = world.env(reward=term or Distill(world.other), kl=kl, kl_coef=BETA, **options)
    rows = zip(world.logprob(world.policy), world.length, strict=True)
    logprobs = [row[:length].tolist() for row, length in rows] if kl == "policy" else None
    return torch.from_numpy(world.score(envs, logprobs=logprobs).token_rewards).double()


def with_learners_half(world: World, rewards: Tensor) -> Tensor:
    return kl_penalised(rewards, world.logprob(world.policy), torch.full((len(rewards),), BETA))


def reverse_kl_gradient(world: World) -> Tensor:
    """Of -beta KL(pi || pi_T), by differentiating it over all texts."""
    teacher = world.logprob(world.other.logprobs).sum(1)
    return world.gradient_of_mean(lambda logprob: -BETA * (logprob.sum(1) - teacher))


# ------------------------------------------------------------------------ the identity


@each_world
def test_with_the_learners_half_each_token_is_paid_minus_beta_k1_to_the_teacher(
    world: World,
) -> None:
    k1 = world.logprob(world.policy) - world.logprob(world.other.logprobs)
    found = with_learners_half(world, paid_by_env(world))
    torch.testing.assert_close(found, -BETA * k1, rtol=0, atol=1e-6)


@each_world
def test_where_the_env_pays_the_whole_kl_the_rewards_alone_are_that(world: World) -> None:
    k1 = world.logprob(world.policy) - world.logprob(world.other.logprobs)
    torch.testing.assert_close(paid_by_env(world, kl="policy"), -BETA * k1, rtol=0, atol=1e-6)


@each_world
def test_the_exact_gradient_is_that_of_the_reverse_kl_and_the_envs_half_alone_is_not(
    world: World,
) -> None:
    half, exact = paid_by_env(world), reverse_kl_gradient(world)
    both = with_learners_half(world, half)
    assert relative_error(world.policy_gradient(to_go(both)), exact) < HOLDS
    assert relative_error(world.policy_gradient(to_go(half)), exact) > BROKEN


@each_world
def test_no_direction_leads_up_from_the_teacher(world: World) -> None:
    there = copy.copy(world)
    there.policy = world.other.logprobs
    found = with_learners_half(there, paid_by_env(there))
    assert there.policy_gradient(to_go(found)).abs().max() < 1e-6
    assert reverse_kl_gradient(world).abs().max() > 0.01


@each_world
@pytest.mark.parametrize("share", [0.5, 2.0])
def test_another_coef_leads_to_a_power_of_the_ratio_over_whole_texts(
    world: World, share: float
) -> None:
    """pi_ref (pi_T / pi_ref)^(coef / beta), normalised: between the two, or beyond the teacher."""
    reference, teacher = (world.logprob(model.logprobs) for model in (world.reference, world.other))
    weight = (reference + share * (teacher - reference)).sum(1).exp()
    mass = torch.zeros(NUM_HISTORIES, V, dtype=torch.float64)
    mass.index_put_((world.before, world.tokens), weight[:, None] * world.mask, accumulate=True)
    best = copy.copy(world)
    logprobs = (mass / mass.sum(1, keepdim=True)).log()
    best.policy = torch.where(mass > 0, logprobs, world.reference.logprobs)
    rewards = paid_by_env(best, Distill(world.other, coef=share * BETA))
    found = best.policy_gradient(to_go(with_learners_half(best, rewards)))
    assert found.abs().max() < 1e-6
    there = copy.copy(world)
    there.policy = world.other.logprobs
    rewards = paid_by_env(there, Distill(world.other, coef=share * BETA))
    found = there.policy_gradient(to_go(with_learners_half(there, rewards)))
    assert found.abs().max() > 1e-3


def test_mixed_with_a_score_both_are_paid_by_their_weights() -> None:
    world = worlds()[2]
    alone = paid_by_env(world, kl="none", term=Distill(world.other, coef=BETA))
    score = world.rewards(per_token=False)
    mixed = {"distill": (Distill(world.other, coef=BETA), 0.7), "end": ("terminal", 0.5)}
    found = paid_by_env(world, mixed, kl="none")
    torch.testing.assert_close(found, 0.7 * alone + 0.5 * score, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------ masks and bounds


@pytest.mark.parametrize(
    ("options", "paid"),
    [
        ({}, [1, 1, 1, 1]),
        ({"first": 0.5}, [1, 1, 0, 0]),
        ({"first": 0.01}, [1, 0, 0, 0]),
        ({"last": 0.25}, [0, 0, 0, 1]),
        ({"first": 0.25, "last": 0.5}, [1, 0, 1, 1]),
        ({"first": 1.0}, [1, 1, 1, 1]),
    ],
)
def test_a_share_of_the_longest_text_is_paid_and_the_rest_is_left_to_the_kl(
    options: dict[str, float], paid: list[int]
) -> None:
    for world in worlds()[1:3]:  # texts of one length, and shorter ones too
        whole = paid_by_env(world)
        kl = BETA * world.logprob(world.reference.logprobs)
        found = paid_by_env(world, Distill(world.other, **options))
        expected = kl + (whole - kl) * torch.tensor(paid)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_shares_are_rounded_and_never_nothing() -> None:
    assert [share_of(share, 16) for share in (0.01, 0.3, 0.5, 1.0)] == [1, 5, 8, 16]
    assert share_of(0.07, 100) == 7  # 0.07 * 100 is a little more than 7


def with_teacher(change: Any) -> World:
    """A world whose teacher and reference have some log-probs changed."""
    world = copy.copy(World(3))
    world.other = Tabular(world.other.logprobs.clone())
    world.reference = Tabular(world.reference.logprobs.clone())
    change(world)
    return world


def test_a_token_that_the_teacher_cannot_emit_costs_the_bound() -> None:
    def change(world: World) -> None:
        world.other.logprobs[0, 1] = -torch.inf

    world = with_teacher(change)
    begins = world.tokens[:, 0] == 1
    for clip in (CLIP, 3.0):
        term = Distill(world.other, coef=BETA, clip=clip)
        found = paid_by_env(world, term, kl="none")
        assert found.isfinite().all()
        torch.testing.assert_close(
            found[begins, 0], torch.full((int(begins.sum()),), -BETA * clip).double()
        )
        assert found.abs().max() <= BETA * clip * (1 + 1e-6)


def test_a_token_that_neither_model_has_is_worth_nothing() -> None:
    def change(world: World) -> None:
        world.other.logprobs[0, 1] = world.reference.logprobs[0, 1] = -torch.inf

    world = with_teacher(change)
    found = paid_by_env(world, Distill(world.other, coef=BETA), kl="none")
    assert (found[world.tokens[:, 0] == 1, 0] == 0).all()


def test_a_mask_counts_own_tokens_and_those_of_a_prefix() -> None:
    """`first` is 2 of 7 tokens. In both texts the first token is answered; one has a prefix."""
    term = Distill(coef=1.0, first=2 / 7)
    envs = tasks.make_vec(2, AutoresetMode.DISABLED, reward=term, kl="none", turns="fixed")
    envs.reset(seed=0, options={"prompts": [[11], [11]], "prefixes": [[], [31]]})
    paid = []
    for token in (20, 21, 23):
        obs, reward, *_ = envs.step(np.full(2, token))
        paid.append(reward)
    assert (obs["length"] - obs["prompt_length"] > 4).all()
    assert (np.array(paid) != 0).tolist() == [[True, True], [True, False], [False, False]]


# ------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coef": 0.0}, r"coef=0.0 is not allowed; it must be above 0, finite"),
        ({"coef": -1.0}, "coef=-1.0 is not allowed"),
        ({"coef": math.inf}, "coef=inf is not allowed"),
        ({"clip": 0.0}, "clip=0.0 is not allowed"),
        ({"clip": math.nan}, "clip=nan is not allowed"),
        ({"first": 0.0}, r"first=0.0 is not allowed; it must be above 0 and at most 1, a share"),
        ({"last": 1.5}, "last=1.5 is not allowed"),
        ({"first": 30}, "first=30 is not allowed"),
        ({"model": "my-teacher"}, r"given to the env: teacher='my-teacher'"),
    ],
)
def test_settings_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Distill(**options)


@pytest.mark.parametrize("options", [{"kl": "none"}, {"kl_coef": 0.0}])
def test_without_beta_a_coef_is_needed(options: dict[str, Any]) -> None:
    with pytest.raises(
        InvalidArgument, match=r"reward='distill' takes this env's beta, which is 0; give Distill\("
    ):
        tasks.make_vec(1, reward="distill", **options)
    tasks.make_vec(1, reward=Distill(coef=0.1), **options)


def test_a_missing_teacher_is_named() -> None:
    with pytest.raises(InvalidArgument, match=r"needs a teacher, which is .*\(teacher=\), which"):
        tasks.make_vec(1, env_id="tokenenv/Brackets-v0", task=without_teacher(), reward="distill")


def without_teacher() -> Any:
    return dataclasses.replace(tasks.toy(), teacher=None)


def test_a_teacher_of_another_vocabulary_is_refused() -> None:
    small = fakes.causal_lm(vocab_size=40, num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"the teacher \(LlamaForCausalLM\) has 40 token ids"):
        tasks.make_vec(1, reward=Distill(small))
    teacher = gym.make_vec("tokenenv/Negation-v0", num_envs=1).unwrapped.teacher
    with pytest.raises(ModelError, match=r"OptimalPolicy\) has 64 token ids; allowed: 40, the"):
        gym.make_vec("tokenenv/Negation-v0", num_envs=1, vocab_size=40, reward=Distill(teacher))


def test_a_padded_vocabulary_is_the_same_tokens() -> None:
    padded = fakes.causal_lm(vocab_size=fakes.VOCAB_SIZE + 3, num_hidden_layers=1)
    envs = tasks.make_vec(2, AutoresetMode.SAME_STEP, reward=Distill(padded))
    assert np.isfinite([episode.rewards[0] for episode in tasks.play(envs)]).all()


# ------------------------------------------------------------------------ where teachers are


def test_a_teacher_is_given_as_a_folder(tmp_path: Any) -> None:
    model = fakes.causal_lm(seed=6, num_hidden_layers=1)
    folder = fakes.saved(model, tmp_path / "teacher")
    texts = [[11, 12]] * 2, [[20, 21, 22], [23, fakes.EOS]]
    found, wanted = (
        tasks.make_vec(1, reward="distill", **given).unwrapped.score_episodes(*texts).terms
        for given in ({"teacher": folder}, {"teacher": model})
    )
    np.testing.assert_allclose(found["distill"], wanted["distill"], atol=1e-6)
    assert np.abs(wanted["distill"]).max() > 0.01


def test_a_teacher_with_other_tokens_is_refused_with_the_reason(tmp_path: Any) -> None:
    folder = fakes.saved(fakes.causal_lm(num_hidden_layers=1), tmp_path / "teacher", False)
    fakes.tokenizer([*fakes.WORDS[1:], fakes.WORDS[0]]).save_pretrained(folder)
    with pytest.raises(
        ModelError, match=r"the tokenizer of the teacher differs from the policy's: id 3 is"
    ):
        tasks.make_vec(1, reward="distill", teacher=folder)


def test_a_served_teacher_pays_whole_texts_and_refuses_to_step() -> None:
    model = fakes.causal_lm(seed=6, num_hidden_layers=1)
    texts = [[11, 12]] * 2, [[20, 21, 22], [23, fakes.EOS]]
    server = FakeServer(model)
    try:
        remote, local = (
            tasks.make_vec(1, reward="distill", teacher=teacher) for teacher in (server.url, model)
        )
        found, wanted = (envs.unwrapped.score_episodes(*texts).terms for envs in (remote, local))
        np.testing.assert_allclose(found["distill"], wanted["distill"], atol=1e-5)
        with pytest.raises(InvalidArgument, match="is run by vLLM, on whole texts only"):
            remote.reset(seed=0)
    finally:
        server.stop()


def test_the_reference_as_the_teacher_pays_nothing_and_costs_no_second_trunk() -> None:
    plain = tasks.make_vec(2)
    envs = tasks.make_vec(2, AutoresetMode.SAME_STEP, reward="distill", teacher=tasks.reference())
    assert envs.unwrapped.cache_bytes == plain.unwrapped.cache_bytes
    terms = [info["reward_terms"]["distill"] for e in tasks.play(envs) for info in e.infos]
    np.testing.assert_allclose(terms, 0.0, atol=1e-6)
