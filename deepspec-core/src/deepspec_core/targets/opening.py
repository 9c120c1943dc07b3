"""Finding a target and the adapter that covers it: from what a run file names to something that can be loaded.

Knows where targets are stored (shipped by a plugin, a local directory, the Hugging Face Hub) and what their files are
called; which family a target belongs to is the registry's business, what is done with it the adapter's. transformers is
imported when a target is first opened.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepspec_core.config.schema import BUILTIN
from deepspec_core.contracts.target import SpecialTokens, TargetAdapter, TargetModel
from deepspec_core.digests import digests_of
from deepspec_core.disk import is_folder
from deepspec_core.errors import DeepSpecError, TargetError
from deepspec_core.hub import say_local_copy, why_unreachable
from deepspec_core.json_files import read_object
from deepspec_core.layers.options import LayerOptions
from deepspec_core.targets.extra_weights import INDEX, StoredWeight, find_weights, read_weights, shards_of, wanted_names

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from deepspec_core.plugins.registry import Registry

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WEIGHT_FILES = "*.safetensors"
_MOST_LAYERS = 10_000
# Never pickled weights; code only where the user allows it.
_HUB_FILES = ("*.json", "*.jinja", "*.txt", "*.model", _WEIGHT_FILES)
# Files of a directory that say how the target speaks: tokenizer, templates, stop tokens, code of its own.
_SPOKEN = ("*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.txt", "*.model", "*.py")
_ABOUT_WEIGHTS = ("*.safetensors.index.json", "adapter_config.json")


def resolve_model(name: str, *, base: Path, registry: Registry, revision: str | None = None) -> str | Path:
    """Where `[target] model` points: a directory (Path) or a Hub id (str).

    `builtin:NAME` is what a plugin ships; a directory relative to `base` wins over a Hub id of the same name.
    TargetError for paths that do not exist, builtins that are no models, and a `revision` of anything but a Hub id.
    """
    where: str | Path
    if name.startswith(BUILTIN):
        spec = registry.get("builtin", name.removeprefix(BUILTIN))
        if spec.kind != "model":
            raise TargetError("not a model", where=name, found=f"builtin {spec.kind}", expected="a builtin model")
        where = Path(registry.load("builtin", spec.name)())
    elif is_folder(local := base / Path(name).expanduser()):
        where = local.resolve()
    elif name.startswith((".", "/", "~")) or not HUB_ID.fullmatch(name):
        raise TargetError(
            "no such target directory",
            where=local,
            expected="a directory with config.json, a Hub id such as organisation/model, or builtin:NAME",
        )
    else:
        where = name
    if revision is not None and isinstance(where, Path):
        raise TargetError(
            "only targets from the Hub have a revision", where=name, found=revision, fix="Remove the revision."
        )
    return where


def is_relative(name: str) -> bool:
    """Whether `[target] model` can only be a directory relative to its run file, and no Hub id."""
    return not name.startswith((BUILTIN, "/", "~")) and (name.startswith(".") or not HUB_ID.fullmatch(name))


def open_adapter(
    where: str | Path,
    *,
    registry: Registry,
    draft_layer: LayerOptions | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> TargetAdapter:
    """The adapter of a target, made from its config; no weights are read.

    `where` is a directory or a Hub id (resolve_model), `draft_layer` the run's [draft.layer]. TargetError where the
    config cannot be had or read, or the adapter says it cannot handle the target; PluginError or TargetError of the
    registry where no adapter covers its model_type.
    """
    from transformers import AutoConfig

    raw = _read_json(where, "config.json", revision, required=True)
    if raw is None:
        raise TargetError(
            "the target has no config.json",
            where=where,
            expected="a Hugging Face model directory",
            fix="Name the folder that holds config.json and the safetensors files.",
        )
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise TargetError("config.json names no model_type", where=where, found=model_type, expected="a string")
    spec = registry.adapter_for(model_type)
    _check_layers(raw, where)
    try:
        config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # what transformers raises on a bad config depends on the family
        raise TargetError(
            "the target's config.json is not a valid configuration",
            where=where,
            found=first_line(error),
            expected=f"a {model_type} configuration",
        ) from error
    tokens = special_tokens(where, raw, revision=revision, trust_remote_code=trust_remote_code)
    build = registry.load("target", spec.name)
    draft_layer = draft_layer and draft_layer.for_target(spec.name)
    styled = draft_layer is not None and draft_layer.style is not None
    try:
        # With a style, the sizes are those of the style's layers.
        own = LayerOptions(intermediate_size=draft_layer.intermediate_size) if styled and draft_layer else draft_layer
        adapter: TargetAdapter = build(config, own, tokens)
        if styled and draft_layer and adapter.unsupported() is None:
            from deepspec_core.families.styled import styled_adapter

            adapter = styled_adapter(adapter, config, draft_layer, tokens, registry=registry)
        reason = adapter.unsupported()
    except DeepSpecError:
        raise
    except Exception as error:  # what a family makes of values that it did not expect
        raise TargetError(
            "the target's config.json is not a valid configuration",
            where=where,
            found=first_line(error),
            expected=f"a {model_type} configuration that {registry.provider('target', spec.name)} can read",
        ) from error
    if reason is not None:
        raise TargetError(
            "this target, or a draft in this shape, is not supported",
            where=where,
            found=reason,
            fix="Choose another target, or give the draft's own shape in [draft.layer].",
        )
    return adapter


def open_target_alone(
    where: str | Path, *, registry: Registry, trust_remote_code: bool = False, revision: str | None = None
) -> tuple[TargetAdapter, dict[str, int]]:
    """The adapter without a run file to say the draft's shape; with it the sizes of [draft.layer] that a target without
    dense layers leaves open, filled in with three times the hidden size, as far as they are needed.
    """
    options = {"registry": registry, "trust_remote_code": trust_remote_code, "revision": revision}
    try:
        return open_adapter(where, **options), {}  # type: ignore[arg-type]
    except TargetError as refused:
        try:
            some = open_adapter(where, draft_layer=LayerOptions(intermediate_size=64), **options)  # type: ignore[arg-type]
        except TargetError:
            raise refused from None
        layer = {"intermediate_size": 3 * some.architecture.hidden_size}
        return open_adapter(where, draft_layer=LayerOptions(**layer), **options), layer  # type: ignore[arg-type]


def load_target(
    adapter: TargetAdapter,
    where: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> TargetModel:
    """The target with its weights. From the Hub it is fetched whole first, so that it cannot change under a run."""
    folder = fetched(where, revision, trust_remote_code)
    if (folder / INDEX).is_file():
        shards_of(folder / INDEX)  # refuses files elsewhere
    return adapter.load(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)


def extra_weights(where: str | Path, prefixes: Sequence[str], *, revision: str | None = None) -> dict[str, Tensor]:
    """The target's weights whose names begin with one of `prefixes`, as they are stored. TargetError where one fits
    none."""
    return read_weights(find_weights(fetched(where, revision), prefixes))


def extra_weights_before(
    where: str | Path, prefixes: Sequence[str], *, revision: str | None = None
) -> dict[str, StoredWeight] | None:
    """What `extra_weights` will find: nothing is downloaded but an index.

    None where only the files themselves can tell. TargetError where a prefix fits none.
    """
    if _is_local(where):
        return find_weights(Path(where), prefixes)
    index = _read_json(where, INDEX, revision) or {}
    names = index.get("weight_map")
    if isinstance(names, dict):
        wanted_names(list(names), prefixes, where=where)
    return None


def special_tokens(
    where: str | Path, config: Mapping[str, Any], *, revision: str | None = None, trust_remote_code: bool = False
) -> SpecialTokens:
    """Stop ids of the target's generation config, else its tokenizer's end token, else its config's; padding and mask.

    Padding falls back to the first stop id; without a mask token `mask` is None. `config` is config.json as a mapping.
    TargetError where nothing says where answers stop.
    """
    text = {**config, **_text_part(config, where)}
    generation = _read_json(where, "generation_config.json", revision) or {}
    named = _read_json(where, "tokenizer_config.json", revision) or {}
    stop = _ids(generation.get("eos_token_id"), f"{where}: eos_token_id of generation_config.json")
    mask = None
    if named and (named.get("mask_token") is not None or not stop):
        tokenizer = tokenizer_for(where, trust_remote_code, revision=revision)
        mask = tokenizer.mask_token_id
        stop = stop or _ids(tokenizer.eos_token_id, f"{where}: the tokenizer's end token")
    stop = stop or _ids(text.get("eos_token_id"), f"{where}: eos_token_id of config.json")
    if not stop:
        raise TargetError(
            "the target has no stop token",
            where=where,
            expected="eos_token_id in generation_config.json or config.json, or an end token of the tokenizer",
            fix="Add eos_token_id to generation_config.json.",
        )
    pads = (
        *_ids(generation.get("pad_token_id"), f"{where}: pad_token_id of generation_config.json"),
        *_ids(text.get("pad_token_id"), f"{where}: pad_token_id of config.json"),
        stop[0],
    )
    return SpecialTokens(stop=stop, pad=pads[0], mask=mask)


def _text_part(config: Mapping[str, Any], where: str | Path) -> Mapping[str, Any]:
    part = config.get("text_config") or {}
    if not isinstance(part, Mapping):
        raise TargetError(
            "the target's config.json is not a valid configuration",
            where=f"{where}: text_config",
            found=type(part).__name__,
            expected="an object",
        )
    return part


def _check_layers(config: Mapping[str, Any], where: str | Path) -> None:
    """TargetError for a number of layers that no model has: libraries make a list of them before anything else."""
    for part in (config, _text_part(config, where)):
        layers = part.get("num_hidden_layers", 1)
        if type(layers) is not int or not 0 < layers <= _MOST_LAYERS:
            raise TargetError(
                "the target's config.json is not a valid configuration",
                where=f"{where}: num_hidden_layers",
                found=repr(layers)[:80],
                expected=f"a whole number from 1 to {_MOST_LAYERS:,}",
            )


def tokenizer_for(where: str | Path, trust_remote_code: bool = False, *, revision: str | None = None) -> Any:
    """The target's tokenizer (transformers). TargetError where it cannot be had, or has no vocabulary."""
    from transformers import AutoTokenizer

    if not _is_local(where):
        why_unreachable()
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)
        problem = None
        # Without files transformers makes an empty tokenizer of the family's class, and says nothing.
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
            problem = "no vocabulary: only special tokens"
    except Exception as error:  # missing and damaged files surface as errors of several libraries
        problem = first_line(error)
    if problem is not None:
        raise TargetError(
            "the target's tokenizer cannot be loaded",
            where=where,
            found=problem,
            expected="tokenizer.json and tokenizer_config.json beside config.json",
            fix="Check that the directory is complete; copy or download the tokenizer's files too.",
        )
    return tokenizer


