"""A published function with what it needs to be checked."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tokenenv.conformance.batches import Batch
from tokenenv.conformance.checks import GROUP_WORLDS, WORLDS, check_advantages, check_loss
from tokenenv.conformance.kl import KLReport, check_kl
from tokenenv.conformance.report import Report

KL_WORLD = "KL in the reward"


@dataclass(frozen=True)
class Subject:
    """One function as a trainer calls it."""

    name: str
    kind: str
    """ "advantages", "groups" (advantages that need groups), "loss" or "kl"."""
    function: Callable[[Batch], Tensor]
    kl_elsewhere: bool = False
    """Whether its trainer has the KL penalty in another place, so that the world with one says
    nothing about it."""

    def check(self) -> Report | KLReport:
        """Check it in all worlds that say something about it."""
        if self.kind == "kl":
            return check_kl(self.function, self.name)
        if self.kind == "loss":
            return check_loss(self.function, self.name)
        grouped = self.kind == "groups"
        worlds = [
            world
            for world in (GROUP_WORLDS if grouped else WORLDS)
            if not (self.kl_elsewhere and world.name == KL_WORLD)
        ]
        return check_advantages(self.function, self.name, grouped=grouped, worlds=worlds)
