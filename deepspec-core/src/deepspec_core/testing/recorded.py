"""Recorded vectors of the published implementation. Cases are loaded, replayed and compared, for any draft.

This file knows the layout: one folder per case, named FAMILY-CASE, with the draft as it was published, the inputs and
the outputs; and the family's target in FAMILY-target. The folder decides which families and drafts were recorded.

Legend: B sequences, T tokens.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import frozen
from safetensors.torch import load_file
from torch import Tensor

from deepspec_core.checkpoints.published import CONFIG, WEIGHTS, load_draft, published_name, read_draft_config
from deepspec_core.contracts.draft import DraftBatch, DraftModel, PreparedSample, Sample
from deepspec_core.contracts.proposer import Proposer, Sampling
from deepspec_core.contracts.target import TargetAdapter, TargetFeatures, TargetModel
from deepspec_core.decoding.engine import Completion, Request, decode
from deepspec_core.layers.options import LayerOptions
from deepspec_core.plugins.registry import Registry
from deepspec_core.targets.opening import load_target, open_adapter
from deepspec_core.testing.draft_checks import check_all_near, check_near, trained

__all__ = ["FORWARD", "GRADIENT", "DecodingCase", "Recordings", "TrainingCase", "check_same_weights", "edit_config"]

FORWARD = 1e-4
"""The largest difference of a port's outputs, relative to the largest entry; of metrics, relative to themselves."""
GRADIENT = 1e-3
"""The largest difference of a port's gradients, relative to the largest entry."""
_PUBLISHED_METRICS = {"loss/ce": "ce_loss", "loss/tv": "l1_loss", "loss/confidence": "confidence_loss"}


@frozen(kw_only=True)
class Recordings:
    """A folder of recorded cases, opened with the plugins of `registry`."""

    folder: Path
    registry: Registry

    def checkpoint(self, case: str) -> Path:
        """The draft of a case, as the published trainer saved it."""
        return self.folder / case / "draft"

    def adapter(self, family: str, *, draft_layer: LayerOptions | None = None) -> TargetAdapter:
        """The adapter of the family's target, which has H 32, V 64 and 8 layers."""
        return open_adapter(self.folder / f"{family}-target", registry=self.registry, draft_layer=draft_layer)

    def draft(self, case: str, *, dtype: torch.dtype = torch.float32) -> DraftModel:
        """The draft of a case, loaded."""
        adapter = self.adapter(case.partition("-")[0])
        return load_draft(self.checkpoint(case), registry=self.registry, adapter=adapter, dtype=dtype)

    def copy(self, case: str, to: Path, **changes: Any) -> Path:
        """A copy of a case's checkpoint to change, with these changes to its config.json (edit_config)."""
        shutil.copytree(self.checkpoint(case), to)
        edit_config(to, **changes)
        return to

    def training(self, case: str) -> TrainingCase:
        """A case of training."""
        folder = self.folder / case
        inputs, expected, gradients = (
            load_file(folder / f"{name}.safetensors") for name in ("inputs", "expected", "grads")
        )
        record = json.loads((folder / "case.json").read_text())
        return TrainingCase(
            draft=self.draft(case), inputs=inputs, expected=expected, gradients=gradients, record=record
        )

    def decoding(self, case: str) -> DecodingCase:
        """A case of decoding."""
        family = case.partition("-")[0]
        where = self.folder / f"{family}-target"
        target = load_target(self.adapter(family), where, dtype=torch.float32, device="cpu")
        record = json.loads((self.folder / case / "case.json").read_text())
        return DecodingCase(draft=self.draft(case), target=target, record=record)


