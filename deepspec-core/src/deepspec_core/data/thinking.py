"""Which conversations are asked in the target's thinking mode: all, none, or a share of them.

A conversation's mode follows from its id alone, so neither its place nor its neighbours matter. Knows ids. Does not
know templates.
"""

from __future__ import annotations

import hashlib


def thinks(share: bool | float, identity: str) -> bool:
    """Whether the conversation of this id is asked in thinking mode. True and False decide for all."""
    if isinstance(share, bool):
        return share
    digest = hashlib.sha256(f"thinking/{identity}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def modes(share: bool | float) -> tuple[bool, ...]:
    """The modes in use. A share uses both; the mode without thinking comes first."""
    return (share,) if isinstance(share, bool) else (False, True)
