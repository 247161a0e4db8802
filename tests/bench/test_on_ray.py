"""Cells as tasks of Ray: on a stand-in that plays each at once, and on Ray itself where it is
installed."""

import sys
import types

import pytest

from tokenenv.bench import Grid, bench
from tokenenv.bench.on_ray import run_on_ray
from tokenenv.errors import MissingDependency

SETTINGS = {
    "env": "tokenenv/DelayedKey-v0",
    "num_envs": 8,
    "total_tokens": 100,
    "options": {"max_new_tokens": 4},
    "agent": {"batch_tokens": 64},
}


def grid(**designs):
    designs = designs or {"end": "terminal", "bad": "process"}
    return Grid(settings=SETTINGS, designs=designs, seeds=2, points=1, texts=4)


class WorkerCrashedError(Exception):
    pass


class Task:
    def __init__(self, function, cell):
        self.function, self.cell = function, cell


class FakeRay(types.ModuleType):
    """Plays a task when it is waited for; the rows "dies" die."""

    def __init__(self):
        super().__init__("ray")
        self.exceptions = types.SimpleNamespace(RayError=WorkerCrashedError)
        self.is_up, self.options, self.most, self.cancelled = False, None, 0, []

    def is_initialized(self):
        return self.is_up

    def init(self, **options):
        self.is_up = True

    def shutdown(self):
        self.is_up = False

    def remote(self, **options):
        self.options = options
        return lambda function: types.SimpleNamespace(remote=lambda cell: Task(function, cell))

    def wait(self, running, timeout):
        self.most = max(self.most, len(running))
        return running[:1], running[1:]

    def get(self, one):
        if one.cell.row == "dies":
            raise WorkerCrashedError("the worker died")
        return one.function(one.cell)

    def cancel(self, one, force):
        self.cancelled.append(one)


@pytest.fixture
def ray(monkeypatch):
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    # What a stand-in plays need not be played for its numbers.
    monkeypatch.setattr("tokenenv.bench.play.play", lambda *_: {"points": []})
    return fake


def test_every_cell_is_a_task_on_one_core(ray):
    events = []
    run_on_ray(grid(end="terminal", dies="uniform").cells(), 3, events.append)
    ended = [(e.cell.row, e.kind, e.value) for e in events if e.kind != "began"]
    assert ended.count(("end", "finished", {"points": []})) == 2
    assert ended.count(("dies", "failed", "WorkerCrashedError: the worker died")) == 2
    assert ray.options == {"num_cpus": 1, "max_retries": 0}
    assert ray.most == 3
    assert not ray.is_up
    assert ray.cancelled == []


def test_a_cluster_that_ran_before_goes_on(ray):
    ray.is_up = True
    run_on_ray(grid().cells(), 2, lambda event: None)
    assert ray.is_up


def test_an_interrupt_cancels_what_runs(ray):
    def stop(event):
        if event.kind == "finished":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_on_ray(grid().cells(), 3, stop)
    assert len(ray.cancelled) == 2
    assert not ray.is_up


def test_without_ray_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependency, match="launcher='ray' needs ray: pip install ray"):
        bench(grid(), tmp_path, launcher="ray")


def test_a_local_cluster_finds_what_processes_find(tmp_path):
    pytest.importorskip("ray")
    there = bench(grid(), tmp_path / "ray", launcher="ray", workers=2)
    here = bench(grid(), tmp_path / "here", workers=2)
    assert there.failed == here.failed
    assert len(there.failed) == 2
    for one, other in zip(there.lines, here.lines, strict=True):
        timeless = [
            {name: value for name, value in line.items() if "seconds" not in name}
            for line in (one, other)
        ]
        assert timeless[0] == timeless[1]
