"""From the data as it is given to the examples that a loss sees: read, split, labelled, scaled."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from tokenenv.errors import InvalidArgument
from tokenenv.fit import losses
from tokenenv.fit.checkpoint import fingerprint
from tokenenv.fit.config import FitConfig
from tokenenv.fit.data import read_examples, require_contrast
from tokenenv.fit.examples import Example, Skipped, Text
from tokenenv.fit.helpers import label_context, tokenizer_of
from tokenenv.fit.labels import MAKERS
from tokenenv.fit.losses import log_mean_exp
from tokenenv.fit.objectives import OBJECTIVES, Objective
from tokenenv.fit.readers import Reader, make_reader
from tokenenv.fit.split import duplicates, split_by_prompt
from tokenenv.models.trunks import vocab_size_of

SCALED = (losses.shares, losses.values, losses.value_labels)
"""The losses whose targets are brought to a size near 1."""


@dataclass(slots=True, eq=False)
class Data:
    """The examples of a run."""

    train: list[Example]
    """What the loss learns from."""
    held_out: list[Example]
    """What the loss is measured on."""
    compared: list[Example]
    """The held-out examples as they were read, before labels were made of them and their scores
    were scaled."""
    fingerprint: str
    """A hash of the examples as they were read."""
    notes: list[str] = field(default_factory=list)
    """What was left out, and what is in both parts, in sentences."""
    mean: float = 0.0
    scale: float = 1.0
    """Scores are trained on as (score - mean) / scale, and a teacher's shares as share / scale."""
    divisor: float = 1.0
    """What saved rewards are divided by."""

    def texts(self) -> list[Text]:
        """Return all texts, of both parts."""
        examples = (*self.train, *self.held_out, *self.compared)
        return list(dict.fromkeys(text for example in examples for text in example.texts))

    def counts(self) -> dict[str, int]:
        """Return how many examples, texts and tokens there are."""
        texts = [text for example in self.train for text in example.texts]
        return {
            "training examples": len(self.train),
            "held-out examples": len(self.compared),
            "texts": len(texts),
            "tokens in them": sum(map(len, texts)),
        }

    def scaling(self) -> list[str]:
        """Return what was done to scores and is done to saved rewards, in sentences."""
        said = []
        if self.scale != 1 and not self.mean:
            said.append(
                f"Targets were divided by {self.scale:.6g}, the root of their mean square, which "
                "the saved rewards are multiplied by."
            )
        elif self.scale != 1 or self.mean:
            said.append(
                f"Scores or values were trained on less their mean of {self.mean:.6g}, which the "
                f"rewards leave out, and divided by their deviation of {self.scale:.6g}, which the "
                "saved rewards are multiplied by."
            )
        if self.divisor != 1:
            said.append(
                f"Saved rewards are divided by {self.divisor:.6g}, the mean length of the training "
                "texts."
            )
        return said


def prepare(config: FitConfig, *, progress: bool = False) -> tuple[Reader, Data]:
    """Load what training begins from, and return it with the examples that it learns from.

    Raises:
        InvalidArgument: the data cannot be used.
        ModelError: a model or a tokenizer cannot be used.
    """
    check_sources(config)
    objective, tokenizer = OBJECTIVES[config.objective], tokenizer_of(config)
    reader = make_reader(config, objective, vocab_size(config, tokenizer), tokenizer)
    data = read(config, objective, tokenizer, reader)
    if objective.labels_from is not None:
        texts = data.texts()
        context = label_context(config, tokenizer, reader.model, texts, progress=progress)
        make = MAKERS[objective.labels_from]
        parts = (data.train, data.held_out)
        data.train, data.held_out = (list(make(part, context)) for part in parts)
    return reader, scaled(data, objective, config.coef)


def check_sources(config: FitConfig) -> None:
    """Raise `InvalidArgument` where data is to be read from nowhere: before models are loaded."""
    for name in ("data", "held_out"):
        source = getattr(config, name)
        if isinstance(source, str | Path) and not Path(source).exists():
            raise InvalidArgument(f"{name}={str(source)!r} is neither a file nor a folder.")


def vocab_size(config: FitConfig, tokenizer: Any) -> int:
    """Return V: the tokenizer's, or that of the model where there is no tokenizer."""
    if tokenizer is not None:
        return len(tokenizer)
    if config.is_new:
        raise InvalidArgument(
            "model='new' needs a tokenizer, which says how many token ids there are: give "
            "tokenizer=, or data that `tokenenv sample` wrote."
        )
    return vocab_size_of(config.model)


