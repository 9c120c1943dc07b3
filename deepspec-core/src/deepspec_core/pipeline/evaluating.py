"""The evaluate stage: the run's draft on every task and temperature, then metrics.json and the report."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from deepspec_core.contracts.draft import DraftDescription
from deepspec_core.contracts.untrained import UntrainedDescription
from deepspec_core.data.thinking import modes
from deepspec_core.decoding.calibrated import CalibratedProposer
from deepspec_core.decoding.engine import Completion, Request
from deepspec_core.errors import CheckpointError, ConfigError, DataError
from deepspec_core.evaluation.calibration_file import Calibration, read_calibration
from deepspec_core.evaluation.comparison import Run as Evaluated
from deepspec_core.evaluation.evaluator import evaluate, summarise
from deepspec_core.evaluation.failed_samples import warn_of_failures, with_refused
from deepspec_core.evaluation.group_decoding import Decoding, Group
from deepspec_core.evaluation.metrics_file import NAME as METRICS
from deepspec_core.evaluation.metrics_file import VERSION, write_metrics
from deepspec_core.evaluation.report import markdown
from deepspec_core.evaluation.requests import Askable, repeated, requests_of_prompts
from deepspec_core.evaluation.sampled import sampling_at, stop_text, told
from deepspec_core.evaluation.tasks import HELD_OUT_QUOTA, Prompt, load_task, task_digest, task_label, task_name
from deepspec_core.evaluation.turns import LaterTurns
from deepspec_core.pipeline import contents, workers
from deepspec_core.pipeline.evaluated_draft import EvaluatedDraft, load_evaluated
from deepspec_core.pipeline.machine import machine_of
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.scheduling import Costs, costs_of
from deepspec_core.plugins.notices import notify
from deepspec_core.reporting.page import NAME as PAGE
from deepspec_core.reporting.page import shown, write_page
from deepspec_core.reporting.samples import NAME as SAMPLES
from deepspec_core.reporting.samples import sample_of, write_samples

log = logging.getLogger("deepspec")


def run_stage(run: Run) -> dict[str, Any]:
    """Evaluate. Finished groups of prompts of an interrupted evaluation are kept."""
    options = run.file.evaluate
    draft = load_evaluated(run)
    calibration = calibration_of(run, draft.description, draft.revision)
    costs = costs_of(run, draft.description.gives_confidence, draft.description.max_tokens)
    cut = options.confidence_threshold > 0 or costs is not None
    journal_names = journals(options.tasks)
    crew = workers.crew()
    results, samples = [], []
    for task, thinking in product(options.tasks, modes(run.file.regenerate.thinking)):
        prompts = prompts_of(run, task)
        asked, too_long, refused = requests_of(run, task, prompts, thinking=thinking)
        later = later_turns(run, prompts, thinking=thinking)
        digest = digest_of(asked, later)
        both = not isinstance(run.file.regenerate.thinking, bool)
        known = crew.first and _known(calibration, digest, f"{task_label(task)}{_mode(both, thinking)}")
        for temperature, batch_size in product(options.temperature, options.batch_sizes):
            # Greedy answers to one prompt are all the same.
            requests = repeated(asked, options.samples if temperature > 0 else 1)
            decoding = _decoding(run, draft, calibration, costs, requests, later, temperature, batch_size)
            groups = evaluate(
                requests,
                decoding,
                journal=_journal(run, journal_names[task], temperature, thinking, batch_size),
                prompts_digest=digest,
                what=f"evaluate {task} at temperature {temperature:g}{_mode(both, thinking)}{_size(run, batch_size)}",
                machine=machine_of(run.target.device),
                crew=crew,
                max_failures=options.max_failures,
                refused=len(refused),
            )
            if not crew.first:
                continue
            summary = with_refused(summarise(groups, seed=options.seed, cut=cut), refused)
            warn_of_failures(f"{task_label(task)} at temperature {temperature:g}", summary["failures"])
            about = {"task": task_label(task), "temperature": temperature, **({"thinking": thinking} if both else {})}
            if batch_size == options.batch_sizes[0]:
                samples.append({**about, **sample_of(_first_answer(groups), run.target.tokenizer.decode)})
            results.append(
                {
                    **about,
                    "batch_size": batch_size,
                    **summary,
                    "prompts_too_long": too_long,
                    **({} if later is None else {"turns_not_asked": _not_asked(requests, groups, later)}),
                    "prompts_digest": digest,
                    **({} if calibration is None else {"calibration_fitted_here": known}),
                }
            )
    if not crew.first:
        return {}
    report = _report(run, draft, calibration, costs, results)
    write_metrics(run.folder / METRICS, report)
    _write(run.folder / "report.md", markdown(report))
    write_samples(run.stage_folder("evaluate") / SAMPLES, samples)
    _write_page(run.folder, report)
    notify(run.plugins.manager, "deepspec_evaluation_finished", run=run, report=report)
    return {f"accepted length on {_about(run, result)}": _length(result) for result in results}


def _length(result: Mapping[str, Any]) -> float | str:
    length = result["acceptance_length"]
    return "unknown (no rounds)" if length is None else round(length, 3)


def _first_answer(groups: Sequence[Group]) -> Completion:
    return next(completion for group in groups for completion in group.completions)


def _about(run: Run, result: Mapping[str, Any]) -> str:
    mode = _mode("thinking" in result, result.get("thinking", False))
    return f"{result['task']} at T={result['temperature']:g}{mode}{_size(run, result['batch_size'])}"


def journal_files(run: Run) -> list[Path]:
    """The journals of an evaluation, one for each task, temperature, mode and batch size."""
    options = run.file.evaluate
    both = modes(run.file.regenerate.thinking)
    several = product(journals(options.tasks).values(), options.temperature, both, options.batch_sizes)
    return [_journal(run, *one) for one in several]


def _journal(run: Run, name: str, temperature: float, thinking: bool, batch_size: int) -> Path:
    both = not isinstance(run.file.regenerate.thinking, bool)
    apart = batch_size if len(run.file.evaluate.batch_sizes) > 1 else None
    return run.stage_folder("evaluate") / _journal_name(name, temperature, both and thinking, apart)


def journal_of(folder: Path, result: Mapping[str, Any]) -> Path:
    """The journal of one of the results of metrics.json, in a run's folder."""
    about = (_file_name(result["task"]), result["temperature"], result.get("thinking", False))
    apart = folder / "evaluate" / _journal_name(*about, result.get("batch_size"))
    # If there is only one batch size, file names do not contain it.
    return apart if apart.is_file() else folder / "evaluate" / _journal_name(*about, None)


