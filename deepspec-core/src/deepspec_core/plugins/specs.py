"""The specs of what a plugin offers: small frozen records that refer to heavy code by text.

`build` is "module:attribute". Core imports it when the component is first used, so listing plugins and checking a run
file never import torch. `options` is a frozen keyword-only attrs class, whose module imports attrs only. It defines the
keys and types of the component's section in a run file. This file imports attrs and nothing else.
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


def _one_line(_spec: object, attribute: Attribute[str], value: str) -> None:
    # A terminal obeys control characters, and no file takes half of a surrogate pair.
    if not isinstance(value, str) or re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", value):
        raise ValueError(f"{attribute.name!r} must be text of one line: {value!r}")


def _said(_recipe: object, attribute: Attribute[str], value: str) -> None:
    _one_line(_recipe, attribute, value)
    if not value.strip():
        raise ValueError(f"{attribute.name!r} must say something")


def _nothing(_config: Mapping[str, Any]) -> bool:
    return False


def _of_a_checkpoint(spec: DraftModelSpec, attribute: Attribute[str], value: str) -> None:
    if spec.trained:
        _REFERENCE(spec, attribute, value)
    elif value or spec.class_suffix or spec.recognise is not _nothing:
        raise ValueError(
            "'class_suffix', 'recognise' and 'options_of' must be left out where 'trained' is False: "
            "such drafts have no checkpoints"
        )


def _of_training(spec: DraftModelSpec, _attribute: Attribute[Recipe | None], value: Recipe | None) -> None:
    if value is not None and not spec.trained:
        raise ValueError("'recommended' must be left out where 'trained' is False: a recipe is for training")


@frozen(kw_only=True)
class ComponentSpec:
    """A named component: a loss term, a weighting, a cache format, a feature source.

    name: The name in run files.
    summary: One line for `deepspec plugins`.
    build: The reference of the callable that makes the component. The hook of its kind defines the arguments
        (hooks.py). If `options` is given, the options object is the first argument.
    options: The options class, for draft types, loss terms and weightings only: other components have no table in the
        run file.
    """

    name: str = field(validator=_NAME)
    summary: str = field(validator=_one_line)
    build: str = field(validator=_REFERENCE)
    options: type | None = field(default=None, validator=_attrs_class)


@frozen(kw_only=True)
class Recipe:
    """Settings that decode better than an algorithm's published ones, for the same training.

    evidence: What was measured, on what, and what was not, in one line. These sentences are written into run files with
        these settings.
    options: Keys of the draft type's options that differ from the defaults. The mask token is not allowed here, because
        it depends on the target.
    loss: Keys of [loss], as a run file writes them, which replace the algorithm's own.
    train: Keys of [train], as a run file writes them, which replace the defaults.

    `deepspec init` checks `options`, `loss` and `train` as it would check a run file. Its errors name the package. At
    least one of them has a key.
    """

    evidence: str = field(validator=_said)
    options: Mapping[str, Any] = field(factory=dict, hash=False, validator=_TABLE)
    loss: Mapping[str, Any] = field(factory=dict, hash=False, validator=_TABLE)
    train: Mapping[str, Any] = field(factory=dict, hash=False, validator=_TABLE)

    def __attrs_post_init__(self) -> None:
        if not (self.options or self.loss or self.train):
            raise ValueError("a recipe sets at least one key of 'options', 'loss' or 'train'")


@frozen(kw_only=True)
class DraftModelSpec(ComponentSpec):
    """An algorithm of drafts. `build(options, adapter, taps)` returns a contracts.draft.DraftModel with new weights.

    trained: False for drafts that need no training, such as one that copies from the prompt. `build(options,
        surroundings)` then returns a contracts.untrained.UntrainedDraft. The fields class_suffix, recognise and
        options_of stay empty, because there is no checkpoint.
    also_called: Other names by which commands accept a draft that is not trained.
    class_suffix: The end of published class names; the adapter's prefix is their beginning.
    recognise: Called with the config.json of a checkpoint, as a mapping. Returns whether the checkpoint is one of this
        algorithm.
    options_of: The reference of a function that reads such a config.json and returns (options, taps). Required for
        drafts that are trained.
    elsewhere: Marks of other projects' checkpoints of such drafts: class names (`architectures`), or keys that only
        their config.json has. Each maps to a sentence for users, which says whose format it is and what differs. A
        checkpoint with such a name or key is refused with this sentence, whatever else its config.json contains. There
        is one exception: if the `class_suffix` of an installed draft type is exactly such a name, that type's
        `recognise` decides.
    proposes_trees: Whether the draft has a `tree_proposer`. A run file with [draft] tree is refused for other drafts.
    default_loss: The algorithm's values for keys of [loss] that the run file leaves out, as a run file writes them, for
        example {"terms": {"ce": 1.0}}.
    recommended: The settings that `deepspec init` writes, if some decode better than the published ones. Only for
        drafts that are trained.
    needs_taps: False if the draft works without tapped layers, for instance because it reads only the target's last
        hidden state. [target] layers may then be [].
    takes_packed: Whether the draft can be trained on rows that hold several conversations (contracts.draft.DraftBatch).
        A run file with [train] batching = "packed" is refused for other drafts.
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
    recommended: Recipe | None = field(default=None, validator=[optional(instance_of(Recipe)), _of_training])
    needs_taps: bool = field(default=True, validator=instance_of(bool))
    takes_packed: bool = field(default=False, validator=instance_of(bool))


@frozen(kw_only=True)
class TargetAdapterSpec(ComponentSpec):
    """A target family. `build(config, draft_layer, tokens)` returns a contracts.target.TargetAdapter.

    model_types: The values of config.model_type that the family covers.
    takes_packed: Whether `features` of its targets keeps the conversations of a packed row separate, as the contract
        requires (`document_ids`). If not, a run that packs rows and computes features during training is refused.

    `config` is a transformers config. Two arguments are optional. `draft_layer` holds the shape of the draft's layers
    as written in the run file ([draft.layer]), or is None. `tokens` (contracts.target.SpecialTokens) holds the ids read
    from the target's directory; if it is None, those of the config are used.
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

    from_row: The reference of a function that makes such a mapping from one row of the task's own data. With it, the
        task's prompts can be read from a file of such rows: `tasks = ["NAME:FILE"]`.
    quota: The number of prompts to ask if the run sets no limit. If the task has more, they are drawn with the run's
        seed. None: all.
    """

    from_row: str | None = field(default=None, validator=optional(_REFERENCE))
    quota: int | None = field(default=None, validator=optional(and_(instance_of(int), ge(1))))


@frozen(kw_only=True)
class ExportSpec(ComponentSpec):
    """An export format for one algorithm (a draft type). `build()` returns a contracts.export.Exporter."""

    algorithm: str = field(validator=_NAME)
