"""A draft in another project's format, read from its folder: what it is, as `Served`, and its weights by our names.

Formats are told apart by their keys. Knows the spellings that readers of these formats take, old ones too; what a key
means is in each format's own file. Does not know our checkpoints (importing.py makes one).

Legend: D tokens of the draft, V of the target, H hidden size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from attrs import field, frozen
from torch import Tensor

from deepspec_core.checkpoints.weight_file import read_tensors
from deepspec_core.contracts.target import TargetArchitecture
from deepspec_core.errors import CheckpointError
from deepspec_core.json_files import read_object
from deepspec_export import gguf_file, llama_cpp, sglang, speculators, vllm, z_lab
from deepspec_export.foreign_keys import check_keys, check_layer_types, check_served, check_vocabulary, unusable
from deepspec_export.record import RECORD
from deepspec_export.served import KNOWN, OFFSETS, Served
from deepspec_export.verification import CONFIG, WEIGHTS

GGUF: Final = "draft.gguf"
_READERS: Final[Mapping[str, Callable[[Mapping[str, Any]], Served]]] = {
    speculators.NAME: speculators.read,
    vllm.NAME: vllm.read,
    sglang.NAME: sglang.read,
    z_lab.NAME: z_lab.read,
}
# What published_layout.py writes is a checkpoint.
_OURS: Final = "deepspec"
FORMATS: Final = (*_READERS, llama_cpp.NAME)
_DSPARK: Final = "Qwen3DSparkModel"
_EAGLE3: Final = {
    "LlamaForCausalLMEagle3": "LlamaForCausalLMEagle3",
    "Eagle3LlamaForCausalLM": "LlamaForCausalLMEagle3",
    "Eagle3Qwen3ForCausalLM": "Eagle3Qwen3ForCausalLM",
}
_IDS: Final = "eagle_aux_hidden_state_layer_ids"
# What others call our names. Buffers that follow from config.json are no weights.
_RENAMED: Final = (("model.", ""), ("midlayer.", "layers.0."))
_BUFFERS: Final = ("rotary_emb.inv_freq",)
_ELSEWHERE: Final = {
    "DFlash2DraftModel": "it has convolutions and a selector, which no draft type here has",
    "Gemma4DSparkModel": "it is the published layout, which loads as it is",
}


@frozen(kw_only=True, eq=False)
class Foreign:
    """A draft of another format.

    layers: The keys of its config.json that describe layers. weights: By our published names; `d2t` is in them.
    hints: What our exporter wrote beside it of the checkpoint that it came from; empty if it is no export of ours.
    target_layers, target_name: What it says of its target; None where it does not.
    notes: What was taken otherwise than it stands there.
    """

    format: str
    served: Served
    layers: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    hints: Mapping[str, Any] = field(factory=dict)
    target_layers: int | None = None
    target_name: str | None = None
    notes: tuple[str, ...] = ()


def read_foreign(folder: Path, target: TargetArchitecture, *, format_name: str | None = None) -> Foreign:
    """The draft in `folder`, made for a target of that architecture.

    CheckpointError where the format is not known or not clear, a key that its reader needs is absent, or weights are
    damaged.
    """
    _check_format_name(folder, format_name)
    if (folder / GGUF).is_file() and format_name in (None, llama_cpp.NAME):
        return _read_gguf(folder)
    path = folder / CONFIG
    try:
        keys = read_object(path, kind=CheckpointError)
    except FileNotFoundError:
        raise CheckpointError(
            "there is no draft to import", where=folder, expected=f"a folder with {CONFIG}, or with {GGUF}"
        ) from None
    check_keys(keys, path)
    hints, notes = _hints(folder, (CONFIG, WEIGHTS))
    _check_recorded_format(folder, hints.get("format"), format_name)
    name = format_name or hints.get("format") or _format_of(keys, path)
    keys, more = _modern(keys, target, path)
    try:
        served = _READERS[name](keys)
    except KeyError as error:
        raise CheckpointError(
            f"the draft cannot be read as {name}",
            where=f"{path}: {error.args[0]}",
            found=repr(keys.get(error.args[0], "nothing"))[:80],
            expected="a key with a value that readers of the format and this importer know",
        ) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{CONFIG} is none of the format {name}", where=path, found=error) from error
    check_served(served, path)
    layers = keys.get("transformer_layer_config", keys)
    check_layer_types(layers, path)
    return Foreign(
        format=name,
        served=served,
        layers=layers,
        weights=_weights(folder),
        hints=hints,
        target_layers=keys.get("num_target_layers"),
        target_name=((keys.get("speculators_config") or {}).get("verifier") or {}).get("name_or_path"),
        notes=(*notes, *more),
    )


def _check_format_name(folder: Path, name: str | None) -> None:
    """CheckpointError where `--format` names none, or one that is of other files than the folder's."""
    if name is None:
        return
    if name not in FORMATS:
        raise CheckpointError(
            "no such format to import", where="--format", found=name, expected=f"one of {', '.join(FORMATS)}"
        )
    if (folder / GGUF).is_file():
        if name == llama_cpp.NAME or (folder / CONFIG).is_file():
            return
        found = f"{name}, of a folder with {GGUF} and without {CONFIG}"
    elif name == llama_cpp.NAME:
        found = f"{name}, of a folder without {GGUF}"
    else:
        return
    raise CheckpointError(
        "the folder holds no draft in this format",
        where=folder,
        found=f"--format {found}",
        expected=f"{GGUF} for {llama_cpp.NAME}, {CONFIG} for every other format",
        fix="Leave --format out, or name the folder of the draft.",
    )


