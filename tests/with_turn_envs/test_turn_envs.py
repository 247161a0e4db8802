"""Tasks of other libraries answer in a token env what they answer when they step by themselves."""

import asyncio

import fakes
import gymnasium as gym
import numpy as np
import pytest
import skyrl_gym
import verifiers as vf
from chat_templates import CHATML, tokenizer_of
from datasets import Dataset

from tokenenv.agents import PPO
from tokenenv.check import check_vector_env
from tokenenv.errors import InvalidArgument
from tokenenv.integrations.turn_level import TurnLevel
from tokenenv.models.encoding import encode_continuation

TOKENIZER = tokenizer_of(CHATML)
END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")


def make_envs(respond, prompts, num_envs=1, **options):
    sizes = {"vocab_size": len(TOKENIZER), "max_position_embeddings": 2048, "eos_token_id": 2}
    given = {"max_new_tokens": 60, "max_context_tokens": 1500, "kl": "none"}
    models = {"model": fakes.causal_lm(**sizes), "tokenizer": TOKENIZER, "respond": respond}
    return gym.make_vec(
        "tokenenv/ChatGen-v0",
        num_envs=num_envs,
        prompts=prompts,
        autoreset_mode="SameStep",
        **(given | models | options),
    )


def play(envs, turns):
    """Step some turns in one env: the rewards, whether the text ended, and the text."""
    obs, _ = envs.reset(seed=0)
    rewards = []
    for turn in turns:
        for token in [*encode_continuation(turn, TOKENIZER), END]:
            obs, reward, terminations, _, infos = envs.step(np.array([token]))
        rewards.append(float(reward[0]))
    last = infos["final_obs"] if terminations[0] else obs
    return rewards, bool(terminations[0]), TOKENIZER.decode(last["tokens"][0, : last["length"][0]])


# ------------------------------------------------------------------ skyrl_gym


def gsm8k(answer, turns=3):
    extras = {"reward_spec": {"ground_truth": answer}, "max_turns": turns}
    return skyrl_gym.make("gsm8k_multi_turn", extras=extras)


QUESTION = [{"prompt": "2+2?", "answer": "4"}, {"prompt": "2+3?", "answer": "5"}]


@pytest.mark.parametrize(
    "turns", [["#### 4"], ["#### 5", "#### 4"], ["no", "#### 5", "no"], ["a", " #### 3 ", "#### 4"]]
)
def test_gsm8k_of_skyrl_answers_as_it_does_by_itself(turns):
    alone, messages = gsm8k("4"), []
    alone.init([{"role": "user", "content": "2+2?"}])
    outs = [alone.step(turn) for turn in turns]
    game = TurnLevel(gsm8k)
    rewards, ended, text = play(make_envs(game, game.prompts(QUESTION[:1])), turns)
    np.testing.assert_allclose(rewards, [out["reward"] for out in outs], rtol=1e-6)
    assert ended == outs[-1]["done"]
    messages = [{"role": "user", "content": "2+2?"}]
    for turn, out in zip(turns, outs, strict=True):
        messages += [{"role": "assistant", "content": turn}, *out["observations"]]
    whole = TOKENIZER.apply_chat_template(messages, tokenize=False)
    assert text == whole.removesuffix("\n")


def test_the_contract_holds_with_skyrl():
    game = TurnLevel(gsm8k)
    options = {"max_new_tokens": 6, "max_context_tokens": 600}
    check_vector_env(make_envs(game, game.prompts(QUESTION), 3, **options), steps=14)


# ------------------------------------------------------------------ verifiers


class Guess(vf.MultiTurnEnv):
    """Says where the number lies, and ends where it is guessed."""

    async def env_response(self, messages, state, **kwargs):
        guess = messages[-1].content
        right = guess == state["answer"]
        said = "right" if right else ("higher" if guess < state["answer"] else "lower")
        if right:
            state["final_env_response"] = [vf.UserMessage(content=said)]
        return [vf.UserMessage(content=said)]


def won(completion, answer):
    """The share of turns that were not needed."""
    guesses = [message.content for message in completion if message.role == "assistant"]
    return 1 / len(guesses) if guesses[-1] == answer else 0.0


def length(completion):
    return float(len(completion))


def guess_env(**options):
    rows = Dataset.from_list([{"question": "guess", "answer": "7"}])
    return Guess(dataset=rows, rubric=vf.Rubric([won, length], [1.0, 0.1]), **options)


def rows_of(env):
    return [dict(row) for row in env.get_dataset()]


@pytest.mark.parametrize("turns", [["7"], ["4", "9", "7"], ["1", "2", "3", "4"]])
def test_a_multi_turn_env_of_verifiers_answers_and_is_paid_by_its_rubric(turns):
    env = guess_env(max_turns=4)
    game = TurnLevel(lambda: env)
    rewards, ended, text = play(make_envs(game, game.prompts(rows_of(env))), turns)
    right = turns[-1] == "7"
    assert rewards[:-1] == [0.0] * (len(turns) - 1)
    said = 2 * len(turns) if right else 2 * len(turns) - 1  # without an answer to the last turn
    np.testing.assert_allclose(rewards[-1], right / len(turns) + 0.1 * said, rtol=1e-6)
    assert ended
    parts = [f"<|im_start|>assistant\n{turn}<|im_end|>" for turn in turns]
    assert all(part in text for part in parts)
    assert text.count("<|im_start|>user") == 1 + len(turns) - (not right)
    assert text.endswith("right<|im_end|>\n") == right


def test_it_answers_where_a_loop_runs_already():
    env = guess_env(max_turns=4)
    game = TurnLevel(lambda: env)

    async def inside():
        return play(make_envs(game, game.prompts(rows_of(env))), ["4", "7"])

    assert asyncio.run(inside())[1]


def test_a_failure_of_the_environment_is_said():
    class Broken(Guess):
        async def env_response(self, messages, state, **kwargs):
            raise vf.ToolCallError("no such tool")

    env = Broken(dataset=guess_env().get_dataset(), rubric=vf.Rubric([won]))
    game = TurnLevel(lambda: env)
    with pytest.raises(InvalidArgument, match=r"Broken failed: .*ToolCallError"):
        play(make_envs(game, game.prompts(rows_of(env))), ["4"])


def test_the_contract_holds_with_verifiers_and_a_policy_learns():
    env = guess_env(max_turns=4)
    game = TurnLevel(lambda: env)
    envs = make_envs(game, game.prompts(rows_of(env)), 2, max_new_tokens=5, kl="reference")
    check_vector_env(envs, steps=10)
    PPO(envs, batch_tokens=20, epochs=1, minibatches=1).learn(total_tokens=20)
