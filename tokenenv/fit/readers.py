"""Readers: a model in training, and the rewards that it gives the tokens of texts.

Suffixes: B texts, R response tokens, S = R + 1 places (the end of the prompt, and each response
token), K places of several texts one after another, H hidden size.
"""

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenenv.errors import InvalidArgument
from tokenenv.fit.config import FitConfig
from tokenenv.fit.examples import Text
from tokenenv.fit.frozen import Advance, Kept
from tokenenv.fit.models import (
    check_fits,
    check_settings,
    head_of,
    is_language_model,
    load_start,
    make_classifier,
    make_language_model,
    scale_head,
)
from tokenenv.fit.objectives import Objective
from tokenenv.fit.reading import Reading, differences, place_logprobs, place_states, summed
from tokenenv.models.adapters import sharing, with_lora
from tokenenv.models.batching import micro_batches, upload
from tokenenv.models.loading import max_positions
from tokenenv.models.own_models import same_source
from tokenenv.models.prefix_scores import padded
from tokenenv.models.saving import save_model, whole_folder
from tokenenv.models.trunks import log_ratio, logprob_reader, trunk_of


class Reader:
    """A reward model in training: it reads texts, names what it trains, and writes itself.

    The model is in eval mode all the time, so that what is trained, measured and saved is one
    function: there is no dropout. Forwards are in float32, or in the dtype of a frozen trunk.

    Args:
        model: of transformers, with gradients required where it is trained.
        tokenizer: is saved with the model; None: none is.
        config: for `max_batch_tokens` and `max_length`.
    """

    def __init__(self, model: Any, tokenizer: Any, config: FitConfig) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_batch_tokens = config.max_batch_tokens
        self.max_length = config.max_length or max_positions(model.config.get_text_config())
        """The most tokens of a text, prompt included; None: no limit is known."""
        self._kept = Kept()

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.device

    def read(self, texts: Sequence[Text]) -> Reading:
        """Return the rewards of B texts, with the ambient grad mode.

        Raises:
            InvalidArgument: a text is longer than `max_length`.
        """
        groups = self._groups(texts)
        number_K = torch.cat([self._numbers([texts[i] for i in group]) for group in groups])
        order = np.concatenate(groups)
        counts = np.asarray([len(texts[i].response) + 1 for i in order])
        row = np.repeat(order, counts)
        column = np.concatenate([np.arange(count) for count in counts])
        where = upload(row, number_K.device), upload(column, number_K.device)
        number_BS = number_K.new_zeros(len(texts), int(counts.max())).index_put(where, number_K)
        own = padded([text.own_mask for text in texts], number_BS.shape[1] - 1)
        lengths = np.asarray([len(text.response) for text in texts])
        own_BR, length_B = (upload(one, number_K.device) for one in (own, lengths))
        return self._rewards(number_BS, own_BR, length_B)

    def remember(self, texts: Sequence[Text], advance: Advance | None = None) -> None:
        """Compute once what stays the same for these `Text` objects while the model trains, and
        keep it: the states of a frozen trunk, or the log-probs of a reference. What is remembered
        already is not computed again.

        Args:
            texts: any number.
            advance: is called with the number of texts of each forward, for a progress bar.
        """

    def trained(self) -> dict[str, Tensor]:
        """Return the parameters that learn, by name."""
        named = self.model.named_parameters()
        return {name: weight for name, weight in named if weight.requires_grad}

    @torch.no_grad()
    def load_trained(self, weights: dict[str, Tensor]) -> None:
        """Copy weights into the parameters that learn.

        Raises:
            InvalidArgument: the names or a shape are not those of `trained`.
        """
        mine = self.trained()
        if wrong := sorted(mine.keys() ^ weights.keys()):
            raise InvalidArgument(f"weights of another model: {wrong[0]!r} is only in one of them.")
        for name, weight in mine.items():
            if weight.shape != weights[name].shape:
                raise InvalidArgument(
                    f"weights of another model: {name!r} has the shape "
                    f"{tuple(weights[name].shape)}, not {tuple(weight.shape)}."
                )
            weight.copy_(weights[name])

    def save(
        self,
        folder: str | os.PathLike[str],
        divisor: float = 1.0,
        scale: float = 1.0,
        card: str | None = None,
    ) -> None:
        """Write a folder that transformers loads, with the tokenizer; it appears whole or not at
        all. One that an earlier save wrote is replaced.

        Args:
            folder: a new or empty folder, or one that an earlier save wrote.
            divisor: the saved model's rewards are those of `read`, divided by it...
            scale: ...and multiplied by it.
            card: the text of the folder's README.md.

        Raises:
            InvalidArgument: the folder holds other files, or a log-ratio is to be scaled.
            RunFolderError: the folder cannot be written.
        """
        with whole_folder(folder) as new:
            self.write(new, divisor, scale)
            if card is not None:
                (new / "README.md").write_text(card, encoding="utf-8")

    def write(self, folder: Path, divisor: float = 1.0, scale: float = 1.0) -> None:
        """Write the files of `save` into an existing folder. Adapters are merged."""
        save_model(self._scaled(scale / divisor), folder, merge=True)
        if hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(folder)

    def _groups(self, texts: Sequence[Text]) -> list[np.ndarray]:
        lengths = [len(text) for text in texts]
        longest = max(lengths, default=0)
        if self.max_length is not None and longest > self.max_length:
            raise InvalidArgument(
                f"a text has {longest} tokens; the model reads at most {self.max_length}."
            )
        return micro_batches(lengths, self.max_batch_tokens)

    def _numbers(self, texts: Sequence[Text]) -> Tensor:
        """Return one number for each place of a micro-batch of texts, (K,) float32."""
        raise NotImplementedError

    def _rewards(self, number_BS: Tensor, mask_BR: Tensor, length_B: Tensor) -> Reading:
        """Return the rewards that the numbers mean; `length_B` are the texts' response tokens."""
        return summed(number_BS, mask_BR)

    def _scaled(self, factor: float) -> Any:
        """Return a model whose rewards are `factor` times these."""
        raise NotImplementedError


