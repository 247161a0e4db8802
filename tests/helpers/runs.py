"""Agents that learn for a few updates, and run folders, for the tests of both."""

import json
import types
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
import torch

from tokenenv.agents.episodes import EpisodeBatch

SETTINGS = {
    "batch_tokens": 60,
    "minibatches": 2,
    "epochs": 2,
    "lr": 1e-2,
    "scale_rewards": True,
    "kl_target": 0.05,
    "kl_horizon": 500,
    "temperature": 0.9,
    "lr_schedule": "cosine",
}


def same(a, b):
    if isinstance(a, torch.Tensor | np.ndarray):
        alike = type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape
        # What is not known is NaN on both sides.
        return alike and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


class Recorder:
    """Saves after two updates and stops after four; keeps every episode and metric."""

    def __init__(self, agent, save_to=None):
        self.agent, self.save_to, self.episodes, self.metrics = agent, save_to, [], []

    def __call__(self, metrics, episodes):
        self.episodes += episodes
        self.metrics.append(
            {name: value for name, value in metrics.items() if name != "time/tokens_per_second"}
        )
        if self.agent.updates == 2 and self.save_to is not None:
            if hasattr(self.agent.collector, "step"):
                self.agent.collector.step()  # so that caches hold what appending left in them
            self.agent.save(self.save_to)


def learn_until(agent, updates, save_to=None):
    """What an agent has learned from until it has had so many updates; it saves after two."""
    recorder = Recorder(agent, save_to)
    total = 10_000

    class Enough(Exception):
        pass

    def on_update(metrics, episodes):
        recorder(metrics, episodes)
        if agent.updates == updates:
            raise Enough

    with pytest.raises(Enough):
        agent.learn(total, on_update=on_update)
    return recorder


def collected(agent, tokens=80):
    episodes = agent.collector.collect(tokens)
    return episodes, EpisodeBatch.stack(episodes)


class FakeWandb(types.ModuleType):
    """What a run is told."""

    Histogram = staticmethod(lambda values: ("histogram", len(values)))

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)  # others look whether there is one
        self.logged, self.finished = [], False

    def init(self, **options):
        self.options = options
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def episode(order=0, tokens=("a", " b"), **changes):
    """A line of episodes.jsonl as the run folder writes it."""
    numbers = [0.5 * i - 1.0 for i in range(len(tokens))]
    return {
        "tokens_seen": 100 * (order + 1),
        "prompt": "say",
        "response": "".join(tokens),
        "length": len(tokens),
        "terminated": True,
        "score": float(order),
        "gold": None,
        "reward": sum(numbers),
        "kl": 0.25,
        "tokens": list(tokens),
        "token_rewards": numbers,
        "token_kl": numbers[::-1],
        "token_terms": {"token": numbers, "kl": [0.0] * len(tokens)},
        **changes,
    }


def write(folder, episodes, tail=""):
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(e) + "\n" for e in episodes)
    (folder / "episodes.jsonl").write_text(text + tail, encoding="utf-8")
    return folder
