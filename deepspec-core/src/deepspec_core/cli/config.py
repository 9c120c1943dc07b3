"""`deepspec config show|check RUN.toml`: the effective run file, or everything that is wrong with it.

`deepspec config keys [SECTION]`: the keys of run files and their meaning.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import click
from attrs import asdict

from deepspec_core.cli.options import no_plugin, overrides, run_file
from deepspec_core.config.load import RunFile, load_run_file
from deepspec_core.config.named_files import problems_of_named_files
from deepspec_core.errors import ConfigError
from deepspec_core.plugins.discovery import load_plugins

if TYPE_CHECKING:
    from deepspec_core.config.reference import SectionFacts


@click.group()
def config() -> None:
    """Show or check a run file, or explain its keys."""


@config.command()
@run_file
@overrides
@no_plugin
def show(path: str, overrides: tuple[str, ...], blocked: tuple[str, ...]) -> None:
    """Print the run file with every default filled in. The output is itself a run file."""
    from deepspec_core.config.render import render

    click.echo(render(_load(path, overrides, blocked)), nl=False)


@config.command()
@run_file
@overrides
@no_plugin
def check(path: str, overrides: tuple[str, ...], blocked: tuple[str, ...]) -> None:
    """Report all mistakes at once, each with its key, what was found and expected, and the nearest valid name.

    If the target is on this machine, its config is read too, but no weights.
    """
    plugins = load_plugins(blocked=blocked)
    file = load_run_file(path, overrides=overrides, plugins=plugins)
    problems = list(problems_of_named_files(file, Path(path).resolve().parent, plugins.registry))
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(f"{count} in {path}", problems=problems)
    click.echo(f"{path}: no problems found")


@config.command()
@click.argument("section", required=False)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable: a list of sections.")
@click.option("--markdown", is_flag=True, help="Markdown, as in docs/run-file.md.")
@no_plugin
def keys(section: str | None, as_json: bool, markdown: bool, blocked: tuple[str, ...]) -> None:
    """Explain the keys of a run file, or of one SECTION: type, default and meaning.

    Includes the sections of installed plugins.
    """
    from deepspec_core.config import reference

    registry = load_plugins(blocked=blocked).registry
    chosen = reference.sections(registry) if section is None else reference.sections_named(section, registry)
    if as_json:
        click.echo(json.dumps([asdict(one) for one in chosen], ensure_ascii=False, indent=1))
    elif markdown:
        click.echo(reference.markdown(chosen), nl=False)
    else:
        for one in chosen:
            _print(one)


def _print(section: SectionFacts) -> None:
    click.echo(f"{click.style(f'[{section.path}]', bold=True)} {section.about}")
    for key in section.keys:
        default = {None: "required", "": "may be left out"}.get(key.default, f"default {key.default}")
        kind = f"{key.type}, {key.limits}" if key.limits else key.type
        click.echo(f"  {click.style(key.name, fg='cyan')}: {kind}; {default}")
        for line in textwrap.wrap(key.meaning, 110):
            click.echo(f"      {line}")
    click.echo("")


def _load(path: str, overrides: tuple[str, ...], blocked: tuple[str, ...]) -> RunFile:
    return load_run_file(path, overrides=overrides, plugins=load_plugins(blocked=blocked))
