"""Small worlds in which everything is known: a policy as a table, and all texts that it can write.

In each state the policy draws one of three tokens, with chances of 1/4, 1/4 and 1/2. So a batch of
finite size can hold every text exactly as often as the policy writes it, and whatever a function
takes over such a batch (a mean, a deviation) is what it would take over infinitely many texts.

Suffixes: Y different texts, L tokens of the longest, S states, V tokens of the vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

VOCAB = 3
QUARTERS = (1, 1, 2)
"""The chances of the three tokens, in quarters; which token has which is random in each state."""
END = 0
"""The token that ends a text where texts may end early."""


@dataclass(frozen=True, kw_only=True)
class World:
    """What a world is made of. All but `steps` and `seed` are things that a formula may overlook;
    the defaults are the plainest."""

    name: str
    differs: str = ""
    """Where it differs from the plain world, as the end of a sentence that begins with "where"."""
    assumes: str = ""
    """What a function assumes that is right in the plain world and wrong here, after "it
    assumes that"."""
    steps: int = 4
    """Tokens of the policy's own in the longest text."""
    seed: int = 0
    ends: bool = False
    """Whether `END` ends a text, so that texts have different lengths."""
    gap: int = 0
    """After half of the steps others write one of so many replies, of one token, two, and so on;
    0 is nobody. The policy did not choose those tokens and learns nothing of them."""
    dense: bool = False
    """Whether every token earns something, or the last alone."""
    cut: bool = False
    """Whether texts are cut before their end, unscored, unless their last token is `END`."""
    beta: float = 0.0
    """Weight of KL(pi || reference) in what is optimised."""
    lambda_: float = 1.0
    """What a function with a lambda is asked to take for it."""
    critic_error: float = 0.0
    """Standard deviation of what is added to the values of the states."""
    prompts: int = 1
    group_size: int = 1
    """Texts of one prompt that are compared with each other."""
    drift: float = 0.0
    """How far the policy has moved since the texts were drawn (deviation of its logits)."""
    choice: str = ""
    """Why a function may be off here by choice; empty where that is an error."""
    beyond: tuple[str, ...] = ()
    """The names of worlds that this one adds something to: what is off there is off here."""


@dataclass(frozen=True)
class Texts:
    """All texts of a world. A state is everything that has been written so far."""

    world: World
    state_YL1: Tensor
    """int64: the state before each token, then the last one, which is repeated to its right."""
    token_YL: Tensor
    own_YL: Tensor
    """bool: which tokens the policy wrote; False to the right of each text."""
    text_YL: Tensor
    """bool: where there is a token."""
    reward_YL: Tensor
    chance_Y: Tensor
    """float64: the probability of all in a text that is not the policy's: its prompt and others'
    replies."""
    cut_Y: Tensor
    """bool: cut before its end."""
    rest_Y: Tensor
    """float64: what a text that was cut would still have earned on average; 0 of others."""
    prompt_Y: Tensor
    step_S: Tensor
    """int64: own tokens before each state; -1 where it is not the policy that writes."""
    drawn_SV: Tensor
    """Logits of the policy that drew the texts; of states in which others write, too."""
    policy_SV: Tensor
    """Logits of the policy that learns from them: the same, where the world has no drift."""
    reference_SV: Tensor
    error_S: Tensor
    """The critic's error in each state."""

    def logprob(self, logits_SV: Tensor) -> Tensor:
        """Return (Y, L): the log-prob of each token, whoever wrote it; 0 to the right."""
        logprob_YL = logits_SV.log_softmax(-1)[self.state_YL1[:, :-1], self.token_YL]
        return torch.where(self.text_YL, logprob_YL, 0.0)

    def prob(self, logits_SV: Tensor) -> Tensor:
        """Return (Y,): how often the policy with these logits writes each text."""
        return self.chance_Y * (self.logprob(logits_SV) * self.own_YL).sum(1).exp()

    @property
    def count_Y(self) -> Tensor:
        """int64: how often each text is in the smallest batch that holds all by their chances."""
        total = self.world.prompts * 4**self.world.steps * max(self.world.gap, 1)
        return (self.prob(self.drawn_SV) * total).round().long()


