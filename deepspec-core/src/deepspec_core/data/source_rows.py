"""The rows of one source: prompts a plugin ships, a file, a dataset folder, a dataset of the Hub.

Knows how to find a source and read its rows. Does not know what a row has to hold, splits, or other sources.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from deepspec_core.config.schema import BUILTIN, ROW_FILES, SourceOptions
from deepspec_core.data.columns import ColumnMap
from deepspec_core.data.folder_files import require_all_read
from deepspec_core.data.parquet_rows import parquet_columns
from deepspec_core.data.prepared import check_prepared, is_prepared, prepared_rows
from deepspec_core.data.row_files import PARQUET, read_rows
from deepspec_core.data.shipped_prompts import Registry, offered_prompts, shipped_rows
from deepspec_core.data.source_row import MOST_BYTES, SourceRow
from deepspec_core.data.split import Split
from deepspec_core.data.table_rows import BATCH_ROWS, rows_of_table
from deepspec_core.errors import DataError, nearest
from deepspec_core.hub import say_local_copy, why_unreachable

# The files that `save_to_disk` writes into a folder.
_SAVED: Final = ("dataset_dict.json", "dataset_info.json")
# The readers of `datasets` that yield a file's rows unchanged.
_OF_ROWS: Final = ("json", "parquet")


def has_splits(source: SourceOptions, base: Path) -> bool:
    """Whether the source itself decides which conversations are held out."""
    return source.path.startswith(BUILTIN) or is_prepared(base / source.path)


def rows_of(
    source: SourceOptions, split: Split, *, seed: int, base: Path, registry: Registry, own: bool = False
) -> Iterator[SourceRow]:
    """Every row of the source, lazily; where the source `has_splits`, the rows of this `split`.

    `own`: the source is what this project wrote itself, where a row may have any length.

    Raises DataError if the source is missing or cannot be read. A row that cannot be read has an error of its own.
    """
    if source.path.startswith(BUILTIN):
        columns = columns_of(source).read
        yield from shipped_rows(source.path, split, seed=seed, registry=registry, columns=columns)
    elif _is_file(source, base):
        yield from _file(base / source.path, None if own else MOST_BYTES, columns_of(source).read)
    elif is_prepared(base / source.path):
        yield from prepared_rows(base / source.path, split)
    else:
        yield from _dataset(source, base)


def check_source(source: SourceOptions, *, base: Path, registry: Registry) -> None:
    """Raise DataError if the source is not there, or known to lack a column that it names.

    No row is read; of a Hub dataset only what describes it is.
    """
    if source.path.startswith(BUILTIN):
        offered_prompts(source.path, registry)
    elif _is_file(source, base):
        if not (base / source.path).is_file():
            raise _missing(base / source.path)
        if source.columns and source.path.endswith(PARQUET):
            columns_of(source).check(parquet_columns(base / source.path))
    elif is_prepared(base / source.path):
        check_prepared(base / source.path)
    else:
        dataset = _open_dataset(source, base, look_only=True)
        if source.columns:
            columns_of(source).check(_columns_known(dataset))


def columns_of(source: SourceOptions) -> ColumnMap:
    """The source's own names for the parts of a conversation."""
    return ColumnMap(source.columns, f"columns of {source.path}")


def _columns_known(dataset: Any) -> tuple[str, ...] | None:
    """The names of the columns of a dataset or of its builder, where they are known before rows are read."""
    features = getattr(dataset, "features", None) or dataset.info.features
    return None if features is None else tuple(features)


def on_hub(source: SourceOptions, base: Path) -> bool:
    """Whether reading the source means asking the Hub."""
    return not (source.path.startswith(BUILTIN) or source.path.endswith(ROW_FILES) or (base / source.path).is_dir())


def hub_commit(source: SourceOptions, base: Path) -> str:
    """The commit of a dataset on the Hub that is read; offline, that of the local copy."""
    commit: str = _open_dataset(source, base, look_only=True).hash
    return commit


def _is_file(source: SourceOptions, base: Path) -> bool:
    """Whether the source's name is that of a file of rows. Some programs write folders under such names."""
    return source.path.endswith(ROW_FILES) and not (base / source.path).is_dir()


def _file(path: Path, most_bytes: int | None, columns: Collection[str]) -> Iterator[SourceRow]:
    if not path.is_file():
        raise _missing(path)
    yield from read_rows(path, most_bytes=most_bytes, columns=columns)


