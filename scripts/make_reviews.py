"""Make the models of Reviews-v0, envs/assets/reviews-lm and reviews-reward.

python scripts/make_reviews.py
"""

import math
import random
import time
from typing import Any

import numpy as np
import torch
import training
from rich import print
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel

from tokenenv.envs.language.bundled import ASSETS
from tokenenv.envs.language.review_grammar import (
    CLAUSE_ENDS,
    INTENSIFIERS,
    MAX_OPENING,
    NEGATORS,
    POLARITY,
    is_positive,
    openings,
    opinions,
    review,
    split_words,
    vocabulary,
)

PAD, EOS = 0, 1
MAX_NEW_TOKENS = 40
MAX_WORDS = MAX_OPENING + MAX_NEW_TOKENS
LOADED = [*POLARITY, *NEGATORS, *INTENSIFIERS]
"""The words on which the sentiment of a text depends."""
LEXICON = [*vocabulary(), *LOADED]
"""All words, those of `LOADED` twice, from which texts are changed at random."""
BOUND = 4.0
"""The score of a text is trained towards values between -BOUND and BOUND."""
LM_CARD = """# reviews-lm

The reference of `tokenenv/Reviews-v0`: a Llama of {parameters:,} parameters (4 layers, hidden 128, 4 heads of 32,
1 key-value head) over words, which continues short reviews.

- Data: 40,000 reviews drawn from the grammar in `envs/language/review_grammar.py`, each seen once. No outside text.
- Held-out loss, from the saved bfloat16 weights: {loss:.4f} nats per token.
- On 1,024 continuations of held-out prompts: {positive_share:.3f} positive by the grammar's rule; {finished_share:.3f}
  finished within 40 tokens; {mean_length:.1f} tokens on average.
- Size: {size_kb} kB.
- Made by `python scripts/make_reviews.py`: one thread, seeds fixed.
"""
REWARD_CARD = """# reviews-reward

The reward model of `tokenenv/Reviews-v0`: a Llama token classifier with one label and {parameters:,} parameters
(3 layers, hidden 96). After every token the scores so far sum to 4 tanh(s / 2), where s is the sum of the opinions so
far by the grammar's rule. So a token is paid for what it changes, the target is bounded, length by itself earns nothing,
and the sum over a response is right whatever the prompt. A balanced review scores 0 and counts as not positive.

- Data: 40,000 texts from the grammar (half of them changed at random or soups of opinion words) and 12,000 samples of
  reviews-lm at temperatures 1.0 to 1.6, seen three times.
- From the saved bfloat16 weights, on 1,024 continuations of held-out prompts by reviews-lm: AUC {auc:.4f}, accuracy
  {accuracy:.4f} at the threshold 0.9; mean score {positive_score:.2f} of positive and {negative_score:.2f} of negative reviews.
- Limits: a sentence of praise repeated seven times scores 7, above the bound it was trained towards.
- Size: {size_kb} kB.
- Made by `python scripts/make_reviews.py`, with `tokenenv fit`: this model in {minutes:.1f} minutes of CPU time on one thread,
  seeds fixed.
"""


def make_tokenizer() -> Any:
    """Make the tokenizer: a token for each word and each mark. Decoding puts spaces before words
    only."""
    from transformers import PreTrainedTokenizerFast

    marks = [mark for mark in CLAUSE_ENDS if not mark.isalpha()]
    words = ["▁" + word for word in vocabulary() if word not in marks]
    ids = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *marks, *words])}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    # A space before a mark is dropped: "good ." is read as "good."
    no_space = pre_tokenizers.Split(Regex("▁(?=[.,!]|$)"), "removed")
    words_and_marks = [pre_tokenizers.Metaspace(), no_space, pre_tokenizers.Punctuation()]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words_and_marks)
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def encode(words: list[str], tokenizer: Any) -> list[int]:
    """Return the token ids of a finished review, the stop token included."""
    return [*tokenizer.encode(" ".join(words)), EOS]


def corrupt(words: list[str], rng: random.Random) -> list[str]:
    """Return a text that the grammar does not write, by a random change of one that it does. So the
    reward model also learns what a policy may try."""
    kind = rng.randrange(6)
    if kind == 0:
        rate = rng.uniform(0.05, 0.5)
        return [rng.choice(LEXICON) if rng.random() < rate else word for word in words]
    if kind == 1:
        return rng.sample(words, len(words))
    if kind == 2:
        return [word for word in words if rng.random() < 0.8] or words
    start = rng.randrange(len(words))
    if kind == 3:
        part = words[start : start + rng.randint(1, 8)]
        return (words[:start] + part * rng.randint(2, 20))[:MAX_WORDS]
    # A few opinion words over and over.
    few = rng.choices(LOADED, k=rng.randint(1, 6))
    return (words[:start] + rng.choices(few, k=rng.randint(1, 40)))[:MAX_WORDS]


def make_texts(count: int, rng: random.Random) -> list[list[str]]:
    """Return texts for the reward model: reviews, reviews with one opinion throughout, and corrupted
    ones."""
    texts = []
    for _ in range(count):
        words = review(rng, rng.choice((None, None, 0.0, 0.3, 0.7, 1.0)))
        texts.append(corrupt(words, rng) if rng.random() < 0.5 else words)
    return texts


def running_score(words: list[str]) -> list[float]:
    """Return what the scores should sum to after each word: BOUND * tanh(s / 2), with s the sum of
    the opinions so far."""
    sums = (sum(weight for _, weight in opinions(words[: i + 1])) for i in range(len(words)))
    return [BOUND * math.tanh(total / 2) for total in sums]


