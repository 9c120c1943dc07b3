"""`deepspec import DIR --target NAME -o OUT`: converts a draft in another project's format to a checkpoint of ours."""

from __future__ import annotations

from pathlib import Path

import click

from deepspec_core.cli.options import no_plugin


@click.command("import")
@click.argument("draft", metavar="DIR_OR_HUB_ID")
@click.option("--target", required=True, metavar="NAME", help="The draft's target: a Hub id, a folder, builtin:NAME.")
@click.option("-o", "--out", required=True, metavar="DIR", help="The checkpoint to write.")
@click.option("--format", "name", metavar="FORMAT", help="The format of the draft. Default: what its config says.")
@no_plugin
def import_command(draft: str, target: str, out: str, name: str | None, blocked: tuple[str, ...]) -> None:
    """Convert a draft of speculators, vLLM, SGLang, z-lab or llama.cpp to a checkpoint of DeepSpec.

    DeepSpec can evaluate the checkpoint and train it further (`draft.init`). A draft that no installed draft type can
    express is refused, with the reason. The folder appears when all of it is written and checked.
    """
    from deepspec_core.checkpoints.exports import free_place
    from deepspec_core.checkpoints.opening import resolve_draft
    from deepspec_core.disk import full_disk_is_an_error
    from deepspec_core.plugins.discovery import load_plugins
    from deepspec_export.importing import import_draft

    registry = load_plugins(blocked=blocked).registry
    folder, place = resolve_draft(draft, base=Path()), free_place(out, "the checkpoint")
    with full_disk_is_an_error(place.parent):
        imported = import_draft(folder, target, place, registry=registry, format_name=name)
    click.echo(f"wrote {place}: a draft of type {imported.algorithm}, read as {imported.format}")
    for note in imported.notes:
        click.echo(f"note: {note}", err=True)
