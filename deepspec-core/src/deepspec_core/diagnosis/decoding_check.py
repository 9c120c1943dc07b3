"""Checks whether the draft predicts the same in decoding as in training, at the same anchors of the same texts, with
the same features and weights.

The check takes rounds of the engine. For each round, the training pass computes the block at the round's anchor, and a
new proposer makes its proposal there. If the two differ, the check tries whether other positions, or another slot, make
them agree. This file knows drafts and proposers through their contracts. It does not know algorithms.

Legend: T tokens, K tokens of a proposal, V vocabulary.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from attrs import evolve, frozen
from torch import Tensor, nn

from deepspec_core.contracts.draft import DraftModel, Sample
from deepspec_core.contracts.proposer import Sampling, features_for
from deepspec_core.contracts.target import TargetFeatures, TargetModel
from deepspec_core.data.collate import pad_ids
from deepspec_core.decoding.engine import Completion
from deepspec_core.diagnosis.finding import ENGINE, Finding
from deepspec_core.diagnosis.outcomes import Outcomes, of_blocks
from deepspec_core.diagnosis.training_pass import Said, said_of

# The largest mean total variation distance between two distributions of one token that rounding explains, by the dtype
# of the weights. By rounding, an fp32 draft differs by some millionths, and a bf16 draft by some hundredths.
_APART = {torch.float32: 0.005}
_APART_ELSE = 0.05
# A change explains a difference if less than this share of it is left.
_LEFT = 0.25
_SHIFTS = (-2, -1, 1, 2)


@frozen(kw_only=True, eq=False)
class Probe:
    """One round. `trained` and `engine` are the numbers of leading matching tokens among the `length` proposed tokens.

    said: [K, V], the distributions of the training pass. proposed: The distributions of a new proposer, up to its first
        token that differs from the text; None if it gives no distributions.
    """

    group: int
    length: int
    trained: int
    engine: int
    said: Tensor
    proposed: Tensor | None
    ids: Tensor
    anchor: int
    features: TargetFeatures


def probes(
    draft: DraftModel, target: TargetModel, completions: Sequence[Completion], *, most: int, seed: int
) -> list[Probe]:
    """Probes of at most `most` rounds, evenly spread. Rounds at whose anchor training forms no block are left out."""
    places = [
        (group, anchor, r.proposal_length, r.accepted_draft_length)
        for group, done in enumerate(completions)
        for r, anchor in zip(done.rounds[:-1], _anchors(done), strict=False)
        if r.proposal_length and anchor + r.proposal_length < len(done.prompt_ids) + len(done.output_ids)
    ]
    chosen = sorted({round(index) for index in np.linspace(0, len(places) - 1, most)}) if places else []
    found, texts = [], {}
    for group, anchor, length, accepted in (places[index] for index in chosen):
        if group not in texts:
            texts = {group: _with_features(completions[group], draft, target)}
        one = _probe(draft, *texts[group], anchor, length, accepted, group, seed)
        if one is not None:
            found.append(one)
    return found


def _anchors(done: Completion) -> list[int]:
    """The position of the last committed token (the anchor) at the beginning of each round."""
    return list(accumulate((r.acceptance_length for r in done.rounds), initial=len(done.prompt_ids)))


def _with_features(done: Completion, draft: DraftModel, target: TargetModel) -> tuple[Tensor, TargetFeatures]:
    ids = torch.tensor([*done.prompt_ids, *done.output_ids])
    sample = Sample(id=done.id, input_ids=ids, loss_mask=ids > 0, original_length=len(ids))
    batch, mask = pad_ids([sample])
    taps = draft.proposer().taps
    with torch.no_grad():
        found = target.features(batch.to(target.device), mask.to(target.device), None, None, taps)
    return ids, TargetFeatures(hidden=found.hidden[0], last_hidden=found.last_hidden[0])


def _probe(
    draft: DraftModel,
    ids: Tensor,
    features: TargetFeatures,
    anchor: int,
    length: int,
    accepted: int,
    group: int,
    seed: int,
) -> Probe | None:
    end = anchor + length + 1
    mask = torch.zeros(end, dtype=torch.bool)
    mask[max(0, anchor - 1) : end] = True
    sample = Sample(
        id=f"round at {anchor}",
        input_ids=ids[:end],
        loss_mask=mask,
        original_length=end,
        features=TargetFeatures(hidden=features.hidden[:end].cpu(), last_hidden=features.last_hidden[:end].cpu()),
    )
    device = features.hidden.device
    (said,) = said_of(draft, [sample], device=device, seed=seed, keep_distributions=True)
    labels = ids[anchor + 1 : end]
    rows = _block_of(said, labels)
    if rows is None or said.distributions is None:
        return None
    one = Probe(
        group=group,
        length=length,
        trained=_leading(said.said[rows], labels),
        engine=accepted,
        said=said.distributions[rows],
        proposed=None,
        ids=ids[:end],
        anchor=anchor,
        features=TargetFeatures(hidden=features.hidden[:anchor], last_hidden=features.last_hidden[:anchor]),
    )
    return evolve(one, proposed=_proposed(draft, one))


def _block_of(said: Said, labels: Tensor) -> Tensor | None:
    """The rows of the block that has these labels. None if no block has them, or if several have."""
    found = []
    for block in sorted(set(said.block.tolist())):
        rows = (said.block == block).nonzero()[:, 0][: len(labels)]
        if torch.equal(said.labels[rows], labels):
            found.append(rows)
    return found[0] if len(found) == 1 else None


@torch.no_grad()
def _proposed(draft: DraftModel, one: Probe, shift: int = 0, rotary: type[nn.Module] | None = None) -> Tensor | None:
    """The distributions that a new proposer gives after the text up to and including the anchor, [K, V].

    With a `shift` the block stands this many positions later; the features of the prompt stay in place.
    """
    proposer, device = draft.proposer(), one.features.hidden.device
    slot, length = torch.zeros(1, dtype=torch.long, device=device), torch.tensor([one.anchor], device=device)
    ids = one.ids.to(device)
    features = TargetFeatures(hidden=one.features.hidden[None], last_hidden=one.features.last_hidden[None])
    proposer.open_slots(1, len(ids) + proposer.max_tokens + 1)
    proposer.start(slot, ids[None, : one.anchor], length, ids[one.anchor][None], features_for(proposer, features))
    uniforms = torch.full((1, proposer.max_tokens), 0.5, dtype=torch.float64, device=device)
    with _blocks_moved(draft, shift, rotary):
        proposal = proposer.propose(
            slot, torch.full_like(slot, proposer.max_tokens), Sampling(temperature=1.0), uniforms, ()
        )
    if proposal.probabilities is None:
        return None
    labels = ids[one.anchor + 1 :]
    # After a proposed token that differs from the text, the distributions cannot be compared.
    same = _leading(proposal.tokens[0, : len(labels)], labels) + 1
    found: Tensor = proposal.probabilities[0, : min(same, len(labels))].float().cpu()
    # Values that are not finite are found by another stage, that of the number format.
    return found if bool(found.isfinite().all()) else None


def engine_outcomes(found: Sequence[Probe]) -> tuple[Outcomes, Outcomes]:
    """The outcomes of the same rounds in the training pass and in the engine. An answer is a group."""
    groups = [one.group for one in found]
    positions = np.arange(max((one.length for one in found), default=0))
    counted = positions < np.array([one.length for one in found])[:, None]

    def of(leading: Callable[[Probe], int]) -> Outcomes:
        return of_blocks(groups, positions < np.array([leading(one) for one in found])[:, None], counted)

    return of(lambda one: one.trained), of(lambda one: one.engine)


def decoding_finding(
    draft: DraftModel, found: Sequence[Probe], rotary: type[nn.Module]
) -> tuple[Finding | None, Mapping[str, Any]]:
    """The difference between the training pass and decoding, if there is one, and the facts that were measured.

    `rotary` is the class of rotary modules.
    """
    measured = [one for one in found if one.proposed is not None]
    facts: dict[str, Any] = {"rounds": len(found), "rounds_the_engine_accepts_less": sum(_less(one) for one in found)}
    if measured:
        facts["apart"] = apart = _apart([_given(one.proposed) for one in measured], measured)
        if apart > _APART.get(next(draft.parameters()).dtype, _APART_ELSE):
            facts |= {"positions_moved": _by_positions(draft, measured, rotary), "slots_moved": _by_slots(measured)}
            return _proposer_finding(facts), facts
    less = facts["rounds_the_engine_accepts_less"]
    if less > max(1, 0.1 * len(found)):
        return (
            Finding(
                name="state between rounds",
                says=f"A new proposer says what the training pass says, and in {less} of {len(found)} rounds the "
                "engine accepted fewer tokens than both: what the proposer keeps between rounds differs.",
                fix="Look at the proposer's `accept`: its cache, its positions, and the features it takes up.",
                explains=(ENGINE,),
            ),
            facts,
        )
    return None, facts


def _proposer_finding(facts: Mapping[str, Any]) -> Finding:
    apart = facts["apart"]
    moves, slots = facts["positions_moved"], facts["slots_moved"]
    seen = (
        f"With the same text, features and weights, a token's distribution in decoding is {apart:.3f} away (total "
        "variation, the mean) from the training pass's. "
    )
    move, slot = min(moves, key=moves.__getitem__, default=None), min(slots, key=slots.__getitem__, default=None)
    by_move = moves[move] if move is not None else 1.0
    by_slot = slots[slot] if slot is not None else 1.0
    if by_move <= min(by_slot, _LEFT * apart):
        return Finding(
            name="positions",
            says=f"{seen}With the block's rotary positions moved by {int(move or 0):+d} it is {by_move:.3f}: decoding "
            f"places the block {abs(int(move or 0))} too {'low' if int(move or 0) > 0 else 'high'}.",
            fix="Number positions in the proposer as in the training pass.",
            explains=(ENGINE,),
        )
    if by_slot <= _LEFT * apart:
        return Finding(
            name="anchor slot",
            says=f"{seen}Compared with the training pass's slot {int(slot or 0):+d} it is {by_slot:.3f}: decoding "
            "reads another slot than training supervised.",
            fix="Read the same slots in the proposer as in the training pass: whether the anchor's own slot predicts.",
            explains=(ENGINE,),
        )
    return Finding(
        name="proposer",
        says=f"{seen}Neither other positions nor another slot make them agree.",
        fix="Compare the proposer with the draft's forward: masks, caches, heads, and what the anchor is.",
        explains=(ENGINE,),
    )


def _by_positions(draft: DraftModel, found: Sequence[Probe], rotary: type[nn.Module]) -> dict[str, float]:
    """How far the distributions differ if the block stands a number of positions later."""
    apart = {}
    for shift in _SHIFTS:
        moved = [_proposed(draft, one, shift, rotary) for one in found]
        if all(rows is not None for rows in moved):
            apart[f"{shift:+d}"] = _apart([_given(rows) for rows in moved], found)
    return apart


def _by_slots(found: Sequence[Probe]) -> dict[str, float]:
    """How far the proposer's distributions differ from those of the training pass one slot later, and one earlier."""
    rows = [(_given(one.proposed), one.said) for one in found]
    later = [(proposed[: len(said) - 1], said[1:]) for proposed, said in rows if len(said) > 1]
    earlier = [(proposed[1:], said) for proposed, said in rows if len(proposed) > 1]
    return {
        name: statistics.fmean(_variation(proposed, said) for proposed, said in pairs)
        for name, pairs in (("+1", later), ("-1", earlier))
        if pairs
    }


def _apart(proposed: Sequence[Tensor], found: Sequence[Probe]) -> float:
    return statistics.fmean(_variation(rows, one.said) for rows, one in zip(proposed, found, strict=True))


@contextmanager
def _blocks_moved(draft: DraftModel, shift: int, rotary: type[nn.Module] | None) -> Iterator[None]:
    """Within this context, rotary modules of this class rotate as if every position were `shift` later."""

    def later(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0], (args[1] + shift).clamp(min=0), *args[2:])

    handles = [part.register_forward_pre_hook(later) for part in draft.modules() if shift and type(part) is rotary]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _leading(said_K: Tensor, labels_K: Tensor) -> int:
    return int((said_K == labels_K[: len(said_K)]).long().cumprod(0).sum())


def _less(one: Probe) -> bool:
    return one.engine < one.trained


def _variation(proposed_KV: Tensor, said_KV: Tensor) -> float:
    """The mean total variation distance of the rows that both have."""
    size = min(len(proposed_KV), len(said_KV))
    return float((proposed_KV[:size] - said_KV[:size]).abs().sum(-1).mean() / 2)


def _given(value: Any) -> Any:
    assert value is not None
    return value
