"""Training a reward model: read, split, label, learn, measure, save."""

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenenv import ranks
from tokenenv.agents.run.card import versions
from tokenenv.agents.run.checkpoint import write_checkpoint
from tokenenv.agents.run.files import LOCK, locked, previous_of
from tokenenv.agents.run.run_config import CONFIG, write_values
from tokenenv.fit.card import model_card, record
from tokenenv.fit.checkpoint import (
    CARD,
    CHECKPOINT,
    KIND,
    added_to,
    check_data,
    check_folder,
    read_state,
    settings,
)
from tokenenv.fit.config import FitConfig
from tokenenv.fit.examples import Example
from tokenenv.fit.measure import is_clearly_positive
from tokenenv.fit.objectives import OBJECTIVES
from tokenenv.fit.prepare import Data, prepare
from tokenenv.fit.readers import Reader
from tokenenv.fit.reports import Reports
from tokenenv.fit.training import Training


@dataclass(slots=True)
class Fitted:
    """A reward model that was trained."""

    reader: Reader
    """The model, with the weights of the best epoch. Its rewards are those that the loss sees; the
    saved ones are `factor` times these."""
    measures: dict[str, float]
    """What it is worth on the held-out examples, and what it cost: "tokens" read and "seconds"
    (`tokenenv.fit.card.MEANING` says what each is)."""
    history: list[dict[str, float]]
    """The measures of each epoch."""
    folder: Path
    """Where it was saved, with its card."""
    held_out: list[Example]
    """The examples that were held out, as they were read."""
    factor: float = 1.0
    """What a saved reward is, of one that `reader` reads."""
    notes: list[str] = field(default_factory=list)
    """What was left out, and what to know of the model, in sentences."""


def fit(
    config: FitConfig, *, progress: bool = False, stop: Callable[[], bool] = lambda: False
) -> Fitted:
    """Train a reward model and save it into `config.out`, with a card.

    Of several processes that torchrun has started (`tokenenv.ranks`) all read the data, each has a
    share of every batch, and the first writes.

    Args:
        config: see `FitConfig`.
        progress: whether a bar on stderr shows how far it is.
        stop: is asked after each optimizer step. Where it says True, a checkpoint is written, from
            which `resume=True` goes on.

    Raises:
        InvalidArgument: a setting, the data or the folder is not allowed; nothing was written.
        ModelError: a model cannot be used; nothing was written.
        NotFinite: a loss or a gradient is NaN or infinite.
        KeyboardInterrupt: `stop` said True.
    """
    ranks.of_first(lambda: check_folder(config.out, resume=config.resume))
    with ExitStack() as held:
        if config.resume:
            held.enter_context(locked(config.out))
        state = ranks.of_first(lambda: read_state(config))
        progress = progress and ranks.number() == 0
        reader, data = prepare(config, progress=progress)
        if state is not None:
            check_data(state, data.fingerprint, config.out / CHECKPOINT)
        held.enter_context(locked(config.out))
        # Another process may have taken it meanwhile.
        ranks.of_first(lambda: check_folder(config.out, resume=config.resume))
        return train(config, reader, data, state, progress=progress, stop=stop)


def train(
    config: FitConfig,
    reader: Reader,
    data: Data,
    state: dict[str, Any] | None = None,
    *,
    progress: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Fitted:
    """Train a reader on prepared data from a checkpoint's state, or from the beginning, and save
    it. `fit` says what it raises."""
    training = Training(config, reader, data)
    if state is None:
        made_with = {"made_with": list(versions())}
        ranks.of_first(lambda: write_values(config.out / CONFIG, record(config), made_with))
    else:
        training.load_state(state, config.out / CHECKPOINT)
    training.remember()
    reports = Reports(config.out, training.step, training.total_steps, progress=progress)
    with closing(reports):
        learn(training, reports, stop)
    return save(training)


def learn(training: Training, reports: Reports, stop: Callable[[], bool]) -> None:
    """Take optimizer steps until the training has ended, and write a checkpoint after each epoch.
    Raise `KeyboardInterrupt` where `stop` says so."""
    while not training.ended:
        epoch = training.epoch
        figures = training.learn()
        if ranks.number() == 0:
            reports.step(training.step, figures)
            if training.epoch > epoch:
                reports.epoch(training.epoch, training.step, training.history[-1])
        stopped = any(ranks.gathered(stop()))
        if training.epoch > epoch or stopped:
            write_state(training)
        if stopped:
            raise KeyboardInterrupt


def write_state(training: Training) -> None:
    """Write the checkpoint from which `resume=True` goes on."""
    config, data = training.config, training.data
    run = {"kind": KIND, "settings": settings(config), "data": data.fingerprint}
    ranks.of_first(lambda: write_checkpoint(config.out / CHECKPOINT, run | training.state()))


def save(training: Training) -> Fitted:
    """Write the best epoch's model with its card into the run's folder, and take the checkpoint
    away."""
    config, reader, data = training.config, training.reader, training.data
    reader.load_trained(training.best_weights)
    measures = training.measures()
    notes = [*data.notes, *about(training, measures)]

    def write() -> None:
        with added_to(config.out) as new:
            reader.write(new, data.divisor, data.scale)
            card = model_card(config, measures, data.counts(), notes, data.scaling())
            (new / CARD).write_text(card, encoding="utf-8")
        for path in (config.out / CHECKPOINT, previous_of(config.out / CHECKPOINT)):
            path.unlink(missing_ok=True)
        (config.out / LOCK).unlink(missing_ok=True)

    ranks.of_first(write)
    return Fitted(
        reader=reader,
        measures=measures,
        history=training.history,
        folder=config.out,
        held_out=data.compared,
        factor=training.factor,
        notes=notes,
    )


def about(training: Training, measures: dict[str, float]) -> list[str]:
    """Return what to know of a model before RL adds its rewards up: the price of length, where the
    loss knows only which of two texts or tokens is better, and not what a text is worth."""
    objective = OBJECTIVES[training.config.objective]
    labelled = objective.kind == "labels" or objective.labels_from == "corrupted"
    unanchored = objective.design == "token" and (labelled or objective.kind == "ranking")
    if "reward_per_token" not in measures or not unanchored or not is_clearly_positive(measures):
        return []
    mean, error = measures["reward_per_token"], measures["reward_per_token_error"]
    return [
        f"A token is paid {mean:.3g} on average (standard error {error:.2g}), clearly more than 0: "
        "RL adds rewards up, so it pays for length alone. `tokenenv audit` says how much. The "
        "objectives on scores and values have no such price."
    ]
