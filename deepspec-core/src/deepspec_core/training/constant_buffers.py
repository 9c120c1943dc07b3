"""A draft's buffers stay as they were made, because a checkpoint's training state holds parameters and no buffers.

Knows modules. Does not know drafts, or when a checkpoint is written.
"""

from __future__ import annotations

import torch
from torch import nn

from deepspec_core.errors import PluginError
from deepspec_core.plugins.origin import component_of, package_of


class ConstantBuffers:
    """The saved buffers of a module as they are now. `check` compares them with what they are later."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._kept = {name: value.detach().clone().cpu() for name, value in _saved(module).items()}

    def check(self) -> None:
        """PluginError, with the package of the module, where one has changed. Waits for the device."""
        now = _saved(self._module)
        changed = [name for name, kept in self._kept.items() if not _same(now[name], kept)]
        if changed:
            raise PluginError(
                "a draft's buffers must not change in training: a run that is stopped and resumed would not have them",
                where=f"{package_of(self._module)}, {component_of(self._module)}",
                found=f"changed: {', '.join(changed[:6])}",
                expected="buffers that stay as they were made",
                fix="Make what training changes a parameter, or register the buffer with persistent=False.",
            )


def _saved(module: nn.Module) -> dict[str, torch.Tensor]:
    buffers = dict(module.named_buffers())
    return {name: buffers[name] for name in module.state_dict() if name in buffers}


def _same(now: torch.Tensor, kept: torch.Tensor) -> bool:
    return now.shape == kept.shape and torch.equal(now.detach().to("cpu", kept.dtype), kept)
