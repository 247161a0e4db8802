"""Models that the user brings to an environment: load them, and check that they fit together."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokenenv.errors import InvalidArgument, ModelError, check_choice
from tokenenv.models.aligned_scorer import make_aligned_scorer
from tokenenv.models.chats import Chats, same_frames
from tokenenv.models.heads import make_scorer
from tokenenv.models.hub import hub_options
from tokenenv.models.loading import (
    check_same_tokens,
    load_causal_lm,
    load_classifier,
    load_tokenizer,
    max_positions,
    token_difference,
)
from tokenenv.models.probing import looks_ahead
from tokenenv.models.sharing import share_equal
from tokenenv.models.trunks import vocab_size_of
from tokenenv.models.vllm_models import VLLMReference, VLLMRewardModel
from tokenenv.types import Scorer, Task, TextScorer

logger = logging.getLogger("tokenenv")


@dataclass(frozen=True, slots=True)
class Lengths:
    """How many tokens the texts have, by which every model is measured."""

    longest_prompt: int
    """Tokens of the longest prompt."""
    max_prompt_tokens: int
    """P: the longest prompt's tokens, or more where the user gave a larger number."""
    max_new_tokens: int
    """T."""

    @property
    def total(self) -> int:
        """L = P + T."""
        return self.max_prompt_tokens + self.max_new_tokens

    def require_room(self, model: Any, role: str) -> None:
        """Raises `InvalidArgument` where a model has too few positions; says which numbers fit."""
        positions = max_positions(model.config.get_text_config())
        if positions is not None and self.total > positions:
            raise InvalidArgument(
                f"max_prompt_tokens + max_new_tokens = {self.max_prompt_tokens} + "
                f"{self.max_new_tokens} = {self.total} tokens, but the {role} has {positions} "
                f"positions; give {self._what_fits(positions)}."
            )

    def _what_fits(self, positions: int) -> str:
        """The smallest changes of arguments with which texts fit, for the error message."""
        left_for_prompts = positions - self.max_new_tokens
        left_for_responses = positions - self.longest_prompt
        if left_for_responses >= self.max_new_tokens:
            return (
                f"max_prompt_tokens={left_for_prompts}, or leave it out: the longest prompt has "
                f"{self.longest_prompt}"
            )
        ways = []
        if left_for_responses >= 1:
            given = self.max_prompt_tokens > self.longest_prompt
            shorter = f"max_prompt_tokens={self.longest_prompt} and " if given else ""
            ways.append(f"{shorter}max_new_tokens={left_for_responses} or less")
        if left_for_prompts >= 1:
            ways.append(f"max_prompt_tokens={left_for_prompts} with long_prompts='truncate'")
        either = ", or ".join(ways)
        return either or f"two numbers that add up to {positions}, with long_prompts='truncate'"


@dataclass(frozen=True, slots=True)
class Policy:
    """The policy's model and what it writes: all other models have to fit it."""

    model: Any
    tokenizer: Any
    """None where tokens have no text."""
    chats: Chats | None
    stop_token_ids: tuple[int, ...]
    lengths: Lengths
    loading: dict[str, Any]
    """The keywords with which further models are loaded (device, dtype, ...)."""
    revisions: Mapping[str, str]
    """The revision of each argument that has one, by its name."""

    def read_tokenizer(self, source: Any, argument: str) -> Any:
        """The tokenizer that an argument names, loaded as the policy's was (see
        `read_tokenizer`)."""
        revision, trusted = self.revisions.get(argument), self.loading["trust_remote_code"]
        return read_tokenizer(source, argument, revision, trusted)


Loaded = list[tuple[Any, str | None, Any]]
"""Language models that are there already: the source and the revision of each, and the model."""


def frozen(model: Any, role: str, lengths: Lengths) -> Any:
    """The model in eval mode and without gradients, if it has positions for the texts."""
    lengths.require_room(model, role)
    return model.eval().requires_grad_(False)


def require_context(task: Task, given: int | None) -> int:
    """L, the most tokens of a text into which others write: the number that was given, or by
    default P + 2 T, at most what every model has positions for.

    Raises:
        InvalidArgument: it leaves no room behind the prompts, or a model has fewer positions.
    """
    scorer = task.scorer.model if isinstance(task.scorer, Scorer) else None
    models = (task.reference, task.model, task.implicit_model, scorer)
    configs = [config for model in models if (config := getattr(model, "config", None))]
    known = [max_positions(config.get_text_config()) for config in configs]
    positions = min((number for number in known if number is not None), default=None)
    if given is None:
        wanted = task.max_prompt_tokens + 2 * task.max_new_tokens
        return wanted if positions is None else min(wanted, positions)
    if not isinstance(given, int | np.integer) or given <= task.max_prompt_tokens:
        raise InvalidArgument(
            f"max_context_tokens={given!r} must be a whole number above max_prompt_tokens="
            f"{task.max_prompt_tokens}."
        )
    if positions is not None and given > positions:
        raise InvalidArgument(
            f"max_context_tokens={given}, but a model has {positions} positions; give "
            f"{positions} or less."
        )
    return int(given)


