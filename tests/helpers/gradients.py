"""What each algorithm follows on average in a world of `tabular.py`, beside the exact gradient of
what it optimises.

A batch holds every text as often as the policy writes it, and groups are drawn from that at random,
so nearly nothing is left to chance. B texts, T tokens, G texts a group.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import torch
from tabular import Histories, World, to_go
from torch import Tensor, nn
from toy_env import ToyEnv

from tokenenv.agents import ALGORITHMS
from tokenenv.agents.episodes import EpisodeBatch

G = 4
DESIGNS = ("terminal", "delta", "segment")
WORLDS = {"dense": 0.7, "flat groups": 0.05}
"""beta in worlds where every text has another score, and where one in about thirty earns 1, the
others 0."""


@dataclass(frozen=True)
class Case:
    """An algorithm with settings under which its expected gradient is known."""

    algorithm: str
    settings: dict[str, Any] = field(default_factory=dict)
    texts: int = 16_000
    """In a batch; groups need many, since who is compared with whom is left to chance."""
    own: bool = False
    """Whether it is compared with `grpo_gradient`, not with that of J."""


CASES = {
    "ppo, lambda 1": Case("ppo", {"lambda_actor": 1.0}),
    "a2c": Case("a2c"),
    "reinforce++": Case("reinforce++"),
    "rloo": Case("rloo", texts=60_000),
    "grpo, scale none": Case(
        "grpo", {"scale": "none", "aggregation": "fixed-length"}, texts=60_000
    ),
    "grpo": Case("grpo", texts=60_000, own=True),
    "vineppo": Case("vineppo", {"segments": 2}, texts=1_500),
    "klq": Case("klq"),
}


class Table(nn.Module, Histories):
    """A policy with a logit for every token after every history, and a value for every history."""

    uses_bfloat16 = False

    def __init__(self, world: World) -> None:
        super().__init__()
        self.logits = nn.Parameter(world.policy.float().clone())
        self.values = nn.Parameter(torch.linspace(-1.0, 1.0, len(world.policy)))
        self.vocab_size, self.histories = world.policy.shape[1], world.states
        self.model = self

    def states(self, tokens: Tensor, lengths: Any) -> Any:
        """Histories (B, L), twice."""
        return (self.histories(tokens),) * 2

    def lm_states(self, tokens: Tensor, lengths: Any) -> Tensor:
        return self.histories(tokens)

    value_states = lm_states

    def head(self, states: Tensor) -> Tensor:
        return self.logits[states]

    def value(self, states: Tensor) -> Tensor:
        return self.values[states]

    def autocast(self) -> Any:
        return torch.autocast("cpu", enabled=False)


def make_world(kind: str, seed: int = 0, stops: tuple[int, ...] = ()) -> World:
    """A world with a policy away from its reference, and scores as `kind` of `WORLDS` says."""
    world = World(seed, stops)
    if kind == "flat groups":
        wins = torch.arange(len(world.texts)) % 17 == 5
        finals = world.after.gather(1, world.length[:, None] - 1)[:, 0]
        world.scores *= 0.2  # of prefixes, which shaping pays: it would drown what wins are worth
        world.scores[finals] = wins.double()
    return world


def earlier_policy(world: World, distance: float) -> tuple[Tensor, float]:
    """The logits of a policy so far (standard deviation of logits) from the world's, as one of some
    updates ago is, and KL(earlier || now) in nats per token."""
    noise = torch.randn(
        world.policy.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    earlier, now = (
        world.logprob(logits) for logits in (world.policy + distance * noise, world.policy)
    )
    probs = earlier.sum(1).exp()
    return world.policy + distance * noise, float(
        probs @ (earlier - now).sum(1) / (probs @ world.length.double())
    )


def exact_gradient(world: World, beta: float) -> Tensor:
    """Of J = E[score - beta KL(pi || pi_ref)]."""
    score, ref_logprob = (
        world.rewards(per_token=False).sum(1),
        world.logprob(world.reference.logprobs).sum(1),
    )
    return world.gradient_of_mean(lambda logprob: score - beta * (logprob.sum(1) - ref_logprob))


def grpo_gradient(world: World, terms: Tensor, beta: float) -> Tensor:
    """What GRPO follows with scores of 0 and 1 and texts of one length, by the binomial
    distribution of how many of the G - 1 others earn 1. With `terms` (B, T) on the last token alone
    it is the gradient of E_x[F(P(score = 1))] - beta (G - 1)/G KL, with F increasing: J with each
    prompt's score on another scale."""
    returns, probs = to_go(terms), world.probs(world.policy)
    won = world.rewards(per_token=False).sum(1) > 0.5
    win = float(probs[won].sum())
    mean_won, mean_lost = (
        (probs[rows, None] * returns[rows]).sum(0) / probs[rows].sum() for rows in (won, ~won)
    )
    credit = torch.zeros_like(returns)
    for k in range(G):
        likely = math.comb(G - 1, k) * win**k * (1 - win) ** (G - 1 - k)
        wins = won.double() + k
        std = (wins * (G - wins) / (G * (G - 1))).sqrt()
        rest = (G - 1) / G * returns - (k * mean_won + (G - 1 - k) * mean_lost) / G
        credit += likely * rest / torch.where(std > 0, std, 1.0)[:, None]
    log_ratio = world.logprob(world.policy) - world.logprob(world.reference.logprobs)
    return world.policy_gradient(credit - beta * (G - 1) / G * to_go(log_ratio))


