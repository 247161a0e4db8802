"""A `MultiTurnEnv` of the verifiers library as one that answers turn by turn (`turn_level`).

Such an environment runs a whole conversation itself and asks a client for the model's turns. Here
the client gives the turns so far and stops the conversation where it is asked for the next one.
"""

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tokenenv.errors import InvalidArgument, missing
from tokenenv.models.chat_turns import Answer


class _Waiting(BaseException):
    """Raised where the environment waits for the policy's next turn. It is no `Exception`, because
    the environment takes those for its own failures."""

    def __init__(self, messages: list[Any]) -> None:
        self.messages = messages


class Rollout:
    """One conversation of a `MultiTurnEnv`, played from its beginning at each turn.

    Args:
        env: the environment, whose state is that of a conversation only.
        row: the columns of the prompt's row; those of a verifiers data set (`answer`, `info`, ...).
    """

    def __init__(self, env: Any, row: Mapping[str, Any]) -> None:
        self.env, self.row = env, row
        self.prompt: list[dict[str, Any]] = []
        self.turns: list[str] = []

    def begin(self, prompt: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Begin with a prompt, and return it."""
        self.prompt = prompt
        return prompt

    def step(self, turn: str) -> Answer:
        """Return what the environment says to a turn, with the rubric's reward where it is done."""
        self.turns.append(turn)
        # A thread of its own, because a notebook's has a loop that runs already.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, self._play()).result()

    def close(self) -> None:
        """Do nothing: the environment is the caller's."""

    async def _play(self) -> Answer:
        row = {"example_id": 0, **self.row, "prompt": self.prompt}
        try:
            state = await self.env.rollout(row, _client(self.turns), "policy", {})
        except _Waiting as waiting:
            # Behind the prompt and the turns so far stands what was said to the last one.
            return Answer(_after_last_turn(waiting.messages))
        if state.get("error") is not None:
            raise InvalidArgument(
                f"{type(self.env).__name__} failed: {state['error']!r:.200}"
            ) from state["error"]
        await self.env.rubric.score_rollout(state)
        last = _after_last_turn(state["completion"] or [])
        return Answer(last or None, float(state["reward"]), True)


def _after_last_turn(messages: list[Any]) -> list[dict[str, Any]]:
    """The messages behind the policy's last turn."""
    plain = [_plain(message) for message in messages]
    turns = [i for i, message in enumerate(plain) if message["role"] == "assistant"]
    return plain[turns[-1] + 1 :] if turns else []


def _plain(message: Any) -> dict[str, Any]:
    given = message if isinstance(message, Mapping) else message.model_dump()
    return {"role": given["role"], "content": given.get("content") or ""}


def _client(turns: list[str]) -> Any:
    """A client that gives the turns one after another."""
    try:
        import verifiers as vf
        from verifiers.types import Response, ResponseMessage
    except ImportError as error:
        raise missing("tokenenv.integrations.verifiers", "'verifiers<0.4'") from error

    class Turns(vf.Client):
        def __init__(self) -> None:
            super().__init__(None)
            self.left = list(turns)

        async def get_response(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.left:
                raise _Waiting(list(prompt))
            message = ResponseMessage(
                content=self.left.pop(0), finish_reason="stop", is_truncated=False
            )
            return Response(id="turn", created=0, model="policy", message=message)

        async def _unused(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

        setup_client = to_native_tool = to_native_prompt = get_native_response = _unused
        raise_from_native_response = from_native_response = close = _unused

    return Turns()
