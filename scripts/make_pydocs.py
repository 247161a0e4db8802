"""Make the models of PyDocs-v0, envs/assets/pydocs-lm and pydocs-reward.

    python scripts/make_pydocs.py

All text is prose of this Python's own standard library: the language reference (`pydoc_data`) and
docstrings.
"""

import ast
import platform
import random
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import training
from rich import print
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor

from tokenenv.envs.language.bundled import ASSETS
from tokenenv.envs.language.readability import MIN_WORDS, count_syllables, reading_ease, words
from tokenenv.envs.language.topics import paragraphs, passages, prose
from tokenenv.envs.tasks.pydocs import MAX_PROMPT_TOKENS, cut, make_prompts

END = 0
VOCABULARY = 1024
MAX_NEW_TOKENS = 80
MAX_TOKENS = MAX_PROMPT_TOKENS + MAX_NEW_TOKENS
TILTS = ((1.0, 0.0), (1.2, 0.0), (1.0, 1.0), (1.0, 2.0), (1.0, -1.0))
"""The temperature of each set of samples that the reward model learns from, and how far the set is
tilted towards easy words."""
Text = tuple[list[int], int]
"""The token ids of prompt and response, and where the response begins."""
_SKIPPED = {"test", "tests", "site-packages", "idlelib", "lib2to3", "ensurepip"}
_SKIPPED |= {"turtledemo", "pydoc_data"}
"""Folders of the standard library whose docstrings are not read."""


LM_CARD = """# pydocs-lm

The reference of `tokenenv/PyDocs-v0`: a Llama of {parameters:,} parameters (4 layers, hidden 128, 4 heads of 32,
1 key-value head) over 1,024 byte-level BPE tokens, which continues English prose of the Python documentation.

- Data: passages of whole sentences, 25 to 44 words, of the standard library of Python {python}: {passages} from the
  train topics of `pydoc_data.topics` (three times an epoch) and {docstrings} from docstrings. None of it is stored here.
- The prompts are not stored here but read from the Python that runs: 610 of the train topics and 289 of the test topics in
  Python 3.11.7; 616 and 306 in 3.12.1, of which 604 and 287 are the same; 622 and 309 in 3.13.0, 575 and 274 the same. Compare
  runs of one version: `tokenenv envs` prints a digest of the prompts, and a checkpoint is not resumed on others.
- Held-out loss on passages of the test topics, from the saved bfloat16 weights: {loss:.4f} nats per token.
- On 1,024 continuations of held-out prompts: reading ease {gold_mean:.1f}, standard deviation {gold_sd:.1f};
  {finished_share:.3f} finished within 80 tokens; {mean_length:.1f} tokens on average.
- Size: {size_kb} kB.
- Made by `python scripts/make_pydocs.py`: one thread, seeds fixed.
"""
REWARD_CARD = """# pydocs-reward

The reward model of `tokenenv/PyDocs-v0`: a Llama token classifier with one label and {parameters:,} parameters
(3 layers, hidden 96). The token scores of a response sum to its Flesch reading ease so far, less {mean:.1f} and divided by
{scale:.1f} (mean and standard deviation under the reference). Until twelve words are there the sum moves from 0 to that.

- Data: {texts} texts: passages of the train topics and of docstrings, samples of pydocs-lm, plain or tilted towards hard or
  easy words, and random words. Targets by `envs/language/readability.py`.
- From the saved bfloat16 weights, on continuations of held-out prompts: correlation of score and reading ease
  {correlation:.3f} (n=1,024, mean reading ease {gold_mean:.1f}); on samples tilted to easy words {easy_correlation:.3f}
  (n=256, mean reading ease {easy_gold:.1f}, mean score {easy_score:.2f}).
- Limits: samples below twelve words (about one in forty) are worth 0 and the score hardly notices, which costs most of the
  correlation (0.72 to 0.84 between samples of 320 to 1,024 texts; 0.88 to 0.90 without them). Rows of full stops score high.
- The best of 16 by score has reading ease {best_of_16:.1f}, any of the 16 {any_of_16:.1f} on average (64 prompts).
- Size: {size_kb} kB.
- Made by `python scripts/make_pydocs.py`, with `tokenenv fit`: this model in {minutes:.1f} minutes of CPU time on one thread,
  seeds fixed.
"""


