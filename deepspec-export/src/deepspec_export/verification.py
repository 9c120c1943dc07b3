"""Whether an export is what the draft is: its files are read from disk again, and compared by an engine's rules.

Three comparisons: every convention field by field, every weight bit for bit, and the distributions of a made-up round.
Knows files and Served; not how a format is written.

Legend: T context tokens, K proposals, C = taps * H, V vocabulary.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import attrs
import torch
from attrs import frozen
from safetensors import safe_open
from torch import Tensor

from deepspec_core.contracts.draft import DraftModel
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.errors import CheckpointError, ExportError
from deepspec_export.replay import Round, replay
from deepspec_export.served import KNOWN, SHARED, Served, disagreements

CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
_SEED: Final = 980406
_PROMPT: Final = 12
# A window is tried out up to this many tokens of context.
_MOST_CONTEXT: Final = 4096
# Sums in fp32, in another order and another attention kernel; log-probabilities of a vocabulary of 150,000.
_TOLERANCE: Final = 5e-3
# Less likely tokens are left out: their logarithms are of rounding.
_LIKELY: Final = 1e-6
_SHOWN: Final = 6
# A folder that only this machine has: /home/me/models, C:\models, file:///models.
_MACHINE_PATH: Final = re.compile(r"(?<![\w.:/])/(?:[\w.+-]+/)+[\w.+-]*|\b[A-Za-z]:\\|file://")

Read = Callable[[Mapping[str, Any]], Served]


@frozen(kw_only=True)
class Verified:
    """What was compared, for export.json."""

    conventions: dict[str, Any]
    weights: dict[str, Any]
    replay: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """In JSON types."""
        return attrs.asdict(self)


def verify(folder: Path, *, read: Read, expected: Served, written: Mapping[str, Tensor], draft: DraftModel) -> Verified:
    """ExportError, naming everything, where the files in `folder` are not what the draft is.

    `written`: the weights that were to be written. `draft` computes in fp32, on the CPU.
    """
    keys = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    try:
        found = read(keys)
    except KeyError as error:
        raise _refused(folder / CONFIG, [f"an engine needs {error.args[0]}"]) from error
    if different := disagreements(found, expected):
        raise _refused(folder / CONFIG, different)
    tensors = _tensors(folder / WEIGHTS)
    return _compare(folder / WEIGHTS, found, tensors, needed=found.weights(), written=written, draft=draft)


def verify_file(
    path: Path,
    found: Served,
    tensors: Mapping[str, Tensor],
    *,
    expected: Served,
    written: Mapping[str, Tensor],
    draft: DraftModel,
) -> Verified:
    """As `verify`, of one file: what an engine makes of it, and its weights by their published names."""
    if different := disagreements(found, expected):
        raise _refused(path, different)
    needed = {name: shape for name, shape in found.weights().items() if name != KNOWN}
    return _compare(path, found, tensors, needed=needed, written=written, draft=draft)


def _compare(
    path: Path,
    found: Served,
    tensors: Mapping[str, Tensor],
    *,
    needed: Mapping[str, tuple[int, ...]],
    written: Mapping[str, Tensor],
    draft: DraftModel,
) -> Verified:
    """Of an export whose conventions are the draft's: ExportError where weights, or what they compute, differ."""
    _check_weights(path, tensors, needed, written)
    stored = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    return Verified(
        conventions={
            name: list(value) if isinstance(value, tuple) else value for name, value in attrs.asdict(found).items()
        },
        weights={
            "tensors": len(tensors),
            "dtypes": stored,
            "compared": "bit for bit",
            "shared_with_target": [name for name in SHARED if name not in tensors],
        },
        replay=replayed(path.parent, found, tensors, draft),
    )


def check_same_bits(path: Path, written: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ExportError where the file's weights are not these, or not of these names and shapes."""
    _check_weights(path, _tensors(path), shapes, written)


def refuse_paths(folder: Path) -> None:
    """ExportError where a text file of the export names a folder of this machine."""
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".md") and (found := _MACHINE_PATH.search(path.read_text(encoding="utf-8"))):
            raise _refused(path, [f"a path of this machine, {found[0]}"])


