"""Evaluating a loaded draft from Python: speculative decoding on tasks, with plain decoding beside it.

Knows how models and tasks become figures; evaluation/ decodes the groups of prompts and pools their figures. Runs with
a run file evaluate in their own stage (pipeline/evaluating.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from attrs import field, frozen

from deepspec_core.config.checks import cut_mistakes, no_temperature, samples_mistakes
from deepspec_core.config.schema import HELD_OUT, EvaluateOptions
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.decoding.engine import Request
from deepspec_core.dtypes import dtype_name
from deepspec_core.errors import ConfigError, DataError
from deepspec_core.evaluation.evaluator import evaluate as decode_groups
from deepspec_core.evaluation.evaluator import summarise
from deepspec_core.evaluation.failed_samples import warn_of_failures, with_refused
from deepspec_core.evaluation.group_decoding import Decoding
from deepspec_core.evaluation.requests import Askable, repeated, requests_of_prompts
from deepspec_core.evaluation.sampled import sampling_at, stop_text
from deepspec_core.evaluation.tasks import load_task
from deepspec_core.interface.arguments import flag_of, names_of, path_of
from deepspec_core.interface.generating import check_confidence
from deepspec_core.interface.models import Draft, Target, check_models
from deepspec_core.interface.options import GenerateOptions, checked
from deepspec_core.interface.prompts import Prompt, PromptReader, chat_tokenizer, listed
from deepspec_core.pipeline import threads
from deepspec_core.pipeline.scheduling import Costs, costs_from
from deepspec_core.plugins.exits import no_exit
from deepspec_core.targets.opening import fingerprint

Tasks = str | PathLike[str] | Sequence[str | PathLike[str]] | Mapping[str, Iterable[Prompt]]

DEFAULTS = EvaluateOptions()


@frozen(kw_only=True)
class Evaluation:
    """The figures of one task at one temperature and batch size.

    prompts: The number of prompts decoded.
    prompts_too_long: The number of prompts that were not decoded because they leave the target no room to answer.
    accepted_length: Tokens committed per round, with a 95% interval over prompts; None if there was no round.
    speedup: The speed-up over plain decoding; None without plain decoding.
    mismatches: The ids of prompts whose greedy output differs from plain decoding's; None without plain decoding and
        at temperatures above 0.
    figures: Everything that the metrics.json of a run has for a task: acceptance by position, rounds, seconds by part,
        tokens per second.
    """

    task: str
    temperature: float
    batch_size: int
    prompts: int
    prompts_too_long: int
    accepted_length: float | None
    accepted_length_interval: tuple[float, float] | None
    speedup: float | None
    mismatches: tuple[str, ...] | None
    figures: dict[str, Any] = field(repr=False)


@no_exit()
def evaluate(
    target: Target,
    draft: Draft,
    tasks: Tasks,
    *,
    temperature: float | Sequence[float] = DEFAULTS.temperature,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    samples: int = 1,
    limit: int | None = None,
    max_failures: float = DEFAULTS.max_failures,
    max_new_tokens: int = 512,
    batch_size: int | Sequence[int] = 1,
    plain: bool = True,
    thinking: bool = False,
    system_prompt: str | None = None,
    confidence_threshold: float = 0.0,
    cost_table: str | PathLike[str] | None = None,
    asynchronous: bool = False,
    seed: int = DEFAULTS.seed,
) -> list[Evaluation]:
    """Decode the prompts of every task at every temperature and batch size; one result each, in that order.

    `tasks` are registered tasks, or JSON-lines files with `turns` or `messages`, relative to the working directory; or
    a dictionary of task names and lists of prompts, as `generate` takes them. `limit` is the largest number of prompts
    of each task. Samples that fail are left out of the figures and listed in them, up to the share `max_failures`. With
    a `cost_table` (a file that `deepspec profile` wrote), each round verifies only as many draft tokens as pay off at
    the present load; `asynchronous` is as in [evaluate.scheduler].

    Raises DeepSpecError if more samples fail, if a task or the cost table cannot be read or does not fit, or if an
    option is out of range.
    """
    check_models(target, draft)
    if draft is None:
        raise ConfigError(
            "there is nothing to evaluate without a draft",
            where="the argument `draft`",
            fix="For the target's own answers, use generate(target, None, prompts).",
        )
    own = None
    if isinstance(tasks, Mapping):
        names_of(list(tasks), "tasks")
        own = {name: listed(prompts) for name, prompts in tasks.items()}
    names = [] if own is not None else list(names_of([tasks] if isinstance(tasks, str | PathLike) else tasks, "tasks"))
    options = checked(
        EvaluateOptions,
        {
            "tasks": names,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "stop": stop,
            "samples": samples,
            "limit": limit,
            "max_failures": max_failures,
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "plain": plain,
            "confidence_threshold": confidence_threshold,
            "scheduler": _scheduler(cost_table, asynchronous),
            "seed": seed,
        },
        call="evaluate",
        registry=target.plugins.registry,
    )
    check_confidence(draft, options.confidence_threshold)
    asked = checked(
        GenerateOptions,
        {"thinking": thinking, "system_prompt": system_prompt},
        call="evaluate",
        registry=target.plugins.registry,
    )
    if HELD_OUT in names or not (own or names):
        raise _no_tasks(names)
    if not options.temperature:
        raise no_temperature("the argument `temperature`")
    for mistake in samples_mistakes(options, "the argument `samples`"):
        raise mistake
    costs = _costs(target, draft, options)
    if own is not None:
        reader = PromptReader(target, asked.thinking, asked.system_prompt)
        asked_of = {
            name: Askable(_own_requests(name, prompts, reader, options), 0, ()) for name, prompts in own.items()
        }
    else:
        tokenizer = chat_tokenizer(target, asked.thinking)
        asked_of = {task: _of_task(target, tokenizer, task, options, asked.system_prompt) for task in names}
    return [
        _evaluation(target, draft, task, found, value, size, options, costs)
        for task, found in asked_of.items()
        for value in options.temperature
        for size in options.batch_sizes
    ]


def _evaluation(
    target: Target,
    draft: Draft,
    task: str,
    asked: Askable,
    temperature: float,
    batch_size: int,
    options: EvaluateOptions,
    costs: Costs | None,
) -> Evaluation:
    architecture, (requests, too_long, refused) = target.architecture, asked
    decoding = Decoding(
        target=target.model,
        proposer=draft.proposer() if costs is None else costs.scheduled(draft.proposer()),
        sampling=sampling_at(options, temperature),
        stop_ids=architecture.stop_token_ids,
        max_new_tokens=options.max_new_tokens,
        max_length=min(
            architecture.max_positions,
            max(len(request.prompt_ids) for request in requests) + options.max_new_tokens,
        ),
        batch_size=batch_size,
        plain=options.plain,
        confidence_threshold=options.confidence_threshold,
        stop_text=stop_text(options, target.tokenizer),
    )
    count = threads.for_decoding(architecture, target.model.device, batch_size=batch_size)
    with threads.using(count), TemporaryDirectory() as folder:
        groups = decode_groups(
            # Greedy answers to one prompt are all the same.
            repeated(requests, options.samples if temperature > 0 else 1),
            decoding,
            journal=Path(folder) / "journal.jsonl",
            prompts_digest="",
            what=f"evaluate {task} at temperature {temperature:g}",
            max_failures=options.max_failures,
            refused=len(refused),
        )
    summary = summarise(groups, seed=options.seed, cut=options.confidence_threshold > 0 or costs is not None)
    figures = {
        "batch_size": batch_size,
        **with_refused(summary, refused),
        "prompts_too_long": too_long,
        **({} if costs is None else costs.told()),
    }
    warn_of_failures(f"{task} at temperature {temperature:g}", figures["failures"])
    return Evaluation(
        task=task,
        temperature=temperature,
        batch_size=batch_size,
        prompts=len(requests),
        prompts_too_long=too_long,
        accepted_length=figures["acceptance_length"],
        accepted_length_interval=figures["acceptance_length_interval"],
        speedup=figures.get("speedup"),
        mismatches=tuple(one["id"] for one in figures["mismatches"]) if options.plain and temperature == 0 else None,
        figures=figures,
    )


def _scheduler(cost_table: object, asynchronous: object) -> dict[str, Any] | None:
    asynchronous = flag_of(asynchronous, "asynchronous")
    if cost_table is not None:
        path = path_of(cost_table, "cost_table", expected="a file that `deepspec profile` wrote")
        return {"cost_table": str(path), "asynchronous": asynchronous}
    if asynchronous:
        raise ConfigError(
            "asynchronous is an option of the scheduler, which needs a cost table",
            where="the argument `asynchronous`",
            fix="Give a cost_table.",
        )
    return None


def _costs(target: Target, draft: Draft, options: EvaluateOptions) -> Costs | None:
    """The scheduler's cost table; None without a scheduler. Raises the mistakes that can be known before decoding."""
    if options.scheduler is None:
        return None
    for mistake in cut_mistakes(options):
        raise mistake
    device, most = target.model.device, max(options.batch_sizes)
    return costs_from(
        Path.cwd() / options.scheduler.cost_table,
        asynchronous=options.scheduler.asynchronous,
        target={
            "model": target.name,
            "revision": fingerprint(target.architecture.name, revision=target.revision),
            "dtype": dtype_name(target.model.dtype),
        },
        device=device,
        count=threads.for_decoding(target.architecture, device, batch_size=most),
        batch_sizes=options.batch_sizes,
        gives_confidence=draft.description.gives_confidence,
        max_tokens=draft.description.max_tokens,
        where="the argument `cost_table`",
    )


