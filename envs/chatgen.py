"""ChatGen-v0: bring your own conversations, in which a function of yours answers.

## Description

Any causal language model of transformers with a chat template talks to a Python function: a tool,
a simulated user, a game. The function gets the conversation as messages and returns the next
message, with a reward for the turn where it has one. The chat template writes the message into the
text, and the policy goes on behind it.

```python
def respond(messages, answer):
    if answer in messages[-1]["content"]:
        return None, 1.0
    return f"No. Think again, this was try {sum(m['role'] == 'assistant' for m in messages)}."


envs = gym.make_vec(
    "tokenenv/ChatGen-v0",
    num_envs=16,
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    prompts=[{"prompt": "What is 17 + 25?", "answer": "42"}],
    respond=respond,
)
```

What the policy sampled is never tokenised again: the tokens that are written behind a turn are what
the template adds to the conversation. A template that rewrites what was said before (drops the
model's thinking, say, or writes the date) is refused.

## Observation Space

`Dict(tokens=Box(0, V - 1, (L,), int64), length=Discrete(L + 1), prompt_length=Discrete(L + 1),
own_mask=MultiBinary(L))`: the text so far, padded on the right, and which of its tokens the policy
wrote. L is `max_context_tokens`. With `observation="features"` it is the reference's last hidden
state, `Box(-inf, inf, (H,), float32)`.

## Action Space

`Discrete(V)`: the next token, where V is the number of token ids of `model`.

## Rewards

The default design is "turn": what `respond` returned as a turn's reward is paid at the turn's last
token. With a `reward_model` or an `implicit_model` the default is TextGen-v0's. To the reward the
env adds the KL term with `kl_coef=0.05`, on the policy's tokens only.

## Starting State

A conversation drawn uniformly from `prompts`, written by the chat template up to where the answer
begins.

## Episode End

A turn ends with the token that closes an answer in the chat template. The text ends there where
`respond` returns None or says that it ends. It also ends with any other of `stop_token_ids`. It is
cut after T tokens of the policy's own, and where the next message does not fit into L tokens.

## Arguments

`model`, `prompts` and `respond` are required. All arguments are described at the function
`tokenenv.envs.chatgen.task` below. All but the first two are those of TextGen-v0.

## Version History

* v0: initial version.
"""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import numpy as np

from tokenenv.envs import textgen
from tokenenv.errors import InvalidArgument, check_given
from tokenenv.models.aligned_scorer import AlignedScorer
from tokenenv.models.chat_turns import Answer, ChatTurns, messages_of
from tokenenv.models.own_models import require_context
from tokenenv.plugins import load_name
from tokenenv.rewards.function import name_of
from tokenenv.tables import require_columns
from tokenenv.turns import Reply, TextSoFar
from tokenenv.types import Task

FURTHER = ("rng", "text")
"""Names of parameters of `respond` that no column fills."""


def _with_options_of_textgen(function: Callable[..., Task]) -> Callable[..., Task]:
    """Give a task's function the options of TextGen-v0 and what is said about them."""
    own = list(inspect.signature(function).parameters.values())[:-1]
    others = dict(inspect.signature(textgen.task).parameters)
    del others["chat_template"]
    signature = inspect.Signature([*own, *others.values()], return_annotation=Task)
    first, raises = inspect.cleandoc(function.__doc__ or "").split("\n\nRaises:")
    described = inspect.cleandoc(textgen.task.__doc__ or "").split("Args:\n")[1]
    arguments, also_raises = described.split("\n\nRaises:")
    before, _, after = arguments.partition("    chat_template:")
    after = after[after.index("\n    prompt_column:") + 1 :]
    function.__doc__ = f"{first}\n{before}{after}\n\nRaises:{also_raises}{raises}"
    function.__signature__ = signature  # type: ignore[attr-defined]
    function.__annotations__ |= {
        name: kind for name, kind in textgen.task.__annotations__.items() if name in others
    }
    return function


