"""Which layers may be tapped, and what is said of those that may not."""

from __future__ import annotations

import subprocess
import sys

import pytest

from deepspec_core.errors import TargetError
from deepspec_core.targets.taps import check_taps


@pytest.mark.parametrize("taps", [[-1], [0, 2, 6], [-1, 0, 1, 2, 3, 4, 5, 6]])
def test_valid_taps_come_back_as_a_tuple(taps: list[int]) -> None:
    assert check_taps(taps, 8) == tuple(taps)


@pytest.mark.parametrize(
    ("taps", "problem"),
    [
        ([], "no target layer"),
        ([7], "last decoder layer"),
        ([1, 8], "out of range"),
        ([-2, 1], "out of range"),
        ([3, 1], "strictly increasing"),
        ([1, 1], "strictly increasing"),
    ],
)
def test_invalid_taps_are_refused_with_the_valid_range(taps: list[int], problem: str) -> None:
    with pytest.raises(TargetError, match=problem) as caught:
        check_taps(taps, 8, where="target.layers")
    message = str(caught.value)
    assert "from -1 (the embedding) to 6" in message
    assert "8 decoder layers" in message
    assert "target.layers" in message


def test_checking_taps_does_not_import_torch() -> None:
    code = "import sys, deepspec_core.targets.taps; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
