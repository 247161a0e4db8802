"""Running texts as something to look at: terminal colours, or a picture in which every token has
the colour of its reward.

Colours are blue for below zero and orange for above, which the colour-blind tell apart, full at
`FULL` and beyond.
"""

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from tokenenv.env.engine import RewardEngine
from tokenenv.env.texts import TextBuffer
from tokenenv.models.pieces import TokenPieces
from tokenenv.safety.shown import visible

RENDER_MODES = ("ansi", "rgb_array", "human")
FULL = 1.0
"""The reward whose colour is full."""
UP, DOWN = (230, 126, 20), (66, 133, 222)
GREY = "#5b6270"
"""Of what the policy has not written."""
WIDTH, COLUMNS, LINES, LINE_HEIGHT = 720, 82, 14, 20
"""A picture's width in pixels, and the text it has room for: the last lines, if there are more."""
MARGIN, HEADER = 12, 30


@dataclass(frozen=True, slots=True)
class RunningText:
    """One text as it stands."""

    prompt: str
    pieces: Sequence[str]
    """What each response token adds, whoever wrote it."""
    rewards: Sequence[float | None]
    """What the env has paid for each of these tokens, None for one that it wrote itself; hindsight
    terms are placed once the text has ended."""
    score: float | None
    """The scorer's score of the text so far, where it scores prefixes."""
    kl: float | None = None
    """What the KL term has paid of `rewards`, where there is one."""

    @property
    def header(self) -> str:
        """Return the figures of the text in one line."""
        score = "" if self.score is None else f"score {self.score:.2f}   "
        kl = "" if self.kl is None else f", of which kl {self.kl:.2f}"
        paid = [reward for reward in self.rewards if reward is not None]
        return f"{score}reward {sum(paid):.2f}{kl}   {len(paid)} tokens"


def ansi(text: RunningText) -> str:
    """Return the text with terminal colours: the prompt and what the env wrote dim, each token of
    the policy's on the colour of its reward."""
    pairs = zip(text.pieces, text.rewards, strict=True)
    tokens = "".join(_ansi_token(_visible(piece), reward) for piece, reward in pairs)
    return f"{text.header}\n\033[2m{_drawn(text.prompt)}\033[0m{tokens}"


def _ansi_token(piece: str, reward: float | None) -> str:
    if reward is None:
        return f"\033[2m{piece}\033[0m"
    r, g, b = colour(reward)
    return f"\033[48;2;{r};{g};{b}m\033[38;2;0;0;0m{piece}\033[0m"


