"""The scores of the automaton tasks, read off a list of words without an automaton, and small
versions to enumerate."""

from typing import Any

from tokenenv.envs.tasks import brackets, delayed_key, negation, planted_phrase

TASKS = {
    "PlantedPhrase": planted_phrase,
    "DelayedKey": delayed_key,
    "Brackets": brackets,
    "Negation": negation,
}
SMALL: dict[str, dict[str, Any]] = {
    "PlantedPhrase": {"vocab_size": 5, "max_new_tokens": 4, "num_decoys": 3},
    "DelayedKey": {"vocab_size": 6, "max_new_tokens": 4, "num_keys": 3},
    "Brackets": {"vocab_size": 6, "max_new_tokens": 5, "types": 2, "depth": 2, "pairs": 2},
    "Negation": {"vocab_size": 22, "max_new_tokens": 3, "limit": 2},
}
"""Few enough texts to look at all of them."""


def make_task(name: str, **options: Any) -> Any:
    return TASKS[name].task(**options)


def score_of(
    name: str, task: Any, tokens: list[int], *, task_seed: int = 0, **options: Any
) -> float:
    """The score of a whole response, given as ids, of the task of this name that has these
    options."""
    words = task.tokenizer.convert_ids_to_tokens(tokens)
    if name == "PlantedPhrase":
        names = ("vocab_size", "phrase_length", "num_decoys")
        wanted = planted_phrase.phrases(
            task_seed=task_seed, **{key: options[key] for key in names if key in options}
        )
        return phrase_score(tokens, *wanted)
    if name == "DelayedKey":
        good = f"key{delayed_key.good_key(options.get('num_keys', 8), task_seed)}"
        return float(words[0] == good and words[-1] == "door")
    if name == "Brackets":
        return bracket_score(
            words, options.get("types", 2), options.get("depth", 3), options.get("pairs", 2)
        )
    return negation_score(words, options.get("limit", 4))


def phrase_score(tokens: list[int], planted: tuple[int, ...], *decoys: tuple[int, ...]) -> float:
    def occurs(phrase: tuple[int, ...]) -> bool:
        return any(tuple(tokens[i : i + len(phrase)]) == phrase for i in range(len(tokens)))

    return 1.0 if occurs(planted) else 0.2 if any(map(occurs, decoys)) else 0.0


def bracket_score(words: list[str], types: int, depth: int, pairs: int) -> float:
    """By rubbing out innermost pairs until nothing changes."""
    text = "".join(word for word in words if word in "()[]{}<>"[: 2 * types])
    level = deepest = 0
    for bracket in text:
        level += 1 if bracket in "([{<" else -1
        deepest = max(deepest, level)
    closed = len(text) // 2
    for _ in range(len(text)):
        for pair in ("()", "[]", "{}", "<>"):
            text = text.replace(pair, "")
    return 0.0 if text or deepest > depth else min(closed, pairs) / pairs


def negation_score(words: list[str], limit: int) -> float:
    total = 0
    for i, word in enumerate(words):
        sign = 1
        for before in reversed(words[:i]):
            if not before.startswith("not"):
                break
            sign = -sign
        total += sign * (word.startswith("good") - word.startswith("bad"))
        total = max(-limit, min(limit, total))
    return total / limit
