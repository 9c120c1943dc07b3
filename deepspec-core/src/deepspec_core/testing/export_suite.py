"""ExporterSuite: tests that an export has all weights and the tapped layers, and writes nothing outside its folder.

This file knows the contract of exporters. Of a format's files it knows only that weights are safetensors and that the
layers stand in a JSON file. The suite of a format with other files overrides how they are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from attrs import evolve
from safetensors.torch import load_file
from torch import Tensor

from deepspec_core.checkpoints.export_facts import facts_of
from deepspec_core.checkpoints.exports import Format, links_in
from deepspec_core.checkpoints.pickles import holds_pickle
from deepspec_core.checkpoints.published import published_weights
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.contracts.export import Exporter, ExportFacts, TargetName
from deepspec_core.errors import DeepSpecError
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.plugins.registry import Registry
from deepspec_core.testing.conformance import Suite, Unmet, clause, require
from deepspec_core.testing.global_draws import no_global_draws
from deepspec_core.testing.random_batches import TAPS, with_large_weights
from deepspec_core.testing.tiny_family import tiny_adapter
from deepspec_core.testing.watched_files import watched_files

_EXPORTER = "deepspec_core/contracts/export.py: Exporter"
_PAGE = "docs/plugins.md#an-export-format"


class ExporterSuite(Suite):
    """Clauses of `contracts.export.Exporter`, with a small draft of its algorithm.

    algorithm: The draft type, which `plugin` or an installed plugin offers.
    draft_options: Options of a small draft.
    shared: Weights that the engine takes from the target, by published name. The export may leave them out.
    layer_offset: The number that the engine adds to a tapped layer's number, such as 1 if it counts the embedding.
    """

    kind = "exporter"
    algorithm: ClassVar[str]
    draft_options: ClassVar[dict[str, Any]] = {}
    taps: ClassVar[tuple[int, ...]] = TAPS
    shared: ClassVar[Sequence[str]] = ("embed_tokens.weight", "lm_head.weight")
    layer_offset: ClassVar[int] = 0

    def adapter(self) -> Any:
        """The contracts.target.TargetAdapter from which the draft is built."""
        return tiny_adapter()

    def draft_registry(self) -> Registry:
        """The registry that has the draft type: that of `plugin` if it offers the type, else the installed plugins'."""
        own = self.registry()
        return own if self.algorithm in own.names("draft") else load_plugins().registry

    def draft(self) -> DraftModel:
        """A draft with large random weights."""
        registry = self.draft_registry()
        kind = registry.get("draft", self.algorithm).options
        torch.manual_seed(0)
        options = None if kind is None else kind(**self.draft_options)
        made = registry.load("draft", self.algorithm)(options, self.adapter(), self.taps)
        draft: DraftModel = with_large_weights(made).eval()
        return draft

    def facts(self, draft: DraftModel) -> ExportFacts:
        """The facts about the draft that the exporter is given."""
        return facts_of(draft, self.adapter(), target=TargetName(name="org/target"))

    def exporter(self) -> Exporter:
        """A new exporter."""
        made: Exporter = self.registry().load("exporter", self.component, algorithm=self.algorithm)()
        return made

    def weights(self, out: Path) -> dict[str, Tensor]:
        """The tensors of an export, by the names that the format gives them."""
        return {name: part for path in sorted(out.rglob("*.safetensors")) for name, part in load_file(path).items()}

    def layers(self, out: Path) -> list[Any]:
        """Every list of numbers in an export's JSON files. One of them must be the tapped layers."""
        return [one for path in sorted(out.rglob("*.json")) for one in _lists(_content(path))]

    @contextmanager
    def written(self, draft: DraftModel | None = None) -> Iterator[Path]:
        """An export in a temporary folder."""
        made = self.draft() if draft is None else draft
        with TemporaryDirectory() as folder:
            out = Path(folder) / "export"
            out.mkdir()
            self.exporter().write(made, self.facts(made), out)
            yield out

    @clause("`build()` gives an exporter, which can say why a draft cannot be served", written=_EXPORTER)
    def test_it_is_an_exporter(self) -> None:
        exporter = self.exporter()
        require(isinstance(exporter, Exporter), f"{type(exporter).__name__}, in which members are missing")
        facts = self.facts(self.draft())
        said = exporter.unservable(facts)
        require(said is None or isinstance(said, str), f"unservable() gives {said!r}")
        require(said is None, f"unservable() says {said!r} of this draft: choose another with `draft_options`")
        bare = evolve(facts, target=None, settings={}, results=())
        try:
            said = exporter.unservable(bare)
        except DeepSpecError:
            return
        require(said is None or isinstance(said, str), f"unservable() gives {said!r} where the target has no name")

    @clause("files go into the folder that `write` is given, and nowhere else; none is a link", written=_EXPORTER)
    def test_files_are_in_their_folder(self) -> None:
        draft = self.draft()
        with watched_files() as watched, self.written(draft) as out:
            outside = watched.outside(out)
            require(not outside, f"{outside}, beside {out}")
            require(not links_in(out), f"links: {links_in(out)}")
            require(any(path.is_file() for path in out.rglob("*")), "no file")

    @clause("nothing in an export is pickled: it can be loaded without trust", written=_PAGE)
    def test_nothing_is_pickled(self) -> None:
        with self.written() as out:
            found = [path.name for path in out.rglob("*") if path.is_file() and holds_pickle(path)]
            require(not found, f"pickled: {found}")

    @clause("JSON files and lines of JSON hold no NaN and no infinite number", written=_PAGE)
    def test_json_is_json(self) -> None:
        with self.written() as out:
            for path in sorted(out.rglob("*.json")):
                _content(path)
            for path in sorted(out.rglob("*.jsonl")):
                for line in path.read_text("utf-8").splitlines():
                    _checked(line, path.name)

    @clause("`write` changes no fact that it is given, and neither draws nor seeds random numbers", written=_EXPORTER)
    def test_facts_and_random_numbers_stay(self) -> None:
        draft = self.draft()
        facts = self.facts(draft)
        before = _said(facts)
        with TemporaryDirectory() as folder, no_global_draws():
            self.exporter().write(draft, facts, Path(folder))
        changed = [name for name, value in _said(facts).items() if value != before[name]]
        require(not changed, f"other facts afterwards: {changed}")

    @clause("every weight of the draft is in the export, unchanged, but those that the target has", written=_PAGE)
    def test_all_weights_are_there(self) -> None:
        draft = self.draft()
        with self.written(draft) as out:
            by_name = self.weights(out)
            tensors = list(by_name.values())
            missing = [
                name
                for name, part in published_weights(draft).items()
                if name not in self.shared and not any(_equal(part, one) for one in tensors)
            ]
            require(not missing, f"no tensor with the numbers of {', '.join(missing)}")
            own = published_weights(draft)
            swapped = [name for name in own if name in by_name and not _equal(own[name], by_name[name])]
            require(not swapped, f"other numbers under the published names {', '.join(swapped)}")

    @clause("numbers keep the dtype that the checkpoint stores", written=_EXPORTER)
    def test_numbers_keep_their_dtype(self) -> None:
        draft = self.draft()
        draft.load_state_dict({name: _rounded(part) for name, part in draft.state_dict().items()})
        with TemporaryDirectory() as folder:
            facts = self.facts(draft)
            stored = evolve(facts, config={**facts.config, "dtype": "bfloat16"})
            self.exporter().write(draft, stored, Path(folder))
            kinds = {str(part.dtype) for part in self.weights(Path(folder)).values() if part.is_floating_point()}
            require(kinds == {"torch.bfloat16"}, f"{sorted(kinds)}, of a checkpoint in bfloat16")

    @clause("the tapped layers stand in the export, as the engine counts them", written=_PAGE)
    def test_layers_are_named(self) -> None:
        with self.written() as out:
            right = [tap + self.layer_offset for tap in self.taps]
            found = self.layers(out)
            require(right in found, f"no list {right} in its JSON files; lists of numbers there: {found}")

    @clause("the same draft gives the same files, and stays as it was", written=_EXPORTER)
    def test_it_is_written_again(self) -> None:
        draft = self.draft().eval()
        before = {name: part.clone() for name, part in draft.state_dict().items()}
        with self.written(draft) as out:
            first = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        with self.written(draft) as out:
            again = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        other = sorted(name for name in first.keys() | again.keys() if first.get(name) != again.get(name))
        require(not other, f"files that differ from one time to the next: {other}")
        changed = [name for name, part in draft.state_dict().items() if not torch.equal(part, before[name])]
        require(not changed, f"weights of the draft that have changed: {changed}")
        require(not draft.training, "the draft is in training mode afterwards")

    @clause("an export is to be moved: no file names a folder of this machine", written=_EXPORTER)
    def test_no_paths(self) -> None:
        draft = self.draft()
        with watched_files() as watched, self.written(draft) as out:
            files = {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}
            for what, path in (("out", out.parent), ("the working folder or home", watched.place)):
                naming = sorted(name for name, content in files.items() if str(path).encode() in content)
                require(not naming, f"{naming} name {what}, below {path}")

    @clause("core can write it: the folder appears when all of it is there", written=_PAGE)
    def test_core_writes_it(self) -> None:
        draft = self.draft()
        with TemporaryDirectory() as folder:
            offered = Format.of(self.component, self.algorithm, self.registry())
            offered.check(self.facts(draft), where="a test")
            offered.write(draft, self.facts(draft), Path(folder) / "out")
            left = sorted(path.name for path in Path(folder).iterdir())
            require(left == ["out"], f"in its parent: {left}")


def _equal(mine: Tensor, theirs: Tensor) -> bool:
    return mine.shape == theirs.shape and bool(torch.equal(mine.double().cpu(), theirs.double()))


def _rounded(part: Tensor) -> Tensor:
    return part.bfloat16().to(part.dtype) if part.is_floating_point() else part


def _content(path: Path) -> Any:
    return _checked(path.read_text("utf-8"), path.name)


def _checked(text: str, name: str) -> Any:
    def refused(constant: str) -> None:
        raise Unmet(f"{name} says {constant}, which is no JSON")

    try:
        return json.loads(text, parse_constant=refused)
    except json.JSONDecodeError as error:
        raise Unmet(f"{name} is no JSON: {error}") from error


def _said(facts: ExportFacts) -> dict[str, Any]:
    """A copy of the facts that an exporter could write into."""
    names = ("config", "shapes", "settings", "results", "reduced")
    found = {name: getattr(facts, name) for name in names} | {"description.config": facts.description.config}
    return deepcopy(found)


def _lists(value: Any) -> Iterator[list[Any]]:
    if isinstance(value, list) and value and all(type(one) is int for one in value):
        yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for one in inner:
        yield from _lists(one)
