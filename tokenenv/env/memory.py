"""What an env has in memory."""

from typing import Any

from tokenenv.env.engine import RewardEngine
from tokenenv.models.memory import Places
from tokenenv.types import Scorer


def env_memory(engine: RewardEngine, places: Places) -> dict[str, int]:
    """Return the bytes of each model's weights by role, of what terms keep, and of the caches.

    What lies in a memory that `places` has counted is not counted again, so a part that shares all
    of its weights with an earlier one has 0 bytes.
    """
    task = engine.context.task
    models: dict[str, Any] = {"reference": task.reference, "initial policy": task.model}
    models |= engine.frozen_models()
    sizes = {role: places.new_bytes(model) for role, model in models.items() if model is not None}
    heads = (scorer.head for scorer in (task.scorer, task.gold) if isinstance(scorer, Scorer))
    sizes["heads"] = places.new_bytes(*(getattr(head, "linear", None) for head in heads))
    for name, term in (engine.rewards.terms | engine.rewards.watched).items():
        sizes[f"term {name!r}"] = places.new_bytes(vars(term), term.save_statistics())
    return sizes | {"caches": engine.trunks.cache_bytes}
