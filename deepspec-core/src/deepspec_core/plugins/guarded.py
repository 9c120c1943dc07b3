"""A plugin's callable whose failures are told as the plugin's, and how they are told.

Knows a callable and the words for its failures. Does not know kinds or names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from attrs import frozen

from deepspec_core.errors import DeepSpecError, PluginError
from deepspec_core.plugins.references import FAILURES, blame


@frozen
class Told:
    """told() is a context in which a failure becomes a PluginError. It can be sent to other processes.

    `what` fails, such as "cache format 'toy' of deepspec-toy 1.0"; `where` is its code. DeepSpecErrors and a full disk
    stay as they are.
    """

    what: str
    where: str

    @contextmanager
    def __call__(self) -> Iterator[None]:
        try:
            yield
        except DeepSpecError:
            raise
        except FAILURES as error:
            from deepspec_core.disk import no_room

            if no_room(error) is not None:
                raise
            raise PluginError(f"{self.what} failed", where=self.where, found=blame(error)) from error


class Guarded:
    """`inner`, called within `telling()`. Every attribute is that of `inner`."""

    def __init__(self, inner: Callable[..., Any], telling: Callable[[], AbstractContextManager[None]]) -> None:
        self.inner, self._telling = inner, telling

    def __call__(self, *arguments: Any) -> Any:
        with self._telling():
            return self.inner(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
