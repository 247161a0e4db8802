"""The keywords that type checkers know are those that an agent takes; `make wheel` runs mypy."""

import inspect
from dataclasses import MISSING, fields

from tokenenv.agents import Agent
from tokenenv.agents.keywords import AgentKeywords


def test_what_an_agent_takes_beside_its_config_is_known():
    parameters = list(inspect.signature(Agent.__init__).parameters.values())[2:-1]
    taken = [(p.name, p.default, p.kind is p.KEYWORD_ONLY) for p in parameters]
    known = [(f.name, f.default, f.kw_only) for f in fields(AgentKeywords)]
    assert known == taken
    assert MISSING not in [default for _, default, _ in known]
