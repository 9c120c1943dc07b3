"""Whether the target that an export is to name is the one that its draft was made for, as far as this machine can tell.

Knows the keys that say sizes and family in the config.json of a target and of a draft. The target is not fetched or
loaded: where its config.json does not lie on this machine, nothing is known, and nothing is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from deepspec_core.checkpoints.export_origin import Origin
from deepspec_core.checkpoints.published import CONFIG, read_draft_config
from deepspec_core.contracts.target import TargetArchitecture
from deepspec_core.errors import CheckpointError, DeepSpecError
from deepspec_core.families.styled import TARGET_FAMILY
from deepspec_core.json_files import read_object
from deepspec_core.plugins.registry import Registry
from deepspec_core.targets.opening import is_relative, open_target_alone, resolve_model

# As a target's config.json calls them, and as a draft's does.
_SIZES: Final = {"hidden_size": "hidden_size", "vocab_size": "vocab_size", "num_hidden_layers": "num_target_layers"}


def check_exported_target(
    directory: Path, origin: Origin, architecture: TargetArchitecture, *, registry: Registry
) -> None:
    """CheckpointError, naming the keys, where the target of an export has other sizes or another family than the draft.

    `architecture` is that of the adapter of the checkpoint in `directory`.
    """
    path = _config_of(origin, registry)
    if path is None:
        return
    try:
        target = read_object(path, kind=CheckpointError, strict=False)
    except (OSError, DeepSpecError):
        return
    text = target.get("text_config")
    sizes = text if isinstance(text, Mapping) else target
    draft = read_draft_config(directory)
    mine: dict[str, Any] = {"hidden_size": architecture.hidden_size, "vocab_size": architecture.vocab_size}
    mine["num_target_layers"] = draft.get("num_target_layers")
    different: dict[str, tuple[Any, Any]] = {
        theirs: (sizes[theirs], mine[ours])
        for theirs, ours in _SIZES.items()
        if sizes.get(theirs) is not None and mine[ours] is not None and sizes[theirs] != mine[ours]
    }
    family = draft.get(TARGET_FAMILY, draft.get("model_type"))
    if not _is_family(family, target.get("model_type"), path, registry):
        different["model_type"] = (target.get("model_type"), family)
    if different:
        raise CheckpointError(
            "the draft was made for another target: " + ", ".join(f"`{key}` differs" for key in different),
            where=path,
            found=", ".join(f"{key} = {found}" for key, (found, _) in different.items()),
            expected=", ".join(f"{key} = {said}" for key, (_, said) in different.items())
            + f", as {directory / CONFIG} says of the draft's target",
            fix="Name the target that the draft was trained for: --target.",
        )


def _config_of(origin: Origin, registry: Registry) -> Path | None:
    """The target's config.json on this machine, a copy from the Hub too; None where there is none."""
    model = origin.model
    if model is None or (not origin.base_known and is_relative(model)):
        return None
    try:
        where = resolve_model(model, base=origin.base, registry=registry)
    except DeepSpecError:
        return None
    if isinstance(where, Path):
        return where / CONFIG if (where / CONFIG).is_file() else None
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(where, CONFIG, revision=origin.revision)
    except (OSError, ValueError):
        return None
    return Path(cached) if isinstance(cached, str) else None


def _is_family(draft: Any, target: Any, path: Path, registry: Registry) -> bool:
    """Whether a draft of the family `draft` can be of a target of the family `target`, whose config.json is `path`."""
    if not isinstance(target, str) or _adapter_name(draft, registry) == _adapter_name(target, registry):
        return True
    # The draft of a target of experts has the layers of a dense family.
    try:
        adapter, _ = open_target_alone(path.parent, registry=registry)
    except DeepSpecError:
        return True  # a family that is not installed here, or one that is code beside the target: nothing is known
    return bool(adapter.draft_config(1, {}).model_type == draft)


def _adapter_name(model_type: Any, registry: Registry) -> Any:
    """The family that covers a model type, by which its variants are alike; the type itself where none is installed."""
    try:
        return registry.adapter_for(str(model_type)).name
    except DeepSpecError:
        return model_type
