"""How the code of a checkout is built, and how fast it steps: the figures to compare before and
after a change of layout.

    python benchmarks/house.py                     # this checkout
    python benchmarks/house.py --against ../base   # another one beside it, in the same run

The tables show, for each checkout: modules and lines by folder; the functions that one plain step
and one PPO update enter; comments in the files that everything passes through; what there is to
learn before one writes a reward design; and steps per second. Everything that imports the package
runs in a process of its own, one a checkout, and the processes are timed in turns, so that
whatever else the machine does falls on both alike. A checkout needs no installation.
"""

import argparse
import ast
import io
import json
import re
import statistics
import subprocess
import sys
import time
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"tokenenv": "tokenenv", "tokenenv.agents": "agents", "tokenenv.envs": "envs"}
"""Where each package lies in a checkout."""
HOT = {
    "engine": ["engine"],
    "scoring": ["scoring"],
    "caches": ["cached_lm", "slot_cache"],
    "collector": ["collector"],
    "learner": ["learner"],
    "staleness": ["staleness"],
}
"""The files through which every token passes, by the stems of their names."""
REWARD_TYPES = ("Transitions", "States", "FinishedTexts")
"""What a reward term is given to read, beside what it sets and defines (`RewardTerm`)."""
NO_COMMENT = re.compile(r"#\s*(noqa|type:|ruff:|fmt:)|#!")
"""Comments that speak to a tool."""
IDS = ("tokenenv/Negation-v0", "tokenenv/Reviews-v0")
N, STEPS = 64, 200
Figures = dict[str, dict[str, Any]]
"""Sections of rows, each with one figure."""


class Finder:
    """Finds the packages of one checkout, ahead of the installed ones."""

    def __init__(self, checkout: Path) -> None:
        self.folders = {package: checkout / folder for package, folder in PACKAGES.items()}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The place of one of the packages; what is inside them is found from there."""
        folder = self.folders.get(name)
        if folder is None:
            return None
        return spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


class Source:
    """One module's lines."""

    def __init__(self, path: Path) -> None:
        self.path, self.text = path, path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)
        self.lines = len(self.text.splitlines())
        tokens = list(tokenize.generate_tokens(io.StringIO(self.text).readline))
        self.comments = sum(
            token.type == tokenize.COMMENT and not NO_COMMENT.match(token.string)
            for token in tokens
        )
        self.code = len(lines_of_code(tokens) - lines_of_docs(self.tree))


def lines_of_code(tokens: list[tokenize.TokenInfo]) -> set[int]:
    """The lines that hold more than a comment or nothing."""
    empty = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE}
    empty |= {tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    return {
        line
        for token in tokens
        if token.type not in empty
        for line in range(token.start[0], token.end[0] + 1)
    }


def lines_of_docs(tree: ast.Module) -> set[int]:
    """The lines of docstrings, those of attributes included."""
    return {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }


def sources(checkout: Path) -> list[Source]:
    """Every module of the three packages."""
    return [
        Source(path)
        for folder in PACKAGES.values()
        for path in sorted((checkout / folder).rglob("*.py"))
    ]


def layout(checkout: Path, modules: list[Source]) -> Figures:
    """Modules and lines of code by folder, and the longest modules."""
    paths = [module.path.relative_to(checkout) for module in modules]
    named = [path for path in paths if path.name != "__init__.py"]
    counts = Counter(str(path.parent) for path in named)
    longest = sorted(modules, key=lambda module: -module.lines)[:5]
    return {
        "modules in each folder, __init__ not counted": dict(sorted(counts.items())),
        "size": {
            "modules": len(named),
            "lines": sum(module.lines for module in modules),
            "lines of code (no docstring, comment, blank)": sum(m.code for m in modules),
            "README, words": len((checkout / "README.md").read_text(encoding="utf-8").split()),
        },
        "the longest modules, lines": {
            f"{place}": f"{module.path.relative_to(checkout)} {module.lines}"
            for place, module in enumerate(longest, 1)
        },
    }


def comments(modules: list[Source]) -> Figures:
    """Lines with a comment for every 100 lines of code."""

    def density(chosen: list[Source]) -> str:
        code = sum(module.code for module in chosen)
        found = sum(module.comments for module in chosen)
        return f"{100 * found / code:.1f} ({found} in {code})" if code else "no such file"

    parts = {
        name: [module for module in modules if module.path.stem in stems]
        for name, stems in HOT.items()
    }
    return {
        "comments per 100 lines of code": {
            "everything": density(modules),
            **{name: density(chosen) for name, chosen in parts.items()},
        }
    }


def concepts(checkout: Path, modules: list[Source]) -> Figures:
    """The public names of the classes that a reward design meets, and those that the example
    uses."""
    classes = {
        node.name: node
        for module in modules
        if module.path.parent.name == "rewards"
        for node in module.tree.body
        if isinstance(node, ast.ClassDef) and node.name in ("RewardTerm", *REWARD_TYPES)
    }
    surface = {f"{name}, public names": len(set(public(node))) for name, node in classes.items()}
    example = used_names(ast.parse((checkout / "examples" / "custom_reward.py").read_text()))
    return {
        "to learn for a reward design": surface
        | {"all of them": sum(surface.values())}
        | {f"examples/custom_reward.py {what}": text(names) for what, names in example.items()}
        | {"examples/custom_reward.py, together": sum(map(len, example.values()))}
    }


def text(names: set[str]) -> str:
    """How many there are, and which."""
    return f"{len(names)}: {', '.join(sorted(names))}"


def public(node: ast.ClassDef) -> Iterator[str]:
    """The fields, class attributes and methods without a leading underscore."""
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
        elif isinstance(statement, ast.FunctionDef):
            name = statement.name
        else:
            continue
        if not name.startswith("_"):
            yield name


def used_names(tree: ast.Module) -> dict[str, set[str]]:
    """What the example's class imports of tokenenv.rewards, sets, defines, and reads of what it is
    given."""
    made = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.bases)
    methods = [
        node
        for node in made.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]
    arguments = (argument.arg for method in methods for argument in method.args.args)
    given = set(arguments) - {"self"}
    return {
        "imports": {
            alias.name
            for node in tree.body
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tokenenv.rew")
            for alias in node.names
        },
        "sets": {
            target.id
            for node in made.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        },
        "defines": {method.name for method in methods},
        "reads": {
            node.attr
            for method in methods
            for node in ast.walk(method)
            if isinstance(node, ast.Attribute) and root_of(node) in given
        },
    }


