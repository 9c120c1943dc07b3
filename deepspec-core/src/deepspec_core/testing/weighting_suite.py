"""WeightingSuite: the clauses that weightings of rows must meet, whatever they compute.

A weighting is called with statistics of made-up rows, in whole blocks. This file knows the contract of statistics.

Legend: N rows.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any, ClassVar
from unittest import SkipTest

import torch
from attrs import evolve
from torch import Tensor

from deepspec_core.testing.conformance import Suite, clause, require
from deepspec_core.testing.declared_statistics import Declared, changed_in, copies_of, tensor_of
from deepspec_core.testing.global_draws import no_global_draws, no_global_modes
from deepspec_core.testing.made_rows import FIRST, KNOWN, SLOTS, MadeRows, N, made_rows

_WEIGHTING = "deepspec_core/contracts/loss.py: Weighting"
_STATS = "deepspec_core/contracts/loss.py: RowStats"


class _Read(Exception):
    """Raised when a statistic is read."""


class _Unread:
    """Statistics of which none may be read."""

    def __getattr__(self, name: str) -> Any:
        raise _Read


class WeightingSuite(Suite):
    """Clauses of `contracts.loss.Weighting`."""

    kind = "weighting"
    tolerance: ClassVar[float] = 1e-6

    def weighting(self) -> Any:
        """A new instance of the weighting."""
        return self.registry().build("weighting", self.component, *self.made_options())

    def weights(self, weighting: Any, made: MadeRows, part: slice = slice(None), stats: Any = None) -> Tensor:
        """The weights of rows, computed as the engine calls the weighting. They have to be a tensor."""
        with torch.no_grad():
            given = made.stats(part) if stats is None else stats
            return tensor_of(weighting(made.slot_N[part], made.block_N[part], given), "what it returns")

    @clause("a weighting returns one weight a row: a float32 tensor [N], as statistics are", written=_WEIGHTING)
    def test_one_weight_a_row(self) -> None:
        weighting, made = self.weighting(), made_rows(())
        with no_global_modes():
            value = tensor_of(weighting(made.slot_N, made.block_N, made.stats()), "what it returns")
        right = tuple(value.shape) == (N,) and value.dtype == torch.float32
        require(right, f"{list(value.shape)}, {value.dtype}, for {N} rows in float32")

    @clause("weights are finite, none is negative, and not all are 0", written=_WEIGHTING)
    def test_weights_are_weights(self) -> None:
        weighting = self.weighting()
        for sharpness in (1.0, 30.0, 0.0):
            value_N = self.weights(weighting, made_rows((), sharpness=sharpness))
            words = f"logits of size {sharpness:g} give"
            require(bool(value_N.isfinite().all()), f"{words} {value_N.tolist()}")
            require(bool((value_N >= 0).all()), f"{words} a negative weight: {value_N.min().item():g}")
            require(bool(value_N.any()), f"{words} 0 for every row")

    @clause("the weights of a block follow from that block alone", written=_WEIGHTING)
    def test_blocks_do_not_see_each_other(self) -> None:
        weighting, made, start = self.weighting(), made_rows(()), 0
        whole_N = self.weights(weighting, made)
        for number, size in enumerate(map(len, SLOTS)):
            part = slice(start, start + size)
            alone = self.weights(weighting, made, part)
            gap = float((alone - whole_N[part]).abs().max())
            require(gap <= self.tolerance, f"block {number} of {size} rows, alone: other weights, by up to {gap:.3g}")
            start += size

    @clause("the numbers of blocks only tell them apart", written=_WEIGHTING)
    def test_numbers_of_blocks_do_not_count(self) -> None:
        weighting, made = self.weighting(), made_rows(())
        expected_N = self.weights(weighting, made)
        found_N = self.weights(weighting, evolve(made, block_N=made.block_N * 7 + 3))
        gap = float((found_N - expected_N).abs().max())
        require(gap <= self.tolerance, f"blocks with other numbers weigh otherwise, by up to {gap:.3g}")

    @clause(
        "a weighting that reads no statistics weighs a row by the number of its slot, not by its place in the block",
        written=_WEIGHTING,
    )
    def test_slots_are_no_places(self) -> None:
        weighting, block_N = self.weighting(), torch.zeros(4, dtype=torch.long)
        found = []
        for slots in ([0, 1, 2, 3], [1, 2, 4, 6]):
            try:
                found.append(tensor_of(weighting(torch.tensor(slots), block_N, _Unread()), "what it returns"))
            except _Read:
                raise SkipTest("it reads statistics, in which rows differ too") from None
        whole_N, gaps_N = found
        places = not torch.equal(whole_N, whole_N[:1].expand(4)) and torch.equal(whole_N, gaps_N)
        require(not places, f"{whole_N.tolist()} for the slots 0, 1, 2, 3, and the same for 1, 2, 4, 6")

    @clause("a weighting draws no random numbers and keeps nothing from one call to the next", written=_WEIGHTING)
    def test_the_same_rows_weigh_the_same(self) -> None:
        weighting, made = self.weighting(), made_rows(())
        with no_global_draws():
            first_N = self.weights(weighting, made).clone()
            self.weights(weighting, made_rows((), seed=1))
            gap = float((self.weights(weighting, made) - first_N).abs().max())
            require(gap <= self.tolerance, f"the same rows again: other weights, by up to {gap:.3g}")
        stats = made.stats()
        weighting(made.slot_N, made.block_N, stats)
        alive = weakref.ref(stats)
        del stats
        gc.collect()
        require(alive() is None, "the statistics of a call are still there after it, so that memory grows")

    @clause("slots, blocks and statistics are not written into, and weights carry no gradient", written=_WEIGHTING)
    def test_what_it_reads_stays(self) -> None:
        weighting, made, again = self.weighting(), made_rows(()), made_rows(())
        stats = made.stats()
        before = copies_of(stats)
        value_N = self.weights(weighting, made, stats=stats)
        require(not value_N.requires_grad, "weights with a gradient, through statistics that are not read")
        changed = changed_in(stats, before)
        require(not changed, f"it changes the statistics {changed}")
        pairs = zip(made.tensors(), again.tensors(), strict=True)
        require(all(torch.equal(one, other) for one, other in pairs), "it changes the logits, labels or extras of rows")
        same = torch.equal(made.slot_N, again.slot_N) and torch.equal(made.block_N, again.block_N)
        require(same, "it changes slots or blocks")

    @clause("a weighting reads no extras, and of target, logits and correction what it says", written=_WEIGHTING)
    def test_it_reads_what_it_says(self) -> None:
        weighting, bare = self.weighting(), evolve(made_rows(()), extras={})
        # Undeclared is reported with the attribute that is missing.
        stats = bare.stats(target=bool(getattr(weighting, "needs_target", False)), logits=False)
        self.weights(weighting, bare, stats=Declared(stats, weighting))

    @clause(
        "a draft may know some of the target's tokens: then a column of logits is no id, and a label may be unknown",
        written=_STATS,
    )
    def test_a_reduced_vocabulary(self) -> None:
        weighting = self.weighting()
        # The same logits, but for tokens with other ids.
        first_N, known_N = (self.weights(weighting, made_rows((), known=known)) for known in (FIRST, KNOWN))
        gap = float((known_N - first_N).abs().max())
        words = f"a draft of the tokens {list(KNOWN)} weighs its rows otherwise than one of {list(FIRST)}"
        require(gap <= self.tolerance, f"{words}, by up to {gap:.3g}")
        value_N = self.weights(weighting, made_rows((), known=KNOWN, unknown_label=2, beyond=0.7))
        right = tuple(value_N.shape) == (N,) and bool(value_N.isfinite().all()) and bool((value_N >= 0).all())
        require(right, f"where the draft does not know every third label: {value_N.tolist()}")

    @clause("a chunk without rows has no weights", written=_WEIGHTING)
    def test_no_rows(self) -> None:
        value = self.weights(self.weighting(), made_rows(()), slice(0, 0))
        require(tuple(value.shape) == (0,), f"{list(value.shape)} for no row")
