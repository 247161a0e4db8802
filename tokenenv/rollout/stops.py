"""Where an engine stops writing."""

from tokenenv.types import TokenSpec


def stop_ids(spec: TokenSpec) -> list[int]:
    """Return the ids after which an engine hands a text back: those that end it, and those after
    which the environment is asked. Where that is every id, a text is begun with `max_tokens=1`
    instead."""
    return list(dict.fromkeys((*spec.stop_token_ids, *(spec.turn_end_token_ids or ()))))
