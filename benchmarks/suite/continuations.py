"""Learning from continuations of a group's worst text, for grids of `tokenenv bench`.

Suffixes: B texts, T response tokens, N groups of G texts each.
"""

from dataclasses import dataclass, replace

import torch

from benchmarks.suite.credit import CreditConfig, GroupCredit
from tokenenv import ranks
from tokenenv.agents.algorithms.grpo import paid, total
from tokenenv.agents.algorithms.vine_ppo import state_before
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning.learner import Metrics
from tokenenv.errors import check_choice

PLACES = ("chosen", "random")


@dataclass(kw_only=True, slots=True)
class ResetsConfig(CreditConfig):
    """Settings of `Resets`."""

    place: str = "chosen"
    """Where a text is played on from: "chosen": where the policy was least certain; "random": any
    place alike, which is the control."""

    def __post_init__(self) -> None:
        CreditConfig.__post_init__(self)
        check_choice("place", self.place, PLACES)


class Resets(GroupCredit):
    """Policy optimisation with resets (Samanta et al. 2026, arXiv 2605.25507): a failed text is
    taken back to a place on its way, and played on from there several times.

    From one text of each group, the one that earned least, G continuations are drawn with the
    present policy. They are a group of their own: GRPO's advantages compare them with each other,
    and only their own tokens are learned from, as the prefix is part of their prompt. The update
    learns from both kinds of groups alike (4 texts and 4 continuations in the paper). Tokens of
    continuations count as seen, and so do those that slots emit while they wait for longer ones.

    Taken from the paper: the failed text, the two groups that are normalised apart, no gradient in
    the prefix, and `place="random"`, which is its RRPO. What differs: in its SRPO the model is
    asked in words for the first wrong thought. A model of an automaton's words cannot be asked, so
    `place="chosen"` is where the policy was least certain; this says where another token is likely,
    and not where one is better. A text that the paper would not call failed is played on from as
    well, where all of a group are good.
    """

    config_class = ResetsConfig
    config: ResetsConfig

    def update(self, batch: EpisodeBatch) -> Metrics:
        """Learn from finished texts and from continuations; return the field's scalars and the
        tokens that the continuations took."""
        before, episodes = self.collector.tokens_seen, batch.unstack()
        # In order of length: continuations that are played at once then end nearly together, so
        # that slots wait less.
        resets = sorted(self.resets(batch), key=lambda reset: reset[1])
        played = self.play_on(
            [state_before(episodes[row], place) for row, place in resets],
            self.group_size,
            [episodes[row].columns for row, _ in resets],
        )
        # They are drawn from the policy that the update begins with.
        played = [replace(episode, version=self.updates) for episode in played]
        whole = EpisodeBatch.stack([*episodes, *played])
        metrics = super().update(whole)
        rows, tokens = batch.reward_BT.shape
        batch.learned["advantage"] = whole.learned["advantage"][:rows, :tokens]
        own = {"time/rollout_tokens": self.collector.tokens_seen - before}
        return metrics | ranks.summed(own)

    def resets(self, batch: EpisodeBatch) -> list[tuple[int, int]]:
        """Return the text of each group that is played on from, and the response token before
        which it is taken up."""
        returns_NG = total(paid(self.returns(batch)))[:, 0].unflatten(0, (-1, self.group_size))
        rows = (returns_NG.argmin(1) + torch.arange(len(returns_NG)) * self.group_size).tolist()
        if self.config.place == "random":
            lengths = batch.response_length_B[rows].numpy()
            return list(zip(rows, self.rng.integers(lengths).tolist(), strict=True))
        entropy_BT = self.token_outputs(batch).entropy_BT  # zero to the right of each text
        return list(zip(rows, entropy_BT[rows].argmax(1).tolist(), strict=True))
