"""Environments of other libraries that step in whole turns, as what answers in a token env.

    game = TurnLevel(lambda number: Guess(number))
    rows = game.prompts([{"number": 4}, {"number": 7}])
    envs = gym.make_vec("tokenenv/ChatGen-v0", num_envs=8, model=..., prompts=rows, respond=game)

A turn-level environment has a state, and what answers in a token env is a function of the text. So
the turns of a text are played again on a fresh environment wherever none is at hand that has seen
exactly them: then a text may be copied, saved, scored and begun in the middle.
"""

import inspect
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from tokenenv.errors import InvalidArgument
from tokenenv.models.chat_turns import Answer, messages_of
from tokenenv.models.encoding import encode_plain, quoted
from tokenenv.turns import Reply, TextSoFar

Message = Mapping[str, Any]


class Player(Protocol):
    """One episode of a turn-level environment."""

    def begin(self, prompt: list[dict[str, Any]]) -> Any:
        """Begin with the conversation of the prompt, which is empty where the environment says it
        itself, and return the prompt's message or messages."""
        ...

    def step(self, turn: str) -> Answer:
        """Answer a turn of the policy's."""
        ...

    def close(self) -> None:
        """Let go of what the environment holds."""
        ...


class TurnLevel:
    """Let a turn-level environment answer: give it as `respond=` to ChatGen-v0, or its `respond` as
    that of a `Task` of yours.

    What the environment says becomes the next message, its reward the turn's own reward, and where
    it is done the text ends. A turn that is cut by T has no answer, and its reward is not paid.

    Args:
        make: returns a fresh environment. It is given what it names: columns of the prompts, and
            `seed`, a number of the episode's own where there is no such column. The environment
            must be a function of these and of the turns. A copied text (`fork`) has a seed of its
            own, so an environment that draws by `seed` does not go with Monte-Carlo credit: draw by
            a column there. The environment has one of these forms:

            - `reset() -> message` (or `(message, info)`) and `step(text) -> (message, reward,
              done)`, also with an info behind it, or Gymnasium's five values. A message is a text,
              a message {"role", "content"} or a list of these.
            - `init(prompt)` and `step(text) -> {"observations", "reward", "done", ...}`, the form
              of skyrl_gym.
            - `rollout` and `rubric`, the form of a `MultiTurnEnv` of verifiers. Its reward is paid
              at the end, and one environment may be returned again and again.
        keep: how many running environments, and how many answers, are kept.
    """

    def __init__(self, make: Callable[..., Any], keep: int = 256) -> None:
        self.make, self.keep = make, keep
        self._running: OrderedDict[Any, Player] = OrderedDict()
        self._known: OrderedDict[Any, Answer] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the environments behind: a copy plays the turns again."""
        empty: dict[str, Any] = {"_running": OrderedDict(), "_known": OrderedDict()}
        return self.__dict__ | empty

    def prompts(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return a table of prompts: each row with what its environment says first as its
        "prompt"."""
        found = []
        for row in rows:
            player = self._open(row)
            first = player.begin(_messages(row.get("prompt")))
            player.close()
            found.append({**row, "prompt": _messages(first)})
        return found

    def __call__(self, messages: list[dict[str, Any]], text: TextSoFar) -> Answer:
        """Answer the last turn of a conversation (`respond` of ChatGen-v0)."""
        own = sum(segment.own for segment in text.segments)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        return self._answer(messages[: answers[-own]], text)

    def respond(self, text: TextSoFar) -> Reply:
        """Answer the last turn of a text that no chat template writes (`Task.respond`): the
        contents of the messages are written as they are."""
        answer = self._answer([{"role": "user", "content": text.decode(text.prompt)}], text)
        said = encode_plain(quoted(_content(answer), text.tokenizer), text.tokenizer)
        return Reply(said, answer.reward, answer.ends)

    def _answer(self, prompt: list[dict[str, Any]], text: TextSoFar) -> Answer:
        turns = tuple(text.decode(segment.tokens) for segment in text.segments if segment.own)
        start = json.dumps([prompt, dict(text.columns), self._seed(text)], sort_keys=True)
        if (start, turns) in self._known:
            return self._known[start, turns]
        player = self._running.pop((start, turns[:-1]), None) or self._replayed(prompt, text)
        answer = player.step(turns[-1])
        _keep(self._known, (start, turns), answer, self.keep)
        if answer.ends:
            player.close()
        elif dropped := _keep(self._running, (start, turns), player, self.keep):
            dropped.close()
        return answer

    def _replayed(self, prompt: list[dict[str, Any]], text: TextSoFar) -> Player:
        """A fresh environment that has seen the turns of a text but for the last one.

        Raises:
            InvalidArgument: it did not answer what stands in the text.
        """
        player = self._open({**text.columns, **self._seed(text)})
        player.begin([dict(message) for message in prompt])
        for segment, after in zip(text.segments, text.segments[1:], strict=False):
            if segment.own:
                answer = player.step(text.decode(segment.tokens))
                _check_again(answer, text.decode(after.tokens), text)
        return player

    def _open(self, given: Mapping[str, Any]) -> Player:
        names = inspect.signature(self.make).parameters.values()
        every = any(p.kind == p.VAR_KEYWORD for p in names)
        wanted = {p.name for p in names}
        lacking = [p.name for p in names if _needed(p) and p.name not in given]
        if lacking:
            raise InvalidArgument(
                f"make() asks for {lacking[0]!r}, which is no column of the prompts; they have "
                f"{', '.join(given) or 'none'}."
            )
        return _player(self.make(**{k: v for k, v in given.items() if every or k in wanted}), given)

    def _seed(self, text: TextSoFar) -> dict[str, Any]:
        """The episode's seed, where `make` asks for it and no column gives it."""
        asked = "seed" in inspect.signature(self.make).parameters
        return {"seed": text.seed} if asked and "seed" not in text.columns else {}


