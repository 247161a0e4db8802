"""The vocabulary that environments and agents share.

Shape suffixes, here and everywhere: N envs (slots), P prompt tokens, T response tokens of the
policy's own, L context (P + T, and room for what the environment writes), V vocabulary, H hidden
size, B texts or episodes of a batch, K transitions (a mix of texts and places in them). "(K, H)
float32" after a field is its shape and dtype.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from tokenenv.turns import Respond

Slots = Sequence[int] | np.ndarray
"""Numbers (n,) of slots: the N places of an env or a cache, each of which holds one text after
another."""

PromptLimit = Literal["task", "option", "prompts"]
"""Where `max_prompt_tokens` came from: the task fixes it, the user gave the option of that name, or
it is the length of the longest prompt. Messages about longer prompts say which."""

TextIds = tuple[list[int], list[int]]
"""The token ids of a prompt and of its response."""

KL_ESTIMATORS = ("k1", "k2", "k3")
"""Names of the estimators of KL(pi || pi_ref) from the log-probs of sampled tokens."""

Head = Callable[[Tensor], Tensor]
"""Maps model states (K, H) to logits (K, V), or to scores (K,)."""

TrunkStates = Mapping[Any, Tensor]
"""The states (K, H) of several trunks, by the trunk itself. The key is the object, not its `id()`,
because a copy or a pickle takes objects with it."""


@dataclass(frozen=True, slots=True)
class TokenSpec:
    """What an agent may know of an env beyond its spaces. The env makes it from its task and its
    own options, and gives it as `envs.unwrapped.token_spec`."""

    tokenizer: Any
    """A transformers tokenizer; None where tokens have no text. From the task."""
    vocab_size: int
    """V: actions are 0..V-1. From the policy's model."""
    pad_token_id: int
    """The id that fills `tokens` to the right of `length`. It may equal a stop id, so only `length`
    says what belongs to the text."""
    stop_token_ids: tuple[int, ...]
    """The ids that end an episode when they are emitted. From the task."""
    max_prompt_tokens: int
    """P, the most tokens of a prompt. From the task."""
    max_new_tokens: int
    """T: an episode is cut after this many tokens of the policy's own. From the task."""
    score_truncated: bool = True
    """Whether a text that is cut gets its sequence score. True: it does, and learners do not
    bootstrap there. False: it does not, and learners bootstrap from its last state. From the env
    option of this name."""
    max_prompt_tokens_from: PromptLimit = "task"
    """Where P came from, for messages about longer prompts."""
    chats: Any = None
    """The `tokenenv.models.chats.Chats` that turns messages, and texts as messages, into prompts,
    where the env uses a chat template; else None. From the task."""
    max_context_tokens: int | None = None
    """L, the most tokens of a text, whoever wrote them; None: P + T. From the task."""
    responds: bool = False
    """Whether the environment writes into texts (`Task.respond`)."""
    turn_end_token_ids: tuple[int, ...] | None = None
    """The ids after which it is asked to; None: after every token. From the task."""

    @property
    def max_length(self) -> int:
        """L, the most tokens of a text."""
        return self.max_context_tokens or self.max_prompt_tokens + self.max_new_tokens

    @property
    def engine_stop_ids(self) -> list[int]:
        """The ids after which an engine hands a text back: those that end it, and those after which
        the environment is asked. Where that is every id, a text is begun with `max_tokens=1`
        instead."""
        return list(dict.fromkeys((*self.stop_token_ids, *(self.turn_end_token_ids or ()))))