def root_of(node: ast.expr) -> str | None:
    """The name that a chain of attributes begins with."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


class Calls:
    """The functions of a checkout that are entered while this is active."""

    def __init__(self, checkout: Path) -> None:
        self.folders = tuple(f"{checkout / folder}/" for folder in PACKAGES.values())
        self.entered: set[CodeType] = set()

    def __enter__(self) -> "Calls":
        sys.setprofile(self._event)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)

    def _event(self, frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(self.folders):
            self.entered.add(frame.f_code)

    def __str__(self) -> str:
        named = {code for code in self.entered if not code.co_name.startswith("<")}
        return f"{len(named)} in {len({code.co_filename for code in named})} files"


class Worker:
    """The half that imports the package of one checkout: it answers one request a line, in JSON."""

    def __init__(self, checkout: Path) -> None:
        sys.meta_path.insert(0, Finder(checkout))
        import torch

        import tokenenv

        assert Path(tokenenv.__file__).is_relative_to(checkout), tokenenv.__file__
        torch.set_num_threads(1)
        self.checkout = checkout
        self.runs: dict[str, Callable[[], None]] = {}

    def answer(self, request: str, argument: str) -> Any:
        """`entered` and nothing, or `seconds` and the id to step."""
        return self.entered() if request == "entered" else self.seconds(argument)

    def entered(self) -> dict[str, str]:
        """What one plain step enters, and one PPO update with the writing of its texts."""
        return {f"one step of {id.split('/')[1]}": str(self.step_calls(id)) for id in IDS} | {
            "one PPO update, its texts written and learned from": str(self.update_calls())
        }

    def envs(self, id: str, num_envs: int = N, **options: Any) -> Any:
        """An env that has been reset."""
        import gymnasium as gym

        made = gym.make_vec(id, num_envs=num_envs, **options)
        made.reset(seed=0)
        return made

    def actions(self, envs: Any, steps: int) -> Any:
        """Random tokens (steps, N), none of which ends a text."""
        import numpy as np

        spec = envs.unwrapped.token_spec
        going_on = np.setdiff1d(np.arange(spec.vocab_size), spec.stop_token_ids)
        return np.random.default_rng(0).choice(going_on, (steps, envs.num_envs))

    def step_calls(self, id: str) -> Calls:
        """The third step of a text, in which no text ends: the first ones also make buffers."""
        envs = self.envs(id)
        first, second, third = self.actions(envs, 3)
        envs.step(first)
        envs.step(second)
        with Calls(self.checkout) as calls:
            envs.step(third)
        return calls

    def update_calls(self) -> Calls:
        """From the end of an agent's first update to the end of its second."""
        from tokenenv.agents import PPO

        calls, updates = Calls(self.checkout), 0

        def count(*_: object) -> None:
            nonlocal updates
            updates += 1
            calls.__enter__() if updates == 1 else calls.__exit__()

        envs = self.envs(IDS[0], num_envs=8, autoreset_mode="SameStep")
        agent = PPO(envs, seed=0, batch_tokens=64, minibatches=2, epochs=1)
        agent.learn(10**6, on_update=lambda *_: (count(), updates == 2 and agent.stop()))
        return calls

    def seconds(self, id: str) -> float:
        """Return the CPU time of `STEPS` steps, resets included. With one thread it is the wall
        time on an idle machine, and on a busy one it is far steadier."""
        if id not in self.runs:
            self.runs[id] = self.stepping(id)
            self.runs[id]()
        started = time.process_time()
        self.runs[id]()
        return time.process_time() - started

    def stepping(self, id: str) -> Callable[[], None]:
        """A call that steps the same tokens from the same prompts on."""
        envs = self.envs(id, autoreset_mode="SameStep")
        actions = self.actions(envs, STEPS)

        def run() -> None:
            envs.reset(seed=0)
            for action in actions:
                envs.step(action)

        return run


