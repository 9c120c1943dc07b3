"""`deepspec cache verify DIR`: whether a feature cache is still what was written."""

from __future__ import annotations

from pathlib import Path

import click

from deepspec_core.cli.options import no_plugin

DAMAGED = 2


@click.group()
def cache() -> None:
    """Look at a feature cache."""


@cache.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--format", "name", default="hdf5", show_default=True, help="The cache's format, as in [cache] format.")
@no_plugin
def verify(folder: Path, name: str, blocked: tuple[str, ...]) -> int:
    """Read a whole cache and compare it with the checksums taken when it was written.

    Every damaged or missing file is named. The exit code is 2 where there is one. A run does the same by itself when it
    first reads a cache that another process wrote.
    """
    from deepspec_core.cli.messages import show_messages
    from deepspec_core.contracts.cache import CacheFormat
    from deepspec_core.locks import lock
    from deepspec_core.plugins.discovery import load_plugins

    show_messages()
    cache_format: CacheFormat = load_plugins(blocked=blocked).registry.build("cache", name)
    # Asked first, so that a folder without a cache is told apart before a lock file is put into it.
    cache_format.open(folder, None) if cache_format.header(folder) is None else None
    with lock(folder, shared=True, problem="Another process is writing this cache", fix="Wait for it, or stop it."):
        problems = cache_format.verify(folder, remembered=False)
        if not problems:
            reader = cache_format.open(folder, None)
            click.echo(f"{len(reader)} samples, {sum(reader.lengths()):,} tokens: all as it was written")
    for problem in problems:
        click.echo(f"{click.style('Damaged:', fg='red')} {problem.render()}", err=True)
    return DAMAGED if problems else 0
