"""The folder of sampled data: the rows, the tokenizer, and a card that says what they are."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import yaml

from tokenenv.fit.data import DATA, TOKENIZER
from tokenenv.fit.objectives import OBJECTIVES
from tokenenv.fit.sample import SampleConfig, Sampled
from tokenenv.fit.sample_rows import Row
from tokenenv.models.saving import whole_folder

TITLES = {
    "ranking": "Rankings",
    "scores": "Scored texts",
    "values": "Texts with the value of every prefix",
    "texts": "Texts",
}
HEADER = {"tags": ["tokenenv"], "configs": [{"config_name": "default", "data_files": DATA}]}
"""What data hubs read: without it they would take the tokenizer's files for data."""
CARD = """---
{header}---

# {title}

{facts}

To train a token reward model on it:

```bash
tokenenv fit --data {folder} --objective {objective} --out runs/reward
```

## Settings

```yaml
{settings}```
"""


def write_folder(
    found: Sampled,
    config: SampleConfig,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    env: str = "",
    options: Mapping[str, Any] | None = None,
    policy: str = "the reference",
) -> None:
    """Write data.jsonl, tokenizer/ and README.md. The folder appears whole or not at all; one that
    was written here before is replaced.

    Args:
        env, options, policy: what the texts come from, for the card.

    Raises:
        InvalidArgument: `folder` is a file, or holds something else.
        RunFolderError: it cannot be written.
    """
    settings = {"env": env, "options": dict(options or {}), "policy": policy} | asdict(config)
    facts = "\n".join(f"- {name}: {value}" for name, value in facts_of(found, config).items())
    card = CARD.format(
        header=yaml.safe_dump(HEADER, sort_keys=False),
        title=f"{TITLES[config.kind]} of {env or 'an environment'}",
        facts=f"- Texts of {policy}\n{facts}",
        folder=folder,
        objective=next(name for name, one in OBJECTIVES.items() if one.kind == config.kind),
        settings=yaml.safe_dump(settings, sort_keys=False),
    )
    with whole_folder(folder) as new:
        with (new / DATA).open("w", encoding="utf-8") as file:
            file.writelines(
                json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in found.rows
            )
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(new / TOKENIZER)
        (new / "README.md").write_text(card, encoding="utf-8")


def facts_of(found: Sampled, config: SampleConfig) -> dict[str, str]:
    """Return the figures of sampled data, by name, in the order in which they are shown."""
    rows = found.rows
    facts = {"Examples": f"{len(rows):,}", "Different prompts": f"{distinct_prompts(rows):,}"}
    if config.kind == "ranking":
        facts["Ties"] = f"{found.ties:,} of {found.prompts:,} draws, drawn again"
    for name, scores, lengths in columns_of(rows):
        if scores:
            facts[f"Mean {config.by} of {name}"] = f"{np.mean(scores):.4g}"
        facts[f"Mean length of {name}"] = f"{np.mean(lengths):.4g} tokens"
    return facts


def distinct_prompts(rows: Sequence[Row]) -> int:
    """Return how many different prompts there are."""
    return len({tuple(row["prompt_ids"]) for row in rows})


def columns_of(rows: Sequence[Row]) -> list[tuple[str, list[float], list[int]]]:
    """Return the scores, if there are any, and the lengths of each kind of text, with its name."""
    if "chosen_ids" in rows[0]:
        names = ("chosen", "rejected")
        return [
            (f"{n} texts", [r[f"{n}_score"] for r in rows], [len(r[f"{n}_ids"]) for r in rows])
            for n in names
        ]
    if "responses_ids" in rows[0]:
        lists = [(row.get("scores") or row["true_scores"], row["responses_ids"]) for row in rows]
        return [
            (f"the {which} texts", [s[place] for s, _ in lists], [len(t[place]) for _, t in lists])
            for which, place in (("first", 0), ("last", -1))
        ]
    scores = [row["score"] for row in rows if "score" in row]
    return [("texts", scores, [len(row["response_ids"]) for row in rows])]