class Process:
    """A `Worker` of its own process."""

    def __init__(self, checkout: Path) -> None:
        command = [sys.executable, __file__, "--worker", str(checkout)]
        self.pipe = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, request: str, argument: str = "") -> Any:
        """The worker's answer."""
        assert self.pipe.stdin is not None
        assert self.pipe.stdout is not None
        print(json.dumps([request, argument]), file=self.pipe.stdin, flush=True)
        line = self.pipe.stdout.readline()
        if not line:
            raise SystemExit(f"the process for {self.pipe.args!r} has failed: see above")
        return json.loads(line)


def work(checkout: Path) -> None:
    """Answers the requests on standard input."""
    answers, sys.stdout = sys.stdout, sys.stderr
    worker = Worker(checkout)
    for line in sys.stdin:
        print(json.dumps(worker.answer(*json.loads(line))), file=answers, flush=True)


def speed(processes: list[Process], repetitions: int) -> list[Figures]:
    """Steps per second of each process, and its ratio to the first one: medians of repetitions
    that take turns."""
    found: list[dict[str, list[float]]] = [{id: [] for id in IDS} for _ in processes]
    for _ in range(repetitions):
        for id in IDS:
            for process, seconds in zip(processes, found, strict=True):
                seconds[id].append(process.ask("seconds", id))
    title = f"steps per second of CPU, N = {N}, median of {repetitions} (quartiles)"
    return [{title: rates(found[0], seconds)} for seconds in found]


def rates(first: dict[str, list[float]], seconds: dict[str, list[float]]) -> dict[str, str]:
    """Rows for each id: steps/s, and how many times those of the first checkout.

    The ratio is taken within each turn, where both ran under the same load, and then its median:
    on a machine that others use, it is far steadier than the ratio of two medians.
    """
    rows = {}
    for id, values in seconds.items():
        name = id.split("/")[1]
        rows[name] = spread([STEPS / s for s in values], ",.1f")
        if seconds is not first:
            ratios = [a / b for a, b in zip(first[id], values, strict=True)]
            rows[f"{name}, times the first"] = spread(ratios, ".3f")
    return rows


def spread(values: list[float], form: str) -> str:
    """Their median and the quartiles around it."""
    if len(values) < 2:
        return format(values[0], form)
    low, middle, high = (format(value, form) for value in statistics.quantiles(values, n=4))
    return f"{middle} ({low} to {high})"


def show(checkouts: list[Path], figures: list[Figures]) -> None:
    """One table a section, one column a checkout."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    for section in figures[0]:
        table = Table("", *map(str, checkouts), title=section, title_justify="left")
        rows = dict.fromkeys(name for found in figures for name in found[section])
        for name in rows:
            table.add_row(name, *(str(found[section].get(name, "")) for found in figures))
        console.print(table)


def main() -> None:
    """Measures this checkout, or the one named, and the one it is compared with."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkout", type=Path, default=ROOT, help="default: this file's own")
    parser.add_argument("--against", type=Path, metavar="PATH", help="a checkout to show beside it")
    parser.add_argument("--repetitions", type=int, default=15, help="of the timing; 0: none")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker)
        return
    checkouts = [path.resolve() for path in (args.against, args.checkout) if path]
    processes = [Process(checkout) for checkout in checkouts]
    figures: list[Figures] = []
    for checkout, process in zip(checkouts, processes, strict=True):
        modules = sources(checkout)
        figures.append(
            layout(checkout, modules)
            | {"functions of its own entered": process.ask("entered")}
            | comments(modules)
            | concepts(checkout, modules)
        )
    if args.repetitions:
        for found, timed in zip(figures, speed(processes, args.repetitions), strict=True):
            found |= timed
    show(checkouts, figures)


if __name__ == "__main__":
    main()
