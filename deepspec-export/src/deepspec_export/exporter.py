"""The exporters themselves: a format's config and weights are written, read back and checked, and a card goes beside.

Knows the steps, which are the same for every format that an engine loads. What a format says is in its own file.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from types import ModuleType
from typing import Final

import torch
from attrs import frozen
from torch import Tensor

from deepspec_core.checkpoints.published import published_weights
from deepspec_core.checkpoints.weight_file import write_tensors
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.contracts.export import ExportFacts
from deepspec_core.errors import ExportError
from deepspec_core.layers.draft_vocabulary import KEY as DRAFT_IDS
from deepspec_export import sglang, speculators, vllm, z_lab
from deepspec_export.card import card
from deepspec_export.record import CARD, RECORD, record, write_json
from deepspec_export.served import KNOWN, OFFSETS, SHARED, STAND_IN_RANK, Served, draft_as_served
from deepspec_export.verification import CONFIG, WEIGHTS, refuse_paths, verify

_W1: Final = "markov_head.markov_w1.weight"
_W2: Final = "markov_head.markov_w2.weight"


@frozen(kw_only=True)
class EngineExporter:
    """A contracts.export.Exporter of a format that an engine loads: `format` is one of this package's modules.

    whole_for: Algorithms whose export holds the target's embedding and head too, because its reader asks for them.
    """

    format: ModuleType
    whole_for: tuple[str, ...] = ()

    def unservable(self, facts: ExportFacts) -> str | None:
        """Why the format's engine cannot serve the draft, and the nearest alternative, or None."""
        reason: str | None = self.format.unservable(facts)
        return reason

    def write(self, draft: DraftModel, facts: ExportFacts, out: Path) -> None:
        """Write config.json, the weights, export.json and README.md.

        ExportError where a number is not finite, or what was written is not what the draft is.
        """
        served = draft_as_served(facts)
        tensors = export_weights(draft, served, facts, whole=facts.description.algorithm in self.whole_for)
        write_json(out / CONFIG, self.format.config(served, facts))
        write_tensors(out / WEIGHTS, tensors)
        verified = verify(out, read=self.format.read, expected=served, written=tensors, draft=draft)
        target = "TARGET" if facts.target is None else shlex.quote(facts.target.name)
        notes = [*shared_notes(served, facts), *self.format.notes(served)]
        commands = [self.format.command(served, target=target, draft="DIR")]
        text = card(facts, format_name=self.format.NAME, commands=commands, notes=notes)
        (out / CARD).write_text(text, encoding="utf-8")
        content = record(facts, self.format.NAME, self.format.WRITTEN_FOR, out)
        content |= {
            "served_as": {"method": served.method, "num_speculative_tokens": served.proposes},
            "notes": notes,
            "verified": verified.as_json(),
            "not_verified": "No engine was started. The files were read back and replayed by deepspec-export, by the "
            "rules of the engines named under written_for.",
        }
        write_json(out / RECORD, content)
        refuse_paths(out)


def vllm_exporter() -> EngineExporter:
    """The format `vllm`."""
    return EngineExporter(format=vllm)


def sglang_exporter() -> EngineExporter:
    """The format `sglang`."""
    return EngineExporter(format=sglang)


def speculators_exporter() -> EngineExporter:
    """The format `speculators`, whose own package asks an Eagle3 checkpoint for its lm_head."""
    return EngineExporter(format=speculators, whole_for=("eagle3",))


def z_lab_exporter() -> EngineExporter:
    """The format `z-lab`, of DFlash alone."""
    return EngineExporter(format=z_lab)


def export_weights(draft: DraftModel, served: Served, facts: ExportFacts, *, whole: bool) -> dict[str, Tensor]:
    """The export's tensors by published name, in the dtype that the checkpoint stores.

    ExportError where a number is not finite.
    """
    dtype = getattr(torch, facts.config["dtype"])
    # The rows of a reduced vocabulary are the target's, but no engine picks them.
    shared = SHARED[:1] if served.reduced else SHARED
    tensors = {
        name: tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in published_weights(draft).items()
        if whole or name not in shared
    }
    ids_D = tensors.pop(DRAFT_IDS, None)
    if ids_D is not None and served.reduced:
        tensors[OFFSETS] = ids_D - torch.arange(len(ids_D))
        tensors[KNOWN] = torch.zeros(served.vocab_size, dtype=torch.bool).index_fill_(0, ids_D, True)
    if served.markov_rank and _W1 not in tensors:
        tensors[_W1] = torch.zeros(served.vocab_size, STAND_IN_RANK, dtype=dtype)
        tensors[_W2] = torch.zeros(served.draft_vocab_size, STAND_IN_RANK, dtype=dtype)
    broken = sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all())
    if broken:
        raise ExportError("weights are not finite numbers", where="the draft", found=", ".join(broken[:6]))
    return tensors


def shared_notes(served: Served, facts: ExportFacts) -> list[str]:
    """What every format says of a draft that is written otherwise than it was trained."""
    notes = []
    if served.markov_rank and not facts.config.get("markov_rank"):
        notes.append(
            "The draft has no Markov head, and its anchor's slot predicts, which engines know of DSpark only. It is "
            "written as DSpark with a Markov head of rank 1 whose weights are zero, which adds nothing."
        )
    if served.reduced:
        notes.append(
            f"The draft proposes from {served.draft_vocab_size:,} of the target's {served.vocab_size:,} tokens. "
            f"`{OFFSETS}` has for each of its logits the token's id less the logit's place, as engines read it."
        )
    if facts.target is not None and facts.target.local:
        notes.append(f"The target was a local directory, and is named by its last part, {facts.target.name}.")
    return notes
