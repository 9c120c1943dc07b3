"""Cost tables: what is looked up, what is refused; and that steps are measured where they should be."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspec_core.decoding.profiling import TURNS, Step, measure_steps
from deepspec_core.errors import ConfigError, StageError, TargetError
from deepspec_core.evaluation.cost_table import faster_with_more, read_cost_table, write_cost_table
from deepspec_core.testing.tiny_target import TinyTarget

TARGET = {"model": "some/model", "revision": "abc", "dtype": "float32"}


def step(requests: int, tokens: int, seconds: float) -> Step:
    return Step(
        requests=requests, tokens=tokens, seconds=seconds, lower_quartile=seconds, upper_quartile=seconds, repeats=3
    )


STEPS = [step(1, 1, 0.1), step(1, 4, 0.4), step(2, 2, 0.2), step(2, 4, 0.6), step(2, 8, 1.0)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_cost_table(tmp_path / "table.json", STEPS, {"target": TARGET, "machine": {"device": "x"}})
    return tmp_path / "table.json"


def test_measured_steps_are_looked_up_and_those_between_are_interpolated(path: Path) -> None:
    table = read_cost_table(path, target=TARGET)
    assert table.batch_sizes == (1, 2)
    assert [table.seconds(one.requests, one.tokens) for one in STEPS] == [one.seconds for one in STEPS]
    assert table.seconds(1, 2) == pytest.approx(0.2)
    assert table.seconds(2, 7) == pytest.approx(0.9)
    assert table.steps_per_second(2, 4) == pytest.approx(1 / 0.6)
    assert table.about["machine"] == {"device": "x"}


def test_numbers_of_requests_between_measured_ones_are_interpolated(tmp_path: Path) -> None:
    """At as many tokens a request."""
    steps = [step(2, 2, 0.2), step(2, 8, 0.8), step(6, 6, 0.6), step(6, 24, 4.0)]
    write_cost_table(tmp_path / "t.json", steps, {"target": TARGET, "machine": {}})
    table = read_cost_table(tmp_path / "t.json", target=TARGET)
    assert table.steps_per_second(3, 3) == pytest.approx(1 / 0.3)
    assert table.steps_per_second(4, 16) == pytest.approx(1 / 2.4)
    for requests, tokens in ((1, 1), (7, 7), (4, 17)):
        with pytest.raises(ConfigError):
            table.steps_per_second(requests, tokens)


@pytest.mark.parametrize(("requests", "tokens", "says"), [(3, 3, "1, 2"), (1, 5, "1 to 4"), (2, 1, "2 to 8")])
def test_what_was_not_measured_is_not_made_up(path: Path, requests: int, tokens: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_cost_table(path, target=TARGET).seconds(requests, tokens)


def test_the_form_that_sglang_reads(path: Path) -> None:
    """Strictly ascending token counts, as many steps a second, and a largest count. Equal counts have one median."""
    served = json.loads((path.parent / "table.sglang.json").read_text())
    assert set(served) == {"sample_batch_tokens", "sample_steps_per_sec", "max_batch_tokens"}
    assert served["sample_batch_tokens"] == [1, 2, 4, 8]
    assert served["sample_steps_per_sec"] == pytest.approx([10, 5, 2, 1])
    assert served["max_batch_tokens"] == 8


def test_steps_that_seem_faster_with_more_tokens_are_told_and_not_handed_on(tmp_path: Path) -> None:
    noisy = [step(1, 1, 0.1), step(1, 2, 0.5), step(1, 4, 0.4), step(2, 2, 0.5), step(2, 8, 0.8)]
    write_cost_table(tmp_path / "t.json", noisy, {"target": TARGET})
    served = json.loads((tmp_path / "t.sglang.json").read_text())
    assert served["sample_steps_per_sec"] == pytest.approx([10, 2.5, 2.5, 1.25])
    said = faster_with_more(noisy)
    assert said is not None
    assert "1 of the steps" in said
    assert "20% (4 tokens and 2 tokens at batch size 1)" in said
    assert faster_with_more(STEPS) is None


@pytest.mark.parametrize(
    ("changed", "says"),
    [({"revision": "abd"}, "is of another target"), ({"dtype": "bfloat16"}, "another number format")],
)
def test_a_table_of_another_target_is_refused(path: Path, changed: dict[str, str], says: str) -> None:
    with pytest.raises(StageError, match=says):
        read_cost_table(path, target={**TARGET, **changed})


def test_a_missing_or_edited_table_is_refused(path: Path) -> None:
    with pytest.raises(StageError, match="missing"):
        read_cost_table(path.with_name("none.json"), target=TARGET)
    path.write_text(path.read_text().replace("0.6", "0.5"))
    with pytest.raises(StageError, match="edited"):
        read_cost_table(path, target=TARGET)
    path.write_text(path.read_text()[:50])
    with pytest.raises(StageError, match="cannot be read"):
        read_cost_table(path, target=TARGET)


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([], "incomplete"),
        ([step(2, 4, 0.1)], "incomplete"),
        ([step(1, 1, 0.1), step(1, 1, 0.2)], "incomplete"),
        ([step(4, 2, 0.1)], "makes no sense"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(tmp_path: Path, steps: list[Step], says: str) -> None:
    path = tmp_path / "table.json"
    write_cost_table(path, steps or STEPS, {"target": TARGET})
    if not steps:
        from deepspec_core.evaluation.sealed_json import write_sealed

        write_sealed(path, {"target": TARGET, "steps": []}, form="deepspec-cost-table", version=1)
    with pytest.raises(StageError, match=says):
        read_cost_table(path, target=TARGET)


@pytest.mark.parametrize("seconds", [0.0, -1.0, "fast", True, None, 10**400])
def test_times_that_are_none_are_refused(tmp_path: Path, seconds: Any) -> None:
    from deepspec_core.evaluation.sealed_json import write_sealed

    row = {"requests": 1, "tokens": 1, "repeats": 3, "lower_quartile": 1.0, "upper_quartile": 1.0, "seconds": seconds}
    path = tmp_path / "table.json"
    write_sealed(path, {"target": TARGET, "steps": [row]}, form="deepspec-cost-table", version=1)
    with pytest.raises(StageError, match="makes no sense"):
        read_cost_table(path, target=TARGET)


class Watched(TinyTarget):
    """A tiny target that notes the positions of what it is asked."""

    def decode(self, slots: Any, input_ids: Any, positions: Any, taps: Any, *, last_only: bool = False) -> Any:
        self.asked.append((len(slots), positions[0].tolist(), last_only))
        assert int(input_ids.max()) < 12
        return super().decode(slots, input_ids, positions, taps, last_only=last_only)


def test_every_step_verifies_after_the_context() -> None:
    target = Watched(vocab_size=12, hidden_size=8, num_layers=2, seed=3)
    target.asked = []
    steps = measure_steps(target, batch_sizes=(1, 3), widths=(1, 2, 5), context=6, repeats=4, seed=0)
    assert {(one.requests, one.tokens) for one in steps} == {(1, 1), (1, 2), (1, 5), (3, 3), (3, 6), (3, 15)}
    assert all(0 < one.lower_quartile <= one.seconds <= one.upper_quartile for one in steps)
    assert all(one.repeats == 4 for one in steps)
    timed = [(size, positions) for size, positions, last_only in target.asked if not last_only]
    assert {(size, len(positions)) for size, positions in timed} == {(size, w) for size in (1, 3) for w in (1, 2, 5)}
    assert all(positions == list(range(6, 6 + len(positions))) for _, positions in timed)
    # Batch sizes take turns.
    sizes = [size for size, _ in timed]
    assert sum(now != before for now, before in zip(sizes[1:], sizes, strict=False)) == 2 * TURNS - 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("out of memory: tried to allocate 2 GiB\nmore"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
        MemoryError(),
    ],
)
def test_a_batch_that_does_not_fit_is_one_message(error: Exception) -> None:
    target = TinyTarget(vocab_size=12, hidden_size=8, num_layers=2, seed=3)

    def too_large(*_: Any) -> None:
        raise error

    target.open_slots = too_large
    with pytest.raises(TargetError, match="7 sequences of 8 tokens") as caught:
        measure_steps(target, batch_sizes=(7,), widths=(1, 2), context=6, repeats=3, seed=0)
    assert "Leave this batch size out" in str(caught.value)


def test_another_error_is_not_taken_for_lack_of_memory() -> None:
    target = TinyTarget(vocab_size=12, hidden_size=8, num_layers=2, seed=3)

    def broken(*_: Any) -> None:
        raise RuntimeError("shapes do not match")

    target.open_slots = broken
    with pytest.raises(RuntimeError, match="shapes"):
        measure_steps(target, batch_sizes=(1,), widths=(1,), context=6, repeats=3, seed=0)
