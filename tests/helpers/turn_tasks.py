"""Environments that write into the texts of the toy task (`tasks.toy`)."""

from typing import Any

import numpy as np

from tokenenv.turns import Reply, TextSoFar

ENDS = tuple(range(10, 61, 2))
"""Tokens after which the toys are asked; a stop token, 7, is among them below."""
ROOM = 6
"""How many written tokens the toys' context has room for. Some replies do not fit."""


def answers(text: TextSoFar) -> Reply | None:
    """Answers in every way that there is, by what the text is: says nothing, pays alone, writes up
    to three tokens (stop tokens among them), ends the text."""
    return _reply(sum(text.response) + 3 * len(text.prompt) + text.turns_before)


def random_answers(text: TextSoFar) -> Reply | None:
    """As `answers`, drawn from the text's own numbers."""
    return _reply(int(text.rng().integers(1000)))


def _reply(number: int) -> Reply | None:
    if number % 5 == 0:
        return None
    tokens = [3 + (number * (k + 2)) % 57 for k in range(number % 4)]
    return Reply(tokens, reward=(number % 7) / 7, ends=number % 11 == 0)


def silent(text: TextSoFar) -> Reply | None:
    """Never says anything."""
    return None


RESPOND = {"fixed": answers, "random": random_answers, "silent": silent}


def options_of(turns: str | None, max_length: int) -> dict[str, Any]:
    """What a toy task of this name adds to its `Task`."""
    if turns is None:
        return {}
    return {
        "respond": RESPOND[turns],
        "turn_end_token_ids": (7, *ENDS),
        "max_context_tokens": max_length + (0 if turns == "silent" else ROOM),
    }


def response_of(obs: Any, row: int) -> tuple[list[int], list[bool]]:
    """The response tokens of a row, and which of them are the policy's."""
    span = slice(int(obs["prompt_length"][row]), int(obs["length"][row]))
    tokens = np.asarray(obs["tokens"][row])[span].tolist()
    if "own_mask" not in obs:
        return tokens, [True] * len(tokens)
    return tokens, np.asarray(obs["own_mask"][row])[span].astype(bool).tolist()
