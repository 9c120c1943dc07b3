"""The names that a source file imports from other packages, as dotted names. The source is read, never run.

This file knows Python's ways to reach a module's names. It does not know which names are public.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from importlib.util import resolve_name
from typing import cast

_REFERENCE = re.compile(r"([^\W\d][\w.]*):([^\W\d][\w.]*)")


def imported_names(source: str) -> Iterator[str]:
    """The dotted name of everything that a file imports, or reaches as an attribute of something imported.

    The search follows `import` and `from`, wherever they stand; attributes of the names that they bind, also under
    another name; `import_module` and `__import__` of a literal string; and literal strings "module:attribute", as specs
    name their code. It does not follow strings that are built at run time, `getattr`, or modules passed as arguments.
    """
    reader = _Reader()
    reader.read(ast.parse(source))
    return iter(reader.found)


class _Reader(ast.NodeVisitor):
    def __init__(self) -> None:
        self.found: list[str] = []
        # The names of the current scope that are bound to something imported, with its dotted name.
        self._bound: dict[str, str] = {}

    def read(self, scope: ast.AST, hidden: Iterable[str] = ()) -> None:
        """Read the nodes below a scope. The names in `hidden` are the scope's own and hide imported ones."""
        outside = self._bound
        self._bound = dict(outside)
        for name in hidden:
            self._bound.pop(name, None)
        # Imports are read first, because a function may stand above the import that it uses.
        for node in ast.walk(scope):
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._bound |= {bound: dotted for _, bound, dotted in _bindings(node)}
        self.generic_visit(scope)
        self._bound = outside

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.read(node, _own_names(node))

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self.read(node, _own_names(node))

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self.read(node, _own_names(node))

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [imported for imported, _, _ in _bindings(node)]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.found += [imported for imported, _, _ in _bindings(node)]

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if dotted := self._dotted(node):
            self.found.append(dotted)
        inner: ast.expr = node
        while isinstance(inner, ast.Attribute):
            inner = inner.value
        self.visit(inner)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        if dotted := self._dotted(node.value):
            self._bound |= {target.id: dotted for target in node.targets if isinstance(target, ast.Name)}

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        if module := self._module(node):
            self.found.append(module)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and (reference := _REFERENCE.fullmatch(node.value)):
            self.found.append(".".join(reference.groups()))

    def _dotted(self, node: ast.expr) -> str | None:
        if isinstance(node, ast.Name):
            return self._bound.get(node.id)
        if isinstance(node, ast.Attribute):
            base = self._dotted(node.value)
            return base and f"{base}.{node.attr}"
        if isinstance(node, ast.Call) and (module := self._module(node)):
            # `__import__("a.b")` gives a.
            return module.split(".")[0] if _is(node.func, "__import__") else module
        return None

    def _module(self, call: ast.Call) -> str | None:
        """The module that a call of `import_module` or `__import__` names, if it is a literal string."""
        if not _is(call.func, "__import__") and self._dotted(call.func) != "importlib.import_module":
            return None
        literals = [one.value for one in call.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
        given = {one.arg: one.value.value for one in call.keywords if isinstance(one.value, ast.Constant)}
        name = literals[0] if literals else given.get("name")
        package = literals[1] if len(literals) > 1 else given.get("package")
        if not isinstance(name, str) or (name.startswith(".") and not package):
            return None
        return resolve_name(name, cast(str | None, package))


def _bindings(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str, str]]:
    """(imported name, local name, dotted name that it stands for). Relative imports are skipped: they are internal."""
    if isinstance(node, ast.ImportFrom):
        for alias in node.names if node.level == 0 else ():
            imported = f"{node.module}.{alias.name}"
            yield imported, alias.asname or alias.name, imported
    else:
        for alias in node.names:
            top = alias.name.split(".")[0]
            yield alias.name, alias.asname or top, alias.name if alias.asname else top


def _own_names(function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> Iterator[str]:
    """The function's parameters, and the names that it assigns."""
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name


def _is(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name
