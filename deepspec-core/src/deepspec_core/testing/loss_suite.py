"""LossSuite and WeightingSuite: the clauses that loss terms and weightings must meet, whatever they compute.

Both are called with statistics of made-up rows, in chunks as the engine cuts them. This file knows the contract of
statistics.

Legend: N rows, V the target's vocabulary, D the draft's (V if it is not reduced), H hidden size.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any, ClassVar
from unittest import SkipTest

import torch
from attrs import evolve
from torch import Tensor

from deepspec_core.contracts.loss import RowStats
from deepspec_core.contracts.rows import Heads, Rows
from deepspec_core.rows.engine import RowEngine
from deepspec_core.rows.statistics import ChunkStats
from deepspec_core.rows.term_check import check_members
from deepspec_core.rows.weighting_options import DecayOptions
from deepspec_core.rows.weightings import Decay, Uniform
from deepspec_core.testing.conformance import Suite, clause, require
from deepspec_core.testing.global_draws import no_global_draws
from deepspec_core.testing.made_rows import SLOTS, MadeRows, N, V, made_rows

_TERM = "deepspec_core/contracts/loss.py: LossTerm"
_WEIGHTING = "deepspec_core/contracts/loss.py: Weighting"
_STATS = "deepspec_core/contracts/loss.py: RowStats"
_H = 8
# The tokens that a draft with a reduced vocabulary knows, and the same number of tokens counted from 0.
_KNOWN = (1, 4, 5, 8, 9, 11)
_FIRST = tuple(range(len(_KNOWN)))


class LossSuite(Suite):
    """Clauses of `contracts.loss.LossTerm`."""

    kind = "loss"
    tolerance: ClassVar[float] = 1e-5

    def term(self) -> Any:
        """A new instance of the term."""
        return self.registry().build("loss", self.component, *self.made_options())

    def made(self, term: Any, **changes: Any) -> MadeRows:
        """Made-up rows with the extras that the term reads."""
        return made_rows(tuple(getattr(term, "needs_extras", ())), **changes)

    @clause("a term says what it reads: `needs_target`, `needs_extras`; and it can be called", written=_TERM)
    def test_it_says_what_it_needs(self) -> None:
        check_members(self.term(), self.component, "the plugin")

    @clause(
        "a term returns one float32 number a row, as statistics are, and no number that is not finite", written=_TERM
    )
    def test_one_number_a_row(self) -> None:
        term = self.term()
        value = term(self.made(term).stats())
        require(isinstance(value, Tensor), f"{type(value).__name__}")
        right = tuple(value.shape) == (N,) and value.dtype == torch.float32
        require(right, f"{list(value.shape)}, {value.dtype}, for {N} rows in float32: not its mean or sum")
        require(bool(value.isfinite().all()), f"{value.tolist()}")

    @clause("a row's value follows from that row alone, however rows are cut into chunks", written=_TERM)
    def test_chunks_do_not_matter(self) -> None:
        term = self.term()
        made = self.made(term)
        whole_N = term(made.stats()).detach()
        for size in (1, 4):
            parts = [term(made.stats(slice(at, at + size))).detach() for at in range(0, N, size)]
            self._near(torch.cat(parts), whole_N, f"in chunks of {size} rows")

    @clause("a term draws no random numbers and keeps nothing from one call to the next", written=_TERM)
    def test_the_same_rows_give_the_same(self) -> None:
        term = self.term()
        made = self.made(term)
        with no_global_draws():
            first_N = term(made.stats()).detach()
            term(self.made(term, seed=1).stats())
            self._near(term(made.stats()).detach(), first_N, "the same rows again")
        alive = self._called_once(term)
        gc.collect()
        require(alive() is None, "the graph of a call is still there after it, so that memory grows with every chunk")

    @clause("statistics are shared: a term does not write into them", written=_STATS)
    def test_statistics_stay(self) -> None:
        term = self.term()
        made, again = self.made(term), self.made(term)
        stats = made.stats()
        read = ["ce", "tv", "overlap", "soft_ce", "kl", "acceptance"]
        before = {name: getattr(stats, name).detach().clone() for name in read}
        with torch.no_grad():
            # Without a graph, torch raises no error for writing in place.
            term(stats)
        changed = [name for name, value in before.items() if not torch.equal(getattr(stats, name), value)]
        require(not changed, f"it changes {changed}")
        pairs = zip(made.tensors(), again.tensors(), strict=True)
        require(all(torch.equal(one, other) for one, other in pairs), "it changes the logits or extras of the rows")

    @clause("a term is differentiable in the draft's logits or in the extras that it reads", written=_TERM)
    def test_gradients_reach_the_draft(self) -> None:
        term = self.term()
        made = self.made(term)
        value_N = term(made.stats())
        require(value_N.requires_grad, "a value without gradient")
        value_N.sum().backward()
        inputs = [made.draft_ND, *(made.extras[name] for name in term.needs_extras)]
        found = [part.grad for part in inputs if part.grad is not None]
        require(any(bool(part.any()) for part in found), "gradients that are all 0")
        require(all(bool(part.isfinite().all()) for part in found), "gradients that are not finite")
        has_one_N = torch.stack([part.flatten(1).any(1) if part.dim() > 1 else part != 0 for part in found]).any(0)
        # A row whose value does not change, as at a bound, need not have a gradient.
        step_ND = 1e-3 * torch.randn(made.draft_ND.shape, generator=torch.Generator().manual_seed(1))
        moved = evolve(made, draft_ND=made.draft_ND.detach() + step_ND)
        moves_N = (term(moved.stats()) - value_N).detach().abs() > 1e-5 * (1 + value_N.detach().abs())
        without = (moves_N & ~has_one_N).nonzero()[:, 0].tolist()
        require(not without, f"no gradient for the rows {without}, whose values change with the draft's logits")

    @clause("values and gradients stay finite where distributions are sharp, or equal", written=_TERM)
    def test_sharp_and_equal_distributions(self) -> None:
        term = self.term()
        sharp = self.made(term, sharpness=200.0)
        made = self.made(term)
        equal = evolve(made, target_ND=made.draft_ND.detach().clone())
        for words, rows in (("sharp", sharp), ("equal", equal)):
            value_N = term(rows.stats())
            require(bool(value_N.isfinite().all()), f"{words} distributions give {value_N.tolist()}")
            if value_N.requires_grad:
                value_N.sum().backward()
                grad_ND = rows.draft_ND.grad
                fine = grad_ND is None or bool(grad_ND.isfinite().all())
                require(fine, f"{words} distributions give gradients that are not finite")

    @clause("a term reads of the target, of logits and of extras only what it says", written=_TERM)
    def test_it_reads_what_it_says(self) -> None:
        term = self.term()
        made = self.made(term)
        bare = evolve(made, extras={name: made.extras[name] for name in term.needs_extras})
        # Undeclared is reported with the attribute that is missing.
        term(_Declared(bare.stats(target=bool(term.needs_target), logits=False), term))

    @clause(
        "a draft may know some of the target's tokens: then a column of logits is no id, and a label may be unknown",
        written=_STATS,
    )
    def test_a_reduced_vocabulary(self) -> None:
        term = self.term()
        # The same logits, but for tokens with other ids.
        first_N, known_N = (term(self.made(term, known=known).stats()).detach() for known in (_FIRST, _KNOWN))
        self._near(known_N, first_N, f"a draft of the tokens {list(_KNOWN)}, beside one of {list(_FIRST)}")
        made = self.made(term, known=_KNOWN, unknown_label=2, beyond=0.7)
        value_N = term(made.stats())
        right = tuple(value_N.shape) == (N,) and bool(value_N.isfinite().all())
        require(right, f"where the draft does not know every third label: {value_N.tolist()}")
        if value_N.requires_grad:
            value_N.sum().backward()
        fine = made.draft_ND.grad is None or bool(made.draft_ND.grad.isfinite().all())
        require(fine, "gradients that are not finite, where the draft does not know every third label")

    @clause("the engine's sum does not depend on its chunks, and rows count by their weights", written=_TERM)
    def test_in_the_engine(self) -> None:
        term = self.term()
        made, generator = self.made(term), torch.Generator().manual_seed(2)
        head_VH = torch.randn(V, _H, generator=generator)
        rows = Rows(
            hidden=torch.randn(N, _H, generator=generator).requires_grad_(),
            target_hidden=torch.randn(N, _H, generator=generator),
            target_index=torch.arange(N),
            target_ids=made.ids_N,
            weight=torch.ones(N),
            slot=made.slot_N,
            block=made.block_N,
            extras={name: made.extras[name] for name in term.needs_extras},
        )
        heads = Heads(draft=head_VH, target=head_VH)
        found = []
        for chunk_rows in (None, 4):
            engine = RowEngine(
                {self.component: (term, 1.0)}, Decay(DecayOptions(gamma=3.0)), chunk_rows, kernels="plain"
            )
            total = engine(rows, heads).total
            (gradient,) = torch.autograd.grad(total, rows.hidden, allow_unused=True)
            found.append((total.detach().reshape(1), gradient))
        self._near(found[1][0], found[0][0], "the sum, in chunks of 4 rows")
        if found[0][1] is not None:
            self._near(found[1][1], found[0][1], "gradients, in chunks of 4 rows")
        half = RowEngine({self.component: (term, 1.0)}, Uniform(), kernels="plain")
        gone = torch.arange(N) % 2 == 0
        odd = evolve(rows, weight=torch.where(gone, 0.0, 1.0))
        even = evolve(rows, weight=torch.where(gone, 1.0, 0.0))
        parts = torch.stack([half(part, heads).total.detach() for part in (odd, even)]).sum().reshape(1)
        self._near(parts, half(rows, heads).total.detach().reshape(1), "the sum of every second row and of the others")

    def _called_once(self, term: Any) -> weakref.ref[Any]:
        """Call the term, drop its value, and return an object that lives as long as the call's graph."""
        made = self.made(term)

        def in_graph(gradient: Tensor) -> None: ...

        for part in (made.draft_ND, *made.extras.values()):
            if part.requires_grad:
                part.register_hook(in_graph)  # type: ignore[no-untyped-call]
        term(made.stats())
        return weakref.ref(in_graph)

    def _near(self, found: Tensor, expected: Tensor, words: str) -> None:
        require(found.shape == expected.shape, f"{words}: {list(found.shape)}, not {list(expected.shape)}")
        gap = float((found - expected).abs().max()) if len(found) else 0.0
        limit = self.tolerance * max(1.0, float(expected.abs().max()) if len(expected) else 0.0)
        require(gap <= limit, f"{words}: other values, by up to {gap:.3g}")


