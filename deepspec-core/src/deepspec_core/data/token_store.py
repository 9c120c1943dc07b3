"""A run's tokenised conversations on disk: shards that count once they are whole, and a manifest that says of what.

A shard is written beside its name, synced, renamed, and entered in the manifest; only then do its conversations count
as done. What was made from something else, or by another version, is made anew; damage is told, and what stands before
it is kept. Knows folders, manifests and checksums; not what the facts in `made_from` mean.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import xxhash
from attrs import asdict, evolve, field, frozen
from attrs.validators import instance_of, matches_re

from deepspec_core.config.bounds import whole
from deepspec_core.contracts.draft import Sample
from deepspec_core.data.stored_samples import StoredSamples
from deepspec_core.data.token_shards import NewTokenShard, open_shard
from deepspec_core.digests import digest_of
from deepspec_core.disk import sync
from deepspec_core.errors import DataError
from deepspec_core.json_files import read_object
from deepspec_core.locks import lock

log = logging.getLogger("deepspec")

MANIFEST: Final = "manifest.json"
FORMAT: Final = "deepspec-tokens"
VERSION: Final = 1
# A shard ends with the conversation that brings it there: about 10 MB of tokens, or so many short samples.
SHARD_TOKENS: Final = 1 << 21
SHARD_SAMPLES: Final = 1 << 15
_LARGEST: Final = 2**63 - 1


@frozen(kw_only=True)
class StoredShard:
    """A whole shard. `conversations` and `counts` are of all conversations up to its end, dropped ones too."""

    file: str = field(validator=[instance_of(str), matches_re(r"tokens-\d+\.arrow")])
    bytes: int = field(validator=whole(1, _LARGEST))
    xxh3: str = field(validator=[instance_of(str), matches_re("[0-9a-f]{32}")])
    samples: int = field(validator=whole(1, _LARGEST))
    conversations: int = field(validator=whole(1, _LARGEST))
    counts: dict[str, int] = field(validator=instance_of(dict))


@frozen(kw_only=True)
class Manifest:
    """What was stored of what. `counts` are those of a whole store; None while conversations are missing."""

    made_from: Mapping[str, Any]
    shards: tuple[StoredShard, ...] = ()
    counts: dict[str, int] | None = None


Make = Callable[[Manifest], Iterable[tuple[list[Sample], Counter[str]]]]


class TokenStore:
    """A folder that holds the samples made from `made_from`, facts that JSON can say; nothing yet, or part of them."""

    def __init__(self, folder: Path, made_from: Mapping[str, Any]) -> None:
        self.folder = folder
        self.made_from: dict[str, Any] = json.loads(json.dumps(made_from))

    def ready(self) -> tuple[StoredSamples, Counter[str]] | None:
        """The samples and the counts of a whole, undamaged store of just these facts, else None. Says nothing."""
        found, _ = self._read()
        if found.counts is None or next(self._damage(found.shards), None) is not None:
            return None
        return StoredSamples([self.folder / shard.file for shard in found.shards]), Counter(found.counts)

    def of_other_facts(self) -> list[str] | None:
        """The names of the facts that differ, where the store is whole and was made from others; else None."""
        try:
            content = read_object(self.folder / MANIFEST, kind=DataError)
        except (FileNotFoundError, DataError):
            return None
        made_from = content.get("made_from")
        if content.get("counts") is None or not isinstance(made_from, dict) or made_from == self.made_from:
            return None
        return _changed(self.made_from, made_from)

    def fill(self, make: Make, read: Counter[str], check: Callable[[], None]) -> None:
        """Store the missing samples. Damage in the store is a warning. Raises StageError if another process is writing
        it.

        `make` gives the samples of every conversation that the manifest it gets does not have, with the counts up to
        there. `read` is what was counted of all conversations when the last one has come. `check` is called before a
        shard counts, and raises an error where it must not.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with lock(
            self.folder,
            problem="Another process is storing this run's tokens",
            fix="Wait for it, stop it, or give this run another run.output.",
        ):
            manifest, why = self._read()
            if why is not None:
                log.warning("the tokens in %s are made again: %s", self.folder, why)
            for kept, problem in self._damage(manifest.shards):
                log.warning("%s. This shard and the following ones are made again", problem)
                manifest = evolve(manifest, shards=manifest.shards[:kept], counts=None)
                break
            if manifest.counts is None:
                self._fill(manifest, make, read, check)

    def _fill(self, manifest: Manifest, make: Make, read: Counter[str], check: Callable[[], None]) -> None:
        self._save(manifest)
        sealed = {shard.file for shard in manifest.shards}
        for leftover in self.folder.glob("tokens-*"):
            if leftover.name not in sealed:
                leftover.unlink()
        waiting, counts = NewTokenShard(), Counter[str]()
        done = manifest.shards[-1].conversations if manifest.shards else 0
        for samples, counts in make(manifest):
            for sample in samples:
                waiting.append(sample)
            done += 1
            if waiting.tokens >= SHARD_TOKENS or len(waiting) >= SHARD_SAMPLES:
                check()
                manifest = self._seal(manifest, waiting, done, counts)
                waiting = NewTokenShard()
        check()
        if len(waiting):
            manifest = self._seal(manifest, waiting, done, counts)
        last = counts or Counter(manifest.shards[-1].counts if manifest.shards else {})
        self._save(evolve(manifest, counts=dict(last + read)))

    def _seal(self, manifest: Manifest, samples: NewTokenShard, done: int, counts: Counter[str]) -> Manifest:
        path = self.folder / f"tokens-{len(manifest.shards):05d}.arrow"
        partial = path.with_name(path.name + ".partial")
        samples.write(partial)
        os.replace(partial, path)
        sync(self.folder)
        shard = StoredShard(
            file=path.name,
            bytes=path.stat().st_size,
            xxh3=digest_of(path),
            samples=len(samples),
            conversations=done,
            counts=dict(counts),
        )
        manifest = evolve(manifest, shards=(*manifest.shards, shard))
        self._save(manifest)
        return manifest

    def _save(self, manifest: Manifest) -> None:
        content = {
            "made_from": manifest.made_from,
            "shards": [asdict(shard) for shard in manifest.shards],
            "counts": manifest.counts,
        }
        whole_ = {"format": FORMAT, "version": VERSION, "digest": _digest(content), **content}
        temporary = self.folder / f"{MANIFEST}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(whole_, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / MANIFEST)
        sync(self.folder)

    def _read(self) -> tuple[Manifest, str | None]:
        """The manifest, or an empty one with the reason why the one that is there does not count."""
        empty = Manifest(made_from=self.made_from)
        try:
            content = read_object(self.folder / MANIFEST, kind=DataError)
        except FileNotFoundError:
            return empty, None
        except DataError as error:
            return empty, f"{MANIFEST} cannot be read ({error.found})"
        if (content.get("format"), content.get("version")) != (FORMAT, VERSION):
            return empty, f"they are of version {content.get('version')}, and this is version {VERSION}"
        parts = {key: content.get(key) for key in ("made_from", "shards", "counts")}
        if content.get("digest") != _digest(parts):
            return empty, f"{MANIFEST} is damaged"
        made_from: dict[str, Any] = parts["made_from"] or {}
        if made_from != self.made_from:
            return empty, "changed since: " + ", ".join(_changed(self.made_from, made_from))
        try:
            shards = tuple(StoredShard(**shard) for shard in parts["shards"] or ())
        except (TypeError, ValueError) as error:
            return empty, f"{MANIFEST} is damaged ({error})"
        return Manifest(made_from=made_from, shards=shards, counts=parts["counts"]), None

    def _damage(self, shards: Sequence[StoredShard]) -> Iterator[tuple[int, str]]:
        """What is wrong with shards, in words, each with the number of shards before it. Every byte is read."""
        for index, shard in enumerate(shards):
            if (problem := _problem(self.folder / shard.file, shard)) is not None:
                yield index, f"A shard of the stored tokens is damaged: {self.folder / shard.file}: {problem}"


def _changed(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    return [key for key in {**now, **before} if now.get(key) != before.get(key)]


def _problem(path: Path, shard: StoredShard) -> str | None:
    if path.is_symlink() or not path.is_file():
        return "it is missing"
    if (size := path.stat().st_size) != shard.bytes:
        return f"{size:,} bytes, expected {shard.bytes:,}"
    try:
        if (digest := digest_of(path)) != shard.xxh3:
            return f"checksum {digest}, expected {shard.xxh3}"
        found = len(open_shard(path).starts) - 1
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None if found == shard.samples else f"{found} samples, expected {shard.samples}"


def _digest(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
