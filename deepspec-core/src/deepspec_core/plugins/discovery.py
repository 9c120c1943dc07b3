"""Finds, checks and registers plugins one by one, and says why a plugin was left out.

Knows the entry-point group `deepspec`, distributions and pluggy. Of what plugins offer it knows only the table of kinds
(registry.py). It imports none of the heavy code that specs name.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from importlib.metadata import EntryPoint, entry_points
from typing import Any, get_args

import pluggy
from attrs import evolve, fields, frozen, has, resolve_types

from deepspec_core import __version__
from deepspec_core.errors import PluginError, nearest
from deepspec_core.plugins import hooks
from deepspec_core.plugins.records import CORE, PluginRecord, Status, canonical
from deepspec_core.plugins.references import FAILURES, blame, message_of
from deepspec_core.plugins.registry import KINDS, Offer, Registry

__all__ = ["Plugins", "load_plugins"]

GROUP = "deepspec"
# What plugin.py must not import, because every command would wait for it.
_HEAVY = ("torch", "transformers", "numpy")


@frozen(kw_only=True, eq=False)
class Plugins:
    """What `load_plugins` found: pluggy's manager to call hooks, a record of each plugin, the components by name."""

    manager: pluggy.PluginManager
    records: tuple[PluginRecord, ...]
    registry: Registry

    def versions(self) -> dict[str, str]:
        """The versions of the loaded plugins by distribution, as checkpoints and caches record them."""
        return {record.package: record.version for record in self.records if record.loaded}


@frozen(kw_only=True, eq=False)
class _Found:
    """An entry point before it is loaded. `key` is unique, also for two plugins of the same name."""

    entry: EntryPoint
    name: str
    package: str
    version: str

    @property
    def key(self) -> str:
        return f"{self.package}/{self.name}"


class _LeftOut(Exception):
    """The plugin with `key` cannot be registered."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(reason)
        self.key, self.reason = key, reason


def load_plugins(*, blocked: Collection[str] = ()) -> Plugins:
    """Load every installed plugin except the blocked ones, which are given by plugin or distribution name.

    A plugin that fails is recorded with the reason and does not stop the others. PluginError if a blocked name is not
    installed, because a misspelled name would otherwise block nothing without a word. What plugins print meanwhile goes
    to standard error: standard output is the command's own.
    """
    found = _find()
    _check_blocked(blocked, found)
    with redirect_stdout(sys.stderr):
        return _load(found, blocked)


def _load(found: Sequence[_Found], blocked: Collection[str]) -> Plugins:
    unwanted = {canonical(name) for name in blocked}
    left_out: dict[str, tuple[Status, str]] = {}
    modules: dict[str, Any] = {}
    slow: dict[str, tuple[str, ...]] = {}
    for plugin in found:
        hit = unwanted & {canonical(plugin.name), canonical(plugin.package)}
        if hit:
            left_out[plugin.key] = ("blocked", f"--no-plugin {min(hit)}")
        elif (reason := _incompatible(plugin.entry)) is not None:
            left_out[plugin.key] = ("incompatible", reason)
        else:
            heavy = [name for name in _HEAVY if name not in sys.modules]
            try:
                module = plugin.entry.load()
            except (Exception, SystemExit) as error:
                left_out[plugin.key] = ("broken", blame(error))
                continue
            slow[plugin.key] = tuple(name for name in heavy if name in sys.modules)
            same = next((key for key, other in modules.items() if other is module), None)
            if same is None:
                modules[plugin.key] = module
            else:
                left_out[plugin.key] = ("broken", f"{plugin.entry.value} is already loaded as {same}")

    by_key = {plugin.key: plugin for plugin in found}
    offers: dict[str, list[Offer]] = {}
    while True:
        # A plugin that does not pass is dropped and registration starts again, so that the hooks it added are gone too.
        try:
            manager = _register(modules)
            for key in modules:
                if key not in offers:
                    offers[key] = _offers(manager, by_key[key], modules[key])
            break
        except _LeftOut as wanting:
            left_out[wanting.key] = ("broken", wanting.reason)
            del modules[wanting.key]

    records = [
        PluginRecord(
            name=plugin.name,
            package=plugin.package,
            version=plugin.version,
            status=left_out[plugin.key][0] if plugin.key in left_out else "ok",
            reason=left_out[plugin.key][1] if plugin.key in left_out else None,
            offers=_by_kind(offers[plugin.key], "label") if plugin.key in modules else {},
            summaries=_by_kind(offers[plugin.key], "summary") if plugin.key in modules else {},
            slow=slow.get(plugin.key, ()),
        )
        for plugin in found
    ]
    registry = Registry(
        (offer for key in modules for offer in offers[key]), [record for record in records if not record.loaded]
    )
    return Plugins(manager=manager, records=tuple(_mark_duplicates(records, registry)), registry=registry)


def _find() -> list[_Found]:
    found = []
    for entry in entry_points(group=GROUP):
        # A distribution with damaged metadata has neither name nor version. It is still listed.
        package = (entry.dist.name if entry.dist else None) or "unknown"
        version = (entry.dist.version if entry.dist else None) or "unknown"
        found.append(_Found(entry=entry, name=entry.name, package=package, version=version))
    return sorted(found, key=lambda plugin: (canonical(plugin.package) != CORE, plugin.package, plugin.name))


def _check_blocked(blocked: Iterable[str], found: Sequence[_Found]) -> None:
    known = sorted({name for plugin in found for name in (plugin.name, plugin.package)})
    for name in blocked:
        if canonical(name) not in map(canonical, known):
            close = nearest(name, known)
            raise PluginError(
                f"no plugin {name!r} to leave out",
                where=f"--no-plugin {name}",
                found=name,
                expected=f"one of {', '.join(known)}",
                fix=f"write {close!r}" if close else None,
            )


def _incompatible(entry: EntryPoint) -> str | None:
    """Why this version of core does not meet the distribution's requirement, or None if it does."""
    from packaging.requirements import InvalidRequirement, Requirement

    from deepspec_core.plugins.contract_changes import changed_since

    for text in (entry.dist.requires if entry.dist else None) or ():
        name = re.match(r"[\w.-]*", text)
        if name is None or canonical(name[0]) != CORE:
            continue
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            return f"its requirement {text!r} cannot be read"
        if requirement.marker and not requirement.marker.evaluate():
            continue
        if not requirement.specifier.contains(__version__, prereleases=True):
            changes = changed_since(requirement.specifier, __version__)
            told = f"; since then: {'; '.join(changes)}" if changes else ""
            return f"needs {CORE}{requirement.specifier}, installed is {__version__}{told}"
    return None