@_with_options_of_textgen
def task(
    *,
    respond: Any = textgen.NEEDED,
    max_context_tokens: int | None = None,
    **options: Any,
) -> Task:
    """Make the task of the user's own conversations.

    Args:
        respond: respond(messages), a function or "module:function", which answers a turn of the
            policy's. `messages` is the conversation, a list of {"role", "content"} that ends with
            the policy's turn. It returns the next message: a text, which the user says, a message
            of the user, a tool or the system where the template takes it, or a list of messages. It
            may return a tuple (message, reward) or (message, reward, ends) (a
            `tokenenv.models.chat_turns.Answer`). None, alone or as the message, ends the
            conversation. Further parameters are filled by
            name: `rng` is a generator that is seeded by the episode, `text` the
            `tokenenv.turns.TextSoFar`, any other name is a column of `prompts`, and `**row` takes
            all columns. It must be a function of what it is given, so that a text can be scored,
            copied and gone on with. A message cannot write special tokens: where it spells one, as
            a tool's result may, it is written as plain text.
        max_context_tokens: L, the most tokens of a text, whoever wrote them. By default there is as
            much room for the messages as for the policy, P + 2 T, or as much as the model has
            positions for.

    Raises:
        InvalidArgument: the chat template cannot go on with a conversation without rewriting it
            (`tokenenv.models.chat_turns`), or `respond` is no function of messages.
    """
    if respond is None or respond is textgen.NEEDED:
        check_given(["respond"])
    function = load_name(respond, f"respond={respond!r}") if isinstance(respond, str) else respond
    parameters = _parameters_of(function)
    made = textgen.task(chat_template=True, **options)
    _check_scorer(made.scorer)
    columns = [name for name, needed in parameters.items() if needed and name not in FURTHER]
    require_columns(made.columns or [{}], columns, f"respond ({name_of(function)})", "prompts")
    turns = ChatTurns(made.chats)
    unpaid = made.scorer is None and made.implicit_model is None
    return dataclasses.replace(
        made,
        respond=Responder(function, parameters, turns),
        turn_end_token_ids=(turns.end,),
        stop_token_ids=tuple(dict.fromkeys((*made.stop_token_ids, turns.end))),
        max_context_tokens=require_context(made, max_context_tokens),
        reward="turn" if unpaid else made.reward,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Responder:
    """Ask the user's function what it says to a turn, and have the chat template write it."""

    function: Callable[..., Any]
    parameters: Mapping[str, bool]
    """The names of what the function asks for beyond the messages, and whether it must get it;
    "**" where it takes a whole row."""
    turns: ChatTurns

    def __call__(self, text: TextSoFar) -> Reply | None:
        """Return the tokens behind a turn."""
        messages = self.turns.messages(text)
        answer = self._answer(self.function(copy.deepcopy(messages), **self._named(text)))
        if answer is None:
            return None
        if answer.message is None:
            return Reply(reward=answer.reward, ends=True)
        *said, last = messages
        more = messages_of(answer.message)
        tokens = self.turns.written(said, last["content"], more, answer.ends)
        return Reply(tokens, answer.reward, answer.ends)

    def _named(self, text: TextSoFar) -> dict[str, Any]:
        """What the function gets by name."""
        named = {**copy.deepcopy(dict(text.columns)), "rng": text.rng(), "text": text}
        wanted = self.parameters
        row = text.columns if "**" in wanted else ()
        return {name: one for name, one in named.items() if name in wanted or name in row}

    def _answer(self, returned: Any) -> Answer | None:
        """What the function returned, checked; None where it has nothing to say."""
        if returned is None:
            return None
        try:
            answer = Answer(*returned) if isinstance(returned, tuple) else Answer(returned)
        except TypeError as error:
            raise self._error(returned) from error
        try:
            known = isinstance(answer.reward, Real | np.ndarray)
            number = float(answer.reward) if known else float("nan")
        except (TypeError, OverflowError) as error:
            raise self._error(returned) from error
        if not np.isfinite(number) or not isinstance(answer.ends, bool | np.bool_):
            raise self._error(returned)
        return Answer(answer.message, number, bool(answer.ends))

    def _error(self, returned: Any) -> InvalidArgument:
        return InvalidArgument(
            f"respond ({name_of(self.function)}) returned {returned!r:.200}; allowed: a message, "
            "(message, reward) or (message, reward, ends) with a finite reward and ends True or "
            "False."
        )


def _parameters_of(function: Any) -> dict[str, bool]:
    """Return the names of what a function asks for beyond the messages, and whether it must get
    each.

    Raises:
        InvalidArgument: it cannot be called with the messages and the rest by name.
    """
    if not callable(function) or isinstance(function, type):
        raise InvalidArgument(
            f"respond={function!r:.80} must be a function of messages, or 'module:function'."
        )
    listed = list(inspect.signature(function).parameters.values())
    by_place = [p for p in listed if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    first, further = by_place[:1], [p for p in listed if p not in by_place[:1]]
    nameless = [p.name for p in further if p.kind == p.POSITIONAL_ONLY and p.default is p.empty]
    if not first or nameless:
        raise InvalidArgument(
            f"respond ({name_of(function)}) has the parameters ({', '.join(map(str, listed))}); it "
            "must take the messages first, and what comes after them by name."
        )
    named = [p for p in further if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    whole_row = {"**": False} if any(p.kind == p.VAR_KEYWORD for p in further) else {}
    return {p.name: p.default is p.empty for p in named} | whole_row


def _check_scorer(scorer: Any) -> None:
    """Raises `InvalidArgument` for a reward model that would take all turns for one answer."""
    if isinstance(scorer, AlignedScorer) and scorer.chats is not None:
        raise InvalidArgument(
            "reward_model= reads a finished text as one answer, by a chat template or tokens of "
            "its own, and here a text has several; give a causal one that reads the policy's "
            "tokens, or have respond return the reward."
        )