def _missing(path: Path) -> DataError:
    folder = path.parent
    if folder.is_dir():
        close = nearest(path.name, [entry.name for entry in folder.iterdir()])
        fix = f"Is {close!r} meant?" if close else None
    else:
        fix = f"The folder {folder} does not exist either."
    return DataError("A source of conversations is missing", where=path, expected="a file or a folder", fix=fix)


def _dataset(source: SourceOptions, base: Path) -> Iterator[SourceRow]:
    """A dataset folder, or a dataset on the Hub.

    The files of a folder are read here where they can be: `datasets` ends at the first row that it cannot read.
    """
    files, columns = _files_of_rows(source, base), columns_of(source).read
    for file in files:
        yield from _file(file, MOST_BYTES, columns)
    if files:
        return
    tables = _open_dataset(source, base).with_format("arrow").iter(batch_size=BATCH_ROWS)
    number = 0
    while True:
        with _dataset_errors(source):
            table = next(tables, None)
        if table is None:
            return
        names = table.schema.names
        read = table.select([index for index, name in enumerate(names) if name in columns])
        yield from rows_of_table(read, names, place=f"{source.path}:", before=number, most_bytes=None)
        number += table.num_rows


def _files_of_rows(source: SourceOptions, base: Path) -> list[Path]:
    """The files of a folder's split, as `datasets` finds them; empty where it is needed to read them too."""
    local = base / source.path
    if not local.is_dir() or any((local / name).is_file() for name in _SAVED):
        return []
    builder = _open_dataset(source, base, look_only=True)
    paths = [str(path) for path in (builder.config.data_files or {}).get(source.split or "train", ())]
    plain = builder.name in _OF_ROWS and getattr(builder.config, "field", None) is None
    return list(map(Path, paths)) if plain and all(path.endswith(ROW_FILES) for path in paths) else []


def _open_dataset(source: SourceOptions, base: Path, *, look_only: bool = False) -> Any:
    """Its rows, lazily. `look_only`: of what is not saved yet only its builder, no rows. DataError either way.

    A folder is streamed: a copy that `datasets` keeps is told by the files' times only, and may be of older content. A
    dataset of the Hub is streamed where only a part of it is wanted.
    """
    local = base / source.path
    if local.is_file():
        raise DataError(
            "A source is neither a file of rows nor a dataset folder",
            where=local,
            expected=f"a name ending in {', '.join(ROW_FILES)}",
        )
    if not local.is_dir() and (source.path.count("/") != 1 or source.path.startswith((".", "/", "~"))):
        raise _missing(local)
    import datasets

    split = source.split or "train"
    problem = None if local.is_dir() else why_unreachable()
    with _dataset_errors(source, problem):
        if (local / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(str(local))[split]
            _require_inside(local, {split: [file["filename"] for file in rows.cache_files]})
        elif (local / "dataset_info.json").is_file():
            rows = datasets.load_from_disk(str(local))
            _require_inside(local, {split: [file["filename"] for file in rows.cache_files]})
        else:
            name = str(local) if local.is_dir() else source.path
            if look_only or local.is_dir():
                builder = datasets.load_dataset_builder(name)
                if local.is_dir():
                    _require_inside(local, builder.config.data_files or {})
                    require_all_read(local, builder.config.data_files or {}, split)
                if look_only:
                    return builder
            rows = datasets.load_dataset(name, split=split, streaming=local.is_dir() or source.limit is not None)
    if not local.is_dir():
        say_local_copy(source.path)
    return rows


def _require_inside(folder: Path, files: Mapping[str, Iterable[str]]) -> None:
    """Raise DataError if a dataset folder names data that lies elsewhere: nobody would see it change."""
    root = os.path.abspath(folder)
    for path in (path for paths in files.values() for path in paths):
        if not os.path.abspath(path).startswith(root + os.sep):
            raise DataError(
                "A dataset folder names data outside the folder",
                where=folder,
                found=path,
                expected="files in that folder",
                fix="Put the files there, or name them in data.sources themselves.",
            )


@contextmanager
def _dataset_errors(source: SourceOptions, problem: str | None = None) -> Iterator[None]:
    """Raise DataError for what `datasets` raises. `problem` is a better reason, where one is known."""
    import datasets

    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            "A dataset cannot be read",
            where=f"data.sources: {source.path}",
            found=problem or f"{type(error).__name__}: {error}",
            expected=f"split {source.split or 'train'!r} of a dataset folder or of a dataset on the Hub",
            fix="Check the name, the split and the connection. If one row is the cause, or without a "
            "connection, download the "
            "dataset and give its folder: rows of JSON and Parquet files that cannot be read are then left out.",
        ) from error