def _check_recorded_format(folder: Path, recorded: str | None, asked: str | None) -> None:
    """CheckpointError where export.json, which is of these files, names a format that is not to be imported."""
    if recorded is None:
        return
    if recorded == _OURS:
        raise CheckpointError(
            "this is a checkpoint of DeepSpec already, and needs no import",
            where=folder,
            found=f"format {_OURS} in {RECORD}",
            expected=f"a draft in one of the formats {', '.join(FORMATS)}",
            fix="Use the folder as it is: `deepspec evaluate --draft DIR`, or `draft.init` in a run file.",
        )
    if recorded not in _READERS:
        raise unusable(folder / RECORD, "format", recorded, f"one of {', '.join(_READERS)}")
    if asked not in (None, recorded):
        raise CheckpointError(
            f"the draft is not in the format that --format names, says {RECORD}",
            where=folder / RECORD,
            found=f"--format {asked}",
            expected=recorded,
            fix=f"Leave --format out, or give --format {recorded}.",
        )


def _format_of(keys: Mapping[str, Any], path: Path) -> str:
    if "speculators_model_type" in keys:
        return speculators.NAME
    names = keys.get("architectures")
    name = str(names[0]) if isinstance(names, list) and len(names) == 1 else ""
    if name == z_lab.ARCHITECTURE:
        return z_lab.NAME
    if name in _EAGLE3:
        # vLLM's ids stand at the top level and count the embedding; SGLang's in a table, and do not.
        return vllm.NAME if _IDS in keys else sglang.NAME
    if name == _DSPARK and keys.get("sample_from_anchor", True):
        return vllm.NAME
    if name == _DSPARK:
        raise CheckpointError(
            "vLLM and SGLang count this draft's block otherwise, and nothing says which of them it is for",
            where=f"{path}: block_size",
            found=f"{keys.get('block_size')}, with sample_from_anchor = false",
            expected="the slots of a block (vLLM), or the tokens it proposes (SGLang)",
            fix=f"Say it: --format {vllm.NAME} or --format {sglang.NAME}.",
        )
    raise CheckpointError(
        "no importer knows this draft",
        where=f"{path}: architectures",
        found=f"{names}: {_ELSEWHERE[name]}" if name in _ELSEWHERE else names,
        expected=f"{', '.join((*_EAGLE3, z_lab.ARCHITECTURE, _DSPARK))}, or the speculators format",
    )


