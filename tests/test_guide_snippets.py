"""Every snippet of the author's guide runs: each component in it keeps its contract, and each function is called.

Legend: K predictions of a block, H hidden size, V vocabulary.
"""

import ast
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attrs import frozen
from counted_snippets import COMMON, Snippets, blocks, public_names
from deepspec_medusa.draft import MedusaDraft
from deepspec_medusa.options import MedusaOptions
from last_hidden_draft import LastHiddenDraft, LastHiddenOptions, LastHiddenProposer
from safetensors.torch import save_file
from torch import Tensor, nn

import deepspec_dflash.plugin
from deepspec_core import testing as kit
from deepspec_core.contracts.draft import DraftDescription, DraftModel
from deepspec_core.contracts.rows import Heads
from deepspec_core.contracts.target import TargetAdapter
from deepspec_core.layers.draft_vocabulary import KEY
from deepspec_core.plugins import ComponentSpec, DraftModelSpec, ExportSpec
from deepspec_core.preparation.anchors import AnchorPreparation
from deepspec_core.targets.extra_weights import find_weights, read_weights
from deepspec_core.testing.conformance import Suite, broken_by
from deepspec_core.testing.tiny_family import tiny_adapter
from deepspec_dflash.options import DFlashOptions

ROOT = Path(__file__).parents[1]
CODES = blocks((ROOT / "docs" / "plugins.md").read_text(encoding="utf-8"), "python")
SMALL = {"block_size": 4, "num_layers": 1, "num_anchors": 8}
# Clauses that call everything a draft has, in little time. The other clauses are slow tests.
TELLING = (
    "test_it_describes_itself",
    "test_rows_keep_their_form",
    "test_rollout_follows_its_numbers",
    "test_a_checkpoint_is_the_same_draft",
    "test_proposals_can_be_verified",
)


@frozen(kw_only=True)
class MyOptions(LastHiddenOptions):
    """What the text takes for known of MyDraft."""

    vocab_size: int | None = None


@pytest.fixture(scope="module")
def snippets() -> Iterator[Snippets]:
    """The guide's blocks, run."""
    found = Snippets(CODES, public_names("deepspec_dflash") | COMMON | {"MyOptions": MyOptions})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "snippets", found.module)
        yield found