def fingerprint(where: str | Path, *, revision: str | None = None) -> str:
    """What tells one target or draft from another: caches and results made with it carry it.

    A directory: a digest of config.json, of every byte of every weight file (digests.py), and of what says which of
    them are read and how: an index of shards, the settings of an adapter. A Hub id: the commit, where it is known from
    the local Hub cache, else the id and revision as asked for. TargetError where a file cannot be read.
    """
    if not _is_local(where):
        from huggingface_hub import try_to_load_from_cache
        from transformers.utils.hub import extract_commit_hash

        cached = try_to_load_from_cache(str(where), "config.json", revision=revision)
        commit = extract_commit_hash(cached, None) if isinstance(cached, str) else None
        return commit or f"{where}@{revision or 'main'}"
    folder = Path(where)
    weights = sorted(folder.glob(_WEIGHT_FILES))
    try:
        digest = hashlib.sha256((folder / "config.json").read_bytes())
        for path in sorted(path for pattern in _ABOUT_WEIGHTS for path in folder.glob(pattern)):
            digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
        for path, content in zip(weights, digests_of(weights), strict=True):
            digest.update(f"{path.name} {content}\n".encode())
    except OSError as error:
        raise TargetError(
            "weights cannot be read",
            where=folder,
            found=error,
            fix="Check that the directory is complete and readable.",
        ) from error
    return digest.hexdigest()