def _tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def _check_weights(
    path: Path, found: Mapping[str, Tensor], needed: Mapping[str, tuple[int, ...]], written: Mapping[str, Tensor]
) -> None:
    wrong = [f"{name} is missing" for name in needed if name not in found]
    wrong += [f"{name} is not known to the engine" for name in found if name not in needed and name not in SHARED]
    wrong += [
        f"{name} is {list(tensor.shape)}, and the engine takes {list(needed[name])}"
        for name, tensor in found.items()
        if name in needed and tuple(tensor.shape) != needed[name]
    ]
    wrong += [
        f"{name} differs from the draft's"
        for name, tensor in written.items()
        if name in found and not _same_bits(tensor, found[name])
    ]
    wrong += [f"{name} is not the draft's" for name in found if name not in written]
    if wrong:
        raise _refused(path, wrong)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


def replayed(folder: Path, served: Served, tensors: Mapping[str, Tensor], draft: DraftModel) -> dict[str, Any]:
    """Propose once with the draft, and form the same distributions from the export's files.

    CheckpointError where what the draft computes is not finite, ExportError where the files say otherwise than it.
    """
    context = _PROMPT if served.window is None else min(served.window, _MOST_CONTEXT) + _PROMPT
    with torch.no_grad():
        given, mine_KV, confidence_K = made_up_round(draft, context)
        _check_finite(mine_KV, confidence_K)
        weights = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        shared = (weights.get(SHARED[0], draft.embed_tokens.weight), weights.get(SHARED[1], draft.lm_head.weight))
        assert isinstance(shared[0], Tensor)
        theirs = replay(served, weights, shared[0], shared[1], given)
    likely_KV = mine_KV > math.log(_LIKELY)
    apart = float((mine_KV - theirs.log_probabilities_KV)[likely_KV].abs().max())
    outcome: dict[str, Any] = {"context": context, "proposals": len(given.proposed_K)}
    outcome["log_probabilities_differ_by"] = apart
    if confidence_K is not None and theirs.confidence_K is not None:
        outcome["confidence_differs_by"] = float((confidence_K - theirs.confidence_K).abs().max())
    compared = {name: value for name, value in outcome.items() if name.endswith("_by")}
    # Written so that NaN is refused.
    if not all(value <= _TOLERANCE for value in compared.values()):
        raise _refused(folder, [f"{name.replace('_', ' ')} {value:g}" for name, value in compared.items()])
    return outcome | {"tolerance": _TOLERANCE}


def _check_finite(log_probabilities_KV: Tensor, confidence_K: Tensor | None) -> None:
    # The logarithm of a token that is never drawn is negative infinity.
    if not log_probabilities_KV.isnan().any() and (confidence_K is None or confidence_K.isfinite().all()):
        return
    raise CheckpointError(
        "the draft's logits are not finite numbers",
        where="the draft",
        found="infinity or NaN, in fp32, for a made-up prompt and features",
        expected="weights whose products fp32 can represent",
        fix="Check where the weights come from: some of them are too large, or damaged.",
    )


def made_up_round(draft: DraftModel, context: int) -> tuple[Round, Tensor, Tensor | None]:
    """A round after `context` made-up tokens and features, and the draft's log-probabilities [K, V] and confidence [K].

    Tokens are drawn at temperature 1.
    """
    generator = torch.Generator().manual_seed(_SEED)
    taps, (vocab_size, hidden_size) = draft.describe().taps, draft.lm_head.weight.shape
    proposer = draft.proposer()
    proposer.open_slots(1, context + proposer.max_tokens + 1)
    ids = torch.randint(vocab_size, (context + 1,), generator=generator)
    features = {tap: torch.randn(context, hidden_size, generator=generator) for tap in taps}
    slot, features_1TC = torch.tensor([0]), torch.cat([features[tap] for tap in taps], -1)[None]
    proposer.start(slot, ids[None, :-1], torch.tensor([context]), ids[-1:], features_1TC)
    uniforms = torch.rand(1, proposer.max_tokens, generator=generator, dtype=torch.float64)
    proposal = proposer.propose(slot, torch.tensor([proposer.max_tokens]), Sampling(temperature=1.0), uniforms, ())
    length = int(proposal.lengths[0])
    assert proposal.probabilities is not None
    given = Round(prompt_T=ids[:-1], first=int(ids[-1]), features=features, proposed_K=proposal.tokens[0, :length])
    confidence_K = None if proposal.confidence is None else proposal.confidence[0, :length].float()
    return given, proposal.probabilities[0, :length].float().log(), confidence_K


def _refused(where: Path, wrong: list[str]) -> ExportError:
    more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    return ExportError(
        "what was written is not what the draft is",
        where=where.name,
        found="; ".join(wrong[:_SHOWN]) + more,
        expected="an export that an engine reads as the draft was trained",
        fix="This is a mistake of the exporter, not of the draft: please report it.",
    )
