"""Examples in memory, and runs of `tokenenv fit` on them that take a moment."""

import fakes
import numpy as np

from tokenenv.fit.config import FitConfig
from tokenenv.fit.examples import Example, Text
from tokenenv.fit.loop import train
from tokenenv.fit.objectives import OBJECTIVES
from tokenenv.fit.prepare import Data, scaled
from tokenenv.fit.readers import make_reader

GOOD, BAD = 5, 6
"""Token ids of which each adds 1 to the true score of a text, or takes 1 away."""


def gold(text):
    """The true score of a text."""
    return float((text.response == GOOD).sum() - (text.response == BAD).sum())


def text(rng, longest=8):
    """A text with some good and bad tokens."""
    response = rng.integers(3, 12, rng.integers(2, longest))
    return Text(rng.integers(3, 12, rng.integers(1, 4)), np.append(response, fakes.EOS))


def pairs(count, seed=0):
    """Pairs, the better text first."""
    rng, made = np.random.default_rng(seed), []
    while len(made) < count:
        both = sorted((text(rng), text(rng)), key=gold, reverse=True)
        if gold(both[0]) > gold(both[1]):
            made.append(Example(tuple(both), where=f"pairs:{len(made)}"))
    return made


def scored(count, seed=0):
    """Texts with their scores, around 10."""
    rng = np.random.default_rng(seed)
    texts = [text(rng) for _ in range(count)]
    return [Example((t,), (10 + 2 * gold(t),), f"scores:{i}") for i, t in enumerate(texts)]


def config(out, objective="bt-sum", **options):
    given = {"hidden_size": 32, "num_layers": 1, "epochs": 2, "batch_examples": 8, "lr": 1e-3}
    return FitConfig(data="pairs", out=out, objective=objective, **(given | options))


def data(train, held_out, objective="bt-sum", coef=0.1, fingerprint="f"):
    """What `prepare` makes of examples."""
    made = Data(train, held_out, held_out, fingerprint)
    return scaled(made, OBJECTIVES[objective], coef)


def reader(config):
    return make_reader(config, OBJECTIVES[config.objective], fakes.VOCAB_SIZE, fakes.tokenizer())


def trained(
    config, train_on=None, held_out=None, *, stop=lambda: False, state=None, fingerprint="f"
):
    """A run on examples in memory."""
    train_on = pairs(20) if train_on is None else train_on
    held_out = pairs(8, seed=1) if held_out is None else held_out
    made = data(train_on, held_out, config.objective, config.coef, fingerprint)
    return train(config, reader(config), made, state, stop=stop)


def weights(fitted):
    """A copy of what was trained."""
    return {name: weight.detach().clone() for name, weight in fitted.reader.trained().items()}
