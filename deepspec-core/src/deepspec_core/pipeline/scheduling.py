"""The scheduled decoding of an evaluation: opens the cost table that it names, and checks what the table must cover.

Knows runs and cost tables. decoding/scheduled.py selects the tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from attrs import frozen

from deepspec_core.contracts.proposer import Proposer
from deepspec_core.decoding.scheduled import ScheduledProposer
from deepspec_core.digests import digest_of
from deepspec_core.dtypes import dtype_name
from deepspec_core.errors import CheckpointError, ConfigError, StageError
from deepspec_core.evaluation.cost_table import CostTable, read_cost_table
from deepspec_core.pipeline import contents, threads
from deepspec_core.pipeline.machine import machine_of
from deepspec_core.pipeline.run import Run

WHERE = "evaluate.scheduler"
log = logging.getLogger("deepspec")


@frozen(kw_only=True)
class Costs:
    """A cost table, the digest of its file, and which form of the scheduler reads it."""

    table: CostTable
    digest: str
    asynchronous: bool

    def scheduled(self, proposer: Proposer) -> Proposer:
        """The proposer, with its proposals cut to the tokens that are worth verifying."""
        # Asked again and again for the same few numbers.
        return ScheduledProposer(proposer, cache(self.table.steps_per_second), asynchronous=self.asynchronous)

    def told(self) -> dict[str, Any]:
        """The settings of a report."""
        return {"scheduler": "asynchronous" if self.asynchronous else "synchronous", "cost_table": self.digest}


def costs_of(run: Run, gives_confidence: bool | None, max_tokens: int) -> Costs | None:
    """The cost table of [evaluate.scheduler], for a draft that proposes `max_tokens` tokens; None without a scheduler.

    Raises as `costs_from` does.
    """
    options = run.file.evaluate.scheduler
    if options is None:
        return None
    costs = costs_from(
        run.base / options.cost_table,
        asynchronous=options.asynchronous,
        target={
            "model": run.file.target.model,
            "revision": run.target.fingerprint(),
            "dtype": dtype_name(run.target.dtype),
        },
        device=run.target.device,
        count=threads.choose(run, ["evaluate"])["evaluate"],
        batch_sizes=run.file.evaluate.batch_sizes,
        gives_confidence=gives_confidence,
        max_tokens=max_tokens,
        where=WHERE,
    )
    run.reads.content(contents.COST_TABLE, costs.digest)
    return costs


def costs_from(
    path: Path,
    *,
    asynchronous: bool,
    target: Mapping[str, Any],
    device: torch.device,
    count: int,
    batch_sizes: Sequence[int],
    gives_confidence: bool | None,
    max_tokens: int,
    where: str,
) -> Costs:
    """The table in a file, for an evaluation of this target at these batch sizes, with `count` threads.

    Raises CheckpointError if the draft gives no confidence. Raises StageError if the file is missing, edited, or of
    another target, number format or device. Raises ConfigError if a load of this evaluation lies outside of what was
    measured. Another number of threads on the CPU is said: costs are then those of faster or slower steps.
    """
    if gives_confidence is False:
        raise CheckpointError(
            "this draft gives no confidence to schedule by",
            where=where,
            expected="a draft with a confidence head, or no scheduler",
        )
    table, machine = read_cost_table(path, target=target), machine_of(device)
    measured = table.about.get("machine")
    measured = measured if isinstance(measured, dict) else {}
    if measured.get("device") != machine["device"]:
        raise StageError(
            "the cost table was measured on another kind of machine",
            where=path,
            found=f"steps on {measured.get('device')}",
            expected=machine["device"],
            fix="Measure it on this machine with `deepspec profile TARGET`.",
        )
    most = max(batch_sizes)
    # A batch runs empty, so every smaller number of requests comes too.
    for requests in (1, most):
        try:
            table.steps_per_second(requests, requests * (max_tokens + 1))
        except ConfigError as error:
            raise ConfigError(
                f"{where}: {error.problem}",
                where=path,
                found=error.found,
                expected=error.expected,
                fix=f"`deepspec profile {target['model']} --batch-size 1 --batch-size {most} "
                f"--draft-tokens {max_tokens}` measures what this evaluation needs.",
            ) from None
    if device.type == "cpu" and measured.get("threads") != count:
        log.warning(
            "%s was measured with %s threads, but this evaluation uses %d: its costs may be wrong here",
            path,
            measured.get("threads"),
            count,
        )
    return Costs(table=table, digest=digest_of(path), asynchronous=asynchronous)
