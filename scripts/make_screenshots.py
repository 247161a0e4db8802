"""Make docs/show.png and docs/frame.png again: a short run on Reviews-v0, its page in a headless
Chromium, and a frame."""

import argparse
import shutil
import tempfile
from pathlib import Path

import gymnasium as gym
from PIL import Image
from playwright.sync_api import sync_playwright

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents import PPO
from tokenenv.agents.run.show import write_page
from tokenenv.rewards import TokenRule

DOCS = Path(__file__).parents[1] / "docs"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def repeats(prompt: list[int], response: list[int]) -> list[float]:
    """Return 1 for each token that the response has had before: a number to watch."""
    return [float(token in response[:place]) for place, token in enumerate(response)]


def frame(path: Path) -> None:
    """Draw a review as `render_mode="rgb_array"` shows it, written by the reference."""
    env = gym.make("tokenenv/Reviews-v0", render_mode="rgb_array", kl="none")
    env.reset(seed=3)
    agent = PPO(gym.make_vec("tokenenv/Reviews-v0", num_envs=1, autoreset_mode="SameStep"))
    prompt = env.unwrapped.decode(env.reset(seed=3)[0])[0]
    for token in agent.generate([prompt], seed=5)[0]:
        env.step(token)
    Image.fromarray(env.render()).crop((0, 0, 720, 150)).save(path, optimize=True)


def page(path: Path, browser: str) -> None:
    """Draw the page of a run's episodes, one of the longest open, a token pointed at."""
    with tempfile.TemporaryDirectory() as folder:
        envs = gym.make_vec(
            "tokenenv/Reviews-v0",
            num_envs=32,
            autoreset_mode="SameStep",
            watch={"repeats": TokenRule(repeats, on="tokens")},
        )
        run_dir = Path(folder) / "reviews-ppo"
        PPO(envs, lr=1e-3, run_dir=run_dir).learn(30_000, progress=True)
        with sync_playwright() as driver:
            window = driver.chromium.launch(executable_path=browser, args=FLAGS)
            tab = window.new_page(viewport={"width": 1200, "height": 560})
            tab.goto(write_page(run_dir).as_uri())
            tab.select_option("#sort", "longest first")
            tab.locator("#list li").nth(3).click()
            tab.get_by_role("button", name="advantage").click()
            tab.locator(".token").nth(6).hover()
            tab.screenshot(path=path)
            window.close()
    Image.open(path).convert("RGB").save(path, optimize=True)


def main() -> None:
    """Write both pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--browser", default=shutil.which("chromium"), help="path of a Chromium")
    args = parser.parse_args()
    frame(DOCS / "frame.png")
    page(DOCS / "show.png", args.browser)


if __name__ == "__main__":
    main()