def load_language_model(source: Any, argument: str, policy: Policy, known: Loaded) -> Any:
    """A further language model with the policy's tokens; None where none was given.

    The source is a hub id, a directory, a model, a `TokenModel` or the URL of a vLLM server. One
    that is among the `known`, such as the policy's own, is loaded once, so that it also runs once a
    step; another one shares the weights that are the same in both (`share_equal`).
    """
    if source is None:
        return None
    if _on_server(source):
        return VLLMReference(source)
    revision = policy.revisions.get(argument)
    for other, others_revision, model in known:
        if same_source(source, other) and revision == others_revision:
            return model
    role = argument.replace("_", " ")
    _check_tokens(policy, source, argument, role)
    model = source
    if not hasattr(source, "slots"):
        options = policy.loading | {"argument": argument, "revision": revision}
        model = frozen(load_causal_lm(source, **options), role, policy.lengths)
        if model is not source:  # an object is its owner's, and stays as it is
            for _, _, other in known:
                share_equal(model, other)
    known.append((source, revision, model))
    return model


def load_scorer(
    source: Any, tokenizer_source: Any, policy: Policy, max_batch_tokens: int
) -> Scorer | TextScorer | None:
    """The reward model as a scorer; None where none was given.

    The source is a hub id, a directory, a model, a `TextScorer` or the URL of a vLLM server. The
    tokenizer is by default the one that is saved with the model. Weights of a model that is loaded
    which are the policy's, such as those of a head on its trunk, are in memory once
    (`share_equal`).
    """
    if source is None:
        return None
    if _on_server(source):
        return VLLMRewardModel(source)
    if hasattr(source, "token_scores"):
        return _checked(source)
    own = policy.read_tokenizer(tokenizer_source, "reward_tokenizer")
    if own is None:
        own = _saved_tokenizer(source, "reward_model", "reward model", policy)
    revision = policy.revisions.get("reward_model")
    classifier = load_classifier(source, revision=revision, **policy.loading)
    if classifier is not source:
        share_equal(classifier, policy.model)
    if own is None:
        _check_size(classifier, policy)
    if _reads_policys_tokens(own, policy) and not looks_ahead(classifier):
        return make_scorer(frozen(classifier, "reward model", policy.lengths))
    if policy.tokenizer is None:
        raise ModelError(
            f"the reward model ({type(classifier).__name__}) looks ahead, so it has to be given "
            f"finished texts; give a tokenizer= to decode them"
        )
    return make_aligned_scorer(
        classifier.eval().requires_grad_(False),
        policy.tokenizer if own is None else own,
        policy.tokenizer,
        chats=policy.chats,
        stop_token_ids=policy.stop_token_ids,
        max_batch_tokens=max_batch_tokens,
    )


def read_tokenizer(
    source: Any, argument: str, revision: str | None, trust_remote_code: bool
) -> Any:
    """A tokenizer object as it is, or the tokenizer at a hub id or directory; None for anything
    else, such as a model object, which brings none. `argument` names the source in errors."""
    if not isinstance(source, (str, Path)):
        return source if hasattr(source, "get_vocab") else None
    tokenizer = load_tokenizer(source, trust_remote_code, argument=argument, revision=revision)
    # Without tokenizer files, transformers makes up one of special tokens alone for some families.
    if len(tokenizer.get_vocab()) <= len(set(tokenizer.all_special_ids)):
        raise ModelError(
            f"{str(source)!r} brings no tokenizer; give the policy's as tokenizer=, the reward "
            f"model's as reward_tokenizer="
        )
    return tokenizer


def revisions_of(
    revision: str | Mapping[str, str] | None, sources: Mapping[str, Any]
) -> dict[str, str]:
    """The revision of each argument that has one, by its name.

    Args:
        revision: of the model, and of what else names the same hub id; or a revision for each
            argument by its name.
        sources: what was given for each argument that may be a hub id, the model's first.

    Raises:
        InvalidArgument: the revision is of another form, or is of an argument that names no hub id.
    """
    if revision is None:
        return {}
    if isinstance(revision, str):
        same = [name for name, given in sources.items() if same_source(given, sources["model"])]
        revision = dict.fromkeys(same, revision)
    if not isinstance(revision, Mapping):
        raise InvalidArgument(
            f"revision={revision!r:.80} must be a text, or a mapping from arguments to texts."
        )
    for argument, one in revision.items():
        check_choice("revision", argument, sources)
        if not isinstance(one, str):
            raise InvalidArgument(f"revision={{{argument!r}: {one!r:.80}}} must hold a text.")
        source = sources[argument]
        if not isinstance(source, str) or _on_server(source):
            raise InvalidArgument(
                f"revision={one!r} is of a hub id, and {argument}= names none; leave it out."
            )
    return dict(revision)


