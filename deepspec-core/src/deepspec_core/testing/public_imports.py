"""Checks that a plugin imports only public names of core.

Reads source and runs none of it. What is public is in plugins/public.py.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from deepspec_core.plugins.public import PUBLIC_MODULES, public_names

__all__ = ["check_public_imports"]


def check_public_imports(package: Path) -> None:
    """Check that the Python files under `package` import only public names of core, inside functions too.

    `package` is the folder of a plugin's source. It must import something of core.
    """
    imported = list(_imports(package))
    assert imported, f"nothing under {package} imports anything of deepspec_core"
    public = {module: {one.name for one in public_names(module)} for module in PUBLIC_MODULES}
    private = [
        f"{path.relative_to(package)}: {module}.{name}".rstrip(".")
        for path, module, name in imported
        if name not in public.get(module, ())
    ]
    assert private == [], f"not public: {private}"


def _imports(package: Path) -> Iterator[tuple[Path, str, str]]:
    """The (file, module, name) of every import from core. For `import deepspec_core.x` the name is empty."""
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deepspec_core":
                yield from ((path, node.module or "", alias.name) for alias in node.names)
            elif isinstance(node, ast.Import):
                inner = [alias.name for alias in node.names if alias.name.startswith("deepspec_core.")]
                yield from ((path, name, "") for name in inner)