def _journal_name(name: str, temperature: float, thinking: bool, batch_size: int | None) -> str:
    size = "" if batch_size is None else f"-b{batch_size}"
    return f"{name}-t{_exact(temperature)}{'-thinking' if thinking else ''}{size}.jsonl"


def _size(run: Run, batch_size: int) -> str:
    """The batch size in words, where there are several."""
    return f", batch {batch_size}" if len(run.file.evaluate.batch_sizes) > 1 else ""


def _mode(both: bool, thinking: bool) -> str:
    """The mode in words, where results of both stand side by side."""
    return "" if not both else " with thinking" if thinking else " without thinking"


def _exact(temperature: float) -> str:
    """A temperature as part of a file's name, so that no two share one."""
    return repr(float(temperature)).removesuffix(".0")


def journals(tasks: Sequence[str]) -> dict[str, str]:
    """The name of each task's files. Raises DataError if two tasks would have the same."""
    names = {task: _file_name(task) for task in tasks}
    shared = [task for task, name in names.items() if list(names.values()).count(name) > 1]
    if shared or len(names) < len(tasks):
        raise DataError(
            "Two tasks would write the same file of results",
            where="evaluate.tasks",
            found=", ".join(shared or tasks),
            fix="Name each task once, and give files different names.",
        )
    return names


def _file_name(task: str) -> str:
    return re.sub(r"[^\w.-]", "_", task_name(task))


def prompts_of(run: Run, task: str) -> list[Prompt]:
    """The prompts of a task. Raises DataError if it cannot be read."""
    options = run.file.evaluate
    if (digest := task_digest(task, base=run.base)) is not None:
        run.reads.content(contents.task(task), digest)
    return load_task(
        task,
        limit=options.limit,
        seed=options.seed,
        base=run.base,
        registry=run.plugins.registry,
        held_out=lambda: run.data.held_out(options.limit or HELD_OUT_QUOTA),
    )


def requests_of(run: Run, task: str, prompts: Sequence[Prompt], *, thinking: bool) -> Askable:
    """The first turns of a task's prompts in one mode, and those that are too long or that the template refuses.

    Raises DataError if no prompt is left, or the template refuses more than evaluate.max_failures.
    """
    return requests_of_prompts(
        prompts,
        run.target.tokenizer.in_mode(thinking),
        system_prompt=run.file.data.system_prompt,
        seed=run.file.evaluate.seed,
        room=run.target.architecture.max_positions,
        task=f"evaluate.tasks: {task}",
        max_failures=run.file.evaluate.max_failures,
    )


def later_turns(run: Run, prompts: Sequence[Prompt], *, thinking: bool) -> LaterTurns | None:
    """The turns after the first, where they are asked."""
    if run.file.evaluate.turns == "first":
        return None
    return LaterTurns(
        prompts={prompt.id: prompt for prompt in prompts},
        tokenizer=run.target.tokenizer.in_mode(thinking),
        system_prompt=run.file.data.system_prompt,
        stop_ids=run.target.architecture.stop_token_ids,
        positions=run.target.architecture.max_positions,
        seed=run.file.evaluate.seed,
        stop_text=stop_text(run.file.evaluate, run.target.tokenizer.tokenizer),
    )


