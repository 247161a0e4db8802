"""A world small enough to enumerate: a few tokens, at most T of them in a text, and a state of its
own for every history.

Histories are numbered as a tree: 0 is the prompt, and token a takes history h to V h + 1 + a.
Whatever is computed here is exact, in float64; only what an env pays is float32.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import fakes
import torch
from torch import Tensor

from tokenenv.env.vector_env import TokenVectorEnv
from tokenenv.models.automaton import StateSlots
from tokenenv.models.heads import make_scorer
from tokenenv.types import EpisodeScores, Scorer, Task, TextIds, TextScorer, TrunkStates

V, T, BETA = 3, 4, 0.7
NUM_HISTORIES = (V ** (T + 1) - 1) // (V - 1)
STOP, STEP_END = 0, 1


class Histories:
    """A scorer's trunk (a `TokenModel`) whose state is the number of the history (K,)."""

    device, vocab_size = torch.device("cpu"), V

    def slots(self, num_slots: int, max_length: int) -> StateSlots:
        """Slots that keep the number of each text's history."""
        return StateSlots(self, num_slots)

    def after(self, states: Tensor, tokens: Tensor) -> Tensor:
        """The histories (K,) that follow K histories and tokens."""
        return V * states + 1 + tokens

    def states(self, tokens: Tensor, lengths: Any) -> Tensor:
        """Right-padded `tokens` (B, L), of which the first is the prompt, to histories (B, L)."""
        histories = [torch.zeros_like(tokens[:, 0])]
        for token in tokens[:, 1:].T:
            histories.append(self.after(histories[-1], token))
        return torch.stack(histories, 1)


class Tabular(Histories):
    """A language model: a table of log-probs (histories, V)."""

    def __init__(self, logprobs: Tensor) -> None:
        self.logprobs = logprobs

    def head(self, states: Tensor) -> Tensor:
        return self.logprobs[states].float()


class TrainableTabular(torch.nn.Module, Tabular):
    """One whose table can be trained."""

    def __init__(self, table: Tabular) -> None:
        super().__init__()
        self.logprobs = torch.nn.Parameter(table.logprobs.clone())


class TabularOracle:
    """An `Oracle`: V* of every history, a table for each beta."""

    def __init__(self, model: Histories, values: Callable[[float], Tensor]) -> None:
        self.model, self.values = model, values

    def state_value(self, states: TrunkStates, step: Tensor, beta: float) -> Tensor:
        return self.values(beta)[states[self.model]].float()


class Hindsight(Histories):
    """A `TextScorer` of any text: token scores that depend on the whole text."""

    per_token = True

    def __init__(self, world: "World") -> None:
        self.world = world

    def token_scores(self, texts: Sequence[TextIds], width: int) -> Tensor:
        out = torch.zeros(len(texts), width)
        for row, (_, response) in enumerate(texts):
            history = self.states(torch.tensor([[0, *response]]), None)[0, -1]
            out[row, : len(response)] = self.world.share_table[history, : len(response)].float()
        return out