def keeps(
    suite: type[Suite], hook: str, spec: Any, component: object, only: tuple[str, ...] | None = None, **said: Any
) -> None:
    """The component of a snippet keeps the contract of a suite."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kit, "shown", component, raising=False)
        offered = SimpleNamespace(**{hook: lambda: [spec]}, __name__="shown")
        members = {"component": spec.name, "plugin": (offered, deepspec_dflash.plugin), **said}
        assert broken_by(type("Shown", (suite,), members), only) == {}


def keeps_as_a_draft(
    draft: Any, only: Any, said: Mapping[str, Any] = SMALL, more: Mapping[str, Any] | None = None, **spec: Any
) -> None:
    """The same of a draft with the options `said`. It is one built on DFlash unless `spec` says what it is.

    more: Further members of the suite's subclass.
    """
    if not spec:
        spec = {"options": DFlashOptions, "options_of": "deepspec_dflash.options:options_of", "takes_packed": True}
    made = DraftModelSpec(
        name=draft.algorithm, summary="", build="deepspec_core.testing:shown", class_suffix=draft.class_suffix,
        recognise=lambda config: config["architectures"][0].endswith(draft.class_suffix),
        default_loss={"terms": {"ce": 1.0}}, **spec,
    )  # fmt: skip
    keeps(kit.DraftModelSuite, "deepspec_draft_models", made, draft, only, options=said, **(more or {}))


def new(draft: Any, **options: Any) -> Any:
    """A draft built on DFlash, of two taps."""
    torch.manual_seed(0)
    return draft(DFlashOptions(**SMALL | options), tiny_adapter(), (1, 2))


def check_plugin(names: Mapping[str, Any], only: Any) -> None:
    """The first snippets are the example plugin's."""
    (spec,) = names["deepspec_losses"]()
    assert spec.name == "hellinger"
    tree = ast.parse((ROOT / "examples/plugins/deepspec-hellinger/src/deepspec_hellinger/plugin.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
            node.body = [one for one in node.body if not isinstance(one, ast.Expr) or isinstance(one.value, ast.Yield)]
    assert ast.dump(ast.parse(CODES[0]).body[-1]) == ast.dump(tree.body[-1])


def check_loss(names: Mapping[str, Any], only: Any) -> None:
    spec = ComponentSpec(
        name="tempered", summary="", build="deepspec_core.testing:shown", options=names["TemperedOptions"]
    )
    keeps(kit.LossSuite, "deepspec_losses", spec, names["Tempered"])


def check_halved(names: Mapping[str, Any], only: Any) -> None:
    """Its MLPs' outputs are half of DFlash's."""
    keeps_as_a_draft(names["HalvedDraft"], only)
    (layer,) = new(names["HalvedDraft"]).backbone.layers
    x_H = torch.randn(32)
    torch.testing.assert_close(2 * layer.around_mlp(layer.mlp)(x_H), layer.mlp(x_H))


def check_begun(names: Mapping[str, Any], only: Any) -> None:
    """It begins with a weight of the target's files. Core hands over shapes alone before that."""

    def in_files(suite: Any) -> dict[str, Tensor]:
        return {"mtp.fc.weight": torch.randn(suite.draft().backbone.fc.weight.shape)}

    keeps_as_a_draft(names["BegunDraft"], only, more={"target_weights": in_files})
    draft = new(names["BegunDraft"])
    weight = torch.randn(32, 64).bfloat16()
    with TemporaryDirectory() as folder:
        save_file({"mtp.fc.weight": weight, "model.norm.weight": torch.ones(32)}, Path(folder) / "model.safetensors")
        found = find_weights(Path(folder), draft.describe().target_weights)
        draft.adopt_weights({name: torch.empty(one.shape, dtype=one.dtype) for name, one in found.items()})
        draft.adopt_weights(read_weights(found))
    assert torch.equal(draft.backbone.fc.weight, weight.float())


def check_trained(names: Mapping[str, Any], only: Any) -> None:
    """What config.json says of drafts that were trained otherwise differs in the keys that it names."""
    keeps_as_a_draft(names["TrainedDraft"], only)
    one, other = (new(names["TrainedDraft"], num_anchors=count).describe() for count in (8, 16))
    assert {key for key, value in one.config.items() if other.config[key] != value} == set(one.training_keys)


def check_writing(names: Mapping[str, Any], only: Any) -> None:
    keeps_as_a_draft(names["WritingDraft"], only)


def check_reduced(names: Mapping[str, Any], only: Any) -> None:
    """The text has what a reduced vocabulary needs; the rest of the draft is that of another test's."""

    class Whole(names["MyDraft"]):  # type: ignore[misc]
        algorithm, class_suffix, class_name = "reduced", "ReducedModel", "TinyReducedModel"
        blocks, forward = LastHiddenDraft.blocks, LastHiddenDraft.forward

        def __init__(self, options: MyOptions, adapter: TargetAdapter, taps: tuple[int, ...]) -> None:
            super().__init__(options, adapter, taps)
            self.options, self.architecture = options, adapter.architecture
            size, predictions = self.architecture.hidden_size, options.block_size
            self.embed_tokens = adapter.embedding().requires_grad_(False)
            self.lm_head.requires_grad_(False)
            self.down, self.up = nn.Linear(2 * size, size), nn.Linear(size, predictions * size, bias=False)
            self.norm = adapter.norm()
            self.preparation = AnchorPreparation(num_predictions=predictions, num_anchors=options.num_anchors, first=1)

        def proposer(self) -> LastHiddenProposer:
            return LastHiddenProposer(self)

        def describe(self) -> DraftDescription:
            config = {"block_size": self.options.block_size, "draft_vocab_size": self.options.vocab_size}
            return DraftDescription(
                algorithm=self.algorithm, class_name=self.class_name, taps=(), max_tokens=self.options.block_size,
                num_layers=1, anchor_predicts=True, causal=True, weight_names={"vocabulary.ids": KEY}, config=config,
                unread_options=("num_anchors", "from_target"),
            )  # fmt: skip

    def options_of(config: Mapping[str, Any]) -> tuple[MyOptions, tuple[int, ...]]:
        return MyOptions(block_size=config["block_size"], vocab_size=config["draft_vocab_size"]), ()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kit, "shown_options", options_of, raising=False)
        for size in (24, None):
            keeps_as_a_draft(
                Whole, only, {"block_size": 4, "num_anchors": 8, "vocab_size": size}, options=MyOptions,
                options_of="deepspec_core.testing:shown_options", needs_taps=False,
            )  # fmt: skip


def check_heads(names: Mapping[str, Any], only: Any) -> None:
    """What the text shows of Medusa, in place of the same in the example plugin."""

    class Rest(MedusaDraft):
        def adopt(self, embedding_VH: Tensor, head_VH: Tensor) -> None:
            DraftModel.adopt(self, embedding_VH, head_VH)

        def heads(self) -> Heads:
            raise NotImplementedError

    class Whole(names["Medusa"], Rest):  # type: ignore[misc]
        algorithm, class_suffix = "medusa", "MedusaModel"

    keeps_as_a_draft(
        Whole, only, {"num_heads": 3, "num_anchors": 8}, options=MedusaOptions, needs_taps=False,
        options_of="deepspec_medusa.options:options_of",
    )  # fmt: skip
    draft, head_VH = Whole(MedusaOptions(num_heads=3), tiny_adapter(), ()), torch.randn(64, 32)
    draft.adopt(torch.randn(64, 32), head_VH)
    assert torch.equal(draft.heads().draft, head_VH.expand(3, -1, -1))


def check_exporter(names: Mapping[str, Any], only: Any) -> None:
    spec = ExportSpec(name="shown", summary="", build="deepspec_core.testing:shown", algorithm="dflash")
    options = {"block_size": 4, "num_layers": 1}
    keeps(kit.ExporterSuite, "deepspec_exporters", spec, names["Exporter"], algorithm="dflash", draft_options=options)


def check_cache(names: Mapping[str, Any], only: Any) -> None:
    spec = ComponentSpec(name="mine", summary="", build="deepspec_core.testing:shown")
    keeps(kit.CacheFormatSuite, "deepspec_cache_formats", spec, names["MyFormat"])


# A name that a block defines -> how what it defines is tried.
CHECKS: dict[str, Callable[[Mapping[str, Any], Any], None]] = {
    "deepspec_losses": check_plugin,
    "Tempered": check_loss,
    "HalvedDraft": check_halved,
    "BegunDraft": check_begun,
    "TrainedDraft": check_trained,
    "WritingDraft": check_writing,
    "MyDraft": check_reduced,
    "Medusa": check_heads,
    "Exporter": check_exporter,
    "MyFormat": check_cache,
}


def defined_in(code: str) -> list[str]:
    return [node.name for node in ast.parse(code).body if isinstance(node, ast.ClassDef | ast.FunctionDef)]


@pytest.mark.parametrize("block", range(len(CODES)), ids=lambda block: "-".join(defined_in(CODES[block])))
def test_every_function_of_a_snippet_is_called(block: int, snippets: Snippets) -> None:
    for name in defined_in(CODES[block]):
        if name in CHECKS:
            CHECKS[name](snippets.names, TELLING)
    never = snippets.never_called(block)
    assert never == [], f"defined in docs/plugins.md, and called by no check: {', '.join(never)}"


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["HalvedDraft", "BegunDraft", "TrainedDraft", "WritingDraft", "MyDraft", "Medusa"])
def test_drafts_of_the_guide_keep_every_clause(draft: str, snippets: Snippets) -> None:
    CHECKS[draft](snippets.names, None)


def test_a_function_that_nothing_calls_is_named() -> None:
    code = """
class A:
    def called(self):
        "Says so."
        return lambda: 1

    def left(self):
        def inner(): ...

def outer(): ...
"""
    snippets = Snippets(["def before(): ...", code], {})
    assert snippets.names["A"].called.__doc__ == "Says so."
    made = snippets.names["A"]().called()
    assert snippets.never_called(0) == ["before"]
    assert snippets.never_called(1) == ["A.called.lambda in line 5", "A.left", "A.left.inner", "outer"]
    assert made() == 1
    snippets.names["outer"]()
    assert snippets.never_called(1) == ["A.left", "A.left.inner"]
