"""Decodes a fixed set of prompts with a checkpoint, between two steps of training.

The draft is loaded from the checkpoint as the evaluate stage would load it. So the figures are those of an evaluation
of this checkpoint, and the draft in training is not touched. The workers share the prompts. Knows targets, drafts and
requests. Does not know training, or how the figures are used.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from attrs import asdict, frozen

from deepspec_core.checkpoints.opening import draft_adapter
from deepspec_core.checkpoints.published import WEIGHTS, load_draft
from deepspec_core.config.schema import HeldOutOptions
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.contracts.target import TargetModel
from deepspec_core.crew import ALONE, Crew
from deepspec_core.decoding.sequences import Completion, Request, Round
from deepspec_core.errors import DataError
from deepspec_core.evaluation.group_decoding import Decoding, GroupDecoder
from deepspec_core.evaluation.metrics import pool
from deepspec_core.plugins.registry import Registry
from deepspec_core.training.best_checkpoints import Decoded

# Sequences that a worker decodes at once. A run that is to stop waits for no more of them than these.
_AT_ONCE: Final = 8
_WHAT: Final = "held-out prompts"


@frozen(kw_only=True)
class HeldOutDecoding:
    """Decodes `requests`. The target is the run's own, with its weights; its slots are emptied afterwards."""

    target: TargetModel
    registry: Registry
    requests: tuple[Request, ...]
    options: HeldOutOptions
    crew: Crew = ALONE

    def __call__(self, draft: Path, check: Callable[[], None]) -> Decoded:
        """Decode with the draft of a directory. All workers return the same.

        Raises DataError if no prompt can be decoded. Whatever an evaluation with this draft would raise.
        """
        self.crew.require_seen(draft / WEIGHTS)
        rows = self._of_this_worker(draft, check)
        name = f"evaluation {draft.parent.name}"
        shares = self.crew.gather(name, rows, meanwhile=check)
        done = {row["id"]: row for share in shares for row in share}
        completions = [_completion(done[request.id]) for request in self.requests if done[request.id]["rounds"]]
        failed = [row["failed"] for row in done.values() if "failed" in row]
        if not completions:
            raise DataError(
                "No held-out prompt could be decoded with the draft",
                where=draft,
                found=failed[0] if failed else "answers of one token",
                fix="Correct the cause of that error, or remove train.evaluate_every.",
            )
        pooled = pool(completions)
        assert pooled.acceptance_length is not None, "every completion here has rounds"
        assert pooled.acceptance_length_interval is not None
        return Decoded(
            accepted_length=pooled.acceptance_length,
            interval=pooled.acceptance_length_interval,
            prompts=len(self.requests) - len(failed),
            failures=len(failed),
            rounds=pooled.rounds,
            tokens=pooled.output_tokens,
        )

    def _of_this_worker(self, folder: Path, check: Callable[[], None]) -> list[dict[str, Any]]:
        """The completions of this worker's share, and its failures, in JSON types."""
        mine: list[Request] = self.crew.share(list(self.requests))
        if not mine:
            return []
        adapter = draft_adapter(folder, registry=self.registry)
        draft = load_draft(
            folder, registry=self.registry, adapter=adapter, dtype=self.target.dtype, device=self.target.device
        )
        architecture = self.target.architecture
        longest = max(len(request.prompt_ids) for request in mine)
        decoding = Decoding(
            target=self.target,
            proposer=draft.proposer(),
            sampling=Sampling(temperature=self.options.temperature),
            stop_ids=architecture.stop_token_ids,
            max_new_tokens=self.options.max_new_tokens,
            max_length=min(architecture.max_positions, longest + self.options.max_new_tokens),
            batch_size=_AT_ONCE,
            plain=False,
        )
        decode, rows = GroupDecoder(decoding, _WHAT, _AT_ONCE), list[dict[str, Any]]()
        for start in range(0, len(mine), _AT_ONCE):
            check()
            group = decode(mine[start : start + _AT_ONCE])
            rows += [asdict(completion) for completion in group.completions]
            rows += [{"id": one.id, "rounds": [], "failed": one.reason} for one in group.failures]
        # Training takes the memory back.
        del decode, decoding, draft
        self.target.open_slots(1, 1)
        gc.collect()
        if self.target.device.type == "cuda":
            torch.cuda.empty_cache()
        return rows


def _completion(row: dict[str, Any]) -> Completion:
    """A completion from the JSON of another worker, in which tuples are lists."""
    ids = {name: tuple(row[name]) for name in ("prompt_ids", "output_ids")}
    return Completion(**{**row, **ids, "rounds": tuple(Round(**one) for one in row["rounds"])})
