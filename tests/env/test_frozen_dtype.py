"""The option frozen_dtype: what is read and never trained, in a dtype of its own."""

import copy

import fakes
import gymnasium as gym
import numpy as np
import pytest
import torch

import tokenenv  # noqa: F401
from tokenenv.agents import PPO
from tokenenv.env.frozen_dtype import with_frozen_dtype
from tokenenv.errors import InvalidArgument
from tokenenv.models.heads import make_scorer
from tokenenv.types import Scorer

N, T = 6, 12
BF16 = torch.bfloat16


def sharp(model):
    """Give a random language model log-probs that spread as widely as a trained model's."""
    model.get_output_embeddings().weight.data *= 2
    return model


def models(kind="token"):
    return {
        "model": sharp(fakes.causal_lm(seed=0)),
        "reward_model": fakes.reward_model(kind, seed=1),
        "implicit_model": sharp(fakes.causal_lm(seed=2)),
        "teacher": sharp(fakes.causal_lm(seed=3)),
    }


def make(frozen_dtype=None, **options):
    given = models() | {"prompts": [[5, 6, 7], [8, 9], [10, 11, 12, 13]], "max_new_tokens": T}
    given |= {"stop_token_ids": [fakes.EOS], "tokenizer": fakes.tokenizer()} | options
    settings = {"autoreset_mode": "SameStep", "frozen_dtype": frozen_dtype}
    return gym.make_vec("tokenenv/TextGen-v0", num_envs=N, **settings, **given)


def play(envs, seed=0):
    """Step T random tokens; return the rewards and log pi_ref (N, T), and the texts."""
    obs, _ = envs.reset(seed=seed)
    prompts = [
        row[:length].tolist() for row, length in zip(obs["tokens"], obs["length"], strict=True)
    ]
    tokens = np.random.default_rng(seed).integers(3, fakes.VOCAB_SIZE, (N, T))
    steps = [envs.step(column) for column in tokens.T]
    rewards, logprobs = ([step[i] for step in steps] for i in (1, 4))
    return np.stack(rewards, 1), np.stack([i["ref_logprob"] for i in logprobs], 1), prompts, tokens


def test_what_is_read_is_converted_and_what_is_trained_is_not():
    given = models()
    envs = make("bfloat16", **given)
    core = envs.unwrapped
    assert {model.dtype for model in core.frozen_models.values()} == {BF16}
    assert set(core.frozen_models) >= {"reference", "reward model", "implicit model", "teacher"}
    assert core.model is given["model"]
    assert {model.dtype for model in given.values()} == {torch.float32}
    policy = PPO(envs).policy
    assert {weight.dtype for weight in policy.parameters()} == {torch.float32}
    assert core.frozen_models["reference"].model.rotary_emb.inv_freq.dtype == torch.float32


def test_the_default_and_the_dtype_that_is_there_copy_nothing():
    for dtype in (None, "float32", torch.float32):
        core = make(dtype).unwrapped
        assert core.reference is core.model
        assert core._task.model is None


@pytest.mark.parametrize("design", ["token", "delta", "implicit"])
def test_log_probs_and_rewards_are_off_by_no_more_than_is_documented(design):
    exact, rough = (play(make(dtype, reward=design)) for dtype in (None, "bfloat16"))
    apart = np.abs(exact[1] - rough[1])
    assert exact[1].std() > 1
    assert 0 < apart.mean() < 0.05
    assert apart.max() < 0.3
    assert abs((exact[1] - rough[1]).mean()) < 0.02
    # Of a number, bfloat16 keeps 8 bits: 1/256. A state is rounded a few times in each layer.
    spread = exact[0].std()
    assert 0 < np.abs(exact[0] - rough[0]).mean() < spread / 32
    assert np.abs(exact[0] - rough[0]).max() < spread / 8


@pytest.mark.parametrize("kind", ["token", "sequence"])
@pytest.mark.parametrize("design", ["delta", "terminal", "attention", "occlusion", "distill"])
def test_stepping_is_scoring_within_the_bound(design, kind):
    envs = make("bfloat16", reward=design, **models(kind=kind))
    rewards, logprobs, prompts, tokens = play(envs)
    scores = envs.unwrapped.score_episodes(prompts, tokens.tolist())
    assert np.abs(scores.ref_logprobs - logprobs).mean() < 0.05
    spread = rewards.std()
    assert np.abs(scores.step_rewards - rewards).mean() < spread / 16


