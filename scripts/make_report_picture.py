"""Make docs/report.png again: parts of the page of a small bench, in a headless Chromium.

python scripts/make_report_picture.py                    # runs the bench first: two minutes
python scripts/make_report_picture.py --results FOLDER   # of a bench that is there
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from make_screenshots import DOCS, FLAGS
from PIL import Image
from playwright.sync_api import sync_playwright

from tokenenv.bench import bench
from tokenenv.report import write_report

GRID = {
    "name": "small",
    "about": "Which of a handful of reward designs learns from fewer tokens, and is it more than "
    "lambda?",
    "points": 6,
    "texts": 64,
    "settings": {
        "num_envs": 32,
        "total_tokens": 6000,
        "agent": {"lr": 3e-3, "lr_schedule": "constant", "batch_tokens": 512},
    },
    "envs": {
        "delayed key": {
            "env": "tokenenv/DelayedKey-v0",
            "options": {"max_new_tokens": 8, "kl_coef": 0.05},
            "seed_options": ["task_seed"],
            "goal": {"share": 0.5},
        },
        "negation": {
            "env": "tokenenv/Negation-v0",
            "options": {"max_new_tokens": 8},
            "seed_options": ["task_seed"],
            "goal": {"share": 0.5},
        },
    },
    "designs": {name: name for name in ("terminal", "uniform", "delta", "oracle")},
    "rows": {
        "terminal, lambda 1": {
            "reward": "terminal",
            "agent": {"lambda_actor": 1.0, "lambda_critic": 1.0},
        }
    },
}
PARTS = (
    "#learning-curves",
    "#credit-places",
    "#heat-maps .text >> nth=5",
    "#heat-maps .text >> nth=8",
)
"""What is drawn of the page, one below the other."""


def draw(page: Path, path: Path, browser: str) -> None:
    """Draw the parts of a page into one picture."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        window = driver.chromium.launch(executable_path=browser, args=FLAGS)
        tab = window.new_page(viewport={"width": 860, "height": 900}, device_scale_factor=1.5)
        tab.goto(page.as_uri())
        files = [Path(folder) / f"{number}.png" for number in range(len(PARTS))]
        for part, file in zip(PARTS, files, strict=True):
            tab.locator(part).screenshot(path=file)
        window.close()
        pictures = [Image.open(file).convert("RGB") for file in files]
    size = max(one.width for one in pictures), sum(one.height + 24 for one in pictures)
    whole, top = Image.new("RGB", size, "white"), 0
    for one in pictures:
        whole.paste(one, (0, top))
        top += one.height + 24
    kept = {"method": Image.Quantize.MAXCOVERAGE, "kmeans": 2, "dither": Image.Dither.NONE}
    whole.quantize(256, **kept).save(path, optimize=True)


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, help="the folder of a bench, in place of a new one")
    parser.add_argument("--browser", default=shutil.which("chromium"), help="path of a Chromium")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = args.results or bench(GRID, Path(folder) / "small").folder
        page = write_report(results, Path(folder) / "page.html")
        draw(page, DOCS / "report.png", args.browser)


if __name__ == "__main__":
    main()
