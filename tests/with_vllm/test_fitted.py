"""What `tokenenv.fit` saves is served by vLLM as it is, with the same numbers."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from tokenenv.fit.config import FitConfig
from tokenenv.fit.examples import Text
from tokenenv.fit.objectives import Objective
from tokenenv.fit.readers import make_reader
from tokenenv.models.vllm_models import VLLMRewardModel
from tokenenv.rollout.vllm import LocalVLLM

SMALL = {"dtype": "float32", "max_model_len": 64, "max_num_seqs": 32}


def fitted(readout, **options):
    """A reader of the tokens of Reviews-v0, with weights that are not its first ones."""
    spec = gym.make_vec("tokenenv/Reviews-v0", num_envs=1).unwrapped.token_spec
    config = FitConfig(data=None, out=None, **options)
    objective = Objective("scores", readout, None, "", "")
    mine = make_reader(config, objective, spec.vocab_size, spec.tokenizer)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in mine.trained().values():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return mine


@pytest.mark.parametrize("start", ["new", "adapters"])
def test_token_classify_gives_the_rewards_that_were_read(start, make, texts, tmp_path):
    reference = make(2).unwrapped.reference
    mine = fitted("token", **({} if start == "new" else {"model": reference, "lora_rank": 4}))
    pairs = list(zip(*texts, strict=True))
    with torch.no_grad():
        reading = mine.read([Text(*map(np.asarray, pair)) for pair in pairs])
    mine.save(tmp_path / "m", divisor=4.0, scale=3.0)
    served = VLLMRewardModel(LocalVLLM(tmp_path / "m", runner="pooling", **SMALL))
    found = served.token_scores(pairs, reading.reward_BR.shape[1])
    np.testing.assert_allclose(found, 0.75 * reading.reward_BR, atol=1e-4)
    assert np.abs(found).max() > 0.1


def test_classify_gives_the_values_that_were_read(texts, tmp_path):
    """The stop token is read too."""
    mine = fitted("value")
    pairs = list(zip(*texts, strict=True))
    with torch.no_grad():
        reading = mine.read([Text(*map(np.asarray, pair)) for pair in pairs])
    mine.save(tmp_path / "m", scale=2.0)
    backend = LocalVLLM(tmp_path / "m", runner="pooling", skip_tokenizer_init=False, **SMALL)
    served = VLLMRewardModel(backend, per_token=False)
    found = served.token_scores(pairs, reading.reward_BR.shape[1]).sum(1)
    last = [len(response) - 1 for _, response in pairs]
    expected = 2 * reading.running_BR[range(len(pairs)), last]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.ptp(found) > 0.1