def test_a_score_is_not_rounded_by_its_head():
    envs = make("bfloat16", reward="terminal", **models(kind="sequence"))
    envs.reset(seed=0)
    play(envs)
    score = torch.as_tensor(envs.unwrapped.score_episodes([[5, 6]], [[7, 8, 9]]).score)
    assert not torch.equal(score, score.bfloat16().float())


def test_one_trunk_stays_one():
    lm = sharp(fakes.causal_lm(seed=0))
    reward = fakes.reward_model("token", seed=1)
    reward.model = lm.model
    core = make("bfloat16", model=lm, reward_model=reward, reward="token").unwrapped
    assert len(core._engine.trunks._slots) == 1
    assert core.reference.model is core.frozen_models["reward model"]
    tied = core.reference
    assert tied.get_input_embeddings().weight.dtype == BF16


def test_tied_weights_stay_tied():
    lm = fakes.causal_lm(seed=0, tie_word_embeddings=True)
    copied = make("bfloat16", model=lm).unwrapped.reference
    assert copied.get_input_embeddings().weight is copied.get_output_embeddings().weight


def test_a_reward_model_with_another_tokenizer_is_converted():
    scorer = make(
        "bfloat16",
        reward_model=fakes.bidirectional_reward_model(),
        reward_tokenizer=fakes.tokenizer(),
        reward="terminal",
    ).unwrapped._task.scorer
    assert scorer.model.dtype == BF16
    assert torch.isfinite(scorer.token_scores([([5, 6], [7, 8])], 2)).all()


def test_a_scorer_with_a_head_of_ones_own_stays_as_it_is():
    made = make_scorer(fakes.reward_model("token", seed=1))
    own = Scorer(made.model, lambda states: states[:, 0], per_token=True)
    task = make(None).unwrapped._task
    changed = with_frozen_dtype(_with(task, scorer=own), "bfloat16")
    assert changed.scorer is own
    assert changed.reference.dtype == BF16


def _with(task, **changes):
    changed = copy.copy(task)
    for name, value in changes.items():
        object.__setattr__(changed, name, value)
    return changed


@pytest.mark.parametrize("name", ["oracle", "features"])
def test_what_reads_the_states_of_its_own_models_is_refused(name):
    task = make(None).unwrapped._task
    with pytest.raises(InvalidArgument, match="oracle or features read its own models' states"):
        with_frozen_dtype(_with(task, **{name: lambda *given: None}), "bfloat16")


def test_an_environment_without_such_a_model_says_so():
    with pytest.raises(
        InvalidArgument, match="frozen_dtype='bfloat16': this environment has no model"
    ):
        gym.make_vec("tokenenv/Brackets-v0", num_envs=2, frozen_dtype="bfloat16")


def test_an_unknown_dtype_is_named():
    with pytest.raises(
        InvalidArgument, match="frozen_dtype='half' is not known; allowed: bfloat16"
    ):
        make("half")


def test_texts_are_forked_saved_and_taken_up_again():
    envs = make("bfloat16", reward="token")
    envs.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(4):
        envs.step(rng.integers(3, fakes.VOCAB_SIZE, N))
    core = envs.unwrapped
    core.fork([0], [1])
    state = core.save_state()
    tokens = np.full(N, 7)
    once = envs.step(tokens)
    core.load_state(state)
    again = envs.step(tokens)
    assert once[1][0] == once[1][1]
    # A cache that is filled at once is rounded in other places than one that grew.
    np.testing.assert_allclose(again[1], once[1], atol=0.1)


def test_another_dtype_is_another_env_to_a_checkpoint():
    one, other = (make(dtype).unwrapped.identity for dtype in (None, "bfloat16"))
    assert one["options"] == other["options"]
    assert one["models"] != other["models"]


@pytest.mark.parametrize(
    ("reward", "settings"),
    [
        ("token", {"full_kl_coef": 0.05}),
        ("token", {"distill_coef": 0.05, "lora_rank": 2}),
        ("prime", {"rollout": "episode"}),
        ("gradient", {}),
    ],
)
@pytest.mark.filterwarnings("ignore:reward='gradient'")
def test_agents_learn_beside_it(reward, settings):
    envs = make("bfloat16", reward=reward)
    agent = PPO(envs, batch_tokens=48, minibatches=1, epochs=1, lr=1e-4, **settings)
    agent.learn(96)
    assert all(torch.isfinite(weight).all() for weight in agent.policy.parameters())
