"""Tries the description of a new draft before a run's first stage: its facts, and its weights' published names.

Knows runs and descriptions. Reads no weight and no file.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from deepspec_core.checkpoints.published import published_name
from deepspec_core.contracts.draft import DraftDescription, DraftModel
from deepspec_core.errors import PluginError
from deepspec_core.pipeline.run import Run


def described(run: Run, draft: DraftModel) -> DraftDescription:
    """What the draft says of itself. Raises PluginError, with the package, if it fails, or says what cannot be so."""
    kind, registry = run.file.draft.type, run.plugins.registry
    with registry.blaming("draft", kind):
        said: object = draft.describe()
    package = registry.provider("draft", kind)
    if not isinstance(said, DraftDescription):
        raise _refused(kind, package, "describe()", type(said).__name__, "a contracts.draft.DraftDescription")
    suffix = registry.get("draft", kind).class_suffix
    for field, found, right, expected in (
        ("algorithm", said.algorithm, said.algorithm == kind, repr(kind)),
        ("class_name", said.class_name, str(said.class_name).endswith(suffix), f"a name that ends with {suffix!r}"),
        ("taps", said.taps, tuple(said.taps) == tuple(run.file.target.layers), f"{run.file.target.layers}, as built"),
        ("max_tokens", said.max_tokens, _counts(said.max_tokens), "a whole number above 0"),
        ("num_layers", said.num_layers, _counts(said.num_layers), "a whole number above 0"),
        ("target_weights", said.target_weights, _texts(said.target_weights), "beginnings of names of weights"),
        ("unread_options", said.unread_options, _texts(said.unread_options), "names of options"),
        ("training_keys", said.training_keys, _keys_of(said), "keys of `config`"),
    ):
        if not right:
            raise _refused(kind, package, field, repr(found), expected)
    shared = _shared_names(draft, said)
    if shared:
        expected = "another published name for each of the draft's parameters and buffers"
        raise _refused(kind, package, "weight_names", shared, expected)
    return said


def _texts(said: Any) -> bool:
    return isinstance(said, tuple) and all(isinstance(text, str) and text for text in said)


def _keys_of(said: DraftDescription) -> bool:
    return isinstance(said.training_keys, tuple) and set(said.training_keys) <= set(said.config)


def _counts(number: Any) -> bool:
    return type(number) is int and number > 0


def _shared_names(draft: DraftModel, said: DraftDescription) -> str | None:
    """A published name that several weights would get, with these weights; None if there is none."""
    published = {name: published_name(name, said.weight_names) for name in draft.state_dict()}
    for name, count in Counter(published.values()).items():
        if count > 1:
            return f"{name!r} for {', '.join(own for own, theirs in published.items() if theirs == name)}"
    return None


def _refused(kind: str, package: str, field: str, found: str, expected: str) -> PluginError:
    return PluginError(
        f"draft type {kind!r} has a wrong description: `{field}`", where=package, found=found, expected=expected
    )