class _Plain:
    """`reset` and `step`."""

    def __init__(self, env: Any) -> None:
        self.env = env

    def begin(self, prompt: list[dict[str, Any]]) -> Any:
        first = self.env.reset()
        return first[0] if isinstance(first, tuple) else first

    def step(self, turn: str) -> Answer:
        returned = self.env.step(turn)
        if not isinstance(returned, tuple) or not 3 <= len(returned) <= 5:
            raise InvalidArgument(
                f"step() of {type(self.env).__name__} returned {returned!r:.200}; allowed: "
                "(message, reward, done), with an info behind it, or Gymnasium's five values."
            )
        message, reward, *flags = returned
        return _checked(message, reward, any(flags[: 2 if len(flags) == 3 else 1]), self.env)

    def close(self) -> None:
        if close := getattr(self.env, "close", None):
            close()


class _SkyRL(_Plain):
    """`init` and `step`, whose result is a mapping."""

    def begin(self, prompt: list[dict[str, Any]]) -> Any:
        return self.env.init(prompt)[0]

    def step(self, turn: str) -> Answer:
        out = self.env.step(turn)
        if out.get("postprocessed_action") not in (None, turn):
            raise InvalidArgument(
                f"{type(self.env).__name__} rewrites the policy's turn (postprocessed_action); "
                "what was sampled stays in the text, so such an environment cannot answer here."
            )
        return _checked(out["observations"], out["reward"], out["done"], self.env)


def _player(env: Any, row: Mapping[str, Any]) -> Player:
    if hasattr(env, "rollout") and hasattr(env, "rubric"):
        from tokenenv.integrations.verifiers import Rollout

        return Rollout(env, row)
    if hasattr(env, "init") and hasattr(env, "step"):
        return _SkyRL(env)
    if hasattr(env, "reset") and hasattr(env, "step"):
        return _Plain(env)
    raise InvalidArgument(
        f"make() returned {type(env).__name__}, which has neither reset and step, nor init and "
        "step (skyrl_gym), nor rollout and rubric (verifiers)."
    )


def _checked(message: Any, reward: Any, done: Any, env: Any) -> Answer:
    """What an environment returned. A message that is empty is none."""
    said = _messages(message) or None
    if said is None and not done:
        raise InvalidArgument(
            f"{type(env).__name__} returned neither a message nor that it is done; one of the two "
            "is needed to go on."
        )
    return Answer(said, float(reward), bool(done))


def _messages(message: Any) -> list[dict[str, Any]]:
    empty = message is None or (isinstance(message, str | list | tuple) and not message)
    return [] if empty else messages_of(message)


def _content(answer: Answer) -> str:
    return "".join(message["content"] for message in answer.message or [])


def _check_again(answer: Answer, written: str, text: TextSoFar) -> None:
    """Raises `InvalidArgument` where a turn that was played again has another answer than the one
    in the text."""
    ids = encode_plain(quoted(_content(answer), text.tokenizer), text.tokenizer)
    # As the tokenizer spells it, and without spaces: some templates strip them.
    said, stands = ("".join(one.split()) for one in (text.decode(ids), written))
    if answer.ends or said not in stands:
        raise InvalidArgument(
            f"the turn-level environment answered {_content(answer)!r:.80} when a turn was played "
            f"again, and the text has {written!r:.80}; it must be a function of the turns and of "
            "what make() is given. A copied text has another seed: let make() name a column."
        )


def _needed(parameter: inspect.Parameter) -> bool:
    by_name = parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    return by_name and parameter.default is parameter.empty


def _keep(kept: OrderedDict[Any, Any], key: Any, value: Any, most: int) -> Any:
    """Put a value last; return the first one where there are now too many, else None."""
    kept[key] = value
    return kept.popitem(last=False)[1] if len(kept) > most else None
