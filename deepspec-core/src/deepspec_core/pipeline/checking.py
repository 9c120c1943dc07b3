"""Checks before the first stage, so that a mistake is reported at once and not after hours.

Knows which stages will run and what each of them needs. trying.py tries the training. Writes no results.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from deepspec_core.config.batching import require_packed_target
from deepspec_core.config.schema import CACHED, HELD_OUT, ONLINE, PACKED
from deepspec_core.disk import free_bytes, in_words
from deepspec_core.errors import CheckpointError
from deepspec_core.pipeline import few_steps
from deepspec_core.pipeline.apart import check_cache_place, check_inputs_survive
from deepspec_core.pipeline.evaluation_check import check_decoded_in_training, check_evaluation
from deepspec_core.pipeline.places import check_places
from deepspec_core.pipeline.prompt_check import (
    check_answers_reach,
    check_mask_token,
    check_room_for_answers,
    check_thinking,
    prompt_length,
)
from deepspec_core.pipeline.replay_check import check_replay
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.run_data import BAD_ROWS
from deepspec_core.pipeline.serving import uses_servers
from deepspec_core.pipeline.stages import Step
from deepspec_core.training.trackers import require_trackers

if TYPE_CHECKING:
    from deepspec_core.contracts.draft import DraftDescription, DraftModel

log = logging.getLogger("deepspec")


def check_before(run: Run, steps: Sequence[Step], *, may_write: bool = True, processes: int = 1) -> None:
    """Raise the errors that would stop a later stage. Does nothing if no stage is to run.

    `processes` is how many this command will start. Nothing is written, except that the bad rows of a source that has
    too many are kept if it `may_write`.

    It checks folders, the feature source, the cache format, the target's config and tokenizer, taps, packed rows,
    sources, servers, the draft's options and forward pass, the weights it asks the target for, its description, its
    config.json and proposer, loss terms and kernels, room for a checkpoint, tasks and their prompts, the draft that is
    to be evaluated, and export formats.
    """
    todo = {step.stage.name for step in steps if step.action != "skip"}
    if not todo:
        return
    check_places(run, todo)
    check_inputs_survive(run, [step.stage.name for step in steps if step.forced])
    if todo & {"cache", "train"} and any(one.stage.name == "regenerate" and one.action == "skip" for one in steps):
        run.data.regenerated_digest()  # reading the file raises its error
    if "cache" in todo:
        check_cache_place(run)
    if "train" in todo:
        require_trackers(run.file.train.trackers, where=str(run.path))
        few_steps.warn_before(run)
    _offered(run, todo)
    rows: Counter[str] = Counter()
    _sources(run, todo, rows, may_write=may_write)
    _ = run.target.adapter  # opening it raises its errors
    if "train" in todo and run.file.features.mode == ONLINE and run.file.train.batching == PACKED:
        require_packed_target(run.target.architecture.model_type, run.plugins.registry)
    decodes = "train" in todo and run.file.train.evaluate_every is not None
    if decodes or todo - {"train", "export"} or run.file.features.mode != CACHED:
        _ = run.target.tokenizer
        if run.file.data.system_prompt is not None:
            prompt_length(run, run.file.data.system_prompt)
        check_thinking(run)
    if "regenerate" in todo:
        check_replay(run, rows)
    if todo & {"regenerate", "cache", "train"}:
        run.data.check_length()
    if "regenerate" in todo and run.file.regenerate.servers:
        if run.file.regenerate.features:
            from deepspec_core.pipeline.one_pass import check as check_one_pass

            check_one_pass(run, may_write=may_write)
        else:
            from deepspec_core.pipeline.serving import farm_of

            farm_of(run).check()
    if any(stage in todo and uses_servers(run, stage) for stage in ("cache", "train")):
        from deepspec_core.pipeline.feature_servers import check as check_feature_servers

        check_feature_servers(run, processes, may_write=may_write)
    if _first_reader(run) in todo:
        check_room_for_answers(run)
    confidence: bool | None = None
    proposed: int | None = None
    draft: DraftModel | None = None
    if "train" in run.file.run.stages:
        from deepspec_core.pipeline.trying import try_draft, try_training
        from deepspec_core.pipeline.trying_finished import try_finished
        from deepspec_core.pipeline.trying_rollout import try_rollout
        from deepspec_core.pipeline.trying_target_weights import try_target_weights

        draft, tried = try_draft(run)
        confidence, description = tried.description.gives_confidence, tried.description
        proposed = description.max_tokens
        if todo - {"export"}:
            check_mask_token(run, description)
        if "train" in todo:
            try_target_weights(run, draft, description)
            try_rollout(run, draft)
            try_training(run, draft)
            try_finished(run, draft, description)
            _begun_with(run, steps, draft, description)
            check_decoded_in_training(run)
            _room_for_checkpoint(run, tried.checkpoint_bytes)
    if "cache" in todo:
        from deepspec_core.pipeline.trying_cache import try_format

        try_format(run)
        forced = any(step.forced for step in steps if step.stage.name == "cache")
        _cache(run, fresh=forced)
    elif _caches(run) and "cache" not in run.file.run.stages and "train" in run.file.run.stages:
        if "train" in todo:
            run.cache.require()
        held_out = "evaluate" in run.file.run.stages and HELD_OUT in run.file.evaluate.tasks
        if held_out or ("train" in todo and run.file.train.evaluate_every is not None):
            run.cache.require_same_split()
    if "evaluate" in todo:
        check_evaluation(run, todo, confidence, proposed)
    if "export" in todo:
        from deepspec_core.pipeline.exporting import check_servable, facts_before, facts_of_finished

        check_servable(run, facts_of_finished(run) if draft is None else facts_before(run, draft))


def _offered(run: Run, todo: Collection[str]) -> None:
    """Raise PluginError if the feature source or the cache format of a stage is none."""
    from deepspec_core.pipeline.offered import check_format, check_source_kind

    registry = run.plugins.registry
    if "train" in todo:
        check_source_kind(registry, run.file.features.mode)
    if "cache" in todo or ("train" in todo and _caches(run)):
        check_format(registry, run.file.cache.format)


def _sources(run: Run, todo: Collection[str], rows: Counter[str], *, may_write: bool) -> None:
    """Check [data] sources where a stage reads them: regeneration, training without it, or held-out prompts.

    `rows` counts training's, as of check_rows.
    """
    from deepspec_core.data.sources import check_rows, check_sources

    data, registry = run.file.data, run.plugins.registry
    trains = _first_reader(run) in todo
    decodes = "train" in todo and run.file.train.evaluate_every is not None
    if trains or decodes or ("evaluate" in todo and HELD_OUT in run.file.evaluate.tasks):
        check_sources(data.sources, base=run.base, registry=registry)
    if trains:
        turns = check_rows(
            data.sources,
            held_out=data.held_out,
            seed=run.file.run.seed,
            base=run.base,
            registry=registry,
            max_bad_rows=data.max_bad_rows,
            keep_in=run.folder / BAD_ROWS if may_write else None,
            counts=rows,
        )
        if "regenerate" in todo:
            check_answers_reach(run, turns)


def _first_reader(run: Run) -> str:
    """The stage that reads the training conversations of [data] sources."""
    return "regenerate" if "regenerate" in run.file.run.stages else "cache" if _caches(run) else "train"


def _caches(run: Run) -> bool:
    return run.file.features.mode == CACHED


def _room_for_checkpoint(run: Run, needed: int) -> None:
    """Check for room for the checkpoints that are kept, and for one more: it is complete before an old one goes.

    No room for one is an error. No room for all is a warning, because a short training makes fewer.
    """
    free = free_bytes(run.folder)
    if needed > free:
        raise CheckpointError(
            "the disk has no room for a checkpoint",
            where=run.folder,
            found=f"{in_words(free)} free",
            expected=in_words(needed),
            fix="free some space, or choose another run.output",
        )
    from deepspec_core.training.checkpoint import CHECKPOINTS

    there = len(list((run.stage_folder("train") / CHECKPOINTS).glob("step-*")))
    train = run.file.train
    best = train.keep_best if train.evaluate_every is not None else 0
    most = train.keep_checkpoints + best + 1 - there
    if needed * most > free:
        log.warning(
            "%d checkpoints may take %s, but only %s are free in %s: see train.keep_checkpoints and train.keep_best",
            most,
            in_words(needed * most),
            in_words(free),
            run.folder,
        )


def _cache(run: Run, *, fresh: bool) -> None:
    """Check that a cache in the cache's folder is this run's own or will be discarded, and that the disk has room.

    The number and the lengths of samples are not known yet. No room for a single sample is an error. No room for the
    largest cache that the run file allows is a warning.
    """
    from deepspec_core.cache.estimate import cache_bytes, require_space, too_small

    begun = fresh or run.cache.refuse_another()
    header, count = run.cache.bare_header(), run.cache.expected_samples()
    if not begun:
        require_space(run.cache.folder, cache_bytes(run.cache.format, header, 1, shards=1))
    if count is None:
        return
    shards = -(-count // run.file.cache.shard_samples)
    most = cache_bytes(run.cache.format, header, count * run.data.max_length, shards=shards)
    wanted, what = [(run.cache.folder, most)], "the cache"
    if run.has("regenerate") and run.file.regenerate.features:
        wanted.append((run.stage_folder("regenerate"), most))
        what = "the cache, and the features of answers until it is whole,"
    for folder, needed, free in too_small(wanted):
        log.warning("%s may take up to %s, and %s are free in %s", what, in_words(needed), in_words(free), folder)


def _begun_with(run: Run, steps: Sequence[Step], draft: DraftModel, description: DraftDescription) -> None:
    """Check what draft.init names, unless training goes on with a checkpoint of its own."""
    from deepspec_core.pipeline.target_layers import begins_with_target, check_target_start
    from deepspec_core.pipeline.warm_start import check_init
    from deepspec_core.training.checkpoint import latest

    forced = any(step.forced for step in steps if step.stage.name == "train")
    if forced or latest(run.stage_folder("train")) is None:
        check_init(run, draft, description)
        if begins_with_target(run):
            check_target_start(run, draft)
