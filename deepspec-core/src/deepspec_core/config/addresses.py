"""The addresses of servers. Knows how one is written, and when two are the same; not whether anybody answers there."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from attrs import Attribute


def address(_options: object, attribute: Attribute[object], value: object) -> None:
    """An http or https address without a user, a password or a query: run files and results keep no secrets."""
    try:
        parts = urlsplit(value) if isinstance(value, str) else None
        usable = parts is not None and parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # no port, or half an IPv6 address
        parts, usable = None, False
    if not usable:
        raise ValueError(f"'{attribute.name}' must be an address such as http://host:8000/v1: {value}")
    if parts is not None and (parts.username is not None or parts.query or parts.fragment):
        raise ValueError(
            f"'{attribute.name}' must be an address without user, password or query; api_key_env "
            f"names a key: {parts.hostname}"
        )


def place(written: str) -> str:
    """A valid address in one way of writing it: two that are the same server's are equal.

    Case of the host, the port that goes without saying, slashes at the end and the protocol's /v1 make no difference.
    """
    parts = urlsplit(written)
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return f"{parts.scheme}://{parts.hostname} {port}{path}"


def different(_options: object, attribute: Attribute[Any], value: tuple[str, ...]) -> None:
    """No server is named twice: it would get twice the requests, and be compared with itself."""
    seen: dict[str, str] = {}
    for written in value:
        where = place(written)
        if where in seen:
            raise ValueError(f"'{attribute.name}' must name each server once: {seen[where]} and {written} are the same")
        seen[where] = written
