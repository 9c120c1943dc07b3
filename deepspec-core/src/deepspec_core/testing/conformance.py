"""What the conformance suites share: one test for each clause of a contract, and the message of a broken clause.

A suite is a class with a test for each clause. Pytest collects a subclass of it that names a component. Each failure
says what the contract requires, what was seen, and where the contract is written. This file knows registries and
clauses. It does not know any contract; each contract's suite has a file of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from types import ModuleType
from typing import Any, ClassVar, TypeVar
from unittest import SkipTest

from deepspec_core.errors import DeepSpecError
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.plugins.references import blame
from deepspec_core.plugins.registry import Registry
from deepspec_core.testing.core_registry import core_registry

_Suite = TypeVar("_Suite", bound="Suite")


class ContractBroken(AssertionError):
    """A component breaks a clause: what the clause requires, what was seen, and where the clause is written."""

    def __init__(self, who: str, clause: Clause, seen: str) -> None:
        self.clause, self.seen = clause, seen
        super().__init__(
            f"{who} does not keep its contract\n"
            f"  the contract asks:  {clause.asks}\n"
            f"  seen:               {seen}\n"
            f"  written in:         {clause.written}"
        )


class Unmet(AssertionError):
    """What was seen when a clause was broken. Tests of a suite raise it, and `clause` adds what the clause requires."""


class Clause:
    """One requirement of a contract. `written` names the file and the name in it, or the page and its heading."""

    def __init__(self, asks: str, written: str) -> None:
        self.asks, self.written = asks, written


def require(kept: object, seen: str) -> None:
    """Raise Unmet, with what was seen, unless `kept` is true."""
    __tracebackhide__ = True
    if not kept:
        raise Unmet(seen)


def clause(asks: str, *, written: str) -> Callable[[Callable[[_Suite], None]], Callable[[_Suite], None]]:
    """Marks a test of a suite as the test of a clause. Any error that it raises is reported as ContractBroken."""
    told = Clause(asks, written)

    def mark(test: Callable[[_Suite], None]) -> Callable[[_Suite], None]:
        @wraps(test)
        def checked(self: _Suite) -> None:
            __tracebackhide__ = True
            try:
                test(self)
            except SkipTest:
                raise
            except Unmet as error:
                raise ContractBroken(self.named(), told, str(error)) from None
            except (DeepSpecError, AssertionError) as error:
                # The message says everything, so the inner error is not chained.
                raise ContractBroken(self.named(), told, _said(error)) from None
            except (Exception, SystemExit) as error:
                # An error in the author's own code: it is chained, so that its traceback stands above the message.
                raise ContractBroken(self.named(), told, _said(error)) from error

        checked.__doc__ = f"{asks[0].upper()}{asks[1:]}."
        checked.clause = told  # type: ignore[attr-defined]
        return checked

    return mark


def clauses(suite: type[Suite]) -> dict[str, Clause]:
    """The clauses of a suite, by the names of their tests."""
    found = {name: getattr(getattr(suite, name), "clause", None) for name in dir(suite) if name.startswith("test_")}
    return {name: told for name, told in found.items() if told is not None}


def broken_by(suite: type[Suite], only: Iterable[str] | None = None) -> dict[str, str]:
    """The messages of the clauses that the suite's component breaks, by the names of their tests.

    Runs in this process, without pytest. `only` names the tests to run; None: all.
    """
    found, one = {}, suite()
    for name in clauses(suite) if only is None else only:
        try:
            getattr(one, name)()
        except ContractBroken as error:
            found[name] = str(error)
        except SkipTest:
            continue
    return found


class Suite:
    """The base of all suites, with the attributes that a subclass sets.

    component: The component's name, as plugin.py offers it.
    plugin: The module of the hooks, such as `my_package.plugin`, or several modules. They need not be installed. None:
        the installed plugins.
    options: For components with options: keys and values as in a run file.
    """

    kind: ClassVar[str]
    component: ClassVar[str]
    plugin: ClassVar[ModuleType | tuple[ModuleType, ...] | None] = None
    options: ClassVar[Mapping[str, Any]] = {}

    def named(self) -> str:
        """The component's name in messages."""
        return f"{self.kind} {self.component!r}"

    def registry(self) -> Registry:
        """A registry of what the plugin offers, with core's loss terms and weightings."""
        kept: Registry | None = self.__dict__.get("_registry")
        if kept is None:
            modules = self.plugin if isinstance(self.plugin, tuple) else (self.plugin,)
            given = [module for module in modules if module is not None]
            kept = self.__dict__["_registry"] = core_registry(*given) if given else load_plugins().registry
        return kept

    def made_options(self) -> tuple[Any, ...]:
        """The arguments of `build`: the options object, or nothing if the component has no options."""
        kind = self.registry().get(self.kind, self.component).options
        if kind is None:
            require(not self.options, f"options {dict(self.options)}, where the spec has no class of options")
            return ()
        return (kind(**self.options),)


def _said(error: BaseException) -> str:
    if isinstance(error, DeepSpecError):
        return error.render().replace("\n", "\n    ")
    if isinstance(error, AssertionError):
        return str(error).strip().replace("\n", "\n    ") or blame(error)
    return blame(error)
