"""`deepspec evaluate --server`: a running server answers the tasks of a run or of a command, and its rounds are
counted.

Knows a run's target, prompts and recorded evaluation. servers/ sends the requests; evaluation/served.py interprets the
counters.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Final

from attrs import evolve, frozen

from deepspec_core.data.thinking import modes
from deepspec_core.decoding.engine import Completion, Request
from deepspec_core.disk import full_disk_is_an_error
from deepspec_core.errors import ConfigError, StageError
from deepspec_core.evaluation.agreement import Agreement, agreement
from deepspec_core.evaluation.evaluator import recorded
from deepspec_core.evaluation.failed_samples import failures_of, warn_of_failures
from deepspec_core.evaluation.group_decoding import Failure
from deepspec_core.evaluation.metrics_file import NAME as METRICS
from deepspec_core.evaluation.metrics_file import VERSION, read_metrics, write_metrics
from deepspec_core.evaluation.report import markdown
from deepspec_core.evaluation.requests import repeated
from deepspec_core.evaluation.sampled import sampling_at, told
from deepspec_core.evaluation.served import figures
from deepspec_core.evaluation.tasks import task_label
from deepspec_core.evaluation.turns import LaterTurns
from deepspec_core.locks import lock
from deepspec_core.pipeline.asking_server import address_of, wanted_of
from deepspec_core.pipeline.evaluating import digest_of, journal_of, journals, later_turns, prompts_of, requests_of
from deepspec_core.pipeline.machine import machine_of
from deepspec_core.pipeline.run import Run
from deepspec_core.progress import Progress
from deepspec_core.servers.measuring import Measured, Server

log = logging.getLogger("deepspec")

ANSWERS: Final = "answers.jsonl"


@frozen(kw_only=True)
class Asked:
    """What the command says beside the run.

    out: The folder of results. own: The folder whose recorded outputs are compared; None: none. Those of an `own` that
    is not `required` may be missing. served_as: The server's name of the target, if it is another one.
    """

    address: str
    out: Path
    own: Path | None = None
    required: bool = False
    served_as: str | None = None
    api_key_env: str | None = None
    timeout: float = 1800.0
    force: bool = False


@frozen(kw_only=True)
class _Pass:
    """The prompts of one task in one mode."""

    task: str
    thinking: bool
    requests: tuple[Request, ...]
    later: LaterTurns | None
    too_long: int
    refused: tuple[Failure, ...]
    digest: str


@frozen(kw_only=True)
class _Recordings:
    """The report of a run's own evaluation, and its greedy answers by task and mode."""

    report: dict[str, Any]
    completions: dict[tuple[str, bool], list[Completion]]

    def has(self, one: _Pass) -> bool:
        """Whether a prompt that is asked has an answer here."""
        own = {(done.id, done.prompt_ids) for done in self.completions[_key(one)]}
        return any((request.id, request.prompt_ids) in own for request in one.requests)

    def beside(self, one: _Pass, measured: Measured, limit: int) -> Agreement | None:
        """How the recorded answers compare with the server's, which have at most `limit` tokens."""
        return agreement(
            measured.completions,
            self.completions[_key(one)],
            run=str(self.report["run"]),
            draft_revision=self.report["draft"].get("revision"),
            limits=(limit, int(self.report["settings"]["max_new_tokens"])),
        )


