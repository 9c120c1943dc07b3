"""The `deepspec` command line: its commands, and how they report errors and exit.

Each command has a file of its own, which is imported when the command is invoked or listed. Knows no command's options.
"""

from __future__ import annotations

import faulthandler
import importlib
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import click

from deepspec_core import __version__
from deepspec_core.cli.output import (
    CLOSED,
    OutputLost,
    let_go_of_output,
    open_missing_streams,
    output_is_checked,
    say_error,
)
from deepspec_core.errors import DeepSpecError, PluginError, nearest
from deepspec_core.pipeline.threads import let_waiting_threads_sleep
from deepspec_core.plugins.exits import no_exit
from deepspec_core.stopping import exit_code, stopped_by_sigterm

# In the order in which a project needs them. A command exists if its file does.
COMMANDS = {
    "init": "init:init",
    "run": "run:run",
    "config": "config:config",
    "plugins": "plugins:plugins",
    "data": "data:data",
    "cache": "cache:cache",
    "estimate": "estimate:estimate",
    "serve": "serve:serve",
    "train": "train:train",
    "evaluate": "evaluate:evaluate",
    "generate": "generate:generate",
    "diagnose": "diagnose:diagnose",
    "calibrate": "calibrate:calibrate",
    "profile": "profile:profile",
    "simulate": "simulate:simulate",
    "checkpoint": "checkpoint:checkpoint",
    "export": "export:export",
    "report": "report:report",
    "compare": "compare:compare",
    "status": "status:status",
    "new": "new:new",
}
_PLUGIN_COMMANDS = "deepspec_core.plugin_commands"


class LazyGroup(click.Group):
    """Finds core's commands by their files. Asks plugins for commands only if a name is not core's, or to list all."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Core's in the order of COMMANDS, then plugins' by name."""
        return [*_core_commands(), *sorted(_plugin_commands(ctx))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now."""
        if cmd_name in _core_commands():
            return _import_command(cmd_name)
        _, command = _plugin_commands(ctx).get(cmd_name, ("", None))
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, but if there is no such command, the message names the nearest one."""
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            close = nearest(name, self.list_commands(ctx))
            hint = f" Did you mean {close!r}?" if close else ""
            raise click.UsageError(f"No such command {name!r}.{hint}{_of_plugins()}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """As click does. PluginError if a plugin's command raises an exception that is no message for the user."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, DeepSpecError):
            raise
        except (Exception, SystemExit) as error:
            from deepspec_core.plugins.references import blame

            name = ctx.invoked_subcommand
            owner, _ = ctx.meta.get(_PLUGIN_COMMANDS, {}).get(name, (None, None))
            if owner is None:
                raise
            if isinstance(error, SystemExit):  # a command may choose its exit code in this way
                raise _as_of_click(error) from error
            raise PluginError(f"command {name!r} of plugin {owner} failed", found=blame(error)) from error


def _as_of_click(error: SystemExit) -> click.exceptions.Exit:
    """The same exit in click's way. As in Python, text is a message, and its exit code is 1."""
    if error.code is None or isinstance(error.code, int):
        return click.exceptions.Exit(error.code or 0)
    click.echo(error.code, err=True)
    return click.exceptions.Exit(1)


def _of_plugins() -> str:
    """A hint for an unknown command: plugins that were not loaded, with the reason, and plugins to install."""
    from deepspec_core.plugins.discovery import load_plugins

    left_out = [record for record in load_plugins().records if not record.loaded]
    reasons = "".join(f"\nPlugin {one.name!r} of {one.package} is {one.status}: {one.reason}" for one in left_out)
    return f" It may be a command of a plugin that is not installed; `deepspec plugins` lists installed ones.{reasons}"


def _core_commands() -> list[str]:
    here = Path(__file__).parent
    return [name for name, place in COMMANDS.items() if (here / f"{place.partition(':')[0]}.py").is_file()]


def _import_command(name: str) -> click.Command:
    module, _, attribute = COMMANDS[name].partition(":")
    command = getattr(importlib.import_module(f"deepspec_core.cli.{module}"), attribute)
    assert isinstance(command, click.Command), f"{module}:{attribute} is no command"
    return command


def _plugin_commands(ctx: click.Context) -> dict[str, tuple[str, click.Command]]:
    """The commands that plugins add, by name, with the plugin's name. Each plugin adds to a separate group, so that a
    plugin that fails, or a command whose name is taken, is reported and left out."""
    from deepspec_core.plugins.discovery import load_plugins
    from deepspec_core.plugins.references import blame

    if _PLUGIN_COMMANDS in ctx.meta:
        return ctx.meta[_PLUGIN_COMMANDS]  # type: ignore[no-any-return]
    commands: dict[str, tuple[str, click.Command]] = ctx.meta.setdefault(_PLUGIN_COMMANDS, {})
    for implementation in load_plugins().manager.hook.deepspec_commands.get_hookimpls():
        group = click.Group()
        try:
            with redirect_stdout(sys.stderr):
                implementation.function(*(group for _ in implementation.argnames))
        except (Exception, SystemExit) as error:
            click.echo(f"Warning: commands of plugin {implementation.plugin_name}: {blame(error)}", err=True)
            continue
        added: Mapping[str, Any] = group.commands  # nobody checked what a plugin put there
        for name, command in added.items():
            owner = "deepspec-core" if name in COMMANDS else commands.get(name, ("",))[0]
            wrong = f"is already a command of {owner}" if owner else None
            if not isinstance(command, click.Command):
                wrong = f"is a {type(command).__name__}, not a click.Command"
            if wrong:
                click.echo(f"Warning: commands of plugin {implementation.plugin_name}: {name!r} {wrong}", err=True)
            else:
                commands[name] = implementation.plugin_name, command
    return commands


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="deepspec")
def cli() -> None:
    """Train and evaluate draft models for speculative decoding."""


def execute(command: click.Command, name: str, arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0; 2 for a mistake of the user's; 130 or 143 where Ctrl-C or SIGTERM
    stopped it."""
    open_missing_streams()
    let_waiting_threads_sleep()
    if not faulthandler.is_enabled():
        # A crash that Python cannot catch, such as a disk that fails under a mapped file, then prints a traceback.
        faulthandler.enable(2)
    try:
        with stopped_by_sigterm(), output_is_checked(), no_exit():
            result = command.main(args=arguments, prog_name=name, standalone_mode=False)
    except click.ClickException as error:
        with suppress(OSError):
            error.show()
        return error.exit_code
    except OutputLost as error:
        let_go_of_output()
        if error.closed:
            return CLOSED
        say_error(f"Error: {error.render()}")
        return error.exit_code
    except DeepSpecError as error:
        say_error(f"{click.style('Error:', fg='red')} {error.render()}")
        return error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        from deepspec_core.pipeline.workers import rank

        if rank() == 0:
            say_error("Interrupted.")
        return exit_code(error)
    # click returns the code of an explicit exit, or whatever the command returned.
    return result if isinstance(result, int) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """`deepspec`."""
    return execute(cli, "deepspec", arguments)


def run_main(arguments: Sequence[str] | None = None) -> int:
    """`deepspec-run RUN.toml`: the same as `deepspec run`."""
    if "run" not in _core_commands():
        error = PluginError("this installation of deepspec-core has no run command", fix="reinstall deepspec-core")
        click.echo(f"Error: {error.render()}", err=True)
        return error.exit_code
    return execute(_import_command("run"), "deepspec-run", arguments)