class _Declared:
    """Statistics that refuse logits to a term that does not say `needs_logits`."""

    def __init__(self, stats: ChunkStats, term: Any) -> None:
        self._stats, self._term = stats, term

    def __getattr__(self, name: str) -> Any:
        if name in ("draft_logits", "target_logits"):
            require(getattr(self._term, "needs_logits", False), f"it reads `{name}` without needs_logits = True")
        if name == "ce_without_correction" and getattr(self._term, "needs_uncorrected", False):
            return self._stats.ce
        return getattr(self._stats, name)


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

    def weights(self, weighting: Any, made: MadeRows, part: slice = slice(None)) -> Any:
        """The weights of rows, computed as the engine calls the weighting."""
        stats: RowStats = made.stats(part)
        with torch.no_grad():
            return weighting(made.slot_N[part], made.block_N[part], stats)

    @clause("a weighting returns one weight a row: a float32 tensor [N], as statistics are", written=_WEIGHTING)
    def test_one_weight_a_row(self) -> None:
        value = self.weights(self.weighting(), made_rows(()))
        require(isinstance(value, Tensor), type(value).__name__)
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
                found.append(weighting(torch.tensor(slots), block_N, _Unread()))
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
        ce_N = stats.ce.detach().clone()
        with torch.no_grad():
            value_N = weighting(made.slot_N, made.block_N, stats)
        require(not value_N.requires_grad, "weights with a gradient, through statistics that are not read")
        require(torch.equal(stats.ce, ce_N), "it changes the statistics")
        same = torch.equal(made.slot_N, again.slot_N) and torch.equal(made.block_N, again.block_N)
        require(same, "it changes slots or blocks")

    @clause("a chunk without rows has no weights", written=_WEIGHTING)
    def test_no_rows(self) -> None:
        value = self.weights(self.weighting(), made_rows(()), slice(0, 0))
        require(tuple(value.shape) == (0,), f"{list(value.shape)} for no row")