def picture(text: RunningText) -> np.ndarray:
    """Return a picture (H, W, 3) uint8, of one size for every text. A text that is longer than the
    picture is shown from its end."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (WIDTH, HEADER + LINES * LINE_HEIGHT + MARGIN), "white")
    draw, font = ImageDraw.Draw(image), _font()
    draw.text((MARGIN, 7), text.header, fill="black", font=font)
    _legend(draw)
    for line, (column, chunk, background, ink) in _placed(text):
        x, y = MARGIN + column * _char_width(), HEADER + line * LINE_HEIGHT
        if background is not None:
            draw.rectangle(
                (x, y, x + len(chunk) * _char_width(), y + LINE_HEIGHT - 2), fill=background
            )
        draw.text((x, y), chunk, fill=ink, font=font)
    return np.asarray(image).copy()


def colour(reward: float) -> tuple[int, int, int]:
    """Return the colour of a reward: white at zero, blue below, orange above."""
    if not np.isfinite(reward):
        return 128, 128, 128
    strength = min(1.0, abs(reward) / FULL)
    red, green, blue = (
        round(255 + strength * (full - 255)) for full in (UP if reward > 0 else DOWN)
    )
    return red, green, blue


def _placed(text: RunningText) -> list[tuple[int, tuple[int, str, Any, str]]]:
    """(line, (column, characters, background, ink)) of the last `LINES` lines, wrapped at
    `COLUMNS`."""
    parts: list[tuple[str, Any, str]]
    parts = [
        (piece, None, GREY)
        for piece in textwrap.wrap(_drawn(text.prompt), COLUMNS, drop_whitespace=False) or [""]
    ]
    parts += [
        (_visible(p), None, GREY) if r is None else (_visible(p), colour(r), "black")
        for p, r in zip(text.pieces, text.rewards, strict=True)
    ]
    placed, line, column = [], 0, 0
    for piece, background, ink in parts:
        for chunk in piece.splitlines(keepends=True) or [""]:
            shown = chunk.rstrip("\n")
            if column and column + len(shown) > COLUMNS:
                line, column = line + 1, 0
            while shown:
                placed.append((line, (column, shown[: COLUMNS - column], background, ink)))
                column, shown = column + len(shown[: COLUMNS - column]), shown[COLUMNS - column :]
                if shown:
                    line, column = line + 1, 0
            if chunk.endswith("\n"):
                line, column = line + 1, 0
    first = max(0, line + 1 - LINES)
    return [(at - first, part) for at, part in placed if at >= first]


def _legend(draw: Any) -> None:
    left, cell = WIDTH - MARGIN - 41 * 3 - 34, 3
    for i in range(41):
        x = left + i * cell
        draw.rectangle((x, 10, x + cell, 20), fill=colour((i - 20) / 20 * FULL))
    draw.text((left - 26, 7), f"-{FULL:g}", fill=GREY, font=_font())
    draw.text((left + 41 * cell + 8, 7), f"+{FULL:g}", fill=GREY, font=_font())


def _visible(piece: str) -> str:
    return _drawn(piece).replace("\n", "↵\n")


def _drawn(text: str) -> str:
    """What fonts can draw, and what does not steer a terminal."""
    return visible(text).replace("\t", "    ")


@lru_cache(maxsize=1)
def _font() -> Any:
    """DejaVu Sans Mono, which matplotlib brings."""
    from matplotlib import font_manager
    from PIL import ImageFont

    return ImageFont.truetype(font_manager.findfont("DejaVu Sans Mono"), 14)


@lru_cache(maxsize=1)
def _char_width() -> float:
    return _font().getlength("m")


def running_texts(
    buffer: TextBuffer, engine: RewardEngine, pieces: TokenPieces
) -> list[RunningText]:
    """Return the N texts of an env as they stand."""
    assert engine.states is not None
    rewards_NT = engine.token_numbers()[0].cpu().numpy()
    names = engine.rewards.names
    kl_N = (
        engine.token_terms[:, names.index("kl")].sum(1).tolist()
        if "kl" in names
        else [None] * len(rewards_NT)
    )
    scores = (
        [None] * len(rewards_NT) if engine.states.score is None else engine.states.score.tolist()
    )
    texts = []
    for row, (start, end) in enumerate(zip(buffer.prompt_length, buffer.length, strict=True)):
        prompt, response = buffer.tokens[row, :start], buffer.tokens[row, start:end]
        prompt_text = "".join(pieces(prompt)).lstrip()
        rewards = np.full(end - start, None)
        own = np.ones(end - start, bool)
        if buffer.written is not None:
            own = ~buffer.written[row, start:end]
        rewards[own] = rewards_NT[row, : own.sum()].tolist()
        numbers = rewards.tolist(), scores[row], kl_N[row]
        texts.append(RunningText(prompt_text, pieces(response), *numbers))
    return texts


def show(render_mode: str, texts: Sequence[RunningText]) -> tuple[Any, ...] | None:
    """Return what `render` gives for each text: a string, a picture, or, after printing them in
    place, nothing."""
    if render_mode == "rgb_array":
        return tuple(map(picture, texts))
    strings = tuple(map(ansi, texts))
    if render_mode == "ansi":
        return strings
    sys.stdout.write("\033[H\033[2J" + "\n\n".join(strings) + "\n")
    sys.stdout.flush()
    return None
