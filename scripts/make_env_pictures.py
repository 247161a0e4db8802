"""Makes the pictures of docs/environments again: a good text of each id, as
`render_mode="rgb_array"` shows it."""

from pathlib import Path

import numpy as np
from env_pages import dense, make, slug
from PIL import Image

from tokenenv.agents import PPO
from tokenenv.agents.run.evaluate import evaluate
from tokenenv.registration import TASKS

FOLDER = Path(__file__).parents[1] / "docs" / "environments"
DRAWN = 64
"""Texts that are drawn; the best of them is shown."""


def picture(env_id: str) -> Image.Image:
    """The text, each token on the colour of what it was paid, without the empty lines below."""
    oracle = make(env_id, 1).oracle
    prompt, response = _best_text(env_id) if oracle is None else _optimal_text(env_id)
    env = make(env_id, 1, render_mode="rgb_array", kl="none", reward=dense(env_id))
    # The seed of `_optimal_text`, so that the environment answers as it did there.
    env.reset(seed=0, options={"prompts": [prompt]})
    for token in response:
        env.step(np.array([token]))
    return _cropped(env.render()[0])


def _best_text(env_id: str) -> tuple[list[int], list[int]]:
    """Of many texts by the reference the one with the highest score, and of those the one into which
    the environment wrote the most: its prompt, and the policy's own tokens."""
    envs = make(env_id, 8, autoreset_mode="SameStep")
    found = evaluate(PPO(envs), envs, num_texts=DRAWN).episodes
    best = max(found, key=lambda episode: (episode.score, len(episode.written)))
    return best.prompt.tolist(), best.response.tolist()


def _optimal_text(env_id: str) -> tuple[list[int], list[int]]:
    """A text by the exact optimum of score - beta KL: the reference seldom scores."""
    env = make(env_id, 1, autoreset_mode="Disabled")
    obs, ended = env.reset(seed=0)[0], np.zeros(1, bool)
    prompt, response = obs["tokens"][0, : obs["prompt_length"][0]].tolist(), []
    rng = np.random.default_rng(1)
    while not ended[0]:
        probs = np.asarray(env.oracle.policy(obs, env.kl_coef), dtype=np.float64)[0]
        response.append(int(rng.choice(len(probs), p=probs / probs.sum())))
        obs, _, ended, *_ = env.step(np.array(response[-1:]))
    return prompt, response


def _cropped(picture_HW3: np.ndarray) -> Image.Image:
    """Down to a margin below the last line that is not white."""
    inked = np.flatnonzero((picture_HW3 != 255).any(axis=(1, 2)))
    return Image.fromarray(picture_HW3[: inked[-1] + 12])


def main() -> None:
    """Writes a picture for each id."""
    for env_id in TASKS:
        path = FOLDER / f"{slug(env_id)}.png"
        picture(env_id).quantize(256).save(path, optimize=True)
        print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
