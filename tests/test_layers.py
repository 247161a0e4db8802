"""Who imports whom, when, and what an import of the package costs."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (
    {"errors", "types", "turns", "safety", "plugins", "ranks"},
    {"models", "tables", "prompts"},
    {"rewards"},
    {"env"},
    {"wrappers", "check"},
    {"envs"},
    {"agents", "registration"},
    {
        "cli",
        "integrations",
        "rollout",
        "fit",
        "audit",
        "bench",
        "report",
        "conformance",
        "__init__",
    },
)
"""Each room imports itself and those above it in this list..."""
AGENTS_IMPORT = {"errors", "types", "turns", "safety", "plugins", "ranks"}
AGENTS_IMPORT |= {"models", "tables", "agents"}
"""...except that agents know the env through its spaces alone."""
AGENT_LAYERS = (
    {"config", "episodes", "hooks"},
    {"learning"},
    {"rollout"},
    {"run"},
    {"agent", "keywords"},
    {"algorithms"},
    {"__init__"},
)
"""The same within `agents/`."""
OPTIONAL = {
    "vllm",
    "stable_baselines3",
    "sb3_contrib",
    "ray",
    "peft",
    "datasets",
    "llguidance",
    "wandb",
}
SUBCLASSING = {"tokenenv.integrations.sb3": {"stable_baselines3"}}
"""Whose classes derive from another package's: imported only by those who have it, and never by the
package itself."""


PLACES = {"vllm": 2}
"""In how many files an optional package is imported where it is not one: of vLLM there is what asks
it, and what writes with it, perhaps in a process of its own."""


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Module names, as installed, and their code."""
    for folder, package in (
        ("tokenenv", "tokenenv"),
        ("agents", "tokenenv.agents"),
        ("envs", "tokenenv.envs"),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *parts]), ast.parse(path.read_text(encoding="utf-8"))


def imports(module: str, nodes: Iterable[ast.AST]) -> Iterator[str]:
    """What the code of `module` imports, relative imports resolved; `from a import b` counts as a
    and as a.b."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, node.module] if node.module else package)
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))


def rank(layers: tuple[set[str], ...], name: str) -> int:
    """The number of the layer that a room is in."""
    return next(number for number, names in enumerate(layers) if name in names)


def allowed(importer: str, imported: str) -> bool:
    (room, *inside), (other, *others) = importer.split(".")[1:], imported.split(".")[1:]
    if room == "agents" and other not in AGENTS_IMPORT:
        return False
    if room == other == "agents" and inside and others:
        known = set().union(*AGENT_LAYERS)
        if others[0] in known and inside[0] in known:
            return rank(AGENT_LAYERS, others[0]) <= rank(AGENT_LAYERS, inside[0])
    return other.startswith("_") or rank(LAYERS, other) <= rank(LAYERS, room)


def when_run(tree: ast.AST) -> Iterator[ast.AST]:
    """The code that runs: all but what is imported for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from when_run(node)


def violations(module: str, tree: ast.AST) -> set[str]:
    """The imports of `module` that go the wrong way. The bare package is nobody's layer; its names
    have theirs."""
    ours = {name for name in imports(module, when_run(tree)) if name.startswith("tokenenv.")}
    return {
        f"{module} imports {name}" for name in ours if "." in module and not allowed(module, name)
    }


@pytest.mark.parametrize(
    ("module", "code", "wrong"),
    [
        ("tokenenv.rewards.new", "from tokenenv.env.vector_env import TokenVectorEnv", True),
        ("tokenenv.rewards.new", "from tokenenv import env", True),
        ("tokenenv.models.new", "from ..rewards import term", True),
        ("tokenenv.types", "def f():\n    import tokenenv.prompts", True),
        ("tokenenv.env.vector_env", "from tokenenv.envs.tasks.reviews import task", True),
        ("tokenenv.env.new", "from tokenenv.wrappers import ActionMask", True),
        ("tokenenv.envs.new", "from tokenenv.agents import PPO", True),
        ("tokenenv.agents.new", "from tokenenv.prompts import load_prompts", True),
        ("tokenenv.agents.learning.new", "from tokenenv.agents.rollout.actor import Actor", True),
        ("tokenenv.agents.run.new", "from tokenenv.agents.algorithms.ppo import PPO", True),
        (
            "tokenenv.agents.run.new",
            "if TYPE_CHECKING:\n    from tokenenv.agents.agent import Agent",
            False,
        ),
        (
            "tokenenv.agents.new",
            "from tokenenv.types import Task\nfrom .policy import LMPolicy\nimport torch",
            False,
        ),
        (
            "tokenenv.envs.new",
            "from .bundled import bundled_lm\nfrom tokenenv.rewards.rule import Rule",
            False,
        ),
        (
            "tokenenv.cli",
            "from tokenenv.agents import PPO\nfrom tokenenv import __version__",
            False,
        ),
    ],
)
def test_wrong_directions_are_seen(module, code, wrong):
    assert bool(violations(module, ast.parse(code))) == wrong


def test_imports_go_one_way():
    found = dict(sources())
    assert {
        "tokenenv.env.vector_env",
        "tokenenv.agents.algorithms.ppo",
        "tokenenv.envs.textgen",
        "tokenenv.rewards.term",
    } <= set(found)
    rooms = {name.split(".")[2] for name in found if name.startswith("tokenenv.agents.")}
    assert rooms == set().union(*AGENT_LAYERS)
    assert set().union(*(violations(module, tree) for module, tree in found.items())) == set()


def optional(module: str, nodes: Iterable[ast.AST]) -> set[str]:
    return {name.split(".")[0] for name in imports(module, nodes)} & OPTIONAL


def outside_functions(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef):
            yield node
            yield from outside_functions(node)


def test_each_optional_package_is_imported_in_one_file_and_inside_functions():
    found = list(sources())
    for package in OPTIONAL:
        assert len(
            [module for module, tree in found if package in optional(module, ast.walk(tree))]
        ) <= PLACES.get(package, 1), package
    assert {module: optional(module, outside_functions(tree)) for module, tree in found} == {
        module: SUBCLASSING.get(module, set()) for module, _ in found
    }
    assert [
        f"{module} imports {name}"
        for module, tree in found
        for name in imports(module, ast.walk(tree))
        if name in SUBCLASSING
    ] == []


def test_an_optional_package_outside_functions_is_seen():
    tree = ast.parse("class A:\n    import peft\n    def f(self):\n        from ray import tune")
    assert optional("tokenenv.new", ast.walk(tree)) == {"peft", "ray"}
    assert optional("tokenenv.new", outside_functions(tree)) == {"peft"}


def run(code: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120
    )


def test_importing_the_package_is_quick_and_loads_no_model_code(tmp_path):
    code = """
import sys, time
start = time.process_time()
import torch
between = time.process_time()
import tokenenv
print((time.process_time() - between) / (between - start))
print(*sys.modules)
"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    beside_torch, modules = done.stdout.splitlines()
    loaded = modules.split()
    assert float(beside_torch) < 1.0
    assert "tokenenv.registration" in loaded
    assert [name for name in loaded if name.startswith("transformers.models.")] == []
    assert OPTIONAL & set(loaded) == set()


@pytest.mark.parametrize("folder", ["agents", "envs"])
def test_a_folder_of_the_repository_does_not_pass_for_a_package(folder):
    done = run(f"import sys; sys.path.insert(0, '.'); import {folder}", ROOT)
    assert done.returncode == 1
    assert (
        f"ImportError: import tokenenv.{folder}; the repository root is on sys.path" in done.stderr
    )
