"""Reads and checks the file of one answer. Nothing in a server's file is trusted.

The format is safetensors. The file is read into this process's memory: a mapped file could still be truncated by its
writer. Knows one file and what it should hold; does not know where it is, or who wrote it.

Legend: T tokens, K states of a token (the taps and the final one), H hidden size.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from attrs import frozen
from torch import Tensor

from deepspec_core.cache.quantize import decode
from deepspec_core.features.finite import all_finite
from deepspec_core.features.served.answer_place import BadAnswer, told
from deepspec_core.features.served.layers import AskedLayers
from deepspec_core.servers.connection import Kind

_IDS: Final = {"I32": torch.int32, "I64": torch.int64}
_FLOATS: Final = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_FLOAT8: Final = "F8_E4M3"
_LONGEST_HEADER: Final = 1 << 20
_NORMED: Final = {"true": True, "false": False, None: None}


@frozen(kw_only=True, eq=False)
class States:
    """What a server computed of one text.

    states: [T, K, H], as the engine orders them, in the type they were stored in; bfloat16 where that is float8.
    stored: The type they were stored in, as [cache] dtype names it.
    normed: Whether the final state is after the target's last norm; None if the file does not say so.
    size: Bytes of the file.
    """

    states: Tensor
    stored: str
    normed: bool | None
    size: int


def read_states(file: BinaryIO, place: Path, *, ids: Tensor, layers: AskedLayers, hidden_size: int) -> States:
    """The states of the text `ids` [T]. BadAnswer, with the reason, if the file does not hold them."""
    entries, said, start, size = _header(file, place)
    sent_T = ids.to(torch.int64)
    found_T = _tensor(file, place, entries, "token_ids", _IDS, start, size, (len(ids),)).to(torch.int64)
    if not torch.equal(found_T, sent_T):
        at = int(torch.nonzero(found_T != sent_T)[0])
        raise BadAnswer(
            "A server read other token ids than it was sent",
            where=f"{place}: token_ids[{at}]",
            found=int(found_T[at]),
            expected=int(sent_T[at]),
            fix="The states are of another text. Look at the server's log.",
        )
    if said.get("layers") is not None and _numbers(said["layers"]) != list(layers.ids):
        raise _other_layers(place, told(said["layers"]), layers)
    if said.get("normed") not in _NORMED:
        raise _damaged(place, f"normed = {told(said['normed'])}", "true or false")
    shape = (len(ids), len(layers.ids), hidden_size)
    stated = entries.get("hidden_states", {}).get("shape")
    if isinstance(stated, list) and len(stated) == 3 and stated[1] != shape[1]:
        raise _other_layers(place, f"{told(stated[1])} states a token", layers)
    if entries.get("hidden_states", {}).get("dtype") == _FLOAT8:
        stored = "float8_e4m3"
        bits = _tensor(file, place, entries, "hidden_states", {_FLOAT8: torch.uint8}, start, size, shape)
        scales_TK = _tensor(file, place, entries, "hidden_states_scale", _FLOATS, start, size, shape[:2]).float()
        if not all_finite(scales_TK) or bool((scales_TK <= 0).any()):
            raise _damaged(place, "a scale that is not a positive number", "positive scales")
        states = decode(bits.flatten(1).numpy(), scales_TK.numpy(), stored).view(shape)
    else:
        states = _tensor(file, place, entries, "hidden_states", _FLOATS, start, size, shape)
        stored = str(states.dtype).removeprefix("torch.")
    if not all_finite(states):
        token, column, channel = torch.nonzero(~torch.isfinite(states))[0].tolist()
        raise BadAnswer(
            "A state is not finite",
            where=f"{place}: token {token}, {layers.name(column)}, channel {channel}",
            found=float(states[token, column, channel]),
            expected="a finite number",
            fix="Let the server write a wider type, or look at its weights.",
        )
    return States(states=states, stored=stored, normed=_NORMED[said.get("normed")], size=size)


def _numbers(text: object) -> object:
    try:
        return json.loads(str(text))
    except (ValueError, RecursionError):
        return None


def _header(file: BinaryIO, place: Path) -> tuple[dict[str, Any], Mapping[str, Any], int, int]:
    """The entries by name, the metadata, where the data begin, and the file's size."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    begin = file.read(8)
    length = struct.unpack("<Q", begin)[0] if len(begin) == 8 else size
    if length > min(size - 8, _LONGEST_HEADER):
        raise _damaged(place, f"{size:,} bytes, with a header of {length:,}", "a whole safetensors file")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise _damaged(place, f"a header that is no JSON ({error})", "a safetensors file") from error
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise _damaged(place, f"the header {told(header)}", "a safetensors file")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(place, f"the metadata {told(metadata)}", "metadata of texts alone")
    return header, metadata, 8 + length, size


def _tensor(
    file: BinaryIO,
    place: Path,
    entries: Mapping[str, Mapping[str, Any]],
    name: str,
    dtypes: Mapping[str, torch.dtype],
    start: int,
    size: int,
    shape: tuple[int, ...],
) -> Tensor:
    """A tensor of the file, if it is of this shape and one of these types. Nothing is read of one that is not."""
    entry = entries.get(name)
    if entry is None:
        raise _damaged(place, f"tensors {told(list(entries))}", f"a tensor {name}")
    stated = entry.get("dtype")
    dtype = dtypes.get(stated) if isinstance(stated, str) else None
    if entry.get("shape") != list(shape) or dtype is None:
        raise BadAnswer(
            f"A server's {name} are of another shape or type",
            where=place,
            found=f"{told(entry.get('shape'))}, {told(stated)}",
            expected=f"{list(shape)}, {' or '.join(dtypes)}",
            fix="Look at the server's log, and at what it was started with.",
        )
    offsets: Any = entry.get("data_offsets")
    count = math.prod(shape) * dtype.itemsize
    whole = isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets)
    if not whole or offsets[0] < 0 or offsets[1] - offsets[0] != count:
        raise _damaged(place, f"{name} at {told(offsets)}", f"{count:,} bytes")
    held = max(0, min(count, size - start - offsets[0]))
    if held < count:
        raise _damaged(place, f"{held:,} of {count:,} bytes of {name}", "a whole file")
    data = torch.empty(count, dtype=torch.uint8)
    file.seek(start + offsets[0])
    got, view = 0, memoryview(data.numpy())  # type: ignore[arg-type]
    while got < count and (more := file.readinto(view[got:])):  # type: ignore[attr-defined]
        got += more
    if got < count:
        raise _damaged(place, f"{got:,} of {count:,} bytes of {name}", "a whole file")
    return data.view(dtype).view(shape)


def _damaged(place: Path, found: str, expected: str) -> BadAnswer:
    return BadAnswer(
        "A server's file is damaged",
        where=place,
        found=found,
        expected=expected,
        fix="Look at the room on the exchange folder's disk, and at the server's log.",
    )


def _other_layers(place: Path, found: str, layers: AskedLayers) -> BadAnswer:
    return BadAnswer(
        "A server gives other layers than this run asks for",
        kind=Kind.WRONG,
        where=place,
        found=found,
        expected=f"{len(layers.ids)} states a token, of the engine's layers {list(layers.ids)}",
        fix="Start the server for this run file: `deepspec serve`. Engines count layer L of target.layers as L + 1.",
    )
