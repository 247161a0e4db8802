"""The state of a run between two optimizer steps, and what a step and an epoch do to it."""

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenenv import ranks
from tokenenv.agents.learning.rates import SMALL
from tokenenv.agents.run.checkpoint import check_weights, reading
from tokenenv.errors import NotFinite
from tokenenv.fit.batches import batches, forwards, read_batch
from tokenenv.fit.config import FitConfig
from tokenenv.fit.examples import Batch, Example
from tokenenv.fit.measure import measured, seen
from tokenenv.fit.objectives import OBJECTIVES
from tokenenv.fit.prepare import Data
from tokenenv.fit.readers import Reader

MAX_GRAD_NORM = 1.0
"""Gradients are scaled down to this norm."""
LAST_RATE = 0.05
"""The share of the highest learning rate that the cosine ends at."""


class Training:
    """A reader that learns from data, and how far it is.

    Nothing in it draws random numbers but the order of an epoch's batches, which follows from the
    seed and the epoch. So `state` and `load_state` make a run that goes on equal to one that was
    never interrupted.
    """

    def __init__(self, config: FitConfig, reader: Reader, data: Data) -> None:
        self.config, self.objective = config, OBJECTIVES[config.objective]
        self.reader, self.data = reader, data
        self.weights = reader.trained()
        ranks.take_first(list(self.weights.values()))
        self.lr = config.lr or default_lr(config, reader.model)
        self.optimizer = torch.optim.AdamW(
            _groups(self.weights, config.weight_decay), lr=self.lr, betas=(0.9, 0.98)
        )
        self.steps_per_epoch = math.ceil(len(data.train) / config.batch_examples)
        self._plan: dict[int, list[np.ndarray]] = {}
        """The batches of this epoch, by its number."""
        self.step = 0
        self.losses: list[float] = []
        """Of the steps of this epoch."""
        self.history: list[dict[str, float]] = []
        self.best_epoch = 0
        self.best_weights: dict[str, Tensor] = {}
        self.tokens, self._seconds, self._began = 0, 0.0, time.monotonic()

    @property
    def total_steps(self) -> int:
        """Steps of all epochs."""
        return self.steps_per_epoch * self.config.epochs

    @property
    def epoch(self) -> int:
        """Epochs that are over."""
        return len(self.history)

    @property
    def ended(self) -> bool:
        """Whether all epochs are over, or none of the last ones was better."""
        waited = self.epoch - self.best_epoch
        return self.epoch == self.config.epochs or waited >= self.config.patience

    @property
    def seconds(self) -> float:
        """Wall-clock time of the run, without the time in which it was stopped."""
        return self._seconds + time.monotonic() - self._began

    def remember(self) -> None:
        """Have the reader compute once what stays the same for all texts."""
        texts = self.data.texts()
        self.reader.remember(texts)
        if self.config.freeze and self.step == 0:
            self.tokens = sum(map(len, texts))

    def learn(self) -> dict[str, float]:
        """Take one optimizer step, and return its figures. With the last one of an epoch, the epoch
        is measured."""
        examples = self._next_examples()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._backward(examples)
        norm = float(nn.utils.clip_grad_norm_(self.weights.values(), MAX_GRAD_NORM))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NotFinite(
                f"the loss of step {self.step + 1} is {loss} and its gradient {norm}: nothing was "
                f"learnt from it (examples {', '.join(e.where for e in examples[:3])}, ...). A "
                f"lower lr= than {self.lr:g} may help."
            )
        rate = self.lr * schedule(self.step, self.total_steps, self.config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.step += 1
        self.losses.append(loss)
        if self.step % self.steps_per_epoch == 0:
            self._end_epoch()
        return {"loss": loss, "lr": rate, "grad_norm": norm}

    def _next_examples(self) -> list[Example]:
        epoch, number = divmod(self.step, self.steps_per_epoch)
        if epoch not in self._plan:
            lengths = [len(example) for example in self.data.train]
            rng = np.random.default_rng([self.config.seed, epoch])
            self._plan = {epoch: batches(lengths, self.config.batch_examples, rng)}
        return [self.data.train[i] for i in self._plan[epoch][number]]

    def _backward(self, examples: Sequence[Example]) -> float:
        """Add up the gradient of the examples' mean loss, and return that loss. Of several
        processes each reads a share of the examples."""
        own = ranks.share(np.asarray([len(example) for example in examples]))
        total = 0.0
        for group in forwards([examples[i] for i in own], self.config.max_batch_tokens):
            loss = self.objective.loss(self._read(group)).sum() / len(examples)
            loss.backward()
            total += float(loss.detach())
        self.tokens += 0 if self.config.freeze else sum(map(len, examples))
        ranks.add_up_gradients(list(self.weights.values()))
        return ranks.summed({"loss": total})["loss"]

    def _read(self, examples: Sequence[Example]) -> Batch:
        return read_batch(self.reader, examples)

    def _end_epoch(self) -> None:
        """Measure the epoch, and keep its weights if it is the best one so far."""
        row = {"train_loss": float(np.mean(self.losses)), **self.measure()}
        loss = row.get("loss")
        if loss is not None and not math.isfinite(loss):
            raise NotFinite(f"the held-out loss of epoch {self.epoch + 1} is {loss}.")
        # Without held-out examples the newest epoch is the best one.
        is_best = loss is None or loss < min((r["loss"] for r in self.history), default=math.inf)
        self.losses = []
        self.history.append(row)
        if is_best:
            self.best_epoch = self.epoch
            self.best_weights = {name: w.detach().clone() for name, w in self.weights.items()}

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Return the measures of the held-out examples; nothing where there are none."""
        if not self.data.held_out:
            return {}
        read = self._read_all(self.data.held_out)
        losses = torch.cat([self.objective.loss(batch) for batch in read])
        # Where labels were made of rankings, it is the rankings whose texts can be compared.
        unranked = self.objective.kind == "ranking" and self.objective.labels_from is not None
        compared = self._read_all(self.data.compared) if unranked else read
        return {
            "loss": float(losses.mean()),
            **measured(seen(read), seen(compared), self.objective, self.data.scale, self.factor),
        }

    @property
    def factor(self) -> float:
        """What the saved model's rewards are, of those that are read here."""
        return self.data.scale / self.data.divisor

    def _read_all(self, examples: Sequence[Example]) -> list[Batch]:
        """Read all examples; of several processes each reads some of the groups, and tells the
        others."""
        groups = list(forwards(examples, self.config.max_batch_tokens))
        own = groups[ranks.number() :: ranks.count()]
        read = [self._read(group) for group in own]
        if ranks.count() > 1:  # each may have another device
            read = [batch.on_host() for batch in read]
        parts = [iter(part) for part in ranks.gathered(read)]
        return [next(parts[i % ranks.count()]) for i in range(len(groups))]

    def measures(self) -> dict[str, float]:
        """Return the measures of the best epoch, and what the run cost."""
        row = self.history[self.best_epoch - 1]
        cost = {"tokens": float(self.tokens), "seconds": self.seconds}
        return {**row, "epoch": float(self.best_epoch), "epochs": float(self.epoch), **cost}

    def state(self) -> dict[str, Any]:
        """Return all that the rest of the run depends on, beside settings and data."""
        return {
            "step": self.step,
            "losses": self.losses,
            "history": self.history,
            "best_epoch": self.best_epoch,
            "best_weights": self.best_weights,
            "weights": self.weights,
            "optimizer": self.optimizer.state_dict(),
            "tokens": self.tokens,
            "seconds": self.seconds,
        }

    def load_state(self, state: dict[str, Any], path: object) -> None:
        """Go on from what `state` returned, which was read at `path`.

        Raises:
            CheckpointError: it is of another model, or holds something else.
        """
        with reading(path):
            check_weights(self.weights, state["weights"])
            self.reader.load_trained(state["weights"])
            self.optimizer.load_state_dict(state["optimizer"])
            for name in ("step", "losses", "history", "best_epoch", "best_weights", "tokens"):
                setattr(self, name, state[name])
            self._seconds = float(state["seconds"])


def default_lr(config: FitConfig, model: nn.Module) -> float:
    """Return the highest learning rate where none is given, by what is trained
    (`tokenenv.agents.learning.rates` says why one rate does not suit all)."""
    if config.freeze or sum(weight.numel() for weight in model.parameters()) <= SMALL:
        return 1e-3
    return 2e-4 if config.lora_rank else 2e-5


def schedule(step: int, total: int, warmup: float) -> float:
    """Return the share of the highest learning rate that step number `step`, from 0, of `total` is
    taken with: a line up from 0 over the first `warmup` of the steps, times a cosine down to
    `LAST_RATE`."""
    rise = min(1.0, (step + 1) / max(1.0, warmup * total))
    return rise * (LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * step / total)))


def _groups(weights: dict[str, Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Return the optimizer's groups: matrices decay, vectors do not."""
    matrices = [weight for weight in weights.values() if weight.ndim > 1]
    vectors = [weight for weight in weights.values() if weight.ndim <= 1]
    groups = {"decayed": (matrices, weight_decay), "others": (vectors, 0.0)}
    return [{"params": found, "weight_decay": decay} for found, decay in groups.values() if found]
