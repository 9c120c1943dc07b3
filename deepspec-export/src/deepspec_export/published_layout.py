"""The format `deepspec`: the published layout, to be moved or uploaded, with a card and without paths of this machine.

It is the checkpoint's own layout, so it loads here again. The target has the name that the run file gives it.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, Final

import torch

from deepspec_core.checkpoints.published import published_weights
from deepspec_core.checkpoints.weight_file import write_tensors
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.contracts.export import ExportFacts
from deepspec_export.card import card
from deepspec_export.record import CARD, RECORD, record, write_json
from deepspec_export.verification import CONFIG, WEIGHTS, check_same_bits, refuse_paths

NAME: Final = "deepspec"
# Eagle3's published config names the target, by a path where it was one.
_TARGET_KEY: Final = "target_model_name_or_path"


class PublishedExporter:
    """A contracts.export.Exporter of the published layout. Every draft can be written in it."""

    def unservable(self, facts: ExportFacts) -> str | None:
        """Always None."""
        return None

    def write(self, draft: DraftModel, facts: ExportFacts, out: Path) -> None:
        """Write config.json, the weights, export.json and README.md; ExportError where a file is not as written."""
        config = _config(facts)
        dtype = getattr(torch, facts.config["dtype"])
        tensors = {
            name: tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
            for name, tensor in published_weights(draft).items()
        }
        write_json(out / CONFIG, config)
        write_tensors(out / WEIGHTS, tensors)
        assert json.loads((out / CONFIG).read_text(encoding="utf-8")) == config, "JSON gives back what it was given"
        check_same_bits(out / WEIGHTS, tensors, facts.shapes)
        target = "TARGET" if facts.target is None else shlex.quote(facts.target.name)
        commands = [f"deepspec evaluate --draft DIR --target {target} --task questions.jsonl"]
        (out / CARD).write_text(card(facts, format_name=NAME, commands=commands, notes=[]), encoding="utf-8")
        content = record(facts, NAME, {}, out)
        content |= {
            "notes": [],
            "verified": {"weights": {"tensors": len(tensors), "compared": "bit for bit"}},
            "not_verified": "No engine was started. vLLM, SGLang and llama.cpp read this layout of some drafts; the "
            "formats named after engines are checked by their rules.",
        }
        write_json(out / RECORD, content)
        refuse_paths(out)


def deepspec_exporter() -> PublishedExporter:
    """The format `deepspec`."""
    return PublishedExporter()


def _config(facts: ExportFacts) -> dict[str, Any]:
    config = {key: value for key, value in facts.config.items() if key != "_name_or_path"}
    if _TARGET_KEY in config:
        named = str(config[_TARGET_KEY] or "")
        config[_TARGET_KEY] = Path(named).name if facts.target is None else facts.target.name
    return config
