"""Chats: each model reads the conversation by its own template, wherever the prompt comes from."""

import copy
import logging
import warnings

import fakes
import gymnasium as gym
import numpy as np
import pytest
import torch
from makes import MAKES

from tokenenv.agents import PPO, BestOfN
from tokenenv.agents.run.evaluate import evaluate
from tokenenv.errors import InvalidArgument
from tokenenv.models.chats import Chats, end_of_turn, frame_of
from tokenenv.models.encoding import encode_continuation
from tokenenv.prompts import load_prompts
from tokenenv.rewards.rule import Rule
from tokenenv.types import Scorer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "[INST] {{ m.content | trim }} [/INST]"
    "{% elif m.role == 'system' %}{{ raise_exception('no system here') }}"
    "{% else %} {{ m.content | trim }}</s>{% endif %}{% endfor %}"
)
CHAT = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "is"},
    {"role": "user", "content": "good?"},
]
PROMPTS = ["a dog", CHAT]
P, T = 90, 20


def policy_tokenizer():
    """<s> and </s> as its own ends of text, and <|im_end|> as that of a turn."""
    tokenizer = copy.deepcopy(MAKES["bytes"]())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def reward_tokenizer(template=INST):
    tokenizer = copy.deepcopy(MAKES["legacy"]())
    tokenizer.chat_template = template
    return tokenizer


POLICY, REWARD = policy_tokenizer(), reward_tokenizer()
STOP = POLICY.convert_tokens_to_ids("<|im_end|>")
SIZES = {"max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2}


def reward_model(kind="sequence", size=None):
    return fakes.reward_model(kind, vocab_size=size or len(REWARD), **SIZES)


def make(num_envs=2, tokenizer=POLICY, **options):
    model = fakes.causal_lm(vocab_size=len(tokenizer), **SIZES)
    options = {
        "prompts": PROMPTS,
        "max_prompt_tokens": P,
        "max_new_tokens": T,
        "chat_template": True,
        **options,
    }
    options = {
        "autoreset_mode": "SameStep",
        "kl": "none",
        "reward": None if "reward_model" in options else {},
        **options,
    }
    return gym.make_vec(
        "tokenenv/TextGen-v0", num_envs=num_envs, model=model, tokenizer=tokenizer, **options
    )


def messages_of(prompt):
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def policy_ids(prompt):
    return POLICY.apply_chat_template(
        messages_of(prompt), add_generation_prompt=True, return_dict=False
    )


def rendered(prompt, answer, tokenizer=REWARD):
    """The conversation as the reward model's own template writes it, by transformers alone."""
    return tokenizer.apply_chat_template(
        [*messages_of(prompt), {"role": "assistant", "content": answer}], tokenize=False
    )


def logits_of(model, text, tokenizer=REWARD):
    encoded = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, return_tensors="pt"
    )
    with torch.no_grad():
        return model(input_ids=encoded["input_ids"]).logits.flatten(), encoded["offset_mapping"][
            0, :, 1
        ]


# --------------------------------------------- what a reward model reads


@pytest.mark.parametrize("kind", ["sequence", "token"])
@pytest.mark.parametrize("stopped", [True, False])
def test_a_reward_model_reads_the_conversation_by_its_own_template(kind, stopped):
    model, answer = reward_model(kind), " walking, not good "
    envs = make(reward_model=model, reward_tokenizer=REWARD)
    response = encode_continuation(answer, POLICY) + [STOP] * stopped
    envs.reset(options={"prompts": PROMPTS})
    steps = [envs.step(np.full(2, token)) for token in response] if stopped else []
    scored = envs.unwrapped.score_episodes(PROMPTS, [response] * 2)
    for row, prompt in enumerate(PROMPTS):
        text = rendered(prompt, answer)
        before = text.index("walking")
        if not stopped:
            text = text.removesuffix("</s>")
        logits, ends = logits_of(model, text)
        expected = logits.sum() if kind == "sequence" else logits[ends > before].sum()
        np.testing.assert_allclose(scored.score[row], expected, atol=1e-5)
        if stopped:
            np.testing.assert_allclose(steps[-1][4]["score"][row], expected, atol=1e-5)
        if stopped and kind == "token":
            np.testing.assert_allclose(
                scored.token_rewards[row, len(response) - 1], logits[-1], atol=1e-5
            )  # </s>
            np.testing.assert_allclose(scored.token_rewards[row].sum(), expected, atol=1e-5)
            assert (scored.token_rewards[row, 1 : len(response) - 2] != 0).all()


