"""Loss terms, weightings, tasks and exporters that are wrong in one way each.

Each table says which test of the suite has to fail, and a word of what it has seen.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import random
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from deepspec_core.checkpoints.published import published_weights


class Right:
    """Cross-entropy, as it should be."""

    needs_target = False
    needs_extras: tuple[str, ...] = ()
    change: Any = staticmethod(lambda stats, ce_N: ce_N)

    def __call__(self, stats: Any) -> Tensor:
        return self.change(stats, stats.ce)


def _term(change: Any, **attributes: Any) -> type[Right]:
    return type("Wrong", (Right,), {"change": staticmethod(change), **attributes})


def _remembered() -> Any:
    calls: list[int] = []
    return lambda stats, ce_N: (calls.append(1), ce_N * len(calls))[1]


class _Keeps(Right):
    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def __call__(self, stats: Any) -> Tensor:
        self.kept.append(stats.ce)
        return self.kept[-1]


TERMS = {
    "one number for all rows": (_term(lambda stats, ce_N: ce_N.mean()), "one_number_a_row", "[]"),
    "wrong shape": (_term(lambda stats, ce_N: ce_N[:, None]), "one_number_a_row", "[17, 1]"),
    "divides by the sum of its chunk": (_term(lambda stats, ce_N: ce_N / ce_N.sum()), "chunks_do_not_matter", "chunks"),
    "draws random numbers": (_term(lambda stats, ce_N: ce_N * torch.rand(())), "the_same_rows_give_the_same", "again"),
    "keeps a sum between calls": (_term(_remembered()), "the_same_rows_give_the_same", "again"),
    "has no gradient": (_term(lambda stats, ce_N: ce_N.detach()), "gradients_reach_the_draft", "gradient"),
    "writes into the statistics": (
        _term(lambda stats, ce_N: ce_N.detach().mul_(2.0) + ce_N * 0), "statistics_stay", "ce",
    ),
    "reads the target without saying so": (
        _term(lambda stats, ce_N: stats.kl), "it_reads_what_it_says", "needs_target",
    ),
    "reads logits without saying so": (
        _term(lambda stats, ce_N: stats.draft_logits.logsumexp(-1)), "it_reads_what_it_says", "needs_logits",
    ),
    "not finite where distributions are equal": (
        _term(lambda stats, ce_N: stats.kl.clamp(min=0).sqrt(), needs_target=True),
        "sharp_and_equal_distributions", "equal",
    ),
    "float64": (_term(lambda stats, ce_N: ce_N.double()), "one_number_a_row", "float64"),
    "bfloat16": (_term(lambda stats, ce_N: ce_N.bfloat16()), "one_number_a_row", "bfloat16"),
    "seeds random numbers": (
        _term(lambda stats, ce_N: (random.seed(0), ce_N)[1]), "the_same_rows_give_the_same", "random numbers",
    ),
    "keeps the graph of each call": (_Keeps, "the_same_rows_give_the_same", "graph"),
    "trains every second token": (
        _term(lambda stats, ce_N: torch.where(stats.target_ids % 2 == 0, ce_N, ce_N.detach())),
        "gradients_reach_the_draft", "no gradient for the rows",
    ),
    "takes the label for a column of a reduced vocabulary": (
        _term(lambda stats, ce_N: -stats.draft_logits.log_softmax(-1).gather(1, stats.target_ids[:, None])[:, 0],
              needs_logits=True),
        "a_reduced_vocabulary", "out of bounds",
    ),
    "takes a column of a reduced vocabulary for a token": (
        _term(lambda stats, ce_N: ce_N * (1 + (stats.draft_logits.argmax(-1) == stats.target_ids)), needs_logits=True),
        "a_reduced_vocabulary", "other values",
    ),
    "writes into the labels": (
        _term(lambda stats, ce_N: (stats.target_ids.zero_(), ce_N)[1]), "statistics_stay", "target_ids",
    ),
    "leaves gradients disabled": (
        _term(lambda stats, ce_N: (torch.set_grad_enabled(False), ce_N)[1]), "one_number_a_row", "gradients enabled",
    ),
    "returns an array": (
        _term(lambda stats, ce_N: ce_N.detach().numpy()), "chunks_do_not_matter", "ndarray, not a tensor",
    ),
    "returns nothing": (_term(lambda stats, ce_N: None), "gradients_reach_the_draft", "NoneType, not a tensor"),
    "extras as text": (_term(lambda stats, ce_N: ce_N, needs_extras="x"), "it_says_what_it_needs", "needs_extras"),
}  # fmt: skip


def _by_place(slot: Tensor, block: Tensor, stats: Any) -> Tensor:
    return 0.8 ** (torch.arange(len(block)) - torch.searchsorted(block, block)).float()


def _without_gaps(slot: Tensor, block: Tensor, stats: Any) -> Tensor:
    sizes = block.unique_consecutive(return_counts=True)[1].tolist()
    parts = zip(slot.split(sizes), sizes, strict=True)
    return torch.cat([slot[:0].float(), *(torch.linspace(1.0, 0.5, size)[of_block] for of_block, size in parts)])


class _OfTheLabel:
    needs_logits = True

    def __call__(self, slot: Tensor, block: Tensor, stats: Any) -> Tensor:
        return stats.draft_logits.detach().softmax(-1).gather(1, stats.target_ids[:, None])[:, 0]


_kept_statistics: list[Any] = []
WEIGHTINGS = {
    "negative": (lambda slot, block, stats: 1.0 - slot.float(), "weights_are_weights", "negative"),
    "NaN": (lambda slot, block, stats: (slot.float() - slot) / (slot - slot), "weights_are_weights", "nan"),
    "all 0": (lambda slot, block, stats: slot.float() * 0, "weights_are_weights", "0 for every row"),
    "wrong shape": (lambda slot, block, stats: torch.ones(1), "one_weight_a_row", "[1]"),
    "whole numbers": (lambda slot, block, stats: slot, "one_weight_a_row", "int64"),
    "reads other blocks": (
        lambda slot, block, stats: stats.ce / stats.ce.sum(), "blocks_do_not_see_each_other", "block",
    ),
    "counts by the number of the block": (
        lambda slot, block, stats: 1.0 / (1 + block).float(), "numbers_of_blocks_do_not_count", "block",
    ),
    "draws random numbers": (lambda slot, block, stats: torch.rand(len(slot)), "the_same_rows_weigh_the_same", "again"),
    "writes into the slots": (lambda slot, block, stats: slot.add_(1).float(), "what_it_reads_stays", "slots"),
    "knows four slots": (
        lambda slot, block, stats: torch.tensor([1.0, 0.8, 0.6, 0.4])[slot], "one_weight_a_row", "out of bounds",
    ),
    "float64 weights": (lambda slot, block, stats: 0.8 ** slot.double(), "one_weight_a_row", "float64"),
    "seeds random numbers": (
        lambda slot, block, stats: (random.seed(0), 0.8 ** slot.float())[1],
        "the_same_rows_weigh_the_same", "random numbers",
    ),
    "counts places, not slots": (_by_place, "slots_are_no_places", "1, 2, 4, 6"),
    "knows no block with a gap": (_without_gaps, "one_weight_a_row", "out of bounds"),
    "keeps statistics": (
        lambda slot, block, stats: (_kept_statistics.append(stats), 0.8 ** slot.float())[1],
        "the_same_rows_weigh_the_same", "memory",
    ),
    "writes into tv": (
        lambda slot, block, stats: (stats.tv.mul_(0.0), 0.8 ** slot.float())[1], "what_it_reads_stays", "tv",
    ),
    "writes into acceptance": (
        lambda slot, block, stats: (stats.acceptance.mul_(0.0), 0.8 ** slot.float())[1],
        "what_it_reads_stays", "acceptance",
    ),
    "writes into labels": (
        lambda slot, block, stats: (stats.target_ids.zero_(), 0.8 ** slot.float())[1],
        "what_it_reads_stays", "target_ids",
    ),
    "reads the draft's logits without saying so": (
        lambda slot, block, stats: stats.draft_logits.softmax(-1).max(-1).values,
        "it_reads_what_it_says", "needs_logits",
    ),
    "reads the target without saying so": (
        lambda slot, block, stats: stats.acceptance.detach().clamp(min=0.1), "it_reads_what_it_says", "needs_target",
    ),
    "reads what is before the correction without saying so": (
        lambda slot, block, stats: torch.exp(-stats.ce_without_correction.detach()),
        "it_reads_what_it_says", "needs_uncorrected",
    ),
    "reads extras": (
        lambda slot, block, stats: stats.extras["confidence_logits"].detach().sigmoid(),
        "it_reads_what_it_says", "confidence_logits",
    ),
    "takes a label for a column of a reduced vocabulary": (_OfTheLabel(), "a_reduced_vocabulary", "out of bounds"),
    "leaves torch without gradients": (
        lambda slot, block, stats: (torch.set_grad_enabled(False), 0.8 ** slot.float())[1],
        "one_weight_a_row", "gradients enabled",
    ),
    "weights in an array": (
        lambda slot, block, stats: (0.8 ** slot.float()).numpy(), "blocks_do_not_see_each_other", "not a tensor",
    ),
    "fails without rows": (
        lambda slot, block, stats: slot.float() + slot.max() + 1, "no_rows", "max",
    ),
}  # fmt: skip


def _asked(count: int = 4, **changes: Any) -> list[dict[str, Any]]:
    return [
        {"id": str(n), "messages": [{"role": "user", "content": f"What is {n} + 1?"}], **changes} for n in range(count)
    ]


def _shuffled(limit: int | None, seed: int) -> list[dict[str, Any]]:
    rows = _asked()
    random.Random(seed).shuffle(rows)
    return [{**row, "id": str(number)} for number, row in enumerate(rows)]


def _by_chance(limit: int | None, seed: int) -> list[dict[str, Any]]:
    return random.sample(_asked(), 3)


TASKS = {
    "no rows": (lambda limit, seed: [], "rows_are_conversations", "no rows"),
    "rows of text": (lambda limit, seed: ["a question"], "rows_are_conversations", "str"),
    "no messages": (lambda limit, seed: [{"id": "a", "question": "?"}], "rows_are_conversations", "question"),
    "duplicate ids": (lambda limit, seed: _asked(id="same"), "ids_differ", "same"),
    "empty prompts": (
        lambda limit, seed: _asked(messages=[{"role": "user", "content": "  "}]), "prompts_can_be_asked", "empty",
    ),
    "begins with an answer": (
        lambda limit, seed: _asked(messages=[{"role": "assistant", "content": "Yes."}]),
        "prompts_can_be_asked", "begin",
    ),
    "draws from global random numbers": (_by_chance, "the_same_seed_asks_the_same", "random"),
    "seeds torch's random numbers": (
        lambda limit, seed: (torch.manual_seed(seed), _asked())[1], "the_same_seed_asks_the_same", "random numbers",
    ),
    "numbers its rows after shuffling": (_shuffled, "an_id_is_one_question", "another question"),
}  # fmt: skip


def _question(row: Any, **more: Any) -> dict[str, Any]:
    return {"id": row["name"], "messages": [{"role": "user", "content": row["question"]}], **more}


def _tidied(row: Any) -> dict[str, Any]:
    row["question"] = row["question"].strip()
    return _question(row)


# Of rows with a name and a question.
ROWS = [{"name": name, "question": f" What is {name}?"} for name in ("a", "b", "c")]
FROM_ROW = {
    "takes any row of a file": (lambda row: {"messages": [{"role": "user", "content": "?"}]}, "without its columns"),
    "text for the messages of a row": (lambda row: _question(row, messages="x"), "messages"),
    "an empty question of a row": (
        lambda row: _question(row, messages=[{"role": "user", "content": " "}]), "question is empty",
    ),
    "an answer first in a row": (
        lambda row: _question(row, messages=[{"role": "assistant", "content": "Yes."}]), "begin with a user's question",
    ),
    "one id for all rows": (lambda row: _question(row, id="same"), "one id to several rows"),
    "ids of rows by chance": (lambda row: _question(row, id=uuid.uuid4().hex), "of the same row again"),
    "draws in `from_row`": (lambda row: _question(row, seed=random.random()), "random numbers"),
    "changes the row that it reads": (_tidied, "writes into the row"),
}  # fmt: skip


class WrongExporter:
    """An exporter that may be wrong. `elsewhere` is a folder to write into where it should not."""

    what = ""
    elsewhere: Path

    def unservable(self, facts: Any) -> Any:
        return False if self.what == "answers no and not why" else None

    def write(self, draft: Any, facts: Any, out: Path) -> None:
        stored = getattr(torch, facts.config["dtype"])
        tensors = dict(self.tensors(draft, stored))
        if self.what == "swaps two tensors":
            tensors["norm.weight"], tensors["down.bias"] = tensors["down.bias"], tensors["norm.weight"]
        layers = [tap + (self.what == "a wrong layer id") for tap in facts.description.taps]
        save_file(tensors, out / "model.safetensors")
        (out / "config.json").write_text(json.dumps({"layers": layers}))
        if self.what == "writes beside its folder":
            (out.parent / "notes.txt").write_text("x")
        if self.what == "writes into the working folder":
            Path("notes.txt").write_text("x")
        if self.what == "writes into home":
            (Path.home() / ".exported").write_text("x")
        if self.what == "writes somewhere else":
            (self.elsewhere / "last.log").write_text("x")
        if self.what == "names home and the working folder":
            (out / "card.md").write_text(f"Made in {Path.cwd()} by {Path.home()}.")
        if self.what == "a pickle beside the weights":
            torch.save({"loss": 0.1}, out / "training.bin")
        if self.what == "a pickle of Python's":
            (out / "training.bin").write_bytes(pickle.dumps({"loss": 0.1}))
        if self.what == "a pickle in letters":
            (out / "training.bin").write_bytes(pickle.dumps({"loss": 0.1}, 0))
        if self.what == "a compressed pickle":
            (out / "training.bin").write_bytes(gzip.compress(pickle.dumps({"loss": 0.1})))
        if self.what == "an array of objects":
            np.savez(out / "names.npz", names=np.array([{"a": 1}], dtype=object))
        if self.what == "NaN in lines of JSON":
            (out / "results.jsonl").write_text('{"accepted": 1}\n{"accepted": NaN}\n')
        if self.what == "shares a file with another folder":
            (self.elsewhere / "shared.txt").unlink(missing_ok=True)
            (out / "shared.txt").write_text("x")
            os.link(out / "shared.txt", self.elsewhere / "shared.txt")
        if self.what == "writes into the facts":
            facts.config["exported"] = True
        if self.what == "seeds random numbers":
            torch.manual_seed(0)
        if self.what == "NaN in JSON":
            (out / "results.json").write_text(json.dumps({"accepted": float("nan")}))
        if self.what == "leaves a link":
            (out / "latest").symlink_to(out / "config.json")
        if self.what == "names a folder of this machine":
            (out / "card.md").write_text(f"Load {out}.")
        if self.what == "differs from time to time":
            (out / "card.md").write_text(str(random.random()))
        if self.what == "leaves the draft in training":
            draft.train()
        if self.what == "rounds the draft's own weights":
            with torch.no_grad():
                draft.down.weight.mul_(0.5)

    def tensors(self, draft: Any, stored: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in published_weights(draft).items():
            if self.what == "drops a tensor" and name == "down.bias":
                continue
            if self.what == "transposes a tensor" and name == "up.weight":
                yield name, tensor.T.contiguous()
            elif self.what == "keeps fp32":
                yield name, tensor.float().contiguous()
            else:
                yield name, tensor.to(stored).contiguous()


EXPORTERS = {
    "drops a tensor": ("all_weights_are_there", "down.bias"),
    "transposes a tensor": ("all_weights_are_there", "up.weight"),
    "swaps two tensors": ("all_weights_are_there", "norm.weight"),
    "leaves the draft in training": ("it_is_written_again", "training mode"),
    "a wrong layer id": ("layers_are_named", "no list"),
    "writes beside its folder": ("files_are_in_their_folder", "notes.txt"),
    "writes into the working folder": ("files_are_in_their_folder", "notes.txt"),
    "writes into home": ("files_are_in_their_folder", ".exported"),
    "writes somewhere else": ("files_are_in_their_folder", "last.log"),
    "names home and the working folder": ("no_paths", "card.md"),
    "a pickle beside the weights": ("nothing_is_pickled", "training.bin"),
    "a pickle of Python's": ("nothing_is_pickled", "training.bin"),
    "a pickle in letters": ("nothing_is_pickled", "training.bin"),
    "a compressed pickle": ("nothing_is_pickled", "training.bin"),
    "an array of objects": ("nothing_is_pickled", "names.npz"),
    "NaN in lines of JSON": ("json_is_json", "results.jsonl says NaN"),
    "shares a file with another folder": ("files_are_in_their_folder", "shared.txt"),
    "writes into the facts": ("facts_and_random_numbers_stay", "config"),
    "seeds random numbers": ("facts_and_random_numbers_stay", "random numbers"),
    "NaN in JSON": ("layers_are_named", "no JSON"),
    "leaves a link": ("files_are_in_their_folder", "latest"),
    "names a folder of this machine": ("no_paths", "card.md"),
    "differs from time to time": ("it_is_written_again", "card.md"),
    "rounds the draft's own weights": ("it_is_written_again", "model.safetensors"),
    "keeps fp32": ("numbers_keep_their_dtype", "float32"),
    "answers no and not why": ("it_is_an_exporter", "False"),
}
