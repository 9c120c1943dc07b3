"""A draft's file of weights is somebody else's: what is in it is numbers to compute with, or is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepspec_core.checkpoints.inspection import inspect_draft
from deepspec_core.checkpoints.opening import draft_adapter
from deepspec_core.checkpoints.published import load_draft
from deepspec_core.errors import CheckpointError
from deepspec_core.plugins.registry import Registry
from deepspec_dflash.model import DFlashModel


@pytest.fixture(params=["dflash", "dspark", "eagle3"])
def folder(request: pytest.FixtureRequest, drafts: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a draft."""
    for file in drafts[request.param].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def _open(folder: Path, registry: Registry, dtype: torch.dtype = torch.float32) -> Any:
    return load_draft(folder, registry=registry, adapter=draft_adapter(folder, registry=registry), dtype=dtype)


def _change(folder: Path, **changed: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), **{name.replace("__", "."): tensor for name, tensor in changed.items()}}, path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_numbers_of_a_draft_stay_what_they_are(
    drafts: dict[str, Path], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    init = DFlashModel.__init__

    def with_ids(self: DFlashModel, *arguments: Any) -> None:
        init(self, *arguments)
        self.register_buffer("ids", torch.zeros(2, dtype=torch.int64))

    monkeypatch.setattr(DFlashModel, "__init__", with_ids)
    for file in drafts["dflash"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    _change(tmp_path, ids=torch.tensor([151643, 151644]))
    loaded = _open(tmp_path, registry, dtype)
    assert loaded.ids.tolist() == [151643, 151644]
    assert loaded.ids.dtype == torch.int64
    assert loaded.lm_head.weight.dtype == dtype
    for other in (torch.float32, torch.int32):
        _change(tmp_path, ids=torch.tensor([151643, 151644], dtype=other))
        with pytest.raises(CheckpointError, match=r"of other numbers: ids \w+, expected int64"):
            _open(tmp_path, registry, dtype)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(folder: Path, registry: Registry, value: float) -> None:
    weight = load_file(folder / "model.safetensors")["fc.weight"]
    weight[3, :2] = value
    _change(folder, fc__weight=weight)
    with pytest.raises(CheckpointError, match="not finite") as caught:
        _open(folder, registry)
    assert caught.value.where == folder / "model.safetensors"
    assert f"fc.weight: 2 of {weight.numel():,} entries" in str(caught.value)


def test_large_weights_are_numbers_where_the_dtype_holds_them(folder: Path, registry: Registry) -> None:
    weight = torch.full_like(load_file(folder / "model.safetensors")["fc.weight"], 3e38)
    _change(folder, fc__weight=weight)
    assert torch.equal(_open(folder, registry).state_dict()[_fc(folder, registry)], weight)
    with pytest.raises(CheckpointError, match="float16"):
        _open(folder, registry, torch.float16)


def _fc(folder: Path, registry: Registry) -> str:
    """What the draft itself calls fc.weight."""
    (name,) = [name for name in _open(folder, registry).state_dict() if name.endswith("fc.weight")]
    return name


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_whole_numbers_are_no_weights(folder: Path, registry: Registry, dtype: torch.dtype) -> None:
    weight = load_file(folder / "model.safetensors")["fc.weight"]
    _change(folder, fc__weight=weight.to(dtype))
    stored = {torch.int64: "I64", torch.uint8: "U8", torch.bool: "BOOL"}[dtype]
    with pytest.raises(CheckpointError, match=f"not floating point: fc.weight {stored}"):
        _open(folder, registry)
    differences = inspect_draft(folder, registry=registry).differences
    assert differences.not_floating_point == (f"fc.weight {stored}",)


def test_a_folder_in_the_place_of_weights(folder: Path, registry: Registry) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"weights cannot be read(.|\n)*Is a directory"):
        _open(folder, registry)


def test_weights_that_this_user_may_not_read(folder: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    by_itself = Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return by_itself(path, *arguments, **options)

    adapter = draft_adapter(folder, registry=registry)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"weights cannot be read(.|\n)*Permission denied") as caught:
        load_draft(folder, registry=registry, adapter=adapter)
    assert "damaged" not in str(caught.value)