def evaluate_server(run: Run, asked: Asked) -> dict[str, Any]:
    """Let the server answer all tasks at all temperatures and batch sizes. Write metrics.json, report.md, answers.

    Raises DeepSpecError if it cannot be done; nothing is written then. It is raised before the first request if
    possible.
    """
    options = run.file.evaluate
    journals(options.tasks)
    if options.stop:
        raise ConfigError(
            "Stop strings cannot be used with a server",
            where="evaluate.stop",
            found=", ".join(map(repr, options.stop)),
            expected="no stop strings with --server: servers differ in whether an answer's ids include their tokens",
            fix="Leave evaluate.stop out of the run file that --server reads, and --stop out of the command.",
        )
    asked = evolve(asked, address=address_of(asked.address))
    _require_free(asked)
    passes = [_pass(run, task, mode) for task, mode in product(options.tasks, modes(run.file.regenerate.thinking))]
    for one in passes:
        warn_of_failures(task_label(one.task), failures_of(one.refused))
    own = _recordings(run, asked, passes)
    wanted = wanted_of(
        run,
        [request for one in passes for request in one.requests],
        # Whatever is drawn at all is asked with these settings later: a server must take them.
        sampling=sampling_at(options, max(options.temperature)),
        max_new_tokens=options.max_new_tokens,
        whole_context=options.turns != "first",
        served_as=asked.served_as,
        api_key_env=asked.api_key_env,
        timeout=asked.timeout,
    )
    with (
        lock(
            asked.out,
            problem="Another process is writing to this folder",
            fix="Wait for it, or choose another folder with --out.",
        ),
        Server(address=asked.address, wanted=wanted) as server,
    ):
        _require_free(asked)  # another process may have finished meanwhile
        results, answers = [], []
        for one, temperature, batch_size in product(passes, options.temperature, options.batch_sizes):
            # Greedy answers to one prompt are all the same.
            samples = options.samples if temperature > 0 else 1
            one = evolve(one, requests=tuple(repeated(one.requests, samples)))
            about = _about(run, one, temperature, batch_size)
            what = f"ask {server.engine.name} {one.task} at temperature {temperature:g}"
            with Progress(len(one.requests), what, "prompts") as progress:
                measured = server.measure(
                    one.requests,
                    at_once=batch_size,
                    wanted=evolve(wanted, sampling=sampling_at(options, temperature)),
                    following=_no_turn if one.later is None else one.later.next,
                    done=progress.advance,
                )
            _warn(measured, about)
            beside = own.beside(one, measured, options.max_new_tokens) if own and temperature == 0 else None
            results.append(_result(about, measured, one, beside))
            answers += [{**about, **answer} for answer in _answers(measured.completions)]
        report = _report(run, server, asked, results)
        _write(asked.out, report, answers)
    return report


def _require_free(asked: Asked) -> None:
    """Raise StageError if there are results that must not be discarded. Results of this engine are never discarded."""
    try:
        there = read_metrics(asked.out / METRICS)
    except FileNotFoundError:
        return
    fix = "Choose another folder with --out"
    if "server" not in there:
        raise StageError("The server's results would replace those of this engine", where=asked.out, fix=f"{fix}.")
    if not asked.force:
        raise StageError(
            "There are results in this folder already",
            where=asked.out,
            fix=f"{fix}, or discard them with --force evaluate.",
        )


def _recordings(run: Run, asked: Asked, passes: Sequence[_Pass]) -> _Recordings | None:
    """The greedy answers that were recorded for these prompts; None where there are none and none are required."""
    if asked.own is None:
        return None
    try:
        report = read_metrics(asked.own / METRICS)
    except FileNotFoundError:
        if not asked.required:
            return None
        raise StageError(
            "There is no evaluation in this folder",
            where=asked.own,
            expected=f"a run's folder with {METRICS}, or its run file",
            fix="Run its evaluate stage first.",
        ) from None
    if "server" in report:
        raise ConfigError("these are the results of a server, not of this engine", where=asked.own / METRICS)
    theirs, ours = report["target"].get("revision"), run.target.fingerprint()
    if theirs != ours:
        raise ConfigError(
            "The recorded outputs are those of another target",
            where=asked.own / METRICS,
            found=f"revision {str(theirs)[:12]}",
            expected=f"{ours[:12]}, that of {run.file.target.model}",
            fix="Evaluate again with --force evaluate, or compare with another run in --against.",
        )
    found = _Recordings(report=report, completions={key: _greedy(asked.own, report, *key) for key in map(_key, passes)})
    options, settings = run.file.evaluate, report["settings"]
    alike = settings.get("repetition_penalty", 1.0) == options.repetition_penalty and not settings.get("stop")
    comparable = alike and 0.0 in options.temperature and any(found.has(one) for one in passes)
    if asked.required and not comparable:
        raise ConfigError(
            "There is no answer to compare with",
            where=asked.own,
            found="no recorded greedy answer to any of the prompts that the server answers greedily",
            expected="an evaluation at temperature 0 of the same tasks with the same penalty and without stop strings, "
            "and --temperature 0 here",
            fix="Evaluate it with evaluate.temperature = [0.0], or leave --against out.",
        )
    return found if comparable else None


def _key(one: _Pass) -> tuple[str, bool]:
    return task_label(one.task), one.thinking


def _greedy(folder: Path, report: dict[str, Any], task: str, thinking: bool) -> list[Completion]:
    for result in report["results"]:
        if result["temperature"] == 0 and result["task"] == task and result.get("thinking", thinking) == thinking:
            _, groups = recorded(journal_of(folder, result))
            return [done for group in groups for done in group.completions]
    return []


