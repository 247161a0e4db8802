"""Text generation as a vectorized Gymnasium environment: one step, one token, a dense reward.

Importing the package registers its ids with Gymnasium.
"""

from tokenenv.registration import register, register_envs
from tokenenv.rewards.seen import FinishedTexts, States, Transitions
from tokenenv.rewards.term import RewardTerm
from tokenenv.turns import Reply, TextSoFar
from tokenenv.types import EpisodeScores, Scorer, Task, TokenSpec

__version__ = "0.1.0"

__all__ = [
    "EpisodeScores",
    "FinishedTexts",
    "Reply",
    "RewardTerm",
    "Scorer",
    "States",
    "Task",
    "TextSoFar",
    "TokenSpec",
    "Transitions",
    "register",
    "register_envs",
]

register_envs()