def reward_row(words: list[str], tokenizer: Any) -> dict[str, Any]:
    """Return what `tokenenv fit` learns from a text: its tokens after the first one, and what the
    scores of these should sum to after each."""
    ids, running = encode(words, tokenizer), running_score(words)
    # The stop token adds nothing to the sum.
    values = [value - running[0] for value in [*running[1:], running[-1]]]
    return {"prompt_ids": ids[:1], "response_ids": ids[1:], "values": values}


@torch.no_grad()
def text_scores(model: Any, prompts: list[list[int]], responses: list[list[int]]) -> np.ndarray:
    """Return the sum of the token scores of each response, (B,)."""
    sums = []
    for prompt, response in zip(prompts, responses, strict=True):
        scores = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, :, 0]
        sums.append(float(scores[len(prompt) :].sum()))
    return np.array(sums)


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Return the probability that a positive text scores above a negative one."""
    ranks = scores.argsort().argsort() + 1.0
    count = positive.sum()
    above = ranks[positive].sum() - count * (count + 1) / 2
    return float(above / (count * (len(scores) - count)))


def train_lm(tokenizer: Any) -> tuple[Any, float]:
    """Train the reference, a Llama of about 0.7M parameters, on reviews. Return it and its held-out
    loss in nats per token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**training.SHAPE, num_hidden_layers=4, **ids(tokenizer))
    model = LlamaForCausalLM(config)
    rng = random.Random(1)
    texts = [encode(review(rng), tokenizer) for _ in range(40_000)]
    held_out = held_out_texts(tokenizer)
    training.fit(
        model,
        lambda group: training.lm_loss(model, [texts[i] for i in group]),
        [len(text) for text in texts],
        epochs=1,
        lr=3e-3,
        measure=lambda: training.mean_lm_loss(model, held_out),
        label="language model",
    )
    return model, training.mean_lm_loss(model, held_out)


def held_out_texts(tokenizer: Any) -> list[list[int]]:
    """Return the reviews that the language model is measured on."""
    rng = random.Random(4)
    return [encode(review(rng), tokenizer) for _ in range(1_000)]


def ids(tokenizer: Any) -> dict[str, Any]:
    """Return the config entries that depend on the tokenizer."""
    special = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
    return {"vocab_size": len(tokenizer), **special}


def measure(lm: Any, reward_model: Any, tokenizer: Any) -> dict[str, float]:
    """Measure the saved models on held-out prompts."""
    prompts = [tokenizer.encode(text) for text in openings("test")] * 2
    responses = training.sample(lm, prompts, MAX_NEW_TOKENS, EOS)
    texts = decode(prompts, responses, tokenizer)
    for text in texts[:5]:
        print(f"[dim]{text}")
    positive = np.array([is_positive(text) for text in texts])
    scores = text_scores(reward_model, prompts, responses)
    return {
        "positive_share": float(positive.mean()),
        "finished_share": float(np.mean([r[-1] == EOS for r in responses])),
        "mean_length": float(np.mean([len(r) for r in responses])),
        "auc": auc(scores, positive),
        "accuracy": float(((scores > 0.9) == positive).mean()),
        "positive_score": float(scores[positive].mean()),
        "negative_score": float(scores[~positive].mean()),
    }


def decode(prompts: list[list[int]], responses: list[list[int]], tokenizer: Any) -> list[str]:
    """Return the texts of prompts with their responses."""
    pairs = zip(prompts, responses, strict=True)
    return [tokenizer.decode(p + r, skip_special_tokens=True) for p, r in pairs]


def sampled_texts(lm: Any, tokenizer: Any) -> list[list[str]]:
    """Return texts, as words, that the reference itself writes, also at higher temperatures."""
    prompts = [tokenizer.encode(text) for text in openings("train")] * 2
    texts = []
    for temperature in (1.0, 1.3, 1.6):
        responses = training.sample(lm, prompts, MAX_NEW_TOKENS, EOS, temperature=temperature)
        texts += decode(prompts, responses, tokenizer)
    return [split_words(text) for text in texts]


def make_lm() -> None:
    """Train and save the tokenizer and the language model."""
    training.set_up()
    tokenizer = make_tokenizer()
    lm, loss = train_lm(tokenizer)
    print(f"held-out loss before rounding {loss:.4f}")
    training.save(lm, tokenizer, ASSETS / "reviews-lm")


def make_reward_model() -> None:
    """Train and save the reward model, which learns from samples of the saved language model
    too."""
    training.set_up()
    lm = training.load(ASSETS / "reviews-lm")
    tokenizer = training.load_tokenizer(ASSETS / "reviews-lm")
    texts = make_texts(40_000, random.Random(3)) + sampled_texts(lm, tokenizer)
    rows = [reward_row(words, tokenizer) for words in texts]
    training.save_reward_model(rows, tokenizer, ASSETS / "reviews-reward", epochs=3)


def write_cards(minutes: float) -> None:
    """Measure what was saved, and write the model cards; the reward model took so many minutes."""
    training.set_up()
    lm = training.load(ASSETS / "reviews-lm")
    reward_model = training.load(ASSETS / "reviews-reward")
    tokenizer = training.load_tokenizer(ASSETS / "reviews-lm")
    numbers = {"loss": training.mean_lm_loss(lm, held_out_texts(tokenizer)), "minutes": minutes}
    numbers |= measure(lm, reward_model, tokenizer)
    print(numbers)
    training.write_card(ASSETS / "reviews-lm", LM_CARD, lm, **numbers)
    training.write_card(ASSETS / "reviews-reward", REWARD_CARD, reward_model, **numbers)


def main() -> None:
    """Make both models and their cards."""
    make_lm()
    begin = time.process_time()
    make_reward_model()
    write_cards((time.process_time() - begin) / 60)


if __name__ == "__main__":
    main()
