"""Writing a draft in an export format: a plugin's exporter is asked, watched, and gives a whole folder or none.

Knows exporters and the folder that one writes. Does not know runs or stages.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

from attrs import frozen

from deepspec_core.checkpoints.pickles import holds_pickle
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.contracts.export import Exporter, ExportFacts
from deepspec_core.disk import no_room
from deepspec_core.errors import DeepSpecError, ExportError, PluginError
from deepspec_core.plugins.references import FAILURES, blame
from deepspec_core.plugins.registry import Registry

# File systems take names of 255 bytes.
_LONGEST_NAME, _SHOWN = 240, 60


@frozen(kw_only=True)
class Format:
    """An export format of one algorithm, and the package that offers it."""

    name: str
    package: str
    exporter: Exporter

    @classmethod
    def of(cls, name: str, algorithm: str, registry: Registry) -> Format:
        """PluginError where no plugin offers the format for the algorithm, or what it offers is no exporter."""
        build = registry.load("exporter", name, algorithm=algorithm)
        package = registry.provider("exporter", name, algorithm=algorithm)
        try:
            made = build()
        except FAILURES as error:
            raise PluginError(f"the export format {name} cannot be built", where=package, found=blame(error)) from error
        if not isinstance(made, Exporter):
            raise PluginError(
                f"the export format {name} does not make an exporter",
                where=package,
                found=type(made).__name__,
                expected="an object from `build()` with `unservable` and `write` (contracts.export.Exporter)",
            )
        return cls(name=name, package=package, exporter=made)

    def check(self, facts: ExportFacts, *, where: str) -> None:
        """ExportError where the engine cannot serve such a draft. `where` is the key or the option that asks for it."""
        try:
            reason = self.exporter.unservable(facts)
        except DeepSpecError:
            raise
        except FAILURES as error:
            raise PluginError(
                f"the export format {self.name} failed to check the draft",
                where=self.package,
                found=blame(error),
            ) from error
        if reason is not None:
            raise ExportError(
                f"the draft cannot be exported to {self.name}",
                where=where,
                found=reason,
                fix="Change the draft's options, or choose another format: `deepspec plugins` lists them.",
            )

    def write(self, draft: DraftModel, facts: ExportFacts, out: Path) -> int:
        """Write the folder `out`, which is not there yet, and return its bytes.

        What is written gets this name when all of it is there. PluginError where the exporter fails or writes anywhere
        else or writes a pickle, ExportError where it writes nothing. Nothing is left then.
        """
        unfinished = out.with_name(f".{out.name}.partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        inner = unfinished / out.name
        inner.mkdir(parents=True)
        try:
            self._write(draft, facts, inner)
            size = self._check_written(inner)
            inner.rename(out)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return size

    def _write(self, draft: DraftModel, facts: ExportFacts, folder: Path) -> None:
        try:
            self.exporter.write(draft, facts, folder)
        except DeepSpecError:
            raise
        except FAILURES as error:
            if no_room(error) is not None:
                raise
            raise PluginError(f"the export to {self.name} failed", where=self.package, found=blame(error)) from error

    def _check_written(self, folder: Path) -> int:
        beside = sorted(path.name for path in folder.parent.iterdir() if path != folder)
        links = links_in(folder)
        if beside or links or not folder.is_dir():
            raise PluginError(
                f"the export to {self.name} must consist of files in its own folder",
                where=self.package,
                found=", ".join([*(f"{name} beside it" for name in beside), *(f"{name}, a link" for name in links)])
                or "the folder is gone",
                expected="files in the folder that `write` receives, and nowhere else",
            )
        files = [path for path in folder.rglob("*") if path.is_file()]
        if not files:
            raise ExportError(
                f"the export to {self.name} wrote nothing", where=self.package, expected="files of a draft"
            )
        pickled = sorted(path.relative_to(folder).as_posix() for path in files if holds_pickle(path))
        if pickled:
            raise PluginError(
                f"the export to {self.name} contains pickles, which may run any code when they are loaded",
                where=self.package,
                found=", ".join(pickled),
                expected="files such as safetensors and JSON, which can be loaded without trust",
            )
        return sum(path.stat().st_size for path in files)


def links_in(folder: Path) -> list[str]:
    """The names of symbolic links in it, and of files that have a name outside it too: they change with that one."""
    paths = sorted(folder.rglob("*"))
    links = [path.name for path in paths if path.is_symlink()]
    files = [(path, path.stat()) for path in paths if path.is_file() and not path.is_symlink()]
    inside = Counter((about.st_dev, about.st_ino) for _, about in files)
    return links + [path.name for path, about in files if about.st_nlink > inside[about.st_dev, about.st_ino]]


def require_free(out: Path, *, fix: str) -> None:
    """ExportError where something is in the place of an export, or its name is too long for a file system."""
    size = len(os.fsencode(out.name))
    if size > _LONGEST_NAME:
        raise ExportError(
            "the folder's name is too long",
            where=f"{out.name[:_SHOWN]}...",
            found=f"{size} bytes",
            expected=f"at most {_LONGEST_NAME} bytes: the folder has a longer name while it is written",
            fix=fix,
        )
    if os.path.lexists(out):
        kind = "a link" if out.is_symlink() else "a folder" if out.is_dir() else "a file"
        raise ExportError("the export's folder exists already", where=out, found=kind, expected="nothing", fix=fix)
