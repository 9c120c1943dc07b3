"""Options that a checkpoint does not give back are told by name, in the suite of drafts too."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import last_hidden_draft
import pytest
from attrs import evolve, field, frozen
from attrs.validators import le
from last_hidden_draft import LastHiddenDraft, LastHiddenOptions, options_of

import deepspec_core.testing as kit
from deepspec_core.checkpoints.options_back import lost_option
from deepspec_core.contracts.draft import DraftDescription
from deepspec_core.plugins import DraftModelSpec
from deepspec_core.testing.changed_options import changed_options


@frozen(kw_only=True)
class Head:
    rank: int = field(default=8, validator=le(8))
    kind: Literal["vanilla", "gated"] = "vanilla"


@frozen(kw_only=True)
class Options:
    scale: float = 1.0
    mask: int | None = None
    widths: tuple[int, ...] = (1, 2)
    deep: bool = False
    head: Head = Head()


@pytest.mark.parametrize(
    ("back", "unread", "said"),
    [
        (Options(scale=2.0), (), None),
        (Options(scale=2.0, mask=7), (), None),
        (Options(), (), "scale = 1.0, where training has 2.0"),
        (Options(), ("scale",), None),
        (Options(scale=2.0, head=Head(rank=4)), (), "head.rank = 4, where training has 8"),
        (Options(scale=2.0, head=Head(kind="gated")), ("head.kind",), None),
        (Head(), (), "no option scale, where training has 2.0"),
        (None, (), "gives no options, but NoneType"),
    ],
)
def test_the_first_lost_option(back: Any, unread: tuple[str, ...], said: str | None) -> None:
    found = lost_option(Options(scale=2.0), back, unread)
    assert (found is None) if said is None else (found is not None and said in found)


def test_a_list_of_json_is_a_tuple() -> None:
    assert lost_option(Options(widths=(1, 2)), Options(widths=[1, 2])) is None  # type: ignore[arg-type]
    assert lost_option(Options(widths=(1, 2)), Options(widths=(2, 1))) is not None


def test_every_number_and_word_is_changed_alone() -> None:
    changed = dict(changed_options(Options()))
    assert changed["scale"][0] == Options(scale=0.5)
    assert changed["mask"][0] == Options(mask=16)
    assert changed["deep"] == [Options(deep=True)]
    assert changed["head.rank"] == [Options(head=Head(rank=7)), Options(head=Head(rank=4))], "more is refused"
    assert changed["head.kind"] == [Options(head=Head(kind="gated"))]


class SaysNothingOfAnchors(LastHiddenDraft):
    """Its config.json has no `num_anchors`, and nothing says that only training reads it."""

    def describe(self) -> DraftDescription:
        return evolve(super().describe(), unread_options=())


@frozen(kw_only=True)
class ScaledOptions(LastHiddenOptions):
    scale: float = 1.0


class Scaled(LastHiddenDraft):
    """A draft with one more option, which `scaled_back` forgets."""


def scaled_back(config: Mapping[str, Any]) -> tuple[ScaledOptions, tuple[int, ...]]:
    return ScaledOptions(block_size=config["block_size"], from_target=config["from_target"]), ()


@pytest.mark.parametrize(
    ("build", "options", "back", "seen"),
    [
        (LastHiddenDraft, LastHiddenOptions, options_of, None),
        (Scaled, ScaledOptions, scaled_back, "scale = 1.0, where training has 0.5, with"),
        (SaysNothingOfAnchors, LastHiddenOptions, options_of, "num_anchors = 16, where training has 17"),
    ],
)
def test_the_suite_tries_other_values_of_every_option(
    monkeypatch: pytest.MonkeyPatch, build: Any, options: Any, back: Any, seen: str | None
) -> None:
    monkeypatch.setattr(last_hidden_draft, "planted", build, raising=False)
    monkeypatch.setattr(last_hidden_draft, "planted_back", back, raising=False)
    spec = DraftModelSpec(
        name="last-hidden", summary="", build="last_hidden_draft:planted", options=options,
        class_suffix="LastHiddenDraft", options_of="last_hidden_draft:planted_back", needs_taps=False,
        recognise=lambda config: str(config.get("architectures")).endswith("LastHiddenDraft']"),
    )  # fmt: skip

    class Draft(kit.DraftModelSuite):
        component = "last-hidden"
        plugin = SimpleNamespace(deepspec_draft_models=lambda: (spec,), __name__="planted")
        options: ClassVar = {}

    found = kit.broken_by(Draft, ["test_options_come_back"])
    assert (found == {}) if seen is None else (seen in found["test_options_come_back"])