def found_gradient(
    case: Case, world: World, design: str, beta: float, drawn_from: Tensor | None = None
) -> Tensor:
    """The gradient by the policy's logits that one update follows, uphill; `drawn_from` are the
    logits of the policy that wrote the texts, where they are stale."""
    agent = agent_of(case, world)
    batch = batch_of(
        world, design, beta, case.texts, world.policy if drawn_from is None else drawn_from
    )
    agent.updates = int(batch.version_B[0]) + (drawn_from is not None)
    grads: list[Tensor] = []
    agent.optimizer.step = lambda: grads.append(agent.policy.logits.grad.clone())
    if case.algorithm == "vineppo":  # its rollouts, as many as it takes for an exact mean
        log_ratio = world.logprob(world.policy) - world.logprob(world.reference.logprobs)
        earned = (
            torch.from_numpy(world.score(world.env(reward=design, kl="none")).token_rewards)
            - beta * log_ratio
        )
        values = value_table(world, earned)
        agent.values = lambda states, columns=(): [
            float(values[history_of(world, response)]) for _, response, *_ in states
        ]
    if case.algorithm == "klq":  # its replay would draw the whole batch
        agent.estimate(batch)
        agent.optimise(batch, lambda weights_B: agent.loss(batch, weights_B))
    else:
        agent.update(batch)
    return -grads[0].double()


def agent_of(case: Case, world: World) -> Any:
    """An agent whose policy is the world's, for a single step on the whole batch."""
    envs = ToyEnv(G)
    envs.group_size, envs.single_action_space = G, gym.spaces.Discrete(world.policy.shape[1])
    envs.reference, envs.teacher = world.reference, getattr(world, "other", None)
    envs.fork = lambda *_: None  # what VinePPO asks for; its values come from the table
    settings = {
        "epochs": 1,
        "minibatches": 1,
        "max_grad_norm": 1e9,
        "max_batch_tokens": 10**7,
        **case.settings,
    }
    agent: Any = ALGORITHMS[case.algorithm](envs, policy=Table(world), **settings)
    return agent


def batch_of(world: World, design: str, beta: float, count: int, logits: Tensor) -> EpisodeBatch:
    """So many texts, each as often as the policy with `logits` writes it, in a random order; paid
    by an env of the world."""
    paid = world.score(world.env(reward=design, kl_coef=beta))
    rows = spread(world.probs(logits), count // G * G)
    nothing = torch.zeros(len(rows))
    return EpisodeBatch(
        **world.texts_of(rows),
        response_length_B=world.length[rows],
        logprob_BT=world.logprob(logits).float()[rows],
        ref_logprob_BT=world.logprob(world.reference.logprobs).float()[rows],
        reward_BT=torch.from_numpy(paid.token_rewards)[rows],
        potential_BT1=torch.zeros(len(rows), world.tokens.shape[1] + 1),
        kl_coef_B=torch.full((len(rows),), beta),
        terminated_B=nothing == 0,
        truncated_B=nothing > 0,
        bootstraps_B=nothing > 0,
        score_B=nothing,
        gold_B=nothing,
        prompt_id_B=nothing.long(),
        version_B=nothing.long(),
        slot_B=nothing.long(),
        index_B=nothing.long(),
        terms={
            name: torch.from_numpy(values)[rows] for name, values in paid.token_reward_terms.items()
        },
    )


def spread(probs: Tensor, count: int) -> Tensor:
    """`count` numbers of texts, each as often as its probability says, up to one, in an order from
    a fixed seed."""
    shares = probs * count
    counts = shares.floor().long()
    counts[(shares - counts).argsort(descending=True)[: count - int(counts.sum())]] += 1
    return torch.arange(len(probs)).repeat_interleave(counts)[
        torch.randperm(count, generator=torch.Generator().manual_seed(0))
    ]


def value_table(world: World, rewards: Tensor) -> Tensor:
    """What the policy still earns, on average, after every history, from what all texts earn token
    by token (B, T)."""
    probs, to_come = world.probs(world.policy), to_go(rewards)
    total, weight = (torch.zeros(len(world.policy), dtype=torch.float64) for _ in range(2))
    for t in range(world.tokens.shape[1]):
        here = world.mask[:, t]
        total.index_add_(0, world.before[here, t], (probs * to_come[:, t])[here])
        weight.index_add_(0, world.before[here, t], probs[here])
    return total / weight.clamp(min=1e-300)


def history_of(world: World, response: Any) -> int:
    """Its number."""
    tokens = torch.tensor([[0, *map(int, response)]])
    return int(world.states(tokens)[0, -1])


def cosine(one: Tensor, other: Tensor) -> float:
    """Of the angle between two gradients."""
    return float((one * other).sum() / (one.norm() * other.norm()))
