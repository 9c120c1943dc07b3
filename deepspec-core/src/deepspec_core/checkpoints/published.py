"""Draft checkpoints as they are published: a Hugging Face directory with config.json and model.safetensors.

Knows how parameter names of the blocks become published ones, and how a directory is written whole and read strictly.
Which algorithm a config.json belongs to is asked of the registry; what is in it, of the algorithm and the adapter.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from attrs import asdict, frozen
from torch import Tensor, nn

from deepspec_core.checkpoints.draft_window import window_of
from deepspec_core.checkpoints.export_record import why_no_checkpoint
from deepspec_core.checkpoints.weight_file import (
    FLOATING,
    Header,
    check_finite,
    read_header,
    read_tensors,
    write_tensors,
)
from deepspec_core.contracts.draft import DraftDescription, DraftModel
from deepspec_core.contracts.target import TargetAdapter
from deepspec_core.disk import in_words
from deepspec_core.errors import CheckpointError, ConfigError, DeepSpecError, PluginError
from deepspec_core.json_files import read_object
from deepspec_core.layers.decoder_layer import DraftLayer
from deepspec_core.layers.draft_vocabulary import KEY
from deepspec_core.plugins.references import FAILURES, blame, resolve
from deepspec_core.plugins.registry import Registry

__all__ = ["layer_names", "load_draft", "published_weights", "save_draft"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_SHOWN = 8
# What safetensors calls a type, and what config.json does.
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
# Rotary frequencies and the like.
_CONSTANT_BYTES = 2**26
# How safetensors calls the dtypes of whole numbers.
_SAFETENSORS = {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def layer_names(layers: Iterable[nn.Module], under: str = "layers") -> dict[str, str]:
    """Parameter names of draft layers -> published ones: the part of DraftDescription.weight_names any draft shares.

    `under` is where the layers stand in the draft. A slot's published name comes from the adapter's blocks.
    """
    names = {under: "layers"}
    for index, layer in enumerate(layers):
        assert isinstance(layer, DraftLayer)
        for slot, name in layer.norm_names.items():
            (tensor,) = getattr(layer, slot).state_dict()
            names[f"{under}.{index}.{slot}.{tensor}"] = f"layers.{index}.{name}"
        names |= {
            f"{under}.{index}.attention.{slot}": f"layers.{index}.self_attn.{name}"
            for slot, name in layer.attention.names.items()
        }
    return names


def published_name(name: str, weight_names: Mapping[str, str]) -> str:
    """One parameter's published name: its longest prefix (of whole dotted parts) in the map is replaced."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        if prefix in weight_names:
            return ".".join([weight_names[prefix], *parts[end:]])
    return name