def _no_tasks(names: Sequence[str]) -> ConfigError:
    return ConfigError(
        "held-out prompts belong to the data of a run" if names else "there are no tasks to evaluate on",
        where="the argument `tasks`",
        found=list(names),
        expected="registered tasks, JSON-lines files, or a dictionary of names and lists of prompts",
        fix='Run the evaluate stage instead: train(run_file, stages=["evaluate"]).' if names else None,
    )


def _own_requests(
    task: str, prompts: Sequence[Prompt], reader: PromptReader, options: EvaluateOptions
) -> list[Request]:
    if not prompts:
        raise DataError("A task has no prompts", where=task, fix="Give a task with at least one prompt.")
    return [
        Request(
            id=f"{task}-{index}", prompt_ids=reader.ids(prompt, f"{task}: prompt {index}"), seed=options.seed + index
        )
        for index, prompt in enumerate(prompts[: options.limit])
    ]


def _of_task(
    target: Target, tokenizer: ChatTokenizer, task: str, options: EvaluateOptions, system_prompt: str | None
) -> Askable:
    prompts = load_task(
        task, limit=options.limit, seed=options.seed, base=Path.cwd(), registry=target.plugins.registry, held_out=list
    )
    return requests_of_prompts(
        prompts,
        tokenizer,
        system_prompt=system_prompt,
        seed=options.seed,
        room=target.architecture.max_positions,
        task=task,
        max_failures=options.max_failures,
    )
