"""Stopping between two steps loses and doubles nothing; a second signal ends a process at once; a
reader that has seen enough is no error."""

import os
import signal
import time

import numpy as np
import pytest
from runs import SETTINGS, same
from shells import TOKENENV, shell
from toy_env import ToyEnv

from tokenenv.agents import PPO
from tokenenv.cli.signals import SIGNALS, stopping


def child_that_stops():
    """A process that has been told how to stop, and does not."""
    ready, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with stopping(lambda: os.write(write, b"1")):
            os.write(write, b"0")
            while True:
                time.sleep(0.01)
    return pid, ready


def test_a_second_signal_ends_the_process_at_once():
    pid, ready = child_that_stops()
    assert os.read(ready, 1) == b"0"
    os.kill(pid, signal.SIGINT)
    assert os.read(ready, 1) == b"1"
    os.kill(pid, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM


def test_handlers_are_put_back_and_ignored_signals_stay_ignored():
    before = {one: signal.getsignal(one) for one in SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping(lambda: None) as received:
            signal.raise_signal(signal.SIGHUP)
            assert received == []
            signal.raise_signal(signal.SIGTERM)
            assert received == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])
    assert {one: signal.getsignal(one) for one in SIGNALS} == before


class StopsAt(ToyEnv):
    """Asks its agent to stop after some steps."""

    countdown, agent = 10**9, None

    def step(self, actions):
        self.countdown -= 1
        if self.countdown == 0:
            self.agent.stop()
        return super().step(actions)


@pytest.mark.parametrize("step", [1, 20])
def test_a_run_that_was_stopped_between_steps_loses_and_doubles_nothing(tmp_path, step):
    """The agent that stopped and the one that is loaded go on alike, and every text of every slot
    is learnt from once."""
    envs, seen, rest = StopsAt(4, kl_coef=0.1), [], []
    agent = PPO(envs, **(SETTINGS | {"batch_tokens": 100}))
    envs.agent, envs.countdown = agent, step
    agent.learn(400, on_update=lambda metrics, episodes: seen.extend(episodes))
    assert agent.tokens_seen == 4 * step
    agent.save(tmp_path / "c")
    resumed = PPO.load(tmp_path / "c", StopsAt(4, kl_coef=0.1))
    resumed.learn(400, on_update=lambda metrics, episodes: rest.extend(episodes))
    before = len(seen)
    agent.learn(400, on_update=lambda metrics, episodes: seen.extend(episodes))
    assert same(agent.policy.state_dict(), resumed.policy.state_dict())
    assert agent.updates == resumed.updates > 1
    for a, b in zip(seen[before:], rest, strict=True):
        np.testing.assert_equal(a.response, b.response)
        np.testing.assert_equal(a.logprob, b.logprob)
    for slot in range(4):
        numbers = sorted(e.index for e in seen if e.slot == slot)
        assert numbers == list(range(len(numbers)))


class Interrupted(ToyEnv):
    """Ctrl-C at some step, before anything has happened in it."""

    countdown = 12

    def step(self, actions):
        self.countdown -= 1
        if self.countdown == 0:
            raise KeyboardInterrupt
        return super().step(actions)


def test_learn_can_go_on_after_ctrl_c(tmp_path):
    agent = PPO(Interrupted(4), batch_tokens=40, run_dir=tmp_path / "x")
    with pytest.raises(KeyboardInterrupt):
        agent.learn(400)
    updates = agent.updates
    assert agent.learn(400).updates > updates
    assert agent.tokens_seen >= 400


def test_stop_may_be_called_between_updates():
    agent = PPO(ToyEnv(4), batch_tokens=40)
    agent.learn(4000, on_update=lambda metrics, episodes: agent.stop())
    assert agent.updates == 1
    assert agent.learn(400).tokens_seen >= 400


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    done = shell(f"set -o pipefail; {TOKENENV} envs | true", tmp_path)
    assert done.returncode in (0, 1)
    assert done.stderr == ""
