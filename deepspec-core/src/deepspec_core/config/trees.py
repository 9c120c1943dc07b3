"""Whether a draft can propose the trees that [draft] tree asks for. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator

from deepspec_core.config.schema import EvaluateOptions
from deepspec_core.errors import ConfigError
from deepspec_core.plugins.registry import Registry

WHERE = "draft.tree"


def require_trees(algorithm: str, registry: Registry, *, where: str = WHERE) -> None:
    """ConfigError if drafts of this type propose chains only. `where` is the key or the argument."""
    if registry.get("draft", algorithm).proposes_trees:
        return
    able = [name for name in registry.names("draft") if registry.get("draft", name).proposes_trees]
    raise ConfigError(
        f"drafts of type {algorithm!r} propose no trees",
        where=where,
        found=f"{where.rpartition('.')[2]}, for a draft that proposes chains",
        expected=f"a draft of type {', '.join(able)}" if able else "a draft type that proposes trees",
        fix="Leave it out: the draft then proposes chains.",
    )


def tree_mistakes(evaluate: EvaluateOptions) -> Iterator[ConfigError]:
    """What [evaluate] asks of proposals that a tree does not have: confidence."""
    for key, asked in (
        ("confidence_threshold", evaluate.confidence_threshold or None),
        ("calibration", evaluate.calibration),
        ("scheduler", None if evaluate.scheduler is None else evaluate.scheduler.cost_table),
    ):
        if asked is not None:
            yield ConfigError(
                "proposals that are trees carry no confidence",
                where=f"evaluate.{key}",
                found=f"{asked}, with {WHERE}",
                expected=f"chains, or no {key}",
                fix=f"Remove {WHERE} or evaluate.{key}.",
            )
