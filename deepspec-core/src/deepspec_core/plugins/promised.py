"""What packages promise to others: the names in `__all__` of their modules, read from source.

A module without `__all__` promises nothing. This holds for core and for every package that a plugin is in. Knows
packages and the entry points of plugins. Imports nothing of them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from deepspec_core.errors import PluginError
from deepspec_core.plugins.discovery import GROUP


def plugin_packages() -> dict[str, set[str]]:
    """The installed packages that plugins are in, core among them, with the modules that their entry points name."""
    packages = {"deepspec_core": set[str]()}
    for entry in entry_points(group=GROUP):
        packages.setdefault(entry.module.split(".")[0], set()).add(entry.module)
    return packages


@cache
def promised_names(package: str) -> Mapping[str, tuple[str, ...]]:
    """The package's modules that have `__all__`, by name, with the names in it. PluginError where it cannot be read."""
    found = {}
    for module, path in _modules(package):
        text = path.read_text(encoding="utf-8")
        # Most files have none, and parsing all of a package takes seconds.
        for statement in ast.parse(text).body if "__all__" in text else ():
            if isinstance(statement, ast.Assign) and any(map(_is_all, statement.targets)):
                found[module] = _literal(statement.value, module)
    return found


def _modules(package: str) -> Iterator[tuple[str, Path]]:
    spec = find_spec(package)
    if spec is None:
        raise PluginError("a package is not installed", where=package)
    for folder in map(Path, spec.submodule_search_locations or ()):
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path
    if not spec.submodule_search_locations and spec.origin:
        yield package, Path(spec.origin)


def _is_all(target: ast.expr) -> bool:
    return isinstance(target, ast.Name) and target.id == "__all__"


def _literal(value: ast.expr, module: str) -> tuple[str, ...]:
    try:
        return tuple(ast.literal_eval(value))
    except (TypeError, ValueError):
        raise PluginError(
            "`__all__` cannot be read from source",
            where=module,
            found=ast.unparse(value),
            expected="a list of names, each a literal string",
        ) from None