def check_sources(sources: Mapping[str, Any], revisions: Mapping[str, str]) -> None:
    """Raises `ModelError` where an argument names a directory, a hub id or a revision that cannot
    be found. Nothing is loaded."""
    for argument, source in sources.items():
        if isinstance(source, (str, Path)) and not _on_server(source):
            hub_options(str(source), argument, revisions.get(argument))


def same_source(one: Any, other: Any) -> bool:
    """Whether two arguments name the same hub id or directory, or are the same object."""
    paths = isinstance(one, (str, Path)) and isinstance(other, (str, Path))
    return str(one) == str(other) if paths else one is other


def token_ids(
    argument: str, given: int | Sequence[int], model: Any, least: int = 0
) -> tuple[int, ...]:
    """The given ids; raises `InvalidArgument` unless there are `least` and the model has them."""
    ids = (given,) if isinstance(given, int) else tuple(given)
    last = vocab_size_of(model) - 1
    known = all(isinstance(token, int | np.integer) and 0 <= token <= last for token in ids)
    if len(ids) < least or not known:
        raise InvalidArgument(
            f"{argument}={ids}; allowed: {least} or more of the model's token ids, 0 to {last}."
        )
    return ids


def _on_server(source: Any) -> bool:
    return isinstance(source, str) and source.startswith(("http://", "https://"))


def _checked(scorer: Any) -> TextScorer:
    """Raises `ModelError` where a scorer of the user's own does not say what it scores."""
    if missing := [name for name in ("per_token", "looks_ahead") if not hasattr(scorer, name)]:
        raise ModelError(
            f"reward_model={type(scorer).__name__} has no {' and no '.join(missing)}; a "
            f"`tokenenv.types.TextScorer` says True or False there"
        )
    return scorer


def _check_size(classifier: Any, policy: Policy) -> None:
    """Raises `ModelError` where a reward model without a tokenizer cannot read the policy's ids.

    Padded embeddings and config.vocab_size may differ in either model: one match is enough.
    """
    theirs, ours = _sizes(classifier), _sizes(policy.model)
    if not set(theirs) & set(ours):
        missing = "" if policy.tokenizer is not None else "tokenizer= and "
        raise ModelError(
            f"the reward model ({type(classifier).__name__}) has {theirs[1]} token ids, the policy "
            f"{ours[1]}, and it brings no tokenizer that says what they are; give "
            f"{missing}reward_tokenizer="
        )


def _sizes(model: Any) -> tuple[int, int]:
    """The rows of a model's input embeddings, and how many token ids it names."""
    named = vocab_size_of(model)
    embeddings = None if hasattr(model, "slots") else model.get_input_embeddings()
    return (named if embeddings is None else embeddings.num_embeddings, named)


def _reads_policys_tokens(own: Any, policy: Policy) -> bool:
    """Whether a reward model with the tokenizer `own` reads the policy's tokens as they stand.

    If not, it is given decoded texts. Under a chat template it must write conversations the same
    way too; where the templates differ, a warning says which one it reads.
    """
    tokenizer, chats = policy.tokenizer, policy.chats
    same_tokens = own is None or tokenizer is None or token_difference(tokenizer, own) is None
    if chats is None or own is None:
        return same_tokens
    if not same_frames(chats, own):
        logger.warning(
            "the reward model's chat template is not the policy's: it reads finished texts, by its "
            "own template; give the policy's tokenizer as reward_tokenizer= if it should read the "
            "policy's"
        )
        return False
    if not same_tokens and not getattr(own, "chat_template", None):
        logger.warning(
            "the reward model's tokenizer has no chat template: it reads the policy's, roles as "
            "plain words"
        )
    return same_tokens


def _saved_tokenizer(source: Any, argument: str, role: str, policy: Policy) -> Any:
    """The tokenizer saved with a model; None, with a warning, where there is none."""
    try:
        return policy.read_tokenizer(source, argument)
    except ModelError as error:
        logger.warning("the %s is taken to read the model's token ids: %s", role, error)
        return None


def _check_tokens(policy: Policy, source: Any, argument: str, role: str) -> None:
    """Raises `ModelError` if another model's own tokenizer has other tokens than the policy's."""
    if policy.tokenizer is None:
        return
    own = _saved_tokenizer(source, argument, role, policy)
    if own is not None:
        check_same_tokens(policy.tokenizer, own, role)
