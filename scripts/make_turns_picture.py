"""Makes docs/turns.png again: one text of Calculator-v0, whose tokens they are and what each earns."""

from pathlib import Path

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch, Rectangle

import tokenenv  # noqa: F401 registers the ids

FILE = Path(__file__).parents[1] / "docs" / "turns.png"
QUESTION, TURNS = "37*46=", ("[37*46]", "1702<eos>")
COLOURS = {"prompt": "#e3e3e3", "policy": "#cfe4ff", "environment": "#ffe2b8"}


def played() -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """The text's tokens, their authors, and the turn rewards and KL terms of the policy's."""
    envs = gym.make_vec(
        "tokenenv/Calculator-v0", num_envs=1, reward="turn", autoreset_mode="Disabled"
    )
    tokenizer = envs.unwrapped.token_spec.tokenizer
    obs, _ = envs.reset(options={"prompts": [QUESTION]})
    paid, kl = [], []
    for word in tokenizer.tokenize("".join(TURNS)):
        obs, *_, infos = envs.step(np.array([tokenizer.convert_tokens_to_ids(word)]))
        paid.append(infos["reward_terms"]["turn"][0])
        kl.append(infos["reward_terms"]["kl"][0])
    length, start = int(obs["length"][0]), int(obs["prompt_length"][0])
    own = obs["own_mask"][0, :length]
    authors = ["prompt"] * start + ["policy" if mine else "environment" for mine in own[start:]]
    words = tokenizer.convert_ids_to_tokens(obs["tokens"][0, :length].tolist())
    return words, authors, np.array(paid), np.array(kl)


def main() -> None:
    """Draws the text."""
    words, authors, paid, kl = played()
    figure, axes = plt.subplots(figsize=(12, 2.9), dpi=110)
    column = 0
    for place, (word, author) in enumerate(zip(words, authors, strict=True)):
        axes.add_patch(Rectangle((place, 0), 0.94, 1, color=COLOURS[author]))
        axes.text(
            place + 0.47,
            0.5,
            word,
            ha="center",
            va="center",
            family="monospace",
            size=11 if len(word) < 3 else 8,
        )
        if author != "policy":
            continue
        rows = [
            f"{column}",
            f"{paid[column]:.1f}" if paid[column] else "",
            f"{round(kl[column], 2) + 0.0:.2f}",
        ]
        for row, number in enumerate(rows):
            axes.text(place + 0.47, -0.55 - 0.6 * row, number, ha="center", va="center", size=7.5)
        column += 1
    for row, label in enumerate(("column of (N, T)", "turn reward", "KL term")):
        axes.text(-0.3, -0.55 - 0.6 * row, label, ha="right", va="center", size=9)
    names = {"prompt": "prompt", "policy": "own tokens", "environment": "written tokens"}
    handles = [Patch(color=colour, label=names[author]) for author, colour in COLOURS.items()]
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, 1.32), ncols=3, frameon=False
    )
    axes.set(xlim=(-3.4, len(words)), ylim=(-2.1, 1.1))
    axes.axis("off")
    figure.savefig(FILE, bbox_inches="tight")


if __name__ == "__main__":
    main()
