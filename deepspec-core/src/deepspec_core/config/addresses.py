"""A validator of the addresses of servers. Knows how an address is written; not whether anybody answers there."""

from __future__ import annotations

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
        raise ValueError(f"'{attribute.name}' must be an address alone; api_key_env names a key: {parts.hostname}")
