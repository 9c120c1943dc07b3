"""Making a draft that is not trained, and telling it from every other one.

Knows the contract of such drafts. Does not know runs, or what is done with a draft.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import torch

from deepspec_core.contracts.proposer import Proposer
from deepspec_core.contracts.target import TargetArchitecture
from deepspec_core.contracts.untrained import Surroundings, UntrainedDescription, UntrainedDraft
from deepspec_core.errors import PluginError
from deepspec_core.plugins.registry import Registry
from deepspec_core.untrained.language_model import open_language_model


def make_untrained(
    kind: str,
    options: Any,
    *,
    architecture: TargetArchitecture,
    tokenizer: Any,
    dtype: torch.dtype,
    device: torch.device,
    base: Path,
    registry: Registry,
) -> UntrainedDraft:
    """The draft of that type for a target; no weights are read. `base` is where relative paths in the options start.

    DeepSpecError where it does not fit the target; PluginError where the plugin breaks its contract.
    """
    surroundings = Surroundings(
        architecture=architecture,
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
        open_model=partial(open_language_model, base=base, registry=registry, dtype=dtype, device=device),
    )
    draft = registry.build("draft", kind, options, surroundings)
    package = registry.provider("draft", kind)
    if not isinstance(draft, UntrainedDraft):
        raise PluginError(
            f"draft type {kind!r} is no draft",
            where=package,
            found=type(draft).__name__,
            expected="what `build` makes is a contracts.untrained.UntrainedDraft",
        )
    with registry.blaming("draft", kind):
        said: Any = draft.describe()
        count: Any = draft.parameters()
        digest: Any = draft.digest()
    problem = _wrong(said, kind)
    if problem is None and not (type(count) is int and count >= 0):
        problem = f"parameters() = {count!r}"
    if problem is None and not isinstance(digest, str):
        problem = f"digest() = {digest!r}"
    if problem is not None:
        raise PluginError(
            f"draft type {kind!r} has a wrong description",
            where=package,
            found=problem,
            expected=f"an UntrainedDescription of the algorithm {kind!r} with max_tokens of 1 or more, a number of "
            "parameters, and a digest that is text",
        )
    return draft


def _wrong(said: Any, kind: str) -> str | None:
    if not isinstance(said, UntrainedDescription):
        return type(said).__name__
    if said.algorithm != kind:
        return f"algorithm = {said.algorithm!r}"
    if not (type(said.max_tokens) is int and said.max_tokens > 0):
        return f"max_tokens = {said.max_tokens!r}"
    remarks = isinstance(said.remarks, tuple) and all(isinstance(remark, str) for remark in said.remarks)
    return None if remarks else f"remarks = {said.remarks!r}"


def proposer_of(kind: str, draft: UntrainedDraft, registry: Registry) -> Proposer:
    """Its proposer, with its weights. PluginError where there is none, or it is not what the draft says of itself."""
    with registry.blaming("draft", kind):
        proposer: Any = draft.proposer()
        most, taps = getattr(proposer, "max_tokens", None), getattr(proposer, "taps", None)
        said = draft.describe().max_tokens
    if most != said or taps != ():
        raise PluginError(
            f"draft type {kind!r} has a proposer that does not fit",
            where=registry.provider("draft", kind),
            found=f"max_tokens = {most!r}, taps = {taps!r}" if proposer is not None else "None",
            expected=f"max_tokens = {said}, as described, and taps = (): it sees no layer of the target",
        )
    found: Proposer = proposer
    return found


def revision_of(kind: str, options: Any, draft: UntrainedDraft) -> str:
    """A digest of the draft: its type, its options, and what it reads."""
    given = None if options is None else attrs.asdict(options)
    said = json.dumps([kind, given, draft.digest()], sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()
