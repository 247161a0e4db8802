"""Reward terms: what each token is paid, and why.

Each family of designs has a file of its own. All of them, and what a term of your own needs, can be
imported from here; docs/your-reward.md shows how to write one.
"""

from tokenenv.rewards.attention import Attention
from tokenenv.rewards.distill import Distill
from tokenenv.rewards.gradient import Gradient
from tokenenv.rewards.implicit import Implicit
from tokenenv.rewards.occlusion import Occlusion
from tokenenv.rewards.online import Prime
from tokenenv.rewards.process import Process
from tokenenv.rewards.progressive import progressive
from tokenenv.rewards.rule import Rule, TokenRule
from tokenenv.rewards.scaling import Clipped, PositionScaled, Scaled, Wrapper
from tokenenv.rewards.seen import FinishedTexts, RunningTexts, States, Transitions
from tokenenv.rewards.segment import Segment
from tokenenv.rewards.shaping import Delta, Oracle, Shaping
from tokenenv.rewards.shapley import Shapley
from tokenenv.rewards.term import Context, RewardTerm
from tokenenv.rewards.terminal import Terminal
from tokenenv.rewards.token import Token
from tokenenv.rewards.turn import Turn
from tokenenv.rewards.uniform import Uniform

__all__ = [
    "Attention",
    "Clipped",
    "Context",
    "Delta",
    "Distill",
    "FinishedTexts",
    "Gradient",
    "Implicit",
    "Occlusion",
    "Oracle",
    "PositionScaled",
    "Prime",
    "Process",
    "RewardTerm",
    "Rule",
    "RunningTexts",
    "Scaled",
    "Segment",
    "Shaping",
    "Shapley",
    "States",
    "Terminal",
    "Token",
    "TokenRule",
    "Transitions",
    "Turn",
    "Uniform",
    "Wrapper",
    "progressive",
]
