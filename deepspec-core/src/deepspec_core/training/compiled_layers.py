"""The parts of draft layers that treat every token alone, through torch.compile, while a training step runs forward.

Between two products of a layer stand norms, rotary embedding, activation and sums, each a pass over memory of its own,
forward and backward. Compiled, they become one pass. What every token gets depends on that token alone, so these parts
are compiled for a number of rows that may change: other lengths, batches and numbers of blocks compile nothing anew.
Where something cannot be compiled, it runs as it did, and a warning says so once.

Knows core's layers. Does not know which positions attend to which, algorithms or families.

Legend: ... any leading dimensions, T tokens, M rows (all leading dimensions and tokens), I width of the attention
input, H hidden size, h query heads, G kv heads, D head size.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from deepspec_core.layers.attention import DraftAttention, Rotary
from deepspec_core.layers.decoder_layer import DraftLayer
from deepspec_core.rows.kernels.formulas import vector_width, why_not_compiled

# What compilation costs, a minute or two, has to come back: fewer steps, or layers this narrow, do not give it back.
LEAST_STEPS = 200
LEAST_WIDTH = 512
# One row would be compiled for apart.
_LEAST_ROWS = 2


def compiles(asked: bool | str, *, width: int, steps: int, device_type: str) -> tuple[bool, str]:
    """Whether `[train] compile = asked` compiles the layers of a draft `width` wide, and why, in words.

    `steps` are those of the whole training, so a resumed one does the same. `asked` as the run file has it: "auto",
    true, false.
    """
    if asked is False:
        return False, "layers are not compiled: train.compile = false"
    missing = why_not_compiled() if device_type == "cpu" else _why_not_on_device()
    if missing is not None:
        return False, f"layers are not compiled: {missing}"
    if asked == "auto" and steps < LEAST_STEPS:
        return False, f"layers are not compiled: {steps} steps, and it pays from {LEAST_STEPS} on"
    if asked == "auto" and width < LEAST_WIDTH:
        return False, f"layers are not compiled: they are {width} wide, and it pays from {LEAST_WIDTH} on"
    return True, "layers are compiled in the first step, which takes a minute or two longer"


def _why_not_on_device() -> str | None:
    return None if importlib.util.find_spec("triton") is not None else "Triton is not installed"


class CompiledLayers:
    """The layers of a module, compiled while `in_place`; at all other times they are as they were."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._failed: set[str] = set()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, rows of every DraftLayer go through compiled functions."""
        changed: list[tuple[nn.Module, str]] = []

        def put(part: nn.Module, name: str, function: Callable[..., Any]) -> None:
            setattr(part, name, partial(function, self, part))
            changed.append((part, name))

        try:
            for part in self._module.modules():
                if isinstance(part, DraftAttention):
                    put(part, "queries", _queries)
                    put(part, "keys_values", _keys_values)
                elif isinstance(part, DraftLayer) and type(part.around_mlp) is nn.Identity:
                    put(part, "finish", _finish)
            yield
        finally:
            for part, name in changed:
                delattr(part, name)

    def run(self, function: Callable[..., Any], part: nn.Module, *rows: Tensor) -> Any:
        """function(part, *rows), compiled, with a number of rows that may change. As it is, where that fails."""
        name = function.__name__
        if len(rows[0]) < _LEAST_ROWS or name in self._failed:
            return function(part, *rows)
        for tensor in rows:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        try:
            return _compiled(function, rows[0].device.type)(part, *rows)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            self._failed.add(name)
            warnings.warn(
                f"a draft's {name.strip('_').replace('_', ' ')} cannot be compiled and run as they are, slower "
                f"({str(error).strip().splitlines()[0]}); train.compile = false says that it is meant",
                RuntimeWarning,
                stacklevel=2,
            )
            return function(part, *rows)


@cache
def _compiled(function: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    # Sizes of weights are fixed; the number of rows is marked as one that changes.
    return torch.compile(function, options=vector_width() if device_type == "cpu" else {})


def _queries(over: CompiledLayers, attention: DraftAttention, hidden_TI: Tensor, rotary: Rotary) -> Tensor:
    rows = _rows_of(hidden_TI, rotary)
    return _heads_first(over.run(_queries_of_rows, attention, *rows), hidden_TI)


def _keys_values(
    over: CompiledLayers, attention: DraftAttention, hidden_TI: Tensor, rotary: Rotary
) -> tuple[Tensor, Tensor]:
    rows = _rows_of(hidden_TI, rotary)
    keys_MG1D, values_MG1D = over.run(_keys_values_of_rows, attention, *rows)
    return _heads_first(keys_MG1D, hidden_TI), _heads_first(values_MG1D, hidden_TI)


def _finish(over: CompiledLayers, layer: DraftLayer, residual_TH: Tensor, attended_TH: Tensor) -> Tensor:
    output_MH: Tensor = over.run(_finish_of_rows, layer, residual_TH.flatten(0, -2), attended_TH.flatten(0, -2))
    return output_MH.reshape(residual_TH.shape)


def _queries_of_rows(attention: DraftAttention, hidden_MI: Tensor, cos_MD: Tensor, sin_MD: Tensor) -> Tensor:
    return DraftAttention.queries(attention, hidden_MI[:, None], (cos_MD[:, None], sin_MD[:, None]))


def _keys_values_of_rows(
    attention: DraftAttention, hidden_MI: Tensor, cos_MD: Tensor, sin_MD: Tensor
) -> tuple[Tensor, Tensor]:
    return DraftAttention.keys_values(attention, hidden_MI[:, None], (cos_MD[:, None], sin_MD[:, None]))


def _finish_of_rows(layer: DraftLayer, residual_MH: Tensor, attended_MH: Tensor) -> Tensor:
    return DraftLayer.finish(layer, residual_MH, attended_MH)


def _rows_of(hidden_TI: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [M, I] and the angles of each row, [M, D]."""
    cos_MD, sin_MD = (part.expand(*hidden_TI.shape[:-1], -1).flatten(0, -2) for part in rotary)
    return hidden_TI.flatten(0, -2), cos_MD, sin_MD


def _heads_first(rows_Mh1D: Tensor, hidden_TI: Tensor) -> Tensor:
    """[M, h, 1, D] -> [..., h, T, D]."""
    heads, _, size = rows_Mh1D.shape[1:]
    return rows_Mh1D.reshape(*hidden_TI.shape[:-1], heads, size).transpose(-3, -2)
