import copy

import fakes
import pytest
import torch

from tokenenv.errors import ModelError
from tokenenv.models.cached_lm import CachedLM
from tokenenv.models.rope import fix_rope


def states(model, text):
    with torch.no_grad():
        return model(input_ids=torch.tensor([text]), use_cache=False)[0][0]


def text_of(length):
    return [(7 * i + 3) % fakes.VOCAB_SIZE for i in range(length)]


VARYING = ["llama_dynamic", "phi3_longrope", "gemma3_dynamic"]


@pytest.mark.parametrize("name", VARYING)
@pytest.mark.parametrize("max_length", [12, 16, 17, 30])
def test_fixed_frequencies_are_transformers_own_at_the_capacity(name, max_length):
    fresh = fakes.causal_lm(name).base_model
    fixed = copy.deepcopy(fresh)
    fix_rope(fixed, max_length)
    text = text_of(max_length)
    torch.testing.assert_close(states(fixed, text), states(fresh, text), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", VARYING)
def test_beyond_the_original_length_short_texts_change_with_the_batch_until_fixed(name):
    fresh = fakes.causal_lm(name).base_model
    fixed = copy.deepcopy(fresh)
    fix_rope(fixed, 30)
    short, long = text_of(5), text_of(30)
    assert (states(fixed, short) - states(fresh, short)).abs().max() > 1e-2
    with torch.no_grad():
        batch = torch.tensor([short + long[5:], long])
        together = [model(input_ids=batch, use_cache=False)[0][0, :5] for model in (fixed, fresh)]
    torch.testing.assert_close(together[0], states(fixed, short), atol=1e-5, rtol=1e-5)
    assert (together[1] - states(fresh, short)).abs().max() > 1e-2


@pytest.mark.parametrize("name", VARYING)
def test_a_model_that_has_read_a_long_text_before_is_fixed_alike(name):
    used = fakes.causal_lm(name).base_model
    fixed = copy.deepcopy(used)
    states(used, text_of(40))
    for model in (used, fixed):
        fix_rope(model, 16)
    for length in (5, 15, 16):
        torch.testing.assert_close(
            states(used, text_of(length)), states(fixed, text_of(length)), atol=0, rtol=0
        )


@pytest.mark.parametrize("name", VARYING)
def test_the_regime_holds_for_the_life_of_the_model(name):
    model = fakes.causal_lm(name)
    CachedLM(model, 2, 12)
    CachedLM(model, 2, 16)  # both lie within the original length
    before = states(model.base_model, text_of(12))
    with pytest.raises(ModelError, match=r"max_length=20.* fixed for texts of at most 16 tokens"):
        CachedLM(model, 2, 20)
    CachedLM(model, 2, 8)
    assert torch.equal(states(model.base_model, text_of(12)), before)
    assert copy.deepcopy(model).config.rope_parameters == fakes.config(name).rope_parameters
    with pytest.raises(ModelError, match="load the model again"):
        CachedLM(copy.deepcopy(model), 2, 20)


@pytest.mark.parametrize("name", VARYING)
def test_shorter_rows_of_the_same_model_keep_its_regime(name):
    model = fakes.causal_lm(name)
    CachedLM(model, 2, 30)
    before = states(model.base_model, text_of(12))
    for max_length in (20, 8):
        CachedLM(model, 2, max_length)
        assert torch.equal(states(model.base_model, text_of(12)), before)


def test_other_models_are_left_alone():
    model = fakes.causal_lm("llama").base_model
    before = states(model, text_of(20))
    fix_rope(model, 1000)
    fix_rope(fakes.causal_lm("mamba").base_model, 1000)
    assert torch.equal(states(model, text_of(20)), before)


def test_unknown_code_for_varying_rope_is_refused_only_where_it_varies():
    model = fakes.causal_lm("phi3_longrope").base_model
    del model.rotary_emb.rope_type
    fix_rope(model, 16)
    with pytest.raises(ModelError, match=r"max_length=17.*longrope.*at most 16"):
        fix_rope(model, 17)
