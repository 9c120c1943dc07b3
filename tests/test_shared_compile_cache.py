"""Compiled kernels in one cache directory, used by processes with different vector instructions."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepspec_core.rows.kernels.formulas import why_not_compiled

CODE = """
import torch
from deepspec_core.rows.kernels.formulas import Logits, TorchKernels
product = torch.randn(3, 9000, generator=torch.Generator().manual_seed(0))
found = TorchKernels(compiled=True).normaliser(Logits(product))
torch.testing.assert_close(found, product.logsumexp(-1), rtol=4e-6, atol=4e-6)
"""


@pytest.mark.slow
def test_code_compiled_for_one_processor_is_not_taken_for_another_s(tmp_path: Path) -> None:
    if why_not_compiled() is not None:
        pytest.skip("nothing can be compiled here")
    own = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    own["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path)
    for capability in ({"ATEN_CPU_CAPABILITY": "avx2"}, {}, {"ATEN_CPU_CAPABILITY": "default"}, {}):
        subprocess.run([sys.executable, "-c", CODE], env={**own, **capability}, check=True, timeout=300)
