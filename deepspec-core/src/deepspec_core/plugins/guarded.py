"""A plugin's callable whose failures are told as the plugin's.

Knows a callable and how its failures are told. Does not know kinds or names.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any


class Guarded:
    """`inner`, called within `telling()`. Every attribute is that of `inner`."""

    def __init__(self, inner: Callable[..., Any], telling: Callable[[], AbstractContextManager[None]]) -> None:
        self.inner, self._telling = inner, telling

    def __call__(self, *arguments: Any) -> Any:
        with self._telling():
            return self.inner(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