@dataclass(frozen=True, slots=True)
class EpisodeScores:
    """What stepping would have paid for B finished texts, as `score_episodes` returns it.

    Arrays over tokens have a column for each of T tokens of the policy's own, and are zero to the
    right of each text's last one. Rewards have the unit of the sequence score.
    """

    token_rewards: np.ndarray
    """(B, T) float32: the reward of each token, where it belongs. A hindsight term is placed on the
    tokens that it credits."""
    step_rewards: np.ndarray
    """(B, T) float32: what `step` returns for each token. A hindsight term is paid as a whole at
    the last token. Each row has the sum that it has in `token_rewards`."""
    terms: dict[str, np.ndarray]
    """(B, T) float32 for each term by name, weighted, as `step` pays it. They add up to
    `step_rewards`."""
    token_reward_terms: dict[str, np.ndarray]
    """(B, T) float32 for each term by name, weighted, placed where it belongs. They add up to
    `token_rewards`."""
    score: np.ndarray | None
    """(B,) float32: the sequence score, unweighted; None where neither a scorer nor a single rule
    gives one."""
    gold: np.ndarray | None
    """(B,) float32: the task's true metric; None where none is known."""
    lengths: np.ndarray
    """(B,) int64: the response tokens of each text that are the policy's own."""
    ref_logprobs: np.ndarray
    """(B, T) float32: log pi_ref of each token, in nats."""
    potentials: np.ndarray | None
    """(B, T + 1) float32: the potential Phi of the state before each token, and of the last state;
    None where no term is potential-based."""
    watched: dict[str, np.ndarray] = field(default_factory=dict)
    """(B, T) float32 for each term of `watch=` by name: its number for each token, unweighted and
    never a part of the rewards."""
    reward_version: int | None = None
    """Updates that the reward model had had which a term trains, when it priced these texts; None
    where no term trains one."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a `RolloutEngine` has written: a text to its end, or to the end of a turn."""

    key: int
    """The key under which the text was begun."""
    tokens: list[int]
    """The new tokens, with the one that ended the text or the turn where there was one."""
    logprobs: list[float]
    """log pi of each token when it was drawn, in nats, at the sampling temperature."""
    values: list[float] | None = None
    """The critic's value of the state that each token was drawn in; None from an engine that has no
    critic."""
    step: int = 0
    """Grows with the engine's steps: among texts that `ended` returns at once, which of them ended
    together, and which later."""


@dataclass(frozen=True, slots=True)
class Scorer:
    """A sequence score that is read from a causal model while a text is written.

    The model looks only back and reads the policy's own tokens. So it gives every prefix of a text
    a score, and each new token costs one token's forward. `tokenenv.models.heads.make_scorer` makes
    one of a transformers classifier. Where this cannot be, see `TextScorer`.
    """

    model: Any
    """The trunk that maps tokens to states: a transformers base model, or any `TokenModel`."""
    head: Head
    """Maps states (K, H) to scores (K,) float32."""
    per_token: bool
    """True: the score of a text is the sum of the scores of its response tokens, those that the
    environment wrote left out. False: it is the score at its last token, whoever wrote it."""
    pad_token_id: int | None = None
    """Where `per_token` is False: the score of a text is read at its last token that is not this
    id. transformers' sequence classifiers read so, also where their pad id is the stop id. None:
    the score is read at the last token, whatever that is."""


class TextScorer(Protocol):
    """A sequence score that only finished texts have.

    The scorer is given whole texts as token ids and does the rest itself. It is for reward models
    that cannot follow a text token by token: those with another tokenizer, that look ahead, or that
    run elsewhere (`tokenenv.models.aligned_scorer` and `vllm_models` have such). Terms that read
    the score of a prefix need a `Scorer` instead.
    """

    @property
    def per_token(self) -> bool:
        """True: the model scores tokens, and the score of a text is their sum. False: it scores the
        text as a whole."""
        ...

    @property
    def looks_ahead(self) -> bool:
        """Whether the score that a token is given may depend on later tokens."""
        ...

    def token_scores(self, texts: Sequence[TextIds], width: int) -> Tensor:
        """Return the score of each response token, whoever wrote it.

        Args:
            texts: B pairs of the token ids, the policy's, of a prompt and a response.
            width: the number of columns, at least the longest response and at least 1.

        Returns:
            (B, width) float32 on any device, zero to the right of each response. Each row's sum is
            the score of its text: a model that scores whole texts puts it on the last token. Where
            the environment writes into texts, the sum is over the policy's own tokens, if the model
            scores tokens.
        """
        ...


