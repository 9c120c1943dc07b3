"""`deepspec evaluate [RUN] --server URL`: makes a run from the command's options; a server answers its tasks.

Knows the command's options and run files. pipeline/evaluating_server.py sends the requests.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from attrs import evolve
from click.core import ParameterSource

from deepspec_core.cli.asked_tasks import tasks_meant
from deepspec_core.cli.evaluate_values import check_values
from deepspec_core.cli.messages import show_messages
from deepspec_core.cli.run_folder import run_folder
from deepspec_core.config.load import RunFile, load_run_file
from deepspec_core.config.paths import no_path
from deepspec_core.config.schema import (
    DataOptions,
    DraftOptions,
    EvaluateOptions,
    RegenerateOptions,
    RunOptions,
    TargetOptions,
)

if TYPE_CHECKING:
    from deepspec_core.pipeline.run import Run
    from deepspec_core.plugins.discovery import Plugins

_GREEDY: Final = (0.0,)
# Options that shape decoding in this process and have no effect on a server.
_OURS: Final = {
    "draft": "--draft",
    "confidence_threshold": "--confidence-threshold",
    "tree_nodes": "--tree-nodes",
    "calibration": "--calibration",
    "cost_table": "--cost-table",
    "asynchronous": "--asynchronous",
    "dtype": "--dtype",
}
# Options of the command that replace the keys of the same names in the run file's [evaluate].
_ASKED: Final = (
    "turns",
    "limit",
    "max_new_tokens",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "stop",
    "samples",
)
_OF_THE_RUN: Final = {"target": "--target", "thinking": "--thinking", "chat_template": "--chat-template"}


def ask_server(context: click.Context, address: str) -> None:
    """Let the server answer, and print the figures."""
    from deepspec_core.evaluation.report import checks, terminal_table
    from deepspec_core.pipeline.evaluating_server import Asked, evaluate_server
    from deepspec_core.plugins.discovery import load_plugins

    show_messages()
    said = {name: value for name, value in context.params.items() if _given(context, name)}
    _refuse(said, _OURS, "has no effect on a server, which has its own draft and settings")
    if said.get("out") is not None and (problem := no_path("--out", said["out"])) is not None:
        raise problem
    plugins = load_plugins(blocked=said.get("blocked", ()))
    place, against = said.get("place"), said.get("against")
    own: Path | None = None if against is None else run_folder(against, said.get("blocked", ()))
    if place is not None:
        _refuse(said, _OF_THE_RUN, "is set by RUN")
        folder = run_folder(place, said.get("blocked", ()))
        run, out = _of_run(Path(place), folder, said, plugins), folder / "served"
        own = own or folder
    else:
        run, out = _of_target(said, plugins), Path("evaluation-served")
    asked = Asked(
        address=address,
        out=Path(said["out"]) if said.get("out") else out,
        own=own,
        required=against is not None,
        served_as=said.get("served_as"),
        api_key_env=said.get("api_key_env"),
        force=said.get("force") is not None,
    )
    report = evaluate_server(run, asked)
    from rich.console import Console

    console = Console(width=None if Console().is_terminal else 160)
    console.print(terminal_table(report))
    for line in checks(report):
        click.echo(line)
    click.echo(f"report: {asked.out / 'report.md'}")


def _given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is not ParameterSource.DEFAULT


def _refuse(said: dict[str, Any], names: dict[str, str], why: str) -> None:
    for name, option in names.items():
        if name in said:
            raise click.UsageError(f"{option} {why}: leave it out with --server.")


def _evaluated(options: EvaluateOptions, said: dict[str, Any], plugins: Plugins, *, has_data: bool) -> EvaluateOptions:
    """The options, with those that the command gives replaced."""
    sizes = said.get("batch_sizes")
    changed: dict[str, Any] = {name: said[name] for name in _ASKED if name in said}
    if sizes:
        changed["batch_size"] = sizes[0] if len(sizes) == 1 else sizes
    changed["temperature"] = said.get("temperatures", _GREEDY)
    check_values(changed, plugins.registry)
    tasks = said.get("tasks") or options.tasks
    return evolve(options, tasks=tasks_meant(tasks, plugins.registry.names("task"), has_data=has_data), **changed)


def _of_run(place: Path, folder: Path, said: dict[str, Any], plugins: Plugins) -> Run:
    from deepspec_core.pipeline.run import Run
    from deepspec_core.pipeline.run_of_folder import run_file_of

    if place.suffix == ".toml":
        file, path = load_run_file(place, plugins=plugins), place
    else:
        file, path = run_file_of(folder, plugins=plugins)
    file = evolve(file, evaluate=_evaluated(file.evaluate, said, plugins, has_data=True))
    return Run(file=file, path=path, plugins=plugins)


def _of_target(said: dict[str, Any], plugins: Plugins) -> Run:
    from deepspec_core.pipeline.run import Run

    if "target" not in said or not said.get("tasks"):
        raise click.UsageError("--server needs RUN, or --target and --task.")
    target = TargetOptions(model=said["target"], layers=(), chat_template=said.get("chat_template"))
    file = RunFile(
        run=RunOptions(name="served", output="evaluation-served", stages=("evaluate",)),
        target=target,
        data=DataOptions(sources=()),
        draft=DraftOptions(type="served", options=None),
        regenerate=RegenerateOptions(thinking=said.get("thinking", False)),
        evaluate=_evaluated(EvaluateOptions(), said, plugins, has_data=False),
    )
    return Run(file=file, path=Path("command line"), plugins=plugins)
