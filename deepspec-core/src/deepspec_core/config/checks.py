"""Whether the sections of a run file fit together.

Each check looks at sections that are valid by themselves. A section with errors of its own is not there and is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from deepspec_core.config.batching import require_packed_draft
from deepspec_core.config.columns import column_mistakes
from deepspec_core.config.held_out import evaluation_mistakes, nothing_held_out
from deepspec_core.config.paths import no_path
from deepspec_core.config.schema import (
    BUILTIN,
    HELD_OUT,
    KNOWN_STAGES,
    ONLINE,
    PACKED,
    ROW_FILES,
    SERVER,
    DataOptions,
    EvaluateOptions,
    LossOptions,
    RegenerateOptions,
    RunOptions,
    TermOptions,
)
from deepspec_core.config.served_checks import served_mistakes
from deepspec_core.config.trees import require_trees, tree_mistakes
from deepspec_core.errors import ConfigError, DeepSpecError, PluginError
from deepspec_core.layers.options import LayerOptions
from deepspec_core.plugins.registry import Registry
from deepspec_core.rows.coefficient_schedule import CoefficientSchedule


def check_sections(sections: Mapping[str, Any], folder: Path, registry: Registry) -> Iterator[DeepSpecError]:
    """Every misfit. `folder` is the run file's: relative paths start there."""
    run = sections.get("run")
    misplaced = list(_paths(sections, folder))
    yield from misplaced
    if run and not misplaced:
        yield from _stages(run)
        if sections.get("features") and sections.get("cache"):
            yield from _cache_stage(run, sections["features"].mode, sections["cache"].path, folder)
            yield from _subset(sections["features"].mode, sections["cache"].subset)
        if sections.get("features"):
            yield from served_mistakes(sections["features"], run, folder, sections.get("regenerate"))
        if "export" in run.stages and sections.get("export") and not sections["export"].to:
            yield ConfigError(
                "the export stage has nothing to write", where="export.to", found="[]", expected="a format"
            )
        if "train" in run.stages and sections.get("train"):
            yield from evaluation_mistakes(sections["train"], sections.get("data"))
        if "evaluate" in run.stages and sections.get("evaluate"):
            yield from _tasks(sections["evaluate"].tasks, sections.get("data"))
            if not sections["evaluate"].temperature:
                yield no_temperature("evaluate.temperature")
            yield from samples_mistakes(sections["evaluate"], "evaluate.samples")
            yield from cut_mistakes(sections["evaluate"])
        if "regenerate" in run.stages and sections.get("regenerate"):
            yield from _answers(sections["regenerate"])
        if "regenerate" not in run.stages and sections.get("regenerate"):
            yield from _share(sections["regenerate"].thinking, run)
    spec = registry.get("draft", sections["draft"].type) if sections.get("draft") else None
    if sections.get("target") and (sections["target"].layers or (spec is not None and spec.trained)):
        yield from _layers(sections["target"].layers, needs_taps=spec is None or spec.needs_taps)
    if spec is not None and not spec.trained:
        yield from _untrained(sections)
    elif spec is not None and sections.get("train") and sections["train"].batching == PACKED:
        try:
            require_packed_draft(spec.name, registry)
        except ConfigError as error:
            yield error
    if sections.get("draft") and sections["draft"].layer.style is not None:
        yield from _style(sections["draft"].layer.style, registry)
    if sections.get("data") and not sections["data"].sources and _reads_data(sections):
        yield ConfigError("no data", where="data.sources", found="[]", expected="at least one source")
    if sections.get("data"):
        yield from _splits(sections["data"])
        for index, source in enumerate(sections["data"].sources):
            builtin = source.path.startswith(BUILTIN)
            yield from column_mistakes(source.columns, f"data.sources[{index}].columns", builtin=builtin)
    if sections.get("data") and run and "regenerate" in run.stages:
        yield from _supervision(sections["data"])
    if sections.get("loss"):
        yield from loss_mistakes(sections["loss"])
    if sections.get("draft") and sections["draft"].tree is not None and sections.get("evaluate"):
        yield from tree_mistakes(sections["evaluate"])
        # The type of a checkpoint that is named is its own (pipeline/evaluation_check.py).
        if sections["evaluate"].draft is None:
            try:
                require_trees(sections["draft"].type, registry)
            except ConfigError as error:
                yield error
    if sections.get("draft") and sections.get("export"):
        # Imported only where the run comes to it.
        find = registry.load if run and "export" in run.stages else registry.get
        for index, name in enumerate(sections["export"].to):
            try:
                find("exporter", name, algorithm=sections["draft"].type)
            except PluginError as error:
                yield PluginError(
                    error.problem,
                    where=f"export.to[{index}]",
                    found=error.found,
                    expected=error.expected,
                    fix=error.fix,
                )


