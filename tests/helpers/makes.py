"""Small tokenizers of every make, trained on a few lines: `MAKES` are functions by name."""

from functools import cache

import transformers
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = ["the cat is good", "a walking dog, not walk ing", "café 今日 😀", "the the is is walking"]
SPECIAL = ["<pad>", "<s>", "</s>"]
BOTH = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
FIRST = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])


def wrapped(core, post=FIRST):
    core.post_processor = post
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names)


def trained(core, **options):
    alphabet = [chr(code) for code in range(33, 127)]
    options = {"vocab_size": 400, "initial_alphabet": alphabet, **options}
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(special_tokens=SPECIAL, show_progress=False, **options)
    )
    return core


def bytes_():
    """Make a tokenizer of GPT-2's and Llama 3's kind."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return wrapped(trained(core, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))


def legacy():
    """Make a tokenizer of Llama 2's kind, which puts a space before every text."""
    core = Tokenizer(models.BPE(unk_token="</s>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    return wrapped(trained(core, initial_alphabet=["▁", *(chr(code) for code in range(33, 127))]))


def metaspace():
    """Make a tokenizer of Mistral's kind, which puts a space before the first text."""
    core = Tokenizer(models.BPE(unk_token="</s>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    return wrapped(trained(core), BOTH)


def words():
    return wrapped(word_level(), BOTH)


def word_level():
    vocab = {word: index for index, word in enumerate([*SPECIAL, "the", "cat", "is", "good"])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return core


MAKES = {
    "bytes": cache(bytes_),
    "legacy": cache(legacy),
    "metaspace": cache(metaspace),
    "words": cache(words),
}
