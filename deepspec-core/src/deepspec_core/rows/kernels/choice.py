"""Which implementation of the passes runs over a chunk's logits, and how many rows its chunks have.

"plain" differentiates the logits by autograd. It is the reference, and the only one for terms that read logits
themselves. The others compute gradients by formula: "compiled" through torch.compile, "triton" on accelerators, "eager"
one operation at a time. "eager" is the slowest, and takes the least memory where nothing can be compiled. Knows devices
and vocabulary sizes. Does not know rows or terms.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

from attrs import frozen

from deepspec_core.config.schema import KERNELS
from deepspec_core.errors import ConfigError
from deepspec_core.rows.kernels.formulas import RowKernels, TorchKernels, why_not_compiled

# With a smaller vocabulary the loss takes less time than its compilation.
_WORTH_COMPILING = 1 << 14


@frozen(kw_only=True)
class Choice:
    """The kernels, where None means autograd, and the rows of a chunk if the run file does not say."""

    name: str
    kernels: RowKernels | None
    chunk_rows: int


def choose_kernels(asked: str, *, device_type: str, vocab_size: int, needs_logits: Sequence[str] = ()) -> Choice:
    """The kernels that `[loss] kernels = asked` stands for. `needs_logits` names terms and weightings that read logits.

    ConfigError if these kernels cannot run. On a CPU without a C++ compiler, "compiled" becomes "plain", with a
    warning.
    """
    assert asked in KERNELS
    name = asked
    if asked == "auto":
        name = _automatic(device_type, vocab_size, bool(needs_logits))
    elif asked != "plain" and needs_logits:
        raise ConfigError(
            f"{', '.join(needs_logits)} reads logits, which these kernels do not form",
            where="[loss] kernels",
            found=asked,
            expected="plain",
        )
    if name == "compiled" and device_type == "cpu" and not _compiles_or_warns():
        name = "plain"
    return Choice(
        name=name,
        kernels=_kernels(name, device_type),
        chunk_rows=max(1, _elements(name, device_type, vocab_size) // vocab_size),
    )


def _automatic(device_type: str, vocab_size: int, needs_logits: bool) -> str:
    if needs_logits:
        return "plain"
    if device_type == "cuda":
        return "compiled" if _why_no_triton(device_type) else "triton"
    return "compiled" if device_type == "cpu" and vocab_size >= _WORTH_COMPILING else "plain"


@functools.cache
def _kernels(name: str, device_type: str) -> RowKernels | None:
    if name == "triton":
        reason = _why_no_triton(device_type)
        if reason is not None:
            raise ConfigError("Triton kernels cannot run here", where="[loss] kernels", found=reason, fix='set "auto"')
        from deepspec_core.rows.kernels.triton_kernels import TritonKernels

        return TritonKernels()
    return None if name == "plain" else TorchKernels(compiled=name == "compiled")


def _elements(name: str, device_type: str, vocab_size: int) -> int:
    """How many logits a chunk has."""
    if device_type != "cpu":
        # 128 MiB a tensor in bf16, and at most three of them. Autograd's are in fp32, and there are more.
        return 1 << 24 if name in ("plain", "eager") else 1 << 26
    if name == "plain":
        # Each operation goes over the whole chunk, so it should fit the caches. But a product with a large vocabulary
        # reads all of it whatever the rows, and wants some fifty of them.
        return max(1 << 20, min(1 << 23, 56 * vocab_size))
    # A few large products; a tensor takes 160 MiB in bf16.
    return 5 << 24


@functools.cache
def _why_no_triton(device_type: str) -> str | None:
    try:
        from deepspec_core.rows.kernels.triton_kernels import can_run
    except ImportError as error:
        return str(error)
    return can_run(device_type)


def _compiles_or_warns() -> bool:
    reason = why_not_compiled()
    if reason is not None:
        warnings.warn(
            f"{reason}, so the loss runs by autograd, slower and in more memory; install g++ and Python's "
            'headers, or set [loss] kernels = "plain" to say it is meant',
            RuntimeWarning,
            stacklevel=2,
        )
    return reason is None
