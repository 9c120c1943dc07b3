"""A batch that does not fit memory is halved; a sample that raises is left out, listed and counted over all workers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from thread_workers import quick, together  # noqa: F401

from deepspec_core.contracts.proposer import Proposal, Sampling
from deepspec_core.crew import ALONE, Crew
from deepspec_core.decoding.engine import Completion, Request
from deepspec_core.decoding.out_of_memory import is_out_of_memory
from deepspec_core.errors import DataError, PluginError, StageError
from deepspec_core.evaluation.evaluator import evaluate, recorded, summarise
from deepspec_core.evaluation.group_decoding import Decoding, Group
from deepspec_core.testing.table_proposer import TableProposer
from deepspec_core.testing.tiny_target import TinyTarget

VOCAB, BAD = 12, 11


def no_cuda_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def no_cpu_memory() -> None:
    torch.empty(2**56)  # what PyTorch says itself


class Cramped(TinyTarget):
    """A target with memory for so many slots, which raises an error on prompts with the token BAD."""

    fits = 99
    full: Any = staticmethod(no_cuda_memory)

    def __init__(self) -> None:
        super().__init__(vocab_size=VOCAB, hidden_size=8, num_layers=2, seed=3)
        self.opened: list[int] = []

    def open_slots(self, num_slots: int, max_length: int) -> None:
        self.opened.append(num_slots)
        if num_slots > self.fits:
            self.full()
        super().open_slots(num_slots, max_length)

    def decode(self, slots: Any, input_ids: Any, *arguments: Any, **options: Any) -> Any:
        if options.get("last_only") and (input_ids == BAD).any():
            raise IndexError("index out of range in self")
        return super().decode(slots, input_ids, *arguments, **options)


def requests(*bad: int) -> list[Request]:
    return [Request(id=f"p{n}", prompt_ids=(4, BAD if n in bad else 7, 3, 2 + n % 8), seed=n) for n in range(11)]


def decoded(
    folder: Path, target: TinyTarget, asked: list[Request], proposer: Any = None, crew: Crew = ALONE, **more: Any
) -> list[Group]:
    folder.mkdir(exist_ok=True)
    return evaluate(
        asked,
        Decoding(
            target=target,
            proposer=proposer or TableProposer(vocab_size=VOCAB, max_tokens=3),
            sampling=Sampling(temperature=1.0),
            stop_ids=(),
            max_new_tokens=8,
            max_length=24,
            batch_size=4,
        ),
        journal=folder / "j.jsonl",
        prompts_digest="d",
        what="test",
        crew=crew,
        **more,
    )


def answers(groups: list[Group]) -> dict[str, Completion]:
    return {done.id: done for group in groups for done in group.completions}


@pytest.mark.parametrize("full", [no_cuda_memory, no_cpu_memory])
def test_a_batch_that_does_not_fit_is_halved(
    tmp_path: Path, full: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    roomy = decoded(tmp_path / "roomy", Cramped(), requests())
    monkeypatch.setattr(Cramped, "full", staticmethod(full))
    target = Cramped()
    target.fits = 1
    groups = decoded(tmp_path / "cramped", target, requests())
    assert answers(groups) == answers(roomy), "what is drawn does not depend on the size"
    assert [group.halved_to for group in groups] == [1, 1, 1]
    assert target.opened[:4] == [4, 1, 2, 1], "each size is tried once, and what it took is let go"
    assert set(target.opened[4:]) == {1}, "both decodings of every group run at the size that fits"
    assert summarise(groups, seed=0)["halved_to"] == [1]
    assert "halved_to" not in summarise(roomy, seed=0)
    said = [record.getMessage() for record in caplog.records]
    assert sum("sequences at once do not fit memory" in line for line in said) == 2
    assert recorded(tmp_path / "cramped" / "j.jsonl")[1] == groups


class Heavy(TableProposer):
    """A draft without memory for more than two slots; the error comes in the middle of a decoding."""

    def propose(self, slots: Any, *arguments: Any) -> Proposal:
        if len(slots) > 2:
            no_cuda_memory()
        return super().propose(slots, *arguments)


def test_both_decodings_run_at_the_size_of_the_draft(tmp_path: Path) -> None:
    target = Cramped()
    groups = decoded(tmp_path, target, requests(), Heavy(vocab_size=VOCAB, max_tokens=3))
    assert [group.halved_to for group in groups] == [2, 2, 2]
    assert target.opened[-6:] == [2] * 6, "plain and speculative, three groups"


def test_going_on_begins_with_the_size_that_fitted(tmp_path: Path) -> None:
    target = Cramped()
    target.fits = 2
    whole = decoded(tmp_path, target, requests())
    journal = tmp_path / "j.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:-1]))
    again = Cramped()
    again.fits = 2
    assert answers(decoded(tmp_path, again, requests())) == answers(whole)
    assert set(again.opened) == {2}


def test_a_sample_that_raises_is_listed_and_the_others_are_as_without_it(tmp_path: Path) -> None:
    groups = decoded(tmp_path / "bad", Cramped(), requests(5), max_failures=0.05)
    good = decoded(tmp_path / "good", Cramped(), [one for one in requests() if one.id != "p5"])
    assert answers(groups) == answers(good)
    summary = summarise(groups, seed=0)
    assert summary["samples"] == 10
    (failure,) = summary["failures"]
    assert failure["id"] == "p5"
    assert failure["reason"].startswith("IndexError: index out of range in self (")
    assert [len(group.completions) for group in groups] == [4, 3, 3]
    assert recorded(tmp_path / "bad" / "j.jsonl")[1] == groups
    assert decoded(tmp_path / "bad", Cramped(), requests(5), max_failures=0.05) == groups, "from the journal"


@pytest.mark.parametrize(("bad", "most"), [((5,), 0.0), ((1, 9), 0.05), (range(11), 0.9)])
def test_too_many_failures_end_the_evaluation(tmp_path: Path, bad: Any, most: float) -> None:
    with pytest.raises(DataError, match=r"(?s)Too many samples.* of 11; p\d+: IndexError.*evaluate\.max_failures"):
        decoded(tmp_path, Cramped(), requests(*bad), max_failures=most)


def test_nothing_left_is_an_error_whatever_may_fail(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)No sample of a task.*IndexError"):
        decoded(tmp_path, Cramped(), requests(*range(11)), max_failures=1.0)


def test_refused_prompts_count_too(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 of 12"):
        decoded(tmp_path, Cramped(), requests(5), max_failures=0.05, refused=1)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("bad", "ends"), [((5,), False), ((1, 5), True)])
def test_workers_count_the_failures_of_the_whole(tmp_path: Path, bad: tuple[int, ...], ends: bool) -> None:
    """Each of two workers has one at most, which its own share would forgive."""

    def work(crew: Crew) -> list[Group]:
        return decoded(tmp_path / "two", Cramped(), requests(*bad), crew=crew, max_failures=0.05)

    first, second = together(2, work)
    if ends:
        # The one that counts the second failure says so; the other one ends with it.
        said = [end for end in (first, second) if isinstance(end, DataError) and "2 of 11" in str(end)]
        assert said, (first, second)
        assert isinstance(first, DataError | StageError)
        # The second may have handed over its share before the first counted the failure that is one too many.
        assert isinstance(second, DataError | StageError | list)
        return
    (alone,) = together(1, lambda crew: decoded(tmp_path / "one", Cramped(), requests(*bad), max_failures=0.05))
    assert answers(first) == answers(alone)
    assert summarise(first, seed=0)["failures"] == summarise(alone, seed=0)["failures"] != []


class Crowded(Cramped):
    def decode(self, slots: Any, *arguments: Any, **options: Any) -> Any:
        if len(slots) > 1:
            raise ValueError("more than one")
        return super().decode(slots, *arguments, **options)


def test_an_error_that_no_sample_raises_alone_is_no_samples(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="more than one"):
        decoded(tmp_path, Crowded(), requests(), max_failures=1.0)


class Wrong(TableProposer):
    def propose(self, *arguments: Any) -> Proposal:
        found = super().propose(*arguments)
        return evolve(found, tokens=found.tokens + VOCAB)


class Choosy(TableProposer):
    """A draft that raises an error on prompts with the token BAD."""

    def start(self, slots: Any, prompt_ids: Any, *arguments: Any) -> None:
        if (prompt_ids == BAD).any():
            raise KeyError("no such state")
        super().start(slots, prompt_ids, *arguments)


class Patient(Cramped):
    """The target raises nothing on BAD."""

    def decode(self, *arguments: Any, **options: Any) -> Any:
        return TinyTarget.decode(self, *arguments, **options)


def test_a_sample_on_which_the_draft_raises_is_listed_and_the_others_are_as_without_it(tmp_path: Path) -> None:
    choosy = Choosy(vocab_size=VOCAB, max_tokens=3)
    groups = decoded(tmp_path / "bad", Patient(), requests(5), choosy, max_failures=0.05)
    good = decoded(tmp_path / "good", Patient(), [one for one in requests() if one.id != "p5"])
    assert answers(groups) == answers(good)
    (failure,) = summarise(groups, seed=0)["failures"]
    assert failure["id"] == "p5"
    assert failure["reason"].startswith("a proposer failed in start(): KeyError: ")
    with pytest.raises(DataError, match=r"(?s)Too many samples.* of 11; p\d+: a proposer failed in start\(\)"):
        decoded(tmp_path / "all", Patient(), requests(*range(11)), choosy, max_failures=0.5)


def test_a_wrong_proposer_is_no_samples_failure(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="cannot be verified"):
        decoded(tmp_path, Cramped(), requests(), Wrong(vocab_size=VOCAB, max_tokens=3), max_failures=1.0)


def test_which_errors_are_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        no_cpu_memory()
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not is_out_of_memory(ValueError("out of memory"))
