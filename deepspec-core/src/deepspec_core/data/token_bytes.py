"""Which tokens lie within spans of a text, told from the tokens' own bytes.

A byte-level tokenizer cuts a text's bytes into tokens, so the lengths of its tokens say where each begins. The
tokenizer's own offsets say the same, and cost it as much as a third of its time. Where the tokens' bytes are not those
of the text, since a normaliser changed it or a token swallowed white space, only offsets tell. Knows vocabularies and
spans; neither templates nor why a span is wanted.

Legend: V ids, T tokens of a text, N those of several.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from typing import Any, Final

import numpy as np
from attrs import frozen
from tokenizers import decoders

from deepspec_core.data.answers import Answer

Array = np.ndarray[Any, Any]
_SPACE: Final = b" "


def _byte_of() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for: itself where it can be seen, else a later."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(seen)]
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


@frozen(kw_only=True, eq=False)
class TokenBytes:
    """The bytes of each token of a vocabulary. lengths_V, leading_V, trailing_V count them, and spaces at their ends.

    `trims`: the tokenizer's own offsets leave those spaces out, and so does this, so that both say the same. But a
    token that is nothing but spaces has no width there (see answers.supervised), and its own here: leading_V and
    trailing_V are 0.
    """

    bytes_V: list[bytes]
    trims: bool
    lengths_V: Array
    leading_V: Array
    trailing_V: Array

    def masks(
        self, texts: Sequence[str], ids: Sequence[Sequence[int]], spans: Sequence[Sequence[Answer]], most: int
    ) -> list[tuple[Array, Array]] | None:
        """Of each text its first `most` token ids, [T] int64, and which of them lie within its spans, [T] bool.

        None where the tokens of a text do not have its bytes. Of a marker that is cut off, no token counts.
        """
        own = [text.encode() for text in texts]
        if any(b"".join(map(self.bytes_V.__getitem__, some)) != each for some, each in zip(ids, own, strict=True)):
            return None
        # All texts as one, one after the other.
        ids_N = np.array(list(chain.from_iterable(ids)), dtype=np.int64)
        lengths_N = self.lengths_V[ids_N]
        stops_N = np.cumsum(lengths_N)
        begins_N = stops_N - lengths_N
        if self.trims:
            begins_N += self.leading_V[ids_N]
            stops_N -= self.trailing_V[ids_N]
        starts, ends, base, firsts, first = [], [], 0, [], 0
        for text, each, some, inside in zip(texts, own, ids, spans, strict=True):
            kept = min(len(some), most)
            seen = int(stops_N[first + kept - 1]) - base if kept else 0
            while seen < len(each) and each[seen] & 0xC0 == 0x80:
                seen += 1  # a character that is cut within counts as seen, as in offsets
            plain = len(each) == len(text)
            for span in inside:
                places = (span.start, span.text_end, span.end)
                start, text_end, end = places if plain else (len(text[:place].encode()) for place in places)
                starts.append(base + start)
                ends.append(base + (end if end <= seen else text_end))
            firsts.append((first, first + kept))
            base, first = base + len(each), first + len(some)
        mask_N = np.zeros(len(ids_N), dtype=np.bool_)
        # Tokens follow each other, so those within a span do.
        begins = np.searchsorted(begins_N, starts)
        for begin, end in zip(begins.tolist(), np.searchsorted(stops_N, ends, side="right").tolist(), strict=True):
            mask_N[begin:end] = True
        return [(ids_N[begin:end], mask_N[begin:end]) for begin, end in firsts]


def token_bytes(tokenizer: Any) -> TokenBytes | None:
    """The bytes of each token of a transformers fast tokenizer; None if its vocabulary does not consist of bytes."""
    backend = tokenizer.backend_tokenizer
    if not isinstance(backend.decoder, decoders.ByteLevel):
        return None
    byte_of, added = _byte_of(), {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    # An id without bytes never makes a text's.
    bytes_V = [b"\xff"] * (max(vocabulary.values(), default=-1) + 1)
    for token, index in vocabulary.items():
        if index in added:
            bytes_V[index] = added[index].encode()
        elif all(sign in byte_of for sign in token):
            bytes_V[index] = bytes(map(byte_of.__getitem__, token))
    lengths = [len(each) for each in bytes_V]
    leading = [len(each) - len(each.lstrip(_SPACE)) for each in bytes_V]
    trailing = [len(each) - len(each.rstrip(_SPACE)) for each in bytes_V]
    counts = np.array([lengths, leading, trailing], dtype=np.int64).reshape(3, -1)
    counts[1:] *= counts[1] < counts[0]
    return TokenBytes(
        bytes_V=bytes_V, trims=trims_offsets(backend), lengths_V=counts[0], leading_V=counts[1], trailing_V=counts[2]
    )


def trims_offsets(backend: Any) -> bool:
    """Whether a Rust tokenizer's offsets leave out spaces at the ends of tokens."""

    def found(value: Any) -> bool:
        if isinstance(value, list):
            return any(map(found, value))
        if not isinstance(value, dict):
            return False
        return (value.get("type") == "ByteLevel" and bool(value.get("trim_offsets"))) or any(map(found, value.values()))

    processor = backend.post_processor
    return processor is not None and found(json.loads(processor.__getstate__()))
