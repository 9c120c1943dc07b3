"""`deepspec serve RUN.toml | TARGET`: start vLLM with a connector that writes the target's features for training.

Knows the command's options and run files. servers/vllm_command.py knows vLLM's own options.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deepspec_core.cli.messages import show_messages
from deepspec_core.cli.options import no_plugin, overrides

if TYPE_CHECKING:
    from deepspec_core.config.load import RunFile
    from deepspec_core.pipeline.run import Run
    from deepspec_core.plugins.discovery import Plugins
    from deepspec_core.servers.vllm_command import Served

_COMPUTED = ("float32", "bfloat16", "float16")
_STORED = ("float32", "bfloat16", "float8_e4m3")


@click.command()
@click.argument("place", metavar="RUN.toml|TARGET")
@click.argument("extra", nargs=-1, type=click.UNPROCESSED, metavar="[-- VLLM OPTIONS]")
@click.option("--layers", metavar="N,N,...", help="Tapped decoder layers, counted from 0; -1: the embedding.")
@click.option("--exchange", metavar="DIR", help="The folder for features; training must see it under the same path.")
@click.option("--dtype", type=click.Choice(_COMPUTED), help="The target's computation dtype. Default: target.dtype.")
@click.option(
    "--stored-as",
    type=click.Choice(_STORED),
    help="The number format in which features are written. Default: the computation dtype.",
)
@click.option("--max-length", type=click.IntRange(min=1), help="The number of tokens of the longest conversation.")
@click.option("--revision", help="A branch, tag or commit of the Hub repository.")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="The port to listen on.")
@click.option("--vllm", default="vllm", show_default=True, metavar="PROGRAM", help="The path of vLLM's program.")
@click.option("--quiet", is_flag=True, help="Do not show vLLM's output, unless it fails.")
@click.option("--dry-run", is_flag=True, help="Show vLLM's command line, and stop.")
@overrides
@no_plugin
def serve(place: str, extra: tuple[str, ...], blocked: tuple[str, ...], **said: Any) -> int | None:
    """Start vLLM as a server of a target's features, until Ctrl-C.

    Target, layers, dtypes and the exchange folder are read from the run file. Write vLLM's own options after --.
    """
    from attrs import evolve

    from deepspec_core.plugins.discovery import load_plugins
    from deepspec_core.servers.vllm_command import CONNECTOR, as_shell, command, variables
    from deepspec_core.servers.vllm_process import Engine, executable, require_free

    show_messages()
    if extra and not extra[0].startswith("-"):
        raise click.UsageError(f"Unexpected {extra[0]!r}: write options of vLLM after --; each begins with --.")
    plugins = load_plugins(blocked=blocked)
    if place.endswith(".toml"):
        served = _of_run(place, said, extra, plugins)
    else:
        served = _of_target(place, said, extra, plugins)
    words = command(served)
    if said["dry_run"]:
        click.echo(as_shell(words, variables(served, {})))
        click.echo(f"On a machine without DeepSpec, copy {CONNECTOR} and put its folder in PYTHONPATH.", err=True)
        return None
    served = evolve(served, executable=executable(said["vllm"]))
    require_free(served)
    _make_folder(served.exchange)
    if not served.is_local and not os.environ.get("VLLM_API_KEY"):
        click.echo(
            f"Anyone who can reach {served.host} can use this server. Set VLLM_API_KEY to require a key.", err=True
        )
    return Engine(served, say=click.echo, quiet=said["quiet"]).run()


def _of_run(place: str, said: dict[str, Any], extra: tuple[str, ...], plugins: Plugins) -> Served:
    """The server that a run file describes."""
    from deepspec_core.config.load import load_run_file
    from deepspec_core.pipeline.run import Run

    for name, key in (("layers", "target.layers"), ("max_length", "data.max_length"), ("revision", "target.revision")):
        if said[name] is not None:
            option = name.replace("_", "-")
            raise click.UsageError(f"--{option} is set by the run file ({key}): leave it out, or use --set {key}=...")
    path = Path(place)
    run = Run(file=load_run_file(path, overrides=said["overrides"], plugins=plugins), path=path, plugins=plugins)
    exchange = said["exchange"]
    if exchange is None and run.file.features.exchange is not None:
        exchange = run.base / run.file.features.exchange
    return _served(run, said, extra, exchange=exchange, max_length=run.data.max_length, where=str(path))


def _of_target(place: str, said: dict[str, Any], extra: tuple[str, ...], plugins: Plugins) -> Served:
    """The server that the command's options describe."""
    from deepspec_core.pipeline.run import Run
    from deepspec_core.servers.vllm_command import meant_layers

    if said["overrides"]:
        raise click.UsageError("--set changes keys of a run file: give a run file in place of the target.")
    if said["layers"] is None:
        raise click.UsageError("Give --layers, such as --layers 1,9,17, or a run file in place of the target.")
    file = _run_file(place, meant_layers(said["layers"]), said["revision"])
    run = Run(file=file, path=Path("--layers"), plugins=plugins)
    return _served(run, said, extra, exchange=said["exchange"], max_length=said["max_length"], where="--layers")


