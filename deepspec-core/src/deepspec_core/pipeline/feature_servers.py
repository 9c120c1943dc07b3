"""The feature servers of a run: makes a farm of them (features/served/) from the run file.

Knows [features], the run's target and its processes. Does not know how servers are asked.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, Final

import torch

from deepspec_core.config.named_files import no_exchange
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.crew import Crew
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.disk import free_bytes, in_words, is_folder, why_not_writable
from deepspec_core.errors import ConfigError, StageError
from deepspec_core.features.served.asking import FeatureWork, short_sample
from deepspec_core.features.served.exchange import Exchange, Ownership, owner_of
from deepspec_core.features.served.final_norm import FinalNorm
from deepspec_core.features.served.layers import AskedLayers
from deepspec_core.features.served.server_probe import Reference, differences, require_alike, summary
from deepspec_core.features.served.source import FeatureServers, ServedFeatures
from deepspec_core.features.served.stage_record import ServedRecord, read_record
from deepspec_core.pipeline import workers
from deepspec_core.pipeline.fingerprint import RECORD as STAGE
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.serving import key_in, wanted_of_target
from deepspec_core.servers.farm import Farm
from deepspec_core.servers.wanted import Names
from deepspec_core.targets.opening import fetched, load_target

log = logging.getLogger("deepspec")

RECORD: Final = "served.safetensors"
NAMES: Final = Names(
    servers="features.servers",
    served_as="features.served_as",
    key="features.api_key_env",
    timeout="features.timeout",
)
_QUESTION: Final = (
    "A ferry crosses the strait in forty minutes with the current and in one hour against it. How fast is the current, "
    "if the strait is twelve kilometres wide? Answer in one sentence, then name the equation you solved."
)
_GB: Final = 10**9


def servers_of(
    run: Run, *, ownership: Ownership, stored: str | None = None, processes: int = 1, alone: bool = False
) -> FeatureServers:
    """The servers, nobody asked yet. Raises ConfigError if the exchange folder, its bound or the key will not do.

    `stored`: The number format that they have to write; None: any. `processes`: how many will share the bounds, where
    they are not started yet. `alone`: this process has them for itself.
    """
    options, target, count = run.file.features, run.target, 1 if alone else max(processes, workers.count())
    layers = AskedLayers(taps=run.file.target.layers, num_layers=target.architecture.num_layers)
    max_length, at_once = run.data.max_length, max(1, options.in_flight // count)
    work = FeatureWork(
        wanted=wanted_of_target(
            run,
            served_as=options.served_as,
            sampling=Sampling(),
            max_tokens=1,
            max_length=max_length + 1,
            key=key_in(options.api_key_env, where=f"{run.path}: features.api_key_env"),
            timeout=options.timeout,
            max_concurrency=at_once,
            called=NAMES,
        ),
        layers=layers,
        hidden_size=target.architecture.hidden_size,
        exchange=Exchange(
            folder=_folder(run),
            ownership=ownership,
            most=int(options.exchange_gb * _GB) // count,
            late=options.file_timeout,
        ),
        norm=_final_norm(run),
        file_timeout=options.file_timeout,
        sample=short_sample(_prompt(target.tokenizer), max_length),
        stored=stored,
    )
    _require_room(run, work, max_length, count)
    prefetch = options.prefetch if options.prefetch is not None else 2 * at_once * len(options.servers)
    return FeatureServers(farm=Farm(addresses=options.servers, work=work), prefetch=prefetch)


def check(run: Run, processes: int = 1, *, may_write: bool = True) -> None:
    """ConfigError, before the first stage, where a server or the exchange folder cannot be used."""
    owner = owner_of(run.folder, may_write=may_write)  # the run's own: begin() removes what a kill leaves
    trial = Ownership(owner=owner, rank=workers.rank(), world=workers.count())
    servers = servers_of(run, ownership=trial, processes=processes)
    work: Any = servers.farm.work
    try:
        servers.check()
    finally:
        work.exchange.clear(session=True)  # another process may be at work in this run
    if (most := run.file.features.in_flight) < (count := max(processes, workers.count())) and workers.rank() == 0:
        log.warning(
            "features.in_flight = %d is less than the %d processes of this run. Each of them may have one request at "
            "each server, so a server may have %d at once",
            most,
            count,
            count,
        )
    if workers.rank() == 0 and run.file.features.probe != "off":
        run.served_like = _compare(run, work)


def begin(run: Run, stage: str, *, record: Path | None = None, crew: Crew | None = None) -> FeatureServers:
    """The servers of this process of a stage: checked, and with an earlier process's files in the exchange removed.

    A server stays out if its features differ from those at the start, or from those when the stage was begun.
    Raises ConfigError if no server is left, and StageError if a stage that was begun has no record of what it began
    with. `record`: the record's file, where it does not lie in the stage's folder. `crew`: who asks, where not all
    workers.
    """
    crew = crew or workers.crew()
    ownership = Ownership(owner=owner_of(run.folder), rank=crew.rank, world=crew.count)
    path, compares = record or run.stage_folder(stage) / RECORD, run.file.features.probe != "off"
    begun, alone = begun_with(path, stage), crew.count == 1
    servers = servers_of(run, ownership=ownership, stored=None if begun is None else begun.stored, alone=alone)
    work: Any = servers.farm.work
    start: tuple[Reference, ...] = () if run.served_like is None else (run.served_like,)
    if compares:
        work.references = start if begun is None else (*start, begun.reference(work, where=path))
    files, size = work.exchange.take_over()
    if files:
        log.warning("removed %d files (%s) of an earlier process from %s", files, in_words(size), work.exchange.folder)
    servers.check(strict=False)
    if begun is None and crew.first:
        first = next(address for address in run.file.features.servers if address in work.tried)
        ServedRecord.of(work, first).write(path)
    # The first process records the features that the stage begins with. The others' servers have to give the same.
    crew.told_by_first(f"what servers gave when the {stage} stage was begun", True)
    if begun is None:
        crew.require_seen(path)
        begun = read_record(path)
        work.stored = begun.stored
        if compares:
            work.references = (*start, begun.reference(work, where=path))
    return servers


def from_run(run: Run) -> ServedFeatures:
    """`[features] mode = "server"`."""
    return ServedFeatures(run.data.training_samples(), begin(run, "train"), workers.crew())


def _compare(run: Run, work: FeatureWork) -> Reference:
    """Compare the servers' states with those of the target here, or with each other. Raises ConfigError if a server's
    differ.

    Returns what they were compared with.

    The target is loaded for this, computes one short text, and is let go: training does not need it.
    """
    given = {address: work.by_name(features) for address, features in work.tried.items()}
    first = next(address for address in run.file.features.servers if address in given)
    if run.file.features.probe == "target":
        reference = Reference(states=_of_target(run, work), whose="the target in this process")
    else:
        reference = Reference(states=given.pop(first), whose=f"the first server, {first}")
    if not given:
        log.info(
            '%s is the only server, so its features are not compared; features.probe = "target" '
            "compares them with the target",
            first,
        )
    for address, found in given.items():
        compared = differences(found, reference.states)
        require_alike(compared, where=f"features.servers: {address}", whose=reference.whose)
        log.info("%s, compared with %s: %s", address, reference.whose, summary(compared))
    return reference


def _of_target(run: Run, work: FeatureWork) -> dict[str, torch.Tensor]:
    """The sample's states of every layer by the target here, so that a layer that is another one is recognised."""
    target, options = run.target, run.file.target
    every = AskedLayers(taps=tuple(range(-1, work.layers.num_layers - 1)), num_layers=work.layers.num_layers)
    model = load_target(
        target.adapter,
        target.where,
        dtype=target.dtype,
        device=target.device,
        trust_remote_code=options.trust_remote_code,
        revision=options.revision,
    )
    ids = work.sample[None].to(model.device)
    with torch.no_grad():
        found = model.features(ids, torch.ones_like(ids).bool(), None, None, every.taps)
    hidden, last = found.hidden[0].cpu(), found.last_hidden[0].cpu()
    return {every.name(column): state for column, state in enumerate((*hidden.chunk(len(every.taps), -1), last))}