def _register(modules: Mapping[str, Any]) -> pluggy.PluginManager:
    """A manager in which every plugin is registered and checked. _LeftOut names the first plugin that does not pass."""
    manager = pluggy.PluginManager(hooks.PROJECT)
    manager.add_hookspecs(hooks)
    # This hook is historic and called before any plugin is registered. So each plugin gets the call when it is
    # registered.
    manager.hook.deepspec_addhooks.call_historic(kwargs={"manager": manager})
    keys = {id(module): key for key, module in modules.items()}
    for key, module in modules.items():
        try:
            manager.register(module, name=key)
        except pluggy.PluginValidationError as error:
            raise _LeftOut(keys.get(id(error.plugin), key), message_of(error)) from error
        except (Exception, SystemExit) as error:
            raise _LeftOut(key, blame(error)) from error
    known = [name for name, hook in vars(manager.hook).items() if hook.has_spec()]
    for name, hook in vars(manager.hook).items():
        for implementation in () if hook.has_spec() else hook.get_hookimpls():
            if not implementation.optionalhook:
                close = nearest(name, known)
                reason = f"unknown hook {name!r}" + (f": write {close!r}" if close else "")
                raise _LeftOut(implementation.plugin_name, reason)
    for key, module in modules.items():
        for name in known:
            if callable(getattr(module, name, None)) and manager.parse_hookimpl_opts(module, name) is None:
                raise _LeftOut(key, f"{name} is not marked with @hookimpl, so it would never be called")
    return manager


def _offers(manager: pluggy.PluginManager, plugin: _Found, module: Any) -> list[Offer]:
    """What the plugin's hooks offer. _LeftOut if a hook raises, or offers something of another type."""
    offers = []
    for kind_name, kind in KINDS.items():
        for implementation in getattr(manager.hook, kind.hook).get_hookimpls():
            if implementation.plugin is not module:
                continue
            if implementation.wrapper or implementation.hookwrapper:
                raise _LeftOut(plugin.key, f"{kind.hook} cannot be a wrapper: it offers, it does not change offers")
            try:
                specs = list(implementation.function())
            except (Exception, SystemExit) as error:
                raise _LeftOut(plugin.key, f"{kind.hook}() failed: {blame(error)}") from error
            for spec in specs:
                if type(spec) is not kind.spec:
                    raise _LeftOut(
                        plugin.key, f"{kind.hook}() offers a {type(spec).__name__}, expected {kind.spec.__name__}"
                    )
                if spec.options is not None and not kind.takes_options:
                    takers = ", ".join(other.title for other in KINDS.values() if other.takes_options)
                    raise _LeftOut(
                        plugin.key,
                        f"{kind.title} {spec.name!r} has options, which nothing would pass: only these have a section "
                        f"of the run file for theirs: {takers}",
                    )
                try:
                    _resolve_options(spec.options)
                except FAILURES as error:
                    raise _LeftOut(
                        plugin.key, f"the types of the options of {spec.name!r} cannot be resolved: {blame(error)}"
                    ) from error
                taken = kind.reserved & {option.name for option in fields(spec.options)} if spec.options else ()
                if taken:
                    raise _LeftOut(plugin.key, f"options of {spec.name!r} use a key that core keeps: {min(taken)!r}")
                offers.append(
                    Offer(kind=kind_name, spec=spec, plugin=plugin.name, package=plugin.package, version=plugin.version)
                )
    return offers


def _resolve_options(options: type[Any] | None) -> None:
    """Annotations that are text become types, in options classes and in those they hold."""
    if options is not None:
        resolve_types(options)
        for attribute in fields(options):
            for inner in _classes_in(attribute.type):
                _resolve_options(inner)


def _classes_in(type_: Any) -> Iterator[type[Any]]:
    if has(type_):
        yield type_
    for argument in get_args(type_):
        yield from _classes_in(argument)


def _by_kind(offers: Iterable[Offer], attribute: str) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for offer in offers:
        kinds.setdefault(offer.kind, []).append(getattr(offer, attribute))
    return kinds


def _mark_duplicates(records: Iterable[PluginRecord], registry: Registry) -> list[PluginRecord]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for conflict in registry.conflicts():
        for offer in conflict.offers:
            others = sorted(other.source for other in conflict.offers if other is not offer)
            reasons.setdefault((offer.package, offer.plugin), []).append(
                f"{conflict.title} {conflict.name!r} is also offered by {', '.join(others)}"
            )
    return [
        evolve(record, status="duplicate", reason="; ".join(dict.fromkeys(reasons[key])))
        if (key := (record.package, record.name)) in reasons
        else record
        for record in records
    ]
