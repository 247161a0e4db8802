"""A turn-level environment of another library, trained by the token: skyrl_gym's GSM8k with turns.

    pip install skyrl-gym
    python examples/skyrl_turns.py

`gsm8k_multi_turn` pays 1 for the right answer in the form "#### 7", which also ends a text, and a
small reward for any answer of that form. Nothing of it is changed: `TurnLevel` lets it answer the
policy's turns. The model is the tiny one of `chat.py`, with random weights, and the questions are
sums of one digit.
"""

import gymnasium as gym
import skyrl_gym
import tyro
from chat import tiny_chat_model

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents import PPO
from tokenenv.agents.run.evaluate import evaluate
from tokenenv.integrations.turn_level import TurnLevel

TURNS = 4


def make(answer: str) -> skyrl_gym.Env:
    """Return a fresh environment for a row of the prompts, as SkyRL does it."""
    extras = {"reward_spec": {"ground_truth": answer}, "max_turns": TURNS}
    return skyrl_gym.make("gsm8k_multi_turn", extras=extras)


def main(total_tokens: int = 20_000, num_envs: int = 32) -> None:
    """Learn, and print what the environment paid for a text before and after."""
    model, tokenizer = tiny_chat_model([*"0123456789+", "#### ", "now", "please"])
    sums = [(a, b) for a in range(1, 5) for b in range(1, 5)]
    game = TurnLevel(make)
    rows = game.prompts([{"prompt": f"{a}+{b}", "answer": str(a + b)} for a, b in sums])
    envs = gym.make_vec(
        "tokenenv/ChatGen-v0",
        num_envs=num_envs,
        model=model,
        tokenizer=tokenizer,
        prompts=rows,
        respond=game,
        max_new_tokens=16,
        max_context_tokens=256,
        kl_coef=0.002,
    )
    agent = PPO(envs, lr=3e-3, batch_tokens=256)
    before = evaluate(agent, envs, num_texts=256)
    agent.learn(total_tokens)
    after = evaluate(agent, envs, num_texts=256)
    for name, found in {"before": before, "after": after}.items():
        right = sum(episode.reward.max() > 0.5 for episode in found.episodes) / 256
        print(
            f"{name}: {found.rewards['turn']:.2f} of reward a text, {right:.0%} right, "
            f"{found.turns:.1f} turns, {found.length:.1f} own tokens, {found.written:.0f} written"
        )


if __name__ == "__main__":
    tyro.cli(main)
