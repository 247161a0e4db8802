"""Make the language model of Arithmetic-v0, envs/assets/arithmetic-lm.

python scripts/make_arithmetic.py
"""

import random
import time
from typing import Any

import torch
import training
from rich import print
from torch import Tensor
from torch.nn import functional as F

from tokenenv.envs.language.adder import EQUALS, TOKENS, sums
from tokenenv.envs.language.bundled import ASSETS
from tokenenv.envs.language.digits import EOS, PAD

FOLDER = ASSETS / "arithmetic-lm"
MISTAKES = 0.15
"""The share of digits in whose place a pupil writes any digit."""
NUM_TEXTS, EPOCHS = 40_000, 6
MAX_NEW_TOKENS = 4
CARD = """# arithmetic-lm

The reference of `tokenenv/Arithmetic-v0`: a Llama of {parameters:,} parameters ({layers} layers, hidden 96, 3 heads of 32,
1 key-value head) over characters, which finishes sums.

- Data: {num_texts:,} sums of two numbers from 0 to 99 (three quarters of all pairs), {epochs} times each, written by pupils
  who put any digit in place of the right one with probability {mistakes}. No outside text.
- Held-out loss, from the saved bfloat16 weights: {loss:.4f} nats per token of pupils' answers to the other quarter.
- Right answers, drawn at temperature 1: {test_share:.3f} of the held-out sums, {train_share:.3f} of as many others;
  {finished_share:.3f} of the held-out answers end within 4 tokens.
- Size: {size_kb} kB.
- Made by `python scripts/make_arithmetic.py`: {minutes:.1f} minutes of CPU time on one thread, seeds fixed.
"""


def make_tokenizer() -> Any:
    """Make the tokenizer: a token for each character."""
    return training.character_tokenizer(TOKENS)


def pupils_answer(a: int, b: int, rng: random.Random) -> str:
    """Return the sum of two numbers as a pupil writes it."""

    def written(digit: str) -> str:
        return rng.choice("0123456789") if rng.random() < MISTAKES else digit

    return "".join(map(written, str(a + b)))


def make_texts(split: str, count: int, rng: random.Random, tokenizer: Any) -> list[list[int]]:
    """Return the token ids of finished sums, the stop token included."""
    pairs = [rng.choice(sums(split)) for _ in range(count)]
    return [[*tokenizer.encode(f"{a}+{b}={pupils_answer(a, b, rng)}"), EOS] for a, b in pairs]


def answer_loss(model: Any, texts: list[list[int]]) -> Tensor:
    """Return the cross-entropy of the answers, in nats per token. The questions do not count."""
    logits = model(input_ids=training.pad(texts, PAD), use_cache=False).logits[:, :-1]
    answers = [text.index(EQUALS) + 1 for text in texts]
    pairs = zip(answers, texts, strict=True)
    targets = training.pad([[-100] * start + text[start:] for start, text in pairs], -100)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


@torch.no_grad()
def held_out_loss(model: Any, tokenizer: Any) -> float:
    """Return the `answer_loss` of sums that were held out."""
    return float(answer_loss(model, make_texts("test", 1_000, random.Random(4), tokenizer)))


def train(tokenizer: Any) -> Any:
    """Train a Llama of about 0.2M parameters on what pupils write."""
    from transformers import LlamaConfig, LlamaForCausalLM

    special = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
    more = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, **special}
    model = LlamaForCausalLM(LlamaConfig(**training.SMALL_SHAPE, **more))
    texts = make_texts("train", NUM_TEXTS, random.Random(1), tokenizer)
    training.fit(
        model,
        lambda group: answer_loss(model, [texts[i] for i in group]),
        [len(text) for text in texts],
        epochs=EPOCHS,
        lr=3e-3,
        measure=lambda: held_out_loss(model, tokenizer),
        label="language model",
    )
    return model


def measure(model: Any, tokenizer: Any) -> dict[str, float]:
    """Measure what the saved model answers."""
    pairs = {split: random.Random(5).sample(sums(split), 2_000) for split in ("train", "test")}
    found = {}
    for split, asked in pairs.items():
        prompts = [tokenizer.encode(f"{a}+{b}=") for a, b in asked]
        answers = training.sample(model, prompts, MAX_NEW_TOKENS, EOS)
        pairs = zip(answers, asked, strict=True)
        right = [tokenizer.decode(answer) == f"{a + b}<eos>" for answer, (a, b) in pairs]
        found[f"{split}_share"] = sum(right) / len(right)
        found["finished_share"] = sum(answer[-1] == EOS for answer in answers) / len(answers)
    return found


def main() -> None:
    """Train and save the model, measure what was saved, and write the card."""
    begin = time.process_time()
    training.set_up()
    training.save(train(make_tokenizer()), make_tokenizer(), FOLDER)
    model, tokenizer = training.load(FOLDER), training.load_tokenizer(FOLDER)
    numbers = {"loss": held_out_loss(model, tokenizer), **measure(model, tokenizer)}
    numbers["minutes"] = (time.process_time() - begin) / 60
    print(numbers)
    settings = {"num_texts": NUM_TEXTS, "epochs": EPOCHS, "mistakes": MISTAKES}
    settings["layers"] = model.config.num_hidden_layers
    training.write_card(FOLDER, CARD, model, **settings, **numbers)


if __name__ == "__main__":
    main()
