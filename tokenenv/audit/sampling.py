"""The reference's texts that the audit looks at: several for each prompt."""

import math

import numpy as np

from tokenenv.agents.rollout.text import Text
from tokenenv.audit.texts import OnText
from tokenenv.audit.writing import Reference, blank, written
from tokenenv.env.vector_env import TokenVectorEnv


def reference_texts(envs: TokenVectorEnv, num_texts: int, seed: int, on_text: OnText) -> list[Text]:
    """Sample texts of the reference at temperature 1: about as many of each prompt as there are
    prompts, so that texts can be compared within a prompt, and across prompts.

    Where the numbers do not divide, a few texts less than `num_texts` come back.
    """
    side = 2 ** int(math.log2(math.sqrt(num_texts)))
    count = min(len(envs.prompts), num_texts // side)
    rng = np.random.default_rng([seed, 0])
    chosen = np.sort(rng.choice(len(envs.prompts), count, replace=False))
    texts = begun(envs, np.repeat(chosen, num_texts // count), seed)
    return written(envs, texts, Reference(envs, seed=seed), on_text)


def begun(envs: TokenVectorEnv, numbers: np.ndarray, seed: int = 0) -> list[Text]:
    """Return texts without a response, one for each number of a prompt."""
    return [
        blank(
            seed * 2**20 + i,
            envs.prompts[number],
            int(number),
            dict(envs.columns[number]) if len(envs.columns) else {},
        )
        for i, number in enumerate(numbers.tolist())
    ]
