"""The train stage: a draft with new weights, the target's embedding and head, and the training loop around them."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from deepspec_core.checkpoints.published import save_draft
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.contracts.features import FeatureSource
from deepspec_core.data.frequent_tokens import frequent_tokens
from deepspec_core.errors import ConfigError, PluginError
from deepspec_core.layers.recomputing import recompute_layers
from deepspec_core.pipeline import few_steps, workers
from deepspec_core.pipeline.offered import check_source
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.target_layers import begins_with_target, take_target_layers
from deepspec_core.pipeline.training_evaluations import evaluations_of
from deepspec_core.pipeline.warm_start import start_of, take_vocabulary, take_weights
from deepspec_core.plugins.notices import notify
from deepspec_core.training.best_checkpoints import Evaluations
from deepspec_core.training.checkpoint import step_of
from deepspec_core.training.constant_buffers import ConstantBuffers
from deepspec_core.training.metrics_lines import METRICS
from deepspec_core.training.trackers import Trackers, chosen_trackers
from deepspec_core.training.trainer import TrainResult, train

log = logging.getLogger("deepspec")


def run_stage(run: Run) -> dict[str, Any]:
    """Train to the end, from the last checkpoint if there is one.

    The finished draft lies in the run's folder as `draft`.
    """
    registry = run.plugins.registry
    mode = run.file.features.mode
    source = check_source(registry, mode, registry.build("features", mode, run))
    draft = new_draft(run)
    start = start_of(run)
    vocabulary = choose_vocabulary(run, draft, source) if start is None else take_vocabulary(draft, start)
    draft.adopt(run.target.vocabulary.embedding, run.target.vocabulary.head)
    wanted = draft.describe().target_weights
    if wanted:
        draft.adopt_weights(run.target.extra_weights(wanted))
    begun = {}
    if start is not None:
        take_weights(draft, start)
        begun = {"begun with": run.file.draft.init}
        del start
    elif begins_with_target(run):
        take_target_layers(run, draft)
        begun = {"begun with": run.file.draft.init}
    folder = run.stage_folder("train")
    few_steps.warn_exactly(run, len(source))
    names = chosen_trackers(run.file.train.trackers) if workers.rank() == 0 else []
    metrics, project = folder / METRICS, run.file.train.tracker_project
    evaluations = evaluations_of(run)
    with Trackers(names, metrics=metrics, config=run.folder / "config.toml", project=project) as trackers:
        result = _trained(run, draft, source, folder, trackers, evaluations)
    chosen = evaluations.chosen(result.checkpoint)
    if workers.rank() == 0:
        publish(chosen / "draft", run.folder / "draft")
    return {
        "steps": result.steps,
        **begun,
        **_finished(evaluations, step_of(chosen)),
        "samples": len(source),
        **run.data.losses(),
        **vocabulary,
        **_of_source(source),
        "resumed_from": result.resumed_from,
        "damaged_checkpoints": result.damaged + evaluations.damaged,
        "figures": result.figures,
        "counts": result.counts,
        "trackers": trackers.summary(),
    }


def _finished(evaluations: Evaluations, step: int) -> dict[str, Any]:
    """What the stage's summary says of the checkpoint of `step`, the finished draft, where there was a choice."""
    if not evaluations.records:
        return {}
    lengths = {record["step"]: record["accepted_length"] for record in evaluations.records}
    return {
        "finished draft of step": step,
        **({"accepted length on held-out prompts": round(lengths[step], 3)} if step in lengths else {}),
        "seconds of evaluations": round(sum(record["seconds"] for record in evaluations.records), 1),
    }


def _of_source(source: FeatureSource) -> dict[str, Any]:
    """What the stage's summary says of a source that has something to say."""
    summary = getattr(source, "summary", None)
    return {} if summary is None else dict(summary())


