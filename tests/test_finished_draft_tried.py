"""A draft that nothing could read or decode with once it is trained is told before the first stage."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve

from deepspec_core.config.load import load_run_file
from deepspec_core.errors import PluginError
from deepspec_core.pipeline.checking import check_before
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.stages import plan
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.plugins.registry import Registry
from deepspec_core.plugins.specs import DraftModelSpec
from deepspec_dflash.model import DFlashModel
from deepspec_dflash.proposer import DFlashProposer


def _check(path: Path) -> None:
    plugins = load_plugins()
    run = Run(file=load_run_file(path, plugins=plugins), path=path, plugins=plugins)
    check_before(run, plan(run))


def _with_recognition(monkeypatch: pytest.MonkeyPatch, **answers: Callable[[Any], bool]) -> None:
    """Draft types that recognise what `answers` say."""
    drafts = Registry._drafts

    def changed(self: Registry) -> Any:
        for offer in drafts(self):
            assert isinstance(offer.spec, DraftModelSpec)
            answer = answers.get(offer.spec.name)
            yield offer if answer is None else evolve(offer, spec=evolve(offer.spec, recognise=answer))

    monkeypatch.setattr(Registry, "_drafts", lambda self: list(changed(self)))


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ({"dflash": lambda _: False}, "no installed algorithm recognises"),
        ({"eagle3": lambda _: True}, "more than one algorithm recognises this checkpoint: dflash, eagle3"),
        ({"dflash": lambda _: False, "eagle3": lambda _: True}, "'eagle3' of deepspec-eagle3 does"),
        ({"dflash": lambda config: config["gone"]}, "KeyError: 'gone'"),
    ],
)
def test_a_checkpoint_that_is_not_its_own(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, answers: dict[str, Any], says: str
) -> None:
    _with_recognition(monkeypatch, **answers)
    with pytest.raises(PluginError, match="'dflash' would not be recognised") as caught:
        _check(run_file)
    assert says in str(caught.value.found)
    assert caught.value.where == "deepspec-dflash"


def test_a_config_that_cannot_be_written(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    describe = DFlashModel.describe

    def odd(self: DFlashModel) -> Any:
        said = describe(self)
        return evolve(said, config={**said.config, "odd": {1, 2}})

    monkeypatch.setattr(DFlashModel, "describe", odd)
    with pytest.raises(PluginError, match="cannot be written"):
        _check(run_file)


def _fails(_: object) -> Any:
    raise KeyError("no decoding yet")


@pytest.mark.parametrize(("gives", "says"), [(_fails, "no decoding yet"), (lambda _: 3, "int")])
def test_a_draft_without_a_proposer(run_file: Path, monkeypatch: pytest.MonkeyPatch, gives: Any, says: str) -> None:
    monkeypatch.setattr(DFlashModel, "proposer", gives)
    with pytest.raises(PluginError, match="proposer") as caught:
        _check(run_file)
    assert says in str(caught.value.found)
    assert caught.value.where == "deepspec-dflash"


@pytest.mark.parametrize("reads", [lambda t: t.sum().item(), lambda t: t.nonzero(), lambda t: t.float().numpy()])
def test_a_proposer_that_reads_numbers_is_not_refused(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, reads: Callable[[torch.Tensor], Any]
) -> None:
    def reading(self: DFlashModel) -> DFlashProposer:
        reads(self.lm_head.weight)
        return DFlashProposer(self)

    monkeypatch.setattr(DFlashModel, "proposer", reading)
    _check(run_file)
