"""What a plugin offers: small frozen records, in which heavy code is named as text.

`build` is "module:attribute". It is imported when the component is first used, so listing plugins and checking a run
file never import torch. `options` is a frozen keyword-only attrs class, and its module imports attrs only. It gives the
component's section of a run file its keys and types. This file imports attrs and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

from attrs import Attribute, field, frozen, has
from attrs.validators import and_, deep_iterable, deep_mapping, ge, instance_of, is_callable, matches_re, optional

_REFERENCE = matches_re(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_TABLE = deep_mapping(instance_of(str), instance_of(object))
_NAME = matches_re(r"[a-z0-9][a-z0-9_.-]*")


def _attrs_class(_spec: object, _attribute: Attribute[type | None], value: type | None) -> None:
    if value is not None and not (isinstance(value, type) and has(value)):
        raise TypeError(f"'options' must be an attrs class: {value!r}")


def _one_line(_spec: object, _attribute: Attribute[str], value: str) -> None:
    # A terminal obeys control characters.
    if not isinstance(value, str) or re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", value):
        raise ValueError(f"'summary' must be text of one line: {value!r}")


def _nothing(_config: Mapping[str, Any]) -> bool:
    return False


def _of_a_checkpoint(spec: DraftModelSpec, attribute: Attribute[str], value: str) -> None:
    if spec.trained:
        _REFERENCE(spec, attribute, value)
    elif value or spec.class_suffix or spec.recognise is not _nothing:
        raise ValueError("'class_suffix', 'recognise' and 'options_of' are of checkpoints: leave them out, or train")


@frozen(kw_only=True)
class ComponentSpec:
    """A named component: a loss term, a weighting, a cache format, a feature source.

    name: The name in run files.
    summary: One line for `deepspec plugins`.
    build: Names what is called to make the component, as the hook of its kind says (hooks.py). If `options` is given,
        the options object is the first argument.
    options: Of draft types, loss terms and weightings only; others have no table of the run file that could give them.
    """

    name: str = field(validator=_NAME)
    summary: str = field(validator=_one_line)
    build: str = field(validator=_REFERENCE)
    options: type | None = field(default=None, validator=_attrs_class)


@frozen(kw_only=True)
class Recipe:
    """Settings that decode better than an algorithm's published ones, for the same training.

    evidence: What was measured, on what, and what was not: sentences, which stand in run files with these settings.
    options: Keys of the draft type's options that differ from the defaults. A mask token is the target's, and no key.
    loss: Keys of [loss], as a run file writes them, in the place of the algorithm's own.

    `deepspec init` checks both as it would check a run file, and names the package in the error.
    """

    evidence: str = field(validator=matches_re(r"(?s)\S.*"))
    options: Mapping[str, Any] = field(factory=dict, hash=False, validator=_TABLE)
    loss: Mapping[str, Any] = field(factory=dict, hash=False, validator=_TABLE)


@frozen(kw_only=True)
class DraftModelSpec(ComponentSpec):
    """An algorithm of drafts. `build(options, adapter, taps)` returns a contracts.draft.DraftModel with new weights.

    trained: False for drafts that are ready as they are, such as one that copies from the prompt. `build(options,
        surroundings)` then returns a contracts.untrained.UntrainedDraft, and the fields below stay empty, because there
        is no checkpoint.
    also_called: Other names by which commands take a draft that is not trained.
    class_suffix: The end of published class names; the adapter's prefix is their beginning.
    recognise: Called with the config.json of a checkpoint, as a mapping. Says whether it is one of this algorithm.
    options_of: Names a function that reads such a config.json back and returns (options, taps). Required of drafts
        that are trained.
    elsewhere: Class names (`architectures`) of other projects' checkpoints of such drafts, or keys that only their
        config.json has, each with a sentence for users: whose format it is, and what differs. A checkpoint with such a
        name or key is refused, and named in the error, whatever else it says. An installed draft type whose
        `class_suffix` is such a name, the whole of it, takes it back: that type's `recognise` decides.
    proposes_trees: Whether the draft has a `tree_proposer`. Others are refused where a run file has [draft] tree.
    default_loss: Keys of [loss], as a run file writes them, for those that the run file leaves out. An example is
        {"terms": {"ce": 1.0}}.
    recommended: What `deepspec init --recipe recommended` writes, where something beats the published recipe.
    needs_taps: False if the draft works without tapped layers, as one does that reads only the target's last hidden
        state. Then [target] layers may be [].
    takes_packed: Whether the draft can be trained on rows that hold several conversations (contracts.draft.DraftBatch).
        Others are refused where a run file has [train] batching = "packed".
    """

    trained: bool = field(default=True, validator=instance_of(bool))
    also_called: tuple[str, ...] = field(default=(), validator=deep_iterable(_NAME, instance_of(tuple)))
    class_suffix: str = field(default="", validator=instance_of(str))
    recognise: Callable[[Mapping[str, Any]], bool] = field(default=_nothing, validator=is_callable())
    options_of: str = field(default="", validator=_of_a_checkpoint)
    elsewhere: Mapping[str, str] = field(
        factory=dict, hash=False, validator=deep_mapping(instance_of(str), instance_of(str))
    )
    proposes_trees: bool = field(default=False, validator=instance_of(bool))
    default_loss: Mapping[str, Any] = field(factory=dict, hash=False)
    recommended: Recipe | None = field(default=None, validator=optional(instance_of(Recipe)))
    needs_taps: bool = field(default=True, validator=instance_of(bool))
    takes_packed: bool = field(default=False, validator=instance_of(bool))


@frozen(kw_only=True)
class TargetAdapterSpec(ComponentSpec):
    """A target family. `build(config, draft_layer, tokens)` returns a contracts.target.TargetAdapter.

    model_types: The values of config.model_type that the family covers.
    takes_packed: Whether the `features` of its targets keep the conversations of a packed row apart, as the contract
        asks (`document_ids`). If not, a run that packs and computes features while training is refused.

    `config` is a transformers config. Two arguments are optional. `draft_layer` holds the draft's own shape as the run
    file gives it ([draft.layer]), or is None. `tokens` (contracts.target.SpecialTokens) holds the ids read from the
    target's directory; if it is None, those of the config are used.
    """

    model_types: tuple[str, ...] = field(validator=deep_iterable(instance_of(str), instance_of(tuple)))
    takes_packed: bool = field(default=True, validator=instance_of(bool))


@frozen(kw_only=True)
class BuiltinSpec(ComponentSpec):
    """A model or prompts that a plugin ships as `builtin:NAME`.

    For the kind "model", `build()` returns the path of a Hugging Face directory. For the kind "prompts",
    `build(split, seed)` yields mappings with `id` and `messages`. The splits are "train" and "held_out", and no prompt
    is in both.
    """

    kind: Literal["model", "prompts"]


@frozen(kw_only=True)
class TaskSpec(ComponentSpec):
    """An evaluation task. `build(limit, seed)` yields mappings with `id` and `messages` (or `turns`).

    from_row: Names a function that makes such a mapping of one row of the task's own data. With it the task can be
        asked from a file of such rows: `tasks = ["NAME:FILE"]`.
    quota: How many rows are asked where a run gives no limit, drawn by its seed where there are more. None: all.
    """

    from_row: str | None = field(default=None, validator=optional(_REFERENCE))
    quota: int | None = field(default=None, validator=optional(and_(instance_of(int), ge(1))))


@frozen(kw_only=True)
class ExportSpec(ComponentSpec):
    """An export format for one algorithm (a draft type). `build()` returns a contracts.export.Exporter."""

    algorithm: str = field(validator=_NAME)
