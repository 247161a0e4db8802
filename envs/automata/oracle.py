"""The exact optimum of score - beta KL(pi || pi_ref), where an automaton scores texts, a bigram is
the reference, and a source may answer."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from tokenenv.envs.automata.running import Game, Running
from tokenenv.envs.automata.source import Source
from tokenenv.errors import InvalidArgument
from tokenenv.models.automaton import Automaton
from tokenenv.models.batching import table_entries
from tokenenv.models.bigram import Bigram
from tokenenv.types import TrunkStates

Table = TypeVar("Table")
PolicyFunction = Callable[[dict[str, np.ndarray]], Any]
"""A policy as a function: it maps an observation of K running texts (NumPy `tokens` (K, L),
`length` and `prompt_length` (K,); where a source answers, `own_mask` (K, L) too) to the
probabilities of the next token, (K, V)."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The quality of a policy, in the unit of the score."""

    objective: float
    """J = E[score] - beta KL, where the KL is summed over a text's tokens."""
    error: float
    """The standard error of `objective` and of `regret`; 0.0 where they are exact."""
    score: float
    """E[score]."""
    kl: float
    """KL(pi || pi_ref) of a whole text, in nats."""
    regret: float
    """J* - J, 0 or more."""


class AutomatonOracle:
    """The optimal values, by backward induction over (step t, automaton state q, last token u), in
    float64.

    With V*_T(q, u) = payoff(q), and s' for the state after token a in state s,

        V*(s) = beta log sum_a pi_ref(a | u) exp(V*(s') / beta)    (at beta = 0 the largest V*(s'),
            at beta = inf the mean under pi_ref: the reference's own values)
        Q*(s, a) = V*(s')
        pi*(a | s) = pi_ref(a | u) exp((Q*(s, a) - V*(s)) / beta)

    (soft value iteration: Todorov 2006; Rafailov et al. 2024, arXiv 2404.12358). In general Q* = r
    + V*(s'); here no reward comes before the end, and the KL term is not part of Q*.

    Where a source answers after a token that ends a turn, s' is random, and Q*(s, a) is the
    expectation of V*(s') over what is written. The KL is that of the policy's tokens alone, so the
    optimum is soft over those and an expectation over the others.

    In all methods, `obs` holds N texts as the env observes them, as NumPy arrays or tensors, with a
    prompt of one token, and beta is in reward per nat, 0 or more. Tokens of a prefix, which
    `own_mask` does not tell apart, are taken for the policy's. The tables of the last two betas are
    kept.

    Raises:
        InvalidArgument: an observation is not of this task, or a next token is asked for after a
            text has ended.
    """

    def __init__(
        self,
        automaton: Automaton,
        reference: Bigram,
        max_new_tokens: int,
        source: Source | None = None,
    ) -> None:
        if automaton.vocab_size != reference.vocab_size:
            raise InvalidArgument(
                f"automaton reads {automaton.vocab_size} tokens, reference has "
                f"{reference.vocab_size}."
            )
        self.automaton, self.reference, self.source = automaton, reference, source
        self.max_new_tokens, self.vocab_size = max_new_tokens, reference.vocab_size
        self.max_length = 1 + max_new_tokens * (1 + (source.width if source else 0))
        """The most tokens that a text can have, when every token of the policy's is answered."""
        self._tables: dict[float, tuple[np.ndarray, np.ndarray]] = {}
        self._device_tables: dict[float, Tensor] = {}

    def value(self, obs: Mapping[str, Any], beta: float) -> np.ndarray:
        """Return V* (N,) float64; that of a finished text is its score."""
        return self._values(beta)[self._read(obs)]

    def q(self, obs: Mapping[str, Any], beta: float) -> np.ndarray:
        """Return Q* (N, V) float64 of running texts."""
        step, state, _ = self._read_running(obs)
        return self._next(step, state, beta)

    def policy(self, obs: Mapping[str, Any], beta: float) -> np.ndarray:
        """Return pi* (N, V) float64 of running texts; at beta = 0 the reference restricted to the
        best tokens."""
        step, state, last = self._read_running(obs)
        return tilted(self.reference.probs[last], self._next(step, state, beta), beta)

    def optimal_objective(self, beta: float) -> float:
        """Return J*, which is V* at the start of a text."""
        return float(self._values(beta)[0, 0, -1])

    def reference_objective(self) -> float:
        """Return J(pi_ref), which is the reference's expected score."""
        return self.optimal_objective(math.inf)

    def state_value(self, states: TrunkStates, step: Tensor, beta: float) -> Tensor:
        """Return V* (K,) float32 on the device, from the states of the automaton and of the
        reference, and `step` (K,) tokens so far."""
        # The step of rows that have ended, and take no token, runs on beyond the last one.
        step = step.clamp(max=self.max_new_tokens)
        return table_entries(
            self._device_values(beta), step, states[self.automaton], states[self.reference]
        )

    def token_values(self, beta: float) -> np.ndarray:
        """Return Q* (T, Q, V) float64 of every token, by the step and the automaton's state."""
        after = _kept(self._tables, 2, beta, self._solve)[1][1:]
        return after[:, self.automaton.transitions, np.arange(self.vocab_size)]

    def evaluate(
        self,
        policy_fn: PolicyFunction,
        beta: float,
        *,
        markov: bool = False,
        num_texts: int = 1024,
        seed: int = 0,
    ) -> Evaluation:
        """Evaluate any policy by what its tokens lose:

            J* - J = E_pi sum_t [V*(s) - E_pi Q*(s, a) + beta KL(pi || pi_ref)(s)].

        The bracket is beta KL(pi || pi*)(s), 0 or more, and is computed exactly in every state.
        Sampled texts only say how often a state occurs, so the error vanishes as pi nears pi*.

        Args:
            policy_fn: the policy; it is asked once a step.
            beta: reward per nat, 0 or more, and finite.
            markov: whether pi depends on nothing but the step, the automaton's state and the last
                token. It is then asked about one text for each combination that occurs, and the
                result is exact.
            num_texts: the number of texts sampled from pi where `markov` is False, at least 2.
            seed: of the sampling.
        """
        if not beta < math.inf:
            raise InvalidArgument(f"beta={beta} must be finite where a policy is evaluated.")
        if not markov and num_texts < 2:
            raise InvalidArgument(f"num_texts={num_texts} must be at least 2.")
        rng, game = np.random.default_rng(seed), Game(self.automaton, self.source, self.max_length)
        texts = game.beginnings(1 if markov else num_texts)
        masses, kls, losses = [], [], []
        for step in range(self.max_new_tokens):
            probs = self._ask(policy_fn, texts)
            kl, loss = self._costs(probs, texts, step, beta)
            masses.append(texts.mass)
            kls.append(kl)
            losses.append(loss)
            texts = game.all_next(texts, probs) if markov else game.drawn_next(texts, probs, rng)
        regret, total_kl = (float(sum(map(np.dot, masses, costs))) for costs in (losses, kls))
        error = 0.0 if markov else float(np.sum(losses, axis=0).std(ddof=1) / math.sqrt(num_texts))
        score = float(texts.mass @ self.automaton.payoff[texts.state])
        return Evaluation(self.optimal_objective(beta) - regret, error, score, total_kl, regret)

    # ------------------------------------------------------------------- tables

    def _values(self, beta: float) -> np.ndarray:
        """Return V* of all states in which the policy acts, (T + 1, Q, V + 1)."""
        return _kept(self._tables, 2, beta, self._solve)[0]

    def _device_values(self, beta: float) -> Tensor:
        """Return V* of all states on the device, (T + 1, Q, V + 1) float32."""
        return _kept(self._device_tables, 1, beta, self._upload)

    def _solve(self, beta: float) -> tuple[np.ndarray, np.ndarray]:
        """Return V* of all states in which the policy acts, and of all states right after its
        tokens, before they are answered; (T + 1, Q, V + 1) both."""
        if not beta >= 0.0:
            raise InvalidArgument(f"beta={beta} is not allowed; it must be 0 or more.")
        values = [self._end()]
        for _ in range(self.max_new_tokens):
            values.append(soft_max(self._successors(values[-1]), self.reference.probs, beta))
        table = np.stack(values[::-1])
        return table, table if self.source is None else np.stack(list(map(self._asked, table)))

    def _end(self) -> np.ndarray:
        """Return the scores (Q, V + 1) of texts that end in a state."""
        return np.repeat(self.automaton.payoff[:, None], self.vocab_size + 1, axis=1)

    def _successors(self, values: np.ndarray) -> np.ndarray:
        """Return the values (Q, V) of the states that each token leads to from each state."""
        return self._asked(values)[self.automaton.transitions, np.arange(self.vocab_size)]

    def _asked(self, values: np.ndarray) -> np.ndarray:
        """Return the values (Q, V + 1) of states right after a token of the policy's, of those in
        which it acts next: where the token is answered, the expectation over the answers."""
        if self.source is None:
            return values
        asked = values.copy()
        asked[:, list(self.source.turn_end_token_ids)] = self.source.expected(values)[:, None]
        return asked

    def _next(self, step: np.ndarray, state: np.ndarray, beta: float) -> np.ndarray:
        """Return V* (K, V) of the states that each token leads to from K states; where it is
        answered, the expectation over the answers."""
        return _kept(self._tables, 2, beta, self._solve)[1][
            step[:, None] + 1, self.automaton.transitions[state], np.arange(self.vocab_size)
        ]

    def _upload(self, beta: float) -> Tensor:
        return torch.from_numpy(self._values(beta)).float().to(self.automaton.device)

    # ------------------------------------------------------------- observations

    def _read(self, obs: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return step, automaton state and last token of N texts, (N,) each."""
        keys = ["tokens", "length", "prompt_length", *(["own_mask"] if self.source else [])]
        if not isinstance(obs, Mapping) or not set(keys) <= set(obs):
            raise InvalidArgument(
                f"obs must be a token observation: {', '.join(keys[:-1])} and {keys[-1]}."
            )
        tokens = np.atleast_2d(_host(obs["tokens"]))
        length, prompt_length = (
            np.atleast_1d(_host(obs[key])) for key in ("length", "prompt_length")
        )
        if (prompt_length != 1).any() or (length < 1).any() or (length > self.max_length).any():
            raise InvalidArgument(
                f"obs has prompts of {prompt_length.tolist()} and texts of {length.tolist()} "
                f"tokens; allowed: 1, and 1 to {self.max_length}."
            )
        valid = np.arange(tokens.shape[1]) < length[:, None]
        if (valid & ((tokens < 0) | (tokens >= self.vocab_size))).any():
            raise InvalidArgument(
                f"obs has token ids out of range; allowed: 0 to {self.vocab_size - 1}."
            )
        last = np.where(length == 1, self.vocab_size, tokens[np.arange(len(tokens)), length - 1])
        step = self._steps(obs, length)
        return step, self.automaton.read(np.where(valid, tokens, 0), length), last

    def _steps(self, obs: Mapping[str, Any], length: np.ndarray) -> np.ndarray:
        """Return how many tokens of N texts are the policy's, (N,)."""
        if self.source is None:
            return length - 1
        own = np.atleast_2d(_host(obs["own_mask"])).astype(bool)
        # A reply follows a token of the policy's, so what comes before the first one is a prefix.
        prefix = np.where(own.any(1), own.argmax(1), length) - 1
        step = prefix + own.sum(1)
        if (step > self.max_new_tokens).any():
            raise InvalidArgument(
                f"obs has texts with {step.tolist()} tokens of the policy's; allowed: up to "
                f"{self.max_new_tokens}."
            )
        return step

    def _read_running(self, obs: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        step, state, last = self._read(obs)
        if (step == self.max_new_tokens).any():
            rows = np.flatnonzero(step == self.max_new_tokens).tolist()
            raise InvalidArgument(f"obs has finished texts (rows {rows}), which no token follows.")
        return step, state, last

    # --------------------------------------------------------------- evaluation

    def _ask(self, policy_fn: PolicyFunction, texts: Running) -> np.ndarray:
        """Ask for pi (K, V) float64, and normalise it again to take out its rounding."""
        count = len(texts.length)
        obs = {"tokens": texts.tokens, "length": texts.length}
        obs["prompt_length"] = np.ones(count, dtype=np.int64)
        if self.source is not None:
            obs["own_mask"] = texts.own.astype(np.int8)
        probs = _host(policy_fn(obs)).astype(np.float64)
        if (
            probs.shape != (count, self.vocab_size)
            or not (probs >= 0).all()
            or np.abs(probs.sum(1) - 1).max() > 1e-3
        ):
            raise InvalidArgument(
                f"policy_fn gave an array {probs.shape}; allowed: probabilities "
                f"{(count, self.vocab_size)}, each row's sum 1."
            )
        return probs / probs.sum(1, keepdims=True)

    def _costs(
        self, probs: np.ndarray, texts: Running, step: int, beta: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return KL(pi || pi_ref) of the next token, and what pi loses there against pi*, (K,)
        each."""
        steps = np.full(len(probs), step)
        # Where pi is 0 the summand is 0 whatever the ratio is; 1 keeps its log finite.
        ratio = np.where(probs > 0, probs, 1.0) / self.reference.probs[texts.last]
        kl = (probs * np.log(ratio)).sum(1)
        gain = (probs * self._next(steps, texts.state, beta)).sum(1) - beta * kl
        loss = np.maximum(self._values(beta)[steps, texts.state, texts.last] - gain, 0.0)
        # A text that has ended stands among the others until the last step, and costs nothing.
        runs = 1.0 if self.source is None else ~self.source.ended[texts.state]
        return kl * runs, loss * runs


def soft_max(values: np.ndarray, probs: np.ndarray, beta: float) -> np.ndarray:
    """Return beta log sum_a probs[u, a] exp(values[q, a] / beta), (Q, U), of `values` (Q, V) and
    positive `probs` (U, V).

    The best value is subtracted first. Its summand is then its probability, so the sum is positive
    and cannot overflow, however small beta is. At beta = inf it is the mean, which is the limit.
    """
    if beta == math.inf:
        return values @ probs.T
    best = values.max(1, keepdims=True)
    if beta == 0:
        return np.repeat(best, len(probs), axis=1)
    return best + beta * np.log(np.exp((values - best) / beta) @ probs.T)


def tilted(probs: np.ndarray, values: np.ndarray, beta: float) -> np.ndarray:
    """Return probs exp(values / beta), normalised, (K, V) each. At beta = 0 only the tokens with
    the best value have a probability."""
    gap = values - values.max(1, keepdims=True)
    weights = probs * (gap == 0 if beta == 0 else np.exp(gap / beta))
    return weights / weights.sum(1, keepdims=True)


def _kept(
    tables: dict[float, Table], size: int, beta: float, make: Callable[[float], Table]
) -> Table:
    """Return `make(beta)`, which is kept as long as it is among the `size` betas that were asked
    for last."""
    table = tables.pop(beta) if beta in tables else make(beta)
    tables[beta] = table
    if len(tables) > size:
        del tables[next(iter(tables))]
    return table


def _host(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
