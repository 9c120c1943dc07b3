"""Finding a draft checkpoint and the family it was made in: from what a run file names to what can be loaded.

Knows where checkpoints are stored (a local directory, the Hugging Face Hub) and that config.json names the family and
the target's sizes. Which algorithm a checkpoint belongs to is read in published.py; no target is opened here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deepspec_core.checkpoints.config_numbers import check_numbers
from deepspec_core.checkpoints.draft_window import window_of
from deepspec_core.checkpoints.published import CONFIG, read_draft_config
from deepspec_core.contracts.target import TargetAdapter, TargetArchitecture
from deepspec_core.disk import is_folder
from deepspec_core.errors import CheckpointError, DeepSpecError
from deepspec_core.hub import why_unreachable
from deepspec_core.json_files import value_of
from deepspec_core.layers.options import LayerOptions
from deepspec_core.targets.opening import HUB_ID, first_line

if TYPE_CHECKING:
    from deepspec_core.plugins.registry import Registry

# Never pickled weights, never code.
_HUB_FILES = ("*.json", "*.safetensors")
_MOST_LAYERS = 10_000


def resolve_draft(name: str | Path, *, base: Path) -> Path:
    """The directory of a checkpoint: one relative to `base`, or else a Hub id, which is fetched.

    CheckpointError where a path does not exist, or the Hub does not give it.
    """
    text = str(name)
    if is_folder(local := base / Path(text).expanduser()):
        return local.resolve()
    if text.startswith((".", "/", "~")) or not HUB_ID.fullmatch(text):
        raise CheckpointError(
            "there is no draft checkpoint in this directory",
            where=local,
            expected=f"a directory with {CONFIG}, or a Hub id such as org/draft",
        )
    from huggingface_hub import snapshot_download

    problem = why_unreachable()
    try:
        return Path(snapshot_download(text, allow_patterns=list(_HUB_FILES)))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "there is no such local directory, and the Hub does not give this repository",
            where=text,
            found=problem or first_line(error),
            expected="a local directory, or a Hub id that exists and can be reached",
            fix="Check the name and the network. Without a network, download the draft first and give its directory.",
        ) from error


def draft_adapter(directory: Path, *, registry: Registry) -> TargetAdapter:
    """The adapter of a checkpoint's family in the draft's own shape, from its config.json alone.

    Its architecture has the target's number of layers, as `num_target_layers` says. CheckpointError where config.json
    is missing, is no configuration of the family, says numbers that make no sense, or no installed adapter covers it.
    """
    from transformers import AutoConfig

    fields = read_draft_config(directory)
    where = Path(directory) / CONFIG
    layers = value_of(fields, "num_target_layers", int, path=where, kind=CheckpointError)
    if layers is not None and not 0 < layers <= _MOST_LAYERS:
        raise CheckpointError(
            "config.json cannot be used",
            where=f"{where}: num_target_layers",
            found=layers,
            expected=f"the target's number of layers, at most {_MOST_LAYERS:,}",
        )
    check_numbers(fields, where)
    window = window_of(fields, where)
    model_type = fields.pop("model_type", None)
    if not isinstance(model_type, str):
        raise CheckpointError(
            "config.json names no model_type",
            where=where,
            found=model_type,
            expected="that of the draft's family",
        )
    try:
        spec = registry.adapter_for(model_type)
    except DeepSpecError as error:
        raise CheckpointError(
            error.problem, where=where, found=error.found, expected=error.expected, fix=error.fix
        ) from error
    if layers is not None:
        fields["num_hidden_layers"] = layers
        fields["layer_types"] = ["full_attention"] * layers
    elif window is not None and "layer_types" in fields:
        fields["layer_types"] = ["full_attention"] * len(fields["layer_types"])
    try:
        config = AutoConfig.for_model(model_type, **fields)
        own = None if window is None else LayerOptions(window=window)
        adapter: TargetAdapter = registry.load("target", spec.name)(config, own)
        reason = adapter.unsupported()
    except DeepSpecError:
        raise
    except Exception as error:  # what transformers raises on a bad config depends on the family
        raise CheckpointError(
            "config.json is not a valid configuration",
            where=where,
            found=first_line(error),
            expected=f"a {model_type} configuration",
        ) from error
    if reason is not None:
        raise CheckpointError("this draft's family cannot build it", where=where, found=reason)
    return adapter


def check_same_target(directory: Path, draft: TargetArchitecture, target: TargetArchitecture) -> None:
    """CheckpointError, naming the keys of config.json, where a draft was made for a target of other sizes.

    `draft` is the architecture of the checkpoint's own adapter.
    """
    layers = read_draft_config(directory).get("num_target_layers", target.num_layers)
    sizes = {
        "hidden_size": (draft.hidden_size, target.hidden_size),
        "vocab_size": (draft.vocab_size, target.vocab_size),
        "num_target_layers": (layers, target.num_layers),
    }
    different = {key: pair for key, pair in sizes.items() if pair[0] != pair[1]}
    if different:
        raise CheckpointError(
            "the draft was made for another target: " + ", ".join(f"`{key}` differs" for key in different),
            where=Path(directory) / CONFIG,
            found=", ".join(f"{key} = {found}" for key, (found, _) in different.items()),
            expected=", ".join(f"{key} = {expected}" for key, (_, expected) in different.items())
            + (f", as in {target.name}" if target.name else ""),
            fix="Give the target the draft was trained for, or another draft.",
        )
