"""Models that an env is given in place of those of its task."""

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification

import tokenenv  # noqa: F401
from tokenenv.errors import InvalidArgument, ModelError
from tokenenv.models.heads import make_scorer

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
NEGATION = "tokenenv/Negation-v0"


def classifier(vocab_size: int = 64, seed: int = 0, **shape: int):
    torch.manual_seed(seed)
    config = LlamaConfig(**SHAPE | shape, vocab_size=vocab_size, num_labels=1, pad_token_id=0)
    return LlamaForTokenClassification(config).eval().requires_grad_(False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A reward model with Negation-v0's tokens, as a folder."""
    classifier().save_pretrained(tmp_path / "rm")
    make(1).unwrapped.token_spec.tokenizer.save_pretrained(tmp_path / "rm")
    return tmp_path / "rm"


def make(num_envs: int, **options):
    return gym.make_vec(NEGATION, num_envs=num_envs, autoreset_mode="SameStep", **options)


def finish(envs, seed: int = 0):
    """Step until all texts end. Return the rewards (T, N) and the infos of the last step."""
    envs.reset(seed=seed)
    rng, rewards = np.random.default_rng(seed), []
    while True:
        _, reward, terminated, _, infos = envs.step(rng.integers(0, 64, envs.num_envs))
        rewards.append(reward)
        if terminated.all():
            return np.stack(rewards), infos


def test_a_given_reward_model_scores_and_the_truth_stays(folder):
    envs, plain = make(3, reward="token", reward_model=str(folder), kl="none"), make(3, kl="none")
    rewards, infos = finish(envs)
    _, true = finish(plain)
    texts = [[0, *row] for row in final_tokens(envs)]
    expected = classifier()(input_ids=torch.tensor(texts)).logits[:, 1:, 0].sum(1)
    assert np.allclose(infos["score"], expected, atol=1e-5)
    assert np.allclose(rewards.sum(0), infos["score"], atol=1e-5)
    assert (infos["gold"] == true["score"]).all()
    assert not np.allclose(infos["gold"], infos["score"])


def final_tokens(envs) -> list[list[int]]:
    """The response tokens that `finish` gives with seed 0."""
    rng = np.random.default_rng(0)
    return np.stack([rng.integers(0, 64, envs.num_envs) for _ in range(16)]).T.tolist()


def test_stepping_equals_scoring_with_a_given_reward_model(folder):
    envs = make(3, reward="delta", reward_model=classifier())
    rewards, infos = finish(envs)
    scores = envs.unwrapped.score_episodes([[0]] * 3, final_tokens(envs))
    assert np.allclose(scores.step_rewards, rewards.T, atol=1e-5)
    assert np.allclose(scores.gold, infos["gold"])
    assert np.allclose(scores.score, infos["score"], atol=1e-5)


def test_the_oracle_is_that_of_the_true_score(folder):
    given = make(3, reward="token", watch="oracle", reward_model=str(folder))
    plain = make(3, watch="oracle", reward="terminal")
    watched, expected = (finish(envs)[1]["token_watched"]["oracle"] for envs in (given, plain))
    assert np.allclose(watched, expected, atol=1e-6)
    start = given.unwrapped.oracle.optimal_objective(0.05)
    assert np.allclose(watched.sum(1), finish(plain)[1]["gold"] - start, atol=1e-5)


def test_features_are_those_of_the_task(folder):
    given = make(2, observation="features", reward_model=str(folder), reward="token")
    plain = make(2, observation="features")
    assert (given.reset(seed=1)[0] == plain.reset(seed=1)[0]).all()


def test_a_scorer_may_be_given():
    envs = make(3, reward="token", reward_model=make_scorer(classifier()), kl="none")
    assert np.allclose(finish(envs)[1]["score"], finish(envs)[0].sum(0), atol=1e-5)


def test_an_implicit_model_is_read_by_its_design():
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=64, pad_token_id=0)).eval()
    envs = make(2, reward="implicit", implicit_model=model)
    assert envs.unwrapped._task.implicit_model is model


def test_the_task_gets_what_it_takes_itself():
    torch.manual_seed(0)
    policy = LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=64, pad_token_id=0)).eval()
    envs = gym.make_vec(
        "tokenenv/TextGen-v0",
        num_envs=1,
        model=policy,
        reward_model=classifier(),
        prompts=[[1, 2]],
        stop_token_ids=[3],
        max_new_tokens=4,
    )
    assert envs.unwrapped.config.reward_model is None
    assert envs.unwrapped._task.scorer.per_token


def test_other_tokens_are_refused(tmp_path):
    other = gym.make_vec("tokenenv/Negation-v0", num_envs=1, vocab_size=40)
    classifier(40).save_pretrained(tmp_path / "rm")
    tokenizer = other.unwrapped.token_spec.tokenizer
    tokenizer.save_pretrained(tmp_path / "rm")
    with pytest.raises(ModelError, match="40 token ids"):
        make(1, reward_model=classifier(40))
    torch.manual_seed(0)
    lm = LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=40, pad_token_id=0))
    lm.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    with pytest.raises(ModelError, match="tokenizer of the teacher differs"):
        make(1, teacher=str(tmp_path / "lm"))


def test_too_few_positions_are_refused():
    with pytest.raises(InvalidArgument, match="the reward model has 8 positions"):
        make(1, reward_model=classifier(max_position_embeddings=8))


def test_a_moved_folder_is_the_same_env(folder, tmp_path):
    before = make(1, reward_model=str(folder)).unwrapped.identity
    after = make(1, reward_model=str(folder.rename(tmp_path / "moved"))).unwrapped.identity
    assert before == after
    assert before != make(1, reward_model=classifier(seed=1)).unwrapped.identity
    assert before != make(1).unwrapped.identity
