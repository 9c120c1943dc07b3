"""`deepspec export RUN_OR_DRAFT --to FORMAT`: a draft checkpoint as a serving engine loads it, without a run file."""

from __future__ import annotations

from pathlib import Path

import click

from deepspec_core.cli.options import no_plugin


@click.command()
@click.argument("draft", metavar="RUN_FOLDER_OR_DIR_OR_HUB_ID")
@click.option("--to", "name", required=True, metavar="FORMAT", help="An export format; see `deepspec plugins`.")
@click.option("-o", "--out", metavar="DIR", help="The folder to write. Default: the draft's name and the format's.")
@click.option("--target", metavar="NAME", help="The target's name in the export. Default: that in the draft's run.")
@no_plugin
def export(draft: str, name: str, out: str | None, target: str | None, blocked: tuple[str, ...]) -> None:
    """Write a draft in the form that a serving engine loads.

    Of a run's folder it is the finished draft, and the model card has the run's settings and its evaluation.
    No target is loaded. The folder appears when all of it is written; one that is there is never overwritten.
    """
    from deepspec_core.checkpoints.export_facts import facts_of
    from deepspec_core.checkpoints.export_origin import checkpoint_in, origin_of
    from deepspec_core.checkpoints.exports import Format, require_free
    from deepspec_core.checkpoints.opening import draft_adapter, resolve_draft
    from deepspec_core.checkpoints.published import (
        build_empty,
        check_draft,
        load_draft,
        read_options,
        stored_dtype,
    )
    from deepspec_core.disk import full_disk_is_an_error, in_words, why_not_writable
    from deepspec_core.errors import ExportError
    from deepspec_core.plugins.discovery import load_plugins

    registry = load_plugins(blocked=blocked).registry
    draft = checkpoint_in(draft)
    directory = resolve_draft(draft, base=Path())
    algorithm, _, _ = read_options(directory, registry)
    chosen = Format.of(name, algorithm, registry)
    place = Path(f"{_own_name(draft, directory)}-{name}" if out is None else out).expanduser()
    require_free(place, fix="Choose another with --out.")
    if (problem := why_not_writable(place.parent)) is not None:
        raise ExportError("the export cannot be written there", where=place, found=problem)
    adapter = draft_adapter(directory, registry=registry)
    check_draft(directory, registry=registry, adapter=adapter)
    origin = origin_of(directory, target=target)
    facts = facts_of(
        build_empty(directory, registry=registry, adapter=adapter),
        adapter,
        dtype=stored_dtype(directory),
        target=origin.target,
        settings=origin.settings,
        results=origin.results,
        tokenizer=origin.tokenizer(registry),
    )
    chosen.check(facts, where=f"--to {name}")
    with full_disk_is_an_error(place.parent):
        place.parent.mkdir(parents=True, exist_ok=True)
        size = chosen.write(load_draft(directory, registry=registry, adapter=adapter), facts, place)
    click.echo(f"wrote {place}: {in_words(size)}")
    if origin.left_out:
        click.echo(f"the model card has no accepted lengths: {origin.left_out}", err=True)


def _own_name(given: str, directory: Path) -> str:
    """A run's draft lies in `draft/` of the run's folder, which has the name that people know."""
    local = Path(given).expanduser().is_dir()
    if local and directory.name == "draft":
        return directory.parent.name
    return directory.name if local else given.rpartition("/")[2]
