"""A GGUF file: keys and tensors are written and read back through the package `gguf`, which llama.cpp's project keeps.

Knows types of keys and tensors. Not what any of them means.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

MISSING: Final = "the package gguf, which reads and writes the file, is not installed"
INSTALL: Final = "Install it with `pip install 'deepspec-export[gguf]'`."
_ARCHITECTURE: Final = "general.architecture"


def is_installed() -> bool:
    """Whether the package can be imported."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        return False
    return True


def write(path: Path, architecture: str, keys: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a file of these keys (bool, int, float, text, and lists of one of them) and tensors.

    Tensors are fp32, fp16, bf16 or int64.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, architecture)
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        if plain.dtype == torch.bfloat16:
            # numpy has no bf16: the bytes go in as they are.
            writer.add_tensor(name, plain.view(torch.uint8).numpy(), raw_dtype=GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, plain.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(path: Path) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """A file's architecture, its other keys, and its tensors."""
    from gguf import GGMLQuantizationType, GGUFReader

    reader = GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = {}
    for stored in reader.tensors:
        plain = torch.from_numpy(stored.data.copy())
        tensors[stored.name] = plain.view(torch.bfloat16) if stored.tensor_type == GGMLQuantizationType.BF16 else plain
    return keys.pop(_ARCHITECTURE), keys, tensors
