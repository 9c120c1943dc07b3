"""Another project's draft becomes a checkpoint of ours, or is refused with what no draft type here can express.

config.json is the target's in the draft's shape, as of a draft trained here, with what the other format says of layers;
the algorithm's keys are those that its draft type reads. The outcome is loaded, and what it proposes is compared with
what the other format's own files compute (replay.py), before the folder appears. Knows the keys of the three
algorithms; imports none of them.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import torch
from attrs import frozen
from torch import Tensor

from deepspec_core.checkpoints.export_facts import target_name
from deepspec_core.checkpoints.opening import draft_adapter
from deepspec_core.checkpoints.published import check_draft, config_text, load_draft
from deepspec_core.checkpoints.weight_file import write_tensors
from deepspec_core.contracts.target import TargetAdapter, TargetArchitecture
from deepspec_core.errors import CheckpointError, ExportError
from deepspec_core.layers.draft_vocabulary import KEY as DRAFT_IDS
from deepspec_core.layers.options import LayerOptions
from deepspec_core.plugins.references import resolve
from deepspec_core.plugins.registry import Registry
from deepspec_core.targets.opening import load_target, open_adapter, open_target_alone, resolve_model
from deepspec_export.foreign import Foreign, draft_tokens, read_foreign
from deepspec_export.record import write_json
from deepspec_export.served import HEAD, KNOWN, OFFSETS, SHARED
from deepspec_export.verification import CONFIG, WEIGHTS, replayed

IMPORT_RECORD: Final = "import.json"
_W1, _W2 = "markov_head.markov_w1.weight", "markov_head.markov_w2.weight"
# Families whose layers are those of engines' drafts, with norms of queries and keys and without.
_NORMED: Final = ("qwen3", "qwen3_moe")
_UNNORMED: Final = ("llama", "mistral")
# Of training alone, where nothing says otherwise: the published numbers.
_DEFAULTS: Final = {"num_anchors": 512, "ttt_length": 7, "step_loss_decay": 0.8}
_LAYER_KEYS: Final = ("max_position_embeddings",)
_SHOWN: Final = 8


@frozen(kw_only=True)
class Imported:
    """What was written: the format it was read as, the algorithm, and what whoever uses it should know."""

    format: str
    algorithm: str
    notes: tuple[str, ...]


def import_draft(
    folder: Path, target: str, out: Path, *, registry: Registry, base: Path = Path(), format_name: str | None = None
) -> Imported:
    """Write the draft in `folder` as a checkpoint of ours, in the new folder `out`. `target` is as a run file names it.

    CheckpointError where a draft type here cannot be it; TargetError where the target cannot be had. The target's
    weights are loaded: its embedding and head are taken, or compared with the draft's. Nothing is left where it fails.
    """
    where = resolve_model(target, base=base, registry=registry)
    adapter, _ = open_target_alone(where, registry=registry)
    foreign = read_foreign(folder, adapter.architecture, format_name=format_name)
    _refuse_inexpressible(foreign, adapter.architecture)
    weights = _our_weights(foreign)
    algorithm, keys, weights = _algorithm(foreign, weights)
    dtype = _dtype(weights)
    styled = _layers(foreign, adapter, where, registry, algorithm)
    keys |= {"target_model_name_or_path": target_name(target, base=base).name} if algorithm == "eagle3" else {}
    config = _config(foreign, styled, keys, algorithm, registry) | {"dtype": str(dtype).removeprefix("torch.")}
    missing = [name for name in SHARED if name not in weights]
    model = load_target(adapter, where, dtype=dtype, device="cpu")
    theirs = {SHARED[0]: model.embedding_weight(), HEAD: model.head_weight()}
    if DRAFT_IDS in weights:
        theirs[HEAD] = theirs[HEAD][weights[DRAFT_IDS]]
    weights |= {name: theirs[name].to(dtype).contiguous().clone() for name in missing}
    different = [name for name in SHARED if not torch.equal(weights[name].to(dtype), theirs[name].to(dtype))]
    del model, theirs
    notes = [*foreign.notes, *_notes(foreign, missing, different, target_name(target, base=base).name)]
    _write(out, config, weights, foreign, notes, registry)
    return Imported(format=foreign.format, algorithm=algorithm, notes=tuple(notes))


def _refuse_inexpressible(foreign: Foreign, target: TargetArchitecture) -> None:
    served = foreign.served

    def refuse(what: str, found: object, expected: object) -> CheckpointError:
        return CheckpointError(
            f"no draft type here can be this draft: {what}", where=CONFIG, found=found, expected=expected
        )

    for name, meaning in (
        ("norm_before_residual", "its residual stream is the normed hidden state"),
        ("norm_before_fc", "it norms the target's features before they are projected"),
        ("norm_output", "it norms the state that it feeds back"),
        ("block_causal", "its blocks are causal"),
        ("attention_bias", "its projections have biases"),
    ):
        if getattr(served, name):
            raise refuse(meaning, f"{name} = true", "false")
    if served.activation != "silu":
        raise refuse("its MLP has another activation", served.activation, "silu")
    for name, mine, theirs in (
        ("hidden_size", served.hidden_size, target.hidden_size),
        ("vocab_size", served.vocab_size, target.vocab_size),
        ("num_target_layers", foreign.target_layers or target.num_layers, target.num_layers),
    ):
        if mine != theirs:
            raise CheckpointError(
                "the draft was made for another target, or projects its features to a size of its own",
                where=f"{CONFIG}: {name}",
                found=mine,
                expected=f"{theirs}, as in {target.name or 'the target'}",
            )
    if len(set(served.feature_layers)) != len(served.feature_layers) or list(served.feature_layers) != sorted(
        served.feature_layers
    ):
        raise refuse("it reads layers out of order", list(served.feature_layers), "increasing layer numbers")
    if not all(0 <= layer < target.num_layers - 1 for layer in served.feature_layers):
        raise refuse(
            "it reads layers that a draft of this target cannot tap",
            list(served.feature_layers),
            f"from 0 to {target.num_layers - 2}",
        )


def _our_weights(foreign: Foreign) -> dict[str, Tensor]:
    """The weights by our published names, those of the draft's vocabulary in increasing order of its tokens."""
    ids_D = draft_tokens(foreign)
    found = {name: tensor for name, tensor in foreign.weights.items() if name not in (OFFSETS, KNOWN)}
    _check_names(foreign)
    if ids_D is None:
        return found
    order_D = ids_D.argsort()
    for name in (HEAD, _W2):
        if name in found:
            found[name] = found[name][order_D].contiguous()
    return found | {DRAFT_IDS: ids_D[order_D]}