def docstring_prose() -> list[str]:
    """Return the paragraphs of prose in the docstrings of the standard library, which the language
    model also learns from, each once."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, None] = {}
    for file in sorted(root.rglob("*.py")):
        if not _SKIPPED & set(file.relative_to(root).parts):
            texts = (text for docstring in _docstrings(file) for text in paragraphs(docstring))
            found |= dict.fromkeys(texts)
    return list(found)


def _docstrings(file: Path) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, kinds):
            yield ast.get_docstring(node) or ""


def make_tokenizer(texts: Sequence[str]) -> Any:
    """Train a byte-level BPE tokenizer, which turns any text into ids and back exactly."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|end|>",
        clean_up_tokenization_spaces=False,
    )


def encode(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the token ids of every passage of `texts` that fits an episode, the stop token
    included."""
    runs = [passage for text in texts for passage in passages(text)]
    encoded = [[*ids, END] for ids in tokenizer(runs)["input_ids"]]
    return [ids for ids in encoded if len(ids) <= MAX_TOKENS]


def config(shape: dict[str, Any], layers: int, **more: Any) -> Any:
    """Return the Llama configuration of a model over the byte-level vocabulary."""
    from transformers import LlamaConfig

    special = {"bos_token_id": None, "eos_token_id": END, "pad_token_id": END}
    return LlamaConfig(**shape, **special, **more, vocab_size=VOCABULARY, num_hidden_layers=layers)


def train_lm(texts: list[list[int]], held_out: list[list[int]]) -> Any:
    """Train the reference, a Llama of about 0.8M parameters. The epoch with the least held-out loss
    is kept."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(config(training.SHAPE, 4))
    dropout = training.add_dropout(model, 0.15)
    training.fit(
        model,
        lambda group: training.lm_loss(model, [texts[i] for i in group]),
        [len(text) for text in texts],
        epochs=10,
        lr=3e-3,
        batch_size=32,
        measure=lambda: training.mean_lm_loss(model, held_out),
        label="language model",
    )
    for handle in dropout:
        handle.remove()
    return model


def easy_bias(tokenizer: Any, strength: float) -> Tensor:
    """Return logits (V,) to add when sampling. With `strength` above 0 they make short words and
    ends of sentences likelier, with `strength` below 0 less likely."""
    tokens = tokenizer.convert_ids_to_tokens(range(VOCABULARY))
    texts = [tokenizer.decode([i]) for i in range(VOCABULARY)]
    syllables = torch.tensor([float(sum(map(count_syllables, words(text)))) for text in texts])
    new_word = torch.tensor([float(token.startswith("Ġ") and len(token) > 1) for token in tokens])
    end = torch.tensor([float(text.strip() in (".", ").")) for text in texts])
    return strength * (end + 0.5 * new_word - 0.5 * syllables)


def make_texts(lm: Any, real: list[list[int]], tokenizer: Any, rng: random.Random) -> list[Text]:
    """Return what the reward model learns from: real passages, samples of the reference from hard
    to very easy ones, shuffled samples, and random words."""
    prompts = make_prompts("train", tokenizer)
    sampled: list[Text] = []
    for tilt in TILTS:
        sampled += draw(lm, rng.choices(prompts, k=1500), tokenizer, *tilt)
    shuffled = [
        (ids[:start] + rng.sample(ids[start:], len(ids) - start), start)
        for ids, start in sampled[::6]
    ]
    vocabulary = sorted({word.strip(".,") for text in prose("train") for word in text.split()})
    openings = (tokenizer.decode(rng.choice(prompts)) for _ in range(5000))
    soups = tokenizer([word_soup(rng, opening, vocabulary) for opening in openings])["input_ids"]
    whole = [*real, *([*ids[: MAX_TOKENS - 1], END] for ids in soups)]
    begun = [(ids, cut(ids, tokenizer)) for ids in whole]
    return [(ids, start) for ids, start in sampled + shuffled + begun if len(ids) > start]


def word_soup(rng: random.Random, opening: str, vocabulary: list[str]) -> str:
    """Return random words after an opening, in sentences of random length. Each text prefers short
    words, or long ones, to a degree of its own."""
    preference, stop_rate = rng.uniform(-1.5, 2.5), rng.uniform(0.0, 0.3)
    soup = [opening]
    for _ in range(rng.randint(5, 45)):
        drawn = {
            word: rng.gauss(0, 1.5) - preference * sum(map(count_syllables, words(word)))
            for word in rng.sample(vocabulary, 3)
        }
        word = max(drawn, key=drawn.__getitem__)
        word = word.capitalize() if soup[-1].endswith(".") else word
        soup.append(word + "." * (rng.random() < stop_rate))
    return " ".join(soup) + "." * rng.randint(0, 1)


def ease_so_far(text: str, ended: bool, mean: float) -> float:
    """Return the reading ease of a prefix. While it has too few words to tell, the value moves from
    the mean towards the reading ease, word by word."""
    count = len(words(text))
    if ended or count >= MIN_WORDS:
        return reading_ease(text)
    return mean + (reading_ease(text, min_words=1) - mean) * count / MIN_WORDS


def reward_row(text: Text, tokenizer: Any, mean: float, scale: float) -> dict[str, Any]:
    """Return what `tokenenv fit` learns from a text: what the scores of a response should sum to
    after each token, the standardised reading ease so far."""
    ids, start = text
    beginnings = [ids[start : i + 1] for i in range(start, len(ids))]
    *prefixes, whole = tokenizer.batch_decode(beginnings, skip_special_tokens=True)
    ease = [ease_so_far(prefix, False, mean) for prefix in prefixes]
    ease.append(ease_so_far(whole, True, mean))
    values = [(value - mean) / scale for value in ease]
    return {"prompt_ids": ids[:start], "response_ids": ids[start:], "values": values}


def running_sums(model: Any, texts: Sequence[Text]) -> Tensor:
    """Return the sum of the token scores from where the response begins up to each place, (B, L)."""
    tokens = training.pad([ids for ids, _ in texts], END)
    scores = model(input_ids=tokens, use_cache=False).logits[..., 0]
    start = torch.tensor([start for _, start in texts])[:, None]
    return (scores * (torch.arange(scores.shape[1]) >= start)).cumsum(1)


@torch.no_grad()
def text_scores(model: Any, texts: Sequence[Text]) -> np.ndarray:
    """Return the sum of the token scores of each response, (B,)."""
    sums = [float(running_sums(model, [text])[0, -1]) for text in texts]
    return np.array(sums)


def draw(
    lm: Any,
    prompts: list[list[int]],
    tokenizer: Any,
    temperature: float = 1.0,
    strength: float = 0.0,
) -> list[Text]:
    """Draw one sample of the reference after each prompt, tilted towards easy words by
    `strength`."""
    tilt = {"temperature": temperature, "bias": easy_bias(tokenizer, strength)}
    responses = training.sample(lm, prompts, MAX_NEW_TOKENS, END, **tilt)
    return [(p + r, len(p)) for p, r in zip(prompts, responses, strict=True)]


def golds(texts: Sequence[Text], tokenizer: Any) -> np.ndarray:
    """Return the reading ease of each response, (B,)."""
    responses = (tokenizer.decode(ids[start:], skip_special_tokens=True) for ids, start in texts)
    return np.array([reading_ease(response) for response in responses])


def measure(lm: Any, reward_model: Any, tokenizer: Any) -> dict[str, float]:
    """Measure the saved models on held-out prompts."""
    prompts = make_prompts("test", tokenizer)
    plain = draw(lm, (prompts * 4)[:1024], tokenizer)
    easy = draw(lm, prompts[:256], tokenizer, strength=1.0)
    groups = draw(lm, [prompt for prompt in prompts[:64] for _ in range(16)], tokenizer)
    gold, scores = golds(plain, tokenizer), text_scores(reward_model, plain)
    easy_gold, easy_scores = golds(easy, tokenizer), text_scores(reward_model, easy)
    of_16 = golds(groups, tokenizer).reshape(64, 16)
    best = text_scores(reward_model, groups).reshape(64, 16).argmax(1)
    for ids, start in [*plain[:4], *easy[:2]]:
        print(f"[dim]{tokenizer.decode(ids[:start])} [/dim]|{tokenizer.decode(ids[start:])}")
    return {
        "gold_mean": float(gold.mean()),
        "gold_sd": float(gold.std()),
        "finished_share": float(np.mean([ids[-1] == END for ids, _ in plain])),
        "mean_length": float(np.mean([len(ids) - start for ids, start in plain])),
        "correlation": float(np.corrcoef(gold, scores)[0, 1]),
        "score_sd": float(scores.std()),
        "easy_gold": float(easy_gold.mean()),
        "easy_correlation": float(np.corrcoef(easy_gold, easy_scores)[0, 1]),
        "easy_score": float(easy_scores.mean()),
        "any_of_16": float(of_16.mean()),
        "best_of_16": float(of_16[np.arange(64), best].mean()),
    }


def make_lm() -> None:
    """Train and save the tokenizer and the language model."""
    training.set_up()
    train, docstrings = prose("train"), docstring_prose()
    tokenizer = make_tokenizer([*train, *docstrings])
    real, held_out = encode(train, tokenizer), encode(prose("test"), tokenizer)
    lm = train_lm(real * 3 + encode(docstrings, tokenizer), held_out)
    print(f"held-out loss before rounding {training.mean_lm_loss(lm, held_out):.4f}")
    training.save(lm, tokenizer, ASSETS / "pydocs-lm")


def make_reward_model() -> dict[str, float]:
    """Train and save the reward model, which learns from samples of the saved language model too.
    Return the mean and scale of the reading ease, and the number of texts."""
    training.set_up()
    lm = training.load(ASSETS / "pydocs-lm")
    tokenizer = training.load_tokenizer(ASSETS / "pydocs-lm")
    reference = golds(draw(lm, make_prompts("train", tokenizer), tokenizer), tokenizer)
    mean, scale = float(reference.mean()), float(reference.std())
    real = encode([*prose("train"), *docstring_prose()], tokenizer)
    texts = make_texts(lm, real, tokenizer, random.Random(1))
    rows = [reward_row(text, tokenizer, mean, scale) for text in texts]
    training.save_reward_model(rows, tokenizer, ASSETS / "pydocs-reward", epochs=8)
    return {"mean": mean, "scale": scale, "texts": len(texts)}


def write_cards(minutes: float, **numbers: float) -> None:
    """Measure what was saved, and write the model cards; the reward model took so many minutes."""
    training.set_up()
    lm, reward_model = training.load(ASSETS / "pydocs-lm"), training.load(ASSETS / "pydocs-reward")
    tokenizer = training.load_tokenizer(ASSETS / "pydocs-lm")
    real, held_out = encode(prose("train"), tokenizer), encode(prose("test"), tokenizer)
    numbers["loss"] = training.mean_lm_loss(lm, held_out)
    numbers |= {"passages": len(real), "minutes": minutes}
    numbers |= measure(lm, reward_model, tokenizer)
    print(numbers)
    docstrings = len(encode(docstring_prose(), tokenizer))
    more = {"python": platform.python_version(), "docstrings": docstrings}
    training.write_card(ASSETS / "pydocs-lm", LM_CARD, lm, **numbers, **more)
    training.write_card(ASSETS / "pydocs-reward", REWARD_CARD, reward_model, **numbers, **more)


def main() -> None:
    """Make both models and their cards."""
    make_lm()
    begin = time.process_time()
    numbers = make_reward_model()
    write_cards((time.process_time() - begin) / 60, **numbers)


if __name__ == "__main__":
    main()
