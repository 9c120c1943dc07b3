"""`deepspec export RUN_OR_DRAFT --to FORMAT`: write a draft in a serving engine's format, without an export stage."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from deepspec_core.cli.options import no_plugin
from deepspec_core.cli.run_folder import folder_of_saved, run_folder

if TYPE_CHECKING:
    from deepspec_core.checkpoints.exports import Format
    from deepspec_core.contracts.draft import DraftModel
    from deepspec_core.contracts.export import ExportFacts
    from deepspec_core.errors import DeepSpecError
    from deepspec_core.pipeline.run import Run
    from deepspec_core.plugins.discovery import Plugins
    from deepspec_core.plugins.registry import Registry

_PROMPTS: Final = 64


@click.command()
@click.argument("draft", metavar="RUN_OR_DIR_OR_HUB_ID", required=False)
@click.option("--to", "name", required=True, metavar="FORMAT", help="An export format; see `deepspec plugins`.")
@click.option("-o", "--out", metavar="DIR", help="The folder to write. Default: DRAFT-FORMAT, from their names.")
@click.option("--target", metavar="NAME", help="The target's name in the export. Default: its name in the draft's run.")
@click.option(
    "--draft-vocab",
    type=click.IntRange(min=1),
    metavar="N",
    help="Reduce the draft's vocabulary to N tokens: the stop tokens, and the most frequent of the run's answers. The "
    "target is loaded to measure the accepted length before and after.",
)
@click.option(
    "--prompts",
    type=click.IntRange(min=1),
    help="With --draft-vocab: the number of prompts, from the run's first task, for that measurement. Default: 64.",
)
@click.option(
    "--untrained",
    metavar="RUN.toml",
    help="Export the untrained draft of this run file, with random weights, in place of a draft.",
)
@no_plugin
def export(
    draft: str | None,
    name: str,
    out: str | None,
    target: str | None,
    draft_vocab: int | None,
    prompts: int | None,
    untrained: str | None,
    blocked: tuple[str, ...],
) -> None:
    """Write a draft in the format that a serving engine loads.

    Given a run's folder or its run file, the command exports the finished draft; the model card then has the run's
    settings and evaluation. Only --draft-vocab and --untrained load the target. The folder appears when all files are
    written. An existing folder is never overwritten.
    """
    from deepspec_core.disk import is_file
    from deepspec_core.plugins.discovery import load_plugins

    if (draft is None) == (untrained is None):
        raise click.UsageError("Name a run or a checkpoint, or a run file with --untrained.")
    if untrained is not None and (draft_vocab is not None or target is not None):
        raise click.UsageError("--untrained takes everything from the run file: leave out --draft-vocab and --target.")
    if prompts is not None and draft_vocab is None:
        raise click.UsageError("--prompts is the number of prompts that --draft-vocab measures with: give both.")
    if target is not None and not target.strip():
        raise click.UsageError("--target is empty: give the target's Hub id, its folder or builtin:NAME.")
    plugins = load_plugins(blocked=blocked)
    if untrained is not None:
        return _write_untrained(untrained, name, out, plugins)
    assert draft is not None
    draft = folder_of_saved(draft)
    run_file = Path(draft) if is_file(Path(draft)) else None
    folder = draft if run_file is None else str(run_folder(draft, blocked))
    if draft_vocab is not None:
        return _write_reduced(draft, folder, name, out, target, draft_vocab, prompts or _PROMPTS, plugins)
    return _write_draft(folder, name, out, target, run_file, plugins.registry)


def _write_draft(
    draft: str, name: str, out: str | None, target: str | None, run_file: Path | None, registry: Registry
) -> None:
    from deepspec_core.checkpoints.export_facts import facts_of
    from deepspec_core.checkpoints.export_origin import checkpoint_in, origin_of
    from deepspec_core.checkpoints.export_target import check_exported_target
    from deepspec_core.checkpoints.exports import Format
    from deepspec_core.checkpoints.opening import draft_adapter, resolve_draft
    from deepspec_core.checkpoints.published import build_empty, check_draft, load_draft, read_options, stored_dtype

    draft = checkpoint_in(draft)
    directory = resolve_draft(draft, base=Path())
    algorithm, _, _ = read_options(directory, registry)
    chosen = Format.of(name, algorithm, registry)
    place = _free_place(out, _own_name(draft, directory), name)
    adapter = draft_adapter(directory, registry=registry)
    check_draft(directory, registry=registry, adapter=adapter)
    origin = origin_of(directory, target=target, run_file=run_file)
    check_exported_target(directory, origin, adapter.architecture, registry=registry)
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
    _write(chosen, load_draft(directory, registry=registry, adapter=adapter), facts, place)
    if origin.left_out:
        click.echo(f"the model card has no accepted lengths: {origin.left_out}", err=True)


def _write_reduced(
    given: str, folder: str, name: str, out: str | None, target: str | None, size: int, prompts: int, plugins: Plugins
) -> None:
    from deepspec_core.checkpoints.export_facts import facts_of
    from deepspec_core.checkpoints.export_origin import checkpoint_in, origin_of
    from deepspec_core.checkpoints.export_target import check_exported_target
    from deepspec_core.checkpoints.exports import Format
    from deepspec_core.checkpoints.published import read_options, stored_dtype
    from deepspec_core.disk import is_file
    from deepspec_core.errors import ConfigError
    from deepspec_core.pipeline.diagnosed_run import run_of
    from deepspec_core.pipeline.reduced_vocabulary import empty_reduced, reduced
    from deepspec_core.pipeline.run_of_folder import SAVED

    where = "--draft-vocab"
    directory = Path(checkpoint_in(folder))
    if directory == Path(folder):
        raise ConfigError(
            "--draft-vocab needs a run: it keeps the most frequent tokens of the run's answers",
            where=where,
            found=folder,
            expected="the folder of a run that has trained, or its run file",
            fix="Name the run in place of a checkpoint.",
        )
    run, registry = run_of(Path(given), overrides=(), tasks=(), plugins=plugins), plugins.registry
    algorithm, _, _ = read_options(directory, registry)
    chosen = Format.of(name, algorithm, registry)
    place = _free_place(out, _own_name(folder, directory), name)
    run_file = Path(given) if is_file(Path(given)) else None
    if run_file is None and run.file.target.trust_remote_code:
        raise ConfigError(
            "measuring would run code from the target's repository, because the run file in the folder says so",
            where=f"{Path(given) / SAVED}: target.trust_remote_code",
            found="true",
            expected="a run file that you name: a folder may come from somebody else",
            fix="Read that code. To allow it, name the run file in place of the folder.",
        )
    origin, dtype = origin_of(directory, target=target, run_file=run_file), stored_dtype(directory)
    facts = partial(
        facts_of, dtype=dtype, target=origin.target, settings=origin.settings, tokenizer=origin.tokenizer(registry)
    )
    empty, adapter = empty_reduced(run, size, where=where)
    check_exported_target(directory, origin, adapter.architecture, registry=registry)
    chosen.check(facts(empty, adapter), where=f"--to {name}")
    with run.locked():
        found = reduced(run, size, prompts=prompts, where=where)
    measured = found.about["measured"]
    click.echo(
        f"{_kept(size)} {100 * found.about['covered']:.2f}% of the answers' tokens; "
        f"accepted length {_length(measured['accepted_length_before'])} before, "
        f"{_length(measured['accepted_length_after'])} after, on {measured['prompts']} prompts"
    )
    _write(chosen, found.draft, facts(found.draft, adapter, reduced=found.about), place)


def _kept(size: int) -> str:
    return "the token that is kept makes up" if size == 1 else f"the {size:,} tokens that are kept make up"


def _length(value: float | None) -> str:
    return "unknown (no rounds)" if value is None else f"{value:.3f}"


def _write_untrained(path: str, name: str, out: str | None, plugins: Plugins) -> None:
    from deepspec_core.checkpoints.exports import Format
    from deepspec_core.config.load import load_run_file
    from deepspec_core.pipeline.exporting import untrained_draft
    from deepspec_core.pipeline.run import Run

    run = Run(file=load_run_file(Path(path), plugins=plugins), path=Path(path), plugins=plugins)
    if (init := run.file.draft.init) is not None:
        raise _begun_with(run, init, name)
    chosen = Format.of(name, run.file.draft.type, plugins.registry)
    place = _free_place(out, f"{run.file.run.name}-untrained", name)
    draft, facts = untrained_draft(run, lambda facts: chosen.check(facts, where=f"--to {name}"))
    _write(chosen, draft, facts, place)
    click.echo("the draft's weights are random: it shows whether an engine loads it, but gives no speed-up", err=True)


def _begun_with(run: Run, init: str, name: str) -> DeepSpecError:
    """The refusal of a run file whose draft does not begin with random weights."""
    from deepspec_core.config.draft_start import TARGET_STARTS
    from deepspec_core.disk import is_folder
    from deepspec_core.errors import ConfigError

    fix = "Remove draft.init from a copy of the run file, to export random weights."
    if init not in TARGET_STARTS:
        local = run.base / Path(init).expanduser()
        place = shlex.quote(str(local) if is_folder(local) else init)
        fix = f"Export the checkpoint itself: `deepspec export {place} --to {name}`."
    return ConfigError(
        "--untrained exports a draft with random weights, and training would begin with other ones",
        where=f"{run.path}: draft.init",
        found=init,
        expected="a run file without draft.init",
        fix=fix,
    )


def _free_place(out: str | None, own: str, name: str) -> Path:
    from deepspec_core.checkpoints.exports import free_place

    return free_place(f"{own}-{name}" if out is None else out, "the export")


def _write(chosen: Format, draft: DraftModel, facts: ExportFacts, place: Path) -> None:
    from deepspec_core.disk import full_disk_is_an_error, in_words

    with full_disk_is_an_error(place.parent):
        place.parent.mkdir(parents=True, exist_ok=True)
        size = chosen.write(draft, facts, place)
    click.echo(f"wrote {place}: {in_words(size)}")


def _own_name(given: str, directory: Path) -> str:
    """The draft's name. A run's draft is in `draft/` of the run's folder, so it gets that folder's name."""
    local = Path(given).expanduser().is_dir()
    if local and directory.name == "draft":
        return directory.resolve().parent.name
    return directory.name if local else given.rpartition("/")[2]
