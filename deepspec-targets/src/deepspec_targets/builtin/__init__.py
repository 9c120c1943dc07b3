"""Models that ship inside the package, as Hugging Face directories."""

from __future__ import annotations

from pathlib import Path


def tiny_qwen3() -> Path:
    """The directory of `builtin:tiny-qwen3`."""
    return Path(__file__).parent / "tiny-qwen3"