def _not_asked(requests: Sequence[Request], groups: Sequence[Group], later: LaterTurns) -> int:
    """The number of later turns that did not fit, or whose preceding answer the template refuses."""
    failed = {one.id for group in groups for one in group.failures}
    turns = sum(1 + later.number(request.id) for request in requests if request.id not in failed)
    return turns - sum(len(group.completions) for group in groups)


def digest_of(requests: Sequence[Request], later: LaterTurns | None) -> str:
    """The digest of the prompts. It is the same for equal prompts, whatever the task is called."""
    asked: list[Any] = [request.prompt_ids for request in requests]
    if later is not None:
        asked += [later.prompts[request.id].later for request in requests]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def calibration_of(run: Run, draft: DraftDescription | UntrainedDescription, revision: str) -> Calibration | None:
    """What [evaluate] calibration names, for the draft with this digest; None if it names nothing.

    Raises CheckpointError if the draft gives no confidence, or the file is missing, edited or of another draft.
    """
    named = run.file.evaluate.calibration
    if named is None:
        return None
    if draft.gives_confidence is False:
        raise CheckpointError(
            "this draft gives no confidence to calibrate",
            where="[evaluate] calibration",
            found=f"a {draft.algorithm} draft",
            expected="a draft with a confidence head, or no calibration",
        )
    found = read_calibration(run.base / named, draft_revision=revision, positions=draft.max_tokens)
    run.reads.content(contents.CALIBRATION, found.digest)
    return found


def _known(calibration: Calibration | None, digest: str, what: str) -> bool:
    """Whether the calibration was fitted on the prompts with this digest. That is a warning."""
    known = calibration is not None and digest in calibration.prompts
    if known:
        log.warning(
            "%s: the calibration was fitted on these same prompts. Confidences look better here than on others. Fit on "
            "another task: deepspec calibrate RUN --task",
            what,
        )
    return known


def _decoding(
    run: Run,
    draft: EvaluatedDraft,
    calibration: Calibration | None,
    costs: Costs | None,
    requests: Sequence[Request],
    later: LaterTurns | None,
    temperature: float,
    batch_size: int,
) -> Decoding:
    options, architecture = run.file.evaluate, run.target.architecture
    longest = max(len(request.prompt_ids) for request in requests)
    proposer = draft.proposer()
    if calibration is not None:
        proposer = CalibratedProposer(proposer, calibration.temperatures)
    if costs is not None:
        proposer = costs.scheduled(proposer)
    return Decoding(
        target=run.target.model,
        proposer=proposer,
        sampling=sampling_at(options, temperature),
        stop_ids=architecture.stop_token_ids,
        max_new_tokens=options.max_new_tokens,
        max_length=min(architecture.max_positions, longest + options.max_new_tokens),
        batch_size=batch_size,
        plain=options.plain,
        confidence_threshold=options.confidence_threshold,
        stop_text=stop_text(options, run.target.tokenizer.tokenizer),
        later=later,
    )


def _report(
    run: Run,
    draft: EvaluatedDraft,
    calibration: Calibration | None,
    costs: Costs | None,
    results: list[dict[str, Any]],
) -> dict[str, Any]:
    description, sizes, architecture = draft.description, draft.parameters, run.target.architecture
    return {
        "version": VERSION,
        "run": run.file.run.name,
        "draft": {
            "algorithm": description.algorithm,
            "checkpoint": draft.checkpoint,
            "revision": draft.revision,
            "calibration": None if calibration is None else calibration.digest,
            "parameters": sizes.trained + sizes.frozen,
            "trainable_parameters": sizes.trained,
            "parameter_bytes": (sizes.trained + sizes.frozen) * run.target.dtype.itemsize,
            "num_layers": description.num_layers,
            "max_tokens": description.max_tokens,
            "taps": list(draft.proposer().taps),
        },
        "target": {
            "model": run.file.target.model,
            "revision": run.target.fingerprint(),
            "num_layers": architecture.num_layers,
            "dtype": str(run.target.dtype).removeprefix("torch."),
        },
        "settings": {
            "turns": run.file.evaluate.turns,
            "max_new_tokens": run.file.evaluate.max_new_tokens,
            "seed": run.file.evaluate.seed,
            "confidence_threshold": run.file.evaluate.confidence_threshold,
            **told(run.file.evaluate),
            **({} if costs is None else costs.told()),
            **({"tree_nodes": run.file.draft.tree.nodes} if run.file.draft.tree is not None else {}),
            "system_prompt": run.file.data.system_prompt,
            "thinking": run.file.regenerate.thinking,
        },
        "machine": machine_of(run.target.device),
        "plugins": run.plugins.versions(),
        "results": results,
    }


def _write_page(folder: Path, report: dict[str, Any]) -> None:
    try:
        write_page(folder / PAGE, [shown(folder, Evaluated(label=report["run"], report=report))])
    except ConfigError as error:  # there is no library that draws
        log.warning("%s is left out: %s", PAGE, error)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
