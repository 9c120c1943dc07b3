"""A draft that nothing could read or decode with once it is trained is told before the first stage."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve

from deepspec_core.checkpoints.published import config_text
from deepspec_core.config.load import load_run_file
from deepspec_core.errors import PluginError
from deepspec_core.pipeline.checking import check_before
from deepspec_core.pipeline.estimating import estimate
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.stages import plan
from deepspec_core.pipeline.trying import try_draft
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


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("algorithm", "flash", "'flash'"),
        ("class_name", "Qwen3Draft", "'DSparkModel'"),
        ("taps", (1,), "(1,)"),
        ("max_tokens", 0, "0"),
        ("num_layers", 2.0, "2.0"),
        ("training_keys", ("num_anchor",), "num_anchor"),
        ("unread_options", "num_anchors", "'num_anchors'"),
        ("training_keys", "num_anchors", "'num_anchors'"),
        ("weight_names", {"backbone": "one", "lm_head": "one", "embed_tokens": "one"}, "'one.weight' for"),
    ],
)
def test_a_description_that_cannot_be_so(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: Any, says: str
) -> None:
    describe = DFlashModel.describe
    monkeypatch.setattr(DFlashModel, "describe", lambda self: evolve(describe(self), **{field: value}))
    with pytest.raises(PluginError, match=f"has a wrong description: `{field}`") as caught:
        _check(run_file)
    assert says in f"{caught.value.found} {caught.value.expected}"
    assert caught.value.where == "deepspec-dflash"


def test_a_description_that_fails(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DFlashModel, "describe", _fails)
    with pytest.raises(PluginError, match="draft type 'dflash' of deepspec-dflash"):
        _check(run_file)
    monkeypatch.setattr(DFlashModel, "describe", lambda _: None)
    with pytest.raises(PluginError, match="`describe\\(\\)`"):
        _check(run_file)


@pytest.mark.parametrize(
    ("key", "value", "says"), [("target_layer_ids", [1, 3], "taps (1, 3)"), ("block_size", 0, "must be >= 1")]
)
def test_a_checkpoint_that_would_open_as_another_draft(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any, says: str
) -> None:
    describe = DFlashModel.describe

    def odd(self: DFlashModel) -> Any:
        said = describe(self)
        return evolve(said, config={**said.config, key: value})

    monkeypatch.setattr(DFlashModel, "describe", odd)
    with pytest.raises(PluginError, match="would not open as the draft that was trained") as caught:
        _check(run_file)
    assert says in str(caught.value.found)


def test_an_option_that_the_checkpoint_does_not_give_back(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    describe = DFlashModel.describe

    def forgetful(self: DFlashModel, **more: Any) -> Any:
        said = describe(self)
        return evolve(said, config={**said.config, "num_anchors": 3}, **more)

    monkeypatch.setattr(DFlashModel, "describe", forgetful)
    with pytest.raises(PluginError, match="would not open as the draft that was trained") as caught:
        _check(run_file)
    assert "num_anchors = 3, where training has" in str(caught.value.found)
    assert "unread_options" in str(caught.value.fix)
    monkeypatch.setattr(DFlashModel, "describe", lambda self: forgetful(self, unread_options=("num_anchors",)))
    _check(run_file)


def test_weights_that_the_config_does_not_give(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    init = DFlashModel.__init__

    def growing(self: DFlashModel, *arguments: Any) -> None:
        init(self, *arguments)
        made.append(1)
        self.register_buffer("counted", torch.zeros(len(made)))

    monkeypatch.setattr(DFlashModel, "__init__", growing)
    with pytest.raises(PluginError, match="would not open") as caught:
        _check(run_file)
    assert str(caught.value.found) == "counted is [2], where training has [1]"


def test_a_draft_that_has_nothing_to_train(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init = DFlashModel.__init__

    def frozen(self: DFlashModel, *arguments: Any) -> None:
        init(self, *arguments)
        self.backbone.requires_grad_(False)

    monkeypatch.setattr(DFlashModel, "__init__", frozen)
    with pytest.raises(PluginError, match="'dflash' has nothing to train"):
        _check(run_file)
    plugins = load_plugins()
    with pytest.raises(PluginError, match="'dflash' has nothing to train"):
        estimate(Run(file=load_run_file(run_file, plugins=plugins), path=run_file, plugins=plugins))


def test_the_targets_number_of_layers_is_in_every_config(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = load_plugins()
    run = Run(file=load_run_file(run_file, plugins=plugins), path=run_file, plugins=plugins)
    config = DFlashModel.config
    monkeypatch.setattr(
        DFlashModel, "config", lambda self: {k: v for k, v in config(self).items() if k != "num_target_layers"}
    )
    draft, tried = try_draft(run)
    text = config_text(draft, tried.description, run.target.draft_adapter)
    assert json.loads(text)["num_target_layers"] == run.target.architecture.num_layers == 12