class World:
    """Everything random, from one seed: a policy, a reference, another language model, and the
    scores of all histories.

    B finished texts, all there are: `tokens`, `before` and `after` (the histories around each
    token), `mask`, (B, T) each. `chance` (B,) is the probability of all in them that is not the
    policy's; here nothing is.
    """

    def __init__(self, seed: int, stops: tuple[int, ...] = ()) -> None:
        self.seed, self.stops, self._generator = seed, stops, torch.Generator().manual_seed(seed)
        self.policy = self.normal(NUM_HISTORIES, V)
        self.reference, self.other = (
            Tabular(self.normal(NUM_HISTORIES, V).log_softmax(-1)) for _ in range(2)
        )
        self.scores = self.normal(NUM_HISTORIES)
        self.texts = finished_texts(stops)
        self.length = torch.tensor([len(text) for text in self.texts])
        self.mask = torch.arange(T) < self.length[:, None]
        self.tokens = torch.tensor([text + [0] * (T - len(text)) for text in self.texts])
        histories = self.reference.states(
            torch.cat([torch.zeros_like(self.tokens[:, :1]), self.tokens], 1), None
        )
        self.before, self.after = histories[:, :-1] * self.mask, histories[:, 1:] * self.mask
        self.final = self.mask & (torch.arange(T) == self.length[:, None] - 1)
        self.truncated = torch.tensor([text[-1] not in stops for text in self.texts])
        self.chance = torch.ones(len(self.texts), dtype=torch.float64)
        self.share_table = self.normal(NUM_HISTORIES, T)
        self.shares = self.share_table[self.after.max(1).values]

    def normal(self, *shape: int) -> Tensor:
        """The next random numbers, float64."""
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)

    def prefix_scores(self, per_token: bool) -> Tensor:
        """f (B, T + 1): the score of each text before each token and at its end, as a `Scorer`
        defines it; 0 beyond."""
        first = (
            torch.zeros_like(self.scores[self.before[:, :1]])
            if per_token
            else self.scores[self.before[:, :1]]
        )
        each = self.scores[self.after] * self.mask
        return torch.cat([first, each.cumsum(1) * self.mask if per_token else each], 1)

    def rewards(self, per_token: bool) -> Tensor:
        """r (B, T): each token's score, or the text's on its last token."""
        return self.scores[self.after] * (self.mask if per_token else self.final)

    def states(self, tokens: Tensor) -> Tensor:
        """The histories (B, L) of right-padded `tokens` (B, L), of which the first is the
        prompt."""
        return self.reference.states(tokens, None)

    def texts_of(self, rows: Tensor) -> dict[str, Tensor]:
        """The fields of an `EpisodeBatch` that hold the texts `rows` (B,): prompt and response."""
        tokens = torch.cat([torch.zeros_like(self.tokens[:, :1]), self.tokens], 1)
        return {"tokens_BL": tokens[rows], "length_B": self.length[rows] + 1}

    def env(self, scorer: str = "sequence", **options: Any) -> TokenVectorEnv:
        """A vector env of this world; `scorer` names one of `SCORERS`, `oracle` maps beta to a
        table of V*."""
        oracle = options.pop("oracle", lambda beta: self.scores)
        task = Task(
            tokenizer=None,
            reference=self.reference,
            prompts=[[0]],
            max_prompt_tokens=1,
            max_new_tokens=T,
            stop_token_ids=self.stops,
            scorer=SCORERS[scorer](self),
            implicit_model=options.pop("implicit_model", self.other),
            teacher=self.other,
            model=TrainableTabular(self.other),
            step_end_token_ids=(STEP_END,),
            oracle=TabularOracle(self.reference, oracle),
        )
        return TokenVectorEnv(1, task=task, **options)

    def paid(self, scorer: str = "sequence", **options: Any) -> EpisodeScores:
        """All texts, scored by an env of this world without a KL term."""
        return self.score(self.env(scorer, kl="none", **options))

    def score(self, envs: TokenVectorEnv, **options: Any) -> EpisodeScores:
        """All texts, scored by `envs`."""
        return envs.score_episodes([[0]] * len(self.texts), self.texts, **options)

    def probs(self, logits: Tensor) -> Tensor:
        """(B,) the probability of every text under the policy with `logits`."""
        return self.logprob(logits).sum(1).exp() * self.chance

    def logprob(self, logits: Tensor) -> Tensor:
        """log pi (B, T) of every token under the policy with `logits` (histories, V); zero beyond
        the text."""
        return logits.log_softmax(-1)[self.before, self.tokens] * self.mask

    def gradient_of_mean(self, value: Callable[[Tensor], Tensor]) -> Tensor:
        """The gradient of E_pi[value] by the policy's logits; `value` maps log pi (B, T) to (B,)
        and is differentiated too."""
        logits = self.policy.clone().requires_grad_()
        each = self.probs(logits) * value(self.logprob(logits))
        return torch.autograd.grad(each.sum(), logits)[0]

    def objective_gradient(self) -> Tensor:
        """The gradient of E[score - BETA KL(pi || pi_ref)], with the "sequence" scorer's score."""
        score, ref_logprob = (
            self.rewards(per_token=False).sum(1),
            self.logprob(self.reference.logprobs).sum(1),
        )
        return self.gradient_of_mean(lambda logprob: score - BETA * (logprob.sum(1) - ref_logprob))

    def policy_gradient(
        self, credit: Tensor, own: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """What a learner follows on average: E_pi[sum_t credit_t grad log pi_t], with `credit` (B,
        T) of each token, and E_pi[grad own], with `own` of log pi's logits (B,) a loss that is
        differentiated directly."""
        logits = self.policy.clone().requires_grad_()
        each = (self.logprob(logits) * credit).sum(1) + (own(logits) if own else 0.0)
        return torch.autograd.grad((self.probs(self.policy) * each).sum(), logits)[0]


@cache
def worlds() -> list[World]:
    """A few: two with texts of one length, two with texts of several."""
    return [World(seed, stops) for seed, stops in enumerate([(), (), (STOP,), (STOP,)])]


def finished_texts(stops: tuple[int, ...]) -> list[list[int]]:
    """Every text there is: tokens up to a stop token, or T of them."""
    texts = []
    for tokens in itertools.product(range(V), repeat=T):
        length = next((t + 1 for t, token in enumerate(tokens) if token in stops), T)
        if not any(tokens[length:]):
            texts.append(list(tokens[:length]))
    return texts


def transformer_scorer(world: World) -> Scorer:
    """A random transformer that scores texts."""
    return make_scorer(_transformer(world.seed))


@cache
def _transformer(seed: int) -> Any:
    return fakes.reward_model("sequence", num_hidden_layers=1, vocab_size=V, seed=seed)


def tabular_scorer(world: World, per_token: bool) -> Scorer:
    """A random score for every history."""
    return Scorer(Histories(), lambda states: world.scores[states].float(), per_token)


SCORERS: dict[str, Callable[[World], Scorer | TextScorer]] = {
    "sequence": lambda world: tabular_scorer(world, per_token=False),
    "token": lambda world: tabular_scorer(world, per_token=True),
    "transformer": transformer_scorer,
    "hindsight": Hindsight,
}
"""The kinds of scorer that a world can have."""


def to_go(rewards: Any, gamma: float = 1.0) -> Tensor:
    """The discounted sum (B, T) float64 of each token's reward and those after it."""
    total, sums = torch.zeros(len(rewards), dtype=torch.float64), []
    for reward in torch.as_tensor(rewards, dtype=torch.float64).T.flip(0):
        total = reward + gamma * total
        sums.append(total)
    return torch.stack(sums[::-1], 1)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """|found - exact| / |exact|."""
    return float((found - exact).norm() / exact.norm())
