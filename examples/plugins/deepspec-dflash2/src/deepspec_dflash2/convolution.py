"""Convolutions over the slots of a block, before and after a sublayer. Does not know the sublayer or the draft.

out[i, c] = sum over t of (base[t, c] + delta[i, t, g(c)]) x[i - t, c], where g(c) is the group of channel c, and x is 0
before slot 0. One projection of the sublayer's input gives delta, for the convolutions before and after the sublayer.

Legend: N blocks, S slots, H hidden size, t taps, G groups of channels, g channels of a group.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


class BlockConvolution(nn.Module):
    """A module for DraftLayer.around_attention and around_mlp. With its initial weights it changes nothing."""

    def __init__(self, hidden_size: int, *, taps: int, group: int) -> None:
        super().__init__()
        self.base_kernel = nn.Parameter(torch.zeros(2, taps, hidden_size))
        self.kernel_projection = nn.Linear(hidden_size, 2 * taps * (hidden_size // group), bias=False)
        nn.init.ones_(self.base_kernel[:, 0])
        nn.init.zeros_(self.kernel_projection.weight)

    def forward(self, sublayer: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The sublayer between two convolutions, [N, S, H] -> [N, S, H]."""

        def around(x_NSH: Tensor) -> Tensor:
            deltas_NS2tG = self.kernel_projection(x_NSH).unflatten(-1, (*self.base_kernel.shape[:2], -1))
            inner_NSH = sublayer(convolved(x_NSH, self.base_kernel[0], deltas_NS2tG[:, :, 0]))
            return convolved(inner_NSH, self.base_kernel[1], deltas_NS2tG[:, :, 1])

        return around


def convolved(x_NSH: Tensor, base_tH: Tensor, delta_NStG: Tensor) -> Tensor:
    """The sum at the top of this file, [N, S, H]."""
    out_NSH = torch.zeros_like(x_NSH)
    for tap, base_H in enumerate(base_tH[: x_NSH.shape[1]]):
        # Slot i - t: cut at the end, with as many zeros at the beginning.
        shifted_NSGg = pad(x_NSH, (0, 0, tap, -tap)).unflatten(-1, (delta_NStG.shape[-1], -1))
        kernel_NSGg = base_H.unflatten(0, shifted_NSGg.shape[2:]) + delta_NStG[:, :, tap, :, None]
        out_NSH = out_NSH + (kernel_NSGg * shifted_NSGg).flatten(-2)
    return out_NSH
