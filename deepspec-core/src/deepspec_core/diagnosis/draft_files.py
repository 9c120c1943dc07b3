"""Checks whether a run's finished draft is the one that was trained: its digest, its config.json, its weights.

This file knows checkpoint files and the draft's keys of a run file. It does not know acceptance.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from deepspec_core.checkpoints.published import CONFIG, WEIGHTS, config_text, read_draft_config
from deepspec_core.diagnosis.finding import ENGINE, LIVE, PRECISION, REPLAYED, Finding

# Keys that describe how the numbers are stored or who wrote the file. They do not describe the draft.
_ABOUT_FILES = ("dtype", "torch_dtype", "transformers_version", "_name_or_path")
_ROTARY = ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor")
_SHOWN = 4
_AFTER = (REPLAYED, PRECISION, LIVE, ENGINE)


def config_differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The values that differ between config.json and the run file, by key. Nested keys are joined by dots."""
    flat, asked = _flat(found), _flat(expected)
    keys = sorted((flat.keys() | asked.keys()) - set(_ABOUT_FILES))
    return {key: (flat.get(key), asked.get(key)) for key in keys if flat.get(key) != asked.get(key)}


def expected_config(draft: Any, adapter: Any) -> dict[str, Any]:
    """The config.json that the run would write for its draft. No weights are read."""
    found: dict[str, Any] = json.loads(config_text(draft, draft.describe(), adapter))
    return found


def weight_differences(finished: Path, trained: Path) -> list[str]:
    """The names of tensors that differ between two checkpoints, or that only one of them has."""
    with safe_open(str(finished / WEIGHTS), "pt") as left, safe_open(str(trained / WEIGHTS), "pt") as right:
        names = set(left.keys()), set(right.keys())
        both = names[0] & names[1]
        differing = [name for name in both if not torch.equal(left.get_tensor(name), right.get_tensor(name))]
        return sorted([*(names[0] ^ names[1]), *differing])


def draft_findings(
    folder: Path,
    *,
    digest: str,
    trained_digest: str | None,
    expected: Mapping[str, Any] | None,
    trained: Path | None,
    anchor_predicts: tuple[bool, bool],
) -> tuple[list[Finding], dict[str, Any]]:
    """The differences between the draft's files and the trained draft, and the facts that were compared.

    digest: The draft's digest now. trained_digest: The digest at the end of training. expected: The config.json that
    follows from the run file. trained: The draft of the training checkpoint that it was made from, if that is still
    unchanged. anchor_predicts: Whether the anchor's own slot predicts, by the draft's files and by the run file. A
    value that is not known is None.
    """
    differences = {} if expected is None else config_differences(read_draft_config(folder), expected)
    tensors = [] if trained is None else weight_differences(folder, trained)
    facts = {
        "changed_since_training": None if trained_digest is None else digest != trained_digest,
        "config": {key: {"found": pair[0], "run_file": pair[1]} for key, pair in differences.items()},
        "tensors": tensors,
    }
    findings = [
        Finding(
            name=name,
            says=f"{CONFIG} of the draft says "
            + ", ".join(f"{key} = {pair[0]} (the run file: {pair[1]})" for key, pair in list(chosen.items())[:_SHOWN])
            + ".",
            fix=f"Put back the {CONFIG} that training wrote.",
            explains=_AFTER,
        )
        for name, chosen in _kinds(differences, slots=anchor_predicts[0] != anchor_predicts[1]).items()
    ]
    if tensors:
        more = f" and {len(tensors) - _SHOWN} more" if len(tensors) > _SHOWN else ""
        findings.append(
            Finding(
                name="weights of the draft",
                says=f"{len(tensors)} tensors are not those of the training checkpoint it was made from: "
                f"{', '.join(tensors[:_SHOWN])}{more}.",
                fix=f"Copy {WEIGHTS} from the training checkpoint.",
                explains=_AFTER,
            )
        )
    if trained_digest is not None and digest != trained_digest and not findings:
        findings.append(
            Finding(
                name="files of the draft",
                says="They changed since training ended: their digest is "
                f"{digest[:16]}, and training left {trained_digest[:16]}.",
                fix="Put back the draft that training left, from a copy or from a checkpoint of train/checkpoints.",
                explains=_AFTER,
            )
        )
    return findings, facts


def _kinds(differences: Mapping[str, tuple[Any, Any]], *, slots: bool) -> dict[str, dict[str, tuple[Any, Any]]]:
    """The differing keys by topic. `slots`: Keys of the draft differ in a way that makes another slot predict."""
    found: dict[str, dict[str, tuple[Any, Any]]] = {}
    for key, pair in differences.items():
        first = key.partition(".")[0]
        kind = "rotary" if first in _ROTARY else "anchor slot" if slots else "config of the draft"
        found.setdefault(kind, {})[key] = pair
    return found


def _flat(values: Mapping[str, Any], under: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{under}{key}.")
        else:
            flat[f"{under}{key}"] = value
    return flat
