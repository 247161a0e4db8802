"""What a type checker knows of an agent's keywords: the fields of its config, and what all agents
take beside them. At run time `build_config` checks the same names.

    class PPO(PolicyGradient):
        if TYPE_CHECKING:

            @dataclass(kw_only=True)
            class _Keywords(PPOConfig, AgentKeywords): ...

            @takes(_Keywords)
            def __init__(self, envs: VectorEnv, config: Any = None, **keywords: Any) -> None: ...

An agent that adds no field inherits this. One that adds fields and says nothing takes them as
`config=MyConfig(...)`, as far as the type checker knows.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec

from gymnasium.vector import VectorEnv

from tokenenv.agents.learning.policy import LMPolicy

P = ParamSpec("P")
Init = Callable[Concatenate[Any, VectorEnv, P], None]


@dataclass(kw_only=True)
class AgentKeywords:
    """The arguments of `Agent` that are no fields of a config."""

    config: Any = field(default=None, kw_only=False)
    policy: LMPolicy | None = None
    run_dir: str | os.PathLike[str] | None = None


def takes(keywords: Callable[P, Any]) -> Callable[[Callable[..., None]], Init[P]]:
    """Return a decorator that gives `__init__(self, envs, ...)` the parameters of `keywords`, for
    type checkers only."""

    def unchanged(init: Callable[..., None]) -> Init[P]:
        return init

    return unchanged
