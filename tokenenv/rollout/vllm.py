"""vLLM in this process: it writes the policy's texts, and gives token rewards and reference
log-probs of whole texts. Beside `writer` this is the only module that imports vllm.

Single steps use the local cache instead: vLLM reads no prefix cache for token rewards and prompt
log-probs, so it would recompute every prefix.
"""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import Tensor

from tokenenv.errors import InvalidArgument, check_choice
from tokenenv.types import TokenSpec, Written

from .weights import lora_config, named_weights, save_adapter, save_weights, transformers_model
from .writer import Writer, WriterApart, requests, start_vllm

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks for which vLLM can make room."""


class VLLMEngine:
    """Writes the policy's texts with vLLM in this process: a `RolloutEngine`.

    Args:
        model: the policy's transformers model. `sync` takes its weights as they are at that time.
        spec: the env's.
        temperature: of sampling. Log-probs are those of the distribution that tokens are drawn
            from.
        num_texts: how many texts run side by side.
        dtype: "float32" or "bfloat16", of vLLM's copy of the weights.
        weight_sync: how weights get to vLLM. "memory" hands tensors to the one worker in this
            process. "disk" writes safetensors, for workers in processes of their own. "nccl" and
            "ipc" are vLLM's own transfer between GPUs. "auto" is "memory" where that can be, else
            "nccl" on GPUs and "disk" elsewhere. An adapter of `lora_rank` is written to disk and
            swapped instead.
        **options: of `vllm.LLM`, such as `tensor_parallel_size` and `gpu_memory_utilization`.
    """

    def __init__(
        self,
        model: Any,
        spec: TokenSpec,
        *,
        temperature: float = 1.0,
        num_texts: int = 64,
        dtype: str = "float32",
        weight_sync: str = "auto",
        **options: Any,
    ) -> None:
        check_choice("weight_sync", weight_sync, ("auto", "memory", "disk", *TRANSFERS))
        self.model = transformers_model(model)
        self._folder = TemporaryDirectory(prefix="tokenenv-vllm-")
        self.lora = lora_config(self.model)
        save_weights(self.model, Path(self._folder.name))
        # The user's options win over the sizes, and what the log-probs depend on wins over them.
        sizes = {
            "max_model_len": spec.max_length,
            "max_num_seqs": num_texts,
        }
        fixed = {"dtype": dtype, "logprobs_mode": "processed_logprobs"}
        fixed |= self._lora_options()
        # The env's ids alone end a text: the model's own may be others.
        sampling = {
            "temperature": temperature,
            "stop_token_ids": spec.engine_stop_ids,
            "ignore_eos": True,
        }
        transfer = weight_sync if weight_sync in TRANSFERS else None
        made_with = (self._folder.name, sampling, sizes | options | fixed, transfer)
        self._writer: Any = self._open(*made_with, self.lora is not None)
        self.weight_sync = self._choose(weight_sync)
        self._transfer: Any = None
        if self.lora:
            self.sync()

    def _open(self, *made_with: Any) -> Any:
        return Writer(*made_with)

    def _lora_options(self) -> dict[str, Any]:
        if not self.lora:
            return {}
        room = next(rank for rank in LORA_RANKS if rank >= self.lora.r)
        return {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}

    def _choose(self, weight_sync: str) -> str:
        """Return how weights get to vLLM, with "auto" decided."""
        if weight_sync != "auto":
            return weight_sync
        from vllm.platforms import current_platform

        no_processes = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"
        one_process = no_processes and self._writer.num_workers() == 1
        return "memory" if one_process else "disk" if current_platform.is_cpu() else "nccl"

    @property
    def llm(self) -> Any:
        """The `vllm.LLM` of this process."""
        return self._writer.llm

    def begin(self, key: int, prompt: Sequence[int], max_tokens: int, seed: int) -> None:
        """Begin a text; see `RolloutEngine`."""
        self._writer.begin(key, [int(token) for token in prompt], max_tokens, seed)

    def ended(self) -> list[Written]:
        """Wait until at least one text has ended, and return those that have; see
        `RolloutEngine`."""
        found: list[Written] = self._writer.ended()
        return found

    def sync(self) -> None:
        """Hand the model's weights over, and have the running texts read again with them; see
        `RolloutEngine`."""
        if self.lora:
            save_adapter(self.model, Path(self._folder.name) / "adapter")
            self._writer.swap_adapter()
        elif self.weight_sync == "memory":
            self._writer.reload(weights_iterator=iter(named_weights(self.model).items()))
        elif self.weight_sync == "disk":
            save_weights(self.model, Path(self._folder.name))
            self._writer.reload_folder()
        else:
            if self._transfer is None:
                client, workers = TransferClient(self._writer), self._writer.num_workers()
                self._transfer = open_transfer(self.weight_sync, client, self.model, workers)
            self._transfer.send_weights()
        # Keys and values in the cache are of the old weights.
        self._writer.forget_cache()

    def abort(self) -> None:
        """Drop the running texts and what is cached of them, so that what comes next depends on
        nothing before it."""
        self._writer.abort()


class VLLMEngineApart(VLLMEngine):
    """Writes the policy's texts with vLLM in a process of its own, while this one scores others: an
    `EngineApart`.

    It takes the arguments of a `VLLMEngine`. Weights get to it by "disk", unless "nccl" or "ipc" is
    asked for.
    """

    def __init__(self, *args: Any, weight_sync: str = "auto", **options: Any) -> None:
        if weight_sync == "memory":
            raise InvalidArgument(
                "weight_sync='memory' hands tensors to vLLM in this process; with own_process=True "
                "take 'disk', 'nccl' or 'ipc'."
            )
        weight_sync = "disk" if weight_sync == "auto" else weight_sync
        super().__init__(*args, weight_sync=weight_sync, **options)

    def _open(self, *made_with: Any) -> Any:
        return WriterApart(*made_with)

    def write_on(self, texts: int, tokens: int) -> None:
        """Begin to write until so many texts have ended; see `EngineApart`."""
        self._writer.write_on(texts, tokens)


class LocalVLLM:
    """vLLM in this process, as the backend of a `VLLMRewardModel` (with `runner="pooling"`) or of a
    `VLLMReference`.

    Args:
        model: a hub id or a folder.
        **options: of `vllm.LLM`.
    """

    def __init__(self, model: str | os.PathLike[str], **options: Any) -> None:
        self.llm = start_vllm(model, **options)

    def token_scores(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Return the raw output of a token-classification model with one label, for every token of
        each text: (len(text),) float32 each."""
        return self._pooled(texts, "token_classify")

    def text_scores(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Return the raw output of a sequence-classification model with one label, for each text:
        (1,) float32 each."""
        return self._pooled(texts, "classify")

    def prompt_logprobs(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Return log p of every token of each text except its first, in nats at temperature 1:
        (len(text) - 1,) float32 each."""
        from vllm import SamplingParams

        # vLLM has to write one token, which is left aside. `prompt_logprobs` of 0 asks for the
        # tokens that are there, and for no likelier ones.
        params = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False)
        found = []
        outputs = self.llm.generate(requests(texts), params, use_tqdm=False)
        for text, output in zip(texts, outputs, strict=True):
            pairs = zip(output.prompt_logprobs[1:], text[1:], strict=True)
            found.append(np.asarray([known[token].logprob for known, token in pairs], np.float32))
        return found

    def _pooled(self, texts: Sequence[Sequence[int]], task: str) -> list[np.ndarray]:
        from vllm import PoolingParams

        # Without its activation: vLLM's default squashes scores to 0..1.
        params = PoolingParams(use_activation=False)
        outputs = self.llm.encode(requests(texts), params, pooling_task=task, use_tqdm=False)
        return [output.outputs.data.float().cpu().numpy().reshape(-1) for output in outputs]


