"""The rows of a dataset on the Hub at a commit that does not move, for evaluation tasks that plugins offer.

Knows how to fetch and what to say when that fails. Does not know what a row holds; data.sources reads the Hub by
itself (source_rows.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deepspec_core.errors import DataError
from deepspec_core.hub import say_local_copy, why_unreachable

__all__ = ["hub_rows"]


def hub_rows(
    dataset: str, *, revision: str, split: str, config: str | None = None, files: Sequence[str] = ()
) -> Iterator[Mapping[str, Any]]:
    """The rows of a split, in the dataset's order.

    `files` are JSON-lines files of the repository, read one after the other in place of a split: for repositories that
    are no dataset as a whole. What was fetched once is read without a network. Raises DataError if it cannot be
    fetched.
    """
    import datasets
    from huggingface_hub import hf_hub_download

    problem = why_unreachable()
    try:
        if files:
            paths = [hf_hub_download(dataset, name, repo_type="dataset", revision=revision) for name in files]
            rows = datasets.load_dataset("json", data_files=paths, split="train")
        else:
            rows = datasets.load_dataset(dataset, config, split=split, revision=revision)
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            "A dataset of the Hub cannot be read",
            where=f"{dataset}, revision {revision[:12]}",
            found=problem or f"{type(error).__name__}: {error}",
            expected=", ".join(files) or f"its split {split!r}",
            fix="Check the connection. Without one, give the task a file of the same rows: NAME:FILE.",
        ) from error
    say_local_copy(dataset)
    yield from rows