def begun_with(record: Path, stage: str) -> ServedRecord | None:
    """What a stage was begun with; None where it was not begun. Raises StageError if that is not known."""
    if record.exists():
        return read_record(record)
    folder = record.parent
    results = folder / "checkpoints" if stage == "train" else folder
    if any(
        path.is_file() and not path.name.startswith(".") and path.name not in (STAGE, f"{STAGE}.partial")
        for path in results.rglob("*")
    ):
        raise StageError(
            "The record of the servers' features is missing",
            where=record,
            found="results of the stage, but no such file",
            expected="the features of a short text, which the servers gave when the stage began",
            fix=f"Run again with --force {stage}, or choose another output.",
        )
    return None


def _prompt(tokenizer: ChatTokenizer) -> tuple[int, ...]:
    return tokenizer.render_prompt(({"role": "user", "content": _QUESTION},))


def _folder(run: Run) -> Path:
    assert run.file.features.exchange is not None, "config/checks.py asks for it"
    folder = run.base / run.file.features.exchange
    problem = None if is_folder(folder) else f"{folder} is no folder"
    problem = problem or why_not_writable(folder)
    if problem is not None:
        raise no_exchange(problem, where=f"{run.path}: features.exchange")
    return Path(os.path.realpath(folder))


def _final_norm(run: Run) -> FinalNorm | None:
    read = getattr(run.target.adapter, "final_norm", None)
    if read is None:
        return None
    norm = read(fetched(run.target.where, run.file.target.revision, run.file.target.trust_remote_code))
    return None if norm is None else FinalNorm(norm)


def _require_room(run: Run, work: FeatureWork, max_length: int, count: int) -> None:
    """Raise ConfigError if the bound, or the disk, does not hold the longest sample."""
    longest, most = work.bytes_of(max_length), work.exchange.most
    if longest > most:
        raise ConfigError(
            "The limit of the exchange folder is too small for the longest sample",
            where=f"{run.path}: features.exchange_gb",
            found=f"{in_words(most)} for each of {count} process{'es' * (count > 1)}",
            expected=f"at least {in_words(longest)}: data.max_length = {max_length:,} tokens, "
            f"{len(work.layers.ids)} states of {work.hidden_size:,} numbers each, in the widest format",
            fix="Raise features.exchange_gb, or lower data.max_length.",
        )
    free = free_bytes(work.exchange.folder)
    if free < longest:
        raise ConfigError(
            "The disk of the exchange folder has no room for the longest sample",
            where=work.exchange.folder,
            found=f"{in_words(free)} free",
            expected=in_words(longest),
            fix="Make room, or name another folder in features.exchange.",
        )
    if free < most:
        log.warning(
            "features.exchange_gb allows %s, and %s are free in %s",
            in_words(most),
            in_words(free),
            work.exchange.folder,
        )
