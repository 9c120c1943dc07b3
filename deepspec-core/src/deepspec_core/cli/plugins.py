"""`deepspec plugins`: every plugin, what it offers, and why it was not loaded. Imports no plugin's heavy code."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import click

from deepspec_core.cli.options import no_plugin
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.plugins.records import PluginRecord

_COLOURS = {"ok": "green", "duplicate": "yellow", "blocked": "yellow"}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Machine-readable: a list of objects.")
@no_plugin
def plugins(as_json: bool, blocked: tuple[str, ...]) -> None:
    """List the installed plugins: package, version, what each offers, and the reason if one was not loaded."""
    records = load_plugins(blocked=blocked).records
    if as_json:
        click.echo(json.dumps([_as_json(record) for record in records], indent=2, ensure_ascii=False))
        return
    for line in _table(records):
        click.echo(line)


def _as_json(record: PluginRecord) -> dict[str, object]:
    return {
        "name": record.name,
        "package": record.package,
        "version": record.version,
        "status": record.status,
        "reason": record.reason,
        "offers": {kind: list(names) for kind, names in record.offers.items()},
        "summaries": {kind: list(lines) for kind, lines in record.summaries.items()},
        "slow": list(record.slow),
    }


def _table(records: Sequence[PluginRecord]) -> Iterator[str]:
    """One row per plugin; below it, indented, what it offers and the reason. Lines are not wrapped, because they hold
    paths to copy."""
    rows = [("PLUGIN", "PACKAGE", "VERSION", "STATUS")]
    rows += [(record.name, record.package, record.version, record.status) for record in records]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]

    def aligned(row: tuple[str, str, str, str]) -> list[str]:
        return [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]

    yield click.style("  ".join(aligned(rows[0])).rstrip(), bold=True)
    for row, record in zip(rows[1:], records, strict=True):
        *cells, status = aligned(row)
        yield "  ".join([*cells, click.style(status.rstrip(), fg=_COLOURS.get(record.status, "red"))])
        label_width = max(map(len, (*record.offers, "reason")))
        name_width = max((len(name) for names in record.offers.values() for name in names), default=0)
        for kind, names in record.offers.items():
            for number, (name, summary) in enumerate(zip(names, record.summaries[kind], strict=True)):
                label = "" if number else kind
                yield f"    {label.ljust(label_width)}  {name.ljust(name_width)}  {summary}".rstrip()
        if record.slow:
            imported = ", ".join(record.slow)
            yield f"    {'slow'.ljust(label_width)}  every command waits while its plugin module imports {imported}"
        if record.reason is not None:
            yield f"    {'reason'.ljust(label_width)}  {record.reason}"
