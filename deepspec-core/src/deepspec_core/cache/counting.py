"""How many samples of a cache contain a token. Knows readers; not what the token is for."""

from __future__ import annotations

from deepspec_core.contracts.cache import CacheReader
from deepspec_core.progress import Progress


def samples_with(reader: CacheReader, token: int) -> int:
    """As the cache's writer counted, or else counted now: the tokens of all samples are read."""
    noted = getattr(reader, "samples_with", None)
    known: int | None = None if noted is None else noted(token)
    if known is not None:
        return known
    found = 0
    with Progress(len(reader), f"count token {token} in the cache", "samples") as progress:
        for index in range(len(reader)):
            found += bool((reader.tokens_of(index).input_ids == token).any())
            progress.advance()
    return found
