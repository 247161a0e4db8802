"""The parts that the scripts which make the bundled models share: batches, the loss of a language
model, the training loop, sampling and saving."""

import copy
import json
import math
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn
from torch.nn import functional as F

from tokenenv.fit import FitConfig
from tokenenv.fit import fit as fit_reward_model

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_attention_heads": 4,
    # One key/value head makes a small cache, so that a step hardly takes longer in a longer text.
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
"""The Llama configuration of the bundled language models, with attention heads of 32 numbers."""
SMALL_SHAPE = SHAPE | {"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 3}
"""The Llama configuration of the bundled reward models."""


def set_up(seed: int = 0) -> None:
    """Fix what the result depends on: the seeds and the number of threads. With one thread, two
    scripts run well side by side."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


def character_tokenizer(tokens: Sequence[str]) -> Any:
    """Make a tokenizer with a token for each character; id i is `tokens[i]`."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )


def pad(rows: Sequence[Sequence[float]], fill: float, dtype: torch.dtype = torch.long) -> Tensor:
    """Make one right-padded tensor (B, L) of ragged rows."""
    length = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows], dtype=dtype)


def batches(lengths: Sequence[int], size: int, rng: random.Random) -> list[list[int]]:
    """Group indices into batches of `size` texts of similar length, in random order."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i] + rng.uniform(-4, 4))
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    rng.shuffle(groups)
    return groups


def lm_loss(model: nn.Module, texts: Sequence[Sequence[int]], reduction: str = "mean") -> Tensor:
    """Return the cross-entropy of the next token, in nats per token."""
    # Right padding needs no mask under causal attention.
    logits = model(input_ids=pad(texts, 0), use_cache=False).logits[:, :-1]
    targets = pad(texts, -100)[:, 1:]
    return F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction=reduction
    )


@torch.no_grad()
def mean_lm_loss(model: nn.Module, texts: Sequence[Sequence[int]]) -> float:
    """Return the cross-entropy in nats per token over all `texts`."""
    model.eval()
    total = sum(float(lm_loss(model, texts[i : i + 64], "sum")) for i in range(0, len(texts), 64))
    return total / sum(len(text) - 1 for text in texts)


def add_dropout(model: nn.Module, rate: float) -> list[Any]:
    """Add dropout to the embeddings and to what each block adds, in train mode only. Return
    handles, to `.remove()` before saving."""

    def drop(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        return F.dropout(output, rate, module.training)

    places = ("embed_tokens", "o_proj", "down_proj")
    modules = [module for name, module in model.named_modules() if name.endswith(places)]
    return [module.register_forward_hook(drop) for module in modules]


def fit(
    model: nn.Module,
    loss: Callable[[list[int]], Tensor],
    lengths: Sequence[int],
    *,
    epochs: int,
    lr: float,
    batch_size: int = 64,
    weight_decay: float = 0.1,
    measure: Callable[[], float] | None = None,
    label: str = "training",
) -> None:
    """Train a model by AdamW, with warm-up and cosine decay.

    Args:
        model: trained in place, and left in eval mode.
        loss: maps the indices of a batch's texts to its loss.
        lengths: the tokens of each text.
        epochs: passes over the texts.
        lr: the highest learning rate.
        batch_size: texts of a batch.
        weight_decay: of matrices.
        measure: where given, the weights of the epoch in which it is least are kept.
        label: of the progress bar.
    """
    rng = random.Random(0)
    plan = [batches(lengths, batch_size, rng) for _ in range(epochs)]
    total = sum(map(len, plan))
    optimizer = torch.optim.AdamW(_groups(model, weight_decay), lr=lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * _cosine(step / total)
    )
    best, best_weights = math.inf, None
    shown = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*shown, *times) as progress:
        bar = progress.add_task(label, total=total)
        for epoch, groups in enumerate(plan, 1):
            model.train()
            running = 0.0
            for group in groups:
                value = loss(group)
                optimizer.zero_grad()
                value.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                running += float(value.detach())
                progress.advance(bar)
            model.eval()
            held_out = measure() if measure else math.nan
            progress.print(
                f"{label}: epoch {epoch}/{epochs} loss {running / len(groups):.4f} held-out "
                f"{held_out:.4f}"
            )
            if held_out < best:
                best, best_weights = held_out, {k: v.clone() for k, v in model.state_dict().items()}
    if best_weights is not None:
        model.load_state_dict(best_weights)
    model.eval()


def _cosine(share: float) -> float:
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


@torch.no_grad()
def sample(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: int,
    *,
    temperature: float = 1.0,
    bias: Tensor | float = 0.0,
    batch_size: int = 256,
) -> list[list[int]]:
    """Draw one response to each prompt, which ends with the stop token or after `max_new_tokens`.
    `bias` (V,) is added to the logits."""
    responses: list[list[int]] = [[] for _ in prompts]
    # Prompts of one length make a batch without padding.
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    groups: dict[int, list[int]] = {}
    for i in by_length:
        groups.setdefault(len(prompts[i]), []).append(i)
    for members in groups.values():
        for start in range(0, len(members), batch_size):
            rows = members[start : start + batch_size]
            tokens = torch.tensor([list(prompts[i]) for i in rows])
            drawn = _sample_equal(model, tokens, max_new_tokens, stop, temperature, bias)
            for i, row in zip(rows, drawn.tolist(), strict=True):
                responses[i] = row[: row.index(stop) + 1] if stop in row else row
    return responses


def _sample_equal(
    model: nn.Module, tokens: Tensor, max_new_tokens: int, stop: int, temperature: float, bias: Any
) -> Tensor:
    cache, drawn = None, []
    done = torch.zeros(len(tokens), dtype=torch.bool)
    for _ in range(max_new_tokens):
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        tokens = torch.multinomial(torch.softmax(output.logits[:, -1] / temperature + bias, -1), 1)
        drawn.append(tokens)
        done |= tokens[:, 0] == stop
        if done.all():
            break
    return torch.cat(drawn, 1)


def parameters(model: nn.Module) -> int:
    """Return the number of parameters, in which tied ones count once."""
    return sum(p.numel() for p in model.parameters())


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the model, in bfloat16, with its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).eval().to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def save_reward_model(
    rows: Sequence[dict[str, Any]], tokenizer: Any, folder: Path, epochs: int
) -> None:
    """Train a small token classifier, whose scores sum to the `values` of the rows, by `tokenenv
    fit`, and write it in bfloat16."""
    with tempfile.TemporaryDirectory() as out:
        config = FitConfig(
            data=rows,
            objective="values",
            tokenizer=tokenizer,
            hidden_size=SMALL_SHAPE["hidden_size"],
            num_layers=3,
            epochs=epochs,
            lr=3e-3,
            batch_examples=64,
            weight_decay=0.1,
            held_out=0.02,
            out=Path(out) / "fitted",
        )
        save(fit_reward_model(config, progress=True).reader.model, tokenizer, folder)


def load(folder: Path) -> Any:
    """Load a saved model, in float32."""
    import transformers

    [architecture] = json.loads((folder / "config.json").read_text())["architectures"]
    return getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32).eval()


def load_tokenizer(folder: Path) -> Any:
    """Load a saved tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def write_card(folder: Path, template: str, model: nn.Module, **numbers: Any) -> None:
    """Write the model card: `template`, filled with what was measured."""
    files = [file for file in folder.iterdir() if file.name != "README.md"]
    size_kb = round(sum(file.stat().st_size for file in files) / 1000)
    card = template.format(parameters=parameters(model), size_kb=size_kb, **numbers)
    (folder / "README.md").write_text(card)
