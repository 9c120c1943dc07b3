"""Outputs that differ from plain decoding's: where they part and by how much. And the memory that decoding takes."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve

from deepspec_core.contracts.proposer import Sampling
from deepspec_core.contracts.target import TargetStep
from deepspec_core.decoding.engine import Completion, Request, decode
from deepspec_core.evaluation.evaluator import evaluate, recorded, summarise
from deepspec_core.evaluation.group_decoding import Decoding
from deepspec_core.evaluation.parting import Parting, differs, parting
from deepspec_core.evaluation.peak_memory import forget_peak, peak_bytes
from deepspec_core.evaluation.report import PARTING_HEADINGS, partings
from deepspec_core.testing.table_proposer import TableProposer
from deepspec_core.testing.tiny_target import TinyTarget

VOCAB = 12
PROMPT = (4, 7, 3)


class Coarse(TinyTarget):
    """Where it scores several tokens at once its logits are off, as by rounding, so greedy outputs come to differ."""

    def decode(self, slots: Any, input_ids: Any, positions: Any, taps: Any, **options: Any) -> TargetStep:
        step = super().decode(slots, input_ids, positions, taps, **options)
        if input_ids.shape[1] > 1 and not options.get("last_only"):
            noise = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1))
            step = evolve(step, logits=step.logits + 0.3 * noise)
        return step


def made(kind: type[TinyTarget] = TinyTarget) -> TinyTarget:
    return kind(vocab_size=VOCAB, hidden_size=8, num_layers=2, seed=3)


def completion(*output: int, prompt: tuple[int, ...] = PROMPT) -> Completion:
    return Completion(id="x", prompt_ids=prompt, output_ids=output, finish_reason="length", rounds=())


def logits_after(ids: tuple[int, ...]) -> list[float]:
    """The target's logits after these ids, from a pass that keeps all positions."""
    target = made()
    target.open_slots(1, 32)
    step = target.decode(torch.tensor([0]), torch.tensor([ids]), torch.arange(len(ids))[None], ())
    return step.logits[0, -1].tolist()


def test_the_gap_is_that_of_the_target_where_outputs_part() -> None:
    found = parting(made(), completion(5, 6, 8, 2), completion(5, 6, 9, 2), Sampling())
    logits = logits_after((*PROMPT, 5, 6))
    # Both passes compute the same sums in other products.
    expected = pytest.approx(logits[9] - logits[8], abs=1e-5)
    assert found == Parting(id="x", position=2, plain_token=9, speculative_token=8, logit_gap=expected)


def test_an_output_that_ends_earlier_parts_at_its_end() -> None:
    found = parting(made(), completion(5, 6), completion(5, 6, 9), Sampling())
    assert found == Parting(id="x", position=2, plain_token=9, speculative_token=None, logit_gap=None)


def test_another_prompt_is_not_another_output() -> None:
    assert differs(completion(5), completion(6))
    assert not differs(completion(5), completion(5))
    assert not differs(completion(5), completion(6, prompt=(1, 2)))
    assert not differs(completion(5), None)


@pytest.fixture
def differing(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """The journal and the figures of an evaluation whose target is coarse."""
    requests = [Request(id=str(n), prompt_ids=(*PROMPT, 2 + n), seed=n) for n in range(8)]
    decoding = Decoding(
        target=made(Coarse),
        proposer=TableProposer(vocab_size=VOCAB, max_tokens=3),
        sampling=Sampling(temperature=0.0),
        stop_ids=(),
        max_new_tokens=16,
        max_length=32,
        batch_size=2,
    )
    groups = evaluate(requests, decoding, journal=tmp_path / "j.jsonl", prompts_digest="d", what="test")
    return tmp_path / "j.jsonl", summarise(groups, seed=0)


def test_an_evaluation_lists_every_output_that_differs(differing: tuple[Path, dict[str, Any]]) -> None:
    journal, figures = differing
    requests = [Request(id=str(n), prompt_ids=(*PROMPT, 2 + n), seed=n) for n in range(8)]
    settings: dict[str, Any] = {"stop_ids": (), "max_new_tokens": 16, "batch_size": 2, "max_length": 32}
    plain = {one.id: one for one in decode(made(), None, requests, sampling=Sampling(temperature=0.0), **settings)}
    fast = {done.id: done for group in recorded(journal)[1] for done in group.completions}
    apart = {name for name in plain if plain[name].output_ids != fast[name].output_ids}
    assert 0 < len(apart) < 8
    assert {one["id"] for one in figures["mismatches"]} == apart
    for one in figures["mismatches"]:
        at, ids = one["position"], plain[one["id"]].output_ids
        assert ids[:at] == fast[one["id"]].output_ids[:at]
        assert (ids[at], fast[one["id"]].output_ids[at]) == (one["plain_token"], one["speculative_token"])
        assert one["logit_gap"] > -1e-5  # plain decoding took the best token
    report = {"results": [{"task": "t", "temperature": 0.0, "batch_size": 2, **figures}]}
    rows = partings(report)
    assert len(rows) == len(apart)
    assert all(len(row) == len(PARTING_HEADINGS) for row in rows)


def test_journals_of_before_have_the_ids_alone(differing: tuple[Path, dict[str, Any]]) -> None:
    journal, figures = differing
    head, *lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for line in lines:
        line["mismatches"] = [one["id"] for one in line["mismatches"]]
        del line["speculative"]["peak_bytes"], line["digest"]
    journal.write_text("".join(json.dumps(line) + "\n" for line in (head, *lines)))
    found = summarise(recorded(journal)[1], seed=0)
    assert [one["id"] for one in found["mismatches"]] == [one["id"] for one in figures["mismatches"]]
    assert {one["logit_gap"] for one in found["mismatches"]} == {None}
    assert found["speculative"]["peak_bytes"] is None
    assert found["plain"]["peak_bytes"] == figures["plain"]["peak_bytes"] > 0


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not forget peaks")
def test_the_peak_is_of_the_work_alone() -> None:
    cpu, quarter = torch.device("cpu"), 2**20  # floats of 4 MB
    torch.ones(64 * quarter)  # a peak of before: 256 MB, freed
    forget_peak(cpu)
    before = peak_bytes(cpu)
    torch.ones(32 * quarter)
    after = peak_bytes(cpu)
    assert before is not None
    assert after is not None
    # The kernel counts resident pages in batches.
    assert 120e6 < after - before < 160e6
