"""Checks the values of a command's options as those of [evaluate] in a run file. Knows no command."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from deepspec_core.config.schema import EvaluateOptions

if TYPE_CHECKING:
    from deepspec_core.plugins.registry import Registry


def check_values(said: Mapping[str, Any], registry: Registry) -> None:
    """UsageError if an option has a value that the key of [evaluate] with the same name does not allow.

    Options that are None were not given.
    """
    from deepspec_core.config.explain import explain
    from deepspec_core.config.structure import strict_converter

    given = {key: value for key, value in said.items() if value is not None}
    table = {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}
    try:
        strict_converter(registry).structure(table, EvaluateOptions)
        return
    except Exception as error:
        problems = explain(error, "", siblings={})
    told = [f"{_option(str(one.where))}: found {one.found}, expected {one.expected}." for one in problems]
    raise click.UsageError(" ".join(told))


def _option(where: str) -> str:
    """--min-p, of ".min_p"; --stop, of ".stop[0]"."""
    return "--" + re.sub(r"\[.*", "", where.removeprefix(".")).replace("_", "-")