def _trained(
    run: Run, draft: DraftModel, source: FeatureSource, folder: Path, trackers: Trackers, evaluations: Evaluations
) -> TrainResult:
    buffers = ConstantBuffers(draft)

    def save(path: Path) -> None:
        buffers.check()
        save_draft(draft, run.target.draft_adapter, path)

    return train(
        draft=draft,
        source=source,
        options=run.file.train,
        loss=run.file.loss,
        registry=run.plugins.registry,
        folder=folder,
        seed=run.file.run.seed,
        save_draft=save,
        on_checkpoint=lambda path: notify(run.plugins.manager, "deepspec_checkpoint_saved", run=run, checkpoint=path),
        on_line=trackers.wake,
        device=run.target.device,
        evaluations=evaluations,
    )


def new_draft(run: Run) -> DraftModel:
    """A draft of the run's type in the target's family. Its weights are drawn from the run's seed.

    Raises PluginError, with the package, if it cannot be built, or nothing of it is trained. Raises ConfigError if the
    run wants to recompute activations, and no layer of the draft can.
    """
    require_trained(run)
    kind, registry = run.file.draft.type, run.plugins.registry
    options, adapter, taps = run.file.draft.options, run.target.draft_adapter, run.file.target.layers
    torch.manual_seed(run.file.run.seed)
    draft: DraftModel = registry.build("draft", kind, options, adapter, taps)
    if not isinstance(draft, DraftModel):
        raise PluginError(
            f"draft type {kind!r} does not make a draft",
            where=registry.provider("draft", kind),
            found=type(draft).__name__,
            expected="a contracts.draft.DraftModel from `build`",
        )
    shared = {id(weight) for part in (draft.embed_tokens, draft.lm_head) for weight in part.parameters()}
    if not any(weight.requires_grad and id(weight) not in shared for weight in draft.parameters()):
        raise PluginError(
            f"draft type {kind!r} has nothing to train",
            where=registry.provider("draft", kind),
            found=f"{len(list(draft.parameters()))} parameters, all frozen or the target's own",
            expected="at least one parameter that requires a gradient, beside embed_tokens and lm_head",
        )
    if run.file.train.checkpoint_activations:
        recompute_layers(draft)
    return draft


def require_trained(run: Run) -> None:
    """Raise ConfigError if drafts of the run's type are not trained."""
    if not run.trains:
        raise ConfigError(
            "drafts of this type are not trained",
            where=f"{run.path}: draft.type",
            found=run.file.draft.type,
            expected="a draft type that is trained",
            fix='Set run.stages = ["evaluate"].',
        )


def choose_vocabulary(run: Run, draft: DraftModel, source: FeatureSource) -> dict[str, Any]:
    """Give a draft with a reduced vocabulary the tokens that the answers of `source` have most of, and the stop tokens.

    Returns what the stage's summary says of it.
    """
    vocabulary = draft.vocabulary
    if vocabulary is None:
        return {}
    architecture = run.target.architecture
    tokens_of = getattr(source, "tokens_of", source.__getitem__)
    found = frequent_tokens(
        (tokens_of(index) for index in range(len(source))),
        size=len(vocabulary.ids),
        vocab_size=architecture.vocab_size,
        always=architecture.stop_token_ids,
    )
    vocabulary.choose(found.ids)
    share = found.covered / max(1, found.supervised)
    log.info(
        "the draft's vocabulary: %s of %s tokens, %.2f%% of the answers' %s tokens",
        f"{len(found.ids):,}",
        f"{architecture.vocab_size:,}",
        100 * share,
        f"{found.supervised:,}",
    )
    return {"vocabulary": {"tokens": len(found.ids), "covered": round(share, 6), "supervised": found.supervised}}


def publish(checkpoint: Path, out: Path) -> None:
    """Give a checkpoint a second name in the run's folder, without a second copy where the file system allows.

    Another process that evaluates the draft finds it whole, or for a moment not at all.
    """
    partial, old = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    for stale in (partial, old):
        _remove(stale)
    try:
        shutil.copytree(checkpoint, partial, copy_function=os.link)
    except (OSError, shutil.Error):
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(checkpoint, partial)
    if out.exists():
        os.replace(out, old)
    os.replace(partial, out)
    shutil.rmtree(old, ignore_errors=True)


def _remove(path: Path) -> None:
    """Remove a folder, or a file or link that has its name; what a link points at stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
