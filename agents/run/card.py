"""The model card of a trained policy: a README.md with the header that model hubs read."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import yaml

from tokenenv.agents.rollout.env_rows import method
from tokenenv.models.adapters import adapter_layers
from tokenenv.models.saving import source_of
from tokenenv.safety.shown import without_secrets

if TYPE_CHECKING:
    from tokenenv.agents.agent import Agent

PACKAGES = ("tokenenv-rl", "torch", "transformers", "peft")
"""The packages whose versions a card names."""
LOADING = {
    "peft": "from peft import AutoPeftModelForCausalLM as Model",
    "transformers": "from transformers import AutoModelForCausalLM as Model",
}


def model_card(agent: "Agent", *, merge: bool = False) -> str:
    """Return the text of the card: what the model was made from, with what, and how to load it."""
    policy: Any = agent.policy
    library = "peft" if adapter_layers(policy.model) and not merge else "transformers"
    source = source_of(policy.model)[0]
    name, env = type(agent).__name__, _env(agent)
    header: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["tokenenv", "reinforcement-learning", name.lower()],
    }
    if library == "peft":
        header["tags"].append("lora")
    if is_hub_id(source):  # a hub refuses a card whose base model is anything else
        header = {"base_model": source} | header
    facts = {
        "Base model": source or "built in memory",
        "Environment": env["id"],
        "Reward": env["reward"],
        "Algorithm": name,
        "Tokens": f"{agent.tokens_seen:,} in {agent.updates} updates",
        **dict(_last_metrics(agent.metrics)),
        "Versions": ", ".join(versions()),
    }
    return CARD.format(
        header=yaml.safe_dump(header, sort_keys=False),
        title=f"{name} on {env['id']}",
        facts="\n".join(f"- {key}: {value}" for key, value in facts.items()),
        settings=yaml.safe_dump(without_secrets(asdict(agent.config)), sort_keys=False),
        loading=LOADING[library],
        dtype=str(getattr(policy.model, "dtype", "float32")).removeprefix("torch."),
    )


CARD = """---
{header}---

# {title}

{facts}

The tokenizer, its chat template and the generation config are those of the base model.
The critic is not part of this folder; it is in the checkpoints of the run.

```python
{loading}
from transformers import AutoTokenizer

model = Model.from_pretrained(FOLDER_OR_HUB_ID, dtype="{dtype}")  # as it was trained
tokenizer = AutoTokenizer.from_pretrained(FOLDER_OR_HUB_ID)
```

## Settings

```yaml
{settings}```
"""


def is_hub_id(source: str | None) -> bool:
    """Return whether this is a model's name on a hub, as "owner/name", and no folder's."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(source or "")
    except HFValidationError:
        return False
    return source is not None and not source.startswith((".", "/", "~"))


def _env(agent: "Agent") -> dict[str, Any]:
    """Return the env's id and its reward, in words."""
    known = method(agent.envs, "identity") or {}
    terms = known.get("terms", {}) if isinstance(known, Mapping) else {}
    named = [_described(name, term) for name, term in terms.items()]
    spec = getattr(agent.core, "spec", None)
    env_id = getattr(spec, "id", None) or type(agent.core).__name__
    return {"id": env_id, "reward": ", ".join(named) or "of the environment's own"}


def _described(name: str, term: Mapping[str, Any]) -> str:
    function = f" of {term['function']}" if "function" in term else ""
    return f"{name} ({term['class']}{function}, weight {term['weight']})"


def _last_metrics(metrics: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Yield what the last update's texts were worth, as far as it is known."""
    for name, value in metrics.items():
        if name.startswith("objective/") and math.isfinite(value):
            yield f"`{name}` of the last update", f"{value:.4g}"


def versions() -> Iterator[str]:
    """Yield the installed packages of `PACKAGES`, each with its version."""
    for package in PACKAGES:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
