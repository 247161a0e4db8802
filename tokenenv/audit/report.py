"""What an audit has found, as numbers, as tables and as sentences."""

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from tokenenv.audit.agreement import Agreement
from tokenenv.audit.length import Price
from tokenenv.audit.nulls import NullPolicy
from tokenenv.audit.optimum import Point
from tokenenv.audit.picture import picture
from tokenenv.audit.preservation import Preservation
from tokenenv.audit.tables import markdown, tables
from tokenenv.audit.texts import Estimate
from tokenenv.audit.verdicts import verdicts
from tokenenv.audit.wording import Verdict

Method = Literal["enumeration", "dynamic programming", "sampling"]


@dataclass(frozen=True, slots=True)
class BestText:
    """A text, and what it earns."""

    by: str
    """"proxy" or "gold": what it is the best text by."""
    example: str
    proxy: float
    gold: float | None


@dataclass(frozen=True, slots=True)
class Audit:
    """What optimising a reward does. Estimates are pairs of a value and its standard error, 0 where
    the value is exact."""

    env: str
    """The registered id; empty where there is none."""
    weights: dict[str, float]
    """The terms of the proxy, and their weights."""
    kl_coef: float | None
    """The env's beta, reward per nat; None where it pays no KL term."""
    num_texts: int
    """Sampled texts of the reference."""
    num_prompts: int
    without_gold: int
    """Sampled texts that were left out, because their gold is no number."""
    method: Method
    """How `optima`, and `best`, were found: from all texts, from all states, or from the sample."""
    optima: tuple[Point, ...]
    """The optima of proxy - beta KL along beta, by their KL; the first is the reference."""
    best_of_n: tuple[Point, ...]
    """The best of n texts of the reference by the proxy, always from the sample."""
    best: tuple[BestText, ...]
    """The best text by the proxy, and by gold where it is known; of all, or of the sample."""
    nulls: tuple[NullPolicy, ...]
    price: Price
    agreement: Agreement
    preservation: Preservation
    gold_spread: float | None
    """The deviation of gold among the reference's texts; None where gold is unknown."""
    has_score: bool
    """Whether texts have a sequence score."""
    cut: float
    """The share of the reference's texts that were cut."""
    scores_cut: bool
    """Whether a text that is cut is paid its score."""
    responds: bool
    """Whether the environment writes into texts."""
    hindsight: tuple[str, ...]
    """The terms that are placed when a text has ended."""
    reads_policy: tuple[str, ...]
    """The terms that read log pi, the KL term aside; they were given that of the reference."""
    optimal_objective: float | None
    """J* = max E[gold] - beta KL at the env's beta, where the task knows it."""

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """The findings in sentences."""
        return tuple(verdicts(self))

    @property
    def warnings(self) -> tuple[str, ...]:
        """The sentences on what speaks against the reward."""
        return tuple(verdict.sentence for verdict in self.verdicts if verdict.warns)

    @property
    def own_optimum(self) -> Point | None:
        """The optimum at the env's own beta; None where no point could be found there."""
        same = (point for point in self.optima if point.beta == self.kl_coef)
        return None if self.kl_coef is None else next(same, None)

    def tables(self) -> list[Table]:
        """Return the tables, for `rich`."""
        return [made_table(*table) for table in tables(self)]

    def markdown(self) -> str:
        """Return the tables and the sentences as a Markdown page."""
        return markdown(self)

    def picture(self) -> Any:
        """Return a matplotlib figure: gold and proxy against KL, and the price of length."""
        return picture(self)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data; numbers that are not finite are None."""
        values = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {**values, "verdicts": _plain(self.verdicts)}

    def save(self, folder: str | Path) -> None:
        """Write audit.md, audit.json and audit.png into a folder, which is made."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        page = (
            f"{self.markdown()}\n![Gold and proxy against KL, and the price of length](audit.png)\n"
        )
        (folder / "audit.md").write_text(page, encoding="utf-8")
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        (folder / "audit.json").write_text(f"{text}\n", encoding="utf-8")
        self.picture().savefig(folder / "audit.png", dpi=120)


def made_table(title: str, names: list[str], rows: list[list[str]]) -> Table:
    """Return a table for `rich`, whose cells are plain texts."""
    table = Table(*names, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return {"value": _plain(value.value), "error": _plain(value.error)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dict(_fields(value))
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(value):
        if not field.name.endswith("_R"):  # resamples
            yield field.name, _plain(getattr(value, field.name))
