"""PPO on real prose, in three minutes on two cores: plainer words for the Python reference.

The env continues paragraphs of the Python reference, from the standard library's `pydoc_data`. The
bundled reward model pays each token. Gold is the Flesch reading ease of the continuation, which the
learner never sees.
"""

import time
from pathlib import Path

from rich.console import Console

import tokenenv  # noqa: F401  (registers the ids)
from tokenenv.agents import PPO
from tokenenv.agents.run.evaluate import evaluate
from tokenenv.cli import Train
from tokenenv.cli.evaluate import comparison, show_examples

ENV, TOTAL_TOKENS, TEXTS = "tokenenv/PyDocs-v0", 60_000, 256
console = Console()


def main() -> None:
    """Evaluate, learn, evaluate again, and show both."""
    started, run_dir = time.monotonic(), Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    run = Train(env=ENV, total_tokens=TOTAL_TOKENS)
    held_out = run.make_envs(split="test")
    agent = PPO(run.make_envs(), run.agent, run_dir=run_dir)
    console.print(f"[bold]{ENV}[/bold]: {TEXTS} held-out prompts with the reference ...")
    before = evaluate(agent, held_out, num_texts=TEXTS)
    agent.learn(TOTAL_TOKENS, progress=True)
    console.print(f"the same {TEXTS} prompts with the trained policy ...")
    found = {"before": before, "after": evaluate(agent, held_out, num_texts=TEXTS)}
    show_examples(found, held_out.token_spec, 3)
    console.print(comparison(found))
    console.print(
        f"gold is the Flesch reading ease, 0 to 100; {time.monotonic() - started:.0f} s in all; "
        f"run folder: {run_dir}"
    )


if __name__ == "__main__":
    main()
