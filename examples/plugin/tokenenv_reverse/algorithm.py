"""mean-baseline: REINFORCE whose baseline is what the batch earns on average at the same place."""

from dataclasses import dataclass

from torch import Tensor

from tokenenv.agents import PolicyGradient, PolicyGradientConfig
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.learning.advantages import returns_to_go


@dataclass(kw_only=True, slots=True)
class MeanBaselineConfig(PolicyGradientConfig):
    """Settings of `MeanBaseline`."""

    baseline: float = 1.0
    """Share of the mean return that is subtracted, 0 to 1."""

    def __post_init__(self) -> None:
        PolicyGradientConfig.__post_init__(self)
        self.check_share("baseline")


class MeanBaseline(PolicyGradient):
    """REINFORCE with the batch's mean return at the same place as baseline."""

    config_class = MeanBaselineConfig
    config: MeanBaselineConfig

    def advantages(self, batch: EpisodeBatch) -> Tensor:
        """(B, T): each token's return to go, minus a share of the mean over texts that long."""
        returns_BT = returns_to_go(self.rewards(batch), batch.response_length_B, self.config.gamma)
        counts_T = batch.mask_BT.sum(0).clamp(min=1)
        means_T = returns_BT.masked_fill(~batch.mask_BT, 0.0).sum(0) / counts_T
        return returns_BT - self.config.baseline * means_T