class HeadReader(Reader):
    """A `Reader` of a classifier with one label, whose head gives the reward or the value at each
    place."""

    def __init__(
        self, model: Any, tokenizer: Any, config: FitConfig, *, gives_values: bool
    ) -> None:
        super().__init__(model, tokenizer, config)
        self._trunk, self._head = trunk_of(model), head_of(model)
        self._gives_values, self._frozen = gives_values, config.freeze

    def remember(self, texts: Sequence[Text], advance: Advance | None = None) -> None:
        """Keep the states of a frozen trunk. Without one there is nothing to keep."""
        if self._frozen:
            new = self._kept.missing(texts)
            groups = self._groups(new)
            self._kept.add(new, self._states, groups, "states of the frozen trunk", advance)

    def _states(self, texts: Sequence[Text]) -> Tensor:
        return place_states(self._trunk, texts)

    def _numbers(self, texts: Sequence[Text]) -> Tensor:
        known = self._kept.has(texts)
        states = self._kept.rows(texts) if known else self._states(texts)
        return self._head(states.to(self.device, torch.float32))[:, 0]

    def _rewards(self, number_BS: Tensor, mask_BR: Tensor, length_B: Tensor) -> Reading:
        if self._gives_values:
            return differences(number_BS, mask_BR, length_B)
        return summed(number_BS, mask_BR)

    def _scaled(self, factor: float) -> Any:
        trunk = list(self._trunk.parameters())
        model = sharing(self.model, trunk)
        scale_head(model, factor)
        if self._gives_values:
            # transformers would read the value of a text that ends in the pad id one token too
            # early, and a pad id is often a stop id as well.
            model.config.get_text_config().pad_token_id = None
        return model


class RatioReader(Reader):
    """A `Reader` of a causal language model, whose rewards are `coef` times the log-ratio to a
    frozen reference."""

    def __init__(
        self, model: Any, reference: Any, tokenizer: Any, config: FitConfig, vocab_size: int
    ) -> None:
        super().__init__(model, tokenizer, config)
        self._reference, self._coef = reference, config.coef
        self._logprob = logprob_reader(model, vocab_size)
        self._ref_logprob = logprob_reader(reference, vocab_size)

    def remember(self, texts: Sequence[Text], advance: Advance | None = None) -> None:
        """Keep the reference's log-probs."""
        new = self._kept.missing(texts)
        groups = self._groups(new)
        self._kept.add(new, self._of_reference, groups, "log-probs of the reference", advance)

    @torch.no_grad()
    def _of_reference(self, texts: Sequence[Text]) -> Tensor:
        return place_logprobs(self._reference, self._ref_logprob, texts)

    def _numbers(self, texts: Sequence[Text]) -> Tensor:
        known = self._kept.has(texts)
        ref = self._kept.rows(texts) if known else self._of_reference(texts)
        logprob = place_logprobs(self.model, self._logprob, texts)
        return self._coef * log_ratio(logprob, ref.to(logprob.device))

    def _scaled(self, factor: float) -> Any:
        if factor != 1:
            raise InvalidArgument(
                "the weights of a language model cannot scale a log-ratio; scale coef instead."
            )
        return self.model


def make_reader(
    config: FitConfig, objective: Objective, vocab_size: int, tokenizer: Any = None
) -> Reader:
    """Load or make the model that an objective trains, as the settings say.

    Args:
        config: see `FitConfig`.
        objective: its readout decides what kind of model it is.
        vocab_size: V; all token ids are less.
        tokenizer: is saved with the model, and gives a new one its special ids; None: tokens have
            no text.

    Raises:
        InvalidArgument: settings that exclude each other.
        ModelError: the model cannot be used.
    """
    check_settings(config)
    if objective.readout != "log-ratio":
        model = make_classifier(config, objective.readout, vocab_size, tokenizer)
        return HeadReader(model, tokenizer, config, gives_values=objective.readout == "value")
    if config.freeze:
        raise InvalidArgument(
            f"freeze=True leaves nothing to train for objective={config.objective!r}, which trains "
            "a language model and no head; lora_rank= trains few weights."
        )
    start = make_language_model(config, vocab_size, tokenizer)
    reference = _reference(config, start, vocab_size)
    if config.lora_rank:
        model = with_lora(start, config.lora_rank, config.seed)
    else:
        # The copy is trained, so that a reference that is the beginning itself stays as it is.
        model = copy.deepcopy(start).requires_grad_(True)
    return RatioReader(model, reference, tokenizer, config, vocab_size)


def _reference(config: FitConfig, start: Any, vocab_size: int) -> Any:
    """Return the frozen model that log-ratios are taken to."""
    if config.reference is None:
        if config.is_new:
            raise InvalidArgument(
                f"objective={config.objective!r} takes log-ratios to reference=, and model='new' "
                "begins with random weights; give model= or reference= a language model."
            )
        return start
    if same_source(config.reference, config.model):
        return start
    if hasattr(config.reference, "slots"):  # a `TokenModel`
        return config.reference
    reference = load_start(config.reference, "reference", config)
    if not is_language_model(reference):
        raise InvalidArgument("reference= is a classifier; allowed: causal language models.")
    check_fits(reference, "reference", config, vocab_size)
    return reference
