"""Checks the `required_plugins` of a run file against what is installed."""

from __future__ import annotations

from collections.abc import Sequence

from deepspec_core.errors import DeepSpecError, PluginError, nearest
from deepspec_core.plugins.discovery import Plugins
from deepspec_core.plugins.records import canonical
from deepspec_core.plugins.references import message_of


def check_required(requirements: Sequence[str], plugins: Plugins) -> list[DeepSpecError]:
    """One error for each of `required_plugins` that is not met, such as "deepspec-core>=0.2"."""
    from packaging.requirements import InvalidRequirement, Requirement

    errors: list[DeepSpecError] = []
    for index, text in enumerate(requirements):
        where = f"required_plugins[{index}]"
        try:
            wanted = Requirement(text)
        except InvalidRequirement as error:
            found = f"{text!r}: {message_of(error)}"
            errors.append(PluginError("not a requirement", where=where, found=found, expected='"NAME>=VERSION"'))
            continue
        records = [record for record in plugins.records if canonical(record.package) == canonical(wanted.name)]
        lost = [record for record in records if not record.loaded]
        if not records:
            known = [record.package for record in plugins.records]
            close = nearest(wanted.name, known)
            errors.append(
                PluginError(
                    f"required plugin {wanted.name!r} is not installed",
                    where=where,
                    found=f"installed: {', '.join(sorted(set(known)))}",
                    expected=text,
                    fix=f"write {close!r}" if close else f"pip install '{text}'",
                )
            )
        elif not wanted.specifier.contains(records[0].version, prereleases=True):
            errors.append(
                PluginError(
                    f"required plugin {wanted.name!r} has another version",
                    where=where,
                    found=f"{records[0].package} {records[0].version}",
                    expected=text,
                    fix=f"pip install '{text}'",
                )
            )
        else:
            errors += [
                PluginError(
                    f"required plugin {record.name!r} is {record.status}",
                    where=where,
                    found=record.reason,
                    expected=text,
                )
                for record in lost
            ]
    return errors
