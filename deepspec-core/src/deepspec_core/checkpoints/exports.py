"""Writing a draft in an export format: a plugin's exporter is asked, watched, and gives a whole folder or none.

Knows exporters and the folder that one writes. Does not know runs or stages.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Final

from attrs import frozen

from deepspec_core.checkpoints.pickles import holds_pickle
from deepspec_core.config.paths import no_path
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.contracts.export import Exporter, ExportFacts
from deepspec_core.disk import no_room, why_not_writable
from deepspec_core.errors import DeepSpecError, ExportError, PluginError
from deepspec_core.locks import LOCK, lock
from deepspec_core.plugins.references import FAILURES, blame
from deepspec_core.plugins.registry import Registry

# What an unfinished folder's name has more than its final name.
_BESIDE: Final = 16


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
        if reason is not None and (not isinstance(reason, str) or not reason.strip()):
            raise PluginError(
                f"the export format {self.name} does not say whether it takes the draft",
                where=self.package,
                found=f"{reason!r:.80} from `unservable`",
                expected="the reason in words, or None (contracts.export.Exporter)",
            )
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
        else or writes a pickle, ExportError where it writes nothing or `out` came into being meanwhile. Nothing is left
        then. StageError where another process writes this export.
        """
        unfinished = out.absolute().with_name(f".{out.name}.partial")
        if os.path.lexists(unfinished) and not (unfinished / LOCK).is_file():
            raise ExportError(
                "the place where an export is prepared is taken by something else",
                where=unfinished,
                fix="Move it away.",
            )
        with lock(unfinished, problem="Another process writes this export", fix="Wait for it, or choose another name."):
            inner = unfinished / out.name
            try:
                shutil.rmtree(inner, ignore_errors=True)  # of a process that was killed
                inner.mkdir()
                self._write(draft, facts, inner)
                size = self._check_written(inner)
                _appear(inner, out.absolute())
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
        return size

    def _write(self, draft: DraftModel, facts: ExportFacts, folder: Path) -> None:
        before = Path.cwd()
        try:
            self.exporter.write(draft, facts, folder)
        except DeepSpecError:
            raise
        except FAILURES as error:
            if no_room(error) is not None:
                raise
            raise PluginError(f"the export to {self.name} failed", where=self.package, found=blame(error)) from error
        finally:
            moved = Path.cwd()
            os.chdir(before)
        if moved != before:
            raise PluginError(
                f"the export to {self.name} changed the current folder",
                where=self.package,
                found=moved,
                expected="the folder that the command was started in, because relative paths begin there",
            )

    def _check_written(self, folder: Path) -> int:
        beside = sorted(path.name for path in folder.parent.iterdir() if path != folder and path.name != LOCK)
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


def _appear(inner: Path, out: Path) -> None:
    try:
        inner.rename(out)
    except OSError as error:
        if not os.path.lexists(out):
            raise
        raise ExportError(
            "the export's folder came into being while the export was written",
            where=out,
            found=str(error.strerror),
            expected="nothing",
            fix="Choose another name.",
        ) from error


def links_in(folder: Path) -> list[str]:
    """The names of symbolic links in it, and of files that have a name outside it too: they change with that one."""
    paths = sorted(folder.rglob("*"))
    links = [path.name for path in paths if path.is_symlink()]
    files = [(path, path.stat()) for path in paths if path.is_file() and not path.is_symlink()]
    inside = Counter((about.st_dev, about.st_ino) for _, about in files)
    return links + [path.name for path, about in files if about.st_nlink > inside[about.st_dev, about.st_ino]]


def free_place(given: str, what: str) -> Path:
    """The path that `--out` gives, where a folder can be made. An error if not; `what` is to be written there."""
    problem = f"{what} cannot be written there"
    try:
        place = Path(given).expanduser()
    except RuntimeError as error:  # ~nobody
        raise ExportError(problem, where="--out", found=f"{given}: {error}") from error
    require_free(place, fix="Choose another with --out.")
    if (why := why_not_writable(place.parent)) is not None:
        raise ExportError(problem, where=place, found=why)
    return place


def require_free(out: Path, *, fix: str) -> None:
    """ConfigError if no folder can have this path, and ExportError if something is there already."""
    if (impossible := no_path("the folder to write", out, beside=_BESIDE)) is not None:
        raise impossible
    if os.path.lexists(out):
        kind = "a link" if out.is_symlink() else "a folder" if out.is_dir() else "a file"
        raise ExportError("the export's folder exists already", where=out, found=kind, expected="nothing", fix=fix)
