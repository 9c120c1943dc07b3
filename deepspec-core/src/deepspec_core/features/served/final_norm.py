"""Finds out whether a server's last hidden state is already normed, and applies the target's final norm if not.

Drafts and losses read the state after the norm, which is the input of the lm_head. Engines return the state before it,
or do not say which. After an RMS norm every token has a mean square of 1 once the norm's gain is divided out, so the
norm's weight alone is enough to find out. Knows one norm and states; knows no servers.

Legend: T tokens, H hidden size.
"""

from __future__ import annotations

from typing import Final

import torch
from attrs import define, field
from torch import Tensor, nn

# The root mean square of a normed token is 1 but for rounding: bfloat16 moves it by less than 0.001, float8 with a
# scale for each token by less than 0.01. Before the norm it is what the residual stream has grown to, other for every
# token.
_NORMED_WITHIN: Final = 0.05


@define(eq=False)
class FinalNorm:
    """The norm before a target's lm_head, in float32. `gain` [H] is None where the norm is no RMS norm."""

    norm: nn.Module
    gain: Tensor | None = field(init=False)

    def __attrs_post_init__(self) -> None:
        size = next(self.norm.parameters()).shape[-1]
        ones_H = torch.ones(size)
        with torch.no_grad():
            gain_H, turned_H = self.norm(ones_H[None])[0], self.norm(-ones_H[None])[0]
        # A layer norm takes the mean out: of ones nothing is left, whatever their sign.
        self.gain = gain_H if torch.allclose(gain_H, -turned_H) and bool((gain_H != 0).any()) else None

    def is_normed(self, state_TH: Tensor) -> bool | None:
        """Whether states [T, H] are after the norm; None where that cannot be measured."""
        if self.gain is None:
            return None
        counts_H = self.gain.abs() > 1e-3 * self.gain.abs().max()
        plain_TC = state_TH.float()[:, counts_H] / self.gain[counts_H]
        size_T = plain_TC.square().mean(-1).sqrt()
        return bool(((size_T - 1).abs() < _NORMED_WITHIN).all())

    def __call__(self, state_TH: Tensor) -> Tensor:
        """States after the norm, in the type they came in."""
        with torch.no_grad():
            normed_TH: Tensor = self.norm(state_TH.float()).to(state_TH.dtype)
        return normed_TH
