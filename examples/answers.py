"""A verifiable reward: each prompt comes with its right answer, in a column of the prompts' file.

    python examples/answers.py

`sums.jsonl` has a line for each prompt: {"prompt": "27+85=", "answer": "112"}. `right` names the
column as a parameter, and gets its value for the text that it judges. The model is the small one
of Arithmetic-v0, which gets about 7 sums in 10 right before it has learnt.

The same from the command line, in the folder of this file:

    tokenenv train --env tokenenv/TextGen-v0 --reward answers:right --gold answers:right \
        --options model ../envs/assets/arithmetic-lm prompts sums.jsonl max_new_tokens 4 \
        --eval-prompts sums_held_out.jsonl --total-tokens 20000 --run-dir runs/answers
    tokenenv evaluate runs/answers --reward answers:right --gold answers:right
"""

from importlib.resources import files
from pathlib import Path

import gymnasium as gym
import tyro

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents import PPO
from tokenenv.agents.run.evaluate import evaluate

HERE = Path(__file__).parent
MODEL = str(files("tokenenv.envs") / "assets" / "arithmetic-lm")


def right(prompt: str, response: str, answer: str) -> float:
    """Return 1 for the right answer, else 0. `answer` is the column of that name."""
    return float(response.strip() == answer)


def make_envs(prompts: str) -> gym.vector.VectorEnv:
    """Make an env of a file's prompts."""
    return gym.make_vec(
        "tokenenv/TextGen-v0",
        num_envs=64,
        model=MODEL,
        prompts=str(HERE / prompts),
        reward=right,
        kl_coef=0.05,
        max_new_tokens=4,
    )


def main(total_tokens: int = 20_000) -> None:
    """Learn from one file's sums, and print how many of the other's are right, before and after."""
    held_out = make_envs("sums_held_out.jsonl")
    agent = PPO(make_envs("sums.jsonl"), lr=1e-3, batch_tokens=512)
    before = evaluate(agent, held_out, num_texts=256)
    agent.learn(total_tokens, progress=True)
    after = evaluate(agent, held_out, num_texts=256)
    print(
        f"right answers: {before.score:.2f} before, {after.score:.2f} after, "
        f"{after.kl:.1f} nats of KL per text"
    )


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
