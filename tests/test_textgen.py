"""TextGen-v0 with models that the tests make: in memory and on disk."""

import json
import logging
import sys

import datasets
import fakes
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec

from tokenenv.envs import textgen
from tokenenv.errors import InvalidArgument, ModelError
from tokenenv.models import trunks
from tokenenv.rewards.rule import Rule

CHAT = "{% for m in messages %}you {{ m.content }} {% endfor %}{% if add_generation_prompt %}it{% endif %}"
TEXTS = ["the cat is", "a good film", "rain"]
P, T, N = 3, 4, 3
RULE = Rule(lambda prompt, response: len(prompt) - 0.5 * len(response), on="tokens")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories by name."""
    made = {
        "policy": fakes.causal_lm(seed=0),
        "reference": fakes.causal_lm(seed=9),
        "token": fakes.reward_model("token"),
        "sequence": fakes.reward_model("sequence"),
    }
    return {name: fakes.saved(model, tmp_path_factory.mktemp(name)) for name, model in made.items()}


def make(model, **options):
    """Three texts; model objects get the tokenizer that fits them."""
    options = {"prompts": TEXTS, "max_prompt_tokens": P, "max_new_tokens": T, **options}
    if not isinstance(model, str):
        options = {"tokenizer": fakes.tokenizer(), **options}
    return gym.make_vec("tokenenv/TextGen-v0", num_envs=N, model=model, autoreset_mode="Disabled", **options)


def play(envs, seed=0):
    """One episode a slot, all T tokens long, of which the first ends in a stop token: prompts, responses, steps."""
    rng = np.random.default_rng(seed)
    spec = envs.unwrapped.token_spec
    # No pad id either: transformers' own sequence classifier would take the last of them for padding.
    allowed = [token for token in range(spec.vocab_size) if token not in (*spec.stop_token_ids, fakes.PAD)]
    responses = rng.choice(allowed, (N, T))
    responses[0, -1] = spec.stop_token_ids[0]
    obs, _ = envs.reset(seed=seed)
    prompts = [row[:length].tolist() for row, length in zip(obs["tokens"], obs["length"], strict=True)]
    steps = [envs.step(responses[:, t]) for t in range(T)]
    assert (steps[-1][2] | steps[-1][3]).tolist() == [True] * N
    assert steps[-1][2].tolist() == [True] + [False] * (N - 1)
    return prompts, responses.tolist(), steps


def logprobs(model, prompt, response, vocab_size=fakes.VOCAB_SIZE):
    """(T,): by transformers alone."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, :vocab_size]
    return logits.log_softmax(-1)[range(len(response)), response].numpy()