def read(config: FitConfig, objective: Objective, tokenizer: Any, reader: Reader) -> Data:
    """Read the examples, and hold some out."""
    skipped = Skipped()

    def examples(source: Any) -> list[Example]:
        return read_examples(
            source,
            objective.kind,
            tokenizer,
            vocab_size=vocab_size(config, tokenizer),
            max_length=reader.max_length,
            chat_template=config.chat_template,
            skipped=skipped,
        )

    found = examples(config.data)
    if not isinstance(config.held_out, Real):
        train, held_out = found, examples(config.held_out)
    elif config.held_out:
        train, held_out = split_by_prompt(found, float(config.held_out), config.seed)
    else:
        train, held_out = found, []
    require_contrast(train, objective.kind)
    if objective.outcomes:
        check_outcomes([*train, *held_out])
    notes = [*skipped.lines(), *duplicates(train, held_out)]
    return Data(train, held_out, held_out, fingerprint([train, held_out]), notes)


def check_outcomes(examples: Sequence[Example]) -> None:
    """Raise `InvalidArgument` for a score that is no outcome."""
    for example in examples:
        for score in example.scores or ():
            if not 0.0 <= score <= 1.0:
                raise InvalidArgument(
                    f"{example.where} has the score {score:g}; objective='outcome' takes outcomes, "
                    "0 to 1. For other scores take score-value, score-every or a-star."
                )


def scaled(data: Data, objective: Objective, coef: float) -> Data:
    """Set what the loss and the saved rewards are scaled by, and standardise the scores where the
    objective asks for it."""
    if objective.divides:
        lengths = [text.own_mask.sum() for example in data.train for text in example.texts]
        data.divisor = float(np.mean(lengths))
    if objective.subtracts_value:
        check_compared(data.train)
        data.train, data.held_out = (less_value(part, coef) for part in (data.train, data.held_out))
        data.compared = data.held_out
    if objective.standardizes:
        scores = [score for example in data.train for score in example.scores or ()]
        data.mean, data.scale = float(np.mean(scores)), float(np.std(scores))
        data.train = standardised(data.train, data.mean, data.scale)
        data.held_out = standardised(data.held_out, data.mean, data.scale)
    if objective.loss in SCALED:
        # A reward that is a difference of values does not know what they have in common.
        centred = objective.loss is losses.value_labels
        data.mean, data.scale = size_of_targets(data.train, centred=centred)
        data.train, data.held_out = (
            in_units(part, data.mean, data.scale) for part in (data.train, data.held_out)
        )
    return data


def check_compared(examples: Sequence[Example]) -> None:
    """Raise `InvalidArgument` where no prompt has two texts: V* is then each text's own score."""
    prompts = [text.prompt.tobytes() for example in examples for text in example.texts]
    if len(set(prompts)) == len(prompts):
        raise InvalidArgument(
            f"objective='a-star' compares the score of a text with V* of its prompt, which is "
            f"estimated from all its texts, and each of the {len(prompts)} prompts has one text "
            "alone; give several texts of each prompt."
        )


def size_of_targets(examples: Sequence[Example], *, centred: bool) -> tuple[float, float]:
    """Return a mean and a size of the targets of the texts' tokens: their mean and deviation where
    they are `centred`, else 0 and the root of their mean square."""
    found = [text.target for e in examples for text in e.texts if text.target is not None]
    targets = np.concatenate(found).astype(np.float64)
    mean = float(np.nanmean(targets)) if centred else 0.0
    size = float(np.sqrt(np.nanmean(np.square(targets - mean))))
    if not size > 0:
        raise InvalidArgument(
            f"the data says {mean:g} of every token, which cannot teach anything; give a teacher= "
            "or values that differ."
        )
    return mean, size


def in_units(examples: Sequence[Example], mean: float, scale: float) -> list[Example]:
    """Return the examples with (target - mean) / scale in the place of each target."""

    def changed(text: Text) -> Text:
        known = text.target
        return text if known is None else replace(text, target=(known - mean) / scale)

    return [replace(e, texts=tuple(map(changed, e.texts))) for e in examples]


def less_value(examples: Sequence[Example], beta: float) -> list[Example]:
    """Return the examples with score - V*(prompt) in the place of each score. V* is `log_mean_exp`
    of the scores of all their texts of the prompt."""
    scores: dict[bytes, list[float]] = defaultdict(list)
    for example in examples:
        scores[example.texts[0].prompt.tobytes()] += example.scores or ()
    value = {prompt: log_mean_exp(known, beta) for prompt, known in scores.items()}

    def less(example: Example) -> Example:
        known = value[example.texts[0].prompt.tobytes()]
        return replace(example, scores=tuple(score - known for score in example.scores or ()))

    return list(map(less, examples))


def standardised(examples: Sequence[Example], mean: float, scale: float) -> list[Example]:
    """Return the examples with (score - mean) / scale in the place of each score."""
    return [
        replace(example, scores=tuple((score - mean) / scale for score in example.scores or ()))
        for example in examples
    ]