def save_draft(
    draft: DraftModel, adapter: TargetAdapter, out_dir: Path, *, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write a checkpoint; `out_dir` is complete or absent. Embedding and lm_head are in it, frozen or not.

    `weights` is the draft's state dict where the caller gathered it from several ranks. CheckpointError where `out_dir`
    already holds something.
    """
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise CheckpointError(
            "a checkpoint would overwrite existing files", where=out_dir, fix="choose another path, or remove it first"
        )
    description = draft.describe()
    own = draft.state_dict() if weights is None else weights
    tensors = {
        published_name(name, description.weight_names): tensor.detach().cpu().contiguous()
        for name, tensor in own.items()
    }
    assert len(tensors) == len(own), "two parameters share a published name"
    tensors = _apart(tensors)
    config = config_text(draft, description, adapter)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        (unfinished / CONFIG).write_text(config, encoding="utf-8")
        write_tensors(unfinished / WEIGHTS, tensors)
        unfinished.chmod(0o755)
        os.replace(unfinished, out_dir)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def config_text(draft: DraftModel, description: DraftDescription, adapter: TargetAdapter) -> str:
    """The config.json of a draft's checkpoint. The draft's weights are not read.

    Beside the draft's own keys and those of the family, it has `num_target_layers`, by which a draft is told from one
    for another target, `architectures` and `dtype`.
    """
    # Embedding and lm_head may be the target's, in its dtype; what the draft itself computes in is that of its own.
    shared = {id(weight) for part in (draft.embed_tokens, draft.lm_head) for weight in part.parameters()}
    own = (weight.dtype for weight in draft.parameters() if id(weight) not in shared and weight.is_floating_point())
    dtype = str(next(own, draft.lm_head.weight.dtype)).removeprefix("torch.")
    config = adapter.draft_config(
        description.num_layers,
        {
            "num_target_layers": adapter.architecture.num_layers,
            **description.config,
            "architectures": [description.class_name],
            "dtype": dtype,
        },
    )
    # Every key, not those that differ from defaults: defaults move between versions of the library.
    return str(config.to_json_string(use_diff=False))


def read_draft_config(directory: Path) -> dict[str, Any]:
    """A checkpoint's config.json. CheckpointError where it is missing or not a JSON object."""
    try:
        return read_object(Path(directory) / CONFIG, kind=CheckpointError)
    except FileNotFoundError:
        raise why_no_checkpoint(Path(directory)) or CheckpointError(
            "there is no draft checkpoint in this directory",
            where=directory,
            expected=f"a directory with {CONFIG} and {WEIGHTS}",
        ) from None


def stored_dtype(directory: Path) -> str:
    """What the weights of a checkpoint are stored in, as config.json calls it; "float32" if they are of several types.

    CheckpointError where there are none.
    """
    found = {_DTYPES.get(dtype, "float32") for dtype in read_header(Path(directory) / WEIGHTS).dtypes.values()}
    return found.pop() if len(found) == 1 else "float32"


def published_weights(draft: DraftModel) -> dict[str, Tensor]:
    """A draft's weights by their published names, its embedding and lm_head among them.

    No two share memory, because a file has no tensor twice. So an lm_head that is also the embedding is copied.
    """
    names = draft.describe().weight_names
    return _apart({published_name(name, names): tensor.detach() for name, tensor in draft.state_dict().items()})


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors; of those that share memory, all but the first are copies."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        found[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return found


def load_draft(
    directory: Path,
    *,
    registry: Registry,
    adapter: TargetAdapter,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> DraftModel:
    """A draft from a checkpoint, its embedding and lm_head frozen, in evaluation mode.

    `adapter` must have the draft's shape. CheckpointError where files are missing or damaged, no algorithm knows the
    checkpoint, or weights are missing, unexpected, of another shape or not finite numbers; all such weights are named.
    What config.json describes is compared with the header of the weights before memory is taken for it.
    """
    directory = Path(directory)
    check_draft(directory, registry=registry, adapter=adapter)
    # The new weights are overwritten at once; whoever loads a draft keeps their random state.
    with torch.random.fork_rng(devices=[]):
        draft = build_draft(directory, registry=registry, adapter=adapter)
    for name, buffer in draft.named_buffers():
        if not buffer.isfinite().all():
            raise CheckpointError(
                f"{CONFIG} gives constants that are not finite numbers, such as rotary frequencies",
                where=directory / CONFIG,
                found=name,
                fix="check the entries of rope_parameters",
            )
    names = {published_name(name, draft.describe().weight_names): name for name in draft.state_dict()}
    # Assigned rather than cast with .to(dtype), which would round buffers that are no weights (rotary frequencies) too.
    # Copied, because the tensors of the file are the file, mapped into memory: it may change, and lies unaligned.
    # Whole numbers, such as a buffer of token ids, stay what they are: bf16 holds 151643 as 151552.
    weights = {
        name: tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
        for name, tensor in read_tensors(directory / WEIGHTS).items()
    }
    check_finite(directory / WEIGHTS, weights)
    draft.load_state_dict({names[name]: tensor for name, tensor in weights.items()}, assign=True)
    if draft.vocabulary is not None and (found := draft.vocabulary.problem()) is not None:
        raise CheckpointError(
            "the draft's vocabulary does not fit this target",
            where=directory / WEIGHTS,
            found=f"{KEY}: {found}",
            expected=f"token ids from 0 to below {draft.vocabulary.target_size:,} that increase",
        )
    return draft.to(device).eval()


def check_draft(directory: Path, *, registry: Registry, adapter: TargetAdapter) -> DraftDescription:
    """What the draft of a checkpoint says of itself. No memory is taken for its weights.

    CheckpointError as load_draft raises it, but for damage that the weights' header does not show.
    """
    draft = build_empty(directory, registry=registry, adapter=adapter)
    description = draft.describe()
    window = window_of(read_draft_config(directory), Path(directory) / CONFIG)
    if description.window != window:
        raise CheckpointError(
            f"draft type {description.algorithm!r} does not have the attention window of {CONFIG}",
            where=Path(directory) / CONFIG,
            found=_seen(window),
            expected=_seen(description.window),
            fix="Use a release of the draft type, or of the target's family, that knows windows.",
        )
    differences = WeightDifferences.between(
        {published_name(name, description.weight_names): tensor for name, tensor in draft.state_dict().items()},
        read_header(directory / WEIGHTS),
    )
    if differences:
        raise CheckpointError(
            f"the weights are not those of the {description.algorithm!r} draft that {CONFIG} describes",
            where=directory / WEIGHTS,
            found=differences.in_words(shown=_SHOWN),
            fix="check that the checkpoint belongs to this target and was written completely",
        )
    return description


def build_empty(directory: Path, *, registry: Registry, adapter: TargetAdapter) -> DraftModel:
    """As build_draft, without memory for weights (on the meta device), and buffers no larger than a config may ask for.

    CheckpointError, too, where the algorithm or the family cannot build what config.json describes.
    """
    try:
        with torch.device("meta"):
            draft = build_draft(directory, registry=registry, adapter=adapter)
    except ConfigError as error:
        raise CheckpointError(
            error.problem, where=Path(directory) / CONFIG, found=error.found, expected=error.expected
        ) from error
    except DeepSpecError:
        raise
    except FAILURES as error:  # what a draft or a family raises on senseless sizes is theirs
        raise CheckpointError(
            f"no draft can be built as {CONFIG} describes it", where=Path(directory) / CONFIG, found=blame(error)
        ) from error
    constants = sum(buffer.nbytes for buffer in draft.buffers())
    if constants > _CONSTANT_BYTES:
        raise CheckpointError(
            f"{CONFIG} asks for larger constants than any draft has",
            where=Path(directory) / CONFIG,
            found=in_words(constants),
            expected=f"at most {in_words(_CONSTANT_BYTES)}",
        )
    return draft


def build_draft(directory: Path, *, registry: Registry, adapter: TargetAdapter) -> DraftModel:
    """The draft a checkpoint's config.json describes, with new weights, its embedding and lm_head frozen.

    CheckpointError where config.json is missing or damaged, or no algorithm knows it.
    """
    algorithm, options, taps = read_options(directory, registry)
    draft = cast(DraftModel, registry.load("draft", algorithm)(options, adapter, taps))
    draft.embed_tokens.requires_grad_(False)
    draft.lm_head.requires_grad_(False)
    return draft


def read_options(directory: Path, registry: Registry) -> tuple[str, Any, tuple[int, ...]]:
    """What a checkpoint's config.json says it is: the algorithm's name, its options, the taps."""
    config, where = read_draft_config(directory), Path(directory) / CONFIG
    try:
        spec = registry.recognise(config)
        options, taps = resolve(spec.options_of)(config)
    except (PluginError, CheckpointError) as error:
        raise why_no_checkpoint(Path(directory)) or CheckpointError(
            error.problem, where=where, found=error.found, expected=error.expected, fix=error.fix
        ) from error
    except FAILURES as error:  # a plugin's reading of a value that it did not expect
        raise why_no_checkpoint(Path(directory)) or CheckpointError(
            f"{CONFIG} does not describe a draft", where=where, found=blame(error)
        ) from error
    if (spec.needs_taps and not taps) or any(type(tap) is not int for tap in taps):
        raise CheckpointError(
            f"{CONFIG} names no layers of the target", where=where, found=taps, expected="a list of whole numbers"
        )
    layers = config.get("num_target_layers")
    if type(layers) is int and any(tap >= layers for tap in taps):
        raise CheckpointError(
            "the draft reads layers that its target does not have",
            where=f"{where}: num_target_layers",
            found=f"{layers}, and the draft reads the layers {', '.join(map(str, taps))}",
            expected=f"at least {max(taps) + 1}, the number of the target's layers",
        )
    return spec.name, options, tuple(taps)


def _seen(window: int | None) -> str:
    return "the whole context" if window is None else f"{window} positions"


@frozen(kw_only=True)
class WeightDifferences:
    """How a checkpoint's weights differ from those its config.json asks for, by published name."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    of_another_shape: tuple[str, ...]
    not_floating_point: tuple[str, ...]
    of_other_numbers: tuple[str, ...]

    @classmethod
    def between(cls, draft: Mapping[str, Tensor], header: Header) -> WeightDifferences:
        """Compare names, shapes and kinds of numbers. Whole numbers must have the draft's own dtype."""
        found, expected = header.shapes, {name: tuple(tensor.shape) for name, tensor in draft.items()}
        own = {name: tensor.dtype for name, tensor in draft.items() if not tensor.is_floating_point()}
        return cls(
            missing=tuple(sorted(expected.keys() - found.keys())),
            unexpected=tuple(sorted(found.keys() - expected.keys())),
            of_another_shape=tuple(
                f"{name} {list(found[name])}, expected {list(expected[name])}"
                for name in sorted(expected.keys() & found.keys())
                if list(found[name]) != list(expected[name])
            ),
            not_floating_point=tuple(
                f"{name} {dtype}"
                for name, dtype in sorted(header.dtypes.items())
                if not dtype.startswith(FLOATING) and name not in own
            ),
            of_other_numbers=tuple(
                f"{name} {header.dtypes[name]}, expected {str(dtype).removeprefix('torch.')}"
                for name, dtype in sorted(own.items())
                if name in header.dtypes and header.dtypes[name] != _SAFETENSORS.get(dtype)
            ),
        )

    def __bool__(self) -> bool:
        """Whether there are any."""
        return any(asdict(self).values())

    def in_words(self, *, shown: int) -> str:
        """Every kind there is, with at most `shown` names each."""
        return "; ".join(
            f"{kind.replace('_', ' ')}: {_listed(names, shown)}" for kind, names in asdict(self).items() if names
        )


def _listed(names: Sequence[str], shown: int) -> str:
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")
