"""LossSuite: the clauses that loss terms must meet, whatever they compute.

A term is called with statistics of made-up rows, in chunks as the engine cuts them. This file knows the contract of
statistics.

Legend: N rows, V the target's vocabulary, D the draft's (V if it is not reduced), H hidden size.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any, ClassVar

import torch
from attrs import evolve
from torch import Tensor

from deepspec_core.contracts.rows import Heads, Rows
from deepspec_core.rows.engine import RowEngine
from deepspec_core.rows.term_check import check_members
from deepspec_core.rows.weighting_options import DecayOptions
from deepspec_core.rows.weightings import Decay, Uniform
from deepspec_core.testing.conformance import Suite, clause, require
from deepspec_core.testing.declared_statistics import Declared, changed_in, copies_of, tensor_of
from deepspec_core.testing.global_draws import no_global_draws, no_global_modes
from deepspec_core.testing.made_rows import FIRST, KNOWN, MadeRows, N, V, made_rows

_TERM = "deepspec_core/contracts/loss.py: LossTerm"
_STATS = "deepspec_core/contracts/loss.py: RowStats"
_H = 8


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

    def values(self, term: Any, stats: Any) -> Tensor:
        """What the term returns, which has to be a tensor."""
        return tensor_of(term(stats), "the value")

    @clause("a term says what it reads: `needs_target`, `needs_extras`; and it can be called", written=_TERM)
    def test_it_says_what_it_needs(self) -> None:
        check_members(self.term(), self.component, "the plugin")

    @clause(
        "a term returns one float32 number a row, as statistics are, and no number that is not finite", written=_TERM
    )
    def test_one_number_a_row(self) -> None:
        term = self.term()
        with no_global_modes():
            value = self.values(term, self.made(term).stats())
        right = tuple(value.shape) == (N,) and value.dtype == torch.float32
        require(right, f"{list(value.shape)}, {value.dtype}, for {N} rows in float32: not its mean or sum")
        require(bool(value.isfinite().all()), f"{value.tolist()}")

    @clause("a row's value follows from that row alone, however rows are cut into chunks", written=_TERM)
    def test_chunks_do_not_matter(self) -> None:
        term = self.term()
        made = self.made(term)
        whole_N = self.values(term, made.stats()).detach()
        for size in (1, 4):
            parts = [self.values(term, made.stats(slice(at, at + size))).detach() for at in range(0, N, size)]
            self._near(torch.cat(parts), whole_N, f"in chunks of {size} rows")

    @clause("a term draws no random numbers and keeps nothing from one call to the next", written=_TERM)
    def test_the_same_rows_give_the_same(self) -> None:
        term = self.term()
        made = self.made(term)
        with no_global_draws():
            first_N = self.values(term, made.stats()).detach()
            self.values(term, self.made(term, seed=1).stats())
            self._near(self.values(term, made.stats()).detach(), first_N, "the same rows again")
        alive = self._called_once(term)
        gc.collect()
        require(alive() is None, "the graph of a call is still there after it, so that memory grows with every chunk")

    @clause("statistics are shared: a term does not write into them", written=_STATS)
    def test_statistics_stay(self) -> None:
        term = self.term()
        made, again = self.made(term), self.made(term)
        stats = made.stats()
        before = copies_of(stats)
        with torch.no_grad():
            # Without a graph, torch raises no error for writing in place.
            self.values(term, stats)
        changed = changed_in(stats, before)
        require(not changed, f"it changes {changed}")
        pairs = zip(made.tensors(), again.tensors(), strict=True)
        require(all(torch.equal(one, other) for one, other in pairs), "it changes the logits or extras of the rows")

    @clause("a term is differentiable in the draft's logits or in the extras that it reads", written=_TERM)
    def test_gradients_reach_the_draft(self) -> None:
        term = self.term()
        made = self.made(term)
        value_N = self.values(term, made.stats())
        require(value_N.requires_grad, "a value without gradient")
        value_N.sum().backward()  # type: ignore[no-untyped-call]
        inputs = [made.draft_ND, *(made.extras[name] for name in term.needs_extras)]
        found = [part.grad for part in inputs if part.grad is not None]
        require(any(bool(part.any()) for part in found), "gradients that are all 0")
        require(all(bool(part.isfinite().all()) for part in found), "gradients that are not finite")
        has_one_N = torch.stack([part.flatten(1).any(1) if part.dim() > 1 else part != 0 for part in found]).any(0)
        # A row whose value does not change, as at a bound, need not have a gradient.
        step_ND = 1e-3 * torch.randn(made.draft_ND.shape, generator=torch.Generator().manual_seed(1))
        moved = evolve(made, draft_ND=made.draft_ND.detach() + step_ND)
        moves_N = (self.values(term, moved.stats()) - value_N).detach().abs() > 1e-5 * (1 + value_N.detach().abs())
        without = (moves_N & ~has_one_N).nonzero()[:, 0].tolist()
        require(not without, f"no gradient for the rows {without}, whose values change with the draft's logits")

    @clause("values and gradients stay finite where distributions are sharp, or equal", written=_TERM)
    def test_sharp_and_equal_distributions(self) -> None:
        term = self.term()
        sharp = self.made(term, sharpness=200.0)
        made = self.made(term)
        equal = evolve(made, target_ND=made.draft_ND.detach().clone())
        for words, rows in (("sharp", sharp), ("equal", equal)):
            value_N = self.values(term, rows.stats())
            require(bool(value_N.isfinite().all()), f"{words} distributions give {value_N.tolist()}")
            if value_N.requires_grad:
                value_N.sum().backward()  # type: ignore[no-untyped-call]
                grad_ND = rows.draft_ND.grad
                fine = grad_ND is None or bool(grad_ND.isfinite().all())
                require(fine, f"{words} distributions give gradients that are not finite")

    @clause("a term reads of the target, of logits and of extras only what it says", written=_TERM)
    def test_it_reads_what_it_says(self) -> None:
        term = self.term()
        made = self.made(term)
        bare = evolve(made, extras={name: made.extras[name] for name in term.needs_extras})
        # Undeclared is reported with the attribute that is missing.
        self.values(term, Declared(bare.stats(target=bool(term.needs_target), logits=False), term))

    @clause(
        "a draft may know some of the target's tokens: then a column of logits is no id, and a label may be unknown",
        written=_STATS,
    )
    def test_a_reduced_vocabulary(self) -> None:
        term = self.term()
        # The same logits, but for tokens with other ids.
        first_N, known_N = (
            self.values(term, self.made(term, known=known).stats()).detach() for known in (FIRST, KNOWN)
        )
        self._near(known_N, first_N, f"a draft of the tokens {list(KNOWN)}, beside one of {list(FIRST)}")
        made = self.made(term, known=KNOWN, unknown_label=2, beyond=0.7)
        value_N = self.values(term, made.stats())
        right = tuple(value_N.shape) == (N,) and bool(value_N.isfinite().all())
        require(right, f"where the draft does not know every third label: {value_N.tolist()}")
        if value_N.requires_grad:
            value_N.sum().backward()  # type: ignore[no-untyped-call]
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
        self.values(term, made.stats())
        return weakref.ref(in_graph)

    def _near(self, found: Tensor, expected: Tensor, words: str) -> None:
        require(found.shape == expected.shape, f"{words}: {list(found.shape)}, not {list(expected.shape)}")
        gap = float((found - expected).abs().max()) if len(found) else 0.0
        limit = self.tolerance * max(1.0, float(expected.abs().max()) if len(expected) else 0.0)
        require(gap <= limit, f"{words}: other values, by up to {gap:.3g}")
