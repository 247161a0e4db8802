"""TextGen-v0 with models that the tests make: in memory and on disk."""

import copy
import json
import logging
import re
import sys
import warnings

import datasets
import fakes
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tokenenv.agents import PPO, LMPolicy
from tokenenv.envs import textgen
from tokenenv.errors import InvalidArgument, ModelError
from tokenenv.models import own_models, trunks
from tokenenv.models.prefix_scores import score_texts
from tokenenv.rewards.implicit import Implicit
from tokenenv.rewards.rule import Rule
from tokenenv.types import Scorer

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
    return gym.make_vec(
        "tokenenv/TextGen-v0", num_envs=N, model=model, autoreset_mode="Disabled", **options
    )


def task(model, **options):
    """What the env is made of."""
    given = {} if isinstance(model, str) else {"tokenizer": fakes.tokenizer()}
    return textgen.task(
        **{
            "model": model,
            "prompts": TEXTS,
            "max_prompt_tokens": P,
            "max_new_tokens": T,
            **given,
            **options,
        }
    )


def play(envs, seed=0):
    """One episode a slot, all T tokens long, of which the first ends in a stop token: prompts,
    responses, steps."""
    rng = np.random.default_rng(seed)
    spec = envs.unwrapped.token_spec
    allowed = [token for token in range(spec.vocab_size) if token not in spec.stop_token_ids]
    responses = rng.choice(allowed, (N, T))
    responses[0, -1] = spec.stop_token_ids[0]
    obs, _ = envs.reset(seed=seed)
    prompts = [
        row[:length].tolist() for row, length in zip(obs["tokens"], obs["length"], strict=True)
    ]
    steps = [envs.step(responses[:, t]) for t in range(T)]
    assert (steps[-1][2] | steps[-1][3]).tolist() == [True] * N
    assert steps[-1][4]["cut"].tolist() == [False] + [True] * (N - 1)
    return prompts, responses.tolist(), steps