def test_one_bos_and_the_roles_as_marks():
    ids = REWARD(rendered(CHAT, "is"), add_special_tokens=False)["input_ids"]
    assert ids.count(1) == 1
    seen = []
    model = reward_model()
    model.register_forward_pre_hook(
        lambda m, a, kwargs: seen.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    make(reward_model=model, reward_tokenizer=REWARD).unwrapped.score_episodes(
        [CHAT], [[*encode_continuation("is", POLICY), STOP]]
    )
    assert seen[-1] == [ids]


def test_the_same_tokens_by_another_template_are_read_by_that_and_it_is_said(caplog):
    own = policy_tokenizer()
    own.chat_template = INST
    model = reward_model(size=len(POLICY))
    scored = {}
    for name, tokenizer in (("own", own), ("policy's", POLICY)):
        with caplog.at_level(logging.WARNING, "tokenenv"):
            envs = make(reward_model=model, reward_tokenizer=tokenizer).unwrapped
        assert isinstance(envs._task.scorer, Scorer) == (name == "policy's")
        scored[name] = envs.score_episodes(
            [CHAT], [[*encode_continuation("is", POLICY), STOP]]
        ).score[0]
    assert [
        m for m in caplog.messages if "chat template is not the policy's" in m
    ] == caplog.messages[:1]
    np.testing.assert_allclose(
        scored["own"], logits_of(model, rendered(CHAT, "is", own), own)[0][0], atol=1e-5
    )
    assert abs(scored["own"] - scored["policy's"]) > 1e-3
    spelled_otherwise = policy_tokenizer()
    spelled_otherwise.chat_template = "{# the same #}" + CHATML
    envs = make(reward_model=model, reward_tokenizer=spelled_otherwise).unwrapped
    assert isinstance(envs._task.scorer, Scorer)  # a template is what it writes


def test_a_reward_model_without_a_template_reads_the_policys_words_and_it_is_said(caplog):
    make(reward_model=reward_model(), reward_tokenizer=reward_tokenizer(None))
    assert "the reward model's tokenizer has no chat template" in caplog.text


def test_a_conversation_that_its_template_refuses_is_named():
    system = [{"role": "system", "content": "be good"}, *CHAT]
    envs = make(reward_model=reward_model(), reward_tokenizer=REWARD)
    with pytest.raises(
        InvalidArgument, match=r"does not fit the chat template of .*no system here"
    ):
        envs.unwrapped.score_episodes([system], [[5, STOP]])
    with pytest.raises(InvalidArgument, match="does not write an assistant's message as it is"):
        frame_of(reward_tokenizer("{{ bos_token }}"), CHAT)


def test_ids_of_no_known_conversation_are_read_as_plain_text_with_one_warning():
    model = reward_model()
    envs = make(reward_model=model, reward_tokenizer=REWARD).unwrapped
    known = envs.score_episodes([policy_ids(CHAT)], [[5, STOP]]).score
    np.testing.assert_array_equal(known, envs.score_episodes([CHAT], [[5, STOP]]).score)
    strange = policy_ids("a cat")
    with pytest.warns(UserWarning, match="token ids of no known conversation") as caught:
        plain, _ = (envs.score_episodes([strange], [[5, STOP]]).score for _ in range(2))
    assert len(caught) == 1
    text = POLICY.decode([*strange, 5], skip_special_tokens=True)
    with torch.no_grad():
        np.testing.assert_allclose(
            plain, model(**REWARD(text, return_tensors="pt")).logits[0], atol=1e-5
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        envs.score_episodes(["a cat"], [[5, STOP]])
        envs.score_episodes([strange], [[5, STOP]])  # known from now on


def test_a_reward_model_object_that_may_have_other_ids_is_asked_for_its_tokenizer():
    with pytest.raises(
        ValueError, match=rf"has 40 token ids, the policy {len(POLICY)}, .*; give reward_tokenizer="
    ):
        make(reward_model=reward_model(size=40))
    assert isinstance(
        make(reward_model=reward_model(size=len(POLICY))).unwrapped._task.scorer, Scorer
    )
    bare = {
        "tokenizer": None,
        "prompts": [[3]],
        "max_prompt_tokens": 4,
        "max_new_tokens": T,
        "model": fakes.causal_lm(),
    }
    with pytest.raises(ValueError, match="give tokenizer= and reward_tokenizer="):
        gym.make_vec("tokenenv/TextGen-v0", reward_model=reward_model(size=40), **bare)


def test_a_reward_models_pad_id_beyond_its_embeddings():
    model = reward_model()
    model.config.pad_token_id = len(REWARD)
    envs = make(reward_model=model, reward_tokenizer=REWARD)
    scores = envs.unwrapped.score_episodes(PROMPTS, [[5, 6, STOP], [5, STOP]]).score
    for score, prompt, ids in zip(scores, PROMPTS, ([5, 6], [5]), strict=True):
        np.testing.assert_allclose(
            score, logits_of(model, rendered(prompt, POLICY.decode(ids)))[0], atol=1e-5
        )


# ------------------------------------------------- wherever prompts come from


def test_prompts_given_later_are_read_as_the_envs_own():
    envs = make()
    obs, _ = envs.reset(options={"prompts": ["a dog", CHAT]})
    for row, prompt in enumerate(PROMPTS):
        assert obs["tokens"][row, : obs["length"][row]].tolist() == policy_ids(prompt)
    ids = envs.reset(options={"prompts": [policy_ids("a dog"), [5, 6]]})[0]
    assert ids["length"].tolist() == [len(policy_ids("a dog")), 2]
    with pytest.raises(
        InvalidArgument, match=r"options\['prompts'\]\[0\] has \d+ tokens and max_prompt_tokens=90"
    ):
        envs.reset(options={"prompts": ["walking " * 90, "a"]})
    plain = make(chat_template=False, prompts=["a dog"])
    assert plain.reset()[0]["length"].tolist() == [len(POLICY("a dog")["input_ids"])] * 2
    with pytest.raises(InvalidArgument, match="Chat messages need chat_template=True"):
        plain.reset(options={"prompts": [CHAT, CHAT]})


def test_generate_and_evaluate_read_prompts_as_the_env_does():
    envs = make(num_envs=2, reward=Rule(lambda prompt, response: 1.0), kl="reference")
    agent = PPO(envs)
    expected = agent.generate([policy_ids("a dog")], seed=3)
    assert agent.generate(["a dog"], seed=3) == expected
    assert agent.generate("a dog", seed=3) == expected  # one text is a list of one
    assert (
        agent.generate([CHAT], seed=3)
        == agent.generate(CHAT, seed=3)
        == agent.generate([policy_ids(CHAT)], seed=3)
    )
    assert agent.generate(["a dog"], seed=3, chats=None) == agent.generate(
        [POLICY("a dog")["input_ids"]], seed=3
    )
    with pytest.raises(InvalidArgument, match="chat_template=True"):
        agent.generate([CHAT], chats=None)
    episodes = evaluate(agent, envs, prompts=PROMPTS).episodes
    assert [e.prompt.tolist() for e in episodes] == [policy_ids(prompt) for prompt in PROMPTS]


def test_best_of_n_takes_a_single_text_too():
    envs = make(num_envs=2, group_size=2, reward_model=reward_model(size=len(POLICY)))
    agent = BestOfN(envs)
    assert agent.generate("a dog", seed=1) == agent.generate([policy_ids("a dog")], seed=1)


@pytest.mark.parametrize("temperature", [-1.0, -1e-9, float("nan"), float("inf")])
def test_temperatures_that_mean_nothing_are_refused(temperature):
    agent = PPO(make(kl="reference"))
    with pytest.raises(InvalidArgument, match=r"temperature=.* must be finite and 0 or more"):
        agent.generate(["a"], temperature=temperature)
    with pytest.raises(InvalidArgument, match=r"temperature=.* must be finite and 0 or more"):
        evaluate(agent, make(kl="reference"), num_texts=2, temperature=temperature)


@pytest.mark.parametrize("kl", ["reference", "policy"])
def test_temperature_0_takes_the_likeliest_token(kl):
    agent = PPO(make(kl="reference"), temperature=0.7)
    greedy = agent.generate(PROMPTS, greedy=True)
    assert (
        agent.generate(PROMPTS, temperature=0, seed=5) == greedy != agent.generate(PROMPTS, seed=5)
    )
    found = evaluate(agent, make(kl=kl), prompts=PROMPTS, temperature=0)
    assert [e.response.tolist() for e in found.episodes] == greedy
    np.testing.assert_allclose(
        found.kl, -np.mean([e.ref_logprob.sum() for e in found.episodes]), rtol=1e-5
    )


# ------------------------------------------------------------ long prompts


def test_long_chats_lose_the_beginning_of_their_longest_message():
    long = [
        CHAT[0],
        CHAT[1],
        {"role": "user", "content": "the dog is not a cat and walking is good"},
    ]
    options = {"vocab_size": len(POLICY), "long_prompts": "truncate", "chat_template": True}
    whole = policy_ids(long)
    limit = len(whole) - 6
    (ids,) = load_prompts([long], POLICY, max_prompt_tokens=limit, **options)
    assert len(ids) == limit
    text = POLICY.decode(ids)
    head, tail = POLICY.decode(whole).split("the dog is not a cat and walking is good")
    assert text.startswith(head)
    assert text.endswith(tail)
    kept = text.removeprefix(head).removesuffix(tail)
    assert kept
    assert "the dog is not a cat and walking is good".endswith(kept)
    (ends,) = load_prompts(
        [long], POLICY, max_prompt_tokens=5, **options
    )  # too few for the template
    assert ends == [whole[0], *whole[-4:]]
    assert load_prompts([long], POLICY, max_prompt_tokens=len(whole), **options) == [whole]


def test_the_reward_model_reads_the_whole_of_a_conversation_that_was_shortened():
    chats = Chats(POLICY)
    ids = chats.encode(CHAT, "a prompt", limit=len(policy_ids(CHAT)) - 1)
    assert ids != policy_ids(CHAT)
    assert chats.messages(ids) == CHAT
    assert chats.messages([1, 2]) is None


def test_a_message_without_content_is_not_what_is_shortened():
    prompt = [{"role": "system"}, *CHAT]
    ids = Chats(POLICY).encode(prompt, "a prompt")
    shorter = Chats(POLICY).encode(prompt, "a prompt", limit=len(ids) - 1)
    assert len(shorter) == len(ids) - 1
    assert shorter[:3] == ids[:3]


# --------------------------------------------------------------- stop tokens


def test_a_chat_stops_at_what_closes_an_answer_in_the_template():
    """The generation config and the tokenizer name other ids."""
    assert end_of_turn(POLICY) == STOP
    assert end_of_turn(REWARD) == 2
    for template in (
        None,
        "{{ bos_token }}",
        "{% for m in messages %}{{ m.content }} {% endfor %}",
        "{{ raise_exception('x') }}",
    ):
        assert end_of_turn(reward_tokenizer(template)) is None
    envs = make()
    assert envs.unwrapped.token_spec.stop_token_ids == (2, STOP)
    envs.reset()
    assert envs.step(np.array([STOP, 5]))[2].tolist() == [True, False]
    assert make(stop_token_ids=[7]).unwrapped.token_spec.stop_token_ids == (7,)


def test_ids_that_the_model_has_not_stop_nothing():
    tokenizer = policy_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<new>"})
    model = fakes.causal_lm(vocab_size=len(POLICY), **SIZES)
    model.generation_config.eos_token_id = [2, 9]
    options = {"prompts": ["a"], "max_prompt_tokens": P, "max_new_tokens": T, "reward": {}}
    envs = gym.make_vec("tokenenv/TextGen-v0", model=model, tokenizer=tokenizer, **options)
    assert envs.unwrapped.token_spec.stop_token_ids == (2, 9, STOP)
