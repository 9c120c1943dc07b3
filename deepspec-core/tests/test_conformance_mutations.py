"""Wrong implementations of every contract are caught by its suite, in words that say the clause; right ones pass."""

import ast
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import last_hidden_draft
import pytest
import torch
import wrong_cache_members as members
import wrong_caches as caches
import wrong_choices
import wrong_components as components
import wrong_drafts as drafts
import wrong_in_training
import wrong_targets as targets
import wrong_weights
from torch import Tensor

import deepspec_core
import deepspec_core.testing as kit
from deepspec_core.errors import DataError
from deepspec_core.plugins import ComponentSpec, DraftModelSpec, ExportSpec, TargetAdapterSpec, TaskSpec
from deepspec_core.testing.conformance import Suite, clauses

ROOT = Path(__file__).parents[2]
DRAFTS = (*drafts.CAUGHT, *wrong_choices.CAUGHT, *wrong_in_training.CAUGHT, *wrong_weights.CAUGHT)
SUITES = [getattr(kit, name) for name in kit.__all__ if name.endswith("Suite")]


def first_of(planted: Any) -> list[Any]:
    """All that is planted. Those after the first four are slow tests."""
    return [
        pytest.param(one, id=getattr(getattr(one, "wrong", None), "__name__", str(one)), marks=marks)
        for number, one in enumerate(planted)
        for marks in ([] if number < 4 else [pytest.mark.slow],)
    ]


def plugin(hook: str, *specs: Any) -> Any:
    """As a plugin.py with one hook."""
    return SimpleNamespace(**{hook: lambda: specs}, __name__="planted")


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Any:
    """plant(thing): a `build` that names it."""

    def planted(thing: Any) -> str:
        monkeypatch.setattr(components, "planted", thing, raising=False)
        return "wrong_components:planted"

    return planted


def said_of(suite: type[Suite], test: str) -> str:
    """The message of one test, which has to fail."""
    found = kit.broken_by(suite, [f"test_{test}"])
    assert found, f"not caught by {test}"
    return found[f"test_{test}"]


def in_words(message: str, suite: type[Suite], test: str, word: str) -> None:
    told = clauses(suite)[f"test_{test}"]
    assert "does not keep its contract" in message
    assert f"the contract asks:  {told.asks}" in message
    assert f"written in:         {told.written}" in message
    seen = message.split("seen:")[1].split("written in:")[0]
    assert word in seen
    assert "Traceback" not in message


def draft_suite(build: str) -> type[kit.DraftModelSuite]:
    spec = DraftModelSpec(
        name="last-hidden", summary="", build=build, options=last_hidden_draft.LastHiddenOptions,
        class_suffix="LastHiddenDraft", options_of="last_hidden_draft:options_of", needs_taps=False,
        recognise=lambda config: str(config.get("architectures")).endswith("LastHiddenDraft']"),
        takes_packed=True,
    )  # fmt: skip

    class Draft(kit.DraftModelSuite):
        component = "last-hidden"
        plugin = plugin("deepspec_draft_models", spec)
        options: ClassVar = {"from_target": True}

        def target_weights(self) -> Mapping[str, Tensor]:
            parts = {"down.weight": (32, 64), "down.bias": (32,), "up.weight": (96, 32)}
            return {f"mtp.{name}": torch.zeros(shape, dtype=torch.bfloat16) for name, shape in parts.items()}

    return Draft


def test_the_right_draft_keeps_everything() -> None:
    assert kit.broken_by(draft_suite("last_hidden_draft:LastHiddenDraft")) == {}
    assert kit.broken_by(draft_suite("wrong_drafts:LabelsAlone")) == {}


def test_a_draft_without_probabilities_may_choose_otherwise() -> None:
    class Chosen(draft_suite("wrong_choices:ProposesTheLeastProbable")):  # type: ignore[misc]
        def chosen(self, draft: Any, rows: Any) -> Tensor:
            return -self.proposed(draft, rows)

    assert kit.broken_by(Chosen, ["test_greedy_tokens_are_those_of_training"]) == {}


@pytest.mark.parametrize("caught", first_of(DRAFTS))
def test_wrong_drafts(caught: drafts.Caught) -> None:
    suite = draft_suite(f"{caught.wrong.__module__}:{caught.wrong.__name__}")
    in_words(said_of(suite, caught.test), suite, caught.test, caught.word)


def test_rows_of_another_form_are_told_by_the_contract() -> None:
    found = kit.broken_by(draft_suite("wrong_drafts:WrongLength"))
    assert len(found) > 5
    for name, message in found.items():
        assert "`block`" in message, f"{name}: {message}"


@pytest.mark.parametrize("what", first_of(components.TERMS))
def test_wrong_losses(what: str, plant: Any) -> None:
    wrong, test, word = components.TERMS[what]

    class Term(kit.LossSuite):
        component = "wrong"
        plugin = plugin("deepspec_losses", ComponentSpec(name="wrong", summary="", build=plant(wrong)))

    in_words(said_of(Term, test), Term, test, word)


@pytest.mark.parametrize("what", first_of(components.WEIGHTINGS))
def test_wrong_weightings(what: str, plant: Any) -> None:
    wrong, test, word = components.WEIGHTINGS[what]

    class Weighting(kit.WeightingSuite):
        component = "wrong"
        plugin = plugin("deepspec_weightings", ComponentSpec(name="wrong", summary="", build=plant(lambda: wrong)))

    in_words(said_of(Weighting, test), Weighting, test, word)


