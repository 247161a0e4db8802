"""A `vllm.LLM` that writes texts, in this process or in one of its own."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from tokenenv.errors import missing
from tokenenv.types import Written

from .own_process import OwnProcess

CPU_SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Environment variables for vLLM on a CPU, where they are not set: 1 GiB of caches (its default is
nearly all memory), and threads that are not bound to cores."""
ADAPTER = ("policy", 1)
"""The name and number of the policy's adapter in vLLM."""


def start_vllm(model: str | os.PathLike[str], **options: Any) -> Any:
    """Start a `vllm.LLM` in this process, for token ids alone; on a CPU with small caches and
    without compilation.

    Args:
        model: a hub id or a folder.
        **options: of `vllm.LLM`, such as `gpu_memory_utilization=0.4`.

    Raises:
        MissingDependency: vLLM is not installed.
    """
    # In one process weights can be handed over as tensors. A value that the user has set is kept.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # vLLM logs much, and warns of the tokenizer that is left out here.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        from vllm import LLM
        from vllm.platforms import current_platform
    except ImportError as error:
        raise missing("rollout='vllm' (docs/vllm.md)", "vllm") from error
    defaults: dict[str, Any] = {"skip_tokenizer_init": True, "disable_log_stats": True}
    if current_platform.is_cpu():
        for name, value in CPU_SETTINGS.items():
            os.environ.setdefault(name, value)
        defaults["enforce_eager"] = True
    return LLM(str(model), **(defaults | options))


def requests(texts: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Return texts of token ids as vLLM takes them."""
    return [{"prompt_token_ids": [int(token) for token in text]} for text in texts]


class Writer:
    """Writes texts with a model in a folder.

    Args:
        folder: of the model's weights, and of its adapter in `adapter`.
        sampling: options of `vllm.SamplingParams` for every text.
        options: of `vllm.LLM`.
        transfer: the backend of vLLM's own weight transfer, or None.
        lora: whether texts are written with the adapter.
    """

    def __init__(
        self,
        folder: str,
        sampling: dict[str, Any],
        options: dict[str, Any],
        transfer: str | None = None,
        lora: bool = False,
    ) -> None:
        self.llm = start_vllm(folder, **(options | transfer_options(transfer)))
        self._folder, self._sampling, self._lora = folder, sampling, lora
        self._running: set[int] = set()

    def num_workers(self) -> int:
        """Return the number of workers that share the model."""
        return int(self.llm.llm_engine.vllm_config.parallel_config.world_size)

    def begin(self, key: int, prompt: Sequence[int], max_tokens: int, seed: int) -> None:
        """Begin a text; see `RolloutEngine`."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=max_tokens,
            seed=seed,
            logprobs=0,
            # Lists of numbers, and no object for each token.
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            # Each text has parameters of its own, so vLLM needs no copy of them.
            skip_clone=True,
            **self._sampling,
        )
        [request] = requests([prompt])
        lora = self._lora_request()
        self.llm.llm_engine.add_request(str(key), request, params, lora_request=lora)
        self._running.add(key)

    def ended(self, texts: int = 1, tokens: int = 1) -> list[Written]:
        """Write until so many texts have ended, or texts of so many new tokens together, or all;
        return them in the order in which they ended."""
        found: list[Written] = []
        seen = step = 0
        while self._running and (not found or (len(found) < texts and seen < tokens)):
            outputs = self.llm.llm_engine.step()
            now = [self._written(output, step) for output in outputs if output.finished]
            found, step = found + now, step + 1
            seen += sum(len(one.tokens) for one in now)
        return found

    def _written(self, output: Any, step: int) -> Written:
        key, [text] = int(output.request_id), output.outputs
        self._running.discard(key)
        return Written(key, list(text.token_ids), list(text.logprobs.logprobs), step=step)

    def write(self, begun: list[tuple[Any, ...]], texts: int, tokens: int) -> list[Written]:
        """Begin texts, and go on as `ended` does."""
        for text in begun:
            self.begin(*text)
        return self.ended(texts, tokens)

    def forget_cache(self) -> None:
        """Have the running texts read again, as keys and values of old weights are of no use."""
        self.llm.reset_prefix_cache(reset_running_requests=True)

    def abort(self) -> None:
        """Drop the running texts and what is cached of them."""
        self.llm.llm_engine.abort_request([str(key) for key in self._running])
        self._running.clear()
        self.forget_cache()

    def reload(self, **weights: Any) -> None:
        """Take new weights, by `weights_path` or `weights_iterator`."""
        self.llm.collective_rpc("reload_weights", kwargs=weights)

    def reload_folder(self) -> None:
        """Take the weights that are in the folder now."""
        self.reload(weights_path=self._folder)

    def swap_adapter(self) -> None:
        """Take the adapter that is in the folder now."""
        self.llm.llm_engine.add_lora(self._lora_request(load_inplace=True))

    def transfer(self, method: str, *args: Any) -> None:
        """Call a method of vLLM's weight transfer."""
        getattr(self.llm, method)(*args)

    def _lora_request(self, **options: Any) -> Any:
        if not self._lora:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest(*ADAPTER, f"{self._folder}/adapter", **options)


class WriterApart:
    """A `Writer` in a process of its own, with the same methods: it goes on while this process does
    something else.

    What it writes depends on what it is asked for alone, and not on when.
    """

    def __init__(self, *made_with: Any) -> None:
        self._process = OwnProcess(Writer, *made_with)
        self._begun: list[tuple[Any, ...]] = []
        """Texts that the next round begins with."""
        self._round: Future[list[Written]] | None = None

    def begin(self, *text: Any) -> None:
        """Begin a text in the round that comes next."""
        self._begun.append(text)

    def write_on(self, texts: int, tokens: int) -> None:
        """Begin a round: write until so many texts have ended, or texts of so many new tokens
        together. `ended` returns them."""
        if self._round is None:
            begun, self._begun = self._begun, []
            self._round = self._process.send("write", begun, texts, tokens)

    def ended(self) -> list[Written]:
        """Wait for the end of the round, or of one with a single text where none was begun."""
        self.write_on(1, 1)
        assert self._round is not None
        running, self._round = self._round, None
        return running.result()

    def abort(self) -> None:
        """Drop the running texts when the round has come to its end, which is not waited for."""
        self._begun, self._round = [], None
        self._process.send("abort")

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._process.send(name, *args, **kwargs).result()


def transfer_options(backend: str | None) -> dict[str, Any]:
    """Return the options that `vllm.LLM` needs at its start if weights are to come by its own
    transfer; none otherwise."""
    if backend is None:
        return {}
    try:
        from vllm.config import WeightTransferConfig
    # That vLLM is missing is said where it is started.
    except ImportError:
        return {}
    return {"weight_transfer_config": WeightTransferConfig(backend=backend)}
