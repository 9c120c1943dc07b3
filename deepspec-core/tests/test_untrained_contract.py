"""What a plugin may offer as a draft that is not trained, and what is refused with the package's name."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attrs import frozen

from deepspec_core.contracts.untrained import Surroundings, UntrainedDescription, UntrainedDraft
from deepspec_core.errors import CheckpointError, PluginError
from deepspec_core.plugins import DraftModelSpec
from deepspec_core.plugins.registry import Offer, Registry
from deepspec_core.testing.table_proposer import TableProposer
from deepspec_core.testing.tiny_target import TinyTarget
from deepspec_core.untrained.making import make_untrained, proposer_of, revision_of


@frozen
class Options:
    size: int = 3


class Odd:
    """A draft whose facts and files a test sets."""

    said: Any = UntrainedDescription(algorithm="odd", max_tokens=2)
    files = ""

    def __init__(self, options: Any, surroundings: Surroundings) -> None:
        self.surroundings = surroundings

    def describe(self) -> UntrainedDescription:
        return self.said

    def digest(self) -> str:
        return self.files

    def proposer(self) -> TableProposer:
        return TableProposer(vocab_size=64, max_tokens=2, taps=())

    def parameters(self) -> int:
        return 0


def spec(**fields: Any) -> DraftModelSpec:
    return DraftModelSpec(name="odd", summary="", build="odd_draft:build", trained=False, **fields)


Make = Callable[..., UntrainedDraft]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Make:
    """make(build): what core makes with it, in the place of a plugin's."""
    target = TinyTarget()
    registry = Registry([Offer(kind="draft", spec=spec(), plugin="odd", package="odd-package", version="1")])

    def made(build: Any) -> UntrainedDraft:
        monkeypatch.setitem(sys.modules, "odd_draft", SimpleNamespace(build=build))  # type: ignore[arg-type]
        return make_untrained(
            "odd",
            Options(),
            architecture=target.architecture,
            tokenizer=None,
            dtype=torch.float32,
            device=target.device,
            base=tmp_path,
            registry=registry,
        )

    return made


def test_it_is_told_about_the_target(make: Make) -> None:
    draft = make(Odd)
    assert isinstance(draft, Odd)
    assert draft.surroundings.architecture.vocab_size == 64
    with pytest.raises(CheckpointError, match="the model that is to draft cannot be opened: no such target directory"):
        draft.surroundings.open_model("./nowhere", None)


@pytest.mark.parametrize(
    ("said", "found"),
    [
        (UntrainedDescription(algorithm="even", max_tokens=2), "algorithm = 'even'"),
        (UntrainedDescription(algorithm="odd", max_tokens=0), "max_tokens = 0"),
        (UntrainedDescription(algorithm="odd", max_tokens=True), "max_tokens = True"),
        (UntrainedDescription(algorithm="odd", max_tokens=2, remarks=(3,)), "remarks = (3,)"),  # type: ignore[arg-type]
        ({"algorithm": "odd"}, "dict"),
    ],
)
def test_facts_that_cannot_be_are_refused(make: Make, monkeypatch: pytest.MonkeyPatch, said: Any, found: str) -> None:
    monkeypatch.setattr(Odd, "said", said)
    with pytest.raises(PluginError, match="has a wrong description") as refused:
        make(Odd)
    assert refused.value.where == "odd-package"
    assert refused.value.found == found


def test_what_is_no_draft_or_fails_is_the_plugins_mistake(make: Make) -> None:
    with pytest.raises(PluginError, match="'odd' is no draft") as refused:
        make(lambda options, surroundings: 3)
    assert (refused.value.where, refused.value.found) == ("odd-package", "int")
    with pytest.raises(PluginError, match="odd-package 1 failed"):
        make(lambda options, surroundings: surroundings.nothing)


@pytest.mark.parametrize("method", ["describe", "digest", "parameters"])
def test_what_fails_or_gives_nothing_is_named_before_anything_runs(
    make: Make, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fails(self: Odd) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(Odd, method, fails)
    with pytest.raises(PluginError, match="odd-package 1 failed"):
        make(Odd)
    monkeypatch.setattr(Odd, method, lambda self: None)
    with pytest.raises(PluginError, match="has a wrong description"):
        make(Odd)


@pytest.mark.parametrize(
    ("proposer", "says"),
    [
        (lambda: None, "None"),
        (lambda: TableProposer(vocab_size=64, max_tokens=7, taps=()), "max_tokens = 7"),
        (lambda: TableProposer(vocab_size=64, max_tokens=2, taps=(99,)), r"taps = \(99,\)"),
        (lambda: 1 // 0, "failed"),
    ],
)
def test_a_proposer_that_does_not_fit_is_named(
    make: Make, monkeypatch: pytest.MonkeyPatch, proposer: Callable[[], Any], says: str
) -> None:
    registry = Registry([Offer(kind="draft", spec=spec(), plugin="odd", package="odd-package", version="1")])
    draft = make(Odd)
    assert proposer_of("odd", draft, registry).max_tokens == 2
    monkeypatch.setattr(Odd, "proposer", lambda self: proposer())
    with pytest.raises(PluginError, match=says) as caught:
        proposer_of("odd", draft, registry)
    assert "odd-package" in str(caught.value)


def test_type_options_and_files_tell_drafts_apart(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = make(Odd)
    found = {revision_of("odd", Options(), draft), revision_of("odd", Options(size=4), draft)}
    found.add(revision_of("other", Options(), draft))
    assert revision_of("odd", Options(), make(Odd)) in found
    monkeypatch.setattr(Odd, "files", "a digest")
    found.add(revision_of("odd", Options(), draft))
    assert len(found) == 4


@pytest.mark.parametrize("field", [{"options_of": "a:b"}, {"class_suffix": "Model"}, {"recognise": bool}])
def test_a_spec_says_nothing_of_checkpoints(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be left out"):
        spec(**field)


def test_a_trained_draft_says_how_its_checkpoint_is_read() -> None:
    with pytest.raises(ValueError, match="options_of"):
        DraftModelSpec(name="toy", summary="", build="a:b", class_suffix="Toy")


def test_only_trained_drafts_have_checkpoints() -> None:
    toy = DraftModelSpec(name="toy", summary="", build="a:b", options_of="a:c")
    offers = [Offer(kind="draft", spec=one, plugin="p", package="p", version="1") for one in (spec(), toy)]
    registry = Registry(offers)
    assert registry.trained_drafts() == ["toy"]
    with pytest.raises(PluginError) as refused:
        registry.recognise({"architectures": ["Unknown"]})
    assert refused.value.expected == "a checkpoint of toy"
