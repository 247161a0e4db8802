"""Servers in processes of their own, and how far a batch's log-probs are from the learner's."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning.learner import token_logprobs

ASSETS = Path(__file__).parents[2] / "envs" / "assets"
KEY = "a-key"


def mismatch(agent, num_tokens=400):
    """The largest difference of the sampler's log-probs from the policy's, over texts written now,
    in nats."""
    batch = EpisodeBatch.stack(agent.collector.collect(num_tokens))
    own_BT = token_logprobs(agent.policy, batch, 16384, agent.config.temperature)
    return float(((own_BT - batch.logprob_BT).abs() * batch.mask_BT).max()), batch


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Server:
    """`vllm serve` on this machine; it can be killed, stopped in its tracks, and started again on
    the same port."""

    def __init__(self, model, log, *options):
        self.port, self.log = free_port(), log
        self.url = f"http://127.0.0.1:{self.port}"
        self.command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(ASSETS / model),
        ]
        self.command += [
            "--dtype",
            "float32",
            "--enforce-eager",
            "--max-model-len",
            "64",
            "--max-num-seqs",
            "32",
        ]
        self.command += [
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--api-key",
            KEY,
            *options,
        ]

    def start(self):
        settings = {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "OMP_NUM_THREADS": "1",
        }
        with self.log.open("a") as log:
            # A group of its own, so that its workers can be ended with it.
            self.process = subprocess.Popen(
                self.command,
                env={**os.environ, **settings},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self, seconds=240):
        for _ in range(seconds * 2):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{self.url}/health", timeout=5),
            ):
                return
            time.sleep(0.5)
        raise AssertionError(self.log.read_text()[-3000:])

    def send(self, what):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, what)

    def kill(self):
        self.send(signal.SIGKILL)
        self.process.wait()
