"""The file that regeneration writes.

Lines are appended one by one to a partial file, each with a checksum. A line that a kill tore in half is cut off, and
one that is not as it was written is dropped. At the end the lines are put in the order of the input, without their
checksums, under the final name. Knows lines and names of files; not how conversations are answered.
"""

from __future__ import annotations

import json
import logging
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Final

from deepspec_core.errors import DataError

log = logging.getLogger("deepspec")

# How a line of the partial file ends. The checksum is of the object without it. Earlier versions wrote none.
_CHECKSUM: Final = re.compile(rb', "crc32": "([0-9a-f]{8})"\}\n')
_CHECKSUM_BYTES: Final = len(b', "crc32": "01234567"}\n')
# The keys of a line that later steps read, with their types.
_FIELDS: Final = {
    "id": str,
    "messages": list,
    "output_ids": list,
    "finish_reason": str,
    "dropped_turns": int,
    "rewritten": list,
}
# Marks of lines of the side file that are no failures: the first answer met the token limit, or the first prompt leaves
# no room for an answer.
CUT: Final = "cut"
TOO_LONG: Final = "too_long"
MARKS: Final = (CUT, TOO_LONG)


def beside(out: Path, suffix: str) -> Path:
    """The file that stands next to `out` under its name and a suffix."""
    return out.with_name(out.name + suffix)


def write_line(file: IO[bytes], entry: dict[str, Any]) -> None:
    """Append one line, and hand it to the system at once."""
    file.write(_written(entry) + b"\n")
    file.flush()


def write_checked(file: IO[bytes], entry: dict[str, Any]) -> None:
    """The same for a line of the partial file, which has a checksum."""
    content = _written(entry)
    file.write(content[:-1] + b', "crc32": "%08x"}\n' % zlib.crc32(content))
    file.flush()


def _written(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _checked(line: bytes) -> bytes | None:
    """The line without its checksum; None where it is not as it was written."""
    found = _CHECKSUM.fullmatch(line[-_CHECKSUM_BYTES:])
    if found is None:
        return line
    content = line[:-_CHECKSUM_BYTES] + b"}"
    return content + b"\n" if zlib.crc32(content) == int(found[1], 16) else None


def _entries(path: Path, *, fix: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Offset and content of each line; raises DataError, saying `fix`, for one that regeneration did not write."""
    offset = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line.decode("utf-8", "surrogatepass"))
            except (ValueError, RecursionError) as error:
                raise DataError("A line is not JSON", where=f"{path}:{number}", found=error, fix=fix) from error
            if not _is_answered(entry):
                raise DataError(
                    "A line is not a regenerated conversation",
                    where=f"{path}:{number}",
                    found=repr(entry)[:80],
                    expected=f"an object with {', '.join(_FIELDS)}",
                    fix=fix,
                )
            yield offset, entry
            offset += len(line)


def _is_answered(entry: Any) -> bool:
    fits = isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in _FIELDS.items())
    last = entry["messages"][-1:] if fits else []
    if not last or not all(isinstance(message, dict) for message in entry["messages"]):
        return False
    return isinstance(last[0].get("content"), str)


def resume(partial: Path) -> dict[str, int]:
    """Ids already done and where their lines begin. A last line without its end, torn by a kill, is cut off.

    Lines that are not as they were written are removed, with a warning.
    """
    if not partial.exists():
        return {}
    content_end = damaged = 0
    with partial.open("rb+") as lines:
        for line in lines:
            if line.endswith(b"\n"):
                content_end += len(line)
                damaged += _checked(line) is None
        lines.truncate(content_end)
    if damaged:
        sound = beside(partial, ".sound")
        with partial.open("rb") as lines, sound.open("wb") as file:
            file.writelines(line for line in lines if _checked(line) is not None)
        os.replace(sound, partial)
        log.warning("%s: %d damaged lines were removed; their conversations are answered again", partial, damaged)
    entries = _entries(partial, fix="Remove that line; its conversation is regenerated.")
    return {entry["id"]: offset for offset, entry in entries}


def finish(partial: Path, out: Path, order: Sequence[str]) -> Counter[str]:
    """Write the lines in the order of the input under the final name, and return their counts.

    Raises DataError if lines belong to no conversation of the input, or there are none.
    """
    before = count_lines(partial)
    offsets = resume(partial)
    if count_lines(partial) < before:
        raise DataError(
            "The file of regenerated conversations is damaged",
            where=partial,
            found=f"{before - len(offsets)} damaged lines, which were removed",
            fix="Check the disk, and run again: the conversations of these lines are answered again.",
        )
    if unknown := offsets.keys() - set(order):
        raise DataError(
            "Some regenerated conversations are no longer in the sources",
            where=partial,
            found=f"{len(unknown)} of them, such as {min(unknown)}",
            fix="Restore the sources, or remove the file to start over.",
        )
    if not offsets:
        raise DataError("No conversation was regenerated", where=out, fix="Check data.sources and their split.")
    ordered = beside(out, ".ordered")
    with partial.open("rb") as lines, ordered.open("wb") as file:
        for identity in order:
            if identity in offsets:
                lines.seek(offsets[identity])
                line = _checked(lines.readline())
                assert line is not None, "lines were checked a moment ago"
                file.write(line)
        file.flush()
        os.fsync(file.fileno())
    tally = tally_of(ordered)
    os.replace(ordered, out)
    partial.unlink()
    return tally


def tally_of(path: Path) -> Counter[str]:
    """What a finished file holds, summed up for the report."""
    tally: Counter[str] = Counter()
    for _, entry in _entries(path, fix="Remove the file; its conversations are regenerated."):
        tally["conversations"] += 1
        tally["output_tokens"] += len(entry["output_ids"])
        tally["unfinished"] += entry["finish_reason"] == "length"
        tally["empty"] += not entry["messages"][-1]["content"]
        tally["dropped_turns"] += entry["dropped_turns"]
        tally["rerendered_answers"] += len(entry["rewritten"])
        tally["mismatched_answers"] += entry.get("mismatched", 0)
        tally["replayed_results"] += sum(message.get("role") == "tool" for message in entry["messages"])
        tally["skipped_results"] += entry.get("skipped_results", 0)
    return tally


def count_lines(path: Path) -> int:
    """How many lines a file has, none where it is not there."""
    return sum(1 for _ in path.open("rb")) if path.exists() else 0


def counted(failures: Path) -> Counter[str]:
    """The lines of the side file by their mark, and those without one as "failures"."""
    entries = _side_lines(failures)
    return Counter(next((mark for mark in MARKS if entry.get(mark)), "failures") for entry in entries)


def cut_answers(failures: Path) -> dict[str, dict[str, Any]]:
    """The lines of the side file that are marked as CUT, by id.

    These conversations were answered, so a rerun does not ask them again. It looks at all others again.
    """
    return {
        entry["id"]: entry for entry in _side_lines(failures) if entry.get(CUT) and isinstance(entry.get("id"), str)
    }


def _side_lines(failures: Path) -> Iterator[dict[str, Any]]:
    """What the lines say; nothing of one that was torn by a kill or damaged, whose conversation is looked at again."""
    for line in failures.open("rb") if failures.exists() else ():
        try:
            entry = json.loads(line.decode("utf-8", "surrogatepass"))
        except (ValueError, RecursionError):
            entry = {}
        yield entry if isinstance(entry, dict) else {}