def logprobs(model, prompt, response, vocab_size=fakes.VOCAB_SIZE):
    """(T,): by transformers alone."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[
            0, len(prompt) - 1 : -1, :vocab_size
        ]
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
def test_stepping_equals_scoring_and_transformers_for_every_combination(
    head, other_reference, on_disk, saved
):
    models = {"policy": fakes.causal_lm(seed=0), "reference": fakes.causal_lm(seed=9)}
    source = saved.get if on_disk else {**models, head: head and fakes.reward_model(head)}.get
    reference = source("reference") if other_reference else None
    envs = make(
        source("policy"),
        reference=reference,
        reward_model=source(head),
        reward=None if head else RULE,
    )

    prompts, responses, steps = play(envs)
    rewards = np.stack([reward for _, reward, *_ in steps], axis=1)
    scored = envs.unwrapped.score_episodes(prompts, responses)
    assert set(scored.terms) == {
        {"token": "token", "sequence": "terminal", None: "rule"}[head],
        "kl",
    }
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
def test_a_reference_or_implicit_model_that_is_the_model_is_loaded_and_run_once(
    on_disk, saved, caplog
):
    model = saved["policy"] if on_disk else fakes.causal_lm()
    with caplog.at_level(logging.INFO, "tokenenv"):
        envs = make(
            model, reference=model, implicit_model=model, reward={"a": "implicit", "b": RULE}
        ).unwrapped
    assert envs.reference is envs.model
    assert "on 1 model(s)" in caplog.text
    made = task(model, implicit_model=model)
    assert made.implicit_model is made.reference
    own = fakes.tokenizer(
        list(reversed(fakes.WORDS))
    )  # the model's tokens are whatever its user says
    assert prompts_seen(
        make(model, reference=model, implicit_model=model, reward={}, tokenizer=own)
    ) == set(TEXTS)


def test_models_are_frozen_and_in_eval_mode(saved):
    objects = [fakes.causal_lm(), fakes.causal_lm(seed=9), fakes.causal_lm(seed=8)]
    rewarders = [fakes.reward_model("token"), fakes.bidirectional_reward_model()]
    for model in objects + rewarders:
        model.train().requires_grad_(True)
    for rewarder in rewarders:
        make(objects[0], reference=objects[1], implicit_model=objects[2], reward_model=rewarder)
    loaded = task(saved["policy"], reference=saved["reference"], implicit_model=saved["reference"])
    for model in (*objects, *rewarders, loaded.model, loaded.reference, loaded.implicit_model):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("size", [40, 80])
def test_a_reference_with_fewer_or_more_embeddings(size):
    reference = fakes.causal_lm(seed=9, vocab_size=size)
    envs = make(fakes.causal_lm(), reference=reference, reward={}, kl_coef=0.0)
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
    envs = make(
        saved["policy"], reference=saved["reference"], reward_model=saved["token"], dtype=dtype
    )
    assert envs.unwrapped.model.dtype == envs.unwrapped.reference.dtype == torch.bfloat16
    rewards = play(envs)[2][-1][1]
    assert rewards.dtype == np.float32
    assert np.isfinite(rewards).all()


def test_what_bfloat16_weights_say_is_near_what_float32_weights_say(saved):
    models = {"reference": saved["reference"], "reward_model": saved["token"]}
    whole, half = (
        make(saved["policy"], dtype=dtype, **models) for dtype in ("float32", "bfloat16")
    )
    for exact, rough in zip(play(whole)[2], play(half)[2], strict=True):
        apart = np.abs(exact[4]["ref_logprob"] - rough[4]["ref_logprob"])
        # bfloat16 has 8 bits: each number of a state is off by up to 1/256 of it.
        assert 0 < apart.max() < 0.05
        assert 0 < np.abs(exact[1] - rough[1]).max() < 0.05


def test_an_unknown_dtype_is_named(saved):
    with pytest.raises(
        InvalidArgument, match="dtype='bfloat' is not known; allowed: bfloat16, float16, float32"
    ):
        make(saved["policy"], dtype="bfloat")


def test_other_models_go_where_the_model_object_is_and_options_are_passed_on(saved, monkeypatch):
    seen = []
    for module, name in (
        (textgen, "load_causal_lm"),
        (own_models, "load_causal_lm"),
        (own_models, "load_classifier"),
    ):
        load = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda source, _load=load, **options: seen.append(options) or _load(source, **options),
        )
    options = {"attn_implementation": "eager", "trust_remote_code": True, "dtype": torch.float32}
    others = {
        "reference": saved["reference"],
        "implicit_model": saved["policy"],
        "reward_model": saved["token"],
    }
    make(fakes.causal_lm(), **others, **options)
    options["revision"] = None
    assert seen.pop(0) == options | {"device": None}
    for role, found in zip(("reference", "implicit_model", None), seen, strict=True):
        argument = {"argument": role} if role else {}
        assert found == options | {"device": torch.device("cpu")} | argument


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
        assert prompts_seen(make(saved["policy"], prompts=source, reward={}, **options)) == set(
            TEXTS
        )


def test_the_tokenizers_chat_template(tmp_path):
    source = fakes.saved(fakes.causal_lm(), tmp_path)
    tokenizer = fakes.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}you {{ m.content }} {% endfor %}{% if add_generation_prompt %}it{% endif %}"
    tokenizer.save_pretrained(tmp_path)
    prompts = ["rain", [{"role": "user", "content": "sun"}]]
    assert prompts_seen(make(source, prompts=prompts, chat_template=True, reward={})) == {
        "you rain it",
        "you sun it",
    }
    assert prompts_seen(make(source, prompts=["rain"], reward={})) == {"rain"}


def test_long_prompts_are_refused_unless_truncation_is_asked_for(saved):
    options = {"prompts": ["the cat is a good film"], "reward": {}}
    with pytest.raises(InvalidArgument, match=r"prompts\[0\] has 6 tokens and max_prompt_tokens=3"):
        make(saved["policy"], **options)
    assert prompts_seen(make(saved["policy"], long_prompts="truncate", **options)) == {
        "a good film"
    }


def test_a_model_object_without_a_tokenizer_takes_ids_alone():
    options = {"tokenizer": None, "reward": {}}
    envs = make(fakes.causal_lm(), prompts=[[3, 4]], **options)
    assert envs.unwrapped.token_spec.tokenizer is None
    assert play(envs)[0] == [[3, 4]] * N
    with pytest.raises(
        InvalidArgument, match=r"prompts\[0\]: tokens of this env have no text; give token ids"
    ):
        make(fakes.causal_lm(), **options)
    with pytest.raises(InvalidArgument, match="gold= reads texts; give a tokenizer="):
        make(fakes.causal_lm(), prompts=[[3, 4]], gold=lambda prompt, response: 1.0, **options)


def test_prompts_do_not_need_the_datasets_package(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert prompts_seen(make(saved["policy"], reward={})) == set(TEXTS)


# ---------------------------------------------------------- max_prompt_tokens


def test_a_bundled_model_works_at_the_first_try():
    """It has 256 positions, which the 256 prompt tokens of old and 128 new ones do not fit."""
    with pytest.warns(UserWarning, match="no reward="):
        envs = gym.make_vec(
            "tokenenv/TextGen-v0",
            num_envs=4,
            model="envs/assets/reviews-lm",
            prompts=["the food was"],
        )
    obs, _ = envs.reset(seed=0)
    assert envs.unwrapped.token_spec.max_prompt_tokens == 3
    assert obs["tokens"].shape == (4, 3 + 128)
    assert obs["prompt_length"].tolist() == [3] * 4


def opened(closed=False):
    """The fakes' tokenizer with <s> before every text and, if `closed`, <pad> behind it."""
    tokenizer = fakes.tokenizer()
    end = " <pad>" if closed else ""
    special = [("</s>", fakes.EOS), ("<pad>", fakes.PAD)]
    names = {token: tokenizer.convert_ids_to_tokens(index) for token, index in special}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{names['</s>']} $A{end.replace('<pad>', names['<pad>'])}",
        special_tokens=[(names[token], index) for token, index in special],
    )
    return tokenizer


