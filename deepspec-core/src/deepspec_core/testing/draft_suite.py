"""DraftModelSuite: the clauses that every trained draft must meet, in training, in its checkpoint and while decoding.

Clauses of its proposer are in proposer_suite.py, those of its checkpoint in draft_weights_suite.py, and those that
compare what it proposes with training in draft_decoding_suite.py.

This file knows the contracts of drafts, rows and proposers. The subclass decides which algorithm is tested. A row's
place in the text is found by the target's last hidden state, which differs at every position of a random sample.

Legend: N rows, K proposed tokens at most, H hidden size, V the target's vocabulary, D the draft's.
"""

from __future__ import annotations

import json
import pickle
from typing import Any, ClassVar
from unittest import SkipTest

import numpy as np
import torch
from attrs import evolve

from deepspec_core.checkpoints.published import published_name
from deepspec_core.contracts.draft import (
    DraftBatch,
    DraftDescription,
    DraftModel,
    Preparation,
    PreparedSample,
    Sample,
)
from deepspec_core.contracts.rows import Rows
from deepspec_core.rows.rows_check import check_numbers, check_shapes
from deepspec_core.rows.weighted import weighted
from deepspec_core.testing.conformance import clause, require
from deepspec_core.testing.draft_checks import check_near, gradients_of, trained
from deepspec_core.testing.draft_decoding_suite import DraftDecodingSuite
from deepspec_core.testing.global_draws import no_global_draws
from deepspec_core.testing.packed_rows import packed_as_alone
from deepspec_core.testing.placed_rows import loss_of, placed, same_rows, without_blocks
from deepspec_core.testing.random_batches import TAPS, padded_batch, ragged_samples, random_sample, with_large_weights
from deepspec_core.testing.rollouts import check_rollout
from deepspec_core.testing.tiny_family import tiny_adapter

_DRAFT = "deepspec_core/contracts/draft.py: DraftModel"
_BATCH = "deepspec_core/contracts/draft.py: DraftBatch"
_PREPARATION = "deepspec_core/contracts/draft.py: Preparation"
_DESCRIPTION = "deepspec_core/contracts/draft.py: DraftDescription"
_ROWS = "deepspec_core/contracts/rows.py: Rows"
_HEADS = "deepspec_core/contracts/rows.py: Heads"
_ALGORITHM = "docs/plugins.md#an-algorithm"
_PACKED = "docs/plugins.md#packed-rows"