def _pass(run: Run, task: str, thinking: bool) -> _Pass:
    prompts = prompts_of(run, task)
    requests, too_long, refused = requests_of(run, task, prompts, thinking=thinking)
    later = later_turns(run, prompts, thinking=thinking)
    return _Pass(
        task=task,
        thinking=thinking,
        requests=tuple(requests),
        later=later,
        too_long=too_long,
        refused=refused,
        digest=digest_of(requests, later),
    )


def _about(run: Run, one: _Pass, temperature: float, batch_size: int) -> dict[str, Any]:
    mode = {} if isinstance(run.file.regenerate.thinking, bool) else {"thinking": one.thinking}
    return {"task": task_label(one.task), "temperature": temperature, **mode, "batch_size": batch_size}


def _no_turn(_identity: str, _answers: Sequence[Completion]) -> None:
    return None


def _warn(measured: Measured, about: dict[str, Any]) -> None:
    name = f"{about['task']} at temperature {about['temperature']:g}"
    if measured.disturbed:
        log.warning(
            "%s: the server counted %s generated tokens, but its answers have %s: other clients "
            "used it too. Its rounds "
            "are left out, and its speed includes the other work.",
            name,
            f"{measured.by_counters:,}",
            f"{measured.counted:,}",
        )
    if measured.disturbed is None:
        log.warning(
            "%s: the server shows no counters, so work for other clients at the same time would go unnoticed", name
        )
    if measured.mismatched:
        log.warning(
            "%s: %d answers were received as text, and have another number of tokens than the server counted",
            name,
            measured.mismatched,
        )


def _result(about: dict[str, Any], measured: Measured, one: _Pass, beside: Agreement | None) -> dict[str, Any]:
    turns = 0 if one.later is None else sum(1 + one.later.number(request.id) for request in one.requests)
    return {
        **about,
        **figures(measured),
        "failures": failures_of(one.refused),
        "prompts_too_long": one.too_long,
        **({} if one.later is None else {"turns_not_asked": turns - len(measured.completions)}),
        "prompts_digest": one.digest,
        "against": None if beside is None else beside.as_json(),
    }


def _answers(completions: Sequence[Completion]) -> Iterator[dict[str, Any]]:
    for done in completions:
        yield {
            "id": done.id,
            "prompt_ids": done.prompt_ids,
            "output_ids": done.output_ids,
            "finish_reason": done.finish_reason,
        }


def _report(run: Run, server: Server, asked: Asked, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Facts about draft and weights that the server does not report are None."""
    options = run.file.evaluate
    longest = max((len(result["marginal"] or ()) for result in results), default=0)
    names = ("algorithm", "checkpoint", "revision", "calibration", "parameters", "trainable_parameters")
    draft = dict.fromkeys((*names, "parameter_bytes", "num_layers", "max_tokens", "taps"))
    ours = machine_of(run.target.device)
    return {
        "version": VERSION,
        "run": run.file.run.name,
        "server": {
            "address": asked.address,
            "engine": server.engine.name,
            "model": server.served.model,
            "returns_token_ids": server.served.exact,
        },
        "draft": {**draft, "max_tokens": longest or None},
        "target": {"model": run.file.target.model, "revision": None, "num_layers": None, "dtype": None},
        "settings": {
            "turns": options.turns,
            "max_new_tokens": options.max_new_tokens,
            "seed": options.seed,
            "confidence_threshold": None,
            **told(options),
            "system_prompt": run.file.data.system_prompt,
            "thinking": run.file.regenerate.thinking,
        },
        "machine": {**dict.fromkeys(ours), "deepspec-core": ours["deepspec-core"]},
        "plugins": run.plugins.versions(),
        "results": results,
    }


def _write(out: Path, report: dict[str, Any], answers: Sequence[dict[str, Any]]) -> None:
    with full_disk_is_an_error(out):
        # metrics.json means that the other files are complete, so it is removed first and written last.
        (out / METRICS).unlink(missing_ok=True)
        _put(out / ANSWERS, lambda: "".join(json.dumps(answer) + "\n" for answer in answers))
        _put(out / "report.md", lambda: markdown(report))
        write_metrics(out / METRICS, report)


def _put(path: Path, text: Callable[[], str]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text(), encoding="utf-8")
    os.replace(partial, path)
