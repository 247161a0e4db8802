"""Single functions of a library's source file, without what the file imports.

A trainer's formulas are plain tensor code in files that import its whole machinery. What is looked
at here is read from the file itself, so it is the published code, and the machinery need not be
installed.
"""

import ast
import os
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenenv.errors import InvalidArgument

PLAIN_IMPORTS = {
    *("torch", "numpy", "math", "collections", "itertools", "functools"),
    *("enum", "textwrap", "typing"),
}
"""Modules that a file's own import statements are carried out for; all others are left out."""
KEPT_DECORATORS = ("staticmethod", "classmethod", "property", "torch.no_grad()")
"""Decorators that stay. Others register a function somewhere, or compile it."""


def functions_of(path: str | os.PathLike[str], **given: Any) -> SimpleNamespace:
    """Run the top-level functions, classes and plain constants of a Python file, and return them.

    Annotations, decorators and base classes from elsewhere are left out, and definitions that
    cannot do without something from elsewhere. This runs code of the file: take files of libraries
    that you would import.

    Args:
        path: the file.
        **given: what its functions use from elsewhere, by the names that they use.

    Raises:
        InvalidArgument: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise InvalidArgument(f"path={str(path)!r} is not a file.")
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    names: dict[str, Any] = {"__name__": path.stem, **given}
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom) and _plain(node):
            _run(node, path, names)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            with suppress(NameError):
                _run(_Bare(set(names)).visit(node), path, names)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            _run(node, path, names)
    names.update(given)
    return SimpleNamespace(**{name: value for name, value in names.items() if name[:2] != "__"})


def _plain(node: ast.Import | ast.ImportFrom) -> bool:
    if isinstance(node, ast.ImportFrom):
        return not node.level and (node.module or "").split(".")[0] in PLAIN_IMPORTS
    return all(alias.name.split(".")[0] in PLAIN_IMPORTS for alias in node.names)


def _run(node: ast.stmt, path: Path, names: dict[str, Any]) -> None:
    module = ast.fix_missing_locations(ast.Module([node], []))
    exec(compile(module, str(path), "exec"), names)


class _Bare(ast.NodeTransformer):
    """Takes annotations away, and decorators, base classes and imports that are not known."""

    def __init__(self, known: set[str]) -> None:
        self.known = known

    def visit_FunctionDef(self, node: Any) -> Any:
        self.generic_visit(node)
        node.returns, node.decorator_list = None, _kept(node.decorator_list)
        return node

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.generic_visit(node)
        node.decorator_list, node.keywords = [], []
        node.bases = [one for one in node.bases if _root(one) in self.known]
        return node

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> ast.stmt:
        return node if _plain(node) else ast.Pass()

    visit_ImportFrom = visit_Import

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt:
        if node.value is None:
            return ast.Pass()
        return ast.Assign([node.target], self.generic_visit(node.value))  # type: ignore[arg-type]


def _kept(decorators: list[ast.expr]) -> list[ast.expr]:
    return [one for one in decorators if ast.unparse(one) in KEPT_DECORATORS]


def _root(node: ast.expr) -> str:
    """The first name of `a.b(c)`."""
    while isinstance(node, ast.Attribute | ast.Call):
        node = node.value if isinstance(node, ast.Attribute) else node.func
    return node.id if isinstance(node, ast.Name) else ""