class DraftModelSuite(DraftDecodingSuite):
    """Clauses of `contracts.draft.DraftModel`, of its rows and of its proposer.

    options: Options of a small draft: a block of about four tokens, few layers.
    taps: The tapped layers; None: five, or none if the draft needs none.
    near: The largest difference of hidden states in a batch of another shape, relative to the largest entry.
    """

    taps: ClassVar[tuple[int, ...] | None] = None
    near: ClassVar[float] = 2e-6

    def adapter(self) -> Any:
        """The contracts.target.TargetAdapter from which the draft is built: H 32, V 64, with a soft cap."""
        return tiny_adapter(softcap=4.0)

    def chosen_taps(self) -> tuple[int, ...]:
        """The taps, as the constructor gets them."""
        needed = self.registry().get("draft", self.component).needs_taps
        return (TAPS if needed else ()) if self.taps is None else self.taps

    def new_draft(self) -> DraftModel:
        """A draft as a run makes it, with the embedding and lm_head of a target."""
        torch.manual_seed(0)
        adapter = self.adapter()
        draft: DraftModel = self.registry().load("draft", self.component)(
            *(self.made_options() or (None,)), adapter, self.chosen_taps()
        )
        size, vocabulary = adapter.architecture.hidden_size, adapter.architecture.vocab_size
        draft.adopt(torch.randn(vocabulary, size), torch.randn(vocabulary, size) * size**-0.5)
        draft.register_forward_hook(_form_first)
        return draft

    def draft(self) -> DraftModel:
        """A draft with large random weights, so that different inputs give clearly different outputs."""
        return with_large_weights(self.new_draft()).eval()

    def source(self) -> DraftModel:
        """The draft."""
        return self.draft()

    def samples(self) -> list[Sample]:
        """Four samples: a long one, one supervised with gaps, one with few supervised tokens, one with none."""
        taps = len(self.chosen_taps())
        return [
            random_sample(one.id, len(one.input_ids), one.loss_mask.tolist(), seed=seed, num_taps=taps)
            for seed, one in enumerate(ragged_samples())
        ]

    def prepared(self, draft: DraftModel, samples: list[Sample] | None = None, seed: int = 0) -> list[PreparedSample]:
        """The samples as the draft prepares them, each with a generator of its own."""
        given = self.samples() if samples is None else samples
        return [draft.preparation.prepare(one, np.random.default_rng([seed, index])) for index, one in enumerate(given)]

    @clause(
        "`describe` states facts: names, taps as given, whole numbers, published names of their own",
        written=_DESCRIPTION,
    )
    def test_it_describes_itself(self) -> None:
        draft, spec = self.draft(), self.registry().get("draft", self.component)
        said = draft.describe()
        require(isinstance(said, DraftDescription), type(said).__name__)
        require(said.algorithm == spec.name, f"algorithm = {said.algorithm!r}, and the spec's name is {spec.name!r}")
        require(
            str(said.class_name).endswith(spec.class_suffix),
            f"class_name = {said.class_name!r}, which does not end with {spec.class_suffix!r}",
        )
        require(tuple(said.taps) == self.chosen_taps(), f"taps = {said.taps}, built with {self.chosen_taps()}")
        for name in ("max_tokens", "num_layers"):
            number = getattr(said, name)
            require(type(number) is int and number > 0, f"{name} = {number!r}")
        published = [published_name(name, said.weight_names) for name in draft.state_dict()]
        shared = sorted({name for name in published if published.count(name) > 1})
        require(not shared, f"weights that share a published name: {shared}")
        json.dumps(dict(said.config))
        proposer = draft.proposer()
        require(
            proposer.max_tokens == said.max_tokens, f"max_tokens {said.max_tokens}, its proposer {proposer.max_tokens}"
        )
        own = tuple(proposer.taps)
        require(own in ((), tuple(said.taps)), f"the proposer's taps {own}, the draft's {said.taps}")

    @clause("embedding and lm_head are the target's, frozen; something else is trained", written=_DRAFT)
    def test_the_targets_weights_stay(self) -> None:
        draft = self.new_draft()
        frozen = [*draft.embed_tokens.parameters(), *draft.lm_head.parameters()]
        require(not any(part.requires_grad for part in frozen), "embedding or lm_head is trained")
        require(trained(draft), "no parameter that is trained")
        embedding_VH = torch.ones_like(torch.as_tensor(draft.embed_tokens.weight))
        draft.adopt(embedding_VH, 2 * embedding_VH)
        require(bool((torch.as_tensor(draft.embed_tokens.weight) == 1).all()), "`adopt` copies no embedding")
        heads = draft.heads()
        require(bool((draft.lm_head.weight == 2).all()), "`adopt` copies no lm_head")
        require(bool((heads.target == 2).all()), "heads().target is not the target's lm_head")
        require(
            len(heads.target) == len(embedding_VH),
            f"heads().target has {len(heads.target)} of {len(embedding_VH)} tokens",
        )
        cap, found = self.adapter().architecture.logit_softcap, (heads.softcap, heads.target_softcap)
        require(found == (cap, cap), f"heads() has softcap, target_softcap = {found}, the target's is {cap}")

    @clause("rows have the shapes, kinds and order of the contract; blocks are together and in order", written=_ROWS)
    def test_rows_keep_their_form(self) -> None:
        draft = self.draft()
        rows = draft(self.batch(draft))
        check_shapes(rows, draft.heads())
        check_numbers(weighted(rows), draft.heads())
        require(len(rows.hidden) > 4, f"{len(rows.hidden)} rows of four texts")

    @clause(
        "a row's label is the token after the target position that it is compared with, and supervised", written=_ROWS
    )
    def test_labels_are_the_tokens_that_the_target_judges(self) -> None:
        draft, samples = self.draft(), self.samples()
        rows = draft(self.batch(draft, samples))
        for row, (sample, at) in enumerate(placed(rows, samples)):
            if rows.weight[row] == 0:
                continue
            where = f"row {row}, compared with the target at position {at} of text {sample!r}"
            text = samples[sample]
            if rows.target_ids is not None:
                require(at + 1 < len(text.input_ids), f"{where}, the last: no token follows")
                label, right = int(rows.target_ids[row]), int(text.input_ids[at + 1])
                require(label == right, f"{where}: label {label}, and the token after it is {right}")
                require(text.loss_mask[at + 1], f"{where}: its label is not supervised")
            else:
                near = text.loss_mask[max(at - 1, 0) : at + 2]
                require(near.any(), f"{where}, where nothing is supervised")

    @clause("slot k of a block predicts k tokens after its slot 0", written=_ROWS)
    def test_slots_are_places_in_the_block(self) -> None:
        draft, samples = self.draft(), self.samples()
        rows = draft(self.batch(draft, samples))
        starts: dict[int, tuple[int, int]] = {}
        for row, (sample, at) in enumerate(placed(rows, samples)):
            start = (sample, at - int(rows.slot[row]))
            first = starts.setdefault(int(rows.block[row]), start)
            words = f"row {row}, slot {int(rows.slot[row])}, is of text {sample} position {at}"
            require(start == first, f"{words}, and its block begins at text {first[0]} position {first[1]}")

    @clause("rows do not depend on padding, whatever stands there", written=_DRAFT)
    def test_padding_does_not_matter(self) -> None:
        for training in (True, False):
            draft = self.draft().train(training)
            prepared = self.prepared(draft)
            tight = draft(padded_batch(draft, prepared))
            for filler in (0.0, float("nan")):
                padded = draft(padded_batch(draft, prepared, extra=13, filler=filler))
                same_rows(padded, tight, f"with 13 more positions of padding that hold {filler}", self.near)
            gradients = gradients_of(loss_of(draft, padded), draft)
            broken = [name for name, part in gradients.items() if not part.isfinite().all()]
            require(not broken, f"gradients that are not finite where padding is not: {broken}")

    @clause("rows of a text do not depend on the texts beside it", written=_DRAFT)
    def test_neighbours_do_not_matter(self) -> None:
        for training in (True, False):
            draft = self.draft().train(training)
            prepared = self.prepared(draft)
            together = draft(padded_batch(draft, prepared))
            start = 0
            for number, one in enumerate(prepared):
                alone = draft(padded_batch(draft, [one]))
                part = without_blocks(together, start, start + len(alone.hidden))
                start += len(alone.hidden)
                if len(alone.hidden):
                    same_rows(part, alone, f"text {number} of four, beside the text alone", self.near)
            require(start == len(together.hidden), f"{len(together.hidden)} rows together, and {start} one by one")

    @clause("conversations that share a row of a batch give the rows that each gives alone", written=_PACKED)
    def test_packed_rows_are_as_alone(self) -> None:
        if not self.registry().get("draft", self.component).takes_packed:
            raise SkipTest("the spec does not say takes_packed=True")
        draft = self.draft()
        packed_as_alone(draft, self.prepared(draft), self.near)

    @clause("gradients do not depend on how batches are cut, and reach all that is trained", written=_DRAFT)
    def test_gradients_do_not_depend_on_the_batch(self) -> None:
        draft = self.draft()
        prepared = self.prepared(draft)
        together = gradients_of(loss_of(draft, draft(padded_batch(draft, prepared))), draft)
        missing = trained(draft).keys() - {name for name, part in together.items() if part.any()}
        require(not missing, f"no gradient for {sorted(missing)}")
        parts = [loss_of(draft, draft(padded_batch(draft, [one]))) for one in prepared]
        apart = gradients_of(torch.stack(parts).sum(), draft)
        for name, gradient in together.items():
            check_near(apart.get(name), gradient, 10 * self.near + 1e-5, f"the gradient of {name}, one text at a time")

    @clause("the rows of every slot train the draft", written=_ROWS)
    def test_every_slot_is_trained(self) -> None:
        draft = self.draft()
        if draft.heads().draft.requires_grad:
            raise SkipTest("it trains the heads of its slots, whatever they read")
        rows, weights = draft(self.batch(draft)), list(trained(draft).values())
        for slot in rows.slot.unique().tolist():
            part_nH = rows.hidden[(rows.slot == slot) & (rows.weight > 0)]
            found = torch.autograd.grad(part_nH.square().sum(), weights, retain_graph=True, allow_unused=True)
            reached = not len(part_nH) or any(one is not None and bool(one.any()) for one in found)
            require(reached, f"no parameter gets a gradient from the hidden states of slot {slot}")

    @clause("a batch without supervised positions has no rows, and all parameters stay in its graph", written=_ROWS)
    def test_a_batch_without_rows(self) -> None:
        draft = self.draft()
        rows = draft(padded_batch(draft, self.prepared(draft, self.samples()[3:])))
        check_shapes(rows, draft.heads())
        require(rows.hidden.shape[0] == 0, f"{len(rows.hidden)} rows, where nothing is supervised")
        require(rows.hidden.requires_grad, "hidden states without a graph, so that processes in parallel would wait")

    @clause("`forward` draws no random numbers", written=_DRAFT)
    def test_forward_draws_nothing(self) -> None:
        draft = self.draft().train()
        batch = self.batch(draft)
        with no_global_draws():
            first = draft(batch)
        same_rows(draft(batch), first, "the same batch again", self.near)

    @clause("preparation draws from the generator that it is given alone, and can be pickled", written=_PREPARATION)
    def test_preparation_follows_its_generator(self) -> None:
        draft = self.draft()
        with no_global_draws():
            first = self.prepared(draft)
        copy: Preparation = pickle.loads(pickle.dumps(draft.preparation))
        for number, (one, sample) in enumerate(zip(first, self.samples(), strict=True)):
            again = copy.prepare(sample, np.random.default_rng([0, number]))
            other = [name for name, part in one.tensors.items() if not torch.equal(part, again.tensors[name])]
            require(not other, f"{other} of text {number} differ with a generator of the same seed")

    @clause(
        "`rollout` keeps prompts, padding and lengths, and draws from the numbers that it is given alone",
        written=_DRAFT,
    )
    def test_rollout_follows_its_numbers(self) -> None:
        draft = self.draft()
        if type(draft).rollout is DraftModel.rollout:
            raise SkipTest("trained on the texts of the data")
        check_rollout(draft, self.batch(draft))

    @clause("in bfloat16 a step only rounds, and gradients are finite", written=_ALGORITHM)
    def test_bfloat16(self) -> None:
        draft = self.draft()
        batch = self.batch(draft)
        exact = draft(batch).hidden
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rows = draft(batch)
            loss = loss_of(draft, rows)
        away = ((rows.hidden.float() - exact).abs().mean() / exact.abs().mean()).detach()
        require(away < 0.06, f"hidden states that differ by {float(away):.0%} on average")
        gradients = gradients_of(loss, draft)
        require(all(part.isfinite().all() for part in gradients.values()), "gradients that are not finite")

    @clause("features may come in bfloat16 beside weights in float32: the draft casts them", written=_BATCH)
    def test_features_in_another_dtype(self) -> None:
        draft = self.draft()
        batch = self.batch(draft)
        rounded = evolve(
            batch.features, hidden=batch.features.hidden.bfloat16(), last_hidden=batch.features.last_hidden.bfloat16()
        )
        exact = evolve(rounded, hidden=rounded.hidden.float(), last_hidden=rounded.last_hidden.float())
        rows = draft(evolve(batch, features=rounded))
        expected_NH = draft(evolve(batch, features=exact)).hidden
        check_near(rows.hidden, expected_NH, self.near, "hidden, beside the same numbers in float32")
        gradients = gradients_of(loss_of(draft, rows), draft)
        require(all(part.isfinite().all() for part in gradients.values()), "gradients that are not finite")

    @clause("training on a batch lowers its loss", written=_ALGORITHM)
    def test_it_learns(self) -> None:
        draft = self.new_draft().train()
        batch = self.batch(draft)
        optimizer = torch.optim.AdamW(trained(draft).values(), lr=3e-3, weight_decay=0.0)
        losses = []
        for _ in range(4):
            loss = loss_of(draft, draft(batch))
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        require(losses[-1] < losses[0], f"{losses[0]:.4f} before, {losses[-1]:.4f} after four steps")

    def batch(self, draft: DraftModel, samples: list[Sample] | None = None) -> DraftBatch:
        """The samples, prepared and padded."""
        return padded_batch(draft, self.prepared(draft, samples))


def _form_first(draft: Any, given: Any, rows: Rows) -> None:
    """Makes every test raise RowsError if rows do not have the contract's form, before the test reads them."""
    check_shapes(rows, draft.heads())
