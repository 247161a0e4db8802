"""`tokenenv rewards`: the reward designs."""

import inspect
import re
from dataclasses import dataclass

import tyro

from tokenenv.cli.console import console, say, say_text
from tokenenv.cli.envs import table
from tokenenv.cli.names import reward_of
from tokenenv.errors import TokenEnvError
from tokenenv.rewards.designs import DESIGN_NAMES, DESIGNS, make_terms
from tokenenv.rewards.term import NEEDS

PAID = {
    "causal": "at its token",
    "hindsight": "at the end",
    "policy": "at its token",
}
"""When `step` pays a term of each kind."""


@dataclass(kw_only=True)
class Rewards:
    """List the reward designs: what they are, when they pay, what they need, what they preserve.
    With a name, say all about one. docs/rewards.md explains them."""

    reward: tyro.conf.Positional[str | None] = None
    """A design of the list, or module:Name for one of your own."""

    def run(self) -> None:
        """Print the table, or all about one design."""
        if self.reward is not None:
            describe(self.reward)
            return
        rows = [row(name, "") for name in DESIGNS]
        for plugin in DESIGN_NAMES.plugins():
            try:
                plugin.load()
                rows.append(row(plugin.name, plugin.distribution))
            except TokenEnvError as error:
                rows.append((plugin.name, str(error), "", "", "", "", plugin.distribution))
        columns = (
            "name",
            "what it is",
            "paid",
            "needs",
            "keeps return",
            "keeps gradient",
            "plugin",
        )
        console.print(table(columns, sorted(rows)))
        say("all about one of them: tokenenv rewards NAME")
        say("train with one: tokenenv train --reward NAME")
        say("mix them: tokenenv train --reward '{dense: [token, 0.3], end: terminal}'")
        say(
            "your own: a RewardTerm, or a function of (prompt, response), in a module of yours: "
            "tokenenv train --reward module:Name (docs/plugins.md)"
        )


def row(name: str, distribution: str) -> tuple[str, ...]:
    """A design's line of the table."""
    terms = list(make_terms(name).values())
    needs = sorted({need for term in terms for need in term.needs})
    return (
        name,
        first_sentence(name),
        " and ".join(dict.fromkeys(PAID[term.kind] for term in terms)),
        ", ".join(needs),
        answer([term.preserves_return for term in terms]),
        answer([term.preserves_gradient for term in terms]),
        distribution,
    )


def answer(stated: list[bool | None]) -> str:
    """Whether all terms preserve something, as far as they state it."""
    if False in stated:
        return "no"
    return "not stated" if None in stated else "yes"


def first_sentence(reward: str) -> str:
    """What the first term's docstring says it is."""
    text = " ".join(_docstring(reward).split("\n\n")[0].split())
    return re.split(r"(?<=[^.][.:;])\s", text, maxsplit=1)[0].rstrip(".:;")


def _docstring(reward: str) -> str:
    made = DESIGNS.get(reward)
    terms = list(make_terms(reward_of(reward)).values())
    return inspect.getdoc(made) or "" if made else inspect.getdoc(type(terms[0])) or ""


def describe(reward: str) -> None:
    """Print what a design is and what it needs."""
    say_text(_docstring(reward))
    for name, term in make_terms(reward_of(reward)).items():
        say(f"{name}: {term.kind}, paid {PAID[term.kind]}")
        for need in sorted(term.needs):
            say(f"  needs {NEEDS[need]}")
        for what, kept in (
            ("return", term.preserves_return),
            ("gradient", term.preserves_gradient),
        ):
            say(f"  keeps the {what} of the score: {answer([kept])}")
    say(f"train with it: tokenenv train --reward {reward}")
