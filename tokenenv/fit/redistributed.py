"""A teacher's score, shared out over the tokens of each text as a reward design does it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from tokenenv.env.build import token_spec_of
from tokenenv.env.engine import RewardEngine
from tokenenv.env.scoring import score_episodes
from tokenenv.errors import InvalidArgument
from tokenenv.fit.examples import Example, Text
from tokenenv.rewards.term import Context, RewardTerm
from tokenenv.types import Scorer, Slots, Task

if TYPE_CHECKING:
    from tokenenv.fit.labels import LabelContext

CHUNK = 64
"""Texts that are scored between two steps of the progress line."""


def redistribute(
    examples: Sequence[Example], context: "LabelContext", *, design: Callable[[], RewardTerm]
) -> list[Example]:
    """Label each own token with what `design` pays for it, on the score of the teacher.

    The design is that of `reward=`, run by the code that scores finished texts, so that the targets
    are the rewards that an environment with this teacher would pay. It is hindsight for all but
    "delta": the model that is trained on it sees no further than each token, and learns the
    expected reward of the token given what comes before it.

    Raises:
        InvalidArgument: there is no teacher, or the design cannot be computed with it.
    """
    name = f"share-{design().name}"
    if context.teacher is None:
        raise InvalidArgument(f"objective={name!r} needs a teacher (teacher=), a reward model.")
    texts = [(text, example.where) for example in examples for text in example.texts]
    engine = _engine([text for text, _ in texts], design(), context)
    chunks = [texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK)]
    shown = track(chunks, f"{name}: the teacher's rewards", disable=not context.progress)
    return [example for chunk in shown for example in _labelled(engine, chunk)]


def _labelled(engine: RewardEngine, texts: list[tuple[Text, str]]) -> Iterator[Example]:
    """The texts, each with its place in the data, as examples with targets."""
    masks = [text.own_mask.tolist() for text, _ in texts]
    scores = score_episodes(
        engine,
        [text.prompt.tolist() for text, _ in texts],
        [text.response.tolist() for text, _ in texts],
        logprobs=None,
        truncated=None,
        columns=None,
        own=masks if engine.context.spec.responds else None,
        weights=dict.fromkeys(engine.rewards.terms, 1.0),
    )
    for (text, where), rewards in zip(texts, scores.token_rewards, strict=True):
        target = np.full(len(text.response), np.nan, dtype=np.float32)
        target[text.own_mask] = rewards[: text.own_mask.sum()]
        yield Example((replace(text, target=target),), where=where)


def _engine(texts: Sequence[Text], term: RewardTerm, context: "LabelContext") -> RewardEngine:
    """What pays the term's rewards on the teacher's score, for texts as long as these."""
    task = _task(texts, context)
    written = not all(text.own_mask.all() for text in texts)
    spec = replace(token_spec_of(task, score_truncated=True), responds=written)
    bound = Context(spec, task, task.reference.device, 0.0, context.max_batch_tokens)
    try:
        return RewardEngine(bound, {term.name: term}, 1)
    except InvalidArgument as error:
        message = str(error).replace("reward=", "share-", 1)
        raise InvalidArgument(f"the objective cannot use this teacher: {message}") from error


def _task(texts: Sequence[Text], context: "LabelContext") -> Task:
    """What could have written the texts, with the teacher as its scorer."""
    teacher = context.teacher
    device = torch.device(teacher.model.device if isinstance(teacher, Scorer) else "cpu")
    return Task(
        tokenizer=context.tokenizer,
        reference=Unasked(1 + max(int(text.ids.max()) for text in texts), device),
        prompts=[],
        max_prompt_tokens=max(len(text.prompt) for text in texts),
        max_new_tokens=max(int(text.own_mask.sum()) for text in texts),
        max_context_tokens=max(map(len, texts)),
        # Nothing is said about stop tokens: a text ends where the data ends it.
        stop_token_ids=(),
        scorer=teacher,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Unasked:
    """A language model that knows nothing and costs nothing (a `TokenModel`): an environment always
    has a reference, and the rewards of these designs do not depend on it."""

    vocab_size: int
    device: Any

    def slots(self, num_slots: int, max_length: int) -> "Unasked":
        """Return what no running text asks."""
        return self

    def states(self, tokens: Tensor, lengths: Slots) -> Tensor:
        """Return zeros (B, L)."""
        return torch.zeros(tokens.shape, device=self.device)

    def logprob(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Return zeros (K,)."""
        return torch.zeros(tokens.shape, device=self.device)
