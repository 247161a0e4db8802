"""Policy and reference in one forward of stacked rows, against one forward each.

Both read the same tokens, and under LoRA the same weights. Stacked, the weights are read once for
2 N rows, and the adapters' part is added to the policy's N rows alone. It prints the cost of one
cached token in each of N texts, heads included: CPU time of this process, or time on a GPU, medians
of turns, from one run for each N.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from timing import medians
from torch import Tensor, nn

from tokenenv.models.adapters import adapter_layers, sharing, with_lora
from tokenenv.models.cached_lm import CachedLM
from tokenenv.models.heads import lm_head
from tokenenv.models.loading import load_causal_lm

PROMPT, SPARE = 32, 128
console = Console()


def adapting_first(model: nn.Module, rows: int) -> nn.Module:
    """Return a copy of a model with LoRA, with the same weights, whose adapters see the first
    `rows` rows of a batch and add nothing to the others."""
    model, first = sharing(model, model.parameters()), FirstRows(rows)
    for layer in adapter_layers(model):
        for name in layer.lora_A:
            layer.lora_A[name].register_forward_pre_hook(first.cut)
            layer.lora_B[name].register_forward_hook(first.fill)
    return model


class FirstRows:
    """Hooks around an adapter, which then sees the first rows of a batch."""

    def __init__(self, rows: int):
        self.rows, self.below = rows, 0

    def cut(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return what the adapter reads."""
        self.below = max(0, len(args[0]) - self.rows)
        return (args[0][: self.rows],)

    def fill(self, module: nn.Module, args: tuple[Tensor, ...], added: Tensor) -> Tensor:
        """Return what it adds, zeros below."""
        return torch.cat([added, added.new_zeros(self.below, *added.shape[1:])])


def ready(model: nn.Module, texts: Tensor) -> CachedLM:
    """Return the caches of a model that has read some texts (n, PROMPT)."""
    count = len(texts)
    slots = CachedLM(model, count, PROMPT + SPARE)
    slots.prefill(np.arange(count), texts, np.full(count, PROMPT))
    return slots


def clock_of(device: torch.device) -> Callable[[], float]:
    """Return a clock of what runs on the device."""
    if device.type == "cpu":
        return time.process_time

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def compare(base: nn.Module, policy: nn.Module, num_texts: int, turns: int) -> None:
    """Print the cost of a token by two forwards and by one, and how far their logits are apart."""
    device, vocab_size = base.device, base.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(vocab_size, (num_texts, PROMPT), generator=generator).to(device)
    twice, tokens = torch.cat([texts, texts]), texts[:, 0]
    one, other = ready(policy, texts), ready(base, texts)
    # After the policy's trunk has been tried out, so that the copy is not: its rows are two kinds.
    both = ready(adapting_first(policy, num_texts), twice)
    heads = lm_head(policy), lm_head(base)

    def separate() -> tuple[Tensor, Tensor]:
        return heads[0](one.append(tokens)), heads[1](other.append(tokens))

    def together() -> Tensor:
        return heads[0](both.append(torch.cat([tokens, tokens])))

    logits = separate()
    apart = (torch.cat(logits) - together()).abs().max().item()
    learned = (logits[0] - logits[1]).abs().max().item()
    seconds = medians({"separate": separate, "stacked": together}, turns, clock_of(device))
    console.print(
        f"N={num_texts}: separate {1e3 * seconds['separate']:.1f} ms, stacked "
        f"{1e3 * seconds['stacked']:.1f} ms, ratio {seconds['separate'] / seconds['stacked']:.2f}; "
        f"logits differ by at most {apart:.1e}, of policy and reference by {learned:.1f}"
    )


def main() -> None:
    """Measure each number of texts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a directory or a hub id")
    parser.add_argument("--num-texts", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    base = load_causal_lm(args.model, device=args.device, dtype=getattr(torch, args.dtype))
    policy = with_lora(base, 8, 0)
    for layer in adapter_layers(policy):
        for module in layer.lora_B.values():
            nn.init.normal_(module.weight, std=0.02)  # at zero they would add nothing
    for num_texts in args.num_texts:
        compare(base, policy, num_texts, args.turns)


if __name__ == "__main__":
    main()