class RolloutEngine(Protocol):
    """An inference engine, such as vLLM, that writes many whole texts side by side with a policy's
    weights."""

    def begin(self, key: int, prompt: Sequence[int], max_tokens: int, seed: int) -> None:
        """Begin a text.

        Args:
            key: a number that no running text has.
            prompt: token ids, which may end with the beginning of a response. A text that the
                environment has answered is begun again, with all that has been written.
            max_tokens: the text ends after so many new tokens, or with a token of
                `stop_token_ids` or `turn_end_token_ids` (`TokenSpec`).
            seed: of the text's own random numbers.
        """
        ...

    def ended(self) -> list[Written]:
        """Wait until at least one of the running texts has ended, and return those that have."""
        ...

    def sync(self) -> None:
        """Take the policy's present weights. The next token of every text, running ones included,
        is drawn with them."""
        ...

    def abort(self) -> None:
        """Drop the running texts."""
        ...


@runtime_checkable
class EngineApart(RolloutEngine, Protocol):
    """A `RolloutEngine` that writes while this process does something else."""

    def write_on(self, texts: int, tokens: int) -> None:
        """Begin to write until so many texts have ended, or texts of so many new tokens together;
        `ended` waits for that, and returns them. It is asked after `begin`."""
        ...


class Oracle(Protocol):
    """The exact optimum of score - beta KL(pi || pi_ref), where a task knows it."""

    def state_value(self, states: TrunkStates, step: Tensor, beta: float) -> Tensor:
        """Return the optimal value V* of K states, (K,) float32 in the unit of the score.

        Args:
            states: of the task's models.
            step: (K,) int64, the response tokens so far. After the last one the value is the score.
            beta: reward per nat.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What an environment id is made of. A task file is a function that returns one of these; its
    arguments are the task's options."""

    tokenizer: Any
    """A transformers tokenizer, which all models share; None where tokens have no text."""
    chats: Any = None
    """The `tokenenv.models.chats.Chats` behind the prompts, where they are conversations; None:
    prompts that are given as texts are plain texts."""
    reference: Any
    """pi_ref, frozen and in eval mode: a transformers causal LM, or any `TokenModel`."""
    prompts: Sequence[Sequence[int]]
    """The token ids of each prompt, 1 to `max_prompt_tokens` of them. An env draws from this
    sequence."""
    columns: Sequence[Mapping[str, Any]] = ()
    """What belongs to each prompt, an answer say: the other columns of its row by name, as plain
    data (`tokenenv.tables.plain_value`). As many as `prompts`, or none."""
    max_prompt_tokens: int
    """P, the most tokens of a prompt."""
    max_prompt_tokens_from: PromptLimit = "task"
    """Where P came from, for messages about longer prompts."""
    max_new_tokens: int
    """T, the most tokens that the policy may emit in a text."""
    stop_token_ids: tuple[int, ...]
    """The ids that end a text. The stop token belongs to the response and is paid for."""
    respond: Respond | None = None
    """What writes into the texts between the policy's tokens: it maps a text to a `Reply`, or to
    None where it has nothing to say (`tokenenv.turns`). It must be a function of what it is given,
    `TextSoFar.seed` included. None: the policy alone writes."""
    turn_end_token_ids: tuple[int, ...] | None = None
    """The ids after which `respond` is asked; None: after every token of the policy's. A stop token
    that is among them ends the text only where `respond` returns None."""
    max_context_tokens: int | None = None
    """L, the most tokens of a text, whoever wrote them; a text that reaches it is truncated, and so
    is one whose next reply would not fit. None: P + T. With `respond` it must leave room for what
    is written."""
    model: Any = None
    """The policy's default initial weights, as a model; None: the reference's."""
    scorer: Scorer | TextScorer | None = None
    """What gives the sequence score: `infos["score"]`, and the designs that build on it. None: the
    task has no score, unless its reward is a single `Rule`."""
    gold: Any = None
    """The true metric, for evaluation only: a function that is called as that of a `Rule`, or a
    `Rule`, or "score" where the score itself is the truth, or the `Scorer` that says the truth
    where another one scores. None: unknown."""
    implicit_model: Any = None
    """A preference-tuned (DPO) language model with the reference's tokens, which
    `reward="implicit"` reads."""
    teacher: Any = None
    """A language model with the reference's tokens, which `reward="distill"` has the policy
    imitate. One that depends on beta has a method `at_beta(beta)`, which returns the model for
    the beta that an env is made with. One that depends on the number of the policy's tokens so far,
    where a text alone does not say it, has a method `at_step(states, step)`, which returns the
    states (K, ...) for `step` (K,) of them."""
    step_scorer: Scorer | None = None
    """What scores the steps of a text for `reward="process"`; None: the `scorer`."""
    step_end_token_ids: tuple[int, ...] = ()
    """The ids that end a step of a text, such as a line break. The end of the text ends one too."""
    oracle: Oracle | None = None
    """The exact optimum, where it is known."""
    features: Callable[[TrunkStates, Tensor], Tensor] | None = None
    """What `observation="features"` shows: maps the states of all models and the response tokens so
    far (N,) int64 to features (N, F) float32. None: the reference's last hidden state."""
    num_features: int = 0
    """F, where `features` is given."""
    reward: str | Mapping[str, Any] = "token"
    """The design that is used where `reward=` is not given. An empty mapping pays nothing but the
    KL term, and the env warns of that."""
    kl_coef: float = 0.05
    """The beta that is used where `kl_coef=` is not given, in reward per nat."""


