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


def played(envs, count=5):
    """The texts that random tokens make in an env of one slot, and the rewards that each is paid."""
    rng, some, paid = np.random.default_rng(0), [], []
    for seed in range(count):
        (obs, _), rewards, ended = envs.reset(seed=seed), [], False
        while not ended:
            actions = rng.integers(0, envs.unwrapped.token_spec.vocab_size, 1)
            obs, reward, terminated, truncated, _ = envs.step(actions)
            rewards.append(reward[0])
            ended = bool(terminated[0] or truncated[0])
        response, own = response_of(obs, 0)
        prompt = np.asarray(obs["tokens"][0][: obs["prompt_length"][0]])
        some.append(Text(prompt, np.asarray(response), own=np.asarray(own, bool)))
        paid.append(rewards)
    return some, paid


@pytest.mark.parametrize(("readout", "design"), [("token", "token"), ("value", "delta")])
@pytest.mark.parametrize("env", ["Dialogue-v0", "Twenty-v0"])
def test_what_an_env_writes_is_read_and_not_paid(env, readout, design, tmp_path):
    """Only the change that it makes in a value is: that belongs to the token before it."""
    mine = fitted(make(env), readout)
    mine.save(tmp_path / "m")
    envs = make(env, num_envs=1, reward=design, reward_model=str(tmp_path / "m"))
    some, paid = played(envs)
    assert not all(text.own_mask.all() for text in some)
    rewards = mine.read(some).reward_BR.detach().numpy()
    for text, row, expected in zip(some, paid, rewards, strict=True):
        own = expected[: len(text.response)][text.own_mask]
        np.testing.assert_allclose(row, own, atol=1e-5)
    assert max(map(np.ptp, paid)) > 0.05


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
