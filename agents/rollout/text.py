"""A text that an engine writes: its turns, what the environment wrote between them, and where it
ends.

The rules are those of a step of the env, taken a turn at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tokenenv.tables import Columns
from tokenenv.turns import Reply
from tokenenv.types import TokenSpec


@dataclass(frozen=True, slots=True)
class Text:
    """A text, running or finished."""

    number: int
    """How many texts of the run were begun before it. Continuations (`play_on`) have numbers of
    their own, -1, -2 and so on."""
    version: int
    """Updates that the policy had had when it was begun. Later turns may be drawn from a later
    policy."""
    prompt: list[int]
    prompt_id: int
    weights: dict[str, float]
    """Those of the reward terms when it was begun."""
    prefix: list[int] = field(default_factory=list)
    """The beginning of the response, where it was given and not written."""
    prefix_own: list[bool] = field(default_factory=list)
    """Which tokens of the prefix count as the policy's, as many as there are."""
    tokens: list[int] = field(default_factory=list)
    """What has been written behind the prefix, by the policy or by the environment."""
    own: list[bool] = field(default_factory=list)
    """Which of `tokens` are the policy's."""
    logprob: list[float] = field(default_factory=list)
    """log pi of each of the policy's tokens when it was drawn, in nats."""
    value: list[float | None] = field(default_factory=list)
    """The critic's value of the state that each of the policy's tokens was drawn in; None where the
    engine does not read it."""
    turn_reward: list[float] = field(default_factory=list)
    """The task's own reward for the turn (`Reply.reward`), on each of the policy's tokens: 0 but on
    those that were answered."""
    terminated: bool = False
    truncated: bool = False
    columns: Columns = field(default_factory=dict)
    """What belongs to the prompt, by name."""

    @property
    def response(self) -> list[int]:
        """The policy's tokens, without those of the prefix."""
        # A collector asks at every end of a text. Mostly nobody else writes.
        if all(self.own):
            return self.tokens
        return [token for token, own in zip(self.tokens, self.own, strict=True) if own]

    @property
    def after_prompt(self) -> list[int]:
        """What is behind the prompt, whoever wrote it."""
        return [*self.prefix, *self.tokens]

    @property
    def so_far(self) -> list[int]:
        """The whole text."""
        return [*self.prompt, *self.after_prompt]

    @property
    def ended(self) -> bool:
        """Whether nothing more is written."""
        return self.terminated or self.truncated


def afresh(text: Text, version: int, weights: dict[str, float]) -> Text:
    """Return the text as it begins, under the policy of this version."""
    return Text(
        text.number,
        version,
        text.prompt,
        text.prompt_id,
        weights,
        text.prefix,
        text.prefix_own,
        columns=text.columns,
    )


def room(text: Text, spec: TokenSpec) -> int:
    """Return how many tokens the policy may still write in a row, by its own budget and by the
    context."""
    steps = sum(text.prefix_own) + sum(text.own)
    return min(spec.max_new_tokens - steps, spec.max_length - len(text.so_far))


def turn_limit(text: Text, spec: TokenSpec) -> int:
    """Return how many tokens the policy may write before the environment is to be asked."""
    left = room(text, spec)
    # Where it is asked after every token, an engine cannot know where to stop.
    return min(1, left) if spec.responds and spec.turn_end_token_ids is None else left


def with_turn(
    text: Text,
    tokens: Sequence[int],
    logprobs: Sequence[float],
    values: Sequence[float] | None = None,
) -> Text:
    """Return the text with what the policy has written behind it."""
    unknown = [None] * len(tokens)
    return replace(
        text,
        tokens=[*text.tokens, *tokens],
        own=[*text.own, *[True] * len(tokens)],
        logprob=[*text.logprob, *logprobs],
        value=[*text.value, *(unknown if values is None else values)],
        turn_reward=[*text.turn_reward, *[0.0] * len(tokens)],
    )


def without_values(text: Text) -> Text:
    """Return the text as it is, with values that are not known."""
    return replace(text, value=[None] * len(text.value))


def answered(text: Text, reply: Reply | None, spec: TokenSpec) -> Text:
    """Return a text that ends in a turn of the policy's with what the environment answers, and with
    whether it ends here. A reply that does not fit into the context is not written."""
    if reply is None:
        terminated = text.tokens[-1] in spec.stop_token_ids
        return _ending(text, terminated, room(text, spec) < 1)
    ids = [int(token) for token in reply.tokens]
    fits = len(text.so_far) + len(ids) <= spec.max_length
    text = replace(text, turn_reward=[*text.turn_reward[:-1], float(reply.reward)])
    if fits:
        own = [*text.own, *[False] * len(ids)]
        text = replace(text, tokens=[*text.tokens, *ids], own=own)
    return _ending(text, reply.ends, not fits or room(text, spec) < 1)


def _ending(text: Text, terminated: bool, truncated: bool) -> Text:
    return replace(text, terminated=terminated, truncated=truncated and not terminated)