class TokenModel(Protocol):
    """What a language model, or a scorer's trunk, that is no transformers model has to bring.

    "States" may be any tensor with K rows, (K,) or (K, H), that `head` understands: the number of
    an automaton's state, for example.
    """

    device: Any
    """The device where tokens are taken and states returned."""
    vocab_size: int
    """V. Of language models only, as is `head`."""
    hidden_size: int
    """How many numbers of a state a value head may read, the first ones. Of policies only."""

    def slots(self, num_slots: int, max_length: int) -> "SlotModel":
        """Make N slots for running texts of at most `max_length` tokens each."""
        ...

    def states(self, tokens: Tensor, lengths: Sequence[int] | np.ndarray) -> Tensor:
        """Read whole texts: right-padded `tokens` (B, L) to states (B, L, ...), in which state t
        has read tokens 0..t."""
        ...

    def head(self, states: Tensor) -> Tensor:
        """Return the logits (K, V) float32 of the next token after `states`."""
        ...


class SlotModel(Protocol):
    """N texts that run through one causal model, each in a slot and at a position of its own."""

    def prefill(self, slots: Slots, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Restart `slots` (n,) with right-padded `tokens` (n, <=L), and return the state (n, H)
        after the last token of each text."""
        ...

    def append(self, tokens: Tensor, active: np.ndarray | None = None) -> Tensor:
        """Add one token (N,) to each slot that is `active` (N,) bool (None: to all), and return the
        states (N, H). The states of slots that are not active mean nothing."""
        ...

    def extend(self, slots: Slots, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Add right-padded `tokens` (n, K), 1 or more and `lengths` (n,) of them, to the running
        texts of `slots` (n,). Return the states (n, K, H) after each of them; those to the right of
        a row's last token mean nothing."""
        ...

    def fork(self, sources: Slots, targets: Slots) -> None:
        """Copy slot sources[i] onto slot targets[i]."""
        ...

    def states(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Read whole texts, without a cache: right-padded `tokens` (B, L) to states (B, L, H), in
        which state t has read tokens 0..t."""
        ...
