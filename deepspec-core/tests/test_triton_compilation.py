"""Where the Triton kernels can run, and that they compile for a GPU that need not be there.

Their interpreter (test_row_kernels.py) takes what the compiler would refuse.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from row_passes import (
    NEEDS_TRITON,
    NOT_INTERPRETING,
    Case,
    Chunk,
    figures_of,
)


@NEEDS_TRITON
@NOT_INTERPRETING
def test_where_triton_can_run() -> None:
    from deepspec_core.rows.kernels.triton_kernels import can_run

    assert "'cpu'" in (can_run("cpu") or "")
    if not torch.cuda.is_available():
        assert can_run("cuda") == "torch finds no CUDA device"


class AbsentGpu:
    """What Triton asks of a driver to compile, for a device that no machine has."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compile_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """compile_for(case, offset=): what the four passes over such a chunk are compiled to, by its digest."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from deepspec_core.rows.kernels.triton_kernels import TritonKernels

    compiled: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, warmup=True, **options)
        compiled[kernel.hash] = kernel
        return kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(JITFunction, "run", compile_only)
    monkeypatch.setattr(driver, "_active", AbsentGpu())

    def compile_chunk(case: Case, *, offset: int = 0) -> dict[str, Any]:
        compiled.clear()
        chunk = Chunk(case)
        # Slices of a batch's tensors: where in memory they start differs from chunk to chunk.
        chunk.label_N, chunk.target_row_N = torch.zeros(2, offset + case.rows, dtype=torch.int64)[:, offset:]
        figures_of(TritonKernels(), chunk)
        return dict(compiled)

    return compile_chunk


@NEEDS_TRITON
@NOT_INTERPRETING
@pytest.mark.parametrize("full", [False, True])
def test_kernels_compile_for_a_gpu(compile_for: Callable[..., dict[str, Any]], full: bool) -> None:
    """Optional parts all there or all absent. With a vocabulary of whole vectors, loads are of 128 bits."""
    softcap = 30.0 if full else None
    compiled = compile_for(
        Case(
            vocab=20000,
            dtype=torch.bfloat16,
            correction=full,
            base=full,
            softcap=softcap,
            soft=full,
            tv=full,
            part=full,
        )
    )
    # The normaliser of the draft, and where that has a correction, of the draft without it.
    expected = ["argmax", "distance", "divergence", "gradient", "normaliser"] + ["normaliser"] * full
    assert sorted(kernel.metadata.name for kernel in compiled.values()) == expected
    for kernel in compiled.values():
        assert "ld.global.v4" in kernel.asm["ptx"]


@NEEDS_TRITON
@NOT_INTERPRETING
def test_kernels_are_compiled_once_for_all_row_counts(compile_for: Callable[..., dict[str, Any]]) -> None:
    def chunk_of(rows: int, offset: int) -> set[str]:
        return set(compile_for(Case(rows=rows, vocab=20000, dtype=torch.bfloat16), offset=offset))

    assert chunk_of(16, 0) == chunk_of(1, 1) == chunk_of(2, 3) == chunk_of(5, 0)
