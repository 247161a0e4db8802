"""The cost of one `CachedLM.append`, by position, beside a bare forward of one token of the same
trunk without a cache.

    python benchmarks/cached_lm.py [--slots 64] [--length 256] [--repetitions 60]

It prints milliseconds (medians of interleaved repetitions) and where they go, for a model of the
bundled size (4 layers, hidden 128, 4 heads of 32 with one key/value head, 1024 ids).
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.autograd.profiler import profile
from transformers import LlamaConfig, LlamaModel

from tokenenv.models.cached_lm import CachedLM

POSITIONS = (16, 64, 128, 240)
"""Places of the cache at which a step is timed."""
OPERATIONS = {
    "attention": "scaled_dot_product",
    "matrix products": "aten::mm",
    "cache writes": "index_put",
}
"""Kinds of operations, by a part of their names in torch's profiler."""


def bundled_size(length: int) -> Any:
    """Make a Llama trunk of the bundled models' size, with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=length,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LlamaModel(config).to(device).eval().requires_grad_(False)


def contenders(trunk: Any, slots: int, length: int) -> dict[str, Callable[[], Any]]:
    """Return the forwards to time, by name."""
    cached = CachedLM(trunk, slots, length)
    tokens = torch.randint(0, 1024, (slots,), device=trunk.device)
    texts = torch.randint(0, 1024, (slots, length), device=trunk.device)
    cached.prefill(range(slots), texts, [length] * slots)

    def bare() -> Any:
        with torch.no_grad():
            return trunk(input_ids=tokens[:, None], use_cache=False)[0]

    def append_at(position: int) -> Callable[[], Any]:
        def append() -> Any:
            # All slots go back to the position, so that every repetition is the same step.
            cached.positions[:] = position
            return cached.append(tokens)

        return append

    return {"bare": bare} | {
        f"append at {position}": append_at(position) for position in POSITIONS if position < length
    }


def milliseconds(functions: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, float]:
    """Return the median milliseconds of each function, run in turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repetitions):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(values)) for name, values in times.items()}


def breakdown(function: Callable[[], Any], repetitions: int = 20) -> dict[str, float]:
    """Return the milliseconds of CPU time inside each kind of operation, for one call."""
    with profile(use_kineto=False) as record:
        for _ in range(repetitions):
            function()
    spent = dict.fromkeys(OPERATIONS, 0.0) | {"the rest": 0.0}
    for event in record.key_averages():
        name = next((name for name, part in OPERATIONS.items() if part in event.key), "the rest")
        spent[name] += event.self_cpu_time_total / 1e3 / repetitions
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=60)
    options = parser.parse_args()
    trunk = bundled_size(options.length)
    functions = contenders(trunk, options.slots, options.length)
    milliseconds(functions, 5)
    times = milliseconds(functions, options.repetitions)
    print(
        f"{options.slots} slots, {options.length} places, {torch.get_num_threads()} threads, "
        f"{trunk.device}"
    )
    for name, value in times.items():
        spent = breakdown(functions[name])
        parts = ", ".join(f"{part} {cpu:.2f}" for part, cpu in spent.items())
        ratio = value / times["bare"]
        print(f"{name:14s} {value:6.2f} ms   {ratio:5.2f} x bare   (CPU ms, profiled: {parts})")
    _, first, *_, last = times.values()
    print(f"last position over first: {last / first:.2f}")


if __name__ == "__main__":
    main()