# vLLM's own weight transfer, between GPUs.


class TransferClient:
    """The receiving side of vLLM's weight transfer, where that is a `Writer`."""

    def __init__(self, writer: Any) -> None:
        self._call = writer.transfer

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Open the receiving end."""
        self._call("init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        """Tell the workers that weights are to come."""
        self._call("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Have the workers receive weights."""
        self._call("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Tell the workers that all weights have come."""
        self._call("finish_weight_update", weight_version)


def open_transfer(backend: str, client: Any, model: Any, num_workers: int) -> Any:
    """Return vLLM's sender of the model's weights. Its `send_weights()` sends them as they are at
    that time."""
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    info = TRANSFERS[backend](num_workers)
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=_source(model))


def _source(model: Any) -> Any:
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Source(WeightSource):
        def metadata(self) -> list[Any]:
            return [ParamMeta(name, weight.dtype, tuple(weight.shape)) for name, weight in self]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return iter(named_weights(model).items())

    return Source()


def _nccl(num_workers: int) -> Any:
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    # Port 0 gives a free one. It is closed again here, and opened by the sender.
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    address = os.environ.get("VLLM_HOST_IP", "127.0.0.1")
    return NCCLTrainerInitInfo(
        master_address=address, master_port=port, world_size=1 + num_workers, rank=0
    )


def _ipc(num_workers: int) -> Any:
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    return IPCTrainerInitInfo(rank=0)


TRANSFERS: dict[str, Callable[[int], Any]] = {"nccl": _nccl, "ipc": _ipc}
"""vLLM's backends, and how the sender opens each for a number of workers."""
