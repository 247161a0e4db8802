"""Make docs/show.png and docs/frame.png again: the page of a run on a real model, in a headless
Chromium, and a frame of Reviews-v0.

    python scripts/make_screenshots.py --model build/real/smollm2   # trains first: ten minutes
    python scripts/make_screenshots.py --run runs/happy             # the page of a run that is there

The run is GRPO on a LoRA adapter of SmolLM2-135M-Instruct (`make real-models`), paid by VADER's
sentiment of the answer (`pip install nltk-vader-sentiment`).
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import gymnasium as gym
from PIL import Image
from playwright.sync_api import sync_playwright

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents import GRPO, PPO
from tokenenv.agents.run.show import write_page
from tokenenv.rewards import Rule

DOCS = Path(__file__).parents[1] / "docs"
THINGS = "bridges tables libraries bread rivers bicycles glass clocks rain markets paper roads salt"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def frame(path: Path) -> None:
    """Draw a review as `render_mode="rgb_array"` shows it, written by the reference."""
    env = gym.make("tokenenv/Reviews-v0", render_mode="rgb_array", kl="none")
    env.reset(seed=3)
    agent = PPO(gym.make_vec("tokenenv/Reviews-v0", num_envs=1, autoreset_mode="SameStep"))
    prompt = env.unwrapped.decode(env.reset(seed=3)[0])[0]
    for token in agent.generate([prompt], seed=5)[0]:
        env.step(token)
    Image.fromarray(env.render()).crop((0, 0, 720, 150)).save(path, optimize=True)


def sentiment(prompt: str, response: str) -> float:
    """Return VADER's sentiment of the answer, from -1 to 1."""
    from vader import polarity_scores  # imported here, because a run that is there needs no VADER

    return polarity_scores(response)["compound"]


def train(run_dir: Path, model: str) -> None:
    """Train an adapter on the model, and leave the run folder."""
    envs = gym.make_vec(
        "tokenenv/TextGen-v0",
        num_envs=16,
        group_size=4,
        autoreset_mode="SameStep",
        model=model,
        chat_template=True,
        prompts=[f"Tell me about {thing}." for thing in THINGS.split()],
        max_new_tokens=32,
        reward={"sentiment": Rule(sentiment, dense=True)},
        kl_coef=0.02,
    )
    settings = {"lora_rank": 8, "lr": 1e-3, "epochs": 1, "batch_tokens": 512}
    GRPO(envs, run_dir=run_dir, **settings).learn(4096, progress=True)


def page(path: Path, run_dir: Path, browser: str, text: int, token: int) -> None:
    """Draw the page of a run's episodes, a text of the list open, one of its tokens pointed at."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        window = driver.chromium.launch(executable_path=browser, args=FLAGS)
        tab = window.new_page(viewport={"width": 1440, "height": 650}, device_scale_factor=1.5)
        tab.goto(write_page(run_dir, Path(folder) / "page.html").as_uri())
        tab.locator("#list li").nth(text).click()
        tab.locator(".open .token").nth(token).hover()
        tab.screenshot(path=path)
        window.close()
    # 256 colours, of a kind that keeps the rare tints: a third of the size.
    kept = {"method": Image.Quantize.MAXCOVERAGE, "kmeans": 2, "dither": Image.Dither.NONE}
    Image.open(path).convert("RGB").quantize(256, **kept).save(path, optimize=True)


def main() -> None:
    """Write both pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="build/real/smollm2", help="the folder of the model")
    parser.add_argument("--run", type=Path, help="a run folder to draw, in place of training one")
    parser.add_argument(
        "--text", type=int, default=0, help="the place in the list of the open text"
    )
    parser.add_argument("--token", type=int, default=0, help="the token that is pointed at")
    parser.add_argument("--browser", default=shutil.which("chromium"), help="path of a Chromium")
    args = parser.parse_args()
    frame(DOCS / "frame.png")
    with tempfile.TemporaryDirectory() as folder:
        run_dir = args.run or Path(folder) / "smollm2-happy"
        if not args.run:
            train(run_dir, args.model)
        page(DOCS / "show.png", run_dir, args.browser, args.text, args.token)


if __name__ == "__main__":
    main()