@pytest.mark.parametrize("what", [*first_of(caches.CACHES), *first_of(members.CACHES)])
def test_wrong_caches(what: str, plant: Any) -> None:
    test, word = (caches.CACHES | members.CACHES)[what]
    kind = caches.WrongCache if what in caches.CACHES else members.WrongMembers
    wrong = type("Wrong", (kind,), {"what": what})

    class Cache(kit.CacheFormatSuite):
        component, dtypes = "wrong", ("float32",)
        plugin = plugin("deepspec_cache_formats", ComponentSpec(name="wrong", summary="", build=plant(wrong)))

    in_words(said_of(Cache, test), Cache, test, word)


def test_a_right_cache_with_all_members(plant: Any) -> None:
    class Cache(kit.CacheFormatSuite):
        component, dtypes = "wrong", ("float32",)
        plugin = plugin(
            "deepspec_cache_formats", ComponentSpec(name="wrong", summary="", build=plant(members.WrongMembers))
        )

    assert kit.broken_by(Cache) == {}


def task_suite(build: str, **more: Any) -> type[kit.TaskSuite]:
    class Task(kit.TaskSuite):
        component = "wrong"
        plugin = plugin("deepspec_tasks", TaskSpec(name="wrong", summary="", build=build, **more))

    return Task


@pytest.mark.parametrize("what", first_of(components.TASKS))
def test_wrong_tasks(what: str, plant: Any) -> None:
    wrong, test, word = components.TASKS[what]
    suite = task_suite(plant(wrong))
    in_words(said_of(suite, test), suite, test, word)


@pytest.mark.parametrize("what", first_of(["", *components.FROM_ROW]))
def test_tasks_that_read_rows_wrongly(what: str, plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def right(row: Any) -> Any:
        if "question" not in row:
            raise DataError("no question")
        return components._question(row)

    read, word = components.FROM_ROW[what] if what else (right, "")

    def refuses_others(row: Any) -> Any:
        return read(row) if "question" in row or "any row" in what else right(row)

    monkeypatch.setattr(components, "planted_rows", refuses_others, raising=False)
    suite = task_suite(plant(lambda *given: components._asked()), from_row="wrong_components:planted_rows")
    suite.rows = components.ROWS  # type: ignore[attr-defined]
    if not what:
        assert kit.broken_by(suite, ["test_rows_of_a_file"]) == {}
        return
    in_words(said_of(suite, "rows_of_a_file"), suite, "rows_of_a_file", word)


class Tapped(last_hidden_draft.LastHiddenDraft):
    """Says the taps that it is built with, and reads none."""

    def __init__(self, options: Any, adapter: Any, taps: tuple[int, ...]) -> None:
        super().__init__(options, adapter, ())
        self.said = taps

    def describe(self) -> Any:
        from attrs import evolve

        return evolve(super().describe(), taps=self.said)


@pytest.mark.parametrize("what", first_of(["", *components.EXPORTERS]))
def test_wrong_exporters(what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(components.WrongExporter, "elsewhere", tmp_path, raising=False)
    monkeypatch.setattr(components, "Tapped", Tapped, raising=False)
    monkeypatch.setattr(components.WrongExporter, "what", what)
    export = ExportSpec(name="wrong", summary="", build="wrong_components:WrongExporter", algorithm="last-hidden")
    draft = DraftModelSpec(
        name="last-hidden", summary="", build="wrong_components:Tapped", options=last_hidden_draft.LastHiddenOptions,
        class_suffix="LastHiddenDraft", options_of="last_hidden_draft:options_of",
    )  # fmt: skip

    class Export(kit.ExporterSuite):
        component, algorithm = "wrong", "last-hidden"
        plugin = (plugin("deepspec_exporters", export), plugin("deepspec_draft_models", draft))

    if not what:
        assert kit.broken_by(Export) == {}
        return
    test, word = components.EXPORTERS[what]
    in_words(said_of(Export, test), Export, test, word)


@pytest.mark.parametrize("what", first_of(targets.CAUGHT))
def test_wrong_targets(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets.WrongAdapter, "what", what)
    spec = TargetAdapterSpec(name="wrong", summary="", build="wrong_targets:WrongAdapter", model_types=("qwen3",))

    class Target(kit.TargetAdapterSuite):
        component = "wrong"
        plugin = plugin("deepspec_target_adapters", spec)
        template = targets.TEMPLATE

    test, word = targets.CAUGHT[what]
    in_words(said_of(Target, test), Target, test, word)


def caught() -> Mapping[str, list[str]]:
    """What is planted and caught, by contract."""
    return {
        "draft": [str(one.wrong.__doc__) for one in DRAFTS],
        "loss": list(components.TERMS),
        "weighting": list(components.WEIGHTINGS),
        "target": list(targets.CAUGHT),
        "cache": [*caches.CACHES, *members.CACHES],
        "task": [*components.TASKS, *components.FROM_ROW],
        "exporter": list(components.EXPORTERS),
    }


def table() -> str:
    """As docs/conformance.md has it."""
    rows = [f"| {kind} | {len(wrong)} | {'; '.join(wrong)} |" for kind, wrong in caught().items()]
    return "\n".join(["| contract | caught | planted |", "|---|---|---|", *rows])


def test_the_page_has_the_table() -> None:
    assert all(len(wrong) >= 5 for wrong in caught().values())
    assert table() in (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.__name__)
def test_clauses_are_written_where_they_say(suite: type[Suite]) -> None:
    source = Path(deepspec_core.__file__).parents[1]
    assert len(clauses(suite)) == len([name for name in dir(suite) if name.startswith("test_")])
    for told in clauses(suite).values():
        page, anchored, anchor = told.written.partition("#")
        if anchored:
            headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", one.lower()).strip().replace(" ", "-") for one in headings}
        else:
            file, _, name = told.written.partition(": ")
            tree = ast.parse((source / file).read_text(encoding="utf-8"))
            assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
