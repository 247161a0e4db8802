"""What a step costs where an environment may write into texts.

    python benchmarks/turns_step.py [--num-envs 64] [--repetitions 9]

It prints milliseconds a step (medians of interleaved repetitions, CPU time) of Reviews-v0 with its
token reward: without an environment, with one that is asked after every token and says nothing, and
with one that writes 4 tokens after every eighth token of each text. The last is also given for each
token that models read, for a step then reads more of them.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable

import numpy as np
from timing import medians

from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.envs.tasks import reviews
from tokenenv.turns import Reply, TextSoFar

STEPS, EVERY, WRITTEN = 40, 8, 4


def silent(text: TextSoFar) -> None:
    """Say nothing."""


def now_and_then(text: TextSoFar) -> Reply | None:
    """Write a few tokens after every eighth one of the policy's."""
    own = sum(len(segment.tokens) for segment in text.segments if segment.own)
    return Reply([20] * WRITTEN) if own % EVERY == 0 else None


def rollout(envs: TokenVectorEnv, tokens: np.ndarray) -> Callable[[], None]:
    """Return a call that writes one text in each slot."""

    def run() -> None:
        envs.reset(seed=0)
        for _ in range(STEPS):
            envs.step(tokens)

    return run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-envs", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args()
    task = dataclasses.replace(reviews.task(), max_new_tokens=STEPS + 1)
    room = task.max_prompt_tokens + STEPS + 1 + WRITTEN * (STEPS // EVERY + 1)
    tasks = {
        "nobody else writes": task,
        "asked, and silent": dataclasses.replace(task, respond=silent, max_context_tokens=room),
        f"{WRITTEN} tokens after every {EVERY}": dataclasses.replace(
            task, respond=now_and_then, max_context_tokens=room
        ),
    }
    word = next(i for i in range(10, 200) if i not in task.stop_token_ids)
    tokens = np.full(options.num_envs, word)
    runs = {
        name: rollout(TokenVectorEnv(options.num_envs, task=one, autoreset_mode="SameStep"), tokens)
        for name, one in tasks.items()
    }
    found = medians(runs, options.repetitions, time.process_time)
    plain = next(iter(found.values()))
    print(f"Reviews-v0, N={options.num_envs}, {STEPS} steps, CPU time")
    for name, seconds in found.items():
        each = 1000 * seconds / STEPS
        print(f"{name:26} {each:7.2f} ms a step  {seconds / plain:5.2f} of the first")
    read = 1 + WRITTEN / EVERY
    print(f"the last one for each token that is read: {seconds / plain / read:.2f} of the first")


if __name__ == "__main__":
    main()
