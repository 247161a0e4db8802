"""What is earned at the end of a turn: the task's own reward, or what it did to the score."""

from typing import Literal

import torch
from torch import Tensor

from tokenenv.errors import InvalidArgument, check_choice
from tokenenv.rewards.seen import States, Transitions
from tokenenv.rewards.term import Context, RewardTerm

Of = Literal["reward", "differences", "score"]
OF = ("reward", "differences", "score")


class Turn(RewardTerm):
    """What the k-th turn of a text earns, at the turn's last token of the policy's, else 0.

    With rho_k the task's own reward for turn k = 1, 2, ... (`Reply.reward`), rho_0 = 0, f_k the
    score of the text after the environment has answered turn k, and f_0 that of the prompt:

    - "reward": r = gamma^(k-1) rho_k
    - "differences": r = gamma^(k-1) (rho_k - rho_{k-1}), for tasks whose turn reward says how a
      text stands
    - "score": r = gamma^(k-1) (f_k - f_{k-1}), with the sequence score for f_k where a scored text
      ends

    A turn ends where the environment writes something, and where the text ends. A number that the
    environment gives without writing is paid on the token that it answers. "differences" takes a
    number of 0 for none where nothing is written and where the text ends: the text then stands as
    before.

    The task's own rewards add up to a return of their own, so neither the return of the score nor
    its gradient is preserved; undiscounted differences add up to the last number. In an env without
    a scorer there is no other return, and neither promise is stated. "score", undiscounted, is
    `Shaping` with Phi = the score where the present turn began: it adds up to score - f(prompt) and
    preserves what `Shaping` preserves. In an env that never writes it is `Terminal` less f(prompt),
    and with a scorer that reads finished texts only it is `Terminal`. A discount gives up both
    promises: what comes in later turns is worth less.

    Args:
        of: "reward", "differences" or "score".
        gamma: discount per turn, 0 to 1.
    """

    name = "turn"
    needs = frozenset({"turns"})
    preserves_return = False
    preserves_gradient = False
    memory_shape = (4,)

    def __init__(self, of: Of = "reward", *, gamma: float = 1.0) -> None:
        check_choice("of", of, OF)
        if not 0.0 <= gamma <= 1.0:
            raise InvalidArgument(f"gamma={gamma} is not allowed; it must lie between 0 and 1.")
        self.of, self.gamma = of, gamma
        if of == "score":
            self.needs = frozenset({"scorer"})
            self.preserves_return = self.preserves_gradient = gamma == 1.0

    def bind(self, context: Context) -> None:
        """Looks whether the score is known at the end of a turn, or of the text alone."""
        super().bind(context)
        if context.scorer is None:
            self.preserves_return = self.preserves_gradient = None
        is_causal = self.of == "score" and context.causal_scorer is not None
        self.has_memory = is_causal or self.of == "differences" or self.gamma != 1.0
        self.has_potential = is_causal and self.gamma == 1.0
        self.pays_score = self.of == "score" and not is_causal
        self._is_causal = is_causal

    def reward(self, batch: Transitions) -> Tensor:
        """(K,): what a turn earned at its last token."""
        earned = self._of_score(batch) if self.of == "score" else self._of_task(batch)
        if self.gamma == 1.0:
            return earned
        return earned * self.gamma ** batch.before.memory[self.name][:, 1]

    def _of_score(self, batch: Transitions) -> Tensor:
        if not self._is_causal:
            return batch.final_score()
        following = torch.where(batch.scored, 0.0, batch.next.memory[self.name][:, 0])
        return batch.final_score() + following - batch.before.memory[self.name][:, 0]

    def _of_task(self, batch: Transitions) -> Tensor:
        if batch.turn_reward is None or batch.ends_turn is None:
            raise InvalidArgument(
                f"turn_rewards= is missing; the term {self.name!r} pays the task's own reward of "
                "each turn."
            )
        if self.of == "reward":
            return batch.turn_reward
        wrote = batch.ends_turn & ~(batch.terminated | batch.truncated)
        gained = batch.turn_reward - batch.before.memory[self.name][:, 0]
        return torch.where(wrote | (batch.turn_reward != 0), gained, 0.0)

    def potential(self, states: States) -> Tensor:
        """(K,): the score where the present turn began, of "score"."""
        return states.memory[self.name][:, 0]

    def remember(self, memory: Tensor | None, tokens: Tensor, states: States) -> Tensor:
        """(K, 4): what the last turn left (the score, or the task's number), how many turns have
        ended, and the own tokens so far: when the present turn began, and now."""
        step = states.step.float()
        if memory is None:
            nothing = torch.zeros_like(step)
            return torch.stack([self._left(nothing, states, nothing == 0), nothing, step, step], 1)
        left, turns, began, last = memory.unbind(1)
        # Own tokens move the step on, and what the environment writes does not.
        wrote = step == last
        left = self._left(left, states, wrote)
        turns = turns + (wrote & (step > began))
        return torch.stack([left, turns, torch.where(wrote, step, began), step], 1)

    def _left(self, left: Tensor, states: States, wrote: Tensor) -> Tensor:
        """(K,): what is left of the last turn after one more token, which the environment `wrote`
        (K,) or not."""
        if self.of == "differences" and states.turn_reward is not None:
            return torch.where(wrote | (states.turn_reward != 0), states.turn_reward, left)
        if self._is_causal:
            assert states.score is not None
            return torch.where(wrote, states.score.float(), left)
        return left
