"""A new plugin package, written from the templates beside this file: checked names, a whole folder or none.

A template is a file whose name ends with .tmpl, with words like @NAME@ for what differs from package to package. Those
of `every_kind/` are in every package. Knows folders and names. Does not know what the templates say.
"""

from __future__ import annotations

import importlib.util
import keyword
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Final

from deepspec_core import __version__
from deepspec_core.errors import ConfigError, PluginError
from deepspec_core.plugins.registry import Registry

# What a new package is, and what its README says of its use.
KINDS: Final = {
    "draft": (
        "An algorithm of drafts for DeepSpec.",
        "`deepspec-run train.toml --smoke` trains it on the tiny target.",
    ),
    "loss": ("A loss term for DeepSpec.", "`[loss] terms = {@NAME@ = 1.0}` in a run file."),
    "weighting": ("A weighting of rows for DeepSpec.", '`[loss] weighting = {type = "@NAME@"}` in a run file.'),
    "target": ("A family of targets for DeepSpec.", "A run takes it for every target of its model types."),
    "cache": ("A feature cache format for DeepSpec.", '`[cache] format = "@NAME@"` in a run file.'),
    "task": ("An evaluation task for DeepSpec.", '`[evaluate] tasks = ["@NAME@"]` in a run file.'),
    "exporter": ("An export format for DeepSpec.", "`deepspec export CHECKPOINT --to @NAME@` writes a draft in it."),
    "command": ("A command of `deepspec`.", "`deepspec @NAME@ --help` says what it does."),
}
_TEMPLATES: Final = Path(__file__).parent / "templates"
_NAME: Final = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def write_package(kind: str, name: str, out: Path, *, registry: Registry, taken: set[str], algorithm: str = "") -> Path:
    """Write the package `deepspec-NAME` into the folder `out` and return its folder.

    `taken` are names of this kind that are in use. `algorithm` is the draft type that an exporter writes. ConfigError
    where a name is none, or the folder is there; PluginError where the name is taken.
    """
    _check_name(kind, name, taken, registry)
    package = f"deepspec_{name.replace('-', '_')}"
    folder = out / package.replace("_", "-")
    if os.path.lexists(folder):
        raise ConfigError(
            "the folder exists already", where=folder, fix="Choose another name, or another place with -o."
        )
    if not out.is_dir():
        raise ConfigError("no such folder", where=out, fix="Make it first, or choose another with -o.")
    words = _words(kind, name, package, algorithm)
    try:
        _write(kind, package, words, folder)
    except OSError as error:
        raise ConfigError(
            "the package cannot be written",
            where=folder,
            found=error.strerror or error,
            fix="Choose another name, or another place with -o.",
        ) from error
    return folder


def _write(kind: str, package: str, words: dict[str, str], folder: Path) -> None:
    """The whole folder or none. OSError too where another process has made one of this name meanwhile."""
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for template in sorted((*_TEMPLATES.glob("every_kind/*.tmpl"), *_TEMPLATES.glob(f"{kind}/*.tmpl"))):
            path = unfinished / _place(template.name.removesuffix(".tmpl"), package)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_filled(template.read_text(encoding="utf-8"), words), encoding="utf-8")
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _check_name(kind: str, name: str, taken: set[str], registry: Registry) -> None:
    if not _NAME.fullmatch(name) or keyword.iskeyword(name):
        raise ConfigError(
            "a plugin cannot have this name",
            where="NAME",
            found=name,
            expected="lower-case words of letters and digits, joined by dashes, the first character a letter",
        )
    if name in taken:
        # An exporter has a provider for each draft type, and a command none that the registry knows.
        own = None if kind in ("exporter", "command") else registry.provider(kind, name)
        raise PluginError(f"{kind} {name!r} is there already", where=own, fix="Choose another name.")
    package = f"deepspec_{name.replace('-', '_')}"
    if package in sys.modules or importlib.util.find_spec(package) is not None:
        raise PluginError(f"a package {package} is installed already", fix="Choose another name.")


def _words(kind: str, name: str, package: str, algorithm: str) -> dict[str, str]:
    about, use = KINDS[kind]
    major, minor = __version__.split(".")[:2]
    files = sorted(path.name.removesuffix(".tmpl") for path in (_TEMPLATES / kind).glob("*.py.tmpl"))
    own = [file for file in files if file not in ("plugin.py", "test.py")]
    listed = "\n".join(f"| `src/{package}/{file}` | {_said_by(kind, file)} |" for file in own)
    return {
        "USE": use,
        "FILES": listed,
        "ABOUT": about,
        "NAME": name,
        "ID": name.replace("-", "_"),
        "CLASS": "".join(part.capitalize() for part in name.split("-")),
        "PACKAGE": package,
        "DIST": package.replace("_", "-"),
        "CORE": f">={major}.{minor},<{major}.{int(minor) + 1}",
        "ALGORITHM": algorithm,
    }


def _said_by(kind: str, file: str) -> str:
    """The first sentence of a template's docstring."""
    first = (_TEMPLATES / kind / f"{file}.tmpl").read_text(encoding="utf-8").splitlines()[0]
    return first.strip('"').split(". ")[0].rstrip(".")


def _place(file: str, package: str) -> Path:
    if file == "test.py":
        return Path("tests") / f"test_{package.removeprefix('deepspec_')}.py"
    return Path("src") / package / file if file.endswith(".py") else Path(file)


def _filled(text: str, words: dict[str, str]) -> str:
    for word, value in words.items():
        text = text.replace(f"@{word}@", value)
    # A table without rows of its own leaves an empty line.
    return text.replace("|\n\n| `tests/`", "|\n| `tests/`")