@pytest.mark.parametrize("kind", ["list", "ids", "text", "jsonl", "dataset", "streamed"])
def test_the_longest_prompt_is_the_limit_of_every_source(kind, saved, tmp_path):
    path = tmp_path / f"prompts.{'jsonl' if kind == 'jsonl' else 'txt'}"
    lines = [json.dumps({"prompt": text}) for text in TEXTS] if kind == "jsonl" else TEXTS
    path.write_text("\n".join(lines))
    dataset = datasets.Dataset.from_dict({"prompt": TEXTS})
    source = {
        "list": TEXTS,
        "ids": fakes.tokenizer()(TEXTS)["input_ids"],
        "text": path,
        "jsonl": path,
        "dataset": dataset,
        "streamed": dataset.to_iterable_dataset(),
    }[kind]
    envs = make(saved["policy"], prompts=source, reward={}, max_prompt_tokens=None)
    assert envs.unwrapped.token_spec.max_prompt_tokens == 3
    assert envs.reset(seed=0)[0]["tokens"].shape == (N, 3 + T)


@pytest.mark.parametrize(
    ("tokenizer", "chat", "length"),
    [
        (None, False, 3),
        (opened, False, 4),
        (lambda: opened(closed=True), False, 5),
        (None, True, 5),
        (opened, True, 5),
    ],
)
def test_special_tokens_and_the_chat_template_count(tokenizer, chat, length):
    """The template's text is encoded as it stands: it brings its own special tokens."""
    tokenizer = fakes.tokenizer() if tokenizer is None else tokenizer()
    tokenizer.chat_template = CHAT
    envs = make(
        fakes.causal_lm(),
        tokenizer=tokenizer,
        chat_template=chat,
        reward={},
        max_prompt_tokens=None,
    )
    assert envs.unwrapped.token_spec.max_prompt_tokens == length
    lengths = {int(n) for seed in range(20) for n in envs.reset(seed=seed)[0]["prompt_length"]}
    assert max(lengths) == length


@pytest.mark.parametrize(
    ("limit", "why"),
    [
        (
            None,
            "3, the length of the longest prompt in prompts=; shorten this one, or make the env ",
        ),
        (3, "3, as the env was made; shorten the prompt, or make the env "),
    ],
)
def test_later_prompts_that_are_longer_are_refused_by_a_limit_that_says_where_it_is_from(
    limit, why, saved
):
    envs = make(saved["policy"], reward={}, max_prompt_tokens=limit)
    envs.reset(seed=0)
    long, text = [3, 4, 5, 6], "the cat is a"
    message = re.escape(f"has 4 tokens and max_prompt_tokens={why}with max_prompt_tokens=4.")
    for prompt in (long, text):
        with pytest.raises(InvalidArgument, match=rf"options\['prompts'\]\[0\] {message}"):
            envs.reset(options={"prompts": [prompt] * N})
        with pytest.raises(InvalidArgument, match=rf"prompts\[1\] {message}"):
            envs.unwrapped.score_episodes([[3], prompt], [[4], [4]])
    envs.reset(options={"prompts": [long[:3]] * N})
    wider = make(saved["policy"], reward={}, max_prompt_tokens=4)
    wider.reset(options={"prompts": [long] * N})


def test_generate_takes_prompts_of_any_length(saved):
    """It has caches of its own: the env's limit is not the policy's."""
    agent = PPO(
        gym.make_vec(
            "tokenenv/TextGen-v0",
            num_envs=N,
            model=saved["policy"],
            prompts=TEXTS,
            reward=RULE,
            max_new_tokens=T,
        )
    )
    assert agent.core.token_spec.max_prompt_tokens == 3
    (response,) = agent.generate([[3, 4, 5, 6, 7]], max_new_tokens=2)
    assert 1 <= len(response) <= 2


def test_truncating_needs_a_number(saved):
    with pytest.raises(
        InvalidArgument,
        match="long_prompts='truncate' needs max_prompt_tokens=, the number of tokens to keep",
    ):
        make(saved["policy"], reward={}, max_prompt_tokens=None, long_prompts="truncate")


@pytest.mark.parametrize("wrong", [0, -3, 2.5, "8"])
def test_a_limit_that_is_no_count_is_refused(wrong, saved):
    with pytest.raises(
        InvalidArgument, match=rf"max_prompt_tokens={wrong!r} must be a whole number, 1 or more, or"
    ):
        make(saved["policy"], reward={}, max_prompt_tokens=wrong)


