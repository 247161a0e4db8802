"""Make the language model of Calculator-v0, envs/assets/calculator-lm.

python scripts/make_calculator.py
"""

import random
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import training
from rich import print
from torch import Tensor
from torch.nn import functional as F

from tokenenv.envs.language.bundled import ASSETS
from tokenenv.envs.language.calculator import (
    TOKENS,
    draw_questions,
    questions,
    value_of,
    written_behind,
)
from tokenenv.envs.language.digits import EOS, PAD
from tokenenv.turns import Segment

FOLDER = ASSETS / "calculator-lm"
CALLS = 0.12
"""The share of texts in which a pupil calls the calculator."""
WRONG_CALLS, BROKEN_CALLS = 0.1, 0.05
"""Of those, the shares with a wrong digit, and with an expression that ends too early."""
MISTAKES = 0.05
"""The share of digits in whose place a pupil writes any digit, in sums of two numbers."""
FIRST_DIGITS = 0.5
"""The share of other answers that are right in their first digit; the digits behind it are any."""
PHASES = ((120_000, 0.7, 3, 3e-3), (40_000, CALLS, 2, 1e-3))
"""Texts, the share of them with a call, epochs, and the learning rate. Copying is learned from
calls, so there are many of them at first."""
MAX_NEW_TOKENS = 20
Text = tuple[list[int], list[Segment]]
"""A question, and the segments of the response."""
CARD = """# calculator-lm

The reference of `tokenenv/Calculator-v0`: a Llama of {parameters:,} parameters ({layers} layers, hidden 96, 3 heads of 32,
1 key-value head) over characters, which answers questions, and can call a calculator that writes into its text.

- Data: {num_texts:,} questions and answers by pupils who know sums of two numbers, guess at all others, and call the
  calculator in {calls} of their texts ({first_calls} in the first phase of the training, in which copying is learned). No
  outside text.
- Held-out loss, from the saved bfloat16 weights: {loss:.4f} nats per token of pupils' own tokens, on held-out questions.
- Of {asked:,} held-out texts at temperature 1, {calling:.3f} have a call, and {finished:.3f} end within {limit} tokens. Right are
  {sum:.3f} of the sums of two numbers, and of all other questions {without:.3f} without a call and {with_call:.3f} with one.
- Size: {size_kb} kB.
- Made by `python scripts/make_calculator.py`: {minutes:.1f} minutes of CPU time on one thread, seeds fixed.
"""


def make_tokenizer() -> Any:
    """Make the tokenizer: a token for each character."""
    return training.character_tokenizer(TOKENS)


def guess(question: str, rng: random.Random) -> str:
    """Return the answer that a pupil writes without the calculator."""
    expression = question.removesuffix("=")
    right = str(value_of(expression))

    def other(digit: str, share: float) -> str:
        return rng.choice("0123456789") if rng.random() < share else digit

    if expression.count("+") == 1:
        return "".join(other(digit, MISTAKES) for digit in right)
    first = right[0] if rng.random() < FIRST_DIGITS else rng.choice("123456789")
    return first + "".join(rng.choice("0123456789") for _ in right[1:])


def call(question: str, rng: random.Random) -> str:
    """Return the call that a pupil writes, which is sometimes a wrong one."""
    expression, drawn = question.removesuffix("="), rng.random()
    if drawn < BROKEN_CALLS:
        last_sign = max(expression.rfind("+"), expression.rfind("*"))
        return f"[{expression[: last_sign + 1]}]"
    if drawn < BROKEN_CALLS + WRONG_CALLS:
        place = rng.choice([i for i, character in enumerate(expression) if character.isdigit()])
        expression = expression[:place] + rng.choice("123456789") + expression[place + 1 :]
    return f"[{expression}]"


def make_texts(
    split: str, count: int, calls: float, rng: random.Random, tokenizer: Any
) -> list[Text]:
    """Return texts, a share of them with a call; about a quarter of `count` are of the split
    "test"."""
    texts = []
    for question in draw_questions(split, count, rng):
        parts = []
        if rng.random() < calls:
            asked = call(question, rng)
            parts = [(True, asked), (False, written_behind(asked))]
        known = parts and parts[-1][1] != "?"
        parts += [(True, (parts[-1][1][1:-1] if known else guess(question, rng)) + "<eos>")]
        segments = [Segment(own, tokenizer.encode(part)) for own, part in parts]
        texts.append((tokenizer.encode(question), segments))
    return texts


