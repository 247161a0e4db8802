"""Texts by a running vLLM server: the same episodes, from another process or another machine.

Start it with what it has to share with the policy, and with its routes for training open:

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs
"""

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenenv.errors import InvalidArgument, check_choice
from tokenenv.models.vllm_server import VLLMServer
from tokenenv.types import TokenSpec, Written

from .weights import lora_config, save_adapter, save_weights, transformers_model

UNFILTERED = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""What a server would otherwise take from the model's generation config."""


class VLLMServerEngine:
    """Writes the policy's texts on a vLLM server: a `RolloutEngine`.

    Args:
        model: the policy's transformers model; `sync` takes its weights as they are then.
        spec: the env's.
        url: of the server.
        temperature: of sampling.
        num_texts: how many texts run side by side.
        dtype: unused: the server has its own.
        weight_sync: "disk", safetensors in `weights_dir`; or "nccl", between GPUs, by a server that
            was started with `--weight-transfer-config '{"backend": "nccl"}'`. Adapters of
            `lora_rank` are swapped instead, by disk, on a server with `--enable-lora` and
            VLLM_ALLOW_RUNTIME_LORA_UPDATING=1.
        weights_dir: a folder that both see; by default one in the system's temporary folder, for a
            server on this machine.
        api_key, timeout, retries: see `VLLMServer`; the time-out is that of one text, or of one
            hand-over of weights.
    """

    def __init__(
        self,
        model: Any,
        spec: TokenSpec,
        *,
        url: str,
        temperature: float = 1.0,
        num_texts: int = 64,
        dtype: str = "float32",
        weight_sync: str = "disk",
        weights_dir: str | None = None,
        api_key: str | None = None,
        timeout: float = 600.0,
        retries: int = 3,
    ) -> None:
        check_choice("weight_sync", weight_sync, ("disk", "nccl"))
        self.model, self.weight_sync, self.temperature = (
            transformers_model(model),
            weight_sync,
            temperature,
        )
        self.lora = lora_config(self.model)
        self.server = VLLMServer(url, api_key=api_key, timeout=timeout, retries=retries)
        self._temporary = (
            TemporaryDirectory(prefix="tokenenv-vllm-") if weights_dir is None else None
        )
        self._folder = Path(weights_dir or self._temporary.name)  # type: ignore[union-attr]
        self._stops = list(spec.stop_token_ids)
        self._pool = ThreadPoolExecutor(num_texts)
        self._running: dict[Future[Written], int] = {}
        self._transfer: Any = None
        self._check_logprobs(spec)
        self.sync()

    def _check_logprobs(self, spec: TokenSpec) -> None:
        """A log-prob that knows no temperature is not the policy's. At top_k=1 nothing is left to
        chance, if it shows."""
        if self.temperature == 1.0:
            return
        body = {
            "model": self.server.model,
            "prompt": [spec.pad_token_id],
            "max_tokens": 1,
            "logprobs": 0,
            "top_k": 1,
        }
        (choice,) = self.server.ask("/v1/completions", body)["choices"]
        if abs(choice["logprobs"]["token_logprobs"][0]) > 1e-6:
            raise InvalidArgument(
                f"the vLLM server at {self.server.url} gives log-probs before "
                f"temperature={self.temperature}; start it with "
                "--logprobs-mode processed_logprobs."
            )

    def begin(self, key: int, prompt: Sequence[int], max_tokens: int, seed: int) -> None:
        """Begins a text; see `RolloutEngine`."""
        self._running[
            self._pool.submit(self._write, key, [int(token) for token in prompt], max_tokens, seed)
        ] = key

    def ended(self) -> list[Written]:
        """Waits until at least one text has ended; see `RolloutEngine`. Raises `ServerError`."""
        done = wait(self._running, return_when=FIRST_COMPLETED).done
        for future in done:
            del self._running[future]
        return [future.result() for future in done]

    def _write(self, key: int, prompt: list[int], max_tokens: int, seed: int) -> Written:
        body = {
            "model": "policy" if self.lora else self.server.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "seed": seed,
            "temperature": self.temperature,
            "stop_token_ids": self._stops,
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
            **UNFILTERED,
        }
        with self.server.reading("/v1/completions"):
            (choice,) = self.server.ask("/v1/completions", body)["choices"]
            return Written(key, choice["token_ids"], choice["logprobs"]["token_logprobs"])

    def sync(self) -> None:
        """Hands the model's weights over while the running texts stand still; see `RolloutEngine`.
        Raises `ServerError`."""
        self.server.ask("/pause", mode="keep")
        try:
            self._hand_over()
            self.server.ask("/reset_prefix_cache", reset_running_requests="true")
        finally:
            self.server.ask("/resume")

    def _hand_over(self) -> None:
        if self.lora:
            save_adapter(self.model, self._folder / "adapter")
            body = {
                "lora_name": "policy",
                "lora_path": str(self._folder / "adapter"),
                "load_inplace": True,
            }
            self.server.ask("/v1/load_lora_adapter", body)
        elif self.weight_sync == "disk":
            save_weights(self.model, self._folder)
            kwargs = {"weights_path": str(self._folder)}
            self.server.ask("/collective_rpc", {"method": "reload_weights", "kwargs": kwargs})
        else:
            if self._transfer is None:
                from .vllm import open_transfer

                num_workers = self.server.ask("/get_world_size", method="GET")["world_size"]
                self._transfer = open_transfer(
                    "nccl", ServerTransferClient(self.server), self.model, num_workers
                )
            self._transfer.send_weights()

    def abort(self) -> None:
        """Forgets the running texts; the server writes them to their end."""
        for future in self._running:
            future.cancel()
        self._running.clear()


class ServerTransferClient:
    """What vLLM's weight transfer asks of the receiving side, of a server."""

    def __init__(self, server: VLLMServer) -> None:
        self._server = server

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Opens the receiving end."""
        self._server.ask("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        """Weights are to come."""
        self._server.ask("/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Receives weights."""
        self._server.ask("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """All have come."""
        self._server.ask("/finish_weight_update", {"weight_version": weight_version})
