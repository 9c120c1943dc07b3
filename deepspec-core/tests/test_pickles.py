"""A file with a pickle in it is recognised in any protocol and wrapping; weights and texts are not taken for one."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from deepspec_core.checkpoints.pickles import holds_pickle

SAID: dict[str, Any] = {"loss": 0.1, "names": [1, "x", None]}


class Runs:
    """Unpickling it calls a function."""

    def __reduce__(self) -> Any:
        return (len, ("x",))


def saved(how: Any, *given: Any, **more: Any) -> bytes:
    file = io.BytesIO()
    how(file, *given, **more)
    return file.getvalue()


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner", content)
    return file.getvalue()


def torch_saved(**how: Any) -> bytes:
    file = io.BytesIO()
    torch.save({"x": torch.zeros(3)}, file, **how)
    return file.getvalue()


OBJECTS = np.array([SAID], dtype=object)
PICKLES = {
    **{f"protocol {number}": pickle.dumps(SAID, number) for number in range(pickle.HIGHEST_PROTOCOL + 1)},
    **{f"a call in protocol {number}": pickle.dumps(Runs(), number) for number in range(pickle.HIGHEST_PROTOCOL + 1)},
    # As libraries write that put arrays between parts of a pickle.
    "arrays between": pickle.dumps(SAID, 4)[:-4] + b"\x00" * 64 + pickle.dumps(SAID, 4),
    "gzip": gzip.compress(pickle.dumps(SAID, 0)),
    "bz2": bz2.compress(pickle.dumps(SAID, 2)),
    "xz": lzma.compress(pickle.dumps(SAID)),
    "gzip twice": gzip.compress(gzip.compress(pickle.dumps(SAID))),
    "npy": saved(np.save, OBJECTS),
    "npz": saved(np.savez, names=OBJECTS),
    "npz, compressed": saved(np.savez_compressed, names=OBJECTS),
    "zip": zipped(pickle.dumps(SAID, 0)),
    "torch.save": torch_saved(),
    "torch.save, as before 1.6": torch_saved(_use_new_zipfile_serialization=False),
}
OTHERS = {
    "empty": b"",
    "a version": b"0.5\n",
    "a version, of two": b"2.0\n",
    "a readme": b"(This is a readme.)\nIt is.\n",
    "json": json.dumps(SAID).encode(),
    "one long line": b"S" * 3_000_000,
    "npy": saved(np.save, np.zeros((3, 4))),
    "npz": saved(np.savez, numbers=np.zeros(3), words=np.array(["a"])),
    "gzip": gzip.compress(b"hello"),
    "gzip, cut": gzip.compress(pickle.dumps(SAID))[:12],
    "zip": zipped(b"hello"),
}


@pytest.mark.parametrize("what", PICKLES)
def test_a_pickle(tmp_path: Path, what: str) -> None:
    (tmp_path / "file").write_bytes(PICKLES[what])
    assert holds_pickle(tmp_path / "file")


@pytest.mark.parametrize("what", OTHERS)
def test_no_pickle(tmp_path: Path, what: str) -> None:
    (tmp_path / "file").write_bytes(OTHERS[what])
    assert not holds_pickle(tmp_path / "file")


def test_weights_whose_header_is_as_long_as_a_pickles_first_bytes(tmp_path: Path) -> None:
    begun = set()
    for size in range(500, 1600):
        content = save({"x": torch.zeros(2)}, metadata={"y": "x" * size})
        if content[0] == pickle.PROTO[0]:
            begun.add(content[1])
            (tmp_path / "file").write_bytes(content)
            assert not holds_pickle(tmp_path / "file")
    assert begun >= {2, 3, 4, 5}
