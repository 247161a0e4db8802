"""From an environment's texts to a reward model that the environment pays with."""

import gymnasium as gym
import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.fit import FitConfig, fit
from tokenenv.fit.objectives import OBJECTIVES

ENV = "tokenenv/Negation-v0"


def core_of(**options):
    return gym.make_vec(ENV, num_envs=2, **options).unwrapped


@pytest.fixture(scope="module")
def world():
    """The env, and texts of random tokens with their gold scores."""
    core, rng = core_of(kl="none"), np.random.default_rng(0)
    responses = rng.integers(0, 63, (64, 16)).tolist()  # 63 is the stop id of `log_ratio_env`
    prompts = [[0]] * len(responses)
    scores = core.score_episodes(prompts, responses).score.tolist()
    return core, list(zip(prompts, responses, scores, strict=True))


def rows_of(texts, kind):
    """Texts as rows of data of a kind."""
    singles = [{"prompt_ids": p, "response_ids": r, "score": s} for p, r, s in texts]
    if kind == "ranking":
        pairs = zip(texts[::2], texts[1::2], strict=True)
        ordered = [sorted(both, key=lambda one: -one[2]) for both in pairs]
        return [
            {"prompt_ids": a[0], "chosen_ids": a[1], "rejected_ids": b[1]}
            for a, b in ordered
            if a[2] > b[2]
        ]
    if kind == "values":
        return [row | {"values": np.linspace(0, row["score"], 16).tolist()} for row in singles]
    if kind == "labels":
        return [row | {"labels": [int(t % 2) for t in row["response_ids"]]} for row in singles]
    return singles


def language_model():
    """A small random Llama with the env's tokens."""
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads, bos_token_id=None, eos_token_id=None))


def settings(name, core, texts, out):
    given = {"data": rows_of(texts, OBJECTIVES[name].kind), "out": out, "objective": name}
    given |= {"tokenizer": core.token_spec.tokenizer, "hidden_size": 32, "num_layers": 1}
    given |= {"epochs": 2, "held_out": 0.25, "batch_examples": 8, "lr": 1e-2}
    if OBJECTIVES[name].readout == "log-ratio":
        language_model().save_pretrained(out.parent / "lm")
        core.token_spec.tokenizer.save_pretrained(out.parent / "lm")
        given |= {"model": str(out.parent / "lm"), "coef": 0.5}
    if name == "outcome":
        given["data"] = [row | {"score": float(row["score"] > 0)} for row in given["data"]]
    if name == "corrupted":
        given["reference"] = core.reference
    return FitConfig(**given)


NAMES = [name for name in OBJECTIVES if not name.startswith("share-")]


@pytest.mark.parametrize("name", NAMES)
def test_the_env_pays_what_was_fitted(world, tmp_path, name):
    """Rewards of the saved model in the env are those that were read, in the unit of the saved
    ones."""
    core, texts = world
    config = settings(name, core, texts, tmp_path / "rm")
    fitted = fit(config)
    objective = OBJECTIVES[name]
    if objective.readout == "log-ratio":
        env = log_ratio_env(tmp_path, config.coef)
    else:
        env = core_of(reward=objective.design, reward_model=str(tmp_path / "rm"))
    held_out = [text for e in fitted.held_out for text in e.texts]
    scores = env.score_episodes([t.prompt for t in held_out], [t.response for t in held_out])
    read = fitted.reader.read(held_out).reward_BR.detach().numpy() * fitted.factor
    assert np.abs(read).max() > 1e-3
    np.testing.assert_allclose(scores.token_reward_terms[objective.design], read, atol=2e-4)


def log_ratio_env(folder, coef):
    """An env with the reference that log-ratios were trained with."""
    env = gym.make_vec(
        "tokenenv/TextGen-v0",
        num_envs=2,
        model=str(folder / "lm"),
        implicit_model=str(folder / "rm"),
        reward="implicit",
        prompts=[[0]],
        max_new_tokens=16,
        stop_token_ids=[63],
        kl_coef=coef,
    )
    return env.unwrapped
