"""The errors that users see.

Every mistake that a user can make raises a subclass of `DeepSpecError`. The command line prints it without a traceback
and exits with code 2. Each error says where the mistake is, what was found, what was expected and the nearest fix. This
file does not know who raises them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "CacheError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DeepSpecError",
    "ExportError",
    "PluginError",
    "StageError",
    "TargetError",
    "TrainingError",
    "nearest",
]


class DeepSpecError(Exception):
    """One problem, described in up to five parts. Empty parts are left out.

    `where` is a file, a key of the run file or a component; `fix` is an imperative sentence.
    """

    exit_code = 2

    def __init__(
        self,
        problem: str,
        *,
        where: object = None,
        found: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        self.problem, self.where, self.found, self.expected, self.fix = problem, where, found, expected, fix
        super().__init__(self.render())

    def render(self) -> str:
        """The message as users read it: the problem, then one line for each part that was given."""
        lines = [self.problem]
        for label, part in (
            ("where", self.where),
            ("found", self.found),
            ("expected", self.expected),
            ("fix", self.fix),
        ):
            if part is not None:
                lines.append(f"  {label + ':':<10}{part}")
        return "\n".join(lines)


class ConfigError(DeepSpecError):
    """Mistakes in the run file, or in an override on the command line. Holds every problem that was found."""

    def __init__(self, problem: str, *, problems: Sequence[DeepSpecError] = (), **parts: object) -> None:
        self.problems = tuple(problems)
        super().__init__(problem, **parts)  # type: ignore[arg-type]

    def render(self) -> str:
        """The message, followed by each collected problem."""
        return "\n".join([super().render(), *(problem.render() for problem in self.problems)])


class PluginError(DeepSpecError):
    """A plugin is missing, broken or blocked, or two plugins offer one name."""


class TargetError(DeepSpecError):
    """The target cannot be loaded, no adapter covers it, or it does not support what was asked."""


class DataError(DeepSpecError):
    """Conversations or prompts that cannot be read, rendered or masked."""


class CacheError(DeepSpecError):
    """A feature cache that is missing, unfinished or damaged, or was made from other inputs."""


class CheckpointError(DeepSpecError):
    """A draft checkpoint or training state that is missing, incomplete or damaged."""


class TrainingError(DeepSpecError):
    """Training cannot continue: a loss or a gradient is not finite, or no row is supervised."""


class StageError(DeepSpecError):
    """A stage cannot run: its inputs are missing, its settings or data changed after it had results, another process
    holds its folder, or the disk is full."""


class ExportError(DeepSpecError):
    """A serving engine cannot serve the draft, or the export cannot be written."""


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The known name that is most similar to `name`, if one is similar enough to suggest.

    `cutoff` is the least similarity, from 0 to 1 (equal).
    """
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None
