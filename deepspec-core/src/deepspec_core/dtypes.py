"""Names of number types, as run files and cache headers write them, and what torch calls them."""

from __future__ import annotations

from typing import Final

import torch

_BY_NAME: Final = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3": torch.float8_e4m3fn,
}
_BY_DTYPE: Final = {dtype: name for name, dtype in _BY_NAME.items()}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name in a run file; KeyError where the schema let another name through."""
    return _BY_NAME[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The run file's name of a torch dtype."""
    return _BY_DTYPE[dtype]
