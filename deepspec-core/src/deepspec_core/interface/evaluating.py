"""Evaluating a loaded draft from Python: real speculative decoding on tasks, with plain decoding beside it.

Knows how models and tasks become figures; how groups are decoded and pooled is evaluation/'s. Runs with a run file
evaluate in their own stage (pipeline/evaluating.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from attrs import frozen

from deepspec_core.config.schema import HELD_OUT, EvaluateOptions
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.decoding.engine import Request
from deepspec_core.errors import ConfigError, DataError
from deepspec_core.evaluation.evaluator import Decoding, summarise
from deepspec_core.evaluation.evaluator import evaluate as decode_groups
from deepspec_core.evaluation.tasks import load_task
from deepspec_core.interface.models import Draft, Target

DEFAULTS = EvaluateOptions()


@frozen(kw_only=True)
class Evaluation:
    """The figures of one task at one temperature.

    `figures` has what metrics.json of a run has for it: acceptance by position, rounds, seconds by part, tokens per
    second, and with plain decoding the ids of prompts whose greedy outputs differed (`mismatches`, which is empty).
    """

    task: str
    temperature: float
    prompts: int
    accepted_length: float
    speedup: float | None
    figures: dict[str, Any]


def evaluate(
    target: Target,
    draft: Draft,
    tasks: str | Sequence[str],
    *,
    temperature: float | Sequence[float] = 0.0,
    limit: int | None = None,
    max_new_tokens: int = 512,
    batch_size: int = 1,
    plain: bool = True,
    thinking: bool = False,
    system_prompt: str | None = None,
    confidence_threshold: float = 0.0,
    seed: int = DEFAULTS.seed,
) -> list[Evaluation]:
    """Decode the prompts of every task at every temperature; one result each, in that order.

    `tasks` are registered tasks or JSON-lines files with `turns` or `messages`, relative to the working directory.
    Raises DeepSpecError where a task cannot be read or an option is out of range.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    temperatures = [temperature] if isinstance(temperature, int | float) else list(temperature)
    options = _checked(names, temperatures, limit, max_new_tokens, batch_size, confidence_threshold, seed)
    tokenizer = ChatTokenizer(target.tokenizer, thinking=thinking)
    found = []
    for task in options.tasks:
        requests = _requests(target, tokenizer, task, options, system_prompt)
        longest = max(len(request.prompt_ids) for request in requests)
        for value in options.temperature:
            decoding = Decoding(
                target=target.model,
                proposer=draft.model.proposer(),
                sampling=Sampling(temperature=value),
                stop_ids=target.architecture.stop_token_ids,
                max_new_tokens=options.max_new_tokens,
                max_length=min(target.architecture.max_positions, longest + options.max_new_tokens),
                batch_size=options.batch_size,
                plain=plain,
                confidence_threshold=options.confidence_threshold,
            )
            with TemporaryDirectory() as folder:
                groups = decode_groups(
                    requests, decoding, journal=Path(folder) / "journal.jsonl", what=f"evaluate {task} at {value:g}"
                )
            figures = summarise(groups, seed=options.seed)
            found.append(
                Evaluation(
                    task=task,
                    temperature=value,
                    prompts=len(requests),
                    accepted_length=figures["acceptance_length"],
                    speedup=figures.get("speedup"),
                    figures=figures,
                )
            )
    return found


def _checked(
    tasks: list[str],
    temperatures: list[float],
    limit: int | None,
    max_new_tokens: int,
    batch_size: int,
    confidence_threshold: float,
    seed: int,
) -> EvaluateOptions:
    """The options as a run file would hold them, so that the same values are refused."""
    if not tasks or HELD_OUT in tasks:
        raise ConfigError(
            "nothing to evaluate on" if not tasks else "held-out prompts are those of a run's data",
            where="evaluate(tasks=...)",
            found=tasks,
            expected="registered tasks or JSON-lines files",
            fix="For held-out prompts, run the evaluate stage: train(run_file)." if tasks else None,
        )
    try:
        return EvaluateOptions(
            tasks=tuple(tasks),
            temperature=tuple(float(value) for value in temperatures),
            limit=limit,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            confidence_threshold=confidence_threshold,
            seed=seed,
        )
    except (ValueError, TypeError) as error:
        raise ConfigError("an option of the evaluation is out of range", found=error.args[0]) from error


def _requests(
    target: Target, tokenizer: ChatTokenizer, task: str, options: EvaluateOptions, system_prompt: str | None
) -> list[Request]:
    prompts = load_task(
        task, limit=options.limit, seed=options.seed, base=Path.cwd(), registry=target.plugins.registry, held_out=list
    )
    rendered = [
        Request(
            id=prompt.id,
            prompt_ids=tokenizer.render_prompt(prompt.messages, system_prompt, prompt.tools),
            seed=options.seed + prompt.index,
        )
        for prompt in prompts
    ]
    room = target.architecture.max_positions
    fitting = [request for request in rendered if len(request.prompt_ids) < room]
    if not fitting:
        raise DataError("Every prompt of a task is too long for the target", where=task, expected=f"fewer than {room}")
    return fitting