def content_digest(where: str | Path, *, revision: str | None = None) -> str:
    """The fingerprint, and of a directory also the files that say how it speaks (`_SPOKEN`)."""
    digest = hashlib.sha256(fingerprint(where, revision=revision).encode())
    if _is_local(where):
        spoken = sorted(path for pattern in _SPOKEN for path in Path(where).glob(pattern))
        for path, content in zip(spoken, digests_of(spoken), strict=True):
            digest.update(f"{path.relative_to(where).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def weight_bytes(where: str | Path) -> int | None:
    """How large a target's weight files are together; None where a Hub id does not say it in a file, or none are."""
    if _is_local(where):
        return sum(path.stat().st_size for path in Path(where).glob(_WEIGHT_FILES)) or None
    about = (_read_json(where, INDEX, None) or {}).get("metadata")
    size = about.get("total_size") if isinstance(about, dict) else None
    return size if isinstance(size, int) else None


def _is_local(where: str | Path) -> bool:
    return isinstance(where, Path) or os.path.isdir(where)


def _read_json(where: str | Path, name: str, revision: str | None, *, required: bool = False) -> dict[str, Any] | None:
    """A JSON file of a target, None where a directory has no such file, or a Hub id none that is not `required`."""
    if _is_local(where):
        path = Path(where) / name
        if not path.is_file():
            return None
    else:
        from transformers.utils import cached_file

        problem = why_unreachable()
        try:
            found = cached_file(str(where), name, revision=revision, _raise_exceptions_for_missing_entries=required)
        except OSError as error:
            raise _not_given(where, revision, problem or first_line(error)) from error
        if found is None:
            return None
        say_local_copy(str(where))
        path = Path(found)
    # As transformers reads it: of a key that comes twice the last counts.
    return read_object(path, kind=TargetError, strict=False, fix="Copy the file again.")


def fetched(where: str | Path, revision: str | None, trust_remote_code: bool = False) -> Path:
    """The directory of a target, fetched whole from the Hub where it is a Hub id. TargetError where it is not given."""
    if _is_local(where):
        return Path(where)
    from huggingface_hub import snapshot_download

    patterns = [*_HUB_FILES, *(("*.py",) if trust_remote_code else ())]
    problem = why_unreachable()
    try:
        return Path(snapshot_download(str(where), revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise _not_given(where, revision, problem or first_line(error)) from error


def _not_given(where: str | Path, revision: str | None, problem: str) -> TargetError:
    return TargetError(
        "there is no such local directory, and the Hub does not give this repository",
        where=where if revision is None else f"{where} at revision {revision}",
        found=problem,
        expected="a local directory, or a Hub id that exists and can be reached",
        fix="Check the name and the network. Without a network, download the model first and give its directory.",
    )


def _ids(value: Any, where: str) -> tuple[int, ...]:
    """One token id or a list of them; none where there is nothing."""
    ids = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    if any(type(token) is not int or token < 0 for token in ids):
        raise TargetError(
            "this is not a token id", where=where, found=repr(value)[:80], expected="a whole number, or a list of them"
        )
    return ids


def first_line(error: Exception) -> str:
    """What went wrong, in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
