"""The values of rows that the host needs: which rows there are, and how they are cut into chunks.

On an accelerator, copying them to the host waits for all work on the device. So a draft passes on the copies that the
host already has (`Rows.on_host`), and a micro-step never waits. A copy is found by the tensor of which it is a copy, so
a changed tensor cannot be used with an old copy. Knows rows and devices. Does not know chunks, kernels or terms.

Legend: N rows.
"""

from __future__ import annotations

import torch
from attrs import evolve
from torch import Tensor

from deepspec_core.contracts.rows import Rows

_INDICES = ("slot", "block", "target_index", "target_ids")
_NAMES = (*_INDICES, "weight", "denominator")


def host_side(rows: Rows) -> dict[str, Tensor]:
    """slot, block, weight, target_index, target_ids and denominator on the host, as far as the rows have them.

    Waits for the device if the draft left one out. After `with_host_side` none is left out.
    """
    own = {name: getattr(rows, name) for name in _NAMES if getattr(rows, name) is not None}
    if rows.hidden.device.type == "cpu":
        return {name: tensor.detach() for name, tensor in own.items()}
    copies = {id(of): copy for of, copy in rows.on_host}
    found = {name: copies[id(tensor)] for name, tensor in own.items() if id(tensor) in copies}
    missing = [name for name in own if name not in found]
    indices = [name for name in missing if name in _INDICES]
    if indices:
        found |= zip(indices, torch.stack([own[name] for name in indices]).cpu().unbind(), strict=True)
    return found | {name: own[name].detach().cpu() for name in missing if name not in _INDICES}


def with_host_side(rows: Rows) -> Rows:
    """The rows with everything of `host_side` in `on_host`."""
    return evolve(rows, on_host=tuple((getattr(rows, name), copy) for name, copy in host_side(rows).items()))


def differing(rows: Rows) -> str | None:
    """The first tensor of which `on_host` says something else than the rows. Waits for the device."""
    for name in _NAMES:
        own = getattr(rows, name)
        for of, copy in rows.on_host:
            if of is own and copy is not own and not torch.equal(copy, own.detach().cpu()):
                return name
    return None


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`. The host does not wait for the copy."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