def _untrained(sections: Mapping[str, Any]) -> Iterator[ConfigError]:
    """What a draft that is not trained has no use for. Tables of stages that the run does not have are not read."""
    draft, run, evaluate = sections["draft"], sections.get("run"), sections.get("evaluate")
    what = f"drafts of type {draft.type!r} are not trained"
    if run and set(run.stages) - {"evaluate"}:
        yield ConfigError(
            f"{what}: they can only be evaluated",
            where="run.stages",
            found=", ".join(run.stages),
            expected="evaluate",
            fix='set run.stages = ["evaluate"]',
        )
    if draft.layer != LayerOptions():
        yield ConfigError(
            f"{what}, so they have no layers whose shape could be set", where="draft.layer", expected="no such table"
        )
    if draft.init is not None:
        yield ConfigError(
            f"{what}, so they do not start from a checkpoint",
            where="draft.init",
            found=draft.init,
            expected="no such key",
        )
    if evaluate and evaluate.draft is not None:
        yield ConfigError(
            f"{what}, so they have no checkpoint to evaluate",
            where="evaluate.draft",
            found=evaluate.draft,
            expected="no such key",
            fix="remove it, or give the checkpoint's own type in [draft]",
        )


def _style(style: str, registry: Registry) -> Iterator[PluginError]:
    """A style is the name of an installed family."""
    try:
        registry.get("target", style)
    except PluginError as error:
        yield PluginError(
            error.problem, where="draft.layer.style", found=error.found, expected=error.expected, fix=error.fix
        )


def cut_mistakes(evaluate: EvaluateOptions) -> Iterator[ConfigError]:
    """Two rules that both would end proposals."""
    if evaluate.scheduler is not None and evaluate.confidence_threshold > 0:
        yield ConfigError(
            "a confidence threshold and a scheduler cannot be used together",
            where="evaluate.confidence_threshold",
            found=f"{evaluate.confidence_threshold:g}, with evaluate.scheduler",
            expected="a threshold or a scheduler",
        )


def loss_mistakes(loss: LossOptions) -> Iterator[ConfigError]:
    """A loss that would train nothing."""
    if not loss.terms:
        yield ConfigError("there is no loss term", where="loss.terms", found="{}", expected="at least one loss term")
    elif not any(map(_counts, loss.terms.values())):
        yield ConfigError(
            "there is nothing to train on: every coefficient is 0",
            where="loss.terms",
            found=", ".join(loss.terms),
            expected="at least one coefficient that is not 0",
        )


def _counts(coefficient: float | CoefficientSchedule | TermOptions) -> bool:
    """Whether it is ever anything but 0."""
    if isinstance(coefficient, TermOptions):
        return _counts(coefficient.coefficient)
    if isinstance(coefficient, CoefficientSchedule):
        return coefficient.start != 0 or coefficient.end != 0
    return coefficient != 0


def _paths(sections: Mapping[str, Any], folder: Path) -> Iterator[ConfigError]:
    for section, key in (("run", "output"), ("cache", "path")):
        path = getattr(sections.get(section), key, None)
        problem = None if path is None else no_path(f"{section}.{key}", path, base=folder)
        if problem is not None:
            yield problem


def no_temperature(where: str) -> ConfigError:
    """An evaluation at no temperature would be an empty report. `where` is the key or the argument."""
    return ConfigError(
        "there is no temperature to evaluate at", where=where, found="[]", expected="at least one, such as 0 for greedy"
    )


def samples_mistakes(evaluate: EvaluateOptions, where: str) -> Iterator[ConfigError]:
    """Several answers to a prompt are of use only where they differ. `where` is the key or the argument."""
    one = _one_choice(top_k=evaluate.top_k, min_p=evaluate.min_p)
    if evaluate.samples > 1 and evaluate.temperature and (one or not any(evaluate.temperature)):
        yield _same_answers(where, evaluate.samples, one or "temperature = 0 alone")


def _one_choice(*, top_k: int | None, min_p: float | None) -> str | None:
    """The setting, if there is one, that leaves nothing but the most probable token at any temperature."""
    return "top_k = 1" if top_k == 1 else "min_p = 1" if min_p == 1 else None


def _same_answers(where: str, count: int, setting: str) -> ConfigError:
    return ConfigError(
        "greedy answers to one prompt are all the same",
        where=where,
        found=f"{count}, with {setting}",
        expected="1, or a temperature above 0, with top_k not 1 and min_p below 1",
    )


def _tasks(tasks: tuple[str, ...], data: DataOptions | None) -> Iterator[ConfigError]:
    if not tasks:
        yield ConfigError(
            "the evaluate stage has nothing to evaluate on",
            where="evaluate.tasks",
            found="[]",
            expected=f'at least one task, such as "{HELD_OUT}"',
            fix='add a task, or remove "evaluate" from run.stages',
        )
    if HELD_OUT in tasks and data is not None and nothing_held_out(data):
        yield ConfigError(
            "no prompts are held out from training",
            where="data.held_out",
            found=f'0, with "{HELD_OUT}" in evaluate.tasks',
            expected="a share above 0",
            fix="set data.held_out = 0.05, or name other tasks",
        )