def _check_names(foreign: Foreign) -> None:
    """CheckpointError, naming all, where the files do not have the weights of the draft that the keys describe."""
    needed, found = foreign.served.weights(), foreign.weights
    optional = {*SHARED, OFFSETS, KNOWN}
    wrong = [f"{name} is missing" for name in needed if name not in found and name != KNOWN]
    wrong += [f"{name} is not known" for name in found if name not in needed and name not in optional]
    wrong += [
        f"{name} is {list(tensor.shape)}, expected {list(needed[name])}"
        for name, tensor in found.items()
        if name in needed and tuple(tensor.shape) != needed[name]
    ]
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise CheckpointError(
            f"the weights are not those of the {foreign.served.method} draft that {CONFIG} describes",
            where="the draft",
            found="; ".join(wrong[:_SHOWN]) + more,
        )


def _algorithm(foreign: Foreign, weights: dict[str, Tensor]) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """The draft type, its keys of config.json, and the weights that it has.

    A Markov head of zeros adds nothing: it is left out, as our exporters put it in.
    """
    served, hints = foreign.served, foreign.hints
    keys: dict[str, Any] = {"target_layer_ids": list(served.feature_layers)}
    if served.reduced:
        keys["draft_vocab_size"] = served.draft_vocab_size
    if served.method == "eagle3":
        keys |= {name: hints.get(name, _DEFAULTS[name]) for name in ("ttt_length", "step_loss_decay")}
        if "ttt_length" not in hints and served.proposes is not None:
            keys["ttt_length"] = served.proposes
        return "eagle3", keys | {"draft_num_hidden_layers": served.num_layers}, weights
    assert served.proposes is not None
    rank, with_markov = served.markov_rank, served.confidence_with_markov
    if rank and not with_markov and served.markov_head == "vanilla" and not any(weights[w].any() for w in (_W1, _W2)):
        rank, weights = 0, {name: tensor for name, tensor in weights.items() if name not in (_W1, _W2)}
    keys |= {
        "block_size": served.proposes + (0 if served.anchor_predicts else 1),
        "mask_token_id": served.mask_token_id,
        "num_anchors": hints.get("num_anchors", _DEFAULTS["num_anchors"]),
        "sample_from_anchor": served.anchor_predicts,
        "markov_rank": rank,
        "enable_confidence_head": served.confidence,
    }
    if rank:
        keys["markov_head_type"] = served.markov_head
    if served.confidence:
        keys["confidence_head_with_markov"] = with_markov
    return "dspark" if rank or served.confidence else "dflash", keys, weights


def _dtype(weights: Mapping[str, Tensor]) -> torch.dtype:
    kinds = {tensor.dtype for name, tensor in weights.items() if name != DRAFT_IDS}
    if not kinds <= {torch.float32, torch.float16, torch.bfloat16}:
        raise CheckpointError(
            "weights are no plain floating-point numbers",
            where="the draft",
            found=", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds)),
            expected="float32, float16 or bfloat16; a quantised draft cannot be imported",
        )
    return kinds.pop() if len(kinds) == 1 else torch.float32