def _run_file(target: str, layers: tuple[int, ...], revision: str | None) -> RunFile:
    from deepspec_core.config.load import RunFile
    from deepspec_core.config.schema import DataOptions, DraftOptions, RunOptions, TargetOptions

    return RunFile(
        run=RunOptions(name="served", output="served", stages=("train",)),
        target=TargetOptions(model=target, layers=layers, revision=revision),
        data=DataOptions(sources=()),
        draft=DraftOptions(type="served", options=None),
    )


def _served(
    run: Run,
    said: dict[str, Any],
    extra: tuple[str, ...],
    *,
    exchange: str | Path | None,
    max_length: int | None,
    where: str,
) -> Served:
    from deepspec_core.config.paths import no_path
    from deepspec_core.dtypes import dtype_name
    from deepspec_core.errors import ConfigError
    from deepspec_core.servers.vllm_command import Served
    from deepspec_core.targets.taps import check_taps

    options, target = run.file.target, run.target
    if exchange is None:
        raise ConfigError(
            "There is no folder to write features to",
            where=f"{where}: features.exchange" if where.endswith(".toml") else "--exchange",
            expected="a folder that this machine and the trainers see under the same path",
            fix="Give --exchange DIR.",
        )
    if (problem := no_path("--exchange", exchange)) is not None:
        raise problem
    architecture = target.family.architecture
    taps = check_taps(options.layers, architecture.num_layers, where=where)
    template = options.chat_template
    return Served(
        target=str(target.where),
        names=tuple(dict.fromkeys((options.model, str(target.where)))),
        taps=taps,
        num_layers=architecture.num_layers,
        max_positions=architecture.max_positions,
        exchange=Path(exchange).absolute(),
        dtype=said["dtype"] or dtype_name(target.dtype),
        stored_as=said["stored_as"],
        max_length=max_length,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        chat_template=None if template is None else (run.base / template).absolute(),
        host=said["host"],
        port=said["port"],
        executable=said["vllm"],
        answers=run.file.regenerate.features,
        extra=extra,
    )


def _make_folder(folder: Path) -> None:
    """Make the exchange folder if it does not exist. ConfigError if it is not writable."""
    from deepspec_core.disk import is_folder, why_not_writable
    from deepspec_core.errors import ConfigError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        problem = why_not_writable(folder) if is_folder(folder) else "it is not a folder"
    except OSError as error:
        problem = error.strerror or str(error)
    if problem is not None:
        raise ConfigError(
            "Features cannot be written to this folder",
            where=f"--exchange {folder}",
            found=problem,
            fix="Name a folder that this user may write to.",
        )
