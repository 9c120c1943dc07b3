"""`deepspec evaluate --draft DRAFT --target MODEL --task TASK`: evaluate a draft without a run file.

Makes a run file from the command's options and gives it to the evaluate stage. With --server, a running server answers
instead (evaluate_server.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from attrs import evolve

from deepspec_core.cli.asked_tasks import tasks_meant
from deepspec_core.cli.evaluate_values import check_values
from deepspec_core.cli.messages import show_messages
from deepspec_core.cli.options import no_plugin, sampling
from deepspec_core.config.load import RunFile
from deepspec_core.config.paths import no_path
from deepspec_core.config.schema import (
    DTYPES,
    MOST_NODES,
    DataOptions,
    DraftOptions,
    EvaluateOptions,
    RegenerateOptions,
    RunOptions,
    SchedulerOptions,
    TargetOptions,
    TreeOptions,
)
from deepspec_core.layers.options import LayerOptions

if TYPE_CHECKING:
    from deepspec_core.plugins.discovery import Plugins

DEFAULTS = EvaluateOptions()


@click.command()
@click.argument("place", metavar="[RUN]", required=False)
@click.option(
    "--draft",
    metavar="DRAFT",
    help="A checkpoint (directory or Hub id), or a draft that is not trained: TYPE, TYPE:VALUE or TYPE:key=value,...",
)
@click.option("--target", metavar="MODEL", help="The draft's target: a directory, a Hub id, or builtin:NAME.")
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="TASK",
    help="A registered task; a file with `turns` or `messages`; NAME:FILE, a registered task with prompts from a file; "
    "or `all` registered tasks. Repeatable.",
)
@click.option(
    "--temperature",
    "temperatures",
    type=click.FloatRange(min=0),
    multiple=True,
    default=DEFAULTS.temperature,
    show_default=True,
    help="The sampling temperature; 0 is greedy. Repeatable: each is evaluated.",
)
@sampling
@click.option(
    "--samples",
    type=click.IntRange(1, 2**16),
    default=DEFAULTS.samples,
    show_default=True,
    help="The number of answers to each prompt, at temperatures above 0.",
)
@click.option(
    "--turns",
    type=click.Choice(["first", "all"]),
    default=DEFAULTS.turns,
    show_default=True,
    help="The user turns to ask: the first of each prompt, or all, with the model's own answers in between.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="The most prompts of each task. Default: the number that the task sets, or all.",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=DEFAULTS.max_new_tokens, show_default=True)
@click.option(
    "--batch-size",
    "batch_sizes",
    type=click.IntRange(min=1),
    multiple=True,
    default=DEFAULTS.batch_sizes,
    show_default=True,
    help="The number of sequences decoded at once. Repeatable: each is evaluated.",
)
@click.option(
    "--confidence-threshold",
    type=click.FloatRange(0, 1),
    default=DEFAULTS.confidence_threshold,
    show_default=True,
    help="End a proposal before its first token whose confidence is below this.",
)
@click.option(
    "--tree-nodes", type=click.IntRange(1, MOST_NODES), help="Propose trees of at most this many tokens, not chains."
)
@click.option("--calibration", metavar="FILE", help="The file that `deepspec calibrate` wrote for this draft.")
@click.option(
    "--cost-table",
    metavar="FILE",
    help="In each round, verify only as many tokens as pay off by this cost table of the target, which "
    "`deepspec profile` wrote (Algorithm 1).",
)
@click.option(
    "--asynchronous",
    is_flag=True,
    help="With --cost-table: choose the number of tokens from the confidences of two rounds earlier.",
)
@click.option("--thinking", is_flag=True, help="Ask in the target's thinking mode.")
@click.option("--chat-template", metavar="FILE", help="A Jinja file in place of the target's own chat template.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Default: float32 on CPU, bfloat16 elsewhere.")
@click.option("--out", metavar="DIR", help="The folder for results. Default: evaluation-NAME, after the draft.")
@click.option("--force", type=click.Choice(["evaluate"]), help="Discard the results in --out first.")
@click.option(
    "--server",
    metavar="URL",
    help="Let this vLLM, llama.cpp or SGLang server answer: the tasks of RUN, or those of --task for --target.",
)
@click.option("--served-as", metavar="NAME", help="The target's model name on the server, if it differs.")
@click.option("--api-key-env", metavar="NAME", help="The environment variable that holds the server's API key.")
@click.option(
    "--against",
    metavar="RUN",
    help="With --server: compare its greedy answers with those of this run's evaluation. Default: RUN's own, if any.",
)
@no_plugin
@click.pass_context
def evaluate(
    context: click.Context,
    place: str | None,
    draft: str | None,
    target: str | None,
    tasks: tuple[str, ...],
    temperatures: tuple[float, ...],
    top_p: float,
    top_k: int,
    min_p: float,
    repetition_penalty: float,
    stop: tuple[str, ...],
    samples: int,
    turns: str,
    limit: int | None,
    max_new_tokens: int,
    batch_sizes: tuple[int, ...],
    confidence_threshold: float,
    tree_nodes: int | None,
    calibration: str | None,
    cost_table: str | None,
    asynchronous: bool,
    thinking: bool,
    chat_template: str | None,
    dtype: str | None,
    out: str | None,
    force: str | None,
    server: str | None,
    served_as: str | None,
    api_key_env: str | None,
    against: str | None,
    blocked: tuple[str, ...],
) -> None:
    """Evaluate a draft beside plain decoding of its target, or evaluate a server with the draft that it serves.

    The checkpoint's algorithm, options and tapped layers are read from its config.json. If the command is interrupted,
    run it again: it continues where it stopped.

    With --server, RUN is a run's folder or its run file. Its tasks and settings apply where the command gives none.
    Without RUN, --target and --task are required. Decoding is greedy unless --temperature is given. Results go to
    --out, by default to `served` in RUN's folder, or to `evaluation-served` without RUN.
    """
    if server is not None:
        from deepspec_core.cli.evaluate_server import ask_server

        return ask_server(context, server)
    for name, value in (("RUN", place), ("--served-as", served_as), ("--api-key-env", api_key_env)):
        if value is not None:
            raise click.UsageError(f"{name} needs --server. To evaluate a run file, use `deepspec run`.")
    if against is not None:
        raise click.UsageError("--against needs --server. To compare evaluations, use `deepspec report`.")
    if asynchronous and cost_table is None:
        raise click.UsageError("--asynchronous needs --cost-table.")
    if draft is None or target is None or not tasks:
        raise click.UsageError("Give --draft, --target and --task, or --server.")
    from deepspec_core.plugins.discovery import load_plugins
    from deepspec_core.untrained.named import untrained_of

    if out is not None and (problem := no_path("--out", out)) is not None:
        raise problem
    plugins = load_plugins(blocked=blocked)
    said: dict[str, Any] = {
        "turns": turns,
        "temperature": temperatures,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop,
        "samples": samples,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_sizes[0] if len(batch_sizes) == 1 else batch_sizes,
        "limit": limit,
        "confidence_threshold": confidence_threshold,
    }
    check_values(said, plugins.registry)
    untrained = untrained_of(draft, base=Path(), registry=plugins.registry, where="--draft")
    name = re.sub(r"[^\w.-]", "_", Path(draft).resolve().name if untrained is None else draft)
    scheduler = None if cost_table is None else SchedulerOptions(cost_table=cost_table, asynchronous=asynchronous)
    run_options = RunOptions(name=name, output=out or f"evaluation-{name}", stages=("evaluate",))
    evaluated = EvaluateOptions(
        **said,
        tasks=tasks_meant(tasks, plugins.registry.names("task")),
        draft=draft if untrained is None else None,
        calibration=calibration,
        scheduler=scheduler,
    )
    asked = TargetOptions(model=target, layers=(), dtype=dtype, chat_template=chat_template)
    if untrained is None:
        file = _run_file(run_options, asked, thinking, evaluated, plugins)
    else:
        file = RunFile(
            run=run_options,
            target=asked,
            data=DataOptions(sources=()),
            draft=untrained,
            regenerate=RegenerateOptions(thinking=thinking),
            evaluate=evaluated,
        )
    if tree_nodes is not None:
        file = evolve(file, draft=evolve(file.draft, tree=TreeOptions(nodes=tree_nodes)))
    return _execute(file, plugins, [force] if force else [])


def _run_file(
    run: RunOptions, target: TargetOptions, thinking: bool, evaluated: EvaluateOptions, plugins: Plugins
) -> RunFile:
    from deepspec_core.checkpoints.opening import resolve_draft
    from deepspec_core.checkpoints.published import CONFIG, read_draft_config, read_options
    from deepspec_core.errors import CheckpointError

    assert evaluated.draft is not None
    directory = resolve_draft(evaluated.draft, base=Path())
    algorithm, options, taps = read_options(directory, plugins.registry)
    # Targets without dense layers require this key; the draft itself is built from its own config.json.
    config = read_draft_config(directory)
    try:
        layer = LayerOptions(intermediate_size=config.get("intermediate_size"))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{CONFIG} cannot be used", where=f"{directory / CONFIG}: intermediate_size", found=error
        ) from None
    return RunFile(
        run=run,
        target=evolve(target, layers=taps),
        data=DataOptions(sources=()),
        draft=DraftOptions(type=algorithm, options=options, layer=layer),
        regenerate=RegenerateOptions(thinking=thinking),
        evaluate=evaluated,
    )


def _execute(file: RunFile, plugins: Plugins, force: Sequence[str]) -> None:
    from deepspec_core.cli.run import show_report
    from deepspec_core.pipeline.evaluated_draft import describe_evaluated
    from deepspec_core.pipeline.run import Run
    from deepspec_core.pipeline.running import run_stages

    show_messages()
    run = Run(file=file, path=Path("command line"), plugins=plugins)
    describe_evaluated(run)  # before settings are compared with those of earlier results
    run_stages(run, force=force, say=click.echo)
    show_report(run.folder)
