"""KLQ: soft Q-learning with a language model as its own Q-function (after KLQ, arXiv 2508.17000,
and path consistency, Nachum et al. 2017), off-policy, with replay.

What it does: at the optimum of score - beta KL, beta log pi*(a|s)/pi_ref(a|s) = Q*(s, a) - V*(s).
So Q is read off the policy and its value head, Q(s, a) = V(s) + beta log pi(a|s)/pi_ref(a|s), and
regressed on

    Q(s_t, y_t) + sum_k lambda^k (r_{t+k} + V(s_{t+k+1}) - Q(s_{t+k}, y_{t+k}))

The errors in this sum are zero at the optimum along every text, whichever policy wrote it (on
average, where an environment draws what it writes into texts). Old texts are therefore as good as
new ones, and no ratios are needed: whole episodes are replayed, targets are made with the present
policy, and one loss trains policy and critic.

What it leaves out: beta = 0 (Q would say nothing about the policy), a target network, and an env
that pays the policy's part of the penalty itself (`kl="policy"`: it was paid for another policy).

Suffixes: B episodes, T response tokens.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from tokenenv.agents.agent import Agent
from tokenenv.agents.config import AgentConfig
from tokenenv.agents.episodes import EpisodeBatch
from tokenenv.agents.keywords import AgentKeywords, takes
from tokenenv.agents.learning import losses
from tokenenv.agents.learning.advantages import gae, kl_penalised
from tokenenv.agents.learning.learner import (
    LossFunction,
    Metrics,
    Outputs,
    logprobs_and_values,
    values_unknown,
)
from tokenenv.agents.rollout.env_rows import wants_logprob
from tokenenv.agents.rollout.replay import Replay
from tokenenv.errors import InvalidArgument


@dataclass(kw_only=True, slots=True)
class KLQConfig(AgentConfig):
    """Settings of `KLQ`."""

    lambda_: float = 1.0
    """How far targets look, 0 to 1: one token at 0, to the end of the text at 1."""
    vf_coef: float = 0.5
    """Weight of the critic's part of the loss beside the policy's; 0 or more."""
    replay_tokens: int = 20_000
    """Response tokens that are kept, the latest; 1 or more."""
    replay_ratio: float = 2.0
    """Response tokens learned from per new one, above 0."""
    separate_value: bool = False
    """Whether the critic has a trunk of its own, or shares the policy's."""

    def __post_init__(self) -> None:
        AgentConfig.__post_init__(self)
        self.check("at least", 0, "vf_coef")
        self.check("at least", 1, "replay_tokens")
        self.check("above", 0, "replay_ratio")
        self.check_share("lambda_")


class KLQ(Agent):
    """KL-regularised Q-learning on tokens."""

    config_class = KLQConfig
    config: KLQConfig
    reads_values = True

    @dataclass(kw_only=True)
    class _Keywords(KLQConfig, AgentKeywords): ...

    @takes(_Keywords)
    def __init__(self, envs: VectorEnv, config: Any = None, **options: Any) -> None:
        super().__init__(envs, config, **options)
        if wants_logprob(envs):
            raise InvalidArgument(
                "KLQ adds the KL penalty itself: give it an env with kl='reference', not "
                "kl='policy'."
            )

    def running_statistics(self) -> dict[str, Any]:
        """Return the replayed episodes."""
        return {"replay": Replay(self.config.replay_tokens)}

    def update(self, batch: EpisodeBatch) -> Metrics:
        """Take new episodes in and learn from a sample of all."""
        if not (batch.kl_coef_B > 0).all():
            raise InvalidArgument(
                "KLQ needs kl_coef above 0: its Q-function is beta log pi / pi_ref."
            )
        replay: Replay = self.statistics["replay"]
        if self.updates == 0:
            self.centre_critic(batch)
        # Of the new episodes for people to look at; what is learned from is drawn below.
        self.estimate(batch)
        replay.add(batch.unstack())
        tokens = math.ceil(self.config.replay_ratio * int(batch.response_length_B.sum()))
        sampled = EpisodeBatch.stack(replay.sample(tokens, self.rng))
        self.estimate(sampled)
        metrics = self.optimise(sampled, lambda weights_B: self.loss(sampled, weights_B))
        return metrics | {
            "replay/tokens": replay.tokens,
            "replay/sampled": int(sampled.response_length_B.sum()),
        }

    def centre_critic(self, batch: EpisodeBatch) -> None:
        """Start the critic at the mean return. An error that all states share would push every
        token up, or every token down."""
        totals_B = self.rewards(batch).sum(1)
        torch.nn.init.constant_(self.policy.value_head.bias, float(totals_B.mean()))
        # Those were of the critic before.
        batch.drawn_value_BT.fill_(torch.nan)

    def estimate(self, batch: EpisodeBatch) -> None:
        """Leave in `batch.learned` the errors of Q under the present policy (B, T), as
        "advantage", and the "value" and "old_logprob" that they rest on."""
        cfg, lengths_B = self.config, batch.response_length_B
        # New texts have both since they were drawn; one forward reads those that are older.
        unknown_B = values_unknown(batch, self.updates)
        options = cfg.max_batch_tokens, cfg.temperature, unknown_B
        logprob_BT, values_BT1 = logprobs_and_values(self.policy, batch, *options)
        rewards_BT = kl_penalised(batch.reward_BT, logprob_BT, batch.kl_coef_B)
        errors_BT = gae(rewards_BT, values_BT1, lengths_B, batch.bootstraps_B, 1.0, cfg.lambda_)
        batch.learned.update(advantage=errors_BT, value=values_BT1[:, :-1], old_logprob=logprob_BT)

    def loss(self, batch: EpisodeBatch, weights_B: Tensor) -> LossFunction:
        """Return half the squared error of Q: once for the policy's part of Q (divided by beta)
        and once for the critic's, each with the other part held."""
        learned, cfg = batch.learned, self.config

        def loss(out: Outputs) -> tuple[Tensor, dict[str, Tensor]]:
            weights, beta = out.pick(weights_B), out.pick(batch.kl_coef_B)
            old, error = out.pick(learned["old_logprob"]), out.pick(learned["advantage"])
            # The error was found before the update; since then Q has moved by both its parts.
            log_ratio, moved = out.logprob - old, out.value - out.pick(learned["value"])
            policy = 0.5 * (weights * (beta * log_ratio + moved.detach() - error) ** 2 / beta).sum()
            value = 0.5 * (weights * (beta * log_ratio.detach() + moved - error) ** 2).sum()
            metrics = {
                "loss/policy": policy.detach(),
                "loss/value": value.detach(),
                "policy/entropy": (weights * out.entropy).sum().detach(),
                "policy/approx_kl": losses.approx_kl(out.logprob, old, weights).detach(),
            }
            return policy + cfg.vf_coef * value, metrics

        return loss
