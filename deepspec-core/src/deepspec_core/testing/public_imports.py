"""Checks that a plugin imports only public names of core, and of the packages of other plugins.

The source is read, never run. A module's `__all__` defines which of its names are public (plugins/promised.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from deepspec_core.plugins.promised import plugin_packages, promised_names
from deepspec_core.testing.imported_names import imported_names

__all__ = ["check_public_imports"]


def check_public_imports(package: Path) -> None:
    """Check that the Python files under `package` take only public names of core and of other plugins' packages.

    `package` is the folder of a plugin's source. It must import something of core. Another plugin's package is one
    that contains an installed plugin. It promises names as core does, by `__all__` in a module. The module that its
    entry point names may be imported as a whole, for a suite.

    The check sees imports, also inside functions, attributes of imported modules, `import_module` and `__import__` of
    literal strings, and strings "module:attribute" as specs have them. It does not see names in strings that are built
    at run time, `getattr`, or attributes of modules that were passed to a function.
    """
    own = set(_own_packages(package))
    others = {name: modules for name, modules in plugin_packages().items() if name not in own}
    taken = list(_taken(package, others))
    assert any(_top(name) == "deepspec_core" for _, name in taken), f"nothing under {package} imports anything of core"
    public: dict[str, tuple[str, ...]] = {}
    for other in {_top(name) for _, name in taken}:
        public.update(dict.fromkeys(others[other], ()))
        public.update(promised_names(other))
    private = [f"{path}: {name}" for path, name in taken if not _is_public(name, public)]
    assert private == [], f"not public: {list(dict.fromkeys(private))}"


def _own_packages(package: Path) -> Iterator[str]:
    """The top-level packages and modules that the files under a folder belong to."""
    for path in package.rglob("*.py"):
        top = path if path.stem != "__init__" else path.parent
        while (top.parent / "__init__.py").exists():
            top = top.parent
        yield top.stem


def _taken(package: Path, others: dict[str, set[str]]) -> Iterator[tuple[Path, str]]:
    """The (file, dotted name) of every imported name that belongs to one of these packages."""
    for path in sorted(package.rglob("*.py")):
        for name in imported_names(path.read_text(encoding="utf-8")):
            if _top(name) in others:
                yield path.relative_to(package), name


def _is_public(name: str, public: dict[str, tuple[str, ...]]) -> bool:
    """Whether a dotted name is a public module, or leads to a public name of one."""
    parts = name.split(".")
    return name in public or any(
        parts[count] in public.get(".".join(parts[:count]), ()) for count in range(1, len(parts))
    )


def _top(name: str) -> str:
    return name.split(".")[0]
