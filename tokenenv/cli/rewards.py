"""`tokenenv rewards`: the reward designs."""

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from tokenenv.cli.console import console, say, say_text
from tokenenv.cli.envs import from_plugin, table
from tokenenv.cli.help import shown_as
from tokenenv.cli.names import reward_of
from tokenenv.errors import TokenEnvError
from tokenenv.rewards.designs import DESIGN_NAMES, DESIGNS, make_terms
from tokenenv.rewards.term import NEEDS, RewardTerm

WHAT = {
    "attention": "the score, shared out by the reward model's attention to each token",
    "delta": "what each token changes in the score of the text so far",
    "distill": "log-ratio of a teacher to the reference: what to imitate on own texts",
    "gradient": "the score, shared out by its gradient (integrated gradients)",
    "implicit": "log-ratio of a preference-tuned (DPO) model to the reference",
    "occlusion": "what the score loses when a token is left out",
    "oracle": "what each token changes in the optimal value: the best dense reward there is",
    "process": "a score for each step of the text",
    "progressive": "terminal at first, and delta in the course of the run",
    "segment": "as delta, but only where a segment of the text ends",
    "shaping": "the score at the end, and the differences of a potential of your choice",
    "shapley": "the score, shared out by the Shapley value of each segment",
    "terminal": "the score of the text at its last token, nothing before",
    "token": "the reward model's own score of each token",
    "turn": "the task's own reward of each turn, at its last token",
    "uniform": "the score, shared out evenly",
}
"""Each bundled design in a few words; `describe` prints its formula."""
PAID = {"causal": "at each token", "hindsight": "at the last token", "policy": "at each token"}
"""When `step` pays a term of each kind."""


@dataclass(kw_only=True)
class Rewards:
    """List the reward designs: what they are, what they need and what they preserve. With a name,
    say all about one. docs/rewards.md explains them."""

    reward: Annotated[str | None, tyro.conf.Positional, shown_as("[NAME]")] = None
    """A design of the list, or module:Name for one of your own."""

    def run(self) -> None:
        """Print the table, or all about one design."""
        if self.reward is not None:
            describe(self.reward)
            return
        rows = [row(name) for name in DESIGNS]
        for plugin in DESIGN_NAMES.plugins():
            try:
                plugin.load()
                rows.append(row(plugin.name, from_plugin(plugin)))
            except TokenEnvError as error:
                rows.append((plugin.name, f"cannot be used: {error}", "", ""))
        console.print(table(("name", "what it is", "needs", "keeps"), sorted(rows)))
        say("keeps: the return and the policy gradient of the score (docs/rewards.md)")
        say("all about one of them: tokenenv rewards NAME")
        say("train with one: tokenenv train --reward NAME")
        say("mix them: tokenenv train --reward '{dense: [token, 0.3], end: terminal}'")
        say("your own, a RewardTerm or a function of (prompt, response) (docs/plugins.md):")
        say("    tokenenv train --reward module:Name")
        say("in Python: reward=f pays a function of (prompt, response) at the end of each text,")
        say("    reward=Rule(f, dense=True) as it is written (docs/your-reward.md)")


def row(name: str, brought: str = "") -> tuple[str, str, str, str]:
    """A design's line of the table; `brought` says who brings it."""
    terms = list(make_terms(name).values())
    needs = sorted({need for term in terms for need in term.needs})
    what = WHAT.get(name) or first_sentence(name)
    return name, what + brought, ", ".join(needs), kept(terms)


def kept(terms: Sequence[RewardTerm]) -> str:
    """What all terms preserve of the score, as far as they state it."""
    stated = {
        "return": [term.preserves_return for term in terms],
        "gradient": [term.preserves_gradient for term in terms],
    }
    if any(None in answers for answers in stated.values()):
        return "not stated"
    return ", ".join(what for what, answers in stated.items() if all(answers))


def first_sentence(reward: str) -> str:
    """What a design's docstring says it is."""
    return re.split(r"\.(?:\s|$)", " ".join(docstring(reward).split()), maxsplit=1)[0]


def docstring(reward: str) -> str:
    """The docstring of a design: of what makes it, if it is bundled, else of its term's class."""
    if reward in DESIGNS:
        return inspect.getdoc(DESIGNS[reward]) or ""
    term = next(iter(make_terms(reward_of(reward)).values()))
    # The docstring of `Rule` says nothing about the function that the user wrote.
    return inspect.getdoc(getattr(term, "function", type(term))) or ""


def describe(reward: str) -> None:
    """Print what a design is and what it needs."""
    if text := docstring(reward):
        say_text(text)
    for name, term in make_terms(reward_of(reward)).items():
        say(f"{name}: a {term.kind} term, paid {PAID[term.kind]}")
        for need in sorted(term.needs):
            say(f"  needs {NEEDS[need]}")
        say(f"  keeps of the score: {kept([term]) or 'neither return nor gradient'}")
    say(f"train with it: tokenenv train --reward {reward}")
