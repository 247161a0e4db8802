"""Texts written by a running vLLM server, in another process or on another machine.

The server is started with the policy's model and with its routes for training open:

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
"""Sampling options that keep the policy's distribution whole. A server takes those that a request
does not name from the model's generation config."""


class VLLMServerEngine:
    """Writes the policy's texts on a vLLM server: an `EngineApart`.

    Args:
        model: the policy's transformers model. `sync` takes its weights as they are at that time.
        spec: the env's.
        url: of the server.
        temperature: of sampling.
        num_texts: how many texts run side by side.
        dtype: not used, since the server has a dtype of its own. It is here because all engines
            take it.
        weight_sync: "disk" writes safetensors into `weights_dir`. "nccl" sends weights between
            GPUs, to a server that was started with
            `--weight-transfer-config '{"backend": "nccl"}'`. An adapter of `lora_rank` is written
            to disk and swapped instead, on a server with `--enable-lora` and
            VLLM_ALLOW_RUNTIME_LORA_UPDATING=1.
        weights_dir: a folder that this process and the server see. By default it is a new one in
            the system's temporary folder, which does for a server on this machine.
        api_key, timeout, retries: see `VLLMServer`. The time-out, in seconds, is that of one text,
            or of one hand-over of weights.

    Raises:
        InvalidArgument: the model or an argument is not allowed, or the server's log-probs do not
            know the temperature.
        ServerError: the server does not answer.
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
        self.model, self.weight_sync = transformers_model(model), weight_sync
        self.temperature = temperature
        self.lora = lora_config(self.model)
        self.server = VLLMServer(url, api_key=api_key, timeout=timeout, retries=retries)
        # The object is kept: the folder is removed when nothing refers to it any more.
        self._temporary = None if weights_dir else TemporaryDirectory(prefix="tokenenv-vllm-")
        self._folder = Path(weights_dir or self._temporary.name)  # type: ignore[union-attr]
        self._stops = spec.engine_stop_ids
        # One thread for each text: all that it does is to wait for the server's answer.
        self._pool = ThreadPoolExecutor(num_texts)
        self._running: dict[Future[Written], int] = {}
        self._transfer: Any = None
        self._check_logprobs(spec)
        self.sync()

    def _check_logprobs(self, spec: TokenSpec) -> None:
        """Raise `InvalidArgument` where the server gives log-probs before the temperature, which
        are not those of the distribution that tokens are drawn from."""
        if self.temperature == 1.0:
            return
        # With top_k=1 one token is left, whose log-prob after all processing is 0.
        body = {"prompt": [spec.pad_token_id], "max_tokens": 1, "logprobs": 0, "top_k": 1}
        body["model"] = self.server.model
        (choice,) = self.server.ask("/v1/completions", body)["choices"]
        if abs(choice["logprobs"]["token_logprobs"][0]) > 1e-6:
            raise InvalidArgument(
                f"the vLLM server at {self.server.url} gives log-probs before "
                f"temperature={self.temperature}; start it with "
                "--logprobs-mode processed_logprobs."
            )

    def begin(self, key: int, prompt: Sequence[int], max_tokens: int, seed: int) -> None:
        """Begin a text; see `RolloutEngine`."""
        ids = [int(token) for token in prompt]
        self._running[self._pool.submit(self._write, key, ids, max_tokens, seed)] = key

    def write_on(self, texts: int, tokens: int) -> None:
        """Do nothing: a server writes all that was begun, whatever happens here."""

    def ended(self) -> list[Written]:
        """Wait until at least one text has ended, and return those that have; see `RolloutEngine`.
        Raise `ServerError` where the server does not answer."""
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
            # The env's ids alone end a text: the model's own may be others.
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
        """Hand the model's weights over while the running texts stand still; see `RolloutEngine`.
        Raise `ServerError` where the server does not answer."""
        self.server.ask("/pause", mode="keep")
        try:
            self._hand_over()
            # Keys and values in the cache are of the old weights. The running texts are read again
            # with the new ones, and go on from there.
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
        """Forget the running texts. The server writes them to their end."""
        for future in self._running:
            future.cancel()
        self._running.clear()


class ServerTransferClient:
    """The receiving side of vLLM's weight transfer, where that is a server."""

    def __init__(self, server: VLLMServer) -> None:
        self._server = server

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Open the receiving end."""
        self._server.ask("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        """Tell the server that weights are to come."""
        self._server.ask("/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Have the server receive weights."""
        self._server.ask("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Tell the server that all weights have come."""
        self._server.ask("/finish_weight_update", {"weight_version": weight_version})
