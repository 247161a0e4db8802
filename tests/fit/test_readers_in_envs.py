"""What was fitted pays in an env what was read while it was fitted."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from turn_tasks import response_of

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.fit.config import FitConfig
from tokenenv.fit.examples import Text
from tokenenv.fit.objectives import Objective
from tokenenv.fit.readers import make_reader
from tokenenv.rewards.implicit import Implicit


def make(env="Reviews-v0", num_envs=2, **options):
    return gym.make_vec(
        f"tokenenv/{env}", num_envs=num_envs, autoreset_mode="Disabled", kl="none", **options
    )


def fitted(envs, readout, **options):
    """A reader of an env's tokens, with weights that are not its first ones."""
    spec = envs.unwrapped.token_spec
    config = FitConfig(data=None, out=None, hidden_size=32, num_layers=1, **options)
    objective = Objective("scores", readout, None, "", "")
    mine = make_reader(config, objective, spec.vocab_size, spec.tokenizer)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in mine.trained().values():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return mine


def random_texts(envs, count=6):
    """Prompts of an env with random responses, some of which end with a stop token."""
    rng, spec, made = np.random.default_rng(0), envs.unwrapped.token_spec, []
    for row in range(count):
        cut = row % 2 == 0 or not spec.stop_token_ids
        response = rng.integers(2, spec.vocab_size, spec.max_new_tokens if cut else row + 1)
        if not cut:
            response[-1] = spec.stop_token_ids[0]
        prompt = envs.unwrapped.prompts[row % len(envs.unwrapped.prompts)]
        made.append(Text(np.asarray(prompt), response))
    return made


@pytest.mark.parametrize(
    ("readout", "design"), [("token", "token"), ("value", "delta"), ("log-ratio", "implicit")]
)
def test_an_env_pays_the_rewards_that_were_read(readout, design, tmp_path):
    plain = make()
    reference = plain.unwrapped.reference
    ratio = {"model": reference, "reference": reference, "coef": 0.2}
    mine = fitted(plain, readout, **(ratio if readout == "log-ratio" else {}))
    some = random_texts(plain)
    reading = mine.read(some)
    scale = {} if readout == "log-ratio" else {"divisor": 4.0, "scale": 3.0}
    mine.save(tmp_path / "m", **scale)
    given = "implicit_model" if readout == "log-ratio" else "reward_model"
    reward = Implicit(coef=0.2) if readout == "log-ratio" else design
    envs = make(reward=reward, **{given: str(tmp_path / "m")})
    pairs = [text.prompt.tolist() for text in some], [text.response.tolist() for text in some]
    paid = envs.unwrapped.score_episodes(*pairs).token_rewards
    factor = 0.75 if scale else 1.0
    expected = reading.reward_BR.detach().numpy() * factor
    width = expected.shape[1]
    np.testing.assert_allclose(paid[:, :width], expected, atol=1e-5)
    assert not paid[:, width:].any()
    assert np.abs(paid).max() > 0.05


def test_what_an_env_writes_is_read_and_not_paid(tmp_path):
    mine = fitted(make("Dialogue-v0"), "token")
    mine.save(tmp_path / "m")
    envs = make("Dialogue-v0", num_envs=6, reward="token", reward_model=str(tmp_path / "m"))
    rng, (obs, _) = np.random.default_rng(0), envs.reset(seed=0)
    paid, ended = np.zeros(6), np.zeros(6, bool)
    while not ended.all():
        obs, reward, terminated, truncated, _ = envs.step(
            rng.integers(0, envs.unwrapped.token_spec.vocab_size, 6)
        )
        paid += np.where(ended, 0, reward)
        ended |= terminated | truncated
    some = []
    for row, prompt_length in enumerate(obs["prompt_length"]):
        response, own = response_of(obs, row)
        prompt = np.asarray(obs["tokens"][row][:prompt_length])
        some.append(Text(prompt, np.asarray(response), own=np.asarray(own)))
    assert not all(text.own_mask.all() for text in some)
    np.testing.assert_allclose(paid, mine.read(some).reward_BR.sum(1).detach(), atol=1e-5)
    assert np.ptp(paid) > 0.05


def test_a_reference_may_be_an_automatons_table(tmp_path):
    plain = make("Negation-v0")
    mine = fitted(plain, "log-ratio", reference=plain.unwrapped.reference, coef=0.5)
    some = random_texts(plain)
    mine.remember(some)
    mine.save(tmp_path / "m")
    envs = make(
        "Negation-v0", reward=Implicit(coef=0.5), implicit_model=str(tmp_path / "m"), num_envs=1
    )
    pairs = [text.prompt.tolist() for text in some], [text.response.tolist() for text in some]
    paid = envs.unwrapped.score_episodes(*pairs).token_rewards
    expected = mine.read(some).reward_BR.detach().numpy()
    np.testing.assert_allclose(paid[:, : expected.shape[1]], expected, atol=1e-5)
    assert np.abs(paid).max() > 0.05
