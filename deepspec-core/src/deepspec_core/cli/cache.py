"""`deepspec cache`: inspect, verify or convert a feature cache, or adopt one that another program wrote."""

from __future__ import annotations

import json
from pathlib import Path

import click

from deepspec_core.cli.options import no_plugin, overrides, run_file

DAMAGED = 2
_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3")
_folder = click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
_format = click.option("--format", "name", help="The cache's format, as in [cache] format. Left out: detected.")


@click.group()
def cache() -> None:
    """Inspect, verify, convert or adopt a feature cache."""


@cache.command()
@_folder
@_format
@click.option("--json", "as_json", is_flag=True, help="Machine-readable: one object.")
@no_plugin
def info(folder: Path, name: str | None, as_json: bool, blocked: tuple[str, ...]) -> None:
    """Print what a cache was made from, its size, and its bytes per token. Reads no features."""
    from deepspec_core.cache.detection import format_of
    from deepspec_core.cache.manifest_digest import CANNOT_BE_CHECKED
    from deepspec_core.disk import in_words
    from deepspec_core.plugins.discovery import load_plugins

    found, cache_format = format_of(folder, load_plugins(blocked=blocked).registry, name)
    reader = cache_format.open(folder, None)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    tokens = sum(reader.lengths())
    facts = {
        "format": found,
        "samples": len(reader),
        "tokens": tokens,
        "longest_sample": max(reader.lengths(), default=0),
        "bytes": size,
        "bytes_a_token": round(size / max(tokens, 1), 1),
        **reader.header.as_json(),
        "has_digest": getattr(reader, "has_digest", None),
    }
    if facts["has_digest"] is False:
        click.echo(f"{click.style('Note:', fg='yellow')} {CANNOT_BE_CHECKED}", err=True)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for key, value in facts.items():
        text = (
            ("yes" if value else "no")
            if isinstance(value, bool)
            else f"{value:,}"
            if isinstance(value, int)
            else " ".join(map(str, value))
            if isinstance(value, list)
            else value
        )
        click.echo(f"{key.replace('_', ' ').ljust(width)}  {in_words(value) if key == 'bytes' else text}")


@cache.command()
@_folder
@_format
@no_plugin
def verify(folder: Path, name: str | None, blocked: tuple[str, ...]) -> int:
    """Read a whole cache and compare it with the checksums taken when it was written.

    Every damaged or missing file is reported; the exit code is then 2. A run makes the same check when it first reads a
    cache that another process wrote.
    """
    from deepspec_core.cache.detection import format_of
    from deepspec_core.cache.manifest_digest import CANNOT_BE_CHECKED
    from deepspec_core.cli.messages import show_messages
    from deepspec_core.locks import lock
    from deepspec_core.plugins.discovery import load_plugins

    show_messages()
    _, cache_format = format_of(folder, load_plugins(blocked=blocked).registry, name)
    # Opened first, so that a folder without a cache is reported before a lock file is put into it.
    cache_format.open(folder, None) if cache_format.header(folder) is None else None
    with lock(folder, shared=True, problem="Another process is writing this cache", fix="Wait for it, or stop it."):
        problems = cache_format.verify(folder, remembered=False)
        if not problems:
            reader = cache_format.open(folder, None)
            checked = getattr(reader, "has_digest", True)
            says = "unchanged since it was written" if checked else f"the shards are unchanged; {CANNOT_BE_CHECKED}"
            click.echo(f"{len(reader)} samples, {sum(reader.lengths()):,} tokens: {says}")
    for problem in problems:
        click.echo(f"{click.style('Damaged:', fg='red')} {problem.render()}", err=True)
    return DAMAGED if problems else 0


@cache.command()
@_folder
@click.option("--to", "to", required=True, metavar="FORMAT", help="The format to write, as in [cache] format.")
@click.option("--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="The new cache's folder.")
@click.option("--dtype", type=click.Choice(_DTYPES), help="The features' number format. Left out: unchanged.")
@_format
@no_plugin
def convert(folder: Path, to: str, out: Path, dtype: str | None, name: str | None, blocked: tuple[str, ...]) -> int:
    """Write a copy of a cache in another storage format or number format. The old cache stays.

    The cache is verified first. If the command is interrupted, run it again: it continues where it stopped.
    """
    from deepspec_core.cache.conversion import check_conversion
    from deepspec_core.cache.conversion import convert as write
    from deepspec_core.cache.detection import format_of
    from deepspec_core.cache.manifest_digest import CANNOT_BE_CHECKED
    from deepspec_core.cli.messages import show_messages
    from deepspec_core.errors import CacheError
    from deepspec_core.locks import lock
    from deepspec_core.plugins.discovery import load_plugins

    show_messages()
    registry = load_plugins(blocked=blocked).registry
    _, cache_format = format_of(folder, registry, name)
    wanted = registry.cache_format(to)
    if out.resolve() == folder.resolve():
        raise CacheError(
            "A cache cannot be converted into its own folder",
            where="--out",
            found=out,
            expected="another folder than the cache's",
        )
    with lock(folder, shared=True, problem="Another process is writing this cache", fix="Wait for it, or stop it."):
        reader = cache_format.open(folder, None)
        dtype = dtype or reader.header.dtype
        # Verifying reads the whole cache, so what is known without it is said before.
        check_conversion(reader, wanted, out, dtype=dtype)
        if problems := list(cache_format.verify(folder, remembered=False)):
            raise problems[0]
        if not getattr(reader, "has_digest", True):
            click.echo(f"{click.style('Note:', fg='yellow')} {CANNOT_BE_CHECKED}", err=True)
        written = write(reader, wanted, out, dtype=dtype)
    click.echo(f"{len(reader)} samples in {out}; this command wrote {written} of them")
    return 0


@cache.command()
@_folder
@run_file
@overrides
@no_plugin
def adopt(folder: Path, path: str, overrides: tuple[str, ...], blocked: tuple[str, ...]) -> None:
    """Adopt a cache that another program wrote in the published layout, for the runs of a run file.

    The cache's files are checked and compared with the run file, as far as they record what they were made from. The
    command cannot check that the features come from this target and the tokens from this chat template: make sure of it
    yourself.
    """
    from deepspec_core.cache.adoption import adopt as take_over
    from deepspec_core.cache.adoption import source_of
    from deepspec_core.cli.messages import show_messages
    from deepspec_core.config.load import load_run_file
    from deepspec_core.locks import lock
    from deepspec_core.pipeline.run import Run
    from deepspec_core.plugins.discovery import load_plugins

    show_messages()
    plugins = load_plugins(blocked=blocked)
    run = Run(file=load_run_file(path, overrides=overrides, plugins=plugins), path=Path(path), plugins=plugins)
    with lock(folder, problem="Another process is using this cache", fix="Wait for it, or stop it."):
        manifest = take_over(folder, run.cache.header_of(source_of(folder)))
    tokens = sum(sum(shard.lengths) for shard in manifest.shards)
    click.echo(f"{manifest.num_samples} samples, {tokens:,} tokens: adopted for {run.file.target.model}")
    click.echo(f'To train on it: cache.path = "{folder}", cache.format = "{manifest.format}", no stage "cache".')