def _answers(regenerate: RegenerateOptions) -> Iterator[ConfigError]:
    """Several greedy answers to a prompt are one, several times."""
    greedy = "temperature = 0" if regenerate.temperature == 0 else None
    greedy = greedy or _one_choice(top_k=regenerate.top_k, min_p=regenerate.min_p)
    if regenerate.answers > 1 and greedy:
        yield _same_answers("regenerate.answers", regenerate.answers, f"regenerate.{greedy}")


def _share(thinking: bool | float, run: RunOptions) -> Iterator[ConfigError]:
    if not isinstance(thinking, bool) and "train" in run.stages:
        yield ConfigError(
            "a share of conversations in thinking mode needs the regenerate stage",
            where="regenerate.thinking",
            found=f"{thinking:g}, without a regenerate stage",
            expected="true or false: the mode of all the sources' answers",
            fix='add "regenerate" to run.stages',
        )


def _reads_data(sections: Mapping[str, Any]) -> bool:
    """Whether any stage does: all but an evaluation that brings its own prompts."""
    run, evaluate = sections.get("run"), sections.get("evaluate")
    if run is None or evaluate is None:
        return True
    return set(run.stages) != {"evaluate"} or HELD_OUT in evaluate.tasks


def _stages(run: RunOptions) -> Iterator[ConfigError]:
    expected = [stage for stage in KNOWN_STAGES if stage in run.stages]
    if not run.stages:
        yield ConfigError("no stages", where="run.stages", found="[]", expected=f"some of {', '.join(KNOWN_STAGES)}")
    elif list(run.stages) != expected:
        repeated = len(set(run.stages)) < len(run.stages)
        yield ConfigError(
            "a stage is listed twice" if repeated else "stages are out of order",
            where="run.stages",
            found=", ".join(run.stages),
            expected=", ".join(expected),
        )


def _cache_stage(run: RunOptions, mode: str, path: str | None, folder: Path) -> Iterator[ConfigError]:
    if mode == "cached" and "train" in run.stages and "cache" not in run.stages:
        if path is None:
            yield ConfigError(
                "features are cached, but no stage makes the cache",
                where="run.stages",
                found=", ".join(run.stages),
                expected='the cache stage, or [cache] path of a cache that exists, or features.mode = "online"',
                fix='add "cache" before "train"',
            )
        elif not (folder / path).exists():
            yield ConfigError(
                "there is no cache at this path, and no stage makes one",
                where="cache.path",
                found=path,
                expected="a cache that exists",
                fix='add "cache" to run.stages, before "train"',
            )
    if mode in (ONLINE, SERVER) and "cache" in run.stages:
        yield ConfigError(
            "the cache stage would write features that nothing reads",
            where="run.stages",
            found=f'"cache", with features.mode = "{mode}"',
            expected='no cache stage, or features.mode = "cached"',
        )


def _subset(mode: str, subset: int | float | None) -> Iterator[ConfigError]:
    if subset is not None and mode in (ONLINE, SERVER):
        yield ConfigError(
            "cache.subset has no effect, because no cache is read",
            where="cache.subset",
            found=f'{subset:g}, with features.mode = "{mode}"',
            expected='features.mode = "cached"',
            fix="remove it; to use fewer conversations, set `limit` in the entries of data.sources",
        )


def _supervision(data: DataOptions) -> Iterator[ConfigError]:
    for key in ("supervise_newline", "supervise_think_block"):
        if getattr(data, key):
            yield ConfigError(
                "this key cannot be used with regenerated answers, which are trained on exactly "
                "as the target generated them",
                where=f"data.{key}",
                found="true, with a regenerate stage",
                expected="false",
                fix='remove it; or remove "regenerate" from run.stages, if the sources hold the '
                "target's answers as text",
            )


def _splits(data: DataOptions) -> Iterator[ConfigError]:
    for index, source in enumerate(data.sources):
        if source.split is not None and (source.path.startswith(BUILTIN) or source.path.endswith(ROW_FILES)):
            yield ConfigError(
                "this source has no splits",
                where=f"data.sources[{index}].split",
                found=f'"{source.split}", with path = "{source.path}"',
                expected="no split",
                fix="remove `split`, or give a dataset as the path",
            )


def _layers(layers: tuple[int, ...], *, needs_taps: bool) -> Iterator[ConfigError]:
    rising = all(lower < upper for lower, upper in pairwise(layers))
    if (not layers and needs_taps) or (layers and layers[0] < -1) or not rising:
        yield ConfigError(
            "these layers cannot be tapped" if layers else "drafts of this type need tapped layers",
            where="target.layers",
            found=list(layers),
            expected="strictly increasing layer numbers, -1 (the embedding) or above",
        )