def own_loss(model: Any, texts: Sequence[Text]) -> Tensor:
    """Return the cross-entropy of the pupils' own tokens, in nats per token. Questions, and what
    the calculator writes, do not count."""
    whole, targets = [], []
    for question, segments in texts:
        whole.append(question + [token for part in segments for token in part.tokens])
        masked = [part.tokens if part.own else [-100] * len(part.tokens) for part in segments]
        targets.append([-100] * len(question) + [token for part in masked for token in part])
    logits = model(input_ids=training.pad(whole, PAD), use_cache=False).logits[:, :-1]
    wanted = training.pad(targets, -100)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100)


@torch.no_grad()
def held_out_loss(model: Any, tokenizer: Any) -> float:
    """Return the `own_loss` on questions that were held out."""
    return float(own_loss(model, make_texts("test", 4_000, CALLS, random.Random(4), tokenizer)))


def train(tokenizer: Any) -> Any:
    """Train a Llama of about 0.2M parameters on what pupils write."""
    from transformers import LlamaConfig, LlamaForCausalLM

    special = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
    more = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, **special}
    model = LlamaForCausalLM(LlamaConfig(**training.SMALL_SHAPE, **more))
    for phase, (count, calls, epochs, lr) in enumerate(PHASES):
        texts = make_texts("train", count, calls, random.Random(1 + phase), tokenizer)
        training.fit(
            model,
            lambda group, texts=texts: own_loss(model, [texts[i] for i in group]),
            # Texts are not batched by their lengths: in batches of calls alone, the first token
            # would count less, and the share of calls would not be learned.
            [1] * len(texts),
            epochs=epochs,
            lr=lr,
            measure=lambda: held_out_loss(model, tokenizer),
            label=f"language model, phase {phase + 1}",
        )
    return model


def respond_to(model: Any, tokenizer: Any, asked: Sequence[str]) -> list[str]:
    """Draw a response to each question, in which the calculator writes behind calls."""
    done: dict[int, str] = {}
    running = {i: (question, MAX_NEW_TOKENS) for i, question in enumerate(asked)}
    while running:
        # All rows get as many tokens as the one that has the most left; what is too much is cut.
        most = max(left for _, left in running.values())
        prompts = [tokenizer.encode(text) for text, _ in running.values()]
        drawn = training.sample(model, prompts, most, EOS)
        for (i, (text, left)), tokens in zip(list(running.items()), drawn, strict=True):
            turn = tokenizer.decode(tokens[:left])
            head, closed, _ = turn.partition("]")
            left -= len(tokenizer.encode(head)) + 1
            if closed and left > 0:
                running[i] = (text + head + "]" + written_behind(head + "]"), left)
            else:
                done[i] = (text + turn)[len(asked[i]) :]
                del running[i]
    return [done[i] for i in range(len(asked))]


def measure(model: Any, tokenizer: Any) -> dict[str, float]:
    """Measure what the saved model answers."""
    asked = questions("test")
    responses = respond_to(model, tokenizer, asked)
    right = defaultdict(list)
    for question, response in zip(asked, responses, strict=True):
        answer = response.replace("?", "}").rpartition("}")[2]
        known = question.count("+") == 1
        kind = "sum" if known else "with_call" if "]" in response else "without"
        right[kind].append(answer == f"{value_of(question.removesuffix('='))}<eos>")
    ends = [response.endswith("<eos>") for response in responses]
    return {
        "asked": len(asked),
        "calling": sum("]" in response for response in responses) / len(asked),
        "finished": sum(ends) / len(asked),
        **{kind: sum(rows) / len(rows) for kind, rows in right.items()},
    }


def main() -> None:
    """Train and save the model, measure what was saved, and write the card."""
    begin = time.process_time()
    training.set_up()
    training.save(train(make_tokenizer()), make_tokenizer(), FOLDER)
    model, tokenizer = training.load(FOLDER), training.load_tokenizer(FOLDER)
    numbers = {"loss": held_out_loss(model, tokenizer), **measure(model, tokenizer)}
    numbers["minutes"] = (time.process_time() - begin) / 60
    print(numbers)
    settings = {"num_texts": sum(phase[0] for phase in PHASES) * 3 // 4, "calls": CALLS}
    settings |= {
        "first_calls": PHASES[0][1],
        "layers": model.config.num_hidden_layers,
        "limit": MAX_NEW_TOKENS,
    }
    training.write_card(FOLDER, CARD, model, **settings, **numbers)


if __name__ == "__main__":
    main()
