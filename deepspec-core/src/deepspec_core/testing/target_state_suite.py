"""Clauses of a loaded target's state: its number format, its weights, its slots, and what it leaves as it was.

This file knows the contract of targets. It does not know what a target computes.

Legend: B sequences or slots, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from deepspec_core.contracts.target import TargetModel
from deepspec_core.testing.conformance import clause, require
from deepspec_core.testing.draft_blocks_suite import DraftBlocksSuite, tokens
from deepspec_core.testing.global_draws import no_global_draws
from deepspec_core.testing.target_runs import TAPS, alone, step

_MODEL = "deepspec_core/contracts/target.py: TargetModel"
_ADAPTER = "deepspec_core/contracts/target.py: TargetAdapter"


class TargetStateSuite(DraftBlocksSuite):
    """Clauses of the state of a `contracts.target.TargetModel`."""

    def target(self, model: Any) -> TargetModel:
        """The model, saved, and loaded by the adapter."""
        return self.loaded(model, torch.float32)

    def loaded(self, model: Any, dtype: torch.dtype) -> TargetModel:
        """The model, saved, and loaded by the adapter in this number format."""
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return self.adapter().load(folder, dtype=dtype, device="cpu")

    @clause(
        "`load` gives weights and features of the number format that it is asked for, and `dtype` is it",
        written=_ADAPTER,
    )
    def test_it_is_loaded_in_the_dtype_that_is_asked(self) -> None:
        model = self.model()
        for dtype in (torch.bfloat16, torch.float32):
            target = self.loaded(model, dtype)
            require(target.dtype == dtype, f"loaded in {dtype}, and `dtype` says {target.dtype}")
            found = target.features(tokens(5, seed=1)[None], torch.ones(1, 5), None, None, TAPS)
            for name, part in (
                ("embedding_weight()", target.embedding_weight()), ("head_weight()", target.head_weight()),
                ("hidden", found.hidden), ("last_hidden", found.last_hidden),
            ):  # fmt: skip
                require(part.dtype == dtype, f"loaded in {dtype}, and {name} is {part.dtype}")

    @clause("a target is frozen and in evaluation mode, and its methods record no graph", written=_MODEL)
    def test_it_is_frozen(self) -> None:
        target = self.target(self.model())
        for name, module in _modules(target):
            trained = [own for own, part in module.named_parameters() if part.requires_grad]
            require(not trained, f"`{name}` has weights that are trained: {trained[:3]}")
            in_training = [own or name for own, part in module.named_modules() if part.training]
            require(not in_training, f"`{name}` is in training mode: {in_training[:3]}")
        target.open_slots(1, 8)
        with torch.enable_grad():
            features = target.features(tokens(5, seed=1)[None], torch.ones(1, 5), None, None, TAPS)
            out = step(target, {0: tokens(5, seed=1)}, {0: 0})
            for words, part in (
                ("embedding_weight()", target.embedding_weight()), ("head_weight()", target.head_weight()),
                ("hidden of `features`", features.hidden), ("last_hidden of `features`", features.last_hidden),
                ("logits of `decode`", out.logits), ("hidden of `decode`", out.hidden),
            ):  # fmt: skip
                require(not part.requires_grad, f"{words} with a gradient")

    @clause(
        "`features`, `decode` and `commit` draw no random numbers and do not write into their arguments", written=_MODEL
    )
    def test_what_it_is_given_stays(self) -> None:
        target = self.target(self.model())
        ids_BT, mask_BT = torch.stack([tokens(9, seed=1), tokens(9, seed=2)]), torch.ones(2, 9)
        mask_BT[1, 6:] = 0
        positions_BT, slots_B, columns_BT = (
            torch.arange(9).repeat(2, 1),
            torch.tensor([0, 2]),
            torch.tensor([[0, 1]] * 2),
        )
        positions_BT[1, 6:] = -1
        lengths_B, columns_BT = torch.tensor([9, 6]), torch.tensor([[0, 1], [0, 1]])
        sees_BTT = torch.ones(2, 2, 2).tril().bool()
        later_BT = lengths_B[:, None] + torch.arange(2)
        given: dict[str, Tensor] = {
            "input_ids": ids_BT, "attention_mask": mask_BT, "positions": positions_BT, "slots": slots_B,
            "lengths": lengths_B, "sees": sees_BTT, "positions of a tree": later_BT, "kept": columns_BT,
        }  # fmt: skip
        before = {name: part.clone() for name, part in given.items()}
        with no_global_draws():
            target.features(ids_BT, mask_BT, None, None, TAPS)
            target.open_slots(3, 16)
            target.decode(slots_B, ids_BT, positions_BT, TAPS)
            target.commit(slots_B, lengths_B)
            target.decode(slots_B, ids_BT[:, :2], later_BT, TAPS, sees=sees_BTT)
            target.commit(slots_B, lengths_B + 2, columns_BT)
        changed = [name for name, part in given.items() if not torch.equal(part, before[name])]
        require(not changed, f"it changes {changed}")

    @clause("`open_slots` opens as many slots of as many tokens as it is asked, empty, however often", written=_MODEL)
    def test_slots_are_opened_as_asked(self) -> None:
        model = self.model()
        target = self.target(model)
        target.open_slots(2, 24)
        step(target, {1: tokens(20, seed=1)}, {1: 0})
        target.commit(torch.tensor([1]), torch.tensor([20]))
        for num_slots, max_length in ((12, 136), (1, 136)):
            target.open_slots(num_slots, max_length)
            texts = {
                slot: tokens(length, seed=length) for slot, length in ((0, 7), (1, 9), (11, 136)) if slot < num_slots
            }
            words = f"{num_slots} slots of {max_length} tokens, opened after others"
            begun = {slot: text[: max(1, len(text) - 3)] for slot, text in texts.items()}
            step(target, begun, dict.fromkeys(texts, 0))
            done = {slot: len(text) for slot, text in begun.items()}
            target.commit(torch.tensor(list(texts)), torch.tensor(list(done.values())))
            out = step(target, {slot: text[done[slot] :] for slot, text in texts.items()}, done)
            for row, (slot, text) in enumerate(texts.items()):
                expected_TV = alone(model, text)[2][done[slot] :]
                self.near(out.logits[row, : len(expected_TV)], expected_TV, f"{words}: slot {slot}, {len(text)} tokens")


def _modules(target: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a target holds as attributes, or that it is."""
    if isinstance(target, nn.Module):
        yield type(target).__name__, target
    for name, part in getattr(target, "__dict__", {}).items():
        if isinstance(part, nn.Module):
            yield name, part
