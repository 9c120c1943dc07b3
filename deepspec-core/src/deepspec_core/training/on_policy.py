"""Training on texts that the draft generates itself: rolls them out, checks them and prepares them before features.

Preparation must wait for the rollout, so it runs in the training process. Random numbers are derived from the seed, the
epoch and the sample's id. Knows drafts with a rollout; does not know what they generate, or losses.

Legend: B samples, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from attrs import evolve, frozen
from torch import Tensor

from deepspec_core.contracts.draft import DraftModel, PreparedSample, Sample, Texts
from deepspec_core.contracts.features import FeatureSource
from deepspec_core.data.collate import pad, pad_ids
from deepspec_core.errors import ConfigError, DeepSpecError, PluginError
from deepspec_core.plugins.origin import component_of, package_of
from deepspec_core.plugins.references import FAILURES, blame
from deepspec_core.training.host_batch import HostBatch, host_batch
from deepspec_core.training.sampler import sample_rng


def rolls_out(draft: DraftModel) -> bool:
    """Whether the draft trains on texts of its own."""
    return type(draft).rollout is not DraftModel.rollout


def stored_features(where: object, found: object) -> ConfigError:
    """The error of a draft that rolls out, with features that were taken of other texts."""
    return ConfigError(
        "the draft trains on texts that it generates during training, but stored features belong to other texts",
        where=where,
        found=found,
        expected='features that are computed during training: features.mode = "online"',
        fix='Set features.mode = "online", and leave "cache" out of run.stages.',
    )


@frozen
class Unprepared:
    """A contracts.draft.Preparation that leaves all to later."""

    def prepare(self, sample: Sample, rng: np.random.Generator) -> PreparedSample:
        """The sample alone."""
        return PreparedSample(sample=sample, tensors={})

    def collate(self, prepared: Sequence[PreparedSample]) -> Mapping[str, Tensor]:
        """Nothing."""
        return {}


class Rollouts:
    """Turns micro-batches of the data into micro-batches of the draft's own texts.

    Raises ConfigError if `source` does not give features of the texts that it is given.
    """

    def __init__(
        self, draft: DraftModel, source: FeatureSource, *, seed: int, device: torch.device, compute_dtype: torch.dtype
    ) -> None:
        if not getattr(source, "of_given_texts", False):
            raise stored_features(f"{package_of(source)}, {component_of(source)}", "a source without `of_given_texts`")
        self.draft, self.seed, self.device, self.compute_dtype = draft, seed, device, compute_dtype
        self.vocab_size = len(draft.heads().target)

    @torch.no_grad()
    def __call__(self, micro: HostBatch, epoch: int) -> HostBatch:
        """The samples with the draft's texts, prepared.

        Raises PluginError, with the package, if these break the contract.
        """
        # Texts are rolled out one a row, also where they are packed afterwards.
        given_ids_MT, real_MT = pad_ids(micro.samples)
        given = Texts(
            input_ids=given_ids_MT.to(self.device),
            loss_mask=pad([sample.loss_mask for sample in micro.samples]).to(self.device),
            attention_mask=real_MT.to(self.device),
        )
        uniforms_BT = pad([self._uniforms(sample, epoch) for sample in micro.samples]).to(self.device)
        bf16 = self.compute_dtype == torch.bfloat16
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            # Copies: a draft that writes into what it is given still gives back what is to be checked.
            returned = self._rollout(evolve(given, input_ids=given.input_ids.clone()), uniforms_BT)
        check_shapes(self.draft, returned, given)
        ids_BT, mask_BT = returned.input_ids.cpu(), returned.loss_mask.cpu()
        outside = (ids_BT < 0) | (ids_BT >= self.vocab_size)
        if bool((outside & real_MT).any()):
            expected = f"token ids from 0 to below {self.vocab_size}"
            raise refused(self.draft, "input_ids", int(ids_BT[outside & real_MT][0]), expected)
        samples = [
            evolve(
                sample, input_ids=ids_BT[row, : len(sample.input_ids)], loss_mask=mask_BT[row, : len(sample.input_ids)]
            )
            for row, sample in enumerate(micro.samples)
        ]
        preparation = self.draft.preparation
        prepared = [preparation.prepare(sample, sample_rng(self.seed, epoch, sample.id)) for sample in samples]
        return host_batch(prepared, preparation, row_sizes=micro.row_sizes)

    def _rollout(self, given: Texts, uniforms_BT: Tensor) -> Texts:
        """What the draft returns. Raises PluginError, with the draft's name, if it raises anything but our errors."""
        try:
            return self.draft.rollout(given, uniforms_BT)
        except (DeepSpecError, torch.OutOfMemoryError):
            raise
        except FAILURES as error:
            raise refused(self.draft, "rollout()", blame(error), "contracts.draft.Texts") from error

    def _uniforms(self, sample: Sample, epoch: int) -> Tensor:
        # Other numbers than the preparation's of the same sample.
        rng = sample_rng(self.seed, epoch, f"{sample.id}\0rollout")
        return torch.from_numpy(rng.random(len(sample.input_ids)))


def check_shapes(draft: DraftModel, returned: object, given: Texts) -> None:
    """Raise PluginError if a rollout returned other shapes than the given texts have. Reads no values."""
    if not isinstance(returned, Texts):
        raise refused(draft, "rollout()", type(returned).__name__, "contracts.draft.Texts")
    for name in ("input_ids", "loss_mask"):
        own, theirs = getattr(given, name), getattr(returned, name)
        if (theirs.shape, theirs.dtype) != (own.shape, own.dtype):
            found = f"{list(theirs.shape)}, {theirs.dtype}"
            raise refused(draft, name, found, f"{list(own.shape)}, {own.dtype}: texts keep their lengths")


def refused(draft: DraftModel, name: str, found: object, expected: str) -> PluginError:
    """The error of a rollout that breaks its contract."""
    return PluginError(
        f"a draft's rollout cannot be trained on: `{name}`",
        where=f"{package_of(draft)}, {component_of(draft)}",
        found=found,
        expected=expected,
    )