@dataclass(frozen=True)
class _Written:
    """A text so far: its tokens and who wrote them."""

    prompt: int
    tokens: tuple[int, ...] = ()
    own: tuple[bool, ...] = ()
    chance: float = 1.0

    def then(self, token: int, own: bool, chance: float = 1.0) -> "_Written":
        tokens, owners = (*self.tokens, token), (*self.own, own)
        return replace(self, tokens=tokens, own=owners, chance=self.chance * chance)

    @property
    def states(self) -> list[tuple[int, tuple[int, ...]]]:
        return [(self.prompt, self.tokens[:t]) for t in range(len(self.tokens) + 1)]


def enumerated(world: World) -> Texts:
    """Return all texts of a world, with everything random in it from its seed."""
    written = [
        text
        for prompt in range(world.prompts)
        for text in _continued(world, _Written(prompt, chance=1 / world.prompts))
    ]
    numbers: dict[tuple[int, tuple[int, ...]], int] = {}
    step: list[int] = []
    for text in written:
        for t, state in enumerate(text.states):
            if state not in numbers:
                numbers[state] = len(numbers)
                others = t < len(text.own) and not text.own[t]
                step.append(-1 if others else sum(text.own[:t]))
    return _with_numbers(world, written, numbers, torch.tensor(step))


def _continued(world: World, text: _Written) -> Iterator[_Written]:
    """Yield every finished text that goes on from here."""
    step = sum(text.own)
    ended = world.ends and text.tokens[-1:] == (END,) and text.own[-1]
    if step == world.steps or ended:
        yield text
    elif world.gap and step == world.steps // 2 and text.own[-1]:
        for reply in range(world.gap):
            after = text.then(reply, own=False, chance=1 / world.gap)
            for _ in range(reply):
                after = after.then(reply, own=False)
            yield from _continued(world, after)
    else:
        for token in range(VOCAB):
            yield from _continued(world, text.then(token, own=True))


def _with_numbers(world: World, written: list[_Written], numbers: dict, step_S: Tensor) -> Texts:
    rng = np.random.default_rng(world.seed)
    S, L = len(numbers), max(len(text.tokens) for text in written)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape))

    def padded(rows: list, fill: int) -> Tensor:
        return torch.tensor([[*row, *[fill] * (L - len(row))] for row in rows])

    chances = torch.from_numpy(rng.permuted(np.tile(QUARTERS, (S, 1)), axis=1)) / 4
    drawn_SV, reference_SV, moved_SV = chances.double().log(), normal(S, VOCAB), normal(S, VOCAB)
    score_S, token_SV, rest_S, error_S = normal(S), normal(S, VOCAB), normal(S), normal(S)
    prompt_Y = torch.tensor([text.prompt for text in written])
    states = [[numbers[state] for state in text.states] for text in written]
    last_Y = torch.tensor([row[-1] for row in states])
    own_YL = padded([text.own for text in written], False)
    text_YL = padded([[True] * len(text.own) for text in written], False)
    token_YL = padded([text.tokens for text in written], 0)
    state_YL1 = torch.tensor([row + [row[-1]] * (L + 1 - len(row)) for row in states])
    cut_Y = torch.tensor([world.cut and text.tokens[-1] != END for text in written])
    # Prompts differ most in how much there is to earn, and a baseline has to tell them apart.
    final_Y = torch.where(cut_Y, 0.0, score_S[last_Y] + 3.0 * prompt_Y)
    final_YL = torch.zeros(len(written), L, dtype=torch.float64)
    final_YL.scatter_(1, text_YL.sum(1, keepdim=True) - 1, final_Y[:, None])
    dense_YL = token_SV[state_YL1[:, :-1], token_YL] * own_YL
    return Texts(
        world,
        state_YL1,
        token_YL,
        own_YL,
        text_YL,
        final_YL + (dense_YL if world.dense else 0.0),
        torch.tensor([text.chance for text in written], dtype=torch.float64),
        cut_Y,
        torch.where(cut_Y, rest_S[last_Y], 0.0),
        prompt_Y,
        step_S,
        drawn_SV,
        drawn_SV + world.drift * moved_SV,
        reference_SV,
        world.critic_error * error_S,
    )