def advised(message):
    """The options that a message about positions tells to give: each alternative as keywords."""
    advice = message.split("give ", 1)[1].replace("with long_prompts='truncate'", "truncate=1")
    return [
        {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", way)}
        for way in advice.split(", or ")
    ]


@pytest.mark.parametrize(
    ("limit", "new_tokens", "ways"),
    [
        # 12 positions, and a longest prompt of 3 tokens
        (None, 20, [{"max_new_tokens": 9}]),
        (None, 10, [{"max_new_tokens": 9}, {"max_prompt_tokens": 2, "truncate": 1}]),
        (9, 4, [{"max_prompt_tokens": 8}, {}]),
        (9, 12, [{"max_prompt_tokens": 3, "max_new_tokens": 9}]),
        (
            9,
            11,
            [
                {"max_prompt_tokens": 3, "max_new_tokens": 9},
                {"max_prompt_tokens": 1, "truncate": 1},
            ],
        ),
    ],
)
def test_what_the_message_about_positions_advises_fits(limit, new_tokens, ways):
    model = fakes.causal_lm(max_position_embeddings=12)
    given = {"max_prompt_tokens": limit, "max_new_tokens": new_tokens}
    prompt_tokens = limit or 3
    with pytest.raises(
        InvalidArgument,
        match=rf"max_prompt_tokens \+ max_new_tokens = {prompt_tokens} \+ {new_tokens} = "
        rf"{prompt_tokens + new_tokens} tokens, but the model has 12 positions; give ",
    ) as refused:
        make(model, reward={}, **given)
    assert advised(str(refused.value)) == ways
    for way in ways:
        changed = given | {key: value for key, value in way.items() if key != "truncate"}
        changed |= {"long_prompts": "truncate"} if "truncate" in way else {}
        changed |= {} if way else {"max_prompt_tokens": None}
        play_length = make(model, reward={}, **changed).reset(seed=0)[0]["tokens"].shape[1]
        assert play_length <= 12


def test_prompts_that_fill_the_positions_have_to_be_cut():
    model = fakes.causal_lm(max_position_embeddings=3)
    for new_tokens, advice in (
        (1, "max_prompt_tokens=2 with"),
        (4, "two numbers that add up to 3"),
    ):
        with pytest.raises(
            InvalidArgument, match=f"positions; give {advice}.* 'truncate'|{advice}"
        ):
            make(model, reward={}, max_prompt_tokens=None, max_new_tokens=new_tokens)


def test_groups_and_saved_states_have_the_length_of_the_longest_prompt(saved):
    options = {"prompts": TEXTS, "reward": RULE, "max_new_tokens": T, "group_size": 3}
    one, other = (
        gym.make_vec(
            "tokenenv/TextGen-v0",
            num_envs=3,
            model=saved["policy"],
            max_prompt_tokens=limit,
            **options,
        ).unwrapped
        for limit in (None, 3)
    )
    assert one.identity == other.identity
    obs, _ = one.reset(seed=0)
    loaded, _ = other.load_state(one.save_state())
    np.testing.assert_array_equal(loaded["tokens"], obs["tokens"])


def test_what_is_missing_is_said_in_one_sentence(saved):
    with pytest.raises(InvalidArgument, match=r"^model= and prompts= are missing: .* without them"):
        gym.make_vec("tokenenv/TextGen-v0", num_envs=2)
    with pytest.raises(InvalidArgument, match=r"^prompts= is missing: this id .* without it\.$"):
        gym.make_vec("tokenenv/TextGen-v0", num_envs=2, model=saved["policy"])


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
    assert make(model, reward={}).unwrapped.token_spec.stop_token_ids == (
        fakes.EOS,
    )  # the tokenizer's
    model.config.eos_token_id = 7
    assert make(model, reward={}).unwrapped.token_spec.stop_token_ids == (7, fakes.EOS)
    assert make(model, reward={}, stop_token_ids=[8, 9]).unwrapped.token_spec.stop_token_ids == (
        8,
        9,
    )


def test_without_stop_ids_they_are_asked_for():
    with pytest.raises(
        InvalidArgument,
        match="names no end-of-text id; give the ids that end a text as stop_token_ids=",
    ):
        make(without_stop_ids(), tokenizer=None, prompts=[[3]])
    for wrong in ([], [61], [-1], ["1"]):
        with pytest.raises(
            InvalidArgument, match=r"stop_token_ids=\(.*\); allowed: 1 or more .* 0 to 60"
        ):
            make(fakes.causal_lm(), stop_token_ids=wrong)


# ---------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("role", ["reference", "implicit_model"])
def test_tokenizers_must_have_the_same_tokens(role, saved, tmp_path):
    source = fakes.saved(fakes.causal_lm(seed=9), tmp_path)
    words = list(fakes.WORDS)
    words[0], words[1] = words[1], words[0]
    fakes.tokenizer(words).save_pretrained(tmp_path)
    name = role.replace("_", " ")
    message = f"the tokenizer of the {name} differs from the policy's: id 3 is {words[0]!r}, not {words[1]!r}"
    for policy in (saved["policy"], fakes.causal_lm()):
        with pytest.raises(ModelError, match=message):
            make(policy, reward={}, **{role: source})


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


def test_without_a_reward_the_kl_alone_is_paid_and_a_warning_says_so(saved):
    message = "no reward_model= and no reward=, so it pays nothing but the KL term; give reward_mod"
    with pytest.warns(UserWarning, match=message) as caught:
        steps = play(make(saved["policy"], kl_coef=0.5))[2]
    assert len(caught) == 1
    for _, rewards, _, _, infos in steps:
        assert set(infos["reward_terms"]) == {"kl", "_kl"}
        np.testing.assert_allclose(rewards, 0.5 * infos["ref_logprob"], atol=1e-6)
    for given in ({}, RULE):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            play(make(saved["policy"], reward=given))


def test_an_implicit_model_alone_is_the_reward(saved):
    envs = make(saved["policy"], implicit_model=saved["reference"])
    assert set(play(envs)[2][0][4]["reward_terms"]) >= {"implicit", "kl"}
    with_both = make(
        saved["policy"], implicit_model=saved["reference"], reward_model=saved["sequence"]
    )
    paid = set(play(with_both)[2][0][4]["reward_terms"])
    assert "terminal" in paid
    assert "implicit" not in paid


def test_a_sequence_head_has_no_token_rewards(saved):
    with pytest.raises(
        InvalidArgument, match="reward='token' needs a token-classification reward model"
    ):
        make(saved["policy"], reward_model=saved["sequence"], reward="token")
    make(saved["policy"], reward_model=saved["token"], reward="terminal")


def test_a_reward_model_needs_a_scalar_head(saved):
    with pytest.raises(
        ModelError,
        match=r"LlamaForCausalLM.*allowed: sequence- or token-classification models with one label",
    ):
        make(saved["policy"], reward_model=saved["reference"])
    for kind in ("token", "sequence"):
        with pytest.raises(ModelError, match=r"has 2 labels; allowed: .* with one label"):
            make(saved["policy"], reward_model=fakes.reward_model(kind, num_labels=2))
    for wrong, message in (
        (fakes.causal_lm(), r"gives logits \(1, 3, 61\)"),
        (fakes.bidirectional_reward_model().bert, "BertModel"),
    ):
        with pytest.raises(
            ModelError,
            match=rf"{message}.*allowed: sequence- or token-classification models with one label",
        ):
            make(saved["policy"], reward_model=wrong, reward_tokenizer=letters())


def adapted(model):
    """peft's wrapper around the model, into which peft puts an adapter."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    return peft.get_peft_model(model, config)


def test_a_scorer_of_ones_own_says_what_it_scores(saved):
    class Scores:
        per_token = False

        def token_scores(self, texts, width):
            return torch.zeros(len(texts), width)

    with pytest.raises(
        ModelError,
        match=r"reward_model=Scores has no looks_ahead; a `tokenenv.types.TextScorer` says",
    ):
        make(saved["policy"], reward_model=Scores())
    Scores.looks_ahead = False
    assert make(saved["policy"], reward_model=Scores()).unwrapped.score_episodes(
        [[3]], [[4]]
    ).score == [0.0]


@pytest.mark.parametrize(
    "role", ["reference", "reward model", "implicit model", "model 0 of reward term 'mine'"]
)
def test_a_policy_that_trains_weights_of_the_envs_models_is_refused(role):
    reference, other = fakes.causal_lm(), fakes.causal_lm(seed=4)
    options = {
        "reference": {"reference": other},
        "reward model": {"reward_model": fakes.reward_model("token")},
        "implicit model": {"implicit_model": other, "reward": "implicit"},
        "model 0 of reward term 'mine'": {"reward": {"mine": Implicit(other, coef=1.0)}},
    }[role]
    if role == "reward model":
        options["reward_model"].model = other.model  # a head on the policy's own trunk
    envs = make(reference, **{"reward": RULE, **options})
    PPO(envs, policy=LMPolicy(fakes.causal_lm(seed=4)))
    for inside in (other, adapted(other)):
        with pytest.raises(
            InvalidArgument,
            match=f"policy trains model.*, a weight of the env's own {role}, .* deep copy",
        ):
            PPO(envs, policy=LMPolicy(inside))


def test_weights_that_a_policy_does_not_train_may_be_shared():
    reference = fakes.causal_lm()
    shared = {id(weight): weight for weight in reference.parameters()}
    envs = make(reference, reward=RULE)
    PPO(envs, policy=LMPolicy(adapted(copy.deepcopy(reference, shared))))


@pytest.mark.parametrize("role", ["reference", "implicit model"])
def test_an_adapter_that_peft_has_put_into_another_role_is_refused(role):
    model = fakes.causal_lm()
    options = (
        {"reference": model}
        if role == "reference"
        else {"reference": fakes.causal_lm(seed=3), "implicit_model": model}
    )
    with pytest.raises(
        ModelError, match=f"the policy's model and the {role} are built around one model.*deepcopy"
    ):
        make(adapted(model), reward=RULE, **options)
    envs = make(
        adapted(copy.deepcopy(model)), reward=RULE, **options
    )  # the inner one's adapter is part of that model
    PPO(envs)


def test_ref_logprobs_read_the_head_and_run_no_model():
    model = fakes.causal_lm()
    envs, runs = make(model, reward=RULE), []
    envs.reset(seed=0)
    first = envs.unwrapped.ref_logprobs()
    model.register_forward_pre_hook(lambda *_: runs.append("model"))
    model.base_model.register_forward_pre_hook(lambda *_: runs.append("trunk"))
    np.testing.assert_array_equal(envs.unwrapped.ref_logprobs(), first)
    assert runs == []


def test_a_policy_or_a_reference_that_looks_ahead_is_refused():
    with pytest.raises(ModelError, match=r"BertGenerationDecoder .* looks ahead"):
        make(fakes.lm_that_looks_ahead("bert_generation"), reward=RULE)
    with pytest.raises(ModelError, match=r"XLMWithLMHeadModel .* looks ahead"):
        make(fakes.causal_lm(), reference=fakes.lm_that_looks_ahead("xlm"), reward=RULE)


def test_features_and_values_read_states_of_the_size_that_a_model_gives():
    """OPT-350m's states are projected: they are smaller than its config's hidden_size."""
    model = fakes.causal_lm("opt")
    envs = make(model, reward=RULE, observation="features")
    obs, _ = envs.reset(seed=0)
    assert envs.observation_space.shape == obs.shape == (N, 16)
    policy = LMPolicy(copy.deepcopy(model), separate_value=True)
    _, states_BLH = policy.states(torch.tensor([[3, 4]]), np.array([2]))
    assert policy.value(states_BLH[0]).shape == (2,)


def test_implicit_models_pay_their_log_ratio(saved):
    envs = make(saved["policy"], implicit_model=saved["reference"], reward="implicit", kl_coef=0.5)
    prompts, responses, steps = play(envs)
    paid = np.stack([infos["reward_terms"]["implicit"] for *_, infos in steps], axis=1)
    models = fakes.causal_lm(seed=9), fakes.causal_lm(seed=0)
    tuned, reference = (
        [logprobs(model, *text) for text in zip(prompts, responses, strict=True)]
        for model in models
    )
    np.testing.assert_allclose(paid, 0.5 * (np.array(tuned) - reference), atol=1e-4)
    scored = envs.unwrapped.score_episodes(prompts, responses)
    np.testing.assert_allclose(scored.terms["implicit"], paid, atol=1e-5)
    with pytest.raises(
        InvalidArgument,
        match=r"reward='implicit' needs .* \(implicit_model=\), which this env does not have",
    ):
        make(saved["policy"], reward="implicit")


def test_step_ends_are_ids_of_the_model(saved):
    options = {"reward_model": saved["sequence"], "reward": "process"}
    envs = make(saved["policy"], step_end_token_ids=[7, np.int64(9)], **options)
    envs.reset(seed=0)
    paid = np.stack(
        [envs.step(np.full(N, token))[4]["reward_terms"]["process"] for token in (7, 8, 9, 8)]
    )
    assert ((paid != 0).T == [True, False, True, True]).all()
    assert task(saved["policy"], step_end_token_ids=7).step_end_token_ids == (7,)
    assert task(saved["policy"]).step_end_token_ids == ()
    for wrong in ([61], [7, -1], ["7"]):
        with pytest.raises(
            InvalidArgument, match=r"step_end_token_ids=\(.*\); allowed: 0 or more .* 0 to 60"
        ):
            make(saved["policy"], step_end_token_ids=wrong, **options)
    with pytest.raises(InvalidArgument, match=r"reward='process' needs .* \(step_end_token_ids=\)"):
        make(saved["policy"], **options)


# ---------------------------------------- reward models with tokens of their own


def letters():
    """A tokenizer of pieces of words, <s> before each text and </s> behind it."""
    special = ["<pad>", "<s>", "</s>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.train_from_iterator(
        fakes.WORDS, trainers.BpeTrainer(vocab_size=50, special_tokens=special, show_progress=False)
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


FOREIGN = {
    "token": lambda: fakes.reward_model("token"),
    "sequence": lambda: fakes.reward_model("sequence"),
    "bidirectional": fakes.bidirectional_reward_model,
}


def foreign_score(model, prompt, response):
    """By transformers alone: the tokens that end in the response and the closing one."""
    start, text = (
        fakes.tokenizer().decode(ids, skip_special_tokens=True)
        for ids in (prompt, prompt + response)
    )
    encoded = letters()(text, return_offsets_mapping=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(encoded["input_ids"]).logits[0]
    counted = encoded["offset_mapping"][0, :, 1] > len(start)
    counted[-1] = True
    return float(logits[counted].sum() if len(logits) > 1 else logits)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("head", FOREIGN)
def test_a_reward_model_with_other_tokens_scores_finished_texts(head, on_disk, saved, tmp_path):
    model, source = FOREIGN[head](), {"reward_tokenizer": letters()}
    if on_disk:
        letters().save_pretrained(tmp_path)
        source = {}
    envs = make(
        saved["policy"],
        reward_model=fakes.saved(model, tmp_path, with_tokenizer=False) if on_disk else model,
        **source,
    )
    prompts, responses, steps = play(envs)
    rewards = np.stack([reward for _, reward, *_ in steps], axis=1)
    scored = envs.unwrapped.score_episodes(prompts, responses)
    assert set(scored.terms) == {"terminal" if head == "sequence" else "token", "kl"}
    np.testing.assert_allclose(scored.step_rewards, rewards, atol=1e-5)
    placed = steps[-1][4]["token_rewards"]
    np.testing.assert_allclose(scored.token_rewards, placed, atol=1e-5)
    np.testing.assert_allclose(placed.sum(1), rewards.sum(1), atol=1e-5)
    by_hand = [foreign_score(model, *text) for text in zip(prompts, responses, strict=True)]
    np.testing.assert_allclose(steps[-1][4]["score"], by_hand, atol=1e-4)
    np.testing.assert_allclose(scored.score, by_hand, atol=1e-4)


@pytest.mark.parametrize("head", ["token", "bidirectional"])
def test_without_kl_the_token_rewards_add_up_to_the_score_which_the_last_step_pays(head, saved):
    options = {
        "reward_model": FOREIGN[head](),
        "reward_tokenizer": letters(),
        "reward": "token",
        "kl": "none",
    }
    steps = play(make(saved["policy"], **options))[2]
    infos, rewards = steps[-1][4], np.stack([reward for _, reward, *_ in steps], axis=1)
    assert (rewards[:, :-1] == 0).all()
    assert (
        infos["token_rewards"][1:] != 0
    ).mean() > 0.5  # row 0 ends in a stop token, which has no characters
    np.testing.assert_allclose(infos["token_rewards"].sum(1), infos["score"], atol=1e-5)
    np.testing.assert_allclose(rewards[:, -1], infos["score"], atol=1e-5)


def test_a_reward_model_whose_words_have_other_ids_places_what_it_paid_with_the_policys(saved):
    """The words in reverse order, and the embeddings with them."""
    own, native = fakes.tokenizer(list(reversed(fakes.WORDS))), fakes.reward_model("token")
    foreign = fakes.reward_model("token")
    foreign.model.embed_tokens.weight[3:] = native.model.embed_tokens.weight[3:].flip(0)
    one = make(saved["policy"], reward_model=native, reward_tokenizer=fakes.tokenizer())
    other = make(saved["policy"], reward_model=foreign, reward_tokenizer=own)
    prompts, responses = (
        one.unwrapped.token_spec.tokenizer(TEXTS)["input_ids"],
        [[3, 4, 60, 17], [9], [25, 25, 30]],
    )
    paid, placed = (envs.unwrapped.score_episodes(prompts, responses) for envs in (one, other))
    np.testing.assert_allclose(placed.token_rewards, paid.token_rewards, atol=1e-5)
    np.testing.assert_allclose(placed.score, paid.score, atol=1e-5)
    np.testing.assert_allclose(
        paid.step_rewards, paid.token_rewards, atol=1e-5
    )  # causal: each paid at once
    assert (np.abs(placed.step_rewards - paid.step_rewards).max(1) > 1e-2).tolist() == [
        True,
        False,
        True,
    ]


@pytest.mark.parametrize("head", FOREIGN)
@pytest.mark.parametrize("design", ["terminal", "uniform", "occlusion", "shapley"])
def test_designs_that_read_finished_texts(design, head, saved):
    options = {"reward_model": FOREIGN[head](), "reward_tokenizer": letters()}
    envs = make(saved["policy"], reward=design, kl="none", **options)
    prompts, responses, steps = play(envs)
    infos = steps[-1][4]
    scored = envs.unwrapped.score_episodes(prompts, responses)
    np.testing.assert_allclose(scored.token_rewards, infos["token_rewards"], atol=1e-5)
    np.testing.assert_allclose(
        scored.step_rewards, np.stack([reward for _, reward, *_ in steps], axis=1), atol=1e-5
    )
    expected = infos["score"]
    if design == "shapley":
        expected = (
            expected
            - score_texts(
                task(saved["policy"], **options).scorer, [(prompt, []) for prompt in prompts]
            ).numpy()
        )
    np.testing.assert_allclose(infos["token_rewards"].sum(1), expected, atol=1e-4)


@pytest.mark.parametrize("design", ["delta", "segment", "attention", "gradient"])
def test_designs_that_read_prefixes_or_the_models_inside_are_refused(design, saved):
    message = rf"reward='{design}' needs a .*causal.* with the policy's own tokens.*, which this env does not have"
    for head in FOREIGN:
        with pytest.raises(InvalidArgument, match=message):
            make(
                saved["policy"],
                reward_model=FOREIGN[head](),
                reward_tokenizer=letters(),
                reward=design,
            )


def test_only_a_causal_model_with_the_policys_tokens_scores_prefixes(saved):
    cases = [
        ("token", fakes.tokenizer()),
        ("token", None),
        ("token", letters()),
        ("bidirectional", None),
    ]
    scorers = [
        task(saved["policy"], reward_model=FOREIGN[head](), reward_tokenizer=own).scorer
        for head, own in cases
    ]
    assert [isinstance(scorer, Scorer) for scorer in scorers] == [True, True, False, False]
    more = task(
        saved["policy"],
        reward_model=saved["token"],
        reward_tokenizer=fakes.tokenizer([*fakes.WORDS, "more"]),
    ).scorer
    assert isinstance(more, Scorer)  # ids that the policy never sends


def test_a_reward_model_that_looks_ahead_reads_the_policys_tokens_where_it_brings_none(
    saved, tmp_path, caplog
):
    model = fakes.bidirectional_reward_model()
    envs = make(saved["policy"], reward_model=fakes.saved(model, tmp_path, with_tokenizer=False))
    assert "the reward model is taken to read the model's token ids" in caplog.text
    prompts = [[3, 4]]
    with torch.no_grad():
        logits = model(torch.tensor([[3, 4, 9, 25]])).logits[0, 2:, 0]
    np.testing.assert_allclose(
        envs.unwrapped.score_episodes(prompts, [[9, 25]]).score, [logits.sum()], atol=1e-5
    )


def test_reward_models_that_read_texts_need_the_policys_tokenizer():
    options = {"tokenizer": None, "prompts": [[3, 4]]}
    with pytest.raises(
        ModelError,
        match=r"\(BertForTokenClassification\) looks ahead, .*finished texts; give a tokenizer=",
    ):
        make(fakes.causal_lm(), reward_model=fakes.bidirectional_reward_model(), **options)
    with pytest.raises(
        InvalidArgument, match="reward_tokenizer= reads texts; give a tokenizer= too"
    ):
        make(
            fakes.causal_lm(),
            reward_model=fakes.reward_model(),
            reward_tokenizer=letters(),
            **options,
        )


def test_a_reward_tokenizer_that_does_not_fit_the_reward_model_is_named(saved, tmp_path):
    with pytest.raises(
        ModelError,
        match=r"has ids up to \d+ and LlamaForTokenClassification 20 embeddings; .*reward_tokenizer=",
    ):
        make(
            saved["policy"],
            reward_model=fakes.reward_model("token", vocab_size=20),
            reward_tokenizer=letters(),
        )
    bare = fakes.saved(fakes.reward_model("token", "gpt2"), tmp_path, with_tokenizer=False)
    with pytest.raises(
        ModelError, match=r"brings no tokenizer; .* the reward model's as reward_tokenizer="
    ):
        make(saved["policy"], reward_model=bare, reward_tokenizer=bare)
    with pytest.raises(ModelError, match="nothing-here' cannot be loaded"):
        make(
            saved["policy"], reward_model=saved["token"], reward_tokenizer=tmp_path / "nothing-here"
        )


@pytest.mark.parametrize("reward", ["token", "shapley"])
def test_the_envs_max_batch_tokens_bounds_the_reward_models_forwards(reward, saved):
    sizes, paid = {}, {}
    for bound in (16384, 40):
        model, seen = FOREIGN["bidirectional"](), []
        options = {
            "reward_model": model,
            "reward_tokenizer": letters(),
            "reward": reward,
            "max_batch_tokens": bound,
        }
        envs = make(saved["policy"], **options)
        model.register_forward_pre_hook(
            lambda m, a, kwargs, s=seen: s.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        paid[bound] = play(envs)[2][-1][1]
        sizes[bound] = max(seen)
    assert sizes[40] <= 40 < sizes[16384]
    np.testing.assert_allclose(paid[40], paid[16384], atol=1e-5)


# ------------------------------------------------------- limits, memory, spec


@pytest.mark.parametrize("role", ["model", "reference", "implicit_model", "reward_model"])
def test_texts_longer_than_a_models_positions_are_refused(role):
    short = {"max_position_embeddings": P + T}
    models = {
        name: fakes.causal_lm(seed=seed)
        for seed, name in enumerate(("model", "reference", "implicit_model"))
    }
    models["reward_model"] = fakes.reward_model("token")
    models[role] = (
        fakes.reward_model("token", **short)
        if role == "reward_model"
        else fakes.causal_lm(seed=3, **short)
    )
    make(**models)
    with pytest.raises(
        InvalidArgument,
        match=rf"= 8 tokens, but the {role.replace('_', ' ')} has 7 positions; give max_new_tok",
    ):
        make(**models, max_new_tokens=T + 1)


def test_a_reward_model_that_reads_texts_may_be_too_short_for_them(saved):
    model = fakes.reward_model("token", max_position_embeddings=6)
    with pytest.warns(
        UserWarning, match="longer than the 6 tokens that the reward model can read"
    ) as caught:
        infos = play(
            make(saved["policy"], reward_model=model, reward_tokenizer=letters(), kl="none")
        )[2][-1][4]
    assert len(caught) == 1
    np.testing.assert_allclose(infos["token_rewards"].sum(1), infos["score"], atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama_dynamic", "gemma3_dynamic"])
def test_rope_that_extends_reaches_beyond_the_configs_positions(architecture):
    play(make(fakes.causal_lm(architecture, max_position_embeddings=5), reward={}))


def test_the_caches_memory_is_reported_before_it_is_taken(saved, caplog, monkeypatch):
    options = {"reference": saved["reference"], "reward_model": saved["token"]}
    with caplog.at_level(logging.INFO, "tokenenv"):
        taken = make(saved["policy"], **options).unwrapped.cache_bytes
    layers, heads, size, bytes_each = 2, 2, 8, 4
    assert taken == 2 * (2 * layers * heads * size * bytes_each * N * (P + T))
    assert caplog.messages == [
        f"caches will take {taken / 2**20:.1f} MiB on 2 model(s): {N} texts of {P + T} tokens"
    ]
    assert caplog.records[0].levelno == logging.INFO

    caplog.clear()
    monkeypatch.setattr(trunks, "LARGE", taken)
    monkeypatch.setattr(trunks, "slot_model", lambda *args, **kwargs: pytest.fail("stop here"))
    with pytest.raises(pytest.fail.Exception, match="stop here"):
        make(saved["policy"], **options)
    assert caplog.records[0].levelno == logging.WARNING


def test_ids_of_plain_values_survive_json(saved, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(TEXTS))
    options = {
        "model": saved["policy"],
        "reward_model": saved["sequence"],
        "prompts": str(prompts),
        "dtype": "float32",
    }
    limits = {"max_prompt_tokens": P, "max_new_tokens": T}
    env = gym.make("tokenenv/TextGen-v0", **options, **limits)
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    for step in (lambda e: e.reset(seed=3), lambda e: e.step(9)):
        one, other = step(env), step(again)
        np.testing.assert_array_equal(one[0]["tokens"], other[0]["tokens"])
    assert one[1] == other[1] != 0.0
    envs = gym.make_vec("tokenenv/TextGen-v0", num_envs=N, **options, **limits)
    assert EnvSpec.from_json(envs.spec.to_json()).kwargs["model"] == saved["policy"]
