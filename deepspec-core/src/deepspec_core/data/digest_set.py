"""A set of digests in one block of memory, to recognise repeated ids, prompts and questions.

A digest takes 24 to 48 bytes here, about 32 on average; a Python set takes about 110. Knows digests of 16 bytes; does
not know what they are digests of.
"""

from __future__ import annotations

import hashlib
from typing import Final

_BYTES: Final = 16
_FIRST_PLACES: Final = 1024
_FREE: Final = bytes(_BYTES)


def digest16(text: str) -> bytes:
    """16 bytes that tell one text from another, half a surrogate pair in it or not."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=_BYTES).digest()


class DigestSet:
    """Digests of 16 bytes each. Places are tried one after the other, from the one that the digest itself names."""

    def __init__(self) -> None:
        self._places, self._taken = bytearray(_BYTES * _FIRST_PLACES), 0

    def __len__(self) -> int:
        return self._taken

    def __contains__(self, digest: bytes) -> bool:
        at = self._place(digest)
        return self._places[at : at + _BYTES] == digest

    def add(self, digest: bytes) -> bool:
        """Whether the digest is new. It is in the set afterwards."""
        at = self._place(digest)
        if self._places[at : at + _BYTES] == digest:
            return False
        self._places[at : at + _BYTES] = digest
        self._taken += 1
        if 3 * _BYTES * self._taken > 2 * len(self._places):
            self._grow()
        return True

    @property
    def num_bytes(self) -> int:
        """Of memory that the set takes."""
        return len(self._places)

    def _place(self, digest: bytes) -> int:
        """Where the digest is, or the free place where it would be."""
        assert len(digest) == _BYTES, "a digest of 16 bytes"
        assert digest != _FREE, "no text has this digest"
        last = len(self._places) - 1
        at = int.from_bytes(digest[:8], "little") * _BYTES & last
        while (here := self._places[at : at + _BYTES]) != digest and here != _FREE:
            at = at + _BYTES & last
        return at

    def _grow(self) -> None:
        before, self._places = self._places, bytearray(2 * len(self._places))
        for start in range(0, len(before), _BYTES):
            digest = bytes(before[start : start + _BYTES])
            if digest != _FREE:
                at = self._place(digest)
                self._places[at : at + _BYTES] = digest
