"""How much memory a round takes above temperature 0 beside the logits: drawing, the check, and verification.

The kernel's own count of resident memory is read, because some of PyTorch's kernels copy tensors within.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deepspec_core.contracts.proposer import Proposal, Sampling
from deepspec_core.decoding.proposal_check import ProposalCheck
from deepspec_core.decoding.sampling import draw_tokens
from deepspec_core.decoding.verify import verify

SLOTS, TOKENS, VOCAB = 32, 7, 151_936
RESET = Path("/proc/self/clear_refs")
SAMPLED = Sampling(temperature=1.0)


class _Proposer:
    max_tokens, taps = TOKENS, (0,)


def _mib(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def _peak(act: Callable[[], object]) -> float:
    """The most MiB that a call takes beyond what was there."""
    RESET.write_text("5")
    before = _mib("VmRSS")
    act()
    return _mib("VmHWM") - before


@pytest.mark.skipif(not RESET.exists(), reason="needs the peak of resident memory, as Linux counts it")
def test_distributions_of_a_bf16_block_never_stand_in_fp32_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(SLOTS, TOKENS + 1, VOCAB, generator=generator, dtype=torch.float32).bfloat16()
    uniforms = torch.rand(SLOTS, 2 * TOKENS + 1, generator=generator, dtype=torch.float64)
    in_bf16 = SLOTS * TOKENS * VOCAB * 2 / 2**20
    found: dict[str, Proposal] = {}

    def propose() -> None:
        tokens, q = draw_tokens(logits[:, :TOKENS].contiguous(), SAMPLED, uniforms[:, :TOKENS])
        lengths = torch.full((SLOTS,), TOKENS)
        found["proposal"] = Proposal(tokens=tokens, lengths=lengths, probabilities=q)

    def check() -> None:
        ProposalCheck(_Proposer(), vocab_size=VOCAB)(
            found["proposal"], slots_B=torch.arange(SLOTS), sampling=SAMPLED, uniforms_BK=uniforms[:, :TOKENS]
        )

    def decide() -> None:
        verify(logits, found["proposal"], sampling=SAMPLED, uniforms=uniforms[:, TOKENS:], stop_ids=())

    # The copy of the logits, the distributions, and parts of them: 8 MiB each in fp32, several at a time.
    assert _peak(propose) < 2 * in_bf16 + 80
    assert _peak(check) < 80
    assert _peak(decide) < 80
    assert 2 * in_bf16 > 120, "all distributions in fp32 would take more"