def _modern(keys: Mapping[str, Any], target: TargetArchitecture, path: Path) -> tuple[dict[str, Any], list[str]]:
    """The keys as the formats' readers take them: old spellings in new ones, what readers fill in filled in."""
    found, notes = dict(keys), []
    if "speculators_model_type" in found:
        layers, more = _modern(found.get("transformer_layer_config") or {}, target, path)
        return found | {"transformer_layer_config": layers}, more
    if found.get("quantization_config") or found.get("compression_config"):
        raise CheckpointError(
            "the draft is quantised", where=f"{path}: quantization_config", expected="plain 16- or 32-bit weights"
        )
    heads, hidden = found.get("num_attention_heads"), found.get("hidden_size")
    if type(heads) is int and type(hidden) is int and heads > 0:
        found["num_key_value_heads"] = found.get("num_key_value_heads") or heads
        found["head_dim"] = found.get("head_dim") or hidden // heads
    if found.get("rope_parameters") is None:
        scaling = dict(found.get("rope_scaling") or {})
        kind = scaling.pop("type", None) or scaling.pop("rope_type", None) or "default"
        if found.get("rope_theta") is not None:
            found["rope_parameters"] = {**scaling, "rope_type": kind, "rope_theta": found["rope_theta"]}
    elif found.get("rope_theta") is not None:
        found["rope_parameters"] = {"rope_theta": found["rope_theta"], **found["rope_parameters"]}
    if "rope_theta" not in (found.get("rope_parameters") or {}) and "num_hidden_layers" in found:
        raise CheckpointError(
            "the draft's rotary base is not said, and readers assume different ones",
            where=f"{path}: rope_theta",
            found="nothing",
            expected="a number",
        )
    names = found.get("architectures")
    if isinstance(names, list) and len(names) == 1 and names[0] in _EAGLE3:
        found["architectures"] = [_EAGLE3[names[0]]]
        found.setdefault("draft_vocab_size", None)
        if _IDS not in found and _IDS not in (found.get("eagle_config") or {}):
            assumed = [1, target.num_layers // 2 - 1, target.num_layers - 4]
            found["eagle_config"] = {**(found.get("eagle_config") or {}), _IDS: assumed}
            notes.append(f"config.json names no layers: {assumed} are what engines then read of such a target")
    return found, notes


def _weights(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        other = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        raise CheckpointError(
            "the draft has no weights that can be read safely",
            where=folder,
            found=", ".join(other) or "no file of weights",
            expected="safetensors files; others may run code when they are read",
            fix="Convert them with the project that wrote them.",
        )
    found: dict[str, Tensor] = {}
    for path in files:
        for name, tensor in read_tensors(path).items():
            own = _our_name(name)
            if own.endswith(_BUFFERS):
                continue
            if own in found:
                raise CheckpointError("a weight stands there twice", where=path, found=own)
            found[own] = tensor
    return found


def _our_name(name: str) -> str:
    for theirs, ours in _RENAMED:
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
    return name


def _read_gguf(folder: Path) -> Foreign:
    if not gguf_file.is_installed():
        where, found = folder / GGUF, gguf_file.MISSING
        raise CheckpointError("a GGUF file cannot be read", where=where, found=found, fix=gguf_file.INSTALL)
    hints, notes = _hints(folder, (GGUF,))
    try:
        name, keys, tensors = gguf_file.read(folder / GGUF)
        check_keys(keys, folder / GGUF, prefix=f"{name}.")
        served = llama_cpp.read(name, keys, tensors)
        check_served(served, folder / GGUF)
        check_vocabulary(tensors, served)
        served = llama_cpp.plain(served, tensors)
        weights = llama_cpp.unprepared(llama_cpp.published(tensors, served), served)
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
        raise CheckpointError(
            "the file is no draft of llama.cpp's", where=folder / GGUF, found=f"{type(error).__name__}: {error}"
        ) from error
    context = keys.get(f"{name}.context_length")
    layers = {} if context is None else {"max_position_embeddings": context}
    return Foreign(format=llama_cpp.NAME, served=served, layers=layers, weights=weights, hints=hints, notes=notes)


def _hints(folder: Path, files: tuple[str, ...]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What export.json says of the checkpoint, if it is there and of these very files.

    The first of `files` it must know; of the others it may say nothing.
    """
    try:
        said = read_object(folder / RECORD, kind=CheckpointError)
    except FileNotFoundError:
        return {}, ()
    digests, checkpoint = said.get("sha256"), said.get("checkpoint")
    known = digests if isinstance(digests, dict) else {}
    others = [
        name for name in files if (name in known or name == files[0]) and not _has(folder / name, known.get(name))
    ]
    if others or not isinstance(checkpoint, dict):
        named = f" than {' and '.join(others)} here" if others else ""
        return {}, (f"{RECORD} beside the draft is of other files{named}, or of another project, and was not read",)
    name = said.get("format")
    if not isinstance(name, str):
        raise unusable(folder / RECORD, "format", name, f"one of {', '.join(FORMATS)}")
    return {**checkpoint, "format": name}, ()


def _has(path: Path, digest: object) -> bool:
    """Whether it is a file with this digest."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == digest


def draft_tokens(foreign: Foreign) -> Tensor | None:
    """[D] int64: the target's token of each of the draft's logits; None if the draft knows all of them.

    CheckpointError where they are none of the target's, or `t2d` says otherwise.
    """
    check_vocabulary(foreign.weights, foreign.served)
    offsets_D = foreign.weights.get(OFFSETS)
    if offsets_D is None or (not foreign.served.reduced and not offsets_D.any()):
        return None
    ids_D = offsets_D.long() + torch.arange(len(offsets_D))
    inside = bool(((ids_D >= 0) & (ids_D < foreign.served.vocab_size)).all())
    if not inside or len(set(ids_D.tolist())) != len(ids_D) or len(ids_D) != foreign.served.draft_vocab_size:
        raise CheckpointError(
            "the draft's vocabulary is none of its target's",
            where=OFFSETS,
            found=f"{len(ids_D):,} tokens from {int(ids_D.min()):,} to {int(ids_D.max()):,}",
            expected=f"{foreign.served.draft_vocab_size:,} different tokens below {foreign.served.vocab_size:,}",
        )
    known_V = foreign.weights.get(KNOWN)
    if known_V is not None and not torch.equal(known_V.bool().nonzero()[:, 0], ids_D.sort().values):
        raise CheckpointError(f"{OFFSETS} and {KNOWN} name different tokens", where=OFFSETS)
    return ids_D


def as_json(value: Any) -> str:
    """Of a table, on one line."""
    return json.dumps(value, sort_keys=True)
