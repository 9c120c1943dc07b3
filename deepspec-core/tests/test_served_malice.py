"""What a server may put into a file's header or an answer: whatever it is, it is a bad answer and no crash."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from served_setup import LAYERS

from deepspec_core.features.served.answer_file import read_states
from deepspec_core.features.served.answer_place import BadAnswer, place_of

IDS = torch.tensor([3, 1, 4])
NAME = "ds-0123456789abcdef-0-00000000-000000001"
DEEP = "[" * 400 + "]" * 400


def write(path: Path, change: Callable[[dict[str, Any]], Any] | None = None) -> None:
    """A file of three states of sixteen numbers for each of IDS, its header changed."""
    data = IDS.numpy().astype("<i8").tobytes() + torch.ones(3, 3, 16).numpy().tobytes()
    header: Any = {
        "__metadata__": {"layers": json.dumps(LAYERS.ids), "normed": "true"},
        "token_ids": {"dtype": "I64", "shape": [3], "data_offsets": [0, 24]},
        "hidden_states": {"dtype": "F32", "shape": [3, 3, 16], "data_offsets": [24, 24 + 576]},
    }
    changed = None if change is None else change(header)
    text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def read(path: Path) -> torch.Tensor:
    with path.open("rb", buffering=0) as file:
        return read_states(file, path, ids=IDS, layers=LAYERS, hidden_size=16).states  # type: ignore[arg-type]


def states(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["hidden_states"].update(changes)


def said(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["__metadata__"].update({key: value})


def test_the_file_unchanged_is_read(tmp_path: Path) -> None:
    write(tmp_path / "file")
    assert bool((read(tmp_path / "file") == 1).all())


@pytest.mark.parametrize(
    "change",
    [
        states(data_offsets=[2**63 - 10, 2**63 - 10 + 576]),
        states(data_offsets=[2**64, 2**64 + 576]),
        states(data_offsets=[10**30, 10**30 + 576]),
        states(data_offsets=[10**6, 10**6 + 576]),
        states(data_offsets=[-576, 0]),
        states(data_offsets=[24.0, 600.0]),
        states(data_offsets=[25, 601]),
        states(shape=[10**300]),
        states(shape=[3, 10**300, 16]),
        states(shape=json.loads(DEEP)),
        states(shape="\ud800"),
        states(dtype=["F32"]),
        states(dtype="\ud800"),
        said("normed", ["true"]),
        said("normed", {}),
        said("normed", None),
        said("normed", "\ud800"),
        said("layers", LAYERS.ids),
        said("layers", DEEP),
        said("layers", "[" * 100_000),
        said("else", 1),
        lambda header: header.update({"\ud800": header.pop("token_ids")}),
        lambda header: header.update({"x" * 10**5: header.pop("token_ids")}),
        lambda _header: b'{"__metadata__": {}, "hidden_states": {"shape": [' + b"1" * 5000 + b"]}}",
        lambda _header: b"[" * 100_000,
        lambda _header: b"\xff\xfe{}",
        lambda _header: b"NaN",
    ],
)
def test_a_header_is_not_believed(change: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    write(tmp_path / "file", change)
    with pytest.raises(BadAnswer) as caught:
        read(tmp_path / "file")
    told = str(caught.value.error)
    assert len(told) < 2000
    told.encode()  # it can be printed, and written to a log


@pytest.mark.parametrize(
    "said",
    [
        "{}\ud800",
        "{}" + chr(0xDC80),
        "{}\n",
        "{}\x1b[2J",
        "{}\0",
        "{}" + "x" * 5000,
        "{}" + "x" * 212,
        "\ud800/{}",
        "a/" * 3000 + "{}",
    ],
)
def test_a_path_is_not_believed(said: str, tmp_path: Path) -> None:
    """Names of 252 bytes are too long as well, because the lock's is longer."""
    folder = tmp_path.resolve()
    assert place_of(str(folder / f"{NAME}.safetensors"), name=NAME, folder=folder).name == f"{NAME}.safetensors"
    with pytest.raises(BadAnswer) as caught:
        place_of(f"{folder}/{said.format(NAME)}", name=NAME, folder=folder)
    told = str(caught.value.error)
    assert len(told) < 2000
    told.encode()


@pytest.mark.parametrize("said", [None, 5, {"a": 1}, [1], json.loads(DEEP)])
def test_what_is_no_path_is_not_believed(said: Any, tmp_path: Path) -> None:
    with pytest.raises(BadAnswer, match="no hidden states"):
        place_of(said, name=NAME, folder=tmp_path)
