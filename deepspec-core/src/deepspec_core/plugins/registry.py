"""The components that plugins offer. They are looked up by kind and name, and imported when they are first used.

Knows the table of kinds, and how to explain a name that does not exist: the nearest name, what is installed, which
plugin was left out and why. Does not know how plugins are found (discovery.py), or any component's contract.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final, Literal, overload

from attrs import frozen

from deepspec_core.config.schema import ROW_FILES
from deepspec_core.errors import DeepSpecError, PluginError, TargetError, nearest
from deepspec_core.plugins.guarded import Guarded, Told
from deepspec_core.plugins.records import CORE, PluginRecord, canonical
from deepspec_core.plugins.references import FAILURES, blame, resolve
from deepspec_core.plugins.specs import (
    BuiltinSpec,
    ComponentSpec,
    DraftModelSpec,
    ExportSpec,
    TargetAdapterSpec,
    TaskSpec,
)

__all__ = ["Registry"]

_CONVERT: Final = "`deepspec import` of deepspec-export converts drafts of other projects, or says why it cannot"


@frozen(kw_only=True)
class Kind:
    """One kind of component: the hook that offers it, the class of its spec, and its name in messages.

    reserved: The keys of its section that belong to core. Its options cannot use them.
    takes_options: Whether a section of the run file gives its components' options.
    """

    hook: str
    spec: type[ComponentSpec]
    title: str
    reserved: frozenset[str] = frozenset()
    takes_options: bool = False


KINDS: Mapping[str, Kind] = {
    "draft": Kind(
        hook="deepspec_draft_models",
        spec=DraftModelSpec,
        title="draft type",
        reserved=frozenset({"type", "layer"}),
        takes_options=True,
    ),
    "loss": Kind(
        hook="deepspec_losses",
        spec=ComponentSpec,
        title="loss term",
        reserved=frozenset({"coefficient", "start", "end", "steps", "after", "shape"}),
        takes_options=True,
    ),
    "weighting": Kind(
        hook="deepspec_weightings",
        spec=ComponentSpec,
        title="weighting",
        reserved=frozenset({"type"}),
        takes_options=True,
    ),
    "target": Kind(hook="deepspec_target_adapters", spec=TargetAdapterSpec, title="target adapter"),
    "cache": Kind(hook="deepspec_cache_formats", spec=ComponentSpec, title="cache format"),
    "features": Kind(hook="deepspec_feature_sources", spec=ComponentSpec, title="feature source"),
    "task": Kind(hook="deepspec_tasks", spec=TaskSpec, title="evaluation task"),
    "builtin": Kind(hook="deepspec_builtins", spec=BuiltinSpec, title="builtin"),
    "exporter": Kind(hook="deepspec_exporters", spec=ExportSpec, title="export format"),
}


@frozen(kw_only=True)
class Offer:
    """One spec, and the plugin, distribution and version that it comes from."""

    kind: str
    spec: ComponentSpec
    plugin: str
    package: str
    version: str

    @property
    def algorithm(self) -> str | None:
        """The algorithm of an exporter, which is found by name and algorithm."""
        return self.spec.algorithm if isinstance(self.spec, ExportSpec) else None

    @property
    def label(self) -> str:
        """The name as lists show it; for exporters, with the algorithm."""
        return f"{self.spec.name} ({self.algorithm})" if self.algorithm else self.spec.name

    @property
    def summary(self) -> str:
        """One line on it, as its spec says."""
        return self.spec.summary

    @property
    def source(self) -> str:
        """ "deepspec-core 0.2.0"."""
        return f"{self.package} {self.version}"


@frozen(kw_only=True)
class Conflict:
    """One name that is offered more than once. `title` says what it names, such as a draft type."""

    title: str
    name: str
    offers: tuple[Offer, ...]

    def error(self) -> PluginError:
        """The error of a run that needs this name."""
        sources = sorted({offer.source for offer in self.offers})
        return PluginError(
            f"{self.title} {self.name!r} is offered more than once",
            found=" and ".join(sources),
            expected="one plugin for one name",
            fix=f"uninstall one, or leave it out of the run: --no-plugin {self.offers[-1].package}",
        )


class Registry:
    """Everything that loaded plugins offer. `left_out` are the plugins that were not loaded, for explanations only.

    A name is unique within its kind. For exporters, the pair of name and algorithm (a draft type) is
    unique.
    """

    def __init__(self, offers: Iterable[Offer] = (), left_out: Sequence[PluginRecord] = ()) -> None:
        self._offers: dict[tuple[str, str, str | None], list[Offer]] = {}
        self._model_types: dict[str, list[Offer]] = {}
        self._left_out = tuple(left_out)
        for offer in offers:
            self._offers.setdefault((offer.kind, offer.spec.name, offer.algorithm), []).append(offer)
            if isinstance(offer.spec, TargetAdapterSpec):
                for model_type in offer.spec.model_types:
                    self._model_types.setdefault(model_type, []).append(offer)

    @overload
    def get(self, kind: Literal["draft"], name: str) -> DraftModelSpec: ...
    @overload
    def get(self, kind: Literal["target"], name: str) -> TargetAdapterSpec: ...
    @overload
    def get(self, kind: Literal["builtin"], name: str) -> BuiltinSpec: ...
    @overload
    def get(self, kind: str, name: str, *, algorithm: str | None = None) -> ComponentSpec: ...
    def get(self, kind: str, name: str, *, algorithm: str | None = None) -> ComponentSpec:
        """The spec of that name. PluginError if there is none, or more than one."""
        return self._offer(kind, name, algorithm).spec

    def names(self, kind: str) -> list[str]:
        """Every name of a kind, sorted, with names that two plugins offer."""
        assert kind in KINDS, kind
        return sorted({name for of_kind, name, _ in self._offers if of_kind == kind})

    def trained_drafts(self) -> list[str]:
        """The draft types that are trained, sorted, without those that two plugins offer."""
        return sorted(spec.name for spec in self._clear_drafts() if spec.trained)

    def untrained_drafts(self) -> list[DraftModelSpec]:
        """The draft types that are not trained, by name, without those that two plugins offer."""
        return sorted((spec for spec in self._clear_drafts() if not spec.trained), key=lambda spec: spec.name)

    def algorithms(self, kind: Literal["exporter"], name: str) -> list[str]:
        """The draft types for which an exporter of that name exists, sorted."""
        return sorted(
            algorithm for of_kind, of, algorithm in self._offers if (of_kind, of) == (kind, name) and algorithm
        )

    def provider(self, kind: str, name: str, *, algorithm: str | None = None) -> str:
        """The distribution that offers the name."""
        return self._offer(kind, name, algorithm).package

    def load(self, kind: str, name: str, *, algorithm: str | None = None) -> Any:
        """Import what the spec's `build` names. PluginError, with the plugin's name, if that fails."""
        offer = self._offer(kind, name, algorithm)
        try:
            return resolve(offer.spec.build)
        except PluginError as error:
            raise PluginError(
                f"{KINDS[kind].title} {offer.label!r} of {offer.source} cannot be loaded: {error.problem}",
                where=error.where,
                found=error.found,
                fix=error.fix,
            ) from error

    @contextmanager
    def blaming(self, kind: str, name: str) -> Iterator[None]:
        """Within it runs code of the component. PluginError, with the plugin's name, if that fails.

        DeepSpecErrors and a full disk stay as they are. So do failures of core's own components: they are core's
        mistakes.
        """
        offer = self._offer(kind, name, None)
        with nullcontext() if _is_core(offer.package) else self._told(kind, offer)():
            yield

    def _told(self, kind: str, offer: Offer) -> Told:
        return Told(f"{KINDS[kind].title} {offer.label!r} of {offer.source}", offer.spec.build)

    def cache_format(self, name: str) -> Any:
        """The cache format of that name. PluginError, with the plugin's name, if its code fails, now or later."""
        built, offer = self.build("cache", name), self._offer("cache", name, None)
        if _is_core(offer.package):
            return built
        from deepspec_core.plugins.guarded_cache import GuardedFormat

        return GuardedFormat(built, self._told("cache", offer))

    def build(self, kind: str, name: str, *arguments: Any) -> Any:
        """Import what the spec's `build` names and call it. PluginError, with the plugin's name, if either fails."""
        build = self.load(kind, name)
        with self.blaming(kind, name):
            return build(*arguments)

    def build_guarded(self, kind: str, name: str, *arguments: Any) -> Any:
        """The same for a component that is itself called. PluginError, with the plugin's name, if a call fails too."""
        built = self.build(kind, name, *arguments)
        return built if _is_core(self.provider(kind, name)) else Guarded(built, lambda: self.blaming(kind, name))

    def model_types(self) -> list[str]:
        """Every config.model_type that an installed adapter covers, sorted."""
        return sorted(self._model_types)

    def adapter_for(self, model_type: str) -> TargetAdapterSpec:
        """The adapter that covers a target's config.model_type.

        TargetError if there is none. PluginError if there are two, or if two adapters have the same name.
        """
        offers = self._model_types.get(model_type, [])
        if len(offers) > 1:
            raise Conflict(title="target model type", name=model_type, offers=tuple(offers)).error()
        if offers:
            return self.get("target", offers[0].spec.name)
        raise self._unknown(TargetError, "target model type", model_type, self.model_types())

    def recognise(self, config: Mapping[str, Any]) -> DraftModelSpec:
        """The algorithm that recognises this config.json as its own.

        PluginError if none does, or more than one, or if it has a sign of another project's format.
        """
        self._refuse_other_formats(config)
        matches = sorted({offer.spec.name for offer in self._drafts() if _recognises(offer, config)})
        if len(matches) == 1:
            return self.get("draft", matches[0])
        if matches:
            sources = {name: [offer.source for offer in self._drafts() if offer.spec.name == name] for name in matches}
            last = next(offer for offer in self._drafts() if offer.spec.name == matches[-1])
            raise PluginError(
                "more than one algorithm recognises this checkpoint: " + ", ".join(matches),
                where="config.json",
                found=", ".join(f"{name!r} of {' and '.join(packages)}" for name, packages in sources.items()),
                expected="one draft type that recognises it",
                fix=f"leave out the plugins of the others, such as --no-plugin {last.package}, or uninstall them",
            )
        raise PluginError(
            "no installed algorithm recognises this checkpoint",
            where="config.json",
            found=f"architectures = {config.get('architectures')}",
            expected=f"a checkpoint of {_one_of(self.trained_drafts())}",
            fix="; ".join([*self._explain_left_out(""), _CONVERT]),
        )

    def _refuse_other_formats(self, config: Mapping[str, Any]) -> None:
        # What an installed draft type publishes under, another one may well have listed as a stranger's.
        own = {offer.spec.class_suffix for offer in self._drafts() if isinstance(offer.spec, DraftModelSpec)}
        for sign in (*_class_names(config), *config):
            if sign in own:
                continue
            for offer in self._drafts():
                assert isinstance(offer.spec, DraftModelSpec)
                if sign in offer.spec.elsewhere:
                    raise PluginError(
                        "this checkpoint is in another project's format",
                        where="config.json",
                        found=f"{sign}: {offer.spec.elsewhere[sign]}",
                        expected=f"a checkpoint of {_one_of(self.names('draft'))}, as published from here",
                        fix=_CONVERT,
                    )

    def conflicts(self) -> list[Conflict]:
        """Every name and every target model type that is offered more than once."""
        return [
            Conflict(title=KINDS[kind].title, name=offers[0].label, offers=tuple(offers))
            for (kind, _, _), offers in self._offers.items()
            if len(offers) > 1
        ] + [
            Conflict(title="target model type", name=model_type, offers=tuple(offers))
            for model_type, offers in self._model_types.items()
            if len(offers) > 1
        ]

    def _clear_drafts(self) -> list[DraftModelSpec]:
        clear = [
            offers[0].spec for (kind, _, _), offers in self._offers.items() if kind == "draft" and len(offers) == 1
        ]
        return [spec for spec in clear if isinstance(spec, DraftModelSpec)]

    def _drafts(self) -> list[Offer]:
        return [offer for (kind, _, _), offers in self._offers.items() if kind == "draft" for offer in offers]

    def _offer(self, kind: str, name: str, algorithm: str | None) -> Offer:
        title = KINDS[kind].title
        offers = self._offers.get((kind, name, algorithm), [])
        if len(offers) == 1:
            return offers[0]
        if offers:
            raise Conflict(title=title, name=offers[0].label, offers=tuple(offers)).error()
        others = sorted(other for of_kind, of, other in self._offers if (of_kind, of) == (kind, name) and other)
        if others:
            raise PluginError(
                f"{title} {name!r} does not exist for draft type {algorithm!r}",
                found=algorithm,
                expected=f"a draft of type {_one_of(others)}",
            )
        raise self._unknown(PluginError, title, name, self.names(kind))

    def _unknown(self, error: type[DeepSpecError], title: str, name: str, known: list[str]) -> DeepSpecError:
        """The error for a name that no plugin offers, with the nearest name, plugins left out, and a package to look
        for.
        """
        close = nearest(name, known)
        fixes = [f"write {close!r}"] if close else []
        fixes += self._explain_left_out(name, only_likely=close is not None)
        if not fixes and error is TargetError:
            fixes.append("install a package with an adapter for it" if known else "pip install deepspec-targets")
        if title == KINDS["task"].title and ("/" in name or Path(name).suffix):
            fixes = [
                *fixes[: close is not None],
                f"where a file of rows is meant: its name has to end in {' or '.join(ROW_FILES)}",
            ]
        if not fixes and title == KINDS["task"].title and not known:
            fixes.append("pip install deepspec-tasks, or name a file of rows")
        if not fixes:
            fixes.append("install the package that offers it")
            if title == KINDS["draft"].title and re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", name):
                fixes.append(f"where that is named after it, pip install deepspec-{name.replace('_', '-')}")
        return error(f"unknown {title} {name!r}", found=name, expected=_one_of(known), fix="; ".join(fixes) or None)

    def _explain_left_out(self, name: str, *, only_likely: bool = False) -> list[str]:
        """The plugins that were not loaded: those that may be the provider of `name`, else all of them."""

        def likely(record: PluginRecord) -> bool:
            own = (record.name, record.package.removeprefix("deepspec-"))
            return nearest(name, own) is not None or any(len(part) > 2 and part in name for part in own)

        chosen = [record for record in self._left_out if likely(record)]
        if not chosen and not only_likely:
            chosen = list(self._left_out)
        return [
            f"plugin {record.name!r} of {record.package} {record.version} may offer it, but is {record.status}: "
            f"{record.reason}"
            for record in chosen
        ]


def _class_names(config: Mapping[str, Any]) -> list[str]:
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _recognises(offer: Offer, config: Mapping[str, Any]) -> bool:
    assert isinstance(offer.spec, DraftModelSpec)
    try:
        return bool(offer.spec.recognise(config))
    except FAILURES as error:
        raise PluginError(
            f"draft type {offer.spec.name!r} of {offer.source} failed on a checkpoint's config.json",
            found=blame(error),
            fix=f"where the checkpoint is not of that type: --no-plugin {offer.package}",
        ) from error


def _is_core(package: str) -> bool:
    return canonical(package) == CORE


def _one_of(names: Sequence[str]) -> str:
    if not names:
        return "one of none: no installed plugin offers any"
    return names[0] if len(names) == 1 else f"one of {', '.join(names)}"
