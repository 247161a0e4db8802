"""An object in a process of its own: its methods, its errors, its end."""

import gc
import os
import signal
import subprocess
from collections import Counter

import pytest

from tokenenv.errors import EngineError, InvalidArgument, check_choice
from tokenenv.rollout.own_process import OwnProcess


@pytest.fixture(scope="module")
def counter():
    return OwnProcess(Counter, "aab")


def test_methods_are_called_one_after_the_other(counter):
    calls = [counter.send("update", a=4), counter.send("get", "a"), counter.send("get", "b")]
    assert [call.result(timeout=30) for call in calls] == [None, 6, 1]
    assert counter.send("__len__").result(timeout=30) == 2


def test_its_errors_arrive_and_it_goes_on(counter):
    with pytest.raises(EngineError, match="in the process of the engine: KeyError: 'c'"):
        counter.send("pop", "c").result(timeout=30)
    with pytest.raises(EngineError, match="pickle"):
        counter.send("keys").result(timeout=30)  # which cannot be sent back
    assert counter.send("get", "b").result(timeout=30) == 1


def test_ctrl_c_does_not_reach_it(counter):
    assert os.getsid(counter._process.pid) != os.getsid(0)


def test_an_error_of_this_package_comes_as_it_is_and_the_process_ends_with_the_object(monkeypatch):
    started, popen = [], subprocess.Popen

    def noting(*args, **options):
        started.append(popen(*args, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", noting)
    with pytest.raises(InvalidArgument, match="rollout='y' is not known"):
        OwnProcess(check_choice, "rollout", "y", ["z"])
    gc.collect()
    assert started[0].poll() is not None


def test_where_it_has_died_that_is_said(counter):
    counter._process.send_signal(signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(EngineError, match="ended with exit code -9"):
            counter.send("get", "b").result(timeout=30)