def summed_score(model, prompt, response, per_token):
    """By transformers alone."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits
    return float(logits[0, len(prompt) :].sum() if per_token else logits[0, 0])


# ------------------------------------------------------------------- models


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("other_reference", [False, True])
@pytest.mark.parametrize("head", [None, "token", "sequence"])
def test_stepping_equals_scoring_and_transformers_for_every_combination(head, other_reference, on_disk, saved):
    models = {"policy": fakes.causal_lm(seed=0), "reference": fakes.causal_lm(seed=9)}
    source = saved.get if on_disk else {**models, head: head and fakes.reward_model(head)}.get
    reference = source("reference") if other_reference else None
    envs = make(source("policy"), reference=reference, reward_model=source(head), reward=None if head else RULE)

    prompts, responses, steps = play(envs)
    rewards = np.stack([reward for _, reward, *_ in steps], axis=1)
    scored = envs.unwrapped.score_episodes(prompts, responses)
    assert set(scored.terms) == {{"token": "token", "sequence": "terminal", None: "rule"}[head], "kl"}
    np.testing.assert_allclose(rewards, scored.step_rewards, atol=1e-5)

    texts = list(zip(prompts, responses, strict=True))
    ref_logprobs = np.stack([infos["ref_logprob"] for *_, infos in steps], axis=1)
    used = models["reference" if other_reference else "policy"]
    np.testing.assert_allclose(ref_logprobs, [logprobs(used, *text) for text in texts], atol=1e-4)
    if head:
        by_hand = [summed_score(fakes.reward_model(head), *text, head == "token") for text in texts]
        np.testing.assert_allclose(steps[-1][4]["score"], by_hand, atol=1e-4)
        np.testing.assert_allclose(scored.score, by_hand, atol=1e-4)


def test_the_policy_starts_from_the_model_and_the_kl_from_the_reference(saved):
    envs = make(saved["policy"], reference=saved["reference"], reward={}).unwrapped
    for actual, seed in ((envs.model, 0), (envs.reference, 9)):
        assert torch.equal(actual.lm_head.weight, fakes.causal_lm(seed=seed).lm_head.weight)
    shared = make(saved["policy"], reward={}).unwrapped
    assert shared.model is shared.reference


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_reference_that_is_the_model_is_loaded_and_run_once(on_disk, saved, caplog):
    model = saved["policy"] if on_disk else fakes.causal_lm()
    with caplog.at_level(logging.INFO, "tokenenv"):
        envs = make(model, reference=model, reward_model=saved["token"]).unwrapped
    assert envs.reference is envs.model
    assert "on 2 model(s)" in caplog.text


def test_models_are_frozen_and_in_eval_mode(saved):
    objects = [fakes.causal_lm(), fakes.causal_lm(seed=9), fakes.reward_model("token")]
    for model in objects:
        model.train().requires_grad_(True)
    make(objects[0], reference=objects[1], reward_model=objects[2])
    loaded = make(saved["policy"], reference=saved["reference"], reward={}).unwrapped
    for model in (*objects, loaded.model, loaded.reference):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("size", [40, 80])
def test_a_reference_with_fewer_or_more_embeddings(size):
    reference = fakes.causal_lm(seed=9, vocab_size=size)
    envs = make(fakes.causal_lm(), reference=reference, reward={})
    assert envs.unwrapped.token_spec.vocab_size == envs.single_action_space.n == fakes.VOCAB_SIZE
    prompts, _, _ = play(envs)
    envs.reset(seed=0)
    last_of_both, first_missing = min(size, fakes.VOCAB_SIZE) - 1, size
    infos = envs.step(np.full(N, last_of_both))[4]
    expected = [logprobs(reference, prompt, [last_of_both])[0] for prompt in prompts]
    np.testing.assert_allclose(infos["ref_logprob"], expected, atol=1e-4)
    if first_missing < fakes.VOCAB_SIZE:
        infos = envs.step(np.full(N, first_missing))[4]
        assert np.isneginf(infos["ref_logprob"]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtypes_by_name_or_object(dtype, saved):
    envs = make(saved["policy"], reference=saved["reference"], reward_model=saved["token"], dtype=dtype)
    assert envs.unwrapped.model.dtype == envs.unwrapped.reference.dtype == torch.bfloat16
    rewards = play(envs)[2][-1][1]
    assert rewards.dtype == np.float32
    assert np.isfinite(rewards).all()


def test_an_unknown_dtype_is_named(saved):
    with pytest.raises(InvalidArgument, match="dtype='bfloat' is not known; allowed: bfloat16, float16, float32"):
        make(saved["policy"], dtype="bfloat")


def test_other_models_go_where_the_model_object_is_and_options_are_passed_on(saved, monkeypatch):
    seen = []
    for name in ("load_causal_lm", "load_reward_model"):
        load = getattr(textgen, name)
        monkeypatch.setattr(
            textgen, name, lambda source, _load=load, **options: seen.append(options) or _load(source, **options)
        )
    options = {"attn_implementation": "eager", "trust_remote_code": True, "dtype": torch.float32}
    make(fakes.causal_lm(), reference=saved["reference"], reward_model=saved["token"], **options)
    assert seen[0] == options | {"device": None}
    assert seen[1] == seen[2] == options | {"device": torch.device("cpu")}


# ------------------------------------------------------------------ prompts


def prompts_seen(envs):
    """The distinct prompts of many resets, as texts."""
    texts = [envs.unwrapped.decode(envs.reset(seed=seed)[0]) for seed in range(0, 60, N)]
    return {text for batch in texts for text in batch}


def test_prompts_from_every_source(saved, tmp_path):
    text, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("\n".join(TEXTS))
    lines.write_text("\n".join(json.dumps({"question": prompt}) for prompt in TEXTS))
    ids = fakes.tokenizer()(TEXTS)["input_ids"]
    sources = [
        (TEXTS, {}),
        (ids, {}),
        (str(text), {}),
        (lines, {"prompt_column": "question"}),
        (datasets.Dataset.from_dict({"question": TEXTS}), {"prompt_column": "question"}),
    ]
    for source, options in sources:
        assert prompts_seen(make(saved["policy"], prompts=source, reward={}, **options)) == set(TEXTS)


def test_the_tokenizers_chat_template(tmp_path):
    source = fakes.saved(fakes.causal_lm(), tmp_path)
    tokenizer = fakes.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}you {{ m.content }} {% endfor %}{% if add_generation_prompt %}it{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    prompts = ["rain", [{"role": "user", "content": "sun"}]]
    assert prompts_seen(make(source, prompts=prompts, chat_template=True, reward={})) == {"you rain it", "you sun it"}
    assert prompts_seen(make(source, prompts=["rain"], reward={})) == {"rain"}


def test_long_prompts_are_refused_unless_truncation_is_asked_for(saved):
    options = {"prompts": ["the cat is a good film"], "reward": {}}
    with pytest.raises(InvalidArgument, match=r"prompts\[0\] has 6 tokens and max_prompt_tokens=3"):
        make(saved["policy"], **options)
    assert prompts_seen(make(saved["policy"], long_prompts="truncate", **options)) == {"a good film"}


def test_a_model_object_without_a_tokenizer_takes_ids_alone():
    options = {"tokenizer": None, "reward": {}}
    envs = make(fakes.causal_lm(), prompts=[[3, 4]], **options)
    assert envs.unwrapped.token_spec.tokenizer is None
    assert play(envs)[0] == [[3, 4]] * N
    with pytest.raises(InvalidArgument, match=r"prompts\[0\]: tokens of this env have no text; give token ids"):
        make(fakes.causal_lm(), **options)
    with pytest.raises(InvalidArgument, match="gold= reads texts; give a tokenizer="):
        make(fakes.causal_lm(), prompts=[[3, 4]], gold=lambda prompt, response: 1.0, **options)


def test_prompts_do_not_need_the_datasets_package(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert prompts_seen(make(saved["policy"], reward={})) == set(TEXTS)


# --------------------------------------------------------------- stop tokens


def test_stop_ids_come_from_the_generation_config_and_may_be_several(tmp_path):
    model = fakes.causal_lm()
    model.generation_config.eos_token_id = [5, 1]
    envs = make(fakes.saved(model, tmp_path), reward={})
    assert envs.unwrapped.token_spec.stop_token_ids == (5, 1)
    envs.reset(seed=0)
    assert envs.step(np.array([5, 1, 2]))[2].tolist() == [True, True, False]


def without_stop_ids():
    model = fakes.causal_lm(eos_token_id=None)
    model.generation_config.eos_token_id = None
    return model


def test_stop_ids_fall_back_to_the_config_and_the_tokenizer():
    model = without_stop_ids()
    assert make(model, reward={}).unwrapped.token_spec.stop_token_ids == (fakes.EOS,)  # the tokenizer's
    model.config.eos_token_id = 7
    assert make(model, reward={}).unwrapped.token_spec.stop_token_ids == (7,)
    assert make(model, reward={}, stop_token_ids=[8, 9]).unwrapped.token_spec.stop_token_ids == (8, 9)


def test_without_stop_ids_they_are_asked_for():
    with pytest.raises(InvalidArgument, match="names no end-of-text id; give the ids that end a text as stop_token_ids="):
        make(without_stop_ids(), tokenizer=None, prompts=[[3]])
    for wrong in ([], [61], [-1], ["1"]):
        with pytest.raises(InvalidArgument, match=r"stop_token_ids=\(.*\); allowed: one or more .* 0 to 60"):
            make(fakes.causal_lm(), stop_token_ids=wrong)


# ---------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("role", ["reference", "reward_model"])
def test_tokenizers_must_have_the_same_tokens(role, saved, tmp_path):
    model = fakes.causal_lm(seed=9) if role == "reference" else fakes.reward_model("token")
    source = fakes.saved(model, tmp_path)
    words = list(fakes.WORDS)
    words[0], words[1] = words[1], words[0]
    fakes.tokenizer(words).save_pretrained(tmp_path)
    name = role.replace("_", " ")
    message = f"the tokenizer of the {name} differs from the policy's: id 3 is {words[0]!r}, not {words[1]!r}"
    for policy in (saved["policy"], fakes.causal_lm()):
        with pytest.raises(ModelError, match=message):
            make(policy, **{role: source})


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_model_without_a_tokenizer(architecture, saved, tmp_path, caplog):
    """transformers makes up an empty tokenizer for some families, and none for others."""
    bare = fakes.saved(fakes.causal_lm(architecture), tmp_path, with_tokenizer=False)
    with pytest.raises(ModelError, match="tokenizer"):
        make(bare, reward={})
    assert prompts_seen(make(bare, tokenizer=saved["policy"], reward={})) == set(TEXTS)
    assert not caplog.records
    make(saved["policy"], reference=bare, reward={})
    assert "the reference is taken to read the model's token ids" in caplog.text


# ------------------------------------------------------------------- rewards


def test_without_a_reward_model_a_reward_is_asked_for(saved):
    message = r"needs a reward model \(reward_model=\), which this env has not; reward= also takes a rule"
    with pytest.raises(InvalidArgument, match=message):
        make(saved["policy"])
    play(make(saved["policy"], reward=RULE))


def test_a_sequence_head_has_no_token_rewards(saved):
    with pytest.raises(InvalidArgument, match="reward='token' needs a token-classification reward model"):
        make(saved["policy"], reward_model=saved["sequence"], reward="token")
    make(saved["policy"], reward_model=saved["token"], reward="terminal")


def test_a_reward_model_needs_a_scalar_head(saved):
    with pytest.raises(ModelError, match=r"LlamaForCausalLM.*allowed: sequence- or token-classification models with one label"):
        make(saved["policy"], reward_model=saved["reference"])
    for kind in ("token", "sequence"):
        with pytest.raises(ModelError, match=r"has 2 labels; allowed: .* with one label"):
            make(saved["policy"], reward_model=fakes.reward_model(kind, num_labels=2))
    with pytest.raises(ModelError, match="looks ahead"):
        make(saved["policy"], reward_model=fakes.bidirectional_reward_model())


# ------------------------------------------------------- limits, memory, spec


@pytest.mark.parametrize("role", ["model", "reference", "reward_model"])
def test_texts_longer_than_a_models_positions_are_refused(role):
    short = {"max_position_embeddings": P + T}
    models = {"model": fakes.causal_lm(), "reference": fakes.causal_lm(seed=9), "reward_model": fakes.reward_model("token")}
    models[role] = fakes.reward_model("token", **short) if role == "reward_model" else fakes.causal_lm(seed=3, **short)
    make(**models)
    with pytest.raises(InvalidArgument, match=rf"= 8 tokens; allowed: at most 7, the {role.replace('_', ' ')}'s positions"):
        make(**models, max_new_tokens=T + 1)


@pytest.mark.parametrize("architecture", ["llama_dynamic", "gemma3_dynamic"])
def test_rope_that_extends_reaches_beyond_the_configs_positions(architecture):
    play(make(fakes.causal_lm(architecture, max_position_embeddings=5), reward={}))


def test_the_caches_memory_is_reported_before_it_is_taken(saved, caplog, monkeypatch):
    options = {"reference": saved["reference"], "reward_model": saved["token"]}
    with caplog.at_level(logging.INFO, "tokenenv"):
        taken = make(saved["policy"], **options).unwrapped.cache_bytes
    layers, heads, size, bytes_each = 2, 2, 8, 4
    assert taken == 2 * (2 * layers * heads * size * bytes_each * N * (P + T))
    assert caplog.messages == [f"caches will take {taken / 2**20:.1f} MiB on 2 model(s): {N} texts of {P + T} tokens"]
    assert caplog.records[0].levelno == logging.INFO

    caplog.clear()
    monkeypatch.setattr(trunks, "LARGE", taken)
    monkeypatch.setattr(trunks, "_slot_model", lambda *args, **kwargs: pytest.fail("stop here"))
    with pytest.raises(pytest.fail.Exception, match="stop here"):
        make(saved["policy"], **options)
    assert caplog.records[0].levelno == logging.WARNING


def test_ids_of_plain_values_survive_json(saved, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(TEXTS))
    options = {"model": saved["policy"], "reward_model": saved["sequence"], "prompts": str(prompts), "dtype": "float32"}
    limits = {"max_prompt_tokens": P, "max_new_tokens": T}
    env = gym.make("tokenenv/TextGen-v0", **options, **limits)
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    for step in (lambda e: e.reset(seed=3), lambda e: e.step(9)):
        one, other = step(env), step(again)
        np.testing.assert_array_equal(one[0]["tokens"], other[0]["tokens"])
    assert one[1] == other[1] != 0.0
    envs = gym.make_vec("tokenenv/TextGen-v0", num_envs=N, **options, **limits)
    assert EnvSpec.from_json(envs.spec.to_json()).kwargs["model"] == saved["policy"]
