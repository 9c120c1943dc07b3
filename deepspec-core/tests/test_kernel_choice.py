"""Which kernels a run gets: the fastest that can run, what was asked for, or a reason."""

from __future__ import annotations

import pytest

from deepspec_core.errors import ConfigError
from deepspec_core.rows.kernels import choice as kernel_choice
from deepspec_core.rows.kernels.choice import choose_kernels

LARGE, SMALL = 151_936, 1_000


@pytest.fixture
def can(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """What can run, by name: None, or the reason why not; tests change it."""
    reasons: dict[str, str | None] = {"compiled": None, "triton": None}
    monkeypatch.setattr(kernel_choice, "why_not_compiled", lambda: reasons["compiled"])
    monkeypatch.setattr(kernel_choice, "_why_no_triton", lambda device_type: reasons["triton"])
    return reasons


def name(asked: str, device_type: str, vocab_size: int = LARGE, needs_logits: tuple[str, ...] = ()) -> str:
    return choose_kernels(asked, device_type=device_type, vocab_size=vocab_size, needs_logits=needs_logits).name


@pytest.mark.usefixtures("can")
def test_auto_takes_the_fastest() -> None:
    assert name("auto", "cpu") == "compiled"
    assert name("auto", "cpu", SMALL) == "plain"
    assert name("auto", "mps") == "plain"
    assert name("auto", "cpu", needs_logits=("term own",)) == "plain"


def test_a_cpu_without_a_compiler_runs_by_autograd_and_says_so(can: dict[str, str | None]) -> None:
    can["compiled"] = "there is no C++ compiler"
    for asked in ("auto", "compiled"):
        with pytest.warns(RuntimeWarning, match="no C\\+\\+ compiler"):
            assert name(asked, "cpu") == "plain"
    assert name("eager", "cpu") == "eager"


def test_an_accelerator_without_triton_compiles(can: dict[str, str | None]) -> None:
    can["triton"] = "No module named 'triton'"
    assert name("auto", "cuda") == "compiled"
    with pytest.raises(ConfigError, match="No module named 'triton'"):
        name("triton", "cuda")


def test_what_is_asked_for_and_reads_logits_is_refused(can: dict[str, str | None]) -> None:
    for asked in ("eager", "compiled", "triton"):
        with pytest.raises(ConfigError, match="term own, the weighting"):
            name(asked, "cpu", needs_logits=("term own", "the weighting"))
    assert name("plain", "cpu") == "plain"
    assert can["triton"] is None


@pytest.mark.usefixtures("can")
def test_chunks_follow_the_vocabulary() -> None:
    def rows(asked: str, vocab_size: int) -> int:
        return choose_kernels(asked, device_type="cpu", vocab_size=vocab_size).chunk_rows

    assert 400 < rows("compiled", LARGE) < 600
    assert 50 < rows("plain", LARGE) < 60
    assert 1_000 < rows("plain", SMALL) < 1_100
    assert rows("compiled", 1 << 30) == 1
