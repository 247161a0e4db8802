"""The model card of a reward model: a README.md with the header that model hubs read."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from tokenenv.agents.run.card import is_hub_id, versions
from tokenenv.fit.checkpoint import plain
from tokenenv.fit.config import FitConfig
from tokenenv.fit.objectives import OBJECTIVES, Objective
from tokenenv.safety.shown import visible, without_secrets

TASKS = {
    "token": "token-classification",
    "value": "text-classification",
    "log-ratio": "text-generation",
}
"""What model hubs call a model of each readout."""
OPTION = {"token": "reward_model", "value": "reward_model", "log-ratio": "implicit_model"}
"""The env's option that takes a model of each readout."""
MEANING = {
    "loss": "the objective's loss",
    "train_loss": "the loss on the training examples, during the epoch",
    "accuracy": "pairs told apart by the sum of rewards, which RL adds up",
    "own_accuracy": "pairs told apart by the mean reward, which the loss compares",
    "calibration_error": "expected calibration error of the probabilities that the loss makes",
    "score_correlation": "correlation of the model's value of a text with its score",
    "score_error": "root of the mean squared error of the score, in the unit of the data",
    "label_accuracy": "token labels foretold",
    "share_correlation": "correlation of rewards with their targets",
    "share_error": "root of the mean squared error of a reward",
    "value_correlation": "correlation of values with their targets",
    "value_error": "root of the mean squared error of a value",
    "reward_per_token": "mean reward of a token, as saved",
    "reward_per_token_error": "its standard error",
    "length_correlation": "correlation of the sum of rewards with the length",
    "epoch": "the epoch that was kept",
    "epochs": "epochs that were trained",
    "tokens": "tokens that the model read in training",
    "seconds": "wall-clock time",
}
"""What each measure is."""
CARD = """---
{header}---

# {title}

{what}

{facts}

## Use

```python
import gymnasium as gym

envs = gym.make_vec(ENV_ID, num_envs=64, reward="{design}", {option}=FOLDER_OR_HUB_ID)
```

```
tokenenv train --env ENV_ID --reward {design} --options {option} FOLDER_OR_HUB_ID
tokenenv audit --env ENV_ID --reward {design} --options {option} FOLDER_OR_HUB_ID
```

{ratio}
## Figures

{held_out}

| measure | value | |
|---|---|---|
{figures}
{notes}
## Settings

```yaml
{settings}```
"""


def model_card(
    config: FitConfig,
    measures: Mapping[str, float],
    counts: Mapping[str, int],
    notes: Sequence[str],
    scaling: Sequence[str] = (),
) -> str:
    """Return the text of the card.

    Args:
        config: the run's.
        measures: of the held-out examples.
        counts: how many examples there are, by their part.
        notes: what was left out, and what to know of the model, in sentences.
        scaling: what was done to scores and rewards, in sentences.
    """
    objective = OBJECTIVES[config.objective]
    facts = {
        "Trained from": f"`{described(config.model)}`",
        "Data": f"`{described(config.data)}`: {_counted(counts)}",
        "Versions": ", ".join(versions()),
    }
    return CARD.format(
        header=yaml.safe_dump(_header(config, objective), sort_keys=False),
        title=f"Reward model: {config.objective}",
        what="\n".join([f"{WHAT[objective.readout]} Objective: {objective.summary}.", *scaling]),
        ratio=_ratio(config) if objective.readout == "log-ratio" else "",
        facts="\n".join(f"- {name}: {value}" for name, value in facts.items()),
        design=objective.design,
        option=OPTION[objective.readout],
        held_out=_held_out(counts),
        figures="\n".join(_rows(measures)),
        notes=_section("To know", notes),
        settings=yaml.safe_dump(record(config), sort_keys=False, allow_unicode=True),
    )


WHAT = {
    "token": "A causal token classifier with one label: the reward of each token.",
    "value": "A causal sequence classifier with one label: the value of the text so far. A token's "
    "reward is what it changes.",
    "log-ratio": "A causal language model: a token's reward is beta times its log-ratio to the "
    "reference.",
}
"""What a model of each readout is."""


def record(config: FitConfig) -> dict[str, Any]:
    """Return the settings as plain values, without keys and passwords; an object of Python is named
    by its type."""
    names = (name for name in config.__dataclass_fields__ if name not in ("out", "resume"))
    return without_secrets({name: described(getattr(config, name)) for name in names})


def described(value: Any) -> Any:
    """Return a setting as a card may show it."""
    value = plain(value)
    return visible(value) if isinstance(value, str) else value


def _header(config: FitConfig, objective: Objective) -> dict[str, Any]:
    header = {
        "library_name": "transformers",
        "pipeline_tag": TASKS[objective.readout],
        "tags": ["tokenenv", "reward-model", config.objective],
    }
    source = config.model if isinstance(config.model, str) and not config.is_new else None
    # A hub refuses a card whose base model is anything else than an id.
    return {"base_model": source} | header if is_hub_id(source) else header


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {part}" for part, count in counts.items())


def _ratio(config: FitConfig) -> str:
    """Return how log-ratios are paid as they were trained."""
    reference = described(config.model if config.reference is None else config.reference)
    return (
        f"\nIt was trained with the reference `{reference}` and beta {config.coef:g}. "
        'The env needs this reference too, and `reward="implicit"` pays its own `kl_coef` for each '
        f"nat: with `kl_coef={config.coef:g}` what was trained.\n"
    )


def _held_out(counts: Mapping[str, int]) -> str:
    if not counts.get("held-out examples"):
        return "No examples were held out, so nothing was measured."
    return f"On {counts['held-out examples']:,} held-out examples."


def _rows(measures: Mapping[str, float]) -> Iterable[str]:
    for name, value in measures.items():
        shown = f"{value:,.0f}" if name in ("tokens", "epoch", "epochs") else f"{value:.4g}"
        yield f"| `{name}` | {shown if math.isfinite(value) else '-'} | {MEANING.get(name, '')} |"


def _section(title: str, lines: Sequence[str]) -> str:
    listed = "\n".join(f"- {' '.join(visible(line).split())}" for line in lines)
    return f"\n## {title}\n\n{listed}\n" if lines else ""
