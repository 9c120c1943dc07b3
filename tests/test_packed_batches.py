"""Several conversations in a row are what they are alone: features, rows, losses and gradients, for every algorithm
that packs on every family. A run that packs says first what cannot.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from deepspec_medusa.draft import MedusaDraft
from deepspec_medusa.options import MedusaOptions
from torch import Tensor

from deepspec_core.cli.main import main
from deepspec_core.config.schema import LossOptions, TrainOptions
from deepspec_core.contracts.draft import DraftModel, Sample
from deepspec_core.contracts.features import FeatureSource
from deepspec_core.contracts.rows import Rows
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.errors import PluginError, TargetError
from deepspec_core.features.online import OnlineFeatures
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.plugins.registry import Registry
from deepspec_core.rows.engine import build_engine
from deepspec_core.testing.draft_checks import check_all_near, check_same_rows, gradients_of
from deepspec_core.testing.random_batches import with_large_weights
from deepspec_core.training.loader import MicroBatches, Plan
from deepspec_core.training.packed_check import check_draft_apart, check_target_apart
from deepspec_core.training.trainer import TrainResult, train

_INSTALLED = load_plugins().registry
PACKING = [name for name in _INSTALLED.trained_drafts() if _INSTALLED.get("draft", name).takes_packed]
PAIRS = [(algorithm, family, {}) for algorithm in PACKING for family in _INSTALLED.names("target")]
PAIRS += [("dspark", "gemma4", {"vocab_size": 24}), ("dflash", "gemma3", {"anchor_predicts": False})]
PAIRS += [("eagle3", "gemma4", {"num_layers": 2, "num_anchors": 3})]
# Longer and shorter than the windows of the tiny targets, which see 8 positions, and one too short for any row.
LENGTHS = (19, 5, 11, 2, 14)
PACKED = Plan(epoch=0, indices=(0, 1, 2, 3, 4), row_sizes=(3, 2))
ALONE = Plan(epoch=0, indices=(0, 1, 2, 3, 4))
# Products of other shapes add in another order; what a row sees of another conversation changes it by about its size.
NEAR, NEAR_GRADIENT = 1e-5, 1e-4


def samples_of(vocab_size: int) -> list[Sample]:
    """Each supervised to its last token, the first in two parts."""
    samples = []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(2, vocab_size - 2, (length,), generator=torch.Generator().manual_seed(number))
        at = torch.arange(length)
        mask = at >= 1 if number else (at > 2) & (at != 9)
        samples.append(Sample(id=str(number), input_ids=ids, loss_mask=mask, original_length=length))
    return samples


def outcome(
    draft: DraftModel, source: FeatureSource, plan: Plan, registry: Registry
) -> tuple[Rows, Tensor, Tensor, dict[str, Tensor]]:
    """Rows, loss as a sum, denominator and gradients of a micro-batch."""
    host = MicroBatches(source, draft.preparation, seed=0)[plan]
    rows: Rows = draft(host.to_draft_batch(source, torch.device("cpu")))
    terms = {
        "ce": rows.target_ids is not None,
        "tv": rows.target_hidden is not None,
        "confidence": "confidence_logits" in rows.extras,
    }
    engine = build_engine(LossOptions(terms={name: 1.0 for name, possible in terms.items() if possible}), registry)
    result = engine(rows, draft.heads())
    return rows, result.total.detach(), result.denominator, gradients_of(result.total, draft)


def check_packed_equals_unpacked(draft: DraftModel, source: FeatureSource, registry: Registry) -> None:
    packed, alone = (outcome(draft, source, plan, registry) for plan in (PACKED, ALONE))
    assert len(alone[0].hidden) > 20
    assert alone[0].hidden.std() > 0.01, "outputs large enough for a tolerance to mean something"
    hidden = [rows.target_hidden[rows.target_index] for rows, *_ in (packed, alone)]
    torch.testing.assert_close(hidden[0], hidden[1], rtol=NEAR, atol=NEAR)
    # The target's features were compared; what the draft takes from them is equal in kind.
    same = evolve(packed[0], target_hidden=alone[0].target_hidden, target_index=alone[0].target_index)
    check_same_rows(same, alone[0], NEAR)
    torch.testing.assert_close(packed[1], alone[1], rtol=NEAR, atol=0)
    torch.testing.assert_close(packed[2], alone[2], rtol=1e-6, atol=0)
    check_all_near(packed[3], alone[3], NEAR_GRADIENT)


@pytest.mark.parametrize(("algorithm", "family", "options"), PAIRS, ids=lambda part: str(part))
def test_packed_rows_are_what_they_are_alone(
    tiny_target: Callable[..., Any],
    tiny_draft: Callable[..., DraftModel],
    registry: Registry,
    algorithm: str,
    family: str,
    options: dict[str, Any],
) -> None:
    target = tiny_target(family)
    draft = with_large_weights(tiny_draft(algorithm, target, **options))
    draft.adopt(target.model.embedding_weight(), target.model.head_weight())
    source = OnlineFeatures(samples_of(40), target.model, draft.describe().taps)
    check_packed_equals_unpacked(draft, source, registry)


@pytest.mark.parametrize("algorithm", PACKING)
def test_who_packs_passes_the_check_before_training(
    tiny_target: Callable[..., Any], tiny_draft: Callable[..., DraftModel], algorithm: str
) -> None:
    target = tiny_target("gemma3")
    for dtype in (torch.float32, torch.bfloat16):
        check_draft_apart(tiny_draft(algorithm, target), device=torch.device("cpu"), compute_dtype=dtype)
    check_target_apart(target.model, (1, 3))


@pytest.mark.parametrize("family", ["qwen3", "gemma4"])
def test_medusa_packs_too(tiny_target: Callable[..., Any], registry: Registry, family: str) -> None:
    target = tiny_target(family)
    torch.manual_seed(0)
    draft = with_large_weights(MedusaDraft(MedusaOptions(num_heads=3), target.adapter, (1, 3)))
    draft.adopt(target.model.embedding_weight(), target.model.head_weight())
    check_packed_equals_unpacked(draft, OnlineFeatures(samples_of(40), target.model, (1, 3)), registry)


def test_a_source_that_does_not_pack_gives_the_same(
    tiny_target: Callable[..., Any], tiny_draft: Callable[..., DraftModel], registry: Registry
) -> None:
    """A feature source written before rows were packed is asked for a row a conversation."""

    class Unpacked(OnlineFeatures):
        packed_features = None

    target = tiny_target("gemma3")
    draft = tiny_draft("dspark", target)
    taps = draft.describe().taps
    found, expected = (
        MicroBatches(source, draft.preparation, seed=0)[PACKED].to_draft_batch(source, torch.device("cpu"))
        for source in (kind(samples_of(40), target.model, taps) for kind in (Unpacked, OnlineFeatures))
    )
    for name in ("hidden", "last_hidden"):
        torch.testing.assert_close(getattr(found.features, name), getattr(expected.features, name))


def test_conversations_get_as_many_anchors_as_alone(
    tiny_target: Callable[..., Any], tiny_draft: Callable[..., DraftModel]
) -> None:
    """num_anchors counts in each conversation: a short one beside a long one loses none."""
    draft = tiny_draft("dflash", tiny_target("qwen3"), num_anchors=4)
    source = OnlineFeatures(samples_of(40), tiny_target("qwen3").model, draft.describe().taps)
    host = MicroBatches(source, draft.preparation, seed=0)[PACKED]
    places = list(zip(host.prepared["sequence"].tolist(), host.prepared["begins"].tolist(), strict=True))
    # Five tokens have three candidates, two tokens none.
    assert {place: places.count(place) for place in places} == {(0, 0): 4, (0, 19): 3, (0, 24): 4, (1, 2): 4}
    alone = MicroBatches(source, draft.preparation, seed=0)[ALONE].prepared
    assert torch.equal(host.prepared["anchors"] - host.prepared["begins"], alone["anchors"])


def test_who_mixes_conversations_is_found_out(
    tiny_target: Callable[..., Any], tiny_draft: Callable[..., DraftModel]
) -> None:
    target = tiny_target("qwen3")
    draft = tiny_draft("dflash", target)

    class Deaf:
        """A target that does not hear about documents."""

        def __getattr__(self, name: str) -> Any:
            return getattr(target.model, name)

        def features(self, ids: Tensor, mask: Tensor, _positions: Tensor, _documents: Tensor, taps: Any) -> Any:
            found: TargetFeatures = target.model.features(ids, mask, None, None, taps)
            return found

    with pytest.raises(TargetError, match="lets the conversations of a packed row influence"):
        check_target_apart(Deaf(), (1, 3))  # type: ignore[arg-type]
    whole = draft.forward
    draft.forward = lambda batch: whole(  # type: ignore[method-assign]
        evolve(batch, prepared={name: part for name, part in batch.prepared.items() if name != "grid_begins"})
    )
    with pytest.raises(PluginError, match="lets the conversations of a packed row influence"):
        check_draft_apart(draft, device=torch.device("cpu"), compute_dtype=torch.bfloat16)


def test_what_cannot_pack_is_said_with_the_other_mistakes_of_the_run_file(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def declares(kind: str, name: str) -> None:
        spec = evolve(_INSTALLED.get(kind, name), takes_packed=False)
        real = Registry.get
        monkeypatch.setattr(
            Registry, "get", lambda self, k, n, **more: spec if (k, n) == (kind, name) else real(self, k, n, **more)
        )

    asked = ["run", str(run_file), "--dry-run", "--set", "train.batching=packed"]
    assert main(asked) == 0
    declares("draft", "dflash")
    assert main([*asked, "--set", "evaluate.temperature=[]"]) == 2
    said = capsys.readouterr().err
    assert "drafts of type 'dflash' cannot be trained on packed rows" in said
    assert "there is no temperature to evaluate at" in said
    monkeypatch.undo()
    declares("target", "qwen3")
    online = ["--set", "features.mode=online", "--set", 'run.stages=["regenerate","train"]']
    assert main(["run", str(run_file), "--set", "train.batching=packed", *online]) == 2
    assert "the family 'qwen3' cannot compute features of packed rows" in capsys.readouterr().err
    assert not list(run_file.parent.glob("runs/*/regenerate*")), "no stage began"


def test_training_on_packed_rows_is_training_and_resumes(
    tiny_target: Callable[..., Any], tiny_draft: Callable[..., DraftModel], registry: Registry, tmp_path: Path
) -> None:
    """Steps are the same, so weights differ by rounding; AdamW's first steps make much of small differences."""
    target = tiny_target("gemma3")
    few = TrainOptions(
        lr=1e-3, global_batch_size=3, micro_batch_size=2, epochs=2, precision="float32", checkpoint_every=1, warmup=0.0,
        keep_checkpoints=9,
    )  # fmt: skip

    def trained(folder: str, **changes: Any) -> tuple[DraftModel, TrainResult]:
        draft = tiny_draft("dspark", target)
        source = OnlineFeatures(samples_of(40), target.model, draft.describe().taps)
        result = train(
            draft=draft, source=source, options=evolve(few, **changes), loss=LossOptions(terms={"ce": 1.0}),
            registry=registry, folder=tmp_path / folder, seed=5, save_draft=Path.mkdir, device="cpu",
        )  # fmt: skip
        return draft, result

    padded, alone = trained("padded")
    packed, together = trained("packed", batching="packed")
    for name in ("anchors", "counted_slots"):
        assert alone.counts[name] == together.counts[name]
    assert together.counts["positions"] < alone.counts["positions"]
    for step in (3, 4):
        shutil.rmtree(tmp_path / "packed" / "checkpoints" / f"step-{step:06d}")
    resumed, result = trained("packed", batching="packed", loader_workers=1)
    assert (result.resumed_from, result.counts) == (2, together.counts)
    parts = zip(padded.parameters(), packed.parameters(), resumed.parameters(), strict=True)
    for expected, found, again in parts:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(again, found, rtol=1e-5, atol=1e-6)
