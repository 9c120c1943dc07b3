"""Chooses the contents of a new run file: taps, the mask token, sampling, sizes, and estimates of their cost.

Reads the target's config, its tokenizer and the sizes of its files, never its weights. Builds the draft on the meta
device to count its parameters. config/starter.py writes the text of the file.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Final

import torch
from attrs import NOTHING, asdict, fields, frozen

from deepspec_core.config.recipe_check import CheckedRecipe, checked_recipe
from deepspec_core.config.schema import BUILTIN, MASK, ROW_FILES, CacheOptions, DataOptions
from deepspec_core.config.starter import Start
from deepspec_core.config.train_options import MUON
from deepspec_core.contracts.cache import CacheFormat, CacheHeader
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.contracts.target import TargetAdapter
from deepspec_core.data.template_check import check_template
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.disk import in_words
from deepspec_core.errors import ConfigError, DataError
from deepspec_core.layers.options import LayerOptions
from deepspec_core.pipeline.served_style import ServedStyle, served_style
from deepspec_core.plugins.registry import Registry
from deepspec_core.plugins.specs import DraftModelSpec
from deepspec_core.targets.opening import open_target_alone, resolve_model, tokenizer_for, weight_bytes
from deepspec_core.targets.taps import spread_taps
from deepspec_core.training.optimizers import hidden_matrices

DEFAULT_DATA: Final = "mlabonne/open-perfectblend"
# Bytes of a trained weight: fp32, its gradient and the optimizer's two moments. Bytes of a frozen weight: bfloat16.
_BYTES_TRAINED: Final = 16
_BYTES_MOMENT: Final = 4  # of the two, Muon has one
_BYTES_FROZEN: Final = 2
_MLP_NOTE: Final = "The draft is dense, and the target is not: the size of the draft's MLP is a choice."


@frozen(kw_only=True)
class _NoOptions:
    """For an algorithm without options."""


@frozen(kw_only=True)
class _Found:
    """A value, and the reason for it."""

    value: Any
    reason: str


def start_of(
    model: str, draft_type: str, data: str | None, folder: Path, registry: Registry, *, recommended: bool | None = None
) -> Start:
    """Everything that a new run file in `folder` says.

    `model` and `data` are as the user gave them; relative paths start at the current folder. Raises PluginError if the
    draft type is not installed, or if a run file could not say its recommended recipe. If there is no such recipe, the
    settings are the published ones with `recommended` None, and True is a ConfigError. TargetError or DataError if the
    target or the data do not exist.
    """
    spec = registry.get("draft", draft_type)
    recipe = _recommended(spec, registry) if recommended or (recommended is None and spec.recommended) else None
    here = Path.cwd()
    where = resolve_model(model, base=here, registry=registry)
    adapter, layer = open_target_alone(where, registry=registry)
    architecture = adapter.architecture
    tokenizer = ChatTokenizer(tokenizer_for(where))
    known = architecture.known_taps or spread_taps(architecture.num_layers)
    taps = known if spec.trained and spec.needs_taps else ()
    options: type[Any] = spec.options or _NoOptions
    values: dict[str, Any] = {} if recipe is None else dict(recipe.options)
    mask = _mask_token(adapter, tokenizer)
    if any(attribute.name == MASK for attribute in fields(options)):
        values[MASK] = mask.value
    served = _served_style(spec, options, values, adapter, taps, where, layer, tokenizer, registry)
    if served is not None:
        adapter = served.adapter
    fmt = adapter.conversation_format()
    check_template(tokenizer, fmt, where=where)
    muon = recipe is not None and recipe.train.get("optimizer") == MUON
    return Start(
        name=re.sub(r"[^\w.-]+", "-", f"{draft_type}-{_last_name(model)}").lower(),
        model=_relative(model, folder) if isinstance(where, Path) and not model.startswith(BUILTIN) else model,
        data=_source(data or DEFAULT_DATA, folder, registry),
        draft_type=draft_type,
        taps=taps,
        max_length=min(DataOptions(sources=()).max_length, architecture.max_positions),
        sampling=asdict(fmt.sampling),
        options=options,
        option_values=values,
        layer={**({} if served is None else {"style": served.style}), **layer},
        loss={**spec.default_loss, **({} if recipe is None else recipe.loss)},
        train={} if recipe is None else recipe.train,
        recommended=recipe is not None,
        notes={
            "target": [_target_note(where)],
            **(_notes_of_training(registry, spec, values, adapter, taps, tokenizer, muon) if spec.trained else {}),
            "draft.layer": [*([_MLP_NOTE] if "intermediate_size" in layer else []), *_style_note(served)],
            f"draft.{MASK}": [mask.reason],
            **({} if recipe is None else {"loss": [recipe.note]}),
        },
        trained=spec.trained,
    )


def _recommended(spec: DraftModelSpec, registry: Registry) -> CheckedRecipe:
    if spec.recommended is None:
        raise ConfigError(
            f"no recipe is recommended for drafts of type {spec.name!r}",
            where="--recipe recommended",
            expected="published: no settings have been shown to decode better",
        )
    return checked_recipe(spec, registry)


def _notes_of_training(
    registry: Registry,
    spec: Any,
    values: dict[str, Any],
    adapter: TargetAdapter,
    taps: tuple[int, ...],
    tokenizer: ChatTokenizer,
    muon: bool,
) -> dict[str, list[str]]:
    return {
        "data": [_template_note(tokenizer, adapter)],
        "layers": [_tap_note(adapter) if taps else "The draft needs no decoder layer's outputs."],
        "cache": [_cache_note(adapter, taps, registry)],
        "draft": [_draft_note(registry, spec, values, adapter, taps, muon)],
    }


def _served_style(
    spec: DraftModelSpec,
    options: type[Any],
    values: dict[str, Any],
    adapter: TargetAdapter,
    taps: tuple[int, ...],
    where: str | Path,
    layer: dict[str, Any],
    tokenizer: ChatTokenizer,
    registry: Registry,
) -> ServedStyle | None:
    """None, too, for drafts that are not trained, or whose options the user has to complete."""
    if not spec.trained or any(each.default is NOTHING and each.name not in values for each in fields(options)):
        return None
    return served_style(
        spec.name,
        spec.options and spec.options(**values),
        adapter,
        taps,
        where=where,
        layer=LayerOptions(**layer),
        tokenizer=lambda: tokenizer.tokenizer,
        registry=registry,
    )


def _style_note(served: ServedStyle | None) -> list[str]:
    if served is None:
        return []
    return [
        "No installed export format takes a draft with layers of the target's own family. In this style it can be "
        f"exported to {', '.join(served.formats)}. Remove the style for layers like the target's."
    ]


def _mask_token(adapter: TargetAdapter, tokenizer: ChatTokenizer) -> _Found:
    known, vocabulary = adapter.architecture.mask_token_id, adapter.architecture.vocab_size
    if known is not None:
        own = known == tokenizer.tokenizer.mask_token_id
        return _Found(value=known, reason=f"The mask token: {'the tokenizer has one' if own else 'as published'}.")
    first_unused = max(tokenizer.tokenizer.get_vocab().values()) + 1
    if first_unused < vocabulary:
        reason = f"The mask token: the first id past the tokenizer's, among the {vocabulary:,} the embedding has."
        return _Found(value=first_unused, reason=reason)
    reason = (
        "The mask token: every id of the embedding has a token, so this is the padding; one that no data uses is best."
    )
    return _Found(value=adapter.architecture.pad_token_id, reason=reason)


def _tap_note(adapter: TargetAdapter) -> str:
    architecture = adapter.architecture
    how = "as in published drafts of this target" if architecture.known_taps else "evenly spaced"
    return f"The decoder layers whose outputs the draft sees, from 0 to {architecture.num_layers - 2}: {how}."


def _target_note(where: str | Path) -> str:
    size = weight_bytes(where)
    if size is None:
        return "Memory: every device holds the whole target (the size of its files is not known here)."
    return f"Memory: every device holds the whole target, {in_words(size)} as stored."


def _template_note(tokenizer: ChatTokenizer, adapter: TargetAdapter) -> str:
    fmt = adapter.conversation_format()
    opening = tokenizer.openings(fmt).of(thinking=tokenizer.thinking)
    ends = " or ".join(map(repr, fmt.assistant_ends))
    return (
        f"Rendered by the target's own chat template. An answer follows {fmt.assistant_start + opening!r} and ends "
        f"with {ends}; text and end are supervised, nothing else. See it: deepspec data show FILE"
    )


def _cache_note(adapter: TargetAdapter, taps: tuple[int, ...], registry: Registry) -> str:
    architecture, options = adapter.architecture, CacheOptions()
    header = CacheHeader(
        target="",
        revision="",
        adapter=architecture.model_type,
        taps=taps,
        hidden_size=architecture.hidden_size,
        vocab_size=architecture.vocab_size,
        dtype=options.dtype,
        tokenizer="",
        template="",
        max_length=1,
        source="",
        plugins={},
    )
    cache_format: CacheFormat = registry.cache_format(options.format)
    size = cache_format.bytes_per_token(header)
    return (
        f'Only with features.mode = "cached": {size:,} bytes a token, so {in_words(size * 10**6)} for a million tokens '
        f"({len(taps)} tapped layers and the last, {architecture.hidden_size:,} wide)."
    )


def _draft_note(
    registry: Registry, spec: Any, values: dict[str, Any], adapter: TargetAdapter, taps: tuple[int, ...], muon: bool
) -> str:
    required = [each.name for each in fields(spec.options or _NoOptions) if each.default is NOTHING]
    missing = [name for name in required if name not in values]
    if missing:
        return f"Its size depends on {', '.join(missing)}, which must be given; `deepspec estimate FILE` says it then."
    with torch.device("meta"), registry.blaming("draft", spec.name):
        options = spec.options and spec.options(**values)
        draft: DraftModel = registry.load("draft", spec.name)(options, adapter, taps)
        matrices = hidden_matrices(draft) if muon else frozenset()
    total = sum(parameter.numel() for parameter in draft.parameters())
    shared = sum(part.numel() for module in (draft.embed_tokens, draft.lm_head) for part in module.parameters())
    trained = total - shared
    of_muon = sum(parameter.numel() for name, parameter in draft.named_parameters() if name in matrices)
    held = trained * _BYTES_TRAINED - of_muon * _BYTES_MOMENT
    memory = held + shared * _BYTES_FROZEN
    return (
        f"Memory: {trained:,} trained parameters, {in_words(held)} with gradients and optimizer, and {shared:,} shared "
        f"with the target and frozen; about {in_words(memory)} a device, activations aside."
    )


def _source(data: str, folder: Path, registry: Registry) -> str:
    if data.startswith(BUILTIN):
        registry.get("builtin", data.removeprefix(BUILTIN))
        return data
    if Path(data).expanduser().exists():
        return _relative(data, folder)
    if data.endswith(ROW_FILES) or data.count("/") != 1 or data.startswith((".", "/", "~")):
        raise DataError(
            "A source of conversations is missing",
            where=data,
            expected="a file of JSON lines, a JSON array or Parquet, a dataset folder, a Hub dataset such as "
            "organisation/name, or builtin:NAME",
        )
    return data


def _relative(path: str, folder: Path) -> str:
    """The path as the run file in `folder` has to write it."""
    return path if path.startswith(("/", "~")) else Path(os.path.relpath(path, folder)).as_posix()


def _last_name(model: str) -> str:
    return model.removeprefix(BUILTIN).rstrip("/").rpartition("/")[2] or "target"