@frozen(kw_only=True, eq=False)
class TrainingCase:
    """A recorded batch, with the draft's and the loss's outputs for it.

    `record` holds the loss's settings and the metrics.
    """

    draft: DraftModel
    inputs: Mapping[str, Tensor]
    expected: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    record: Mapping[str, Any]

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each sequence."""
        return [int(length) for length in self.inputs["attention_mask"].sum(1)]

    def prepared(self) -> list[PreparedSample]:
        """Every sequence as a prepared sample, with the recorded anchors if the draft draws any."""
        preparation: Any = self.draft.preparation
        prepared = []
        for index, length in enumerate(self.lengths):
            sample = Sample(
                id=str(index),
                input_ids=self.inputs["input_ids"][index, :length],
                loss_mask=self.inputs["loss_mask"][index, :length].bool(),
                original_length=length,
            )
            if "anchor_positions" in self.inputs:
                drawn = self.inputs["anchor_positions"][index][self.inputs["block_keep_mask"][index]]
                prepared.append(preparation.at(sample, drawn))
            else:
                prepared.append(preparation.prepare(sample, np.random.default_rng(0)))
        return prepared

    def batch(self) -> DraftBatch:
        """The whole batch, as it was recorded."""
        inputs = self.inputs
        return DraftBatch(
            input_ids=inputs["input_ids"],
            loss_mask=inputs["loss_mask"].bool(),
            attention_mask=inputs["attention_mask"].bool(),
            features=TargetFeatures(
                hidden=inputs["target_hidden_states"], last_hidden=inputs["target_last_hidden_states"]
            ),
            prepared=self.draft.preparation.collate(self.prepared()),
        )

    def check_loss(self, loss: Tensor) -> None:
        """Check the loss, and its gradient by every trained parameter, by largest entry and by norm."""
        check_near(loss.detach().reshape(1), self.expected["loss"], FORWARD, "loss")
        loss.backward()  # type: ignore[no-untyped-call]
        names = self.draft.describe().weight_names
        found = {published_name(name, names): part.grad for name, part in trained(self.draft).items()}
        check_all_near(found, self.gradients, GRADIENT)
        for name, gradient in self.gradients.items():
            difference = torch.linalg.vector_norm(found[name] - gradient)  # type: ignore[operator]
            assert difference <= GRADIENT * torch.linalg.vector_norm(gradient), name

    def check_metrics(
        self,
        metrics: Mapping[str, tuple[Tensor, Tensor]],
        also: Mapping[str, float] | None = None,
        leave_out: tuple[str, ...] = (),
    ) -> None:
        """Check every recorded metric, apart from names that start with one of `leave_out`, in `metrics` or `also`."""
        found = {_PUBLISHED_METRICS.get(name, name): (above / below).item() for name, (above, below) in metrics.items()}
        found |= also or {}
        for name, value in self.record["metrics"].items():
            if not name.startswith(leave_out):
                assert math.isclose(found[name], value, rel_tol=FORWARD), f"{name}: {found[name]}, recorded {value}"


@frozen(kw_only=True, eq=False)
class DecodingCase:
    """Recorded prompts, their greedy continuations at some confidence thresholds, and every round."""

    draft: DraftModel
    target: TargetModel
    record: Mapping[str, Any]

    def replay(
        self,
        proposer: Proposer | None = None,
        *,
        batch_size: int,
        threshold: float = 0.0,
        max_new_tokens: int | None = None,
    ) -> list[Completion]:
        """Continue the recorded prompts, in order, with `proposer` or the case's own draft."""
        samples = self.record["by_confidence_threshold"]["0.0"]["samples"]
        completions = decode(
            self.target,
            proposer or self.draft.proposer(),
            [Request(id=str(i), prompt_ids=tuple(sample["prompt"]), seed=i) for i, sample in enumerate(samples)],
            sampling=Sampling(temperature=0.0),
            stop_ids=self.record["stop_token_ids"],
            max_new_tokens=max_new_tokens or self.record["max_new_tokens"],
            batch_size=batch_size,
            max_length=64,
            confidence_threshold=threshold,
        )
        found = {completion.id: completion for completion in completions}
        return [found[str(i)] for i in range(len(samples))]

    def check(self, *, batch_size: int, threshold: float = 0.0) -> None:
        """Check that output and rounds are as recorded, and that the output is the target's own greedy continuation."""
        samples = self.record["by_confidence_threshold"][str(threshold)]["samples"]
        completions = self.replay(batch_size=batch_size, threshold=threshold)
        assert [sample["output_ids"] for sample in samples] == self.record["target_greedy"], (
            "a recording of another target"
        )
        for index, (completion, sample) in enumerate(zip(completions, samples, strict=True)):
            found = {
                "output_ids": [*completion.prompt_ids, *completion.output_ids],
                "proposal_lengths": [one.proposal_length for one in completion.rounds],
                "accepted_draft_lengths": [one.accepted_draft_length for one in completion.rounds],
                "acceptance_lengths": [one.acceptance_length for one in completion.rounds],
            }
            for name, value in found.items():
                assert value == sample[name], f"{name} of sample {index}: {value}, recorded {sample[name]}"


def check_same_weights(found: Path, expected: Path) -> None:
    """Check that two checkpoints hold the same tensors under the same names."""
    one, other = load_file(found / WEIGHTS), load_file(expected / WEIGHTS)
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())


def edit_config(checkpoint: Path, **changes: Any) -> None:
    """Change keys of a checkpoint's config.json. A key set to None is removed."""
    config = read_draft_config(checkpoint) | changes
    kept = {key: value for key, value in config.items() if changes.get(key, key) is not None}
    (checkpoint / CONFIG).write_text(json.dumps(kept))
