"""`deepspec data prepare`: writes a run's conversations once, as its stages would read them, with counts.

Knows [data] of a run file. Needs no target: steps that depend on a tokenizer or a chat template are left to the run.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import attrs
from attrs import frozen

from deepspec_core.config.schema import BUILTIN
from deepspec_core.data.bad_rows import BadRows
from deepspec_core.data.prepared import FILES, FORMAT, MANIFEST, VERSION, check_prepared, is_prepared, line_of
from deepspec_core.data.source_digest import source_digest
from deepspec_core.data.sources import check_sources, read_sources, split_of
from deepspec_core.data.split import Split
from deepspec_core.digests import digests_of
from deepspec_core.disk import full_disk_is_an_error, why_not_writable
from deepspec_core.errors import DataError
from deepspec_core.evaluation.tasks import HELD_OUT_QUOTA
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.run_data import BAD_ROWS
from deepspec_core.progress import Progress

# Keys of a manifest that do not describe the conversations.
_BESIDE = ("plugins",)


@frozen(kw_only=True)
class Prepared:
    """Where the conversations lie, what was done, and how many of each split were read, dropped and kept."""

    folder: Path
    action: Literal["written", "replaced", "unchanged"]
    counts: Mapping[Split, Counter[str]]
    bad_rows: Path | None


def prepare(run: Run, folder: Path, *, force: bool = False) -> Prepared:
    """Write the conversations of the run's sources into `folder`: `train.jsonl`, `held-out.jsonl`, `manifest.json`.

    They are complete under that name, or not there. A folder with the same content stays as it is. With `force`,
    prepared conversations that differ are replaced; anything else is never. Raises DataError if the folder holds
    something else, a source cannot be read, has too many bad rows, or changes meanwhile, and where nothing is left to
    train on.
    """
    _refuse_other(folder)
    check_sources(run.file.data.sources, base=run.base, registry=run.plugins.registry)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    with full_disk_is_an_error(folder.parent):
        try:
            partial.mkdir(parents=True)
            counts = _write(run, partial)
            action = _put(partial, folder, force=force)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    kept = folder / BAD_ROWS
    return Prepared(folder=folder, action=action, counts=counts, bad_rows=kept if kept.exists() else None)


def _write(run: Run, folder: Path) -> dict[Split, Counter[str]]:
    data, digests = run.file.data, _digests(run)
    counts: dict[Split, Counter[str]] = {}
    for split, name in FILES.items():
        counts[split] = Counter()
        # Both passes meet the same bad rows; those of training are kept.
        bad_rows = BadRows(most=data.max_bad_rows, keep_in=folder / BAD_ROWS if split == "train" else None)
        conversations = read_sources(
            data.sources,
            split=split,
            held_out=data.held_out,
            seed=run.file.run.seed,
            base=run.base,
            registry=run.plugins.registry,
            counts=counts[split],
            bad_rows=bad_rows,
            duplicates=data.duplicates,
        )
        with (folder / name).open("wb") as file, Progress(None, f"prepare {name}", "conversations") as progress:
            for conversation in islice(conversations, _most_held_out(run) if split == "held_out" else None):
                file.write(line_of(conversation))
                progress.advance()
            file.flush()
            os.fsync(file.fileno())
        bad_rows.finish()
    if not counts["train"]["conversations"]:
        raise DataError(
            "There is no conversation to train on", where=f"{run.path}: data.sources", fix="Add data to the sources."
        )
    if _digests(run) != digests:
        raise DataError(
            "A source changed while it was read",
            where=f"{run.path}: data.sources",
            expected="files that do not change while the command reads them",
            fix="Run the command again.",
        )
    _write_manifest(run, folder, counts, digests)
    return counts


def _most_held_out(run: Run) -> int | None:
    """As many as evaluation asks, where a plugin makes prompts: it may hold out more than anybody wants to wait for."""
    if any(source.path.startswith(BUILTIN) for source in run.file.data.sources):
        return run.file.evaluate.limit or HELD_OUT_QUOTA
    return None


def _digests(run: Run) -> list[str | None]:
    return [source_digest(source, base=run.base, ask_hub=True) for source in run.file.data.sources]


def _write_manifest(run: Run, folder: Path, counts: dict[Split, Counter[str]], digests: list[str | None]) -> None:
    data, paths = run.file.data, [folder / name for name in FILES.values()]
    files = zip(FILES.items(), digests_of(paths, remembered=False), strict=True)
    sources = zip(data.sources, digests, strict=True)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "files": {
            name: {"conversations": counts[split]["conversations"], "digest": digest} for (split, name), digest in files
        },
        "split": split_of(data.sources, base=run.base, held_out=data.held_out, seed=run.file.run.seed),
        "duplicates": data.duplicates,
        "counts": {split: dict(+count) for split, count in counts.items()},
        "sources": [{**attrs.asdict(source), "digest": digest} for source, digest in sources],
        "plugins": run.plugins.versions(),
    }
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(json.dumps(manifest, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _refuse_other(folder: Path) -> None:
    """Raise DataError if something else has the folder's name: that is never replaced."""
    there = os.path.lexists(folder)
    if there and (folder.is_symlink() or not folder.is_dir() or (any(folder.iterdir()) and not is_prepared(folder))):
        raise DataError(
            "Prepared conversations cannot be written to this folder",
            where=folder,
            found="something else",
            expected="prepared conversations, an empty folder, or nothing",
            fix="Choose another folder with --out.",
        )
    if (reason := why_not_writable(folder.parent)) is not None:
        raise DataError("Prepared conversations cannot be written to this folder", where=folder, found=reason)


def _put(partial: Path, folder: Path, *, force: bool) -> Literal["written", "replaced", "unchanged"]:
    if not folder.exists() or not any(folder.iterdir()):
        os.replace(partial, folder)
        return "written"
    if _same(partial, folder):
        return "unchanged"
    if not force:
        changed = _differences(partial, folder)
        raise DataError(
            "The folder holds other prepared conversations",
            where=folder,
            found=f"other {', '.join(changed)}" if changed else f"files that differ from {MANIFEST}",
            expected="the conversations that this command would write",
            fix="Replace them with --force, or choose another folder with --out.",
        )
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old)
    return "replaced"


def _same(one: Path, other: Path) -> bool:
    try:
        check_prepared(other)
    except DataError:
        return False
    return not _differences(one, other)


def _differences(new: Path, old: Path) -> list[str]:
    """The keys of the manifests that differ, but for those that do not matter."""
    now, before = _manifest(new), _manifest(old)
    return [key for key in sorted({*now, *before}) if now.get(key) != before.get(key)]


def _manifest(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return {key: value for key, value in content.items() if key not in _BESIDE}
