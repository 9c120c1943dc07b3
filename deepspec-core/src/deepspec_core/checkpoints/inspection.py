"""What a draft checkpoint is, found out without a target and without reading its weights.

Knows config.json, the header of the weights, and what the algorithm and the family make of them; the draft is built on
the meta device. Says what does not fit instead of refusing it, as loading would.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen

from deepspec_core.checkpoints.opening import draft_adapter
from deepspec_core.checkpoints.published import WEIGHTS, WeightDifferences, build_empty, published_name, read_options
from deepspec_core.checkpoints.weight_file import read_header
from deepspec_core.contracts.draft import DraftDescription, DraftModel
from deepspec_core.plugins.registry import Registry


@frozen(kw_only=True)
class Parameters:
    """How many numbers a draft learns, and how many it shares with the target (embedding and lm_head)."""

    trained: int
    frozen: int

    @classmethod
    def of(cls, draft: DraftModel) -> Parameters:
        """Counted by what is frozen in a draft that was built or loaded from a checkpoint."""
        sizes = Counter({True: 0, False: 0})
        for parameter in draft.parameters():
            sizes[parameter.requires_grad] += parameter.numel()
        return cls(trained=sizes[True], frozen=sizes[False])


@frozen(kw_only=True)
class DraftFacts:
    """A checkpoint, in words.

    `options` are the algorithm's own, as a run file would write them; `parts` the parameters by the first word of their
    published names; `dtypes` those of the weights as stored.
    """

    description: DraftDescription
    family: str
    adapter: str
    hidden_size: int
    vocab_size: int
    num_target_layers: int
    options: dict[str, Any]
    parameters: Parameters
    parts: dict[str, int]
    dtypes: tuple[str, ...]
    differences: WeightDifferences

    def as_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        said = self.description
        return {
            "algorithm": said.algorithm,
            "class": said.class_name,
            "family": self.family,
            "adapter": self.adapter,
            "taps": list(said.taps),
            "num_layers": said.num_layers,
            "max_tokens": said.max_tokens,
            "anchor_predicts": said.anchor_predicts,
            "window": said.window,
            "target": {
                "hidden_size": self.hidden_size,
                "vocab_size": self.vocab_size,
                "num_layers": self.num_target_layers,
            },
            "options": self.options,
            "parameters": attrs.asdict(self.parameters),
            "parts": self.parts,
            "dtypes": list(self.dtypes),
            "weights": {kind: list(names) for kind, names in attrs.asdict(self.differences).items()},
        }


def inspect_draft(directory: Path, *, registry: Registry) -> DraftFacts:
    """Facts of the checkpoint in `directory`.

    CheckpointError where config.json is missing or damaged, nobody recognises it, or the weights cannot be read at all.
    """
    algorithm, options, _ = read_options(directory, registry)
    adapter = draft_adapter(directory, registry=registry)
    draft = build_empty(directory, registry=registry, adapter=adapter)
    description, architecture = draft.describe(), adapter.architecture
    assert description.algorithm == algorithm
    header = read_header(directory / WEIGHTS)
    expected = {published_name(name, description.weight_names): own for name, own in draft.state_dict().items()}
    parts: Counter[str] = Counter()
    for name, parameter in draft.named_parameters():
        parts[published_name(name, description.weight_names).partition(".")[0]] += parameter.numel()
    return DraftFacts(
        description=description,
        family=architecture.model_type,
        adapter=registry.adapter_for(architecture.model_type).name,
        hidden_size=architecture.hidden_size,
        vocab_size=architecture.vocab_size,
        num_target_layers=architecture.num_layers,
        options=attrs.asdict(options),
        parameters=Parameters.of(draft),
        parts=dict(parts),
        dtypes=tuple(sorted(set(header.dtypes.values()))),
        differences=WeightDifferences.between(expected, header),
    )
