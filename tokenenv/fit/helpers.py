"""The tokenizer of the data, and the models that labels are made with."""

from collections.abc import Sequence
from typing import Any

from tokenenv.fit.config import FitConfig
from tokenenv.fit.data import saved_tokenizer
from tokenenv.fit.examples import Text
from tokenenv.fit.labels import LabelContext
from tokenenv.models.chats import Chats, end_of_turn
from tokenenv.models.loading import check_same_tokens
from tokenenv.models.own_models import (
    Lengths,
    Policy,
    load_language_model,
    load_scorer,
    read_tokenizer,
)
from tokenenv.types import Scorer


def tokenizer_of(config: FitConfig) -> Any:
    """Return the tokenizer of the data: the given one, the one that was sampled with the data, or
    the one that was saved with the model; None where nobody has one.

    Raises:
        ModelError: none can be loaded, or the data's and the model's differ.
    """
    if config.tokenizer is not None:
        return read_tokenizer(config.tokenizer, "tokenizer", None, False)
    of_model = None if config.is_new else read_tokenizer(config.model, "model", None, False)
    folder = saved_tokenizer(config.data)
    if folder is None:
        return of_model
    of_data = read_tokenizer(folder, "data", None, False)
    if of_model is not None:
        check_same_tokens(of_data, of_model, "model")
    return of_data


def label_context(
    config: FitConfig, tokenizer: Any, model: Any, texts: Sequence[Text], *, progress: bool
) -> LabelContext:
    """Return what labels are made with. The reference is the model that training begins from where
    none is given.

    Raises:
        ModelError: the reference or the teacher cannot be loaded, or has other tokens.
        InvalidArgument: it has too few positions for the texts.
    """
    policy = _policy(config, tokenizer, model, texts)
    reference, teacher = config.reference, config.teacher
    if reference is None and not config.is_new:
        reference = config.model
    if not isinstance(teacher, Scorer):
        teacher = load_scorer(teacher, None, policy, config.max_batch_tokens)
    return LabelContext(
        tokenizer=tokenizer,
        reference=load_language_model(reference, "reference", policy, []),
        teacher=teacher,
        seed=config.seed,
        stop_token_ids=policy.stop_token_ids,
        max_batch_tokens=config.max_batch_tokens,
        progress=progress,
    )


def _policy(config: FitConfig, tokenizer: Any, model: Any, texts: Sequence[Text]) -> Policy:
    """What further models have to fit: the tokens and the lengths of the texts."""
    chats = Chats(tokenizer) if config.chat_template else None
    prompt = max(len(text.prompt) for text in texts)
    longest = max(map(len, texts))
    stops = [getattr(tokenizer, "eos_token_id", None)]
    stops += [end_of_turn(tokenizer)] if chats else []
    return Policy(
        model=model,
        tokenizer=tokenizer,
        chats=chats,
        stop_token_ids=tuple(token for token in stops if token is not None),
        lengths=Lengths(prompt, prompt, longest - prompt),
        loading={
            "device": config.device,
            "dtype": None,
            "attn_implementation": None,
            "trust_remote_code": False,
        },
        revisions={},
    )
