"""Where a checkpoint that is to be exported comes from: the run whose folder it lies in, if it lies in one.

Knows the files of a run's folder by their names. Does not know formats, or stages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Final

import tomli
from attrs import evolve, field, frozen

from deepspec_core.checkpoints.export_facts import SECTIONS, settings_of, target_name
from deepspec_core.checkpoints.published import CONFIG, read_draft_config
from deepspec_core.config.run_file_place import run_file_folder
from deepspec_core.contracts.export import TargetName
from deepspec_core.disk import is_file
from deepspec_core.errors import ConfigError, TargetError
from deepspec_core.evaluation.metrics_file import NAME as METRICS
from deepspec_core.evaluation.metrics_file import results_of
from deepspec_core.plugins.registry import Registry
from deepspec_core.targets.opening import fingerprint, is_relative, resolve_model, tokenizer_for

_DRAFT, _RUN_FILE = "draft", "config.toml"
_TRUST: Final = "trust_remote_code"


@frozen(kw_only=True)
class Origin:
    """What is known of a checkpoint besides itself: contracts.export.ExportFacts has the same fields.

    left_out: What lies beside it and was not taken, in words; empty if nothing.
    model: What `[target] model` would say of its target; None if nothing says. base: What a path there is relative to.
    base_known: Whether anything says so; else `base` is the run's folder, which holds no target.
    revision: As in the run's `[target]`.
    trust_remote_code: Whether the run file that the user named allows code from the target's repository. What the file
        saved in the run's folder says of it does not count: the folder may come from somebody else.
    code_refused: Whether that file allows it, and none that the user named does.
    """

    target: TargetName | None
    settings: dict[str, Any] = field(factory=dict)
    results: list[dict[str, Any]] = field(factory=list)
    left_out: str = ""
    model: str | None = None
    base: Path = Path()
    base_known: bool = True
    revision: str | None = None
    trust_remote_code: bool = False
    code_refused: bool = False

    def tokenizer(self, registry: Registry) -> Callable[[], Any] | None:
        """Loads the target's tokenizer: TargetError or ConfigError where it cannot be had. None without `model`."""
        model = self.model
        if model is None:
            return None

        def load() -> Any:
            if not self.base_known and is_relative(model):
                raise ConfigError(
                    "the place of the run file is not known, and the target's path is relative to it",
                    where="[target] model",
                    found=model,
                    fix="Name the run file in place of the folder, or the target with --target.",
                )
            where = resolve_model(model, base=self.base, registry=registry, revision=self.revision)
            try:
                return tokenizer_for(where, self.trust_remote_code, revision=self.revision)
            except TargetError as error:
                if self.trust_remote_code or not (self.code_refused or _TRUST in str(error.found)):
                    raise
                raise TargetError(
                    "the target's tokenizer cannot be loaded without code from the target's repository",
                    where=where,
                    found=error.found,
                    expected=f"{_TRUST} = true in the [target] of a run file that you name",
                    fix="Read that code. To allow it, name the run file in place of the folder, without --target.",
                ) from error

        return load


def checkpoint_in(name: str) -> str:
    """The checkpoint that a run's folder holds, where `name` is one; else `name`."""
    folder = Path(name).expanduser()
    held = is_file(folder / _DRAFT / CONFIG) and not (folder / CONFIG).exists()
    return str(folder / _DRAFT) if held else name


def origin_of(directory: Path, *, target: str | None, run_file: Path | None = None) -> Origin:
    """What the run's folder around a checkpoint says of it. `target` overrules what its target is called there.

    `run_file`: The run's own file, where it is known; else its place follows from the folder's, where that says it.
    ConfigError or StageError where the run file or the evaluation is there and damaged.
    """
    named = None if target is None else target_name(target, base=Path())
    saved = directory.parent / _RUN_FILE
    if directory.name != _DRAFT or not saved.is_file():
        own = read_draft_config(directory).get("target_model_name_or_path")
        if named is None and isinstance(own, str) and own:
            named = target_name(own, base=Path())
        return Origin(target=named, model=target or (own if isinstance(own, str) and own else None))
    tables = _read(saved)
    section = tables.get("target", {})
    model = section.get("model")
    allowed = {} if run_file is None else _read(run_file).get("target", {})
    output = str(tables.get("run", {}).get("output", "."))
    base = run_file_folder(directory.parent, output) if run_file is None else run_file.resolve().parent
    if named is None and isinstance(model, str):
        named = target_name(model, base=base or directory.parent)
    metrics = directory.parent / METRICS
    results = results_of(metrics, fingerprint(directory)) if metrics.is_file() else []
    left_out = f"{METRICS} beside it is of another draft" if metrics.is_file() and not results else ""
    known = Origin(target=named, settings=settings_of(tables), results=results, left_out=left_out)
    if target is not None:
        return evolve(known, model=target)
    same = all(allowed.get(key) == section.get(key) for key in ("model", "revision"))
    trusted = same and allowed.get(_TRUST) is True
    return evolve(
        known,
        model=model if isinstance(model, str) else None,
        base=base or directory.parent,
        base_known=base is not None,
        revision=section.get("revision"),
        trust_remote_code=trusted,
        code_refused=section.get(_TRUST) is True and not trusted,
    )


def _read(path: Path) -> dict[str, Any]:
    """The tables of a run file, of which somebody may have edited what an export reads."""
    try:
        tables = tomli.loads(path.read_text(encoding="utf-8"))
    except (tomli.TOMLDecodeError, OSError, UnicodeDecodeError, RecursionError) as error:
        raise _unreadable(path, str(error)) from error
    for name in ("run", "target", *SECTIONS):
        if not isinstance(tables.get(name, {}), Mapping):
            raise _unreadable(f"{path}: {name}", repr(tables[name])[:80], f"a table, [{name}]")
    sources = tables.get("data", {}).get("sources", [])
    if not isinstance(sources, list) or not all(_is_source(source) for source in sources):
        raise _unreadable(
            f"{path}: data.sources", repr(sources)[:80], 'tables such as { path = "rows.jsonl", limit = 100 }'
        )
    return tables


def _is_source(source: Any) -> bool:
    return (
        isinstance(source, Mapping)
        and isinstance(source.get("path"), str)
        and isinstance(source.get("limit"), int | NoneType)
    )


def _unreadable(where: Path | str, found: str, expected: str | None = None) -> ConfigError:
    return ConfigError(
        "the run file beside the draft cannot be read",
        where=where,
        found=found,
        expected=expected,
        fix="Mend the file, or export a copy of `draft`.",
    )
