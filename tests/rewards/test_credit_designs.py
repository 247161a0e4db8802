"""Redistributing a score: what attention, occlusion, Shapley values and gradients have in
common."""

from typing import Any

import credit
import fakes
import numpy as np
import pytest
import torch
from credit import SCORERS, TRANSFORMERS, T, bound, close, finished, placed
from gymnasium.vector import AutoresetMode
from tasks import make_vec, play

from tokenenv.errors import InvalidArgument
from tokenenv.models.heads import make_scorer
from tokenenv.models.prefix_scores import score_texts
from tokenenv.rewards.attention import Attention
from tokenenv.rewards.gradient import Gradient
from tokenenv.rewards.occlusion import Occlusion
from tokenenv.rewards.shapley import Shapley

DESIGNS: dict[str, Any] = {
    "attention": Attention,
    "occlusion": Occlusion,
    "shapley": Shapley,
    "gradient": lambda: Gradient(steps=4),
}
CASES = [
    (design, scorer)
    for design in DESIGNS
    for scorer in SCORERS
    if scorer in TRANSFORMERS or design in ("occlusion", "shapley")
]
PAIRS, UNPAID = credit.texts()
quiet = pytest.mark.filterwarnings("ignore:reward='gradient':RuntimeWarning")


@quiet
@pytest.mark.parametrize(("design", "scorer"), CASES)
def test_the_shares_add_up_to_the_score_on_payable_tokens(design, scorer):
    scorer = SCORERS[scorer]()
    score = score_texts(scorer, PAIRS)
    texts = finished(PAIRS, UNPAID, score)
    rewards = bound(DESIGNS[design](), scorer).place(texts, T)
    assert rewards.shape == (len(PAIRS), T)
    assert rewards.dtype == torch.float32
    assert not rewards.requires_grad
    own = texts.own_mask(T)
    assert (rewards[~own] == 0).all()
    assert (rewards[own] != 0).float().mean() > 0.6
    bare = score_texts(scorer, [(p, r[:n]) for (p, r), n in zip(PAIRS, UNPAID, strict=True)])
    close(rewards.sum(1), score - bare if design == "shapley" else score)


@quiet
@pytest.mark.parametrize(("design", "scorer"), CASES)
def test_a_texts_shares_depend_on_nothing_around_it(design, scorer):
    scorer = SCORERS[scorer]()
    together = placed(DESIGNS[design](), scorer, PAIRS, UNPAID)
    whole = placed(DESIGNS[design](), scorer, PAIRS, UNPAID, max_batch_tokens=10_000)
    alone = [
        placed(DESIGNS[design](), scorer, [pair], [n])[0]
        for pair, n in zip(PAIRS, UNPAID, strict=True)
    ]
    close(together, torch.stack(alone))
    close(together, whole)


@quiet
@pytest.mark.parametrize("kind", TRANSFORMERS)
@pytest.mark.parametrize("design", DESIGNS)
def test_forwards_are_small_and_the_model_is_left_as_it_was(design, kind):
    model = fakes.reward_model(kind).train().requires_grad_(True)
    scorer = make_scorer(model)
    term, sizes = bound(DESIGNS[design](), scorer), []

    def record(module, args, kwargs):
        inputs = kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        sizes.append(inputs.shape[0] * inputs.shape[1])

    scorer.model.register_forward_pre_hook(record, with_kwargs=True)
    assert not term.place(finished(PAIRS, UNPAID, torch.ones(len(PAIRS))), T).requires_grad
    assert max(sizes) <= 30
    assert min(sizes) > 0
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training
    assert model.config._attn_implementation == "sdpa"


@quiet
@pytest.mark.parametrize("kind", TRANSFORMERS)
@pytest.mark.parametrize("design", DESIGNS)
def test_stepping_pays_what_whole_texts_are_paid(design, kind):
    envs = make_vec(
        4,
        AutoresetMode.SAME_STEP,
        reward=DESIGNS[design](),
        scorer=kind,
        kl="none",
        max_batch_tokens=40,
    )
    episodes = play(envs)
    whole = envs.unwrapped.score_episodes(
        [e.prompt for e in episodes], [e.response for e in episodes]
    )
    close(whole.token_rewards, np.stack([e.infos[-1]["token_rewards"] for e in episodes]))
    close(
        whole.step_rewards,
        np.stack([e.padded(e.rewards, whole.step_rewards.shape[1]) for e in episodes]),
    )
    assert len(episodes) > 10


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Shapley(max_segments=0), "max_segments=0 is not allowed; it must be 1 or more"),
        (
            lambda: Shapley(permutations=3),
            "permutations=3 is not allowed; it must be an even number",
        ),
        (lambda: Shapley(permutations=0), "permutations=0 is not allowed"),
        (lambda: Gradient(steps=0), "steps=0 is not allowed"),
        (lambda: Gradient(tolerance=0.0), "tolerance=0.0 is not allowed"),
        (
            lambda: bound(Attention(), SCORERS["automaton"]()),
            "'attention' needs a causal transformers reward model",
        ),
        (
            lambda: bound(Gradient(), SCORERS["text"]()),
            "'gradient' needs a causal transformers reward model",
        ),
        (lambda: bound(Occlusion(), None), "'occlusion' needs a reward model"),
        (lambda: bound(Shapley(), None), "'shapley' needs a reward model"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(InvalidArgument, match=message):
        make()
