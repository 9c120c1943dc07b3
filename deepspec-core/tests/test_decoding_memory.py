"""How much memory a round takes above temperature 0 beside the logits: drawing, the check, and verification.

The kernel's own count of resident memory is read, because some of PyTorch's kernels copy tensors within. The process is
one of its own, whose allocator gives large blocks back at once.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deepspec_core.contracts.proposer import Proposal, Sampling
from deepspec_core.decoding.proposal_check import ProposalCheck
from deepspec_core.decoding.sampling import draw_tokens
from deepspec_core.decoding.verify import verify

SLOTS, TOKENS, VOCAB = 32, 7, 151_936
IN_BF16 = SLOTS * TOKENS * VOCAB * 2 / 2**20
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


def measure() -> dict[str, float]:
    """MiB that drawing a block takes, checking it, and verifying it."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(SLOTS, TOKENS + 1, VOCAB, generator=generator, dtype=torch.float32).bfloat16()
    uniforms = torch.rand(SLOTS, 2 * TOKENS + 1, generator=generator, dtype=torch.float64)
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

    return {"propose": _peak(propose), "check": _peak(check), "verify": _peak(decide)}


@pytest.mark.skipif(not os.access(RESET, os.W_OK), reason="needs the peak of resident memory, as Linux counts it")
def test_distributions_of_a_bf16_block_never_stand_in_fp32_at_once() -> None:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=True)
    taken = json.loads(done.stdout)
    # The copy of the logits, the distributions, and parts of them: 8 MiB each in fp32, several at a time.
    assert taken["propose"] < 2 * IN_BF16 + 80
    assert taken["check"] < 60
    assert taken["verify"] < 80
    assert 2 * IN_BF16 > 120, "all distributions in fp32 would take more"


if __name__ == "__main__":
    print(json.dumps(measure()))  # noqa: T201
