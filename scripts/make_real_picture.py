"""Makes docs/real-model.png again, and prints the texts that README.md shows with it: what
examples/real_model.py does to SmolLM2-135M-Instruct.

    make real-models
    OMP_NUM_THREADS=1 python scripts/make_real_picture.py --model build/real/smollm2
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import tyro

from tokenenv.agents.run.evaluate import Evaluation, evaluate

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import real_model  # noqa: E402

BLUE, ORANGE = "#1f5fa8", "#c2570c"


def main(model: str, total_tokens: int = 4096, texts: int = 32) -> None:
    """Learns as the example does, and draws it."""
    agent = real_model.make_agent("ppo", model)
    held_out = real_model.make_envs(model, real_model.HELD_OUT)
    updates: list[tuple[float, float, float]] = []

    def on_update(metrics: dict[str, float], episodes: Any) -> None:
        updates.append(
            (metrics["time/tokens"], metrics["objective/score"], metrics["objective/kl"])
        )

    before = evaluate(agent, held_out, num_texts=texts)
    agent.learn(total_tokens, progress=True, on_update=on_update)
    after = evaluate(agent, held_out, num_texts=texts)
    draw(updates, before, after)
    tokenizer = held_out.unwrapped.token_spec.tokenizer
    for title, found in {"before": before, "after": after}.items():
        print(
            f"\n{title}: sentiment {found.score:.2f} ± {found.score_error:.2f}, "
            f"{found.kl:.1f} nats of KL per text"
        )
        for episode in found.episodes[:12:4]:
            print("  -", tokenizer.decode(episode.response, skip_special_tokens=True))
    print(f"\n{updates[-1][0]:,.0f} tokens")


def draw(updates: list[tuple[float, float, float]], before: Evaluation, after: Evaluation) -> None:
    """Draws sentiment and KL against tokens: of the texts that were learned from, and of held-out
    ones before and after."""
    tokens, score, kl = zip(*updates, strict=True)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    ends = [0, tokens[-1]]
    for axis, values, held_out, errors, title in (
        (axes[0], score, [before.score, after.score], [before.score_error, after.score_error],
         "VADER's sentiment of an answer"),
        (axes[1], kl, [before.kl, after.kl], None, "KL to the model itself, nats per answer"),
    ):  # fmt: skip
        axis.plot(tokens, values, color=BLUE, marker="o", label="answers that it learned from")
        axis.errorbar(
            ends, held_out, errors, color=ORANGE, fmt="s", capsize=3, label="other questions"
        )
        axis.set(title=title, xlabel="tokens learned from")
        axis.grid(alpha=0.3)
    axes[0].legend(loc="lower right")
    figure.savefig(ROOT / "docs" / "real-model.png", dpi=120)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