def _layers(
    foreign: Foreign, adapter: TargetAdapter, where: str | Path, registry: Registry, algorithm: str
) -> TargetAdapter:
    """The target's adapter in the draft's shape, and in the style of its layers where the target's own are not such."""
    served, own = foreign.served, registry.adapter_for(adapter.architecture.model_type).name
    # An Eagle3 draft may leave a family's norms of queries and keys out.
    alike = _NORMED if served.head_norms else (*_UNNORMED, *_NORMED) if algorithm == "eagle3" else _UNNORMED
    came_from = foreign.hints.get("model_type")
    plain = came_from in (*_NORMED, *_UNNORMED) and came_from in alike
    wanted = str(came_from) if plain else own if own in alike else alike[0]
    built = "qwen3" if own == "qwen3_moe" else own  # the draft of such a target is dense
    layer = LayerOptions(
        style=None if wanted in (own, built) else wanted,
        intermediate_size=served.intermediate_size,
        num_heads=served.num_heads,
        num_kv_heads=served.num_kv_heads,
        head_dim=served.head_dim,
        window=served.window,
    )
    return open_adapter(where, registry=registry, draft_layer=layer)


def _config(
    foreign: Foreign, adapter: TargetAdapter, keys: Mapping[str, Any], algorithm: str, registry: Registry
) -> dict[str, Any]:
    """The whole config.json, but for the dtype: as training would have written it."""
    served, spec = foreign.served, registry.get("draft", algorithm)
    shape = json.loads(adapter.draft_config(served.num_layers, {}).to_json_string(use_diff=False))
    architectures = [adapter.class_prefix + spec.class_suffix]
    named = {**shape, **keys, "architectures": architectures}
    if algorithm == "eagle3" and not served.head_norms and shape["model_type"] in _NORMED:
        named["qk_norm"] = False
    options, taps = resolve(spec.options_of)(named)
    with torch.device("meta"):
        draft = registry.load("draft", algorithm)(options, adapter, taps)
    found: dict[str, Any] = json.loads(config_text(draft, draft.describe(), adapter))
    rope = {name: value for name, value in served.rope.items() if value is not None}
    if rope != found.get("rope_parameters"):
        found["rope_parameters"] = rope
    found["rms_norm_eps"] = served.norm_eps
    return found | {name: foreign.layers[name] for name in _LAYER_KEYS if name in foreign.layers}


def _notes(foreign: Foreign, missing: list[str], different: list[str], target: str) -> list[str]:
    """What whoever uses the draft should know. `different`: which of the shared weights are not the target's."""
    notes = []
    # A folder is rarely called by the whole name.
    if foreign.target_name and foreign.target_name.rstrip("/").split("/")[-1].lower() != target.split("/")[-1].lower():
        notes.append(f"the draft says that its target is {foreign.target_name}, and {target} was given")
    trained = ("ttt_length", "step_loss_decay") if foreign.served.method == "eagle3" else ("num_anchors",)
    absent = [name for name in trained if name not in foreign.hints]
    if absent:
        values = ", ".join(f"{name} = {_DEFAULTS[name]}" for name in absent if name != "ttt_length")
        notes.append(f"the format does not say what concerns training alone: {values} was taken")
    if missing:
        notes.append(f"the format leaves weights to the target, and its own were taken: {', '.join(missing)}")
    if SHARED[0] in different:
        notes.append(
            "the draft's embed_tokens.weight is not the target's: it was trained for another target, or with an "
            "embedding of its own; training would take the target's instead"
        )
    if HEAD in different:
        notes.append("the draft has an lm_head of its own; training would take the target's rows instead")
    return notes


def _write(
    out: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    foreign: Foreign,
    notes: list[str],
    registry: Registry,
) -> None:
    """Write the checkpoint beside its place, load it, compare it with the other format's files, and move it there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        write_json(unfinished / CONFIG, config)
        write_tensors(unfinished / WEIGHTS, weights)
        adapter = draft_adapter(unfinished, registry=registry)
        check_draft(unfinished, registry=registry, adapter=adapter)
        draft = load_draft(unfinished, registry=registry, adapter=adapter)
        try:
            outcome = replayed(unfinished, foreign.served, foreign.weights, draft)
        except ExportError as error:
            raise CheckpointError(
                "the checkpoint would not compute what the other format's files do", where=out, found=error.found
            ) from error
        record = {
            "format": foreign.format,
            "notes": notes,
            "conventions": attrs.asdict(foreign.served),
            "verified": {"replay": outcome},
        }
        write_json(unfinished / IMPORT_RECORD, record)
        unfinished.chmod(0o755)
        os.replace(unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
