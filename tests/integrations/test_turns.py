"""Token envs as whole turns: a text is an action, and what was written since is the observation."""

import warnings

import fakes
import gymnasium as gym
import numpy as np
import pytest
from chat_templates import CHATML, tokenizer_of
from gymnasium.utils.env_checker import check_env

from tokenenv.errors import InvalidAction, InvalidArgument
from tokenenv.integrations.turns import TurnEnv
from tokenenv.models.encoding import encode_continuation

TOKENIZER = tokenizer_of(CHATML)
END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")


def chat(respond, **options):
    sizes = {"vocab_size": len(TOKENIZER), "max_position_embeddings": 256, "eos_token_id": 2}
    given = {"prompts": ["a dog"], "max_new_tokens": 20, "max_context_tokens": 150, "kl": "none"}
    models = {"model": fakes.causal_lm(**sizes), "tokenizer": TOKENIZER, "respond": respond}
    return gym.make("tokenenv/ChatGen-v0", **(given | models | options))


def count(messages):
    turns = sum(message["role"] == "assistant" for message in messages)
    return (f"is {turns}", float(turns)) if turns < 3 else (None, 7.0)


@pytest.mark.parametrize(
    "env_id", ["Arithmetic-v0", "Calculator-v0", "Negation-v0", "Reviews-v0", "Twenty-v0"]
)
def test_gymnasiums_own_check_passes(env_id):
    env = TurnEnv(gym.make(f"tokenenv/{env_id}", kl="none", max_new_tokens=12))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        check_env(env, skip_render_check=True)


def test_turns_of_a_conversation():
    env = TurnEnv(chat(count))
    observation, _ = env.reset(seed=0)
    assert "a dog" in observation
    for number, turn in enumerate(("good", "walking<|im_end|>"), 1):
        observation, reward, terminated, truncated, info = env.step(turn)
        assert observation.split() == ["user", "is", str(number), "assistant"]
        assert (reward, terminated, truncated) == (number, False, False)
        ends = 0 if turn.endswith(">") else 1
        assert info["tokens"] == len(encode_continuation(turn, TOKENIZER)) + ends
    observation, reward, terminated, *_ = env.step("")
    assert (observation, reward, terminated) == ("", 7.0, True)


def test_a_turn_is_what_its_tokens_earn():
    options = {"max_new_tokens": 12, "kl_coef": 0.1}
    env = TurnEnv(gym.make("tokenenv/Reviews-v0", **options))
    tokens = gym.make("tokenenv/Reviews-v0", **options)
    for seed in range(3):
        env.reset(seed=seed)
        tokens.reset(seed=seed)
        turn = " the soup was good."
        stop = tokens.unwrapped.token_spec.stop_token_ids[0]
        ids = [*encode_continuation(turn, tokens.unwrapped.token_spec.tokenizer), stop]
        paid = [tokens.step(token)[1] for token in ids]
        _, reward, terminated, _, info = env.step(turn)
        np.testing.assert_allclose(reward, sum(paid), rtol=1e-6)
        assert (terminated, info["tokens"]) == (True, len(ids))


def test_what_stands_behind_the_end_of_a_turn_is_dropped():
    env = TurnEnv(chat(count))
    env.reset(seed=0)
    observation, _, _, _, info = env.step("good<|im_end|>walking")
    assert observation.split() == ["user", "is", "1", "assistant"]
    assert info["tokens"] == len(encode_continuation("good", TOKENIZER)) + 1


def test_a_text_that_is_cut_in_the_middle_of_a_turn():
    env = TurnEnv(chat(count, max_new_tokens=2, score_truncated=False))
    env.reset(seed=0)
    assert env.step("good walking dog")[1:4] == (0.0, False, True)


def test_texts_without_stop_tokens_go_on_to_their_last_token():
    env = TurnEnv(gym.make("tokenenv/Negation-v0", kl="none", max_new_tokens=4))
    env.reset(seed=0)
    words = env.spec_of_tokens.tokenizer.convert_ids_to_tokens([1, 2])
    assert env.step(" ".join(words))[2] is False
    assert env.step(" ".join([*words, *words]))[2] is True
    env.reset()
    with pytest.raises(InvalidAction, match="has no tokens, and no token ends a turn"):
        env.step("")


def test_what_turns_cannot_be_made_of_is_refused():
    with pytest.raises(InvalidArgument, match="observation='tokens'"):
        TurnEnv(gym.make("tokenenv/Negation-v0", observation="features"))
    with pytest.raises(InvalidArgument, match="kl='none'"):
        TurnEnv(gym.make("tokenenv/Negation-v0", kl="policy"))
    bare = gym.make(
        "tokenenv/TextGen-v0", model=fakes.causal_lm(), prompts=[[3]], max_new_tokens=3, reward={}
    )
    with pytest.raises(InvalidArgument, match="tokens without a text"):
        TurnEnv(bare)
    env = TurnEnv(chat(count))
    env.reset(seed=0)
    with pytest.raises(InvalidAction, match="must be a text"):
        env.step(5)
