"""torch's Muon with its products in fp32, for processors without instructions for bf16.

torch orthogonalises in bf16, which such a processor computes several times slower than fp32. The state has torch's
names, so checkpoints of both are the same. Knows matrices and their gradients; does not know drafts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def has_bf16_instructions(device: torch.device) -> bool:
    """Whether products in bf16 are quick: on accelerators, and on CPUs that have instructions for them.

    ATEN_CPU_CAPABILITY, torch's own limit of a CPU's instructions, is respected.
    """
    if device.type != "cpu":
        return True
    widest: bool = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return widest and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class MuonInFloat32(torch.optim.Muon):
    """As torch.optim.Muon with Nesterov's momentum and `adjust_lr_fn="match_rms_adamw"`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step."""
        assert closure is None, "gradients are there"
        for group in self.param_groups:
            rate, momentum = float(group["lr"]), group["momentum"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight.grad)
                average = state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
                direction = orthogonal(
                    weight.grad.lerp(average, momentum), group["ns_coefficients"], group["ns_steps"], group["eps"]
                )
                weight.mul_(1 - rate * group["weight_decay"])
                weight.add_(direction, alpha=-rate * 0.2 * math.sqrt(max(weight.shape)))


def orthogonal(matrix_MN: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The matrix with all singular values near one, by Newton and Schulz's iteration of the fifth order, in its dtype.

    X <- a X + (b X X^T + c (X X^T)^2) X, from X = matrix / its Frobenius norm (Jordan et al., 2024).
    """
    a, b, c = coefficients
    tall = matrix_MN.shape[0] > matrix_MN.shape[1]
    x = matrix_MN.T if tall else matrix_MN
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
