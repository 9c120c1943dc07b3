"""Records what a stage reads while it works: keys of the run file, and other content such as source files and weights.

A stage's results depend on what it read. Each reading is recorded when it happens, so nobody has to maintain a list.
The sections of a run file record the name of each key that is read (`recording`). A value that is computed once and
used by several stages (`remembered`) records, at every use, everything that was read to compute it. Knows names and
digests. Does not know stages or folders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Final, Generic, TypeVar

import attrs
from attrs import define, evolve, field

from deepspec_core.config.load import RunFile
from deepspec_core.config.schema import FILLED_IN, changes_results

T = TypeVar("T")

_NOTE: Final = "_note_of_reads"


@define
class Trace:
    """What was read: names of keys or of whole sections, and the digest of each content by name."""

    keys: set[str] = field(factory=set)
    content: dict[str, str] = field(factory=dict)

    def covers(self, other: Trace) -> bool:
        """Whether this trace has everything that `other` has."""
        return other.keys <= self.keys and other.content.items() <= self.content.items()

    def add(self, other: Trace) -> None:
        """Add everything that `other` has."""
        self.keys |= other.keys
        self.content |= other.content


class Reads:
    """Takes notes of readings and adds them to every open trace."""

    def __init__(self) -> None:
        self._open: list[tuple[Trace, Callable[[Trace], None] | None]] = []

    def key(self, name: str) -> None:
        """Note that a key was read, or a section with all its keys."""
        self._note(Trace({name}))

    def content(self, name: str, digest: str) -> None:
        """Note that content outside the run file was read."""
        self._note(Trace(set(), {name: digest}))

    def again(self, trace: Trace) -> None:
        """Note that a value computed earlier is used. What was read to compute it counts as read now."""
        self._note(trace)

    def _note(self, noted: Trace) -> None:
        for trace, on_growth in self._open:
            if not trace.covers(noted):
                trace.add(noted)
                if on_growth is not None:
                    on_growth(trace)

    @contextmanager
    def traced(self, on_growth: Callable[[Trace], None] | None = None) -> Iterator[Trace]:
        """A trace of everything that is read inside the block. `on_growth` is called whenever it has grown."""
        trace = Trace()
        self._open.append((trace, on_growth))
        try:
            yield trace
        finally:
            self._open.pop()

    @contextmanager
    def unnoted(self) -> Iterator[None]:
        """Inside the block nothing is recorded, because what is read there affects no result of the stage."""
        opened, self._open = self._open, []
        try:
            yield
        finally:
            self._open = opened


class remembered(Generic[T]):
    """A property that is computed once, like functools.cached_property, of a class with an attribute `reads`."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"_remembered_{name}"

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        if self._name in instance.__dict__:
            value, trace = instance.__dict__[self._name]
            instance.reads.again(trace)
            return value  # type: ignore[no-any-return]
        with instance.reads.traced() as trace:
            value = self._compute(instance)
        instance.__dict__[self._name] = (value, trace)
        return value


def recording(file: RunFile, reads: Reads) -> RunFile:
    """The same run file, but its sections tell `reads` which of their keys are read.

    Keys that change no result (config/schema.py marks them) are left out. Readings inside a plugin's options are not
    seen, so reading the options counts as reading the whole section.
    """
    sections = {
        attribute.name: _recording(value, attribute.name, reads)
        for attribute in attrs.fields(RunFile)
        if attrs.has(type(value := getattr(file, attribute.name)))
    }
    return evolve(file, **sections)


def _recording(section: Any, name: str, reads: Reads) -> Any:
    copy: Any = object.__new__(_recording_class(section.__class__))
    for attribute in attrs.fields(type(section)):
        object.__setattr__(copy, attribute.name, getattr(section, attribute.name))
    object.__setattr__(copy, _NOTE, lambda key: reads.key(f"{name}.{key}" if key else name))
    return copy


@cache
def _recording_class(section: type) -> type:
    """A subclass that notes readings. Its copies and pickles are of the plain class and note nothing."""
    noted = {
        # A plugin's options stand in the section itself: [draft] block_size, not [draft.options] block_size.
        attribute.name: "" if attribute.metadata == FILLED_IN else attribute.name
        for attribute in attrs.fields(section)
        if changes_results(attribute)
    }

    def read(self: Any, name: str) -> Any:
        # attrs.evolve reads all keys of the old section; the new section notes nothing.
        if name in noted and (note := getattr(self, _NOTE, None)) is not None:
            note(noted[name])
        return object.__getattribute__(self, name)

    def reduce(self: Any, _protocol: Any) -> Any:
        values = {attribute.name: object.__getattribute__(self, attribute.name) for attribute in attrs.fields(section)}
        return _plain, (section, values)

    members = {"__slots__": (_NOTE,), "__getattribute__": read, "__reduce_ex__": reduce, "__doc__": section.__doc__}
    return type(section.__name__, (section,), members)


def _plain(section: type, values: dict[str, Any]) -> Any:
    copy: Any = object.__new__(section)
    for name, value in values.items():
        object.__setattr__(copy, name, value)
    return copy
