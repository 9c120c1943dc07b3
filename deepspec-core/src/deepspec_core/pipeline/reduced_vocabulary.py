"""Reduces the vocabulary of a finished draft to the most frequent tokens of its run's answers, and measures the cost.

Training is not repeated: rows of the lm_head, and of every other weight with a row for each token, are left out. Knows
a run's folder and how a draft's weights depend on its vocabulary; knows no export format and no algorithm.

Legend: D tokens kept, V tokens of the target.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import attrs
import torch
from attrs import evolve, frozen

from deepspec_core.checkpoints.opening import draft_adapter
from deepspec_core.checkpoints.published import load_draft, read_options
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.contracts.target import TargetAdapter
from deepspec_core.data.frequent_tokens import frequent_tokens
from deepspec_core.data.samples import Samples
from deepspec_core.data.token_store import TokenStore
from deepspec_core.errors import ConfigError, PluginError, StageError
from deepspec_core.evaluation.evaluator import evaluate, summarise
from deepspec_core.evaluation.group_decoding import Decoding
from deepspec_core.evaluation.sampled import sampling_at, stop_text
from deepspec_core.evaluation.tasks import task_label
from deepspec_core.pipeline.changes import refuse_changes
from deepspec_core.pipeline.evaluating import prompts_of, requests_of
from deepspec_core.pipeline.fingerprint import read_record
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.run_tokens import made_from

log = logging.getLogger("deepspec")

_OPTION = "vocab_size"
_IDS = "vocabulary.ids"


@frozen(kw_only=True, eq=False)
class ReducedDraft:
    """The draft, and what export.json says of its vocabulary: `tokens`, `of`, `covered` (the share of the answers'
    tokens that are kept), and the accepted length before and after."""

    draft: DraftModel
    about: dict[str, Any]


def empty_reduced(run: Run, size: int, *, where: str) -> tuple[DraftModel, TargetAdapter]:
    """The run's finished draft with `size` tokens, without memory for weights, and its adapter.

    ConfigError, at `where`, where such drafts have no vocabulary of their own, or not this many tokens, or where stop
    tokens alone would be kept.
    """
    with torch.device("meta"):
        return _new(run, size, where)


def reduced(run: Run, size: int, *, prompts: int, where: str) -> ReducedDraft:
    """The run's finished draft with `size` tokens: the stop tokens, and those that its training answers have most of.

    Both drafts decode `prompts` prompts of the run's first task greedily. The target is loaded for it. Nothing is
    written into the run's folder. Raises StageError if the answers or the draft are not those of the training.
    """
    _require_trained_answers(run)
    folder, registry = run.folder / "draft", run.plugins.registry
    target = run.target
    adapter = draft_adapter(folder, registry=registry)
    whole = load_draft(folder, registry=registry, adapter=adapter)
    draft, _ = _new(run, size, where)
    architecture = target.architecture
    with _samples(run) as samples:
        found = frequent_tokens(
            (samples[index] for index in range(len(samples))),
            size=size,
            vocab_size=architecture.vocab_size,
            always=architecture.stop_token_ids,
        )
    keep_rows(whole, draft, found.ids)
    before, after = (_accepted(run, one, prompts) for one in (whole, draft))
    return ReducedDraft(
        draft=draft.to(device="cpu", dtype=torch.float32).eval(),
        about={
            "tokens": size,
            "of": architecture.vocab_size,
            "covered": round(found.covered / max(1, found.supervised), 6),
            "measured": {
                "task": task_label(run.file.evaluate.tasks[0]),
                "temperature": 0,
                "prompts": before["samples"],
                "accepted_length_before": before["acceptance_length"],
                "accepted_length_after": after["acceptance_length"],
                "interval_before": before["acceptance_length_interval"],
                "interval_after": after["acceptance_length_interval"],
            },
        },
    )


def keep_rows(whole: DraftModel, draft: DraftModel, ids_D: torch.Tensor) -> None:
    """Give `draft`, whose vocabulary has D tokens, the weights of `whole`, of which it has these rows.

    Raises PluginError if a weight is neither of its own shape nor one with a row for each token.
    """
    assert draft.vocabulary is not None
    draft.vocabulary.choose(ids_D)
    theirs, kept = whole.state_dict(), {}
    for name, own in draft.state_dict().items():
        given = theirs.get(name)
        if name == _IDS:
            kept[name] = own
        elif given is not None and given.shape == own.shape:
            kept[name] = given
        elif given is not None and given.shape[1:] == own.shape[1:] and len(own) == len(ids_D):
            kept[name] = given[ids_D]
        else:
            raise PluginError(
                "the draft has a weight whose shape does not fit a reduced vocabulary",
                where=name,
                found=None if given is None else list(given.shape),
                expected=f"{list(own.shape)}, or a row for each token of the target",
            )
    draft.load_state_dict(kept)


def _require_trained_answers(run: Run) -> None:
    answers = run.data.regenerated
    if answers is not None and not answers.is_file():
        raise StageError(
            "the run's answers are missing",
            where=answers,
            expected="the file that the stage `regenerate` wrote",
            fix="Put the file back.",
        )
    for stage in ("regenerate", "cache", "train"):
        record = read_record(run.stage_folder(stage)) if stage in run.file.run.stages else None
        # A cache may have been removed since: the answers are compared without it.
        if stage == "train" and (record is None or not record.complete):
            raise StageError("the run's training has not finished", where=run.stage_folder(stage))
        if record is not None:
            refuse_changes(run, record)


@contextmanager
def _samples(run: Run) -> Iterator[Samples]:
    """The training samples: the stored ones, or where those are gone or of another version, made apart."""
    data = run.data
    if TokenStore(data.tokens_folder, made_from(data)).ready() is not None:
        yield data.training_samples()
        return
    log.info("the answers are tokenised again, because the run's stored tokens are missing or from other versions")
    with TemporaryDirectory() as folder:
        yield evolve(data, folder=Path(folder)).training_samples()


def _new(run: Run, size: int, where: str) -> tuple[DraftModel, TargetAdapter]:
    folder, registry = run.folder / "draft", run.plugins.registry
    kind, options, taps = read_options(folder, registry)
    if options is None or not any(one.name == _OPTION for one in attrs.fields(type(options))):
        raise ConfigError(
            "drafts of this type cannot have a reduced vocabulary",
            where=where,
            found=kind,
            expected=f"a draft type with the option {_OPTION}",
        )
    if getattr(options, _OPTION) is not None:
        raise ConfigError(
            "the draft's vocabulary is reduced already",
            where=where,
            found=f"{getattr(options, _OPTION):,} tokens",
            expected="a draft with the target's whole vocabulary",
            fix="Train with another [draft] vocab_size.",
        )
    adapter = draft_adapter(folder, registry=registry)
    stops, most = len(set(run.target.architecture.stop_token_ids)), adapter.architecture.vocab_size
    if not stops < size <= most:
        raise ConfigError(
            "a draft cannot have a vocabulary of this size",
            where=where,
            found=f"{size:,}",
            expected=f"more than the {'stop token' if stops == 1 else f'{stops} stop tokens'} of the target, "
            f"which are always kept, and at most {most:,}, all of its tokens",
        )
    try:
        draft: DraftModel = registry.load("draft", kind)(evolve(options, **{_OPTION: size}), adapter, taps)
    except ConfigError as error:
        raise ConfigError(error.problem, where=where, found=error.found, expected=error.expected) from error
    if draft.vocabulary is not None and size == draft.vocabulary.target_size:
        raise ConfigError(
            "this is the target's whole vocabulary: nothing would be reduced",
            where=where,
            found=f"{size:,}",
            expected=f"fewer than {size:,}",
        )
    draft.embed_tokens.requires_grad_(False)
    draft.lm_head.requires_grad_(False)
    return draft, adapter


def _accepted(run: Run, draft: DraftModel, prompts: int) -> dict[str, Any]:
    options, target = run.file.evaluate, run.target
    task = options.tasks[0]
    asked, _, _ = requests_of(run, task, prompts_of(run, task)[:prompts], thinking=run.file.regenerate.thinking is True)
    longest = max(len(request.prompt_ids) for request in asked)
    decoding = Decoding(
        target=target.model,
        proposer=draft.to(device=target.device, dtype=target.dtype).eval().proposer(),
        sampling=sampling_at(options, 0.0),
        stop_ids=target.architecture.stop_token_ids,
        max_new_tokens=options.max_new_tokens,
        max_length=min(target.architecture.max_positions, longest + options.max_new_tokens),
        batch_size=options.batch_sizes[0],
        plain=False,
        confidence_threshold=0.0,
        stop_text=stop_text(options, target.tokenizer.tokenizer),
    )
    with TemporaryDirectory() as folder:
        groups = evaluate(
            asked, decoding, journal=Path(folder) / "journal.jsonl", prompts_digest="", what="measure the vocabulary"
        )
    return summarise(groups, seed=options.seed)
